/* Where a tile's keys and values are, and how they are laid out for the products. Included once per instruction set after
   task.h. */

/* Starts fetching the scales of the task's heads for up to num_keys slots of a block, from `slot` on, unless they lie so far apart
   that more would be fetched than is read. */
static void TARGET NAME(fetch_scales)(const struct NAME(task) *task, const struct cache *cache, int64_t block, int slot, int num_keys) {
    const struct attention_call *call = task->call;
    const int64_t bytes = call->format == FORMAT_INT8 ? 4 : 2, width = call->format == FORMAT_INT8 ? 1 : 2 * (cache->dim / cache->group_size);
    const int64_t num_slots = num_keys < call->block_size - slot ? num_keys : call->block_size - slot;
    int64_t first = block * cache->scale_block_stride + slot * cache->scale_slot_stride + task->first_head * cache->scale_head_stride;
    int64_t count = (num_slots - 1) * cache->scale_slot_stride + (task->end_head - task->first_head - 1) * cache->scale_head_stride + width;
    if (count * bytes <= MAX_SCALE_BYTES) NAME(fetch)((const char *)cache->scale + first * bytes, (int)(count * bytes));
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
            NAME(fetch_scales)(task, &call->key, block, slot, num_keys - i);
            NAME(fetch_scales)(task, &call->value, block, slot, num_keys - i);
        }
        for (; slot < block_size && i < num_keys; slot++, i++) {
            keys[i] = key;
            values[i] = value;
            key += call->key.slot_stride * bytes;
            value += call->value.slot_stride * bytes;
        }
    }
}

/* Rows of one head that will be read soon; where there are fewer than num_wanted, a place that costs nothing. */
static void RARE NAME(rows_ahead)(const struct NAME(task) *task, const struct cache *cache, const char **rows, int head, int num_rows,
                                    int num_wanted, const char **ahead) {
    int64_t offset = head * cache->head_stride * ELEMENT_BYTES(task->call);
    for (int i = 0; i < num_wanted + DOT_KEYS; i++)
        ahead[i] = i < num_rows ? rows[i] + offset : (const char *)task->scratch->zeros;
}

/* Those of the head that comes num_heads after this one; after the task's last head comes the first of the next tile. */
static void TARGET NAME(rows_heads_ahead)(const struct NAME(task) *task, const struct cache *cache, const char **const rows[2], int which,
                                          int kv_head, int num_heads, int num_keys, int num_next, const char **ahead) {
    int slot = kv_head - task->first_head + num_heads, num_slots = task->end_head - task->first_head, is_next = slot >= num_slots;
    NAME(rows_ahead)(task, cache, rows[which ^ is_next], task->first_head + slot % num_slots, is_next ? num_next : num_keys, num_keys,
                     ahead);
}

static const uint16_t *NAME(group_scales)(const struct cache *cache, int64_t block, int64_t slot, int head) {
    return (const uint16_t *)cache->scale + block * cache->scale_block_stride + slot * cache->scale_slot_stride +
           head * cache->scale_head_stride;
}

/* Rows of one head of a tile as words, each at its pointer: read in place where that can be, else made in `to`. */
static void TARGET NAME(words_of_head)(const struct NAME(task) *task, const struct cache *cache, const char **rows, int head,
                                      int first_key, int num_keys, int num_words, float *to, const char **pointers) {
    const struct attention_call *call = task->call;
    int64_t offset = head * cache->head_stride * ELEMENT_BYTES(call);
    int is_in_place = task->is_widened ||
                      (cache->dim == (int64_t)num_words * PER_WORD &&
                       (IS_INTEGER || (call->format == FORMAT_FLOAT && (call->dtype == DTYPE_F32 || PER_WORD == 2))));
    if (is_in_place) {
        for (int i = 0; i < num_keys; i++) pointers[i] = rows[i] + offset;
        return;
    }
    for (int i = 0; i < num_keys; i++) pointers[i] = (const char *)(to + (int64_t)i * num_words);
#ifdef BF16_DOT
    const uint8_t *codes_as_bf16 = task->scratch->codes_as_bf16;
    if (call->format == FORMAT_E4M3 || call->format == FORMAT_E5M2) {
        NAME(codes_to_bf16)(0, codes_as_bf16, rows, offset, num_keys, (int)cache->dim, num_words, to);
        return;
    }
    if (call->format == FORMAT_INT8) {
        NAME(codes_to_bf16)(1, codes_as_bf16, rows, offset, num_keys, (int)cache->dim, num_words, to);
        return;
    }
#endif
    const int32_t *table = call->block_tables + task->seq * call->table_stride;
    const int is_int4 = call->format == FORMAT_INT4, block_size = (int)call->block_size;
    int block_idx = first_key / block_size, slot = first_key % block_size;
    for (int i = 0; i < num_keys; i++, slot++) {
        if (slot == block_size) slot = 0, block_idx++;
        const uint16_t *scale = is_int4 ? NAME(group_scales)(cache, table[block_idx], slot, head) : 0;
        NAME(row_to_words)(cache, call->format, call->dtype, rows[i] + offset, scale, to + (int64_t)i * num_words, num_words);
    }
}

