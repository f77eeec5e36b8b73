/* The two products that attention is made of, on words. Included once per instruction set after vectors.h.
   GEMM_ROWS x GEMM_VECTORS accumulators fill the registers. */

#define DOT_KEYS 4
#define DOT_ROWS (LANES / 4)
#ifdef INT16_DOT
#define IS_INTEGER 1
#else
#define IS_INTEGER 0
#endif

/* Starts fetching a row that is needed soon, into the second-level cache: the first would have to hold a tile of keys and
   of values at once, and processors allow fewer such fetches at a time. */
INLINE void NAME(fetch)(const char *row, int bytes) {
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

/* scores[r * stride + k] = query row r . key k, for a few rows. Rows are padded to DOT_ROWS, keys to DOT_KEYS; the words
   of a row to LANES. Keys are read in place, each once for DOT_ROWS rows;
   meanwhile the rows at `ahead`, which are needed next, are fetched: blocks lie anywhere, and no processor guesses where. */
static void TARGET NAME(dot_rows)(const float *query, int num_rows, int num_words, const char *const *keys, int num_keys,
                                  float *scores, int stride, const char *const *ahead, int ahead_bytes) {
    for (int k = 0; k < num_keys; k += DOT_KEYS) {
        for (int i = 0; i < DOT_KEYS; i++) NAME(fetch)(ahead[k + i], ahead_bytes);
        for (int r = 0; r < num_rows; r += DOT_ROWS) {
            vf sums[LANES];
            for (int i = 0; i < LANES; i++) sums[i] = (vf){0};
            const float *q = query + (int64_t)r * num_words;
            for (int w = 0; w < num_words; w += LANES) {
                vf key[DOT_KEYS];
                for (int i = 0; i < DOT_KEYS; i++) key[i] = NAME(load_words)(keys[k + i], w);
                for (int j = 0; j < DOT_ROWS; j++) {
                    vf row = NAME(load)(q + j * num_words + w);
                    for (int i = 0; i < DOT_KEYS; i++)
                        sums[j * DOT_KEYS + i] = NAME(multiply_add)(sums[j * DOT_KEYS + i], row, key[i]);
                }
            }
            float flat[LANES];
            NAME(store)(flat, NAME(as_floats)(NAME(sums_of)(sums)));
            for (int j = 0; j < DOT_ROWS; j++)
                for (int i = 0; i < DOT_KEYS; i++) scores[(r + j) * stride + k + i] = flat[j * DOT_KEYS + i];
        }
    }
}

INLINE void NAME(weigh_chunk)(int vectors, const float *weights, int stride, const char *const *values, int num_keys, int word,
                              float *to, int to_stride, const float *factor, const float *unit, const char *const *ahead,
                              int ahead_bytes) {
    vf sums[DOT_ROWS][4];
    for (int j = 0; j < DOT_ROWS; j++)
        for (int v = 0; v < vectors; v++)
            sums[j][v] = IS_INTEGER ? (vf){0} : NAME(load)(to + j * to_stride + v * LANES) * factor[j];
    for (int k = 0; k < num_keys; k += PER_WORD) {
        if (ahead)
            for (int i = 0; i < PER_WORD; i++) NAME(fetch)(ahead[k + i], ahead_bytes);
        vf column[4];
#if PER_WORD == 2
        for (int v = 0; v < vectors; v += 2) {
            __m512i even = (__m512i)NAME(load_words)(values[k], word + v / 2 * LANES);
            __m512i odd = (__m512i)NAME(load_words)(values[k + 1], word + v / 2 * LANES);
            column[v] = (vf)_mm512_unpacklo_epi16(even, odd);
            column[v + 1] = (vf)_mm512_unpackhi_epi16(even, odd);
        }
#else
        for (int v = 0; v < vectors; v++) column[v] = NAME(load_words)(values[k], word + v * LANES);
#endif
        for (int j = 0; j < DOT_ROWS; j++) {
            vf weight = NAME(splat)(weights + j * stride + k / PER_WORD);
            for (int v = 0; v < vectors; v++) sums[j][v] = NAME(multiply_add)(sums[j][v], weight, column[v]);
        }
    }
    for (int j = 0; j < DOT_ROWS; j++)
        for (int v = 0; v < vectors; v++) {
            float *at = to + j * to_stride + v * LANES;
            vf sum = NAME(as_floats)(sums[j][v]);
            if (IS_INTEGER) sum = NAME(load)(at) * factor[j] + sum * unit[j];
            NAME(store)(at, sum);
        }
    (void)unit;
}

/* sums[r][column] = sums[r][column] * factor[r] + weighted values, for a few rows, padded to DOT_ROWS. Values are read in place,
   in pairs where a word is one; so columns come out in another order, which `column_of` undoes at the end. */
static void TARGET NAME(weigh_rows)(const float *weights, int num_rows, int stride, const char *const *values, int num_keys,
                                    int num_words, float *sums, const float *factor, const float *unit,
                                    const char *const *ahead, int ahead_bytes) {
    const int chunk = 4 / PER_WORD * LANES; /* words: four vectors of columns */
    for (int r = 0; r < num_rows; r += DOT_ROWS)
        for (int w = 0; w < num_words; w += chunk) {
            int vectors = num_words - w < chunk ? (num_words - w) / LANES * PER_WORD : 4;
            float *to = sums + (int64_t)r * num_words * PER_WORD + w * PER_WORD;
            int is_first = r == 0 && w == 0;
            if (vectors == 4) {
                NAME(weigh_chunk)(4, weights + r * stride, stride, values, num_keys, w, to, num_words * PER_WORD, factor + r,
                                  unit + r, is_first ? ahead : 0, ahead_bytes);
            } else {
                for (int v = 0; v < vectors; v += PER_WORD)
                    NAME(weigh_chunk)(PER_WORD, weights + r * stride, stride, values, num_keys, w + v / PER_WORD * LANES,
                                      to + v * LANES, num_words * PER_WORD, factor + r, unit + r,
                                      is_first && v == 0 ? ahead : 0, ahead_bytes);
            }
        }
}

/* c[r][col] = c[r][col] * factor[r] + weight[r] * sum over k of a[r][k] * b[k][col], one register tile; without factors
   the sum alone. Weights matter to integers only. */
INLINE void NAME(gemm_tile)(int rows, int vectors, int depth, const float *a, int64_t a_stride, const float *b,
                            int64_t b_stride, float *c, int64_t c_stride, const float *factor, const float *weight) {
    vf sums[GEMM_ROWS][GEMM_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = factor && !IS_INTEGER ? NAME(load)(c + r * c_stride + v * LANES) * factor[r] : (vf){0};
    for (int k = 0; k < depth; k++) {
        vf column[GEMM_VECTORS];
        for (int v = 0; v < vectors; v++) column[v] = NAME(load)(b + k * b_stride + v * LANES);
        for (int r = 0; r < rows; r++) {
            vf broadcast = NAME(splat)(a + r * a_stride + k);
            for (int v = 0; v < vectors; v++) sums[r][v] = NAME(multiply_add)(sums[r][v], broadcast, column[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            float *to = c + r * c_stride + v * LANES;
            vf sum = NAME(as_floats)(sums[r][v]);
            if (factor && IS_INTEGER) sum = NAME(load)(to) * factor[r] + sum * weight[r];
            NAME(store)(to, sum);
        }
    (void)weight;
}

static void TARGET NAME(gemm_column)(int vectors, int num_rows, int depth, const float *a, int64_t a_stride,
                                     const float *b, int64_t b_stride, float *c, int64_t c_stride, const float *factor,
                                     const float *weight) {
#define REGISTER_TILE(ROWS, VECTORS) \
    NAME(gemm_tile)(ROWS, VECTORS, depth, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, \
                    factor ? factor + r : 0, weight ? weight + r : 0)
#define ROWS_OF(VECTORS)                                              \
    for (; r + GEMM_ROWS <= num_rows; r += GEMM_ROWS) REGISTER_TILE(GEMM_ROWS, VECTORS); \
    for (; r + 4 <= num_rows && GEMM_ROWS > 4; r += 4) REGISTER_TILE(4, VECTORS);        \
    for (; r < num_rows; r++) REGISTER_TILE(1, VECTORS)
    int r = 0;
    if (vectors == GEMM_VECTORS) {
        ROWS_OF(GEMM_VECTORS);
    } else {
        ROWS_OF(1);
    }
#undef ROWS_OF
#undef REGISTER_TILE
}

/* num_columns is a multiple of LANES. b's columns are walked outermost, so that GEMM_VECTORS of them stay in L1. */
static void TARGET NAME(gemm)(int num_rows, int num_columns, int depth, const float *a, int64_t a_stride, const float *b,
                              int64_t b_stride, float *c, int64_t c_stride, const float *factor, const float *weight) {
    int column = 0;
    for (; column + GEMM_VECTORS * LANES <= num_columns; column += GEMM_VECTORS * LANES)
        NAME(gemm_column)(GEMM_VECTORS, num_rows, depth, a, a_stride, b + column, b_stride, c + column, c_stride, factor, weight);
    for (; column < num_columns; column += LANES)
        NAME(gemm_column)(1, num_rows, depth, a, a_stride, b + column, b_stride, c + column, c_stride, factor, weight);
}
