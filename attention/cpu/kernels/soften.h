/* From products to weights: scale, soft-cap, biases, masks, and the online softmax. Included once per instruction set after
   task.h. */

/* The keys of a tile that a query token sees are [low, high), but for the tree mask. */
INLINE void NAME(seen)(const struct NAME(task) *task, int token, int first_key, int num_keys, int *low, int *high) {
    const struct attention_call *call = task->call;
    int64_t position = (int64_t)token + task->query_offset;
    int64_t from = 0, to = num_keys;
    if (call->window_left >= 0 && position - call->window_left > first_key) from = position - call->window_left - first_key;
    int64_t right = call->causal ? 0 : call->window_right;
    if (right >= 0 && position + right + 1 - first_key < to) to = position + right + 1 - first_key;
    *high = to < 0 ? 0 : (int)to;
    *low = from > *high ? *high : (int)from;
}

/* How many keys of a tile any row of a block sees, from the first on; 0 if none. */
INLINE int NAME(keys_seen)(const struct NAME(task) *task, const struct NAME(block) *b) {
    int low, high, ignored;
    NAME(seen)(task, task->first + b->first_row / task->group, b->first_key, b->num_keys, &low, &ignored);
    NAME(seen)(task, task->first + (b->first_row + b->num_rows - 1) / task->group, b->first_key, b->num_keys, &ignored, &high);
    return low < high ? high : 0;
}

/* A vector of products becomes scores: soft-cap, ALiBi, and what the tree hides. */
INLINE vf NAME(biased)(const struct NAME(task) *task, vf x, int head, int token, int key, int num_left) {
    const struct attention_call *call = task->call;
    if (call->softcap > 0.0f) x = call->softcap * NAME(tanh)(x * (1.0f / call->softcap));
    if (call->alibi_slopes) {
        vf distance = __builtin_convertvector((int)(key - token - task->query_offset) + NAME(lane_numbers)(), vf);
        x -= call->alibi_slopes[head] * NAME(select)(distance < 0.0f, -distance, distance);
    }
    if (call->tree_mask) {
        const int32_t *bits = call->tree_mask + token * call->tree_words;
        for (int i = 0; i < LANES && i < num_left; i++) {
            int draft = key + i - task->first_draft;
            if (draft >= 0 && !(bits[draft / 32] >> (draft % 32) & 1)) x[i] = -INFINITY;
        }
    }
    return x;
}

/* The first key of a tile that a tree mask may hide; beyond any tile where there is no mask. */
INLINE int NAME(first_hidden)(const struct NAME(task) *task, int first_key) {
    if (!task->call->tree_mask) return INT32_MAX;
    return task->first_draft > first_key ? task->first_draft - first_key : 0;
}

/* Whether no row of the task sees this draft. Nobody may have written such a one, and a NaN among its values would outlive a
   weight of zero. */
static int RARE NAME(is_unseen)(const struct NAME(task) *task, int key) {
    int draft = key - task->first_draft;
    for (int token = task->end - 1; token >= task->first && token + task->query_offset >= key; token--)
        if (task->call->tree_mask[token * task->call->tree_words + draft / 32] >> (draft % 32) & 1) return 0;
    return 1;
}

/* Values of drafts that no row sees are read as zeros. */
static void RARE NAME(hide_unseen)(const struct NAME(task) *task, int first_key, int num_keys, const char **values) {
    for (int i = NAME(first_hidden)(task, first_key); i < num_keys; i++)
        if (NAME(is_unseen)(task, first_key + i)) values[i] = (const char *)task->scratch->zeros;
}

/* INT8: the scales of a tile's keys and values for one head; zeros of drafts that no row sees. */
static void RARE NAME(scales_of_tile)(const struct NAME(task) *task, int kv_head, int first_key, int num_keys) {
    const struct attention_call *call = task->call;
    const struct NAME(scratch) *s = task->scratch;
    if (call->format != FORMAT_INT8) return;
    NAME(token_scales)(task, &call->key, kv_head, first_key, num_keys, s->key_scales);
    NAME(token_scales)(task, &call->value, kv_head, first_key, num_keys, s->value_scales);
    for (int i = NAME(first_hidden)(task, first_key); i < num_keys; i++)
        if (NAME(is_unseen)(task, first_key + i)) s->value_scales[i] = 0.0f;
}

#ifdef INT16_DOT
/* Rounded to int16, saturating. */
INLINE void NAME(store_int16)(int16_t *to, vf x) {
#if LANES == 16
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)x)));
#else
    __m256i whole = _mm256_cvtps_epi32((__m256)x);
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#endif
}
#endif

