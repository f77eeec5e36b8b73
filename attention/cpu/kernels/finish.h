/* From sums to results. Included once per instruction set after rows.h. */

/* channels * factor to one head's row of `out`, in its dtype. */
static void TARGET NAME(write_row)(const struct attention_call *call, const float *channels, float factor, int64_t token,
                                   int64_t head) {
    int64_t at = token * call->out_token_stride + head * call->out_head_stride;
    int dim = (int)call->value.dim;
    if (call->dtype == DTYPE_F32) {
        float *out = (float *)call->out + at;
        for (int d = 0; d < dim; d++) out[d] = channels[d] * factor;
    } else if (call->dtype == DTYPE_F16) {
        uint16_t *out = (uint16_t *)call->out + at;
        for (int d = 0; d < dim; d++) out[d] = NAME(to_f16)(channels[d] * factor);
    } else {
        uint16_t *out = (uint16_t *)call->out + at;
        for (int d = 0; d < dim; d++) out[d] = NAME(to_bf16)(channels[d] * factor);
    }
}
