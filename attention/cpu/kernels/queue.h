/* What a thread does: take units of work until there are none. Included once per instruction set after attend.h. */

static int64_t NAME(scratch_bytes)(const struct attention_call *call, int64_t rows, int has_tiles) {
    struct NAME(scratch) ignored;
    return NAME(divide_scratch)(&ignored, call, rows, has_tiles, NULL);
}

/* Units: each prefill task for one KV head, longest first; then each decode task for all heads, which fill the gaps. */
static void TARGET NAME(run)(void *argument) {
    struct job *job = argument;
    const struct attention_call *call = job->call;
    struct NAME(scratch) scratch;
    char *memory = job->memory + atomic_fetch_add(&job->next_thread, 1) * job->bytes;
    NAME(divide_scratch)(&scratch, call, job->widest, job->has_tiles, memory);
    scratch.partial_out = job->partial_out, scratch.partial_lse = job->partial_lse;
    memset(scratch.zeros, 0, (NAME(words)(call->key.dim) + NAME(words)(call->value.dim)) * sizeof(float));
#ifdef BF16_DOT
    if (call->format != FORMAT_FLOAT && call->format != FORMAT_INT4) NAME(fill_table)(call->format, scratch.codes_as_bf16);
#endif
    int64_t num_heads = call->num_kv_heads, num_prefill = job->num_units - call->num_decode_tasks;
    for (;;) {
        int64_t unit = atomic_fetch_add(&job->next, 1);
        if (unit >= job->num_units) break;
        if (unit < num_prefill) {
            int head = (int)(unit % num_heads);
            NAME(attend)(call, call->num_decode_tasks + unit / num_heads, head, head + 1, &scratch);
        } else {
            NAME(attend)(call, unit - num_prefill, 0, (int)num_heads, &scratch);
        }
    }
}