/* INT8: the scale of each key or value of one head of a tile, zeros behind the last. */
static void TARGET NAME(token_scales)(const struct NAME(task) *task, const struct cache *cache, int head, int first_key,
                                      int num_keys, float *to) {
    const struct attention_call *call = task->call;
    const int32_t *table = call->block_tables + task->seq * call->table_stride;
    int block_size = (int)call->block_size;
    int block_idx = first_key / block_size, slot = first_key % block_size;
    for (int i = 0; i < num_keys; block_idx++, slot = 0) {
        int num_slots = num_keys - i < block_size - slot ? num_keys - i : block_size - slot, s = 0;
        const float *scale = (const float *)cache->scale + table[block_idx] * cache->scale_block_stride +
                             slot * cache->scale_slot_stride + head * cache->scale_head_stride;
        if (cache->scale_slot_stride == 1) {
            for (; s < num_slots; s++) to[i + s] = scale[s];
        }
#if LANES == 16
        const __m512i apart = _mm512_mullo_epi32((__m512i)NAME(lane_numbers)(), _mm512_set1_epi32((int)cache->scale_slot_stride));
        const int is_near = cache->scale_slot_stride < 1 << 26; /* fifteen steps fit an int32 */
        for (; is_near && s + 16 <= num_slots; s += 16)
            _mm512_storeu_ps(to + i + s, _mm512_i32gather_ps(apart, scale + s * cache->scale_slot_stride, 4));
#endif
        for (; s < num_slots; s++) to[i + s] = scale[s * cache->scale_slot_stride];
        i += num_slots;
    }
    for (int i = num_keys; i % LANES; i++) to[i] = 0.0f;
}

#if LANES == 8
/* An 8 x 8 transposition in place. */
INLINE void NAME(transpose)(vf x[8]) {
    vf y[8];
    for (int i = 0; i < 8; i += 4) {
        vf a = (vf)_mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]), b = (vf)_mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
        vf c = (vf)_mm256_unpacklo_ps((__m256)x[i + 2], (__m256)x[i + 3]), d = (vf)_mm256_unpackhi_ps((__m256)x[i + 2], (__m256)x[i + 3]);
        y[i] = (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)c);
        y[i + 1] = (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
        y[i + 2] = (vf)_mm256_unpacklo_pd((__m256d)b, (__m256d)d);
        y[i + 3] = (vf)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm256_permute2f128_ps((__m256)y[i], (__m256)y[4 + i], 0x20);
        x[4 + i] = (vf)_mm256_permute2f128_ps((__m256)y[i], (__m256)y[4 + i], 0x31);
    }
}
#elif LANES == 16
/* A 16 x 16 transposition in place. */
INLINE void NAME(transpose)(vf rows[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i x[4] = {(__m512i)rows[i], (__m512i)rows[i + 1], (__m512i)rows[i + 2], (__m512i)rows[i + 3]};
        __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
        __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(y[i], y[4 + i], 0x88), b = _mm512_shuffle_i32x4(y[i], y[4 + i], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0x88), d = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0xDD);
        rows[i] = (vf)_mm512_shuffle_i32x4(a, c, 0x88);
        rows[i + 4] = (vf)_mm512_shuffle_i32x4(b, d, 0x88);
        rows[i + 8] = (vf)_mm512_shuffle_i32x4(a, c, 0xDD);
        rows[i + 12] = (vf)_mm512_shuffle_i32x4(b, d, 0xDD);
    }
}
#else
/* A 4 x 4 transposition in place. */
INLINE void NAME(transpose)(vf x[4]) {
    vf a = SHUFFLE4(x[0], x[1], 0, 4, 1, 5), b = SHUFFLE4(x[0], x[1], 2, 6, 3, 7);
    vf c = SHUFFLE4(x[2], x[3], 0, 4, 1, 5), d = SHUFFLE4(x[2], x[3], 2, 6, 3, 7);
    x[0] = SHUFFLE4(a, c, 0, 1, 4, 5);
    x[1] = SHUFFLE4(a, c, 2, 3, 6, 7);
    x[2] = SHUFFLE4(b, d, 0, 1, 4, 5);
    x[3] = SHUFFLE4(b, d, 2, 3, 6, 7);
}
#endif

