/* Many rows of one head by tile registers. Included once per instruction set after soften.h.

   LAID_KEYS keys are laid out once for all rows of a task, and stay in the second-level cache. They are walked in blocks, each of
   TILE_PAIR rows and SCORED_KEYS keys, all keys of some rows before the next rows, so that their sums stay near. While vectors soften
   the scores of a block, the sums of the block before it and the scores of the one after are multiplied. */

#ifdef HAS_TILES
/* Values as tiles: words[column / 16][pair of keys][column in 16]. */
static void TARGET NAME(lay_value_tiles)(const char *const *values, int num_keys, int num_words, float *to) {
    const int64_t panel = LAID_KEYS / 2 * TILE;
    for (int k = 0; k < num_keys; k += 2)
        for (int w = 0; w < num_words; w += TILE) {
            float *at = to + 2 * w / TILE * panel + k / 2 * TILE;
            vf pair[2];
            NAME(interleave)(NAME(load_words)(values[k], w), NAME(load_words)(values[k + 1], w), pair);
            NAME(store)(at, pair[0]);
            NAME(store)(at + panel, pair[1]);
        }
}

/* Moves on to the next block of a tile of keys in which any row sees any key; 0 if there is none. */
static int TARGET NAME(next_block)(const struct NAME(task) *task, int first_key, int num_keys, struct NAME(block) *b) {
    const struct NAME(scratch) *s = task->scratch;
    int row = b->first_row, key = b->first_key - first_key + SCORED_KEYS;
    for (; row < task->rows; row += TILE_PAIR, key = 0)
        for (; key < num_keys; key += SCORED_KEYS) {
            b->first_row = row;
            b->num_rows = task->rows - row < TILE_PAIR ? task->rows - row : TILE_PAIR;
            b->first_key = first_key + key;
            b->num_keys = num_keys - key < SCORED_KEYS ? num_keys - key : SCORED_KEYS;
            b->key_scales = s->key_scales + key;
            b->value_scales = s->value_scales + key;
            b->padded_keys = (NAME(keys_seen)(task, b) + TILE_PAIR - 1) / TILE_PAIR * TILE_PAIR;
            if (b->padded_keys) return 1;
        }
    return 0;
}

/* LAID_KEYS keys, or the last ones, for one head; the next num_next are fetched meanwhile. */
static void TARGET NAME(attend_by_tiles)(const struct NAME(task) *task, int kv_head, int first_key, int num_keys, int which,
                                         int num_next) {
    const struct attention_call *call = task->call;
    struct NAME(scratch) *s = task->scratch;
    const char *keys[LAID_KEYS], *values[LAID_KEYS];
    const char *keys_ahead[LAID_KEYS + DOT_KEYS], *values_ahead[LAID_KEYS + DOT_KEYS];
    const int64_t row_base = (int64_t)(kv_head - task->first_head) * task->padded_rows;
    const float *query = s->query + row_base * task->key_words;
    float *sums = s->sums + row_base * task->value_columns;
    const int padded_keys = (num_keys + TILE_PAIR - 1) / TILE_PAIR * TILE_PAIR;

    NAME(words_of_head)(task, &call->key, s->keys[which], kv_head, first_key, num_keys, task->key_words, s->key_rows, keys);
    NAME(words_of_head)(task, &call->value, s->values[which], kv_head, first_key, num_keys, task->value_words, s->value_rows,
                        values);
    NAME(scales_of_tile)(task, kv_head, first_key, num_keys);
    NAME(hide_unseen)(task, first_key, num_keys, values);
    for (int i = num_keys; i < padded_keys; i++) {
        keys[i] = values[i] = (const char *)s->zeros;
        s->key_scales[i] = s->value_scales[i] = 0.0f;
    }
    NAME(lay_keys)(0, keys, padded_keys, task->key_words, TILE, s->zeros, s->key_columns);
    NAME(lay_value_tiles)(values, padded_keys, task->value_words, s->value_tile);

    /* A product fetches once for each of its pairs of tiles' columns. */
    const int num_blocks = (task->rows + TILE_PAIR - 1) / TILE_PAIR * ((num_keys + SCORED_KEYS - 1) / SCORED_KEYS);
    const int key_bytes = (int)call->key.dim * ELEMENT_BYTES(call), value_bytes = (int)call->value.dim * ELEMENT_BYTES(call);
    NAME(rows_ahead)(task, &call->key, s->keys[!which], kv_head, num_next, num_next, keys_ahead);
    NAME(rows_ahead)(task, &call->value, s->values[!which], kv_head, num_next, num_next, values_ahead);
    struct NAME(fetches) key_fetches = NAME(fetches_of)(keys_ahead, num_next, key_bytes, 1, num_blocks * (SCORED_KEYS / TILE_PAIR));
    struct NAME(fetches) value_fetches =
        NAME(fetches_of)(values_ahead, num_next, value_bytes, 1, num_blocks * (task->value_columns / TILE_PAIR));

    /* Three blocks in a row: to be scored, being softened, to be summed. The first takes the place of the last, which is summed
       before. */
    struct NAME(block) scored = {.first_key = first_key - SCORED_KEYS, .stride = SCORED_KEYS}, softened = {0}, summed = {0};
    int num_begun = 0, is_more = 1;
    do {
        struct NAME(tile_work) work;
        NAME(begin_work)(&work, SHARES_OF_ROW * softened.num_rows);
        if (summed.num_rows)
            NAME(add_product)(&work, (struct NAME(tile_product)){
                .a = summed.scores, .a_stride = SCORED_KEYS,
                .b = s->value_tile + (summed.first_key - first_key) / 2 * TILE, .b_panel = LAID_KEYS / 2 * TILE,
                .c = sums + (int64_t)summed.first_row * task->value_columns, .c_stride = task->value_columns, .is_added = 1,
                .num_rows = summed.num_rows, .num_columns = task->value_columns, .depth = summed.padded_keys / 2,
                .fetches = &value_fetches});
        is_more = is_more && NAME(next_block)(task, first_key, num_keys, &scored);
        if (is_more) {
            scored.scores = s->scores + num_begun++ % 2 * TILE_PAIR * SCORED_KEYS;
            NAME(add_product)(&work, (struct NAME(tile_product)){
                .a = query + (int64_t)scored.first_row * task->key_words, .a_stride = task->key_words,
                .b = s->key_columns + (int64_t)(scored.first_key - first_key) * task->key_words, .b_panel = TILE * task->key_words,
                .c = scored.scores, .c_stride = SCORED_KEYS,
                .num_rows = scored.num_rows, .num_columns = scored.padded_keys, .depth = task->key_words,
                .fetches = &key_fetches});
        }
        float shrink[TILE_PAIR], ignored[TILE_PAIR];
        if (softened.num_rows) NAME(soften)(task, kv_head, &softened, shrink, ignored, &work);
        NAME(finish_work)(&work);
        for (int i = 0; i < softened.num_rows; i++) {
            if (shrink[i] == 1.0f) continue;
            float *row = sums + (int64_t)(softened.first_row + i) * task->value_columns;
            for (int c = 0; c < task->value_columns; c += LANES) NAME(store)(row + c, NAME(load)(row + c) * shrink[i]);
        }
        summed = softened;
        softened = scored;
        if (!is_more) softened.num_rows = 0;
    } while (softened.num_rows || summed.num_rows);
}
#endif
