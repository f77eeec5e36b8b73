/* From cached elements to words: rows of floats (or of bf16 pairs) with zeros behind the last channel. Included once per
   instruction set after vectors.h. */

INLINE float NAME(from_bf16)(uint16_t x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}
INLINE uint16_t NAME(to_bf16)(float x) {
    union { float value; uint32_t bits; } u = {x};
    if (x != x) return 0x7FC0;
    return (uint16_t)((u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16);
}
/* The largest magnitude of n floats, NaN if one of them is: magnitudes are in the order of their bits, NaN above infinity. */
INLINE float NAME(largest_magnitude)(const float *x, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        union { float value; int32_t bits; } u = {x[i]};
        int32_t magnitude = u.bits & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    union { int32_t bits; float value; } u = {largest};
    return u.value;
}
/* A float with fewer bits, moved to its place in a float32 and scaled by a power of two, which also makes its subnormals
   right; the largest exponent means infinity or NaN. */
INLINE float NAME(widened)(uint32_t sign, uint32_t magnitude, uint32_t special, float power) {
    union { uint32_t bits; float value; } u = {magnitude};
    u.value *= power;
    u.bits |= magnitude >= special ? 0x7F800000u | magnitude : 0;
    u.bits |= sign;
    return u.value;
}
INLINE float NAME(from_f16)(uint16_t x) {
    return NAME(widened)((uint32_t)(x & 0x8000) << 16, (uint32_t)(x & 0x7FFF) << 13, 0x0F800000u, 0x1p112f);
}
INLINE float NAME(from_e5m2)(uint8_t x) {
    return NAME(widened)((uint32_t)(x & 0x80) << 24, (uint32_t)(x & 0x7F) << 21, 0x0F800000u, 0x1p112f);
}
INLINE float NAME(from_e4m3)(uint8_t x) { /* no infinity; only all ones are NaN */
    return NAME(widened)((uint32_t)(x & 0x80) << 24, (uint32_t)(x & 0x7F) << 20, 0x07F00000u, 0x1p120f);
}
INLINE uint16_t NAME(to_f16)(float x) {
    union { float value; uint32_t bits; } u = {x};
    uint16_t sign = (uint16_t)((u.bits >> 16) & 0x8000);
    uint32_t magnitude = u.bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return sign | 0x7E00;
    if (magnitude >= 0x47800000) return sign | 0x7C00; /* 65536 and above */
    u.bits = magnitude;
    if (magnitude < 0x38800000) { /* subnormal: the addition rounds to the last place of 2^-24 */
        u.value += 0.5f;
        return sign | (uint16_t)(u.bits - 0x3F000000);
    }
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13);
}

#if LANES >= 8
/* Sixteen halves as floats. */
INLINE void NAME(halves_to_floats)(__m256i halves, float factor, float *to) {
#if LANES == 16
    NAME(store)(to, (vf)_mm512_cvtph_ps(halves) * factor);
#else
    NAME(store)(to, (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(halves)) * factor);
    NAME(store)(to + 8, (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)) * factor);
#endif
}

/* Sixteen codes of fp8. E5M2 is the upper half of a float16. E4M3 has a bit less of exponent: moved down by one place, it is
   a float16 of 2^-8 the value, but for the one NaN. */
INLINE void NAME(fp8_to_floats)(int format, const uint8_t *codes, float *to) {
    __m256i x = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes)), 8);
    if (format == FORMAT_E5M2) {
        NAME(halves_to_floats)(x, 1.0f, to);
        return;
    }
    const __m256i all_ones = _mm256_set1_epi16(0x7F00);
    __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, all_ones), all_ones);
    x = _mm256_and_si256(_mm256_srai_epi16(x, 1), _mm256_set1_epi16((short)0xBF80));
    NAME(halves_to_floats)(_mm256_or_si256(x, is_nan), 256.0f, to);
}

