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

/* One token and head of a split sequence: the states of its splits, and the sink, put together. */
static void TARGET NAME(merge_row)(const struct attention_call *call, int64_t first_part, int64_t num_splits, int64_t stride,
                                   int64_t token, int head) {
    int dim = (int)call->value.dim;
    int64_t num_heads = call->num_q_heads;
    float highest = call->sinks ? call->sinks[head] : -INFINITY;
    for (int64_t s = 0; s < num_splits; s++) {
        float lse = call->partial_lse[(first_part + s * stride) * num_heads + head];
        if (!(lse <= highest)) highest = lse; /* NaN wins */
    }
    float channels[MAX_DIM];
    for (int d = 0; d < dim; d++) channels[d] = 0.0f;
    float total = 0.0f;
    if (highest != -INFINITY) {
        if (call->sinks) total = expf(call->sinks[head] - highest);
        for (int64_t s = 0; s < num_splits; s++) {
            int64_t part = (first_part + s * stride) * num_heads + head;
            float weight = expf(call->partial_lse[part] - highest);
            if (weight == 0.0f) continue;
            const float *from = call->partial_out + part * dim;
            for (int d = 0; d < dim; d++) channels[d] += weight * from[d];
            total += weight;
        }
    }
    NAME(write_row)(call, channels, total == 0.0f ? 0.0f : 1.0f / total, token, head);
    if (call->lse) call->lse[token * num_heads + head] = highest == -INFINITY ? -INFINITY : highest + logf(total);
}
