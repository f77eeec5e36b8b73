/* Where a tile's keys and values are, and how they are laid out for the products. Included once per instruction set after
   task.h. */

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