/* Sixteen codes of four bits, the even channels in the low halves of bytes. */
INLINE void NAME(int4_to_floats)(const uint8_t *codes, float step, float minimum, float *to) {
    const __m128i low_half = _mm_set1_epi8(15);
    __m128i both = _mm_loadl_epi64((const __m128i *)codes);
    __m128i x = _mm_unpacklo_epi8(_mm_and_si128(both, low_half), _mm_and_si128(_mm_srli_epi16(both, 4), low_half));
#if LANES == 16
    NAME(store)(to, (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)) * step + minimum);
#else
    NAME(store)(to, (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)) * step + minimum);
    NAME(store)(to + 8, (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))) * step + minimum);
#endif
}
#endif

/* Channels [0, dim) of one row as floats. `scale` only matters to INT4, whose codes mean something by themselves in no group. */
static void RARE NAME(row_to_floats)(const struct cache *cache, int format, int dtype, const char *row,
                                       const uint16_t *scale, float *to) {
    int dim = (int)cache->dim;
    const uint8_t *bytes = (const uint8_t *)row;
    const uint16_t *halves = (const uint16_t *)row;
    if (format == FORMAT_FLOAT && dtype == DTYPE_F32) {
        memcpy(to, row, 4 * dim);
    } else if (format == FORMAT_FLOAT && dtype == DTYPE_F16) {
        int i = 0;
#if LANES >= 8
        for (; i + 16 <= dim; i += 16) NAME(halves_to_floats)(_mm256_loadu_si256((const __m256i *)(halves + i)), 1.0f, to + i);
#endif
        for (; i < dim; i++) to[i] = NAME(from_f16)(halves[i]);
    } else if (format == FORMAT_FLOAT) {
        for (int i = 0; i < dim; i++) to[i] = NAME(from_bf16)(halves[i]);
    } else if (format == FORMAT_E4M3) {
        int i = 0;
#if LANES >= 8
        for (; i + 16 <= dim; i += 16) NAME(fp8_to_floats)(FORMAT_E4M3, bytes + i, to + i);
#endif
        for (; i < dim; i++) to[i] = NAME(from_e4m3)(bytes[i]);
    } else if (format == FORMAT_E5M2) {
        int i = 0;
#if LANES >= 8
        for (; i + 16 <= dim; i += 16) NAME(fp8_to_floats)(FORMAT_E5M2, bytes + i, to + i);
#endif
        for (; i < dim; i++) to[i] = NAME(from_e5m2)(bytes[i]);
    } else if (format == FORMAT_INT8) {
        for (int i = 0; i < dim; i++) to[i] = (float)(int8_t)bytes[i];
    } else {
        int group_size = (int)cache->group_size;
        for (int group = 0; group * group_size < dim; group++) {
            float step = NAME(from_bf16)(scale[2 * group]), minimum = NAME(from_bf16)(scale[2 * group + 1]);
            int i = group * group_size, end = i + group_size;
#if LANES >= 8
            for (; i + 16 <= end; i += 16) NAME(int4_to_floats)(bytes + i / 2, step, minimum, to + i);
#endif
            for (; i < end; i += 2) {
                to[i] = (float)(bytes[i / 2] & 15) * step + minimum;
                to[i + 1] = (float)(bytes[i / 2] >> 4) * step + minimum;
            }
        }
    }
}

