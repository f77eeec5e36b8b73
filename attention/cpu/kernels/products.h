/* The two products that attention is made of, on words. Included once per instruction set after vectors.h.
   GEMM_ROWS x GEMM_VECTORS accumulators fill the registers. */

#define DOT_KEYS 4
#define DOT_ROWS (LANES / 4)
#define FETCH_ROWS 8 /* of values: how often fetches are made. To look after each row takes a tenth of a decode */
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

/* Rows that are fetched in the course of other work, some lines now and then: all of them at once would fill the queue of fetches
   that a core may have under way, and the work would wait for a memory that is idle in the rest. */
struct NAME(fetches) {
    const char *const *row, *const *end;
    int bytes, at;         /* of a row, and of them those behind us */
    int share, num_shares; /* num_shares / share calls of fetch_share fetch all of them */
    int credit;            /* lines x num_shares that may be fetched by now and are not */
};

INLINE struct NAME(fetches) NAME(fetches_of)(const char *const *rows, int num_rows, int bytes, int share, int num_shares) {
    return (struct NAME(fetches)){rows, rows + num_rows, bytes, 0, share * num_rows * ((bytes + 63) / 64), num_shares, 0};
}

INLINE void NAME(fetch_share)(struct NAME(fetches) *f) {
    for (f->credit += f->share; f->credit > 0 && f->row < f->end; f->credit -= f->num_shares) {
        __builtin_prefetch(*f->row + f->at, 0, 2);
        f->at += 64;
        if (f->at >= f->bytes) f->at = 0, f->row++;
    }
}

#if PER_WORD == 1
/* sums[row][key] += query row . key over 2 * LANES channels of bf16. Key by key, so that registers hold both halves of the
   queries and of one key; of all keys at once, sums would be spilled. */
INLINE void NAME(dot_widened)(vf sums[LANES], const float *query, int num_words, const char *const *keys, int w) {
    vf low[DOT_ROWS], high[DOT_ROWS];
    for (int j = 0; j < DOT_ROWS; j++) {
        low[j] = NAME(load)(query + j * num_words + w);
        high[j] = NAME(load)(query + j * num_words + w + LANES);
    }
    for (int i = 0; i < DOT_KEYS; i++) {
        vf even, odd;
        NAME(widen)(keys[i], w, &even, &odd);
        for (int j = 0; j < DOT_ROWS; j++) sums[j * DOT_KEYS + i] = NAME(multiply_add)(sums[j * DOT_KEYS + i], low[j], even);
        for (int j = 0; j < DOT_ROWS; j++) sums[j * DOT_KEYS + i] = NAME(multiply_add)(sums[j * DOT_KEYS + i], high[j], odd);
    }
}
#endif

