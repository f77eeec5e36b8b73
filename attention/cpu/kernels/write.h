/* New keys and values into the cache, quantised as `pagedkv.attention.formats.quantize` does. Included once per instruction
   set after rows.h. */

/* A float in fewer bits, rounded to nearest even: `exponent_shift` moves the exponent's bias, `drop` bits go; below
   `smallest_normal` the addition of `magic` rounds to the last place of the subnormals. Magnitudes are in range already. */
INLINE uint8_t NAME(narrowed)(float x, float largest, uint32_t smallest_normal, float magic, uint32_t exponent_shift, int drop) {
    union { float value; uint32_t bits; } u = {x}, m = {magic};
    uint8_t sign = (uint8_t)(u.bits >> 24 & 0x80);
    u.bits &= 0x7FFFFFFF;
    if (u.value > largest) u.value = largest;
    if (u.bits < smallest_normal) {
        u.value += magic;
        return sign | (uint8_t)(u.bits - m.bits);
    }
    return sign | (uint8_t)((u.bits - exponent_shift + ((1u << (drop - 1)) - 1) + (u.bits >> drop & 1)) >> drop);
}
INLINE uint8_t NAME(to_e4m3)(float x) {
    return x != x ? 0x7F : NAME(narrowed)(x, 448.0f, 0x3C800000, 0x1p14f, 120u << 23, 20);
}
INLINE uint8_t NAME(to_e5m2)(float x) {
    return x != x ? 0x7F : NAME(narrowed)(x, 57344.0f, 0x38800000, 0x1p7f, 112u << 23, 21);
}

static void TARGET NAME(write_int8)(const float *x, int dim, uint8_t *to, float *scale) {
    float step = NAME(largest_magnitude)(x, dim) / 127.0f;
    *scale = step;
    if (!(step > 0.0f && step < INFINITY)) {
        memset(to, 0, (size_t)dim); /* all zeros; or infinity or NaN, which the scale says for all of them */
        return;
    }
    for (int i = 0; i < dim; i++) to[i] = (uint8_t)(int8_t)(int)rintf(x[i] / step);
}

static void TARGET NAME(write_int4)(const float *x, int dim, int group_size, uint8_t *to, uint16_t *scale) {
    for (int first = 0; first < dim; first += group_size, scale += 2) {
        float low = x[first], high = x[first];
        for (int i = first + 1; i < first + group_size; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
        }
        /* Apart from the loop above, which would be no vectors' any more. */
        float largest = NAME(largest_magnitude)(x + first, group_size);
        if (largest != largest) low = high = largest;
        scale[1] = NAME(to_bf16)(low);
        float minimum = NAME(from_bf16)(scale[1]);
        scale[0] = NAME(to_bf16)((high - minimum) / 15.0f);
        float step = NAME(from_bf16)(scale[0]);
        if (!(step > 0.0f && step < INFINITY)) {
            memset(to + first / 2, 0, (size_t)(group_size / 2));
            continue;
        }
        for (int i = first; i < first + group_size; i += 2) {
            float even = rintf((x[i] - minimum) / step), odd = rintf((x[i + 1] - minimum) / step);
            even = even < 0.0f ? 0.0f : even > 15.0f ? 15.0f : even;
            odd = odd < 0.0f ? 0.0f : odd > 15.0f ? 15.0f : odd;
            to[i / 2] = (uint8_t)((int)even | (int)odd << 4);
        }
    }
}

static void TARGET NAME(write_head)(const struct write_call *call, int side, const char *from, int64_t block, int64_t slot,
                                    int64_t head) {
    const struct cache *cache = &call->cache[side];
    int dim = (int)cache->dim;
    int64_t at = block * cache->block_stride + slot * cache->slot_stride + head * cache->head_stride;
    int64_t scale_at = block * cache->scale_block_stride + slot * cache->scale_slot_stride + head * cache->scale_head_stride;
    int64_t bytes = call->dtype == DTYPE_F32 ? 4 : 2;
    if (call->format == FORMAT_FLOAT) {
        memcpy((char *)cache->data + at * bytes, from, (size_t)(dim * bytes));
        return;
    }
    float x[MAX_DIM];
    struct cache as_row = {.dim = dim};
    NAME(row_to_floats)(&as_row, FORMAT_FLOAT, call->dtype, from, 0, x);
    uint8_t *to = (uint8_t *)cache->data + at;
    if (call->format == FORMAT_INT8) {
        NAME(write_int8)(x, dim, to, (float *)cache->scale + scale_at);
    } else if (call->format == FORMAT_INT4) {
        NAME(write_int4)(x, dim, (int)cache->group_size, to, (uint16_t *)cache->scale + scale_at);
    } else {
        float scale = cache->scale ? ((const float *)cache->scale)[head * cache->scale_head_stride] : 1.0f;
        for (int i = 0; i < dim; i++) x[i] /= scale;
        if (call->format == FORMAT_E4M3) {
            for (int i = 0; i < dim; i++) to[i] = NAME(to_e4m3)(x[i]);
        } else {
            for (int i = 0; i < dim; i++) to[i] = NAME(to_e5m2)(x[i]);
        }
    }
}

static void TARGET NAME(write_tokens)(void *argument) {
    struct write_job *job = argument;
    const struct write_call *call = job->call;
    for (;;) {
        int64_t first = atomic_fetch_add(&job->next, job->tokens_at_once);
        if (first >= call->num_tokens) break;
        int64_t end = first + job->tokens_at_once < call->num_tokens ? first + job->tokens_at_once : call->num_tokens;
        for (int64_t token = first; token < end; token++) {
            if (call->slots[token] < 0) continue;
            int64_t block = call->slots[token] / call->block_size, slot = call->slots[token] % call->block_size;
            for (int side = 0; side < 2 && call->source[side]; side++) {
                int64_t element = token * call->token_stride[side];
                int64_t bytes = call->dtype == DTYPE_F32 ? 4 : 2;
                for (int64_t head = 0; head < call->num_kv_heads; head++)
                    NAME(write_head)(call, side, (const char *)call->source[side] + bytes * (element + head * call->head_stride[side]),
                                     block, slot, head);
            }
        }
    }
}