/* A row of products as the scores of its keys: scaled, biased, and -infinity where a key is not seen. */
static void TARGET NAME(score_row)(const struct NAME(task) *task, const struct NAME(block) *b, int head, int token, float factor,
                                   float *row) {
    const int is_int8 = task->call->format == FORMAT_INT8;
    const vi lanes = NAME(lane_numbers)();
    const vf none = (vf){0} - INFINITY;
    int low, high;
    NAME(seen)(task, token, b->first_key, b->num_keys, &low, &high);
    for (int k = 0; k < b->padded_keys; k += LANES) {
        vf x = none;
        if (k < high && k + LANES > low) {
            x = NAME(load)(row + k) * factor;
            if (is_int8) x *= NAME(load)(b->key_scales + k);
            if (task->is_biased) x = NAME(biased)(task, x, head, token, b->first_key + k, high - k);
            if (k < low || k + LANES > high) x = NAME(select)((lanes >= low - k) & (lanes < high - k), x, none);
        }
        NAME(store)(row + k, x);
    }
}

#ifdef HAS_TILES
#define SHARES_OF_ROW 4 /* how the time that a row takes is divided between the two loops */
#define WORK_SHARE(share) \
    if (work) NAME(work_share)(work, share)
#else
#define WORK_SHARE(share)
#endif

/* The products of a block become weights, as words. `highest` and `total` move on. By what earlier sums shrink is left in `shrink`,
   what one unit of an integer weight stands for in `weight`. Every step is done for all rows before the next: each is too short to
   fill a processor by itself. Meanwhile `work` is done, most of it. */
static void TARGET NAME(soften)(const struct NAME(task) *task, int kv_head, const struct NAME(block) *b, float *shrink, float *weight,
                                struct NAME(tile_work) *work) {
    const struct attention_call *call = task->call;
    const struct NAME(scratch) *s = task->scratch;
    const int num_rows = b->num_rows, padded_keys = b->padded_keys;
    const int64_t at = (int64_t)(kv_head - task->first_head) * task->padded_rows + b->first_row;
    const int is_int8 = call->format == FORMAT_INT8;
    float *highest = s->highest + at, *total = s->total + at;
    float factor[ROW_BLOCK], largest[ROW_BLOCK + LANES], base[ROW_BLOCK + LANES];

    float key_scale = call->scale;
    if (call->key.scale && (call->format == FORMAT_E4M3 || call->format == FORMAT_E5M2))
        key_scale *= ((const float *)call->key.scale)[kv_head * call->key.scale_head_stride];
    int low, high, ignored;
    NAME(seen)(task, task->first + b->first_row / task->group, b->first_key, b->num_keys, &ignored, &high);
    NAME(seen)(task, task->first + (b->first_row + num_rows - 1) / task->group, b->first_key, b->num_keys, &low, &ignored);
    const int is_stored = task->is_biased || is_int8 || low > 0 || high < padded_keys;
    for (int i = 0; i < num_rows; i++) {
        float *row = b->scores + i * b->stride;
        factor[i] = key_scale * s->query_scales[at + i];
        if (is_stored) {
            NAME(score_row)(task, b, kv_head * task->group + (b->first_row + i) % task->group,
                            task->first + (b->first_row + i) / task->group, factor[i], row);
            factor[i] = 1.0f;
        }
        vf most = (vf){0} - INFINITY;
        for (int k = 0; k < padded_keys; k += LANES) most = NAME(larger)(NAME(load)(row + k) * factor[i], most);
        largest[i] = NAME(max_lanes)(most);
        WORK_SHARE(1);
    }
    for (int i = 0; i < num_rows; i++) {
        float before = highest[i], now = largest[i] > before ? largest[i] : before;
        highest[i] = now;
        base[i] = now == -INFINITY ? 0.0f : now;
        shrink[i] = before - base[i];
    }
    for (int i = 0; i < num_rows; i += LANES) {
        NAME(store)(shrink + i, NAME(exp)(NAME(load)(shrink + i)));
#ifdef INT16_DOT
        /* Weights are int16 against the largest that this tile can have, so that tiles without a peak lose nothing. */
        vf unit = NAME(exp)(NAME(load)(largest + i) - NAME(load)(base + i)) * (s->largest_value_scale / 32767.0f);
        NAME(store)(weight + i, unit);
#endif
    }
    for (int i = 0; i < num_rows; i++) {
        float *row = b->scores + i * b->stride;
        float per_product = factor[i] * LOG2_E, offset = base[i] * LOG2_E;
        vf sum = (vf){0};
#ifdef INT16_DOT
        float per_weight = weight[i] > 0.0f ? 1.0f / weight[i] : 0.0f;
#endif
        for (int k = 0; k < padded_keys; k += LANES) {
            vf p = NAME(exp2)(NAME(load)(row + k) * per_product - offset);
            sum += p;
            if (is_int8) p *= NAME(load)(b->value_scales + k);
            /* Words of pairs are half as wide as scores: they are written behind the reads. */
#if defined(BF16_DOT)
            _mm256_storeu_si256((__m256i *)((uint16_t *)row + k), (__m256i)_mm512_cvtneps_pbh((__m512)p));
#elif defined(INT16_DOT)
            NAME(store_int16)((int16_t *)row + k, p * per_weight);
#else
            NAME(store)(row + k, p);
#endif
        }
        total[i] = total[i] * shrink[i] + NAME(sum_lanes)(sum);
        WORK_SHARE(3);
    }
    (void)weight, (void)work;
}
#undef WORK_SHARE
