/* Vectors of fp32 values as wide as the processor has them, and bf16 values in them. */
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two bf16 values in 32 bits: the first one has to be the lower half"
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE 12 /* times two vectors of sums, two of weights and one of tokens: 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define TILE 6 /* 16 registers */
#elif defined(__aarch64__)
#define LANES 4
#define TILE 12
#else
#define LANES 4
#define TILE 6
#endif
#define TILE_PART (TILE / 3)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

#ifdef __clang__
#define SHUFFLE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define SHUFFLE(one, other, ...) __builtin_shuffle(one, other, (vi){__VA_ARGS__})
#endif

#if LANES == 16
#define LOW(one, other) SHUFFLE(one, other, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(one, other) SHUFFLE(one, other, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOG_LANES 4
#elif LANES == 8
#define LOW(one, other) SHUFFLE(one, other, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(one, other) SHUFFLE(one, other, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOG_LANES 3
#else
#define LOW(one, other) SHUFFLE(one, other, 0, 4, 1, 5)
#define HIGH(one, other) SHUFFLE(one, other, 2, 6, 3, 7)
#define LOG_LANES 2
#endif

INLINE vf load(const void *from) {
    vf found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE void store(void *to, vf one) { memcpy(to, &one, sizeof one); }

INLINE vf all(float one) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(one);
#elif defined(__AVX__)
    return (vf)_mm256_set1_ps(one);
#else
    vf found;
    UNROLLED for (int lane = 0; lane < LANES; lane++) found[lane] = one;
    return found;
#endif
}

/* Said explicitly, so that no compiler fuses here and not there. */
INLINE vf times_plus(vf one, vf other, vf sum) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)one, (__m512)other, (__m512)sum);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)one, (__m256)other, (__m256)sum);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)one, (float32x4_t)other);
#else
    return one * other + sum; /* -ffp-contract=off: rounded twice, everywhere */
#endif
}

/* Units of 32 bits hold one fp32 value or, where there are dot products of them, two bf16 values of consecutive terms. */
#ifdef __AVX512BF16__
#define PAIRS 1
INLINE vf dot_plus(vf one, vf other, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)(vi)one, (__m512bh)(__m512i)(vi)other);
}
#else
#define PAIRS 0
#define dot_plus times_plus
#endif

INLINE vf plus(int pairs, vf one, vf other, vf sum) {
    return pairs ? dot_plus(one, other, sum) : times_plus(one, other, sum);
}

INLINE float widened(uint16_t one) {
    uint32_t bits = (uint32_t)one << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

INLINE vf load_bf16(const uint16_t *from) {
    vh narrow;
    memcpy(&narrow, from, sizeof narrow);
    return (vf)(__builtin_convertvector(narrow, vu) << 16);
}

/* To the nearest, ties to even; what is no number stays none. */
INLINE vh narrowed(vf one) {
    vu bits = (vu)one;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu none = (vu)(one != one);
    return __builtin_convertvector((none & 0x7fc0) | (~none & rounded), vh);
}

/* A vector of results to `count` places of fp32 or bf16. */
INLINE void put(void *to, int64_t at, vf one, int64_t count, int bf16) {
    if (bf16) {
        vh narrow = narrowed(one);
        uint16_t *place = (uint16_t *)to + at;
        if (count >= LANES) memcpy(place, &narrow, sizeof narrow);
        else
            for (int64_t lane = 0; lane < count; lane++) place[lane] = narrow[lane];
    } else {
        float *place = (float *)to + at;
        if (count >= LANES) memcpy(place, &one, sizeof one);
        else
            for (int64_t lane = 0; lane < count; lane++) place[lane] = one[lane];
    }
}

/* LANES x LANES units: interleaving rows i and i + LANES/2 transposes them after as many turns as LANES has bits. */
INLINE void transpose(vf rows[LANES]) {
    UNROLLED for (int turn = 0; turn < LOG_LANES; turn++) {
        vf next[LANES];
        UNROLLED for (int row = 0; row < LANES / 2; row++) {
            next[2 * row] = LOW(rows[row], rows[row + LANES / 2]);
            next[2 * row + 1] = HIGH(rows[row], rows[row + LANES / 2]);
        }
        UNROLLED for (int row = 0; row < LANES; row++) rows[row] = next[row];
    }
}

/* The sum over the lanes of each of LANES vectors, in the order of these. */
INLINE vf summed(vf rows[LANES]) {
    UNROLLED for (int half = LANES / 2; half; half /= 2)
        UNROLLED for (int row = 0; row < half; row++)
            rows[row] = LOW(rows[row], rows[row + half]) + HIGH(rows[row], rows[row + half]);
    return rows[0];
}
