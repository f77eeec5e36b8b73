/* One task: some query tokens over a range of keys, for some heads. Included once per instruction set after
   vectors.h, products.h and rows.h.

   Queries that share a KV head are the rows of one matrix. Keys come in tiles. A task of few rows (a decode) reads keys
   in place and walks all heads of a tile before the next tile, so that memory is read in order. A task of many rows
   (a prefill chunk) has one head, and lays each tile out once for all its rows. */

/* What one thread works in. */
struct NAME(scratch) {
    float *query;       /* [heads][rows][key_words] */
    float *key_rows;    /* [KEY_TILE][key_words], where keys are not read in place */
    float *key_columns; /* [KEY_TILE / panel][key_words][panel] */
    float *value_rows;  /* [KEY_TILE][value_words], where values are not read in place */
    float *value_tile;  /* [KEY_TILE / PER_WORD][value_columns] */
    float *scores;      /* [row block][KEY_TILE] floats, then overwritten by weights as words */
    float *sums;        /* [heads][rows][value_columns]: the weighted sums of values, not yet divided */
    float *highest;     /* [heads][rows] */
    float *total;       /* [heads][rows] */
    const char **keys[2], **values[2]; /* [KEY_TILE]: head 0 of each key, of this tile and of the next */
    float *key_scales, *value_scales; /* [KEY_TILE] */
    float largest_value_scale;
    float *query_scales; /* [heads][rows]: what one unit of an int16 query stands for */
    float *zeros;
    uint8_t table[256];
};

static int NAME(words)(int64_t dim) { return (int)((dim + LANES * PER_WORD - 1) / (LANES * PER_WORD)) * LANES; }

/* Divides one piece of memory; with memory = NULL only counts. Returns the bytes used. */
static int64_t NAME(divide_scratch)(struct NAME(scratch) *s, const struct attention_call *call, int64_t rows, char *memory) {
    int64_t used = 0;
    int64_t key_words = NAME(words)(call->key.dim), value_words = NAME(words)(call->value.dim);
#define TAKE(field, count)                                             \
    do {                                                               \
        s->field = (void *)(memory + used);                            \
        used += ((int64_t)(count) * sizeof(*s->field) + 127) / 64 * 64; \
    } while (0)
    TAKE(query, rows * key_words);
    TAKE(sums, rows * value_words * PER_WORD);
    TAKE(highest, rows);
    TAKE(query_scales, rows);
    TAKE(total, rows);
    TAKE(key_rows, KEY_TILE * key_words);
    TAKE(key_columns, KEY_TILE * key_words);
    TAKE(value_rows, KEY_TILE * value_words);
    TAKE(value_tile, KEY_TILE * value_words);
    TAKE(scores, (ROW_BLOCK + DOT_ROWS) * KEY_TILE);
    for (int i = 0; i < 2; i++) {
        TAKE(keys[i], KEY_TILE);
        TAKE(values[i], KEY_TILE);
    }
    TAKE(key_scales, KEY_TILE);
    TAKE(value_scales, KEY_TILE);
    TAKE(zeros, key_words + value_words);
#undef TAKE
    return used;
}

struct NAME(task) {
    const struct attention_call *call;
    struct NAME(scratch) *scratch;
    int seq, first, end, first_key, end_key, partial;
    int first_head, end_head, group, rows, padded_rows;
    int key_words, value_words, value_columns; /* words of a key; words and floats of a padded value row */
    int length, query_offset; /* position of query token t is t + query_offset */
    int is_few;
};

#define ELEMENT_BYTES(call) ((call)->format != FORMAT_FLOAT ? 1 : (call)->dtype == DTYPE_F32 ? 4 : 2)

/* Starts fetching the scales of up to num_keys slots of a block, from `slot` on. */
static void TARGET NAME(fetch_scales)(const struct attention_call *call, const struct cache *cache, int64_t block, int slot,
                                      int num_keys) {
    int64_t bytes = call->format == FORMAT_INT8 ? 4 : 2;
    int64_t first = block * cache->scale_block_stride + slot * cache->scale_slot_stride;
    int64_t end = first + (num_keys < call->block_size - slot ? num_keys : call->block_size - slot) * cache->scale_slot_stride;
    NAME(fetch)((const char *)cache->scale + first * bytes, (int)((end - first) * bytes));
}

