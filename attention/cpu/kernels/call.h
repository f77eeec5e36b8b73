/* What the caller hands over: raw pointers and strides, no type of torch or Python. Mirrored by library.py. */
#ifndef PAGEDKV_CALL_H
#define PAGEDKV_CALL_H

#include <stdint.h>

enum dtype { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2 };
enum format { FORMAT_FLOAT = 0, FORMAT_E4M3 = 1, FORMAT_E5M2 = 2, FORMAT_INT8 = 3, FORMAT_INT4 = 4 };

/* One cache, of keys or of values. Strides count elements of the cache, those of scales count scales. */
struct cache {
    void *data;
    void *scale; /* E4M3, E5M2: float[kv_heads] or NULL; INT8: float; INT4: bf16 (step, minimum) */
    int64_t block_stride, slot_stride, head_stride;
    int64_t scale_block_stride, scale_slot_stride, scale_head_stride;
    int64_t dim;        /* channels of a head */
    int64_t group_size; /* channels of an INT4 group */
};

struct attention_call {
    const void *query;
    struct cache key, value;
    const int32_t *block_tables, *seq_lens, *query_start_loc;
    const int32_t *tasks;  /* [6][num_tasks], see AttentionPlan */
    const int32_t *merges; /* [4][num_merges] */
    const int32_t *tree_mask;
    const float *sinks, *alibi_slopes;
    void *out;
    float *lse;
    int64_t query_token_stride, query_head_stride, out_token_stride, out_head_stride, table_stride;
    int64_t num_tasks, num_decode_tasks, num_merges, num_partial_tokens;
    int64_t num_q_heads, num_kv_heads, block_size, tree_words;
    int64_t window_left, window_right;
    int32_t dtype, format, causal;
    float scale, softcap;
};

struct write_call {
    const void *source[2]; /* key and value; value may be NULL */
    struct cache cache[2];
    const int64_t *slots;
    int64_t token_stride[2], head_stride[2];
    int64_t num_tokens, num_kv_heads, block_size;
    int32_t dtype, format;
};

/* Runs body(argument) on num_threads threads and returns when all are done: GOMP_parallel of the OpenMP runtime that
   the process already has. */
typedef void (*parallel_t)(void (*body)(void *), void *argument, unsigned num_threads, unsigned flags);

#endif
