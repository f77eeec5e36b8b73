/* The two products that attention is made of, on words. Included once per instruction set after vectors.h.
   GEMM_ROWS x GEMM_VECTORS accumulators fill the registers. */

#define DOT_KEYS 4
#define DOT_ROWS (LANES / 4)

/* scores[r * stride + k] = query row r . key k, for a few rows. Rows are padded to DOT_ROWS, keys to DOT_KEYS; the words
   of a row to LANES. Keys are read in place, each once for DOT_ROWS rows. */
static void TARGET NAME(dot_rows)(const float *query, int num_rows, int num_words, const char *const *keys, int num_keys,
                                  float *scores, int stride) {
    for (int k = 0; k < num_keys; k += DOT_KEYS) {
        for (int r = 0; r < num_rows; r += DOT_ROWS) {
            vf sums[LANES];
            for (int i = 0; i < LANES; i++) sums[i] = (vf){0};
            const float *q = query + (int64_t)r * num_words;
            for (int w = 0; w < num_words; w += LANES) {
                vf key[DOT_KEYS];
                for (int i = 0; i < DOT_KEYS; i++) key[i] = NAME(load)(keys[k + i] + 4 * w);
                for (int j = 0; j < DOT_ROWS; j++) {
                    vf row = NAME(load)(q + j * num_words + w);
                    for (int i = 0; i < DOT_KEYS; i++)
                        sums[j * DOT_KEYS + i] = NAME(multiply_add)(sums[j * DOT_KEYS + i], row, key[i]);
                }
            }
            float flat[LANES];
            NAME(store)(flat, NAME(sums_of)(sums));
            for (int j = 0; j < DOT_ROWS; j++)
                for (int i = 0; i < DOT_KEYS; i++) scores[(r + j) * stride + k + i] = flat[j * DOT_KEYS + i];
        }
    }
}

/* c[r][col] = (accumulate ? c[r][col] * factor[r] : 0) + sum over k of a[r][k] * b[k][col], one register tile. */
INLINE void NAME(gemm_tile)(int rows, int vectors, int depth, const float *a, int64_t a_stride, const float *b,
                            int64_t b_stride, float *c, int64_t c_stride, const float *factor) {
    vf sums[GEMM_ROWS][GEMM_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = factor ? NAME(load)(c + r * c_stride + v * LANES) * factor[r] : (vf){0};
    for (int k = 0; k < depth; k++) {
        vf column[GEMM_VECTORS];
        for (int v = 0; v < vectors; v++) column[v] = NAME(load)(b + k * b_stride + v * LANES);
        for (int r = 0; r < rows; r++) {
            vf broadcast = NAME(splat)(a + r * a_stride + k);
            for (int v = 0; v < vectors; v++) sums[r][v] = NAME(multiply_add)(sums[r][v], broadcast, column[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) NAME(store)(c + r * c_stride + v * LANES, sums[r][v]);
}

static void TARGET NAME(gemm_column)(int vectors, int num_rows, int depth, const float *a, int64_t a_stride,
                                     const float *b, int64_t b_stride, float *c, int64_t c_stride, const float *factor) {
#define REGISTER_TILE(ROWS, VECTORS) \
    NAME(gemm_tile)(ROWS, VECTORS, depth, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, \
                    factor ? factor + r : 0)
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
                              int64_t b_stride, float *c, int64_t c_stride, const float *factor) {
    int column = 0;
    for (; column + GEMM_VECTORS * LANES <= num_columns; column += GEMM_VECTORS * LANES)
        NAME(gemm_column)(GEMM_VECTORS, num_rows, depth, a, a_stride, b + column, b_stride, c + column, c_stride, factor);
    for (; column < num_columns; column += LANES)
        NAME(gemm_column)(1, num_rows, depth, a, a_stride, b + column, b_stride, c + column, c_stride, factor);
}