/* Where channel 0 of head 0 lies for each key of a tile. */
static void TARGET NAME(find_rows)(const struct NAME(task) *task, int first_key, int num_keys, const char **keys,
                                   const char **values) {
    const struct attention_call *call = task->call;
    const int32_t *table = call->block_tables + task->seq * call->table_stride;
    int64_t bytes = ELEMENT_BYTES(call);
    int block_size = (int)call->block_size;
    for (int i = 0; i < num_keys;) {
        int slot = (first_key + i) % block_size;
        int64_t block = table[(first_key + i) / block_size];
        const char *key = (const char *)call->key.data + (block * call->key.block_stride + slot * call->key.slot_stride) * bytes;
        const char *value = (const char *)call->value.data + (block * call->value.block_stride + slot * call->value.slot_stride) * bytes;
        if (call->format == FORMAT_INT8 || call->format == FORMAT_INT4) {
            NAME(fetch_scales)(call, &call->key, block, slot, num_keys - i);
            NAME(fetch_scales)(call, &call->value, block, slot, num_keys - i);
        }
        for (; slot < block_size && i < num_keys; slot++, i++) {
            keys[i] = key;
            values[i] = value;
            key += call->key.slot_stride * bytes;
            value += call->value.slot_stride * bytes;
        }
    }
}

static const uint16_t *NAME(group_scales)(const struct cache *cache, int64_t block, int64_t slot, int head) {
    return (const uint16_t *)cache->scale + block * cache->scale_block_stride + slot * cache->scale_slot_stride +
           head * cache->scale_head_stride;
}

/* Rows of one head of a tile as words, each at its pointer; returns whether they are read in place. */
static int TARGET NAME(words_of_head)(const struct NAME(task) *task, const struct cache *cache, const char **rows, int head,
                                      int first_key, int num_keys, int num_words, float *to, const char **pointers) {
    const struct attention_call *call = task->call;
    int64_t offset = head * cache->head_stride * ELEMENT_BYTES(call);
    int is_in_place = cache->dim == (int64_t)num_words * PER_WORD &&
                      (IS_INTEGER || (call->format == FORMAT_FLOAT && (call->dtype == DTYPE_F32 || PER_WORD == 2)));
    if (is_in_place) {
        for (int i = 0; i < num_keys; i++) pointers[i] = rows[i] + offset;
        return 1;
    }
    const int32_t *table = call->block_tables + task->seq * call->table_stride;
    for (int i = 0; i < num_keys; i++) {
        const uint16_t *scale = 0;
        if (call->format == FORMAT_INT4)
            scale = NAME(group_scales)(cache, table[(first_key + i) / call->block_size], (first_key + i) % call->block_size, head);
        float *row = to + (int64_t)i * num_words;
        NAME(row_to_words)(cache, call->format, call->dtype, rows[i] + offset, scale, task->scratch->table, row, num_words);
        pointers[i] = (const char *)row;
    }
    return 0;
}

/* INT8: the scale of each key or value of one head of a tile, zeros behind the last. */
static void TARGET NAME(token_scales)(const struct NAME(task) *task, const struct cache *cache, int head, int first_key,
                                      int num_keys, float *to) {
    const struct attention_call *call = task->call;
    const int32_t *table = call->block_tables + task->seq * call->table_stride;
    int block_size = (int)call->block_size;
    for (int i = 0; i < num_keys;) {
        int slot = (first_key + i) % block_size;
        const float *scale = (const float *)cache->scale + table[(first_key + i) / block_size] * cache->scale_block_stride +
                             slot * cache->scale_slot_stride + head * cache->scale_head_stride;
#if LANES == 16
        const __m512i apart = _mm512_mullo_epi32((__m512i)NAME(lane_numbers)(), _mm512_set1_epi32((int)cache->scale_slot_stride));
        const int is_near = cache->scale_slot_stride < 1 << 26; /* fifteen steps fit an int32 */
        for (; is_near && slot + 16 <= block_size && i + 16 <= num_keys; slot += 16, i += 16, scale += 16 * cache->scale_slot_stride)
            _mm512_storeu_ps(to + i, _mm512_i32gather_ps(apart, scale, 4));
#endif
        for (; slot < block_size && i < num_keys; slot++, i++, scale += cache->scale_slot_stride) to[i] = *scale;
    }
    for (int i = num_keys; i % LANES; i++) to[i] = 0.0f;
}