/* LANES rows as columns of a panel: word w of row i goes to to[w * panel + i]. Pairs of bf16 are taken apart only after they
   are transposed, half as many as floats would be. */
static void TARGET NAME(lay_rows)(int is_widened, const char *const rows[LANES], int num_words, int panel, float *to) {
    vf x[LANES];
#if PER_WORD == 1
    for (int w = 0; is_widened && w < num_words; w += 2 * LANES) {
        for (int i = 0; i < LANES; i++) x[i] = NAME(load)(rows[i] + 2 * w);
        NAME(transpose)(x);
        for (int i = 0; i < LANES; i++) {
            vf even, odd;
            NAME(widen)((const char *)&x[i], 0, &even, &odd);
            NAME(store)(to + (int64_t)(w + i) * panel, even);
            NAME(store)(to + (int64_t)(w + LANES + i) * panel, odd);
        }
    }
    if (is_widened) return;
#endif
    (void)is_widened;
    for (int w = 0; w < num_words; w += LANES) {
        for (int i = 0; i < LANES; i++) x[i] = NAME(load_words)(rows[i], w);
        NAME(transpose)(x);
        for (int i = 0; i < LANES; i++) NAME(store)(to + (int64_t)(w + i) * panel, x[i]);
    }
}

/* Keys as columns: words[key / panel][word][key in panel], padded with zeros. */
static void TARGET NAME(lay_keys)(int is_widened, const char *const *keys, int num_keys, int num_words, int panel,
                                  const float *zeros, float *to) {
    for (int first = 0; first < num_keys; first += LANES) {
        const char *rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = first + i < num_keys ? keys[first + i] : (const char *)zeros;
        NAME(lay_rows)(is_widened, rows, num_words, panel, to + (int64_t)(first / panel * panel) * num_words + first % panel);
    }
}

/* Values as the right side of a product. Of floats, as panels[column / panel][value][column in panel]: rows as long as they
   come would lie in a few sets of the first-level cache and displace each other. Of pairs, row k / 2 holds values k and k + 1
   interleaved. */
static void TARGET NAME(lay_values)(int is_widened, const char *const *values, int num_keys, int num_words, float *to) {
    for (int k = 0; k < num_keys; k += PER_WORD) {
#if PER_WORD == 2
        /* Interleaved within 128-bit parts, which leaves the columns in another order; `in_order` undoes it at the end. */
        float *row = to + (int64_t)k * num_words;
        for (int w = 0; w < num_words; w += LANES) {
            vf pair[2];
            NAME(interleave)(NAME(load_words)(values[k], w), NAME(load_words)(values[k + 1], w), pair);
            NAME(store)(row + 2 * w, pair[0]);
            NAME(store)(row + 2 * w + LANES, pair[1]);
        }
#else
        const int panel = GEMM_VECTORS * LANES;
        for (int w = 0; w < num_words; w += is_widened ? 2 * LANES : LANES) {
            float *row = to + (int64_t)(w / panel) * KEY_TILE * panel + (int64_t)k * panel + w % panel;
            vf x[2];
            if (!is_widened) {
                NAME(store)(row, NAME(load_words)(values[k], w));
                continue;
            }
            /* A panel is an even number of vectors, and both halves of a chunk lie in one. */
            NAME(widen)(values[k], w, &x[0], &x[1]);
            NAME(store)(row, x[0]);
            NAME(store)(row + LANES, x[1]);
        }
#endif
    }
    (void)is_widened;
}

/* Columns of `sums` in the order of channels, all value_columns of them. The products leave those of a chunk of 2 * LANES apart:
   pairs as they were interleaved; bf16 that was widened as the even ones and the odd ones. */
INLINE void NAME(in_order)(const struct NAME(task) *task, const float *sums, float *channels) {
#if PER_WORD == 2
    for (int first = 0; first < task->value_columns; first += 2 * LANES) {
        vf pair[2];
        NAME(in_place)(NAME(load)(sums + first), NAME(load)(sums + first + LANES), pair);
        NAME(store)(channels + first, pair[0]);
        NAME(store)(channels + first + LANES, pair[1]);
    }
#else
    if (!task->is_widened) {
        memcpy(channels, sums, (size_t)task->value_columns * sizeof(float));
        return;
    }
    for (int first = 0; first < task->value_columns; first += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            channels[first + 2 * i] = sums[first + i];
            channels[first + 2 * i + 1] = sums[first + LANES + i];
        }
#endif
}