#ifdef BF16_DOT
INLINE void NAME(store_bf16)(uint16_t *to, const float *from, int n) { /* n is a multiple of 16 */
    for (int i = 0; i < n; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

/* Rows of codes of one byte as bf16, up to 64 at a time, by two tables of 128 entries: a code's low seven bits choose, its high bit
   is the sign. INT8 is looked up by its magnitude; -128, which no write makes, reads as -127. Rows begin num_words words apart and
   end in zeros: code 0. */
INLINE void NAME(codes_to_bf16)(int is_int8, const uint8_t table[256], const char *const *rows, int64_t offset, int num_rows,
                                int dim, int num_words, float *to) {
    const __m512i low_0 = _mm512_loadu_si512(table), low_64 = _mm512_loadu_si512(table + 64);
    const __m512i high_0 = _mm512_loadu_si512(table + 128), high_64 = _mm512_loadu_si512(table + 192);
    /* Interleaving works within 128-bit parts: order the parts first, so that the result is in order. */
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int r = 0; r < num_rows; r++)
        for (int i = 0; i < dim; i += 64) {
            __mmask64 are_there = dim - i < 64 ? ~0ull >> (64 - (dim - i)) : ~0ull;
            __m512i codes = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(are_there, rows[r] + offset + i));
            __m512i index = is_int8 ? _mm512_min_epu8(_mm512_abs_epi8(codes), _mm512_set1_epi8(127)) : codes;
            __m512i low = _mm512_permutex2var_epi8(low_0, index, low_64), high = _mm512_permutex2var_epi8(high_0, index, high_64);
            high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8);
            uint16_t *words = (uint16_t *)(to + (int64_t)r * num_words) + i;
            _mm512_storeu_si512(words, _mm512_unpacklo_epi8(low, high));
            if (dim - i > 32) _mm512_storeu_si512(words + 32, _mm512_unpackhi_epi8(low, high));
        }
}

/* A group has sixteen values: they are computed once, and its codes choose among them. */
static void TARGET NAME(int4_to_bf16)(const uint8_t *codes, const uint16_t *scale, int dim, int group_size, uint16_t *to) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low_half = _mm512_set1_epi32(0x000F000F);
    for (int first = 0; first < dim; first += group_size, scale += 2) {
        int32_t pair;
        memcpy(&pair, scale, sizeof pair); /* the step is its low half, the minimum its high half */
        __m512i both = _mm512_set1_epi32(pair);
        __m512 step = (__m512)_mm512_slli_epi32(both, 16), minimum = (__m512)_mm512_and_si512(both, _mm512_set1_epi32(-65536));
        __m512i values = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(numbers, step, minimum)));
        for (int i = first; i < first + group_size; i += 32) {
            __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
            /* A byte's halves, one in each half of a word: (bytes | bytes << 12) & low_half. */
            __m512i index = _mm512_ternarylogic_epi32(bytes, _mm512_slli_epi32(bytes, 12), low_half, 0xA8);
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(index, values));
        }
    }
}

/* The table for codes_to_bf16: low bytes of the bf16 of codes 0 to 127, then their high bytes. */
static void TARGET NAME(fill_table)(int format, uint8_t table[256]) {
    for (int code = 0; code < 128; code++) {
        float value = format == FORMAT_E4M3 ? NAME(from_e4m3)((uint8_t)code)
                    : format == FORMAT_E5M2 ? NAME(from_e5m2)((uint8_t)code)
                                            : (float)code;
        uint16_t bits = NAME(to_bf16)(value);
        table[code] = (uint8_t)bits;
        table[128 + code] = (uint8_t)(bits >> 8);
    }
}
#endif

/* One row as words (or, of int8, as it is), zeros behind the last channel up to num_words. */
static void TARGET NAME(row_to_words)(const struct cache *cache, int format, int dtype, const char *row,
                                      const uint16_t *scale, float *words, int num_words) {
    int dim = (int)cache->dim;
#ifdef BF16_DOT
    uint16_t *to = (uint16_t *)words;
    if (format == FORMAT_FLOAT) {
        memcpy(to, row, 2 * dim);
    } else if (format == FORMAT_INT4 && cache->group_size % 32 == 0) {
        NAME(int4_to_bf16)((const uint8_t *)row, scale, dim, (int)cache->group_size, to);
    } else {
        float floats[MAX_DIM + 64];
        NAME(row_to_floats)(cache, format, dtype, row, scale, floats);
        memset(floats + dim, 0, 64 * sizeof(float));
        NAME(store_bf16)(to, floats, 2 * num_words);
    }
    for (int i = dim; i < 2 * num_words; i++) to[i] = 0;
#elif defined(INT16_DOT)
    (void)format, (void)dtype, (void)scale;
    memcpy(words, row, dim);
    memset((char *)words + dim, 0, 2 * num_words - dim);
#else
    NAME(row_to_floats)(cache, format, dtype, row, scale, words);
    memset(words + dim, 0, (num_words - dim) * sizeof(float));
#endif
}