/* Keys as columns: words[panel][word][key in panel], panels of GEMM_VECTORS * LANES keys, padded with zeros. */
static void TARGET NAME(lay_keys)(const char *const *keys, int num_keys, int num_words, const float *zeros, float *to,
                                  const char *const *ahead, int ahead_bytes) {
    const int panel = GEMM_VECTORS * LANES;
    for (int first = 0; first < num_keys; first += panel)
        for (int part = 0; part < panel; part += LANES) {
            const char *rows[LANES];
            float *column = to + (int64_t)first * num_words + part;
            for (int i = 0; i < LANES && first + part + i < num_keys; i++) NAME(fetch)(ahead[first + part + i], ahead_bytes);
            for (int i = 0; i < LANES; i++)
                rows[i] = first + part + i < num_keys ? keys[first + part + i] : (const char *)zeros;
#if LANES == 16
            for (int w = 0; w < num_words; w += 16) { /* a 16 x 16 transposition */
                __m512i x[16], y[16];
                for (int i = 0; i < 16; i++) x[i] = (__m512i)NAME(load_words)(rows[i], w);
                for (int i = 0; i < 16; i += 4) {
                    __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
                    __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
                    y[i] = _mm512_unpacklo_epi64(a, c);
                    y[i + 1] = _mm512_unpackhi_epi64(a, c);
                    y[i + 2] = _mm512_unpacklo_epi64(b, d);
                    y[i + 3] = _mm512_unpackhi_epi64(b, d);
                }
                for (int i = 0; i < 4; i++) {
                    __m512i a = _mm512_shuffle_i32x4(y[i], y[4 + i], 0x88), b = _mm512_shuffle_i32x4(y[i], y[4 + i], 0xDD);
                    __m512i c = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0x88), d = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0xDD);
                    _mm512_storeu_si512(column + (int64_t)(w + i) * panel, _mm512_shuffle_i32x4(a, c, 0x88));
                    _mm512_storeu_si512(column + (int64_t)(w + i + 4) * panel, _mm512_shuffle_i32x4(b, d, 0x88));
                    _mm512_storeu_si512(column + (int64_t)(w + i + 8) * panel, _mm512_shuffle_i32x4(a, c, 0xDD));
                    _mm512_storeu_si512(column + (int64_t)(w + i + 12) * panel, _mm512_shuffle_i32x4(b, d, 0xDD));
                }
            }
#else
            for (int w = 0; w < num_words; w++)
                for (int i = 0; i < LANES; i++) column[(int64_t)w * panel + i] = ((const float *)rows[i])[w];
#endif
        }
}

/* Values as the right side of a product: row k holds value k; or, of pairs, values 2k and 2k + 1 interleaved. */
static void TARGET NAME(lay_values)(const char *const *values, int num_keys, int num_words, float *to,
                                    const char *const *ahead, int ahead_bytes) {
    for (int k = 0; k < num_keys; k += PER_WORD) {
        float *row = to + (int64_t)k * num_words;
        for (int i = 0; i < PER_WORD; i++) NAME(fetch)(ahead[k + i], ahead_bytes);
#if PER_WORD == 2
        /* Interleaved within 128-bit parts, which leaves the columns in another order; `column_of` undoes it at the end. */
        for (int w = 0; w < num_words; w += 16) {
            __m512i a = (__m512i)NAME(load_words)(values[k], w), b = (__m512i)NAME(load_words)(values[k + 1], w);
            _mm512_storeu_si512(row + 2 * w, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(row + 2 * w + 16, _mm512_unpackhi_epi16(a, b));
        }
#else
        memcpy(row, values[k], num_words * sizeof(float));
#endif
    }
}

/* Which column of `sums` holds channel d. */
INLINE int NAME(column_of)(int d) {
#if PER_WORD == 2
    int in_chunk = d % 32;
    return d - in_chunk + (in_chunk / 4 % 2) * 16 + in_chunk / 8 * 4 + in_chunk % 4;
#else
    return d;
#endif
}

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
        int first_draft = task->length - (call->query_start_loc[task->seq + 1] - call->query_start_loc[task->seq]);
        for (int i = 0; i < LANES && i < num_left; i++) {
            int draft = key + i - first_draft;
            if (draft >= 0 && !(bits[draft / 32] >> (draft % 32) & 1)) x[i] = -INFINITY;
        }
    }
    return x;
}

