/* What a task is, and what a thread works in. Included once per instruction set after vectors.h, products.h and rows.h. */

/* What one thread works in. K is the number of keys laid out at a time: LAID_KEYS with tile registers, else KEY_TILE. */
struct NAME(scratch) {
    float *query;       /* [heads][rows][key_words] */
    int has_tiles;      /* whether there are tile registers to work with */
    float *key_rows;    /* [K][key_words], where keys are not read in place */
    float *key_columns; /* [K / panel][key_words][panel] */
    float *value_rows;  /* [K][value_words], where values are not read in place */
    float *value_tile;  /* [panel][K][columns of a panel]; of pairs [K / 2][value_columns] */
    float *scores;      /* [ROW_BLOCK][KEY_TILE] floats, then overwritten by weights as words; or [2][TILE_PAIR][SCORED_KEYS] */
    float *sums;        /* [heads][rows][value_columns]: the weighted sums of values, not yet divided */
    float *highest;     /* [heads][rows] */
    float *total;       /* [heads][rows] */
    const char **keys[2], **values[2]; /* [K]: head 0 of each key, of this tile and of the next */
    float *key_scales, *value_scales; /* [K] */
    float largest_value_scale;
    float *partial_out, *partial_lse; /* of the job */
    float *query_scales; /* [heads][rows]: what one unit of an int16 query stands for */
    float *zeros;
    uint8_t codes_as_bf16[256]; /* see fill_table */
};

/* Whether rows are bf16 whose channels are widened as they are read, without a copy as floats. */
static int NAME(widens)(const struct attention_call *call) {
    return PER_WORD == 1 && call->format == FORMAT_FLOAT && call->dtype == DTYPE_BF16 && call->key.dim % (2 * LANES) == 0 &&
           call->value.dim % (2 * LANES) == 0;
}

static int NAME(words)(int64_t dim) { return (int)((dim + LANES * PER_WORD - 1) / (LANES * PER_WORD)) * LANES; }

/* Divides one piece of memory; with memory = NULL only counts. Returns the bytes used. */
static int64_t NAME(divide_scratch)(struct NAME(scratch) *s, const struct attention_call *call, int64_t rows, int has_tiles,
                                    char *memory) {
    int64_t used = 0, num_keys = has_tiles ? LAID_KEYS : KEY_TILE;
    s->has_tiles = has_tiles;
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
    TAKE(key_rows, num_keys * key_words);
    TAKE(key_columns, num_keys * key_words);
    TAKE(value_rows, num_keys * value_words);
    TAKE(value_tile, num_keys * (value_words + GEMM_VECTORS * LANES));
    int num_scores = (ROW_BLOCK + DOT_ROWS) * KEY_TILE;
    if (has_tiles && 2 * TILE_PAIR * SCORED_KEYS > num_scores) num_scores = 2 * TILE_PAIR * SCORED_KEYS;
    TAKE(scores, num_scores);
    for (int i = 0; i < 2; i++) {
        TAKE(keys[i], num_keys);
        TAKE(values[i], num_keys);
    }
    TAKE(key_scales, num_keys);
    TAKE(value_scales, num_keys);
    TAKE(zeros, key_words + value_words);
#undef TAKE
    return used;
}

/* How value_tile is walked: from one key (or pair) to the next, and from one panel of columns to the next. */
#if PER_WORD == 2
#define VALUE_STRIDE(task) (task)->value_columns
#define VALUE_PANEL (GEMM_VECTORS * LANES)
#else
#define VALUE_STRIDE(task) (GEMM_VECTORS * LANES)
#define VALUE_PANEL (KEY_TILE * GEMM_VECTORS * LANES)
#endif

struct NAME(task) {
    const struct attention_call *call;
    struct NAME(scratch) *scratch;
    int seq, first, end, first_key, end_key, partial;
    int first_head, end_head, group, rows, padded_rows;
    int key_words, value_words, value_columns; /* words of a key; words and floats of a padded value row */
    int query_offset, first_draft; /* position of query token t is t + query_offset; that of its sequence's first */
    int is_few;
    int has_tiles; /* its products are made by tile registers */
    int is_biased; /* scores are more than scaled products */
    int is_widened; /* bf16 read in place where words are floats: channels come as the even ones and the odd ones of a chunk */
};

/* Some rows of a head and some keys, whose scores are made at once. */
struct NAME(block) {
    int first_row, num_rows, first_key, num_keys;
    int padded_keys; /* those that are softened: all that any row sees, and some more, whose scores become -infinity */
    float *scores;   /* [num_rows][stride] */
    int stride;
    const float *key_scales, *value_scales; /* of INT8 */
};

#define ELEMENT_BYTES(call) ((call)->format != FORMAT_FLOAT ? 1 : (call)->dtype == DTYPE_F32 ? 4 : 2)
