/* Sequences that were split: the states of their splits put together. Included once per vector width after finish.h. */

/* One token and head of a split sequence: the states of its splits, and the sink, put together. */
static void TARGET NAME(merge_row)(const struct job *job, int64_t first_part, int64_t num_splits, int64_t stride, int64_t token,
                                   int head) {
    const struct attention_call *call = job->call;
    int dim = (int)call->value.dim;
    int64_t num_heads = call->num_q_heads;
    float highest = call->sinks ? call->sinks[head] : -INFINITY;
    for (int64_t s = 0; s < num_splits; s++) {
        float lse = job->partial_lse[(first_part + s * stride) * num_heads + head];
        if (!(lse <= highest)) highest = lse; /* NaN wins */
    }
    float channels[MAX_DIM];
    for (int d = 0; d < dim; d++) channels[d] = 0.0f;
    float total = 0.0f;
    if (highest != -INFINITY) {
        if (call->sinks) total = expf(call->sinks[head] - highest);
        for (int64_t s = 0; s < num_splits; s++) {
            int64_t part = (first_part + s * stride) * num_heads + head;
            float weight = expf(job->partial_lse[part] - highest);
            if (weight == 0.0f) continue;
            const float *from = job->partial_out + part * dim;
            for (int d = 0; d < dim; d++) channels[d] += weight * from[d];
            total += weight;
        }
    }
    NAME(write_row)(call, channels, total == 0.0f ? 0.0f : 1.0f / total, token, head);
    if (call->lse) call->lse[token * num_heads + head] = highest == -INFINITY ? -INFINITY : highest + logf(total);
}

static void TARGET NAME(merge)(void *argument) {
    struct job *job = argument;
    const struct attention_call *call = job->call;
    for (;;) {
        int64_t i = atomic_fetch_add(&job->next, 1);
        if (i >= call->num_merges) break;
        const int32_t *column = call->merges + i;
        int64_t first = column[0], end = column[call->num_merges];
        int64_t part = column[2 * call->num_merges], num_splits = column[3 * call->num_merges];
        for (int64_t token = first; token < end; token++)
            for (int head = 0; head < call->num_q_heads; head++)
                NAME(merge_row)(job, part + token - first, num_splits, end - first, token, head);
    }
}
