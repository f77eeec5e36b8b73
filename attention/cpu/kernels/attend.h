/* One task: some query tokens over a range of keys, for some heads. Included once per instruction set after
   lay.h, soften.h and finish.h.

   Queries that share a KV head are the rows of one matrix. Keys come in tiles. A task of few rows (a decode) reads keys
   in place and walks all heads of a tile before the next tile, so that memory is read in order. A task of many rows
   (a prefill chunk, which has one head, or a decode of many heads per KV head) lays each tile out once for all its rows; by tile
   registers where there are any, in attend_tiles.h. */

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
    const char *values_ahead[KEY_TILE + DOT_KEYS];

    NAME(words_of_head)(task, &call->key, s->keys[which], kv_head, first_key, num_keys, task->key_words, s->key_rows, keys);
    for (int i = 0; i < DOT_KEYS; i++) keys[num_keys + i] = (const char *)s->zeros;
    NAME(scales_of_tile)(task, kv_head, first_key, num_keys);
    if (IS_INTEGER) s->largest_value_scale = NAME(largest_magnitude)(s->value_scales, num_keys);
    int key_bytes = (int)call->key.dim * ELEMENT_BYTES(call), value_bytes = (int)call->value.dim * ELEMENT_BYTES(call);
    struct NAME(fetches) key_fetches, value_fetches;
    if (task->is_few) {
        /* A head further than what is read next: half a head does not take as long as memory does. */
        NAME(rows_heads_ahead)(task, &call->value, s->values, which, kv_head, 1, num_keys, num_next, ahead);
    } else {
        /* A prefill task has one head: what comes next is the next tile of it. */
        const int num_tiles = (task->rows + GEMM_ROWS - 1) / GEMM_ROWS, columns = GEMM_VECTORS * LANES;
        NAME(rows_ahead)(task, &call->key, s->keys[!which], kv_head, num_next, num_next, ahead);
        NAME(rows_ahead)(task, &call->value, s->values[!which], kv_head, num_next, num_next, values_ahead);
        key_fetches = NAME(fetches_of)(ahead, num_next, key_bytes, 1, num_tiles * (KEY_TILE / columns));
        value_fetches = NAME(fetches_of)(values_ahead, num_next, value_bytes, 1, num_tiles * ((task->value_columns + columns - 1) / columns));
        NAME(lay_keys)(task->is_widened, keys, num_keys, task->key_words, columns, s->zeros, s->key_columns);
    }
    int are_values_ready = 0;
    for (int r = 0; r < task->rows; r += ROW_BLOCK) {
        int num_rows = task->rows - r < ROW_BLOCK ? task->rows - r : ROW_BLOCK;
        struct NAME(block) block = {.first_row = r, .num_rows = num_rows, .first_key = first_key, .num_keys = num_keys,
                                    .scores = s->scores, .stride = KEY_TILE,
                                    .key_scales = s->key_scales, .value_scales = s->value_scales};
        int num_seen = NAME(keys_seen)(task, &block);
        if (!num_seen) continue;
        block.padded_keys = ((task->is_few ? num_keys : num_seen) + LANES - 1) / LANES * LANES;
        if (task->is_few) {
            NAME(dot_rows)(task->is_widened, query + (int64_t)r * task->key_words,
                           (num_rows + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS, task->key_words, keys, num_keys, s->scores,
                           ahead, value_bytes);
        } else {
            const int panel = GEMM_VECTORS * LANES;
            for (int first = 0; first < num_seen; first += panel) {
                int width = num_seen - first < panel ? (num_seen - first + LANES - 1) / LANES * LANES : panel;
                const float *b = s->key_columns + (int64_t)first * task->key_words;
                int column = 0;
                if (width == panel) {
                    NAME(gemm_column)(GEMM_VECTORS, num_rows, task->key_words, query + (int64_t)r * task->key_words, task->key_words,
                                      b, panel, s->scores + first, KEY_TILE, 0, 0, &key_fetches);
                } else {
                    for (; column < width; column += LANES)
                        NAME(gemm_column)(1, num_rows, task->key_words, query + (int64_t)r * task->key_words, task->key_words,
                                          b + column, panel, s->scores + first + column, KEY_TILE, 0, 0, &key_fetches);
                }
            }
        }
        float shrink[ROW_BLOCK + LANES], weight[ROW_BLOCK + LANES];
        NAME(soften)(task, kv_head, &block, shrink, weight, NULL);
        if (!are_values_ready) {
            NAME(words_of_head)(task, &call->value, s->values[which], kv_head, first_key, num_keys, task->value_words,
                                s->value_rows, values);
            NAME(hide_unseen)(task, first_key, num_keys, values);
            values[num_keys] = (const char *)s->zeros;
            if (task->is_few)
                NAME(rows_heads_ahead)(task, &call->key, s->keys, which, kv_head, 2, num_keys, num_next, ahead);
            else
                NAME(lay_values)(task->is_widened, values, num_keys, task->value_words, s->value_tile);
            are_values_ready = 1;
        }
        if (task->is_few) {
            for (int i = num_rows; i % DOT_ROWS; i++) shrink[i] = weight[i] = 0.0f;
            NAME(weigh_rows)(task->is_widened, s->scores, num_rows, values, num_keys, task->value_words, sums, shrink,
                             weight, ahead, key_bytes);
        } else {
            NAME(gemm)(num_rows, task->value_columns, (num_seen + PER_WORD - 1) / PER_WORD, s->scores, KEY_TILE, s->value_tile,
                       VALUE_STRIDE(task), VALUE_PANEL, sums + (int64_t)r * task->value_columns, task->value_columns, shrink,
                       weight, &value_fetches);
        }
    }
}