INLINE void NAME(dot_rows_of)(int is_widened, const float *query, int num_rows, int num_words, const char *const *keys,
                              int num_keys, float *scores, const char *const *ahead, int ahead_bytes) {
    for (int k = 0; k < num_keys; k += DOT_KEYS) {
        for (int i = 0; i < DOT_KEYS; i++) NAME(fetch)(ahead[k + i], ahead_bytes);
        for (int r = 0; r < num_rows; r += DOT_ROWS) {
            vf sums[LANES];
            for (int i = 0; i < LANES; i++) sums[i] = (vf){0};
            const float *q = query + (int64_t)r * num_words;
            for (int w = 0; w < num_words; w += is_widened ? 2 * LANES : LANES) {
#if PER_WORD == 1
                if (is_widened) {
                    NAME(dot_widened)(sums, q, num_words, keys + k, w);
                    continue;
                }
#endif
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
            for (int j = 0; j < DOT_ROWS; j++) memcpy(scores + (r + j) * KEY_TILE + k, flat + j * DOT_KEYS, DOT_KEYS * sizeof(float));
        }
    }
}

/* scores[r * KEY_TILE + k] = query row r . key k, for a few rows. Rows are padded to DOT_ROWS, keys to DOT_KEYS; the words
   of a row to LANES. Keys are read in place, each once for DOT_ROWS rows, widened on the way where they are bf16 and words
   are floats; meanwhile the rows at `ahead`, which are needed next, are fetched: blocks lie anywhere, and no processor guesses
   where. */
static void TARGET NAME(dot_rows)(int is_widened, const float *query, int num_rows, int num_words, const char *const *keys,
                                  int num_keys, float *scores, const char *const *ahead, int ahead_bytes) {
    if (is_widened)
        NAME(dot_rows_of)(1, query, num_rows, num_words, keys, num_keys, scores, ahead, ahead_bytes);
    else
        NAME(dot_rows_of)(0, query, num_rows, num_words, keys, num_keys, scores, ahead, ahead_bytes);
}

INLINE void NAME(weigh_chunk)(int is_widened, int vectors, const float *weights, const char *const *values,
                              int num_keys, int word, float *to, int to_stride, const float *factor, const float *unit,
                              struct NAME(fetches) *ahead) {
    vf sums[DOT_ROWS][4];
    for (int j = 0; j < DOT_ROWS; j++)
        for (int v = 0; v < vectors; v++)
            sums[j][v] = IS_INTEGER ? (vf){0} : NAME(load)(to + j * to_stride + v * LANES) * factor[j];
    for (int k = 0; k < num_keys; k += PER_WORD, weights++) {
        if (k % FETCH_ROWS == 0) NAME(fetch_share)(ahead);
        vf column[4];
#if PER_WORD == 2
        for (int v = 0; v < vectors; v += 2) {
            int w = word + v / 2 * LANES;
            NAME(interleave)(NAME(load_words)(values[k], w), NAME(load_words)(values[k + 1], w), column + v);
        }
#else
        if (is_widened)
            for (int v = 0; v < vectors; v += 2) NAME(widen)(values[k], word + v * LANES, &column[v], &column[v + 1]);
        else
            for (int v = 0; v < vectors; v++) column[v] = NAME(load_words)(values[k], word + v * LANES);
#endif
        for (int j = 0; j < DOT_ROWS; j++) {
            vf weight = NAME(splat)(weights + j * KEY_TILE);
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
    (void)unit, (void)is_widened;
}

INLINE void NAME(weigh_rows_of)(int is_widened, const float *weights, int num_rows, const char *const *values,
                                int num_keys, int num_words, float *sums, const float *factor, const float *unit,
                                const char *const *ahead, int ahead_bytes) {
    const int chunk = 4 / PER_WORD * LANES; /* words: four vectors of columns */
    const int step = is_widened ? 2 : PER_WORD; /* vectors that one load makes */
    const int num_chunks = num_words / chunk + num_words % chunk / LANES * PER_WORD / step;
    const int num_passes = (num_rows + DOT_ROWS - 1) / DOT_ROWS * num_chunks;
    struct NAME(fetches) fetches = NAME(fetches_of)(ahead, num_keys, ahead_bytes, FETCH_ROWS, num_passes * num_keys);
    for (int r = 0; r < num_rows; r += DOT_ROWS)
        for (int w = 0; w < num_words; w += chunk) {
            int vectors = num_words - w < chunk ? (num_words - w) / LANES * PER_WORD : 4;
            float *to = sums + (int64_t)r * num_words * PER_WORD + w * PER_WORD;
            if (vectors == 4) {
                NAME(weigh_chunk)(is_widened, 4, weights + r * KEY_TILE, values, num_keys, w, to, num_words * PER_WORD,
                                  factor + r, unit + r, &fetches);
            } else {
                for (int v = 0; v < vectors; v += step)
                    NAME(weigh_chunk)(is_widened, step, weights + r * KEY_TILE, values, num_keys, w + v / PER_WORD * LANES,
                                      to + v * LANES, num_words * PER_WORD, factor + r, unit + r, &fetches);
            }
        }
}

/* sums[r][column] = sums[r][column] * factor[r] + weighted values, for a few rows, padded to DOT_ROWS. Values are read in place,
   in pairs where a word is one; so columns come out in another order, which `in_order` undoes at the end. */
static void TARGET NAME(weigh_rows)(int is_widened, const float *weights, int num_rows, const char *const *values,
                                    int num_keys, int num_words, float *sums, const float *factor, const float *unit,
                                    const char *const *ahead, int ahead_bytes) {
    if (is_widened)
        NAME(weigh_rows_of)(1, weights, num_rows, values, num_keys, num_words, sums, factor, unit, ahead, ahead_bytes);
    else
        NAME(weigh_rows_of)(0, weights, num_rows, values, num_keys, num_words, sums, factor, unit, ahead, ahead_bytes);
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
                                     const float *weight, struct NAME(fetches) *ahead) {
#define REGISTER_TILE(ROWS, VECTORS)                                                                          \
    NAME(gemm_tile)(ROWS, VECTORS, depth, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, \
                    factor ? factor + r : 0, weight ? weight + r : 0);                                         \
    NAME(fetch_share)(ahead)
#define ROWS_OF(VECTORS)                                              \
    for (; r + GEMM_ROWS <= num_rows; r += GEMM_ROWS) { REGISTER_TILE(GEMM_ROWS, VECTORS); } \
    for (; r + 4 <= num_rows && GEMM_ROWS > 4; r += 4) { REGISTER_TILE(4, VECTORS); }        \
    for (; r < num_rows; r++) { REGISTER_TILE(1, VECTORS); }
    int r = 0;
    if (vectors == GEMM_VECTORS) {
        ROWS_OF(GEMM_VECTORS);
    } else {
        ROWS_OF(1);
    }
#undef ROWS_OF
#undef REGISTER_TILE
}

/* num_columns is a multiple of LANES. b's columns are walked outermost, so that GEMM_VECTORS of them stay in L1; each panel
   of as many begins b_panel floats behind the one before. */
static void TARGET NAME(gemm)(int num_rows, int num_columns, int depth, const float *a, int64_t a_stride, const float *b,
                              int64_t b_stride, int64_t b_panel, float *c, int64_t c_stride, const float *factor,
                              const float *weight, struct NAME(fetches) *ahead) {
    const int panel = GEMM_VECTORS * LANES;
    int column = 0;
    for (; column + panel <= num_columns; column += panel, b += b_panel)
        NAME(gemm_column)(GEMM_VECTORS, num_rows, depth, a, a_stride, b, b_stride, c + column, c_stride, factor, weight, ahead);
    for (; column < num_columns; column += LANES, b += LANES)
        NAME(gemm_column)(1, num_rows, depth, a, a_stride, b, b_stride, c + column, c_stride, factor, weight, ahead);
}