/* One row of products becomes weights, as words; `highest` and `total` move on; returns by what earlier sums shrink.
   `weight`: what one unit of an integer weight stands for. */
static float TARGET NAME(soften)(const struct NAME(task) *task, int head, int token, int first_key, int num_keys,
                                 int padded_keys, float factor, float *row, float *highest, float *total, float *weight) {
    const struct attention_call *call = task->call;
    const struct NAME(scratch) *s = task->scratch;
    int low, high;
    NAME(seen)(task, token, first_key, num_keys, &low, &high);
    if (call->key.scale && (call->format == FORMAT_E4M3 || call->format == FORMAT_E5M2))
        factor *= ((const float *)call->key.scale)[(head / task->group) * call->key.scale_head_stride];
    const int is_int8 = call->format == FORMAT_INT8;
    const int is_plain = !(call->softcap > 0.0f) && !call->alibi_slopes && !call->tree_mask;
    const vi lanes = NAME(lane_numbers)();
    const vf none = (vf){0} - INFINITY;
    vf largest = none;
    for (int k = low / LANES * LANES; k < high; k += LANES) {
        vf x = NAME(load)(row + k) * factor;
        if (is_int8) x *= NAME(load)(s->key_scales + k);
        if (!is_plain) x = NAME(biased)(task, x, head, token, first_key + k, high - k);
        if (k < low || k + LANES > high) x = NAME(select)((lanes >= low - k) & (lanes < high - k), x, none);
        NAME(store)(row + k, x);
        largest = NAME(larger)(x, largest);
    }
    float before = *highest, tile_highest = NAME(max_lanes)(largest), now = tile_highest > before ? tile_highest : before;
    *highest = now;
    float base = now == -INFINITY ? 0.0f : now;
#ifdef INT16_DOT
    /* Weights are int16 against the largest that this tile can have, so that tiles without a peak lose nothing. */
    *weight = expf(tile_highest - base) * s->largest_value_scale / 32767.0f;
    float per_weight = *weight > 0.0f ? 1.0f / *weight : 0.0f;
#else
    (void)weight;
#endif
    vf sum = (vf){0};
    for (int k = 0; k < padded_keys; k += LANES) {
        vf p = (vf){0};
        if (k < high && k + LANES > low) p = NAME(exp)(NAME(load)(row + k) - base);
        sum += p;
        if (is_int8) p *= NAME(load)(s->value_scales + k);
            /* Words of pairs are half as wide as scores: they are written behind the reads. */
#if defined(BF16_DOT)
        _mm256_storeu_si256((__m256i *)((uint16_t *)row + k), (__m256i)_mm512_cvtneps_pbh((__m512)p));
#elif defined(INT16_DOT)
        __m512i whole = _mm512_cvtps_epi32((__m512)(p * per_weight));
        _mm256_storeu_si256((__m256i *)((uint16_t *)row + k), _mm512_cvtsepi32_epi16(whole));
#else
        NAME(store)(row + k, p);
#endif
    }
    float shrink = before == now ? 1.0f : before == -INFINITY ? 0.0f : expf(before - base);
    *total = *total * shrink + NAME(sum_lanes)(sum);
    return shrink;
}

/* Rows of one head that will be read soon; where there are fewer than num_wanted, a place that costs nothing. */
static void TARGET NAME(rows_ahead)(const struct NAME(task) *task, const struct cache *cache, const char **rows, int head, int num_rows,
                                    int num_wanted, const char **ahead) {
    int64_t offset = head * cache->head_stride * ELEMENT_BYTES(task->call);
    for (int i = 0; i < num_wanted + DOT_KEYS; i++)
        ahead[i] = i < num_rows ? rows[i] + offset : (const char *)task->scratch->zeros;
}

