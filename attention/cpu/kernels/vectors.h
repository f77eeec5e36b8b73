/* Vectors of floats and the few operations on them. Included once per instruction set, with
   NAME(x), TARGET, LANES (floats in a vector) and, where there are bf16 dot products, BF16_DOT defined. */

#define INLINE static inline __attribute__((always_inline)) TARGET
/* What no inner loop calls: copies in its callers would only make the library larger. */
#define RARE TARGET __attribute__((noinline))

typedef float NAME(vf) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(vi) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(LANES * 4)));
typedef float NAME(vf_unaligned) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)

INLINE vf NAME(load)(const void *from) { return *(const NAME(vf_unaligned) *)from; }
INLINE void NAME(store)(void *to, vf x) { *(NAME(vf_unaligned) *)to = x; }
INLINE vf NAME(splat)(const float *x) { return (vf)(*(const int32_alias *)x - (vi){0}); } /* bits: a word may be no float */
INLINE vf NAME(select)(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf NAME(larger)(vf a, vf b) { /* b where either is NaN */
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return NAME(select)(a > b, a, b);
#endif
}
INLINE vi NAME(lane_numbers)(void) {
    vi lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

/* Sums of products are floats; or, of int16 products, integers that travel as the same bits. */
#ifdef INT16_DOT
INLINE vf NAME(add_sums)(vf a, vf b) { return (vf)((vi)a + (vi)b); }
INLINE vf NAME(as_floats)(vf sum) { return __builtin_convertvector((vi)sum, vf); }
#else
INLINE vf NAME(add_sums)(vf a, vf b) { return a + b; }
INLINE vf NAME(as_floats)(vf sum) { return sum; }
#endif

/* (a0, a2, b0, b2) + (a1, a3, b1, b3) in each 128-bit part: half the lanes of two vectors, summed in pairs. */
INLINE vf NAME(pair_sums)(vf a, vf b) {
#if LANES == 16
    return NAME(add_sums)((vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88), (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD));
#elif LANES == 8
    return NAME(add_sums)((vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88), (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD));
#else
    return SHUFFLE4(a, b, 0, 2, 4, 6) + SHUFFLE4(a, b, 1, 3, 5, 7);
#endif
}

/* Lane i of the result is the sum of the lanes of x[i]: LANES sums for LANES - 1 additions. */
INLINE vf NAME(sums_of)(const vf x[LANES]) {
    vf quad[LANES / 4];
    for (int i = 0; i < LANES / 4; i++)
        quad[i] = NAME(pair_sums)(NAME(pair_sums)(x[4 * i], x[4 * i + 1]), NAME(pair_sums)(x[4 * i + 2], x[4 * i + 3]));
#if LANES == 16
#define PARTS(a, b)                                                  \
    NAME(add_sums)((vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88), \
                   (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD))
    vf low = PARTS(quad[0], quad[1]), high = PARTS(quad[2], quad[3]);
    return PARTS(low, high);
#undef PARTS
#elif LANES == 8
    return NAME(add_sums)((vf)_mm256_permute2f128_ps((__m256)quad[0], (__m256)quad[1], 0x20),
                          (vf)_mm256_permute2f128_ps((__m256)quad[0], (__m256)quad[1], 0x31));
#else
    return quad[0];
#endif
}

#if LANES == 16 /* as a tree; gcc makes a chain of the loops */
INLINE float NAME(sum_lanes)(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float NAME(max_lanes)(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE float NAME(sum_lanes)(vf x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
INLINE float NAME(max_lanes)(vf x) {
    float largest = x[0];
    for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}
#endif

/* 2^x for x <= 0 (and a little above): 2^n * 2^f, with a polynomial for 2^f whose largest relative error is as small as its
   degree allows: 2e-7 with all roundings. 0 for -infinity, and below 2^-126 or 2^-150. */
INLINE vf NAME(exp2)(vf x) {
#if LANES == 16
    vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF); /* in [0, 1); 0 of an infinity */
    vf p = f * 1.86713005e-03f + 9.01703071e-03f;
    p = p * f + 5.57999127e-02f;
    p = p * f + 2.40164444e-01f;
    p = p * f + 6.93151295e-01f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x); /* 2^floor(x) times as much */
#else
    vf shifted = x + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
    vf f = x - (shifted - 12582912.0f); /* in [-0.5, 0.5] */
    vf p = f * 1.32647273e-03f + 9.67151299e-03f;
    p = p * f + 5.55073358e-02f;
    p = p * f + 2.40222424e-01f;
    p = p * f + 6.93147004e-01f;
    p = p * f + 1.0f;
    vf y = (vf)((vu)p + ((vu)shifted << 23));
    return (vf)((vi)y & ~(x <= -126.0f)); /* NaN stays NaN */
#endif
}

#define LOG2_E 1.44269504088896341f
INLINE vf NAME(exp)(vf x) { return NAME(exp2)(x * LOG2_E); }

/* Exact for |x| small enough to matter: 1 - 2 / (e^2|x| + 1), with x's sign. */
INLINE vf NAME(tanh)(vf x) {
    vf magnitude = NAME(select)(x < 0.0f, -x, x);
    vf e = NAME(exp)(-2.0f * magnitude);
    vf t = (1.0f - e) / (1.0f + e);
    return NAME(select)(x < 0.0f, -t, t);
}

/* A word is what one 32-bit lane multiplies and adds: a float, a pair of bf16, or a pair of int16. Rows of int8 become pairs
   of int16 as they are loaded: ROW_WORD_BYTES is what a word takes in a row. */
#if defined(BF16_DOT)
#define PER_WORD 2
#define ROW_WORD_BYTES 4
INLINE vf NAME(multiply_add)(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#elif defined(INT16_DOT)
#define PER_WORD 2
#define ROW_WORD_BYTES 2
INLINE vf NAME(multiply_add)(vf sum, vf a, vf b) {
    /* Not the intrinsics: gcc 12 copies every accumulator around them, at a third of the speed with 512 bits. */
#if LANES == 8
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16((__m256i)a, (__m256i)b)));
#else
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
    return sum;
}
#else
#define PER_WORD 1
#define ROW_WORD_BYTES 4
INLINE vf NAME(multiply_add)(vf sum, vf a, vf b) { return sum + a * b; }
#endif

#if PER_WORD == 1
/* Of 2 * LANES bf16 channels of a row, from channel w on, the even ones and the odd ones as floats: one load and one operation
   each, where channels in their order would take a shuffle as well. Who reads rows like this keeps queries and sums alike. */
INLINE void NAME(widen)(const char *row, int w, vf *even, vf *odd) {
    vu both = (vu)NAME(load)(row + 2 * w);
    *even = (vf)(both << 16);
    *odd = (vf)(both & 0xFFFF0000u);
}
#endif

#if PER_WORD == 2
/* The halves of two vectors of pairs, interleaved within 128-bit parts: each word then pairs one channel of a and of b. */
INLINE void NAME(interleave)(vf a, vf b, vf to[2]) {
#if LANES == 16
    to[0] = (vf)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    to[1] = (vf)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#else
    to[0] = (vf)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
    to[1] = (vf)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#endif
}
/* Columns that `interleave` left out of order, as the sums of products with both halves: brought back. */
INLINE void NAME(in_place)(vf a, vf b, vf to[2]) {
#if LANES == 16
    vf low = (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44), high = (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE);
    to[0] = (vf)_mm512_shuffle_f32x4((__m512)low, (__m512)low, 0xD8);
    to[1] = (vf)_mm512_shuffle_f32x4((__m512)high, (__m512)high, 0xD8);
#else
    to[0] = (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
    to[1] = (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
#endif
}
#endif

/* LANES words of a row, from word w on. */
INLINE vf NAME(load_words)(const char *row, int w) {
#ifdef INT16_DOT
#if LANES == 16
    return (vf)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(row + 2 * w)));
#else
    return (vf)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + 2 * w)));
#endif
#else
    return NAME(load)(row + 4 * w);
#endif
}