#if PER_WORD == 1
/* A query of bf16 as floats in the order in which `widen` reads keys. */
static void TARGET NAME(row_to_halves)(const char *row, int num_words, float *to) {
    for (int w = 0; w < num_words; w += 2 * LANES) {
        vf even, odd;
        NAME(widen)(row, w, &even, &odd);
        NAME(store)(to + w, even);
        NAME(store)(to + w + LANES, odd);
    }
}
#endif

#ifdef INT16_DOT
/* A query as int16, as large as the sums of its products with int8 allow; returns what one unit stands for. */
static float TARGET NAME(query_to_int16)(const struct cache *row, int dtype, const char *from, int16_t *to, int num_words) {
    float x[MAX_DIM];
    int dim = (int)row->dim, most = INT32_MAX / 128 / dim;
    if (most > 32767) most = 32767;
    NAME(row_to_floats)(row, FORMAT_FLOAT, dtype, from, 0, x);
    float largest = NAME(largest_magnitude)(x, dim), units = (float)most / largest;
    if (!(units > 0.0f && units < INFINITY)) {
        memset(to, 0, 2 * num_words * sizeof(int16_t));
        return largest; /* infinity and NaN go on into the scores */
    }
    for (int d = 0; d < 2 * num_words; d++) to[d] = d < dim ? (int16_t)rintf(x[d] * units) : 0;
    return 1.0f / units;
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
#if PER_WORD == 1
            if (task->is_widened) {
                NAME(row_to_halves)(from, task->key_words, to);
                continue;
            }
#endif
            NAME(row_to_words)(&as_row, FORMAT_FLOAT, call->dtype, from, 0, to, task->key_words);
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
    NAME(in_order)(task, sums, channels);
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
    for (int d = 0; d < dim; d++) s->partial_out[part * dim + d] = channels[d] * factor;
    s->partial_lse[part] = lse;
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
    task.is_few = task.rows <= MAX_FEW_ROWS;
    task.has_tiles = scratch->has_tiles && !task.is_few;
    const int step = task.has_tiles ? TILE_PAIR : DOT_ROWS;
    task.padded_rows = (task.rows + step - 1) / step * step;
    task.key_words = NAME(words)(call->key.dim);
    task.value_words = NAME(words)(call->value.dim);
    task.value_columns = task.value_words * PER_WORD;
    task.query_offset = call->seq_lens[task.seq] - call->query_start_loc[task.seq + 1];
    task.first_draft = task.query_offset + call->query_start_loc[task.seq];
    task.is_widened = NAME(widens)(call);
    task.is_biased = call->softcap > 0.0f || call->alibi_slopes || call->tree_mask;
    int64_t rows = (int64_t)(end_head - first_head) * task.padded_rows;
    for (int64_t i = 0; i < rows; i++) scratch->highest[i] = -INFINITY, scratch->total[i] = 0.0f;
    memset(scratch->sums, 0, rows * task.value_columns * sizeof(float));
    NAME(load_queries)(&task);
    int tile = task.is_few ? FEW_TILE : task.has_tiles ? LAID_KEYS : KEY_TILE;
    int num_keys = task.end_key - task.first_key < tile ? task.end_key - task.first_key : tile, which = 0;
    NAME(find_rows)(&task, task.first_key, num_keys, scratch->keys[0], scratch->values[0]);
    for (int key = task.first_key; key < task.end_key; key += tile, which = !which) {
        int next = key + tile, num_next = task.end_key - next < tile ? task.end_key - next : tile;
        if (num_next < 0) num_next = 0;
        NAME(find_rows)(&task, next, num_next, scratch->keys[!which], scratch->values[!which]);
        for (int h = first_head; h < end_head; h++)
#ifdef HAS_TILES
            if (task.has_tiles) NAME(attend_by_tiles)(&task, h, key, num_keys, which, num_next);
            else
#endif
            NAME(attend_tile)(&task, h, key, num_keys, which, num_next);
        num_keys = num_next;
    }
    for (int h = first_head; h < end_head; h++)
        for (int r = 0; r < task.rows; r++) NAME(finish_row)(&task, h, r);
}