/* One tile of keys for one head: scores, weights, and the weighted sum of values. */
static void TARGET NAME(attend_tile)(const struct NAME(task) *task, int kv_head, int first_key, int num_keys, int which,
                                     int num_next) {
    const struct attention_call *call = task->call;
    struct NAME(scratch) *s = task->scratch;
    int slot = kv_head - task->first_head;
    int64_t row_base = (int64_t)slot * task->padded_rows;
    const float *query = s->query + row_base * task->key_words;
    float *sums = s->sums + row_base * task->value_columns;
    const char *keys[KEY_TILE + DOT_KEYS], *values[KEY_TILE + DOT_KEYS], *ahead[KEY_TILE + DOT_KEYS];
    int padded_keys = (num_keys + LANES - 1) / LANES * LANES;

    NAME(words_of_head)(task, &call->key, s->keys[which], kv_head, first_key, num_keys, task->key_words, s->key_rows, keys);
    for (int i = 0; i < DOT_KEYS; i++) keys[num_keys + i] = (const char *)s->zeros;
    if (call->format == FORMAT_INT8) {
        NAME(token_scales)(task, &call->key, kv_head, first_key, num_keys, s->key_scales);
        NAME(token_scales)(task, &call->value, kv_head, first_key, num_keys, s->value_scales);
        s->largest_value_scale = 0.0f;
        for (int i = 0; i < num_keys; i++)
            if (!(s->value_scales[i] <= s->largest_value_scale)) s->largest_value_scale = s->value_scales[i];
    }
    int key_bytes = (int)call->key.dim * ELEMENT_BYTES(call), value_bytes = (int)call->value.dim * ELEMENT_BYTES(call);
    NAME(rows_ahead)(task, &call->value, s->values[which], kv_head, num_keys, num_keys, ahead);
    if (!task->is_few) NAME(lay_keys)(keys, num_keys, task->key_words, s->zeros, s->key_columns, ahead, value_bytes);
    int are_values_ready = 0;
    for (int r = 0; r < task->rows; r += ROW_BLOCK) {
        int num_rows = task->rows - r < ROW_BLOCK ? task->rows - r : ROW_BLOCK;
        int first_token = task->first + r / task->group, last_token = task->first + (r + num_rows - 1) / task->group;
        int low, high, ignored;
        NAME(seen)(task, first_token, first_key, num_keys, &low, &ignored);
        NAME(seen)(task, last_token, first_key, num_keys, &ignored, &high);
        if (low >= high) continue; /* none of these rows sees any of these keys */
        int num_seen = high, seen_depth = (high + PER_WORD - 1) / PER_WORD;
        int seen_padded = (high + LANES - 1) / LANES * LANES;
        if (task->is_few) {
            NAME(dot_rows)(query + (int64_t)r * task->key_words, (num_rows + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS,
                           task->key_words, keys, num_keys, s->scores, KEY_TILE, ahead, value_bytes);
            seen_padded = padded_keys;
        } else {
            const int panel = GEMM_VECTORS * LANES;
            for (int first = 0; first < num_seen; first += panel) {
                int width = num_seen - first < panel ? (num_seen - first + LANES - 1) / LANES * LANES : panel;
                const float *b = s->key_columns + (int64_t)first * task->key_words;
                int column = 0;
                if (width == panel) {
                    NAME(gemm_column)(GEMM_VECTORS, num_rows, task->key_words, query + (int64_t)r * task->key_words, task->key_words,
                                      b, panel, s->scores + first, KEY_TILE, 0, 0);
                } else {
                    for (; column < width; column += LANES)
                        NAME(gemm_column)(1, num_rows, task->key_words, query + (int64_t)r * task->key_words, task->key_words,
                                          b + column, panel, s->scores + first + column, KEY_TILE, 0, 0);
                }
            }
        }
        float shrink[ROW_BLOCK + DOT_ROWS], weight[ROW_BLOCK + DOT_ROWS];
        for (int i = 0; i < num_rows; i++) {
            int head = kv_head * task->group + (r + i) % task->group;
            shrink[i] = NAME(soften)(task, head, task->first + (r + i) / task->group, first_key, num_keys, seen_padded,
                                     call->scale * s->query_scales[row_base + r + i], s->scores + i * KEY_TILE,
                                     s->highest + row_base + r + i, s->total + row_base + r + i, weight + i);
        }
        if (!are_values_ready) {
            int is_last = kv_head + 1 == task->end_head;
            NAME(words_of_head)(task, &call->value, s->values[which], kv_head, first_key, num_keys, task->value_words,
                                s->value_rows, values);
            values[num_keys] = (const char *)s->zeros;
            NAME(rows_ahead)(task, &call->key, s->keys[which ^ is_last], is_last ? task->first_head : kv_head + 1,
                             is_last ? num_next : num_keys, num_keys, ahead);
            if (!task->is_few) NAME(lay_values)(values, num_keys, task->value_words, s->value_tile, ahead, key_bytes);
            are_values_ready = 1;
        }
        if (task->is_few) {
            for (int i = num_rows; i % DOT_ROWS; i++) shrink[i] = weight[i] = 0.0f;
            NAME(weigh_rows)(s->scores, num_rows, KEY_TILE, values, num_keys, task->value_words, sums, shrink, weight, ahead, key_bytes);
        } else {
            NAME(gemm)(num_rows, task->value_columns, seen_depth, s->scores, KEY_TILE, s->value_tile, task->value_columns,
                       sums + (int64_t)r * task->value_columns, task->value_columns, shrink, weight);
        }
    }
}

#ifdef INT16_DOT
/* A query as int16, as large as the sums of its products with int8 allow; returns what one unit stands for. */
static float TARGET NAME(query_to_int16)(const struct cache *row, int dtype, const char *from, int16_t *to, int num_words) {
    float x[MAX_DIM], largest = 0.0f;
    int dim = (int)row->dim, most = INT32_MAX / 128 / dim;
    if (most > 32767) most = 32767;
    NAME(row_to_floats)(row, FORMAT_FLOAT, dtype, from, 0, x);
    for (int d = 0; d < dim; d++)
        if (!(fabsf(x[d]) <= largest)) largest = fabsf(x[d]);
    float units = largest > 0.0f && largest < INFINITY ? (float)most / largest : 0.0f;
    for (int d = 0; d < 2 * num_words; d++) to[d] = d < dim ? (int16_t)rintf(x[d] * units) : 0;
    return units > 0.0f ? 1.0f / units : largest; /* infinity and NaN go on into the scores */
}
#endif

static void TARGET NAME(load_queries)(const struct NAME(task) *task) {
    const struct attention_call *call = task->call;
    struct cache as_row = {.dim = call->key.dim};
    int64_t bytes = call->dtype == DTYPE_F32 ? 4 : 2;
    for (int h = task->first_head; h < task->end_head; h++)
        for (int r = 0; r < task->padded_rows; r++) {
            float *to = task->scratch->query + ((int64_t)(h - task->first_head) * task->padded_rows + r) * task->key_words;
            if (r >= task->rows) {
                memset(to, 0, task->key_words * sizeof(float));
                continue;
            }
            const char *from = (const char *)call->query + bytes * ((task->first + r / task->group) * call->query_token_stride +
                                                                    (h * task->group + r % task->group) * call->query_head_stride);
            float *scale = task->scratch->query_scales + (int64_t)(h - task->first_head) * task->padded_rows + r;
            *scale = 1.0f;
#ifdef INT16_DOT
            *scale = NAME(query_to_int16)(&as_row, call->dtype, from, (int16_t *)to, task->key_words);
#else
            NAME(row_to_words)(&as_row, FORMAT_FLOAT, call->dtype, from, 0, 0, to, task->key_words);
#endif
        }
}

/* Divide, convert, and write to `out`; or keep the parts for the merge. */
static void TARGET NAME(finish_row)(const struct NAME(task) *task, int kv_head, int r) {
    const struct attention_call *call = task->call;
    const struct NAME(scratch) *s = task->scratch;
    int64_t row = (int64_t)(kv_head - task->first_head) * task->padded_rows + r;
    const float *sums = s->sums + row * task->value_columns;
    int head = kv_head * task->group + r % task->group, token = task->first + r / task->group, dim = (int)call->value.dim;
    float highest = s->highest[row], total = s->total[row];
    float channels[MAX_DIM], value_scale = 1.0f;
    for (int d = 0; d < dim; d++) channels[d] = sums[NAME(column_of)(d)];
    if (call->value.scale && (call->format == FORMAT_E4M3 || call->format == FORMAT_E5M2))
        value_scale = ((const float *)call->value.scale)[kv_head * call->value.scale_head_stride];
    if (task->partial < 0 && call->sinks && call->sinks[head] != -INFINITY) {
        float sink = call->sinks[head], top = sink > highest ? sink : highest;
        total = highest == -INFINITY ? 0.0f : total * expf(highest - top);
        value_scale *= highest == -INFINITY ? 0.0f : expf(highest - top);
        total += expf(sink - top);
        highest = top;
    }
    /* A row that saw nothing has total 0; one that saw NaN has NaN. */
    float lse = total == 0.0f ? -INFINITY : highest + logf(total);
    float factor = total == 0.0f ? 0.0f : value_scale / total;
    if (task->partial < 0) {
        NAME(write_row)(call, channels, factor, token, head);
        if (call->lse) call->lse[token * call->num_q_heads + head] = lse;
        return;
    }
    int64_t part = ((int64_t)task->partial + token - task->first) * call->num_q_heads + head;
    for (int d = 0; d < dim; d++) call->partial_out[part * dim + d] = channels[d] * factor;
    call->partial_lse[part] = lse;
}

static void TARGET NAME(attend)(const struct attention_call *call, int64_t index, int first_head, int end_head,
                                struct NAME(scratch) *scratch) {
    const int32_t *column = call->tasks + index;
    int64_t n = call->num_tasks;
    struct NAME(task) task = {
        .call = call, .scratch = scratch, .seq = column[0], .first = column[n], .end = column[2 * n],
        .first_key = column[3 * n], .end_key = column[4 * n], .partial = column[5 * n],
        .first_head = first_head, .end_head = end_head, .group = (int)(call->num_q_heads / call->num_kv_heads),
    };
    task.rows = (task.end - task.first) * task.group;
    if (!task.rows) return;
    task.padded_rows = (task.rows + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS;
    task.key_words = NAME(words)(call->key.dim);
    task.value_words = NAME(words)(call->value.dim);
    task.value_columns = task.value_words * PER_WORD;
    task.length = call->seq_lens[task.seq];
    task.query_offset = task.length - call->query_start_loc[task.seq + 1];
    task.is_few = task.rows <= MAX_FEW_ROWS;
    int64_t rows = (int64_t)(end_head - first_head) * task.padded_rows;
    for (int64_t i = 0; i < rows; i++) scratch->highest[i] = -INFINITY, scratch->total[i] = 0.0f;
    memset(scratch->sums, 0, rows * task.value_columns * sizeof(float));
    NAME(load_queries)(&task);
    int tile = task.is_few ? FEW_TILE : KEY_TILE;
    int num_keys = task.end_key - task.first_key < tile ? task.end_key - task.first_key : tile, which = 0;
    NAME(find_rows)(&task, task.first_key, num_keys, scratch->keys[0], scratch->values[0]);
    for (int key = task.first_key; key < task.end_key; key += tile, which = !which) {
        int next = key + tile, num_next = task.end_key - next < tile ? task.end_key - next : tile;
        if (num_next < 0) num_next = 0;
        NAME(find_rows)(&task, next, num_next, scratch->keys[!which], scratch->values[!which]);
        for (int h = first_head; h < end_head; h++) NAME(attend_tile)(&task, h, key, num_keys, which, num_next);
        num_keys = num_next;
    }
    for (int h = first_head; h < end_head; h++)
        for (int r = 0; r < task.rows; r++) NAME(finish_row)(&task, h, r);
}
