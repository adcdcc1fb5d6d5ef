/* Products of tokens with the non-zeros of a matrix W: y = x W^T, the gradient of x, and that of W at its non-zeros.
 *
 * Compiled on the machine that runs it (compiling.py). Two ways:
 *
 *   blocks     outputs (of W's gradient: columns of a block) lie in the lanes of vectors, and a tile of tokens (rows of a
 *              block) times two vectors is summed in registers; weights are packed once per call, tokens panel by panel.
 *   elements   tokens lie in the lanes: a panel of tokens is transposed so that it fits a core's L2, and each non-zero is
 *              one scalar times a few vectors. For single elements, and for blocks that are smaller than a vector.
 *
 * Matrices are row-major. Values lie in row-major order of their dense positions. `starts`, `others` and `numbers` are W by
 * lines: of line l the entries starts[l] .. starts[l + 1], ascending, each the column (row) `others` of a block and the
 * number that the block has in row-major order. All sums are fp32, rounded once.
 *
 * Order of sums. Every element of a result is summed by one thread, and in an order that depends on shapes only: that of
 * `blocks`, and of `elements` but for W's gradient, is ascending, a fused multiply-add for each term (where the compiler has
 * bf16 dot products, for each two). W's gradient by `elements` is summed by lanes in panels of tokens, over these lanes as a
 * tree, and over panels in ascending order.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

/* Vectors */

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

/* Lines */

/* W by rows (starts, columns) and by columns (starts, rows, numbers) from which blocks of its grid there are: one byte for
 * each, 0 or 1. Blocks of height x width, larger than 1 x 1, become the single elements that they consist of.
 *
 * Returns 0, or 1 if there was no memory. */
int ws_lines(
    const uint8_t *kept, int64_t grid_rows, int64_t grid_columns, int64_t height, int64_t width, int32_t *row_starts,
    int32_t *columns, int32_t *column_starts, int32_t *rows, int32_t *numbers
) {
    int64_t all_columns = grid_columns * width;
    int32_t *found = malloc(sizeof *found * (size_t)(grid_columns + 1));
    int32_t *next = calloc((size_t)(all_columns + 1), sizeof *next); /* of a column: at first how many, then where */
    if (!found || !next) {
        free(found), free(next);
        return 1;
    }
    int64_t entry = 0;
    row_starts[0] = 0;
    for (int64_t i = 0; i < grid_rows; i++) {
        int64_t count = 0;
        for (int64_t j = 0; j < grid_columns; j++) { /* without a branch that is guessed wrong */
            found[count] = (int32_t)j;
            count += kept[i * grid_columns + j];
        }
        for (int64_t r = 0; r < height; r++) {
            for (int64_t one = 0; one < count; one++)
                for (int64_t c = found[one] * width; c < (found[one] + 1) * width; c++) columns[entry++] = (int32_t)c, next[c]++;
            row_starts[i * height + r + 1] = (int32_t)entry;
        }
    }
    int32_t start = 0;
    for (int64_t column = 0; column < all_columns; column++) {
        int32_t count = next[column];
        column_starts[column] = next[column] = start;
        start += count;
    }
    column_starts[all_columns] = start;
    for (int64_t row = 0; row < grid_rows * height; row++)
        for (int32_t at = row_starts[row]; at < row_starts[row + 1]; at++) {
            int32_t to = next[columns[at]]++;
            rows[to] = (int32_t)row;
            numbers[to] = at;
        }
    free(found), free(next);
    return 0;
}

/* Shares of work */

INLINE int64_t share(int64_t total, int part, int parts) { return total * part / parts; }
INLINE int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }
INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }
INLINE int64_t larger(int64_t one, int64_t other) { return one > other ? one : other; }

/* The first line that has an entry of number `entry` or a later one. */
static int64_t line_of(const int32_t *starts, int64_t lines, int64_t entry) {
    int64_t low = 0, high = lines;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (starts[middle + 1] > entry) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void *room(int64_t bytes) { return aligned_alloc(64, (size_t)rounded_up(larger(bytes, 1), 64)); }

typedef struct {
    int64_t tokens_from, tokens_to, lines_from, lines_to;
} Part;

/* One thread's tokens, whole steps of them, all lines; where there are more threads than steps, some of the lines too. */
static Part part_of(
    int thread, int threads, int64_t tokens, int64_t step, const int32_t *starts, int64_t lines, int64_t line_step
) {
    int64_t steps = (tokens + step - 1) / step;
    int groups = (int)larger(1, smaller(threads, steps)), splits = threads / groups;
    int group = thread / splits, split = thread % splits;
    Part part = {0, 0, 0, lines};
    if (group >= groups) return part;
    part.tokens_from = share(steps, group, groups) * step;
    part.tokens_to = smaller(tokens, share(steps, group + 1, groups) * step);
    if (splits > 1) {
        int64_t weight = starts[lines] + lines; /* empty lines are written too */
        int64_t bounds[2];
        for (int side = 0; side < 2; side++) {
            int64_t wanted = share(weight, split + side, splits), low = 0, high = lines;
            while (low < high) {
                int64_t middle = (low + high) / 2;
                if (starts[middle] + middle >= wanted) high = middle;
                else low = middle + 1;
            }
            bounds[side] = split + side == splits ? lines : low / line_step * line_step;
        }
        part.lines_from = bounds[0], part.lines_to = bounds[1];
    }
    return part;
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* Blocks */

#define SPAN 16 /* units of a token that lie together: a cache line */
#define PANEL_BYTES (512 << 10) /* tokens that are packed at once, by each thread */
#define CHUNK_BYTES (512 << 10) /* the same of both factors of W's gradient, by all threads */

/* sums[m][v] += a[m * a_row + s * a_step] * b[s * b_step + v * LANES ..], over steps s in ascending order. */
INLINE void multiply_add(
    int tile, int vectors, int pairs, vf sums[TILE][2],
    const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t steps
) {
    for (int64_t step = 0; step < steps; step++) {
        vf right[2];
        UNROLLED for (int v = 0; v < vectors; v++) right[v] = load(b + step * b_step + v * LANES);
        UNROLLED for (int m = 0; m < tile; m++) {
            vf left = all(a[m * a_row + step * a_step]);
            UNROLLED for (int v = 0; v < vectors; v++) sums[m][v] = plus(pairs, left, right[v], sums[m][v]);
        }
    }
}

/* `name_of[rows of the tile][vectors][pairs]`: functions of their own, so that registers are for the sums alone. */
#define VARIANT(name, label, tile, vectors, pairs, parameters, ...) \
    static __attribute__((noinline)) void name##_##label##_##vectors##_##pairs parameters { \
        name(tile, vectors, PAIRS && pairs, __VA_ARGS__); \
    }
#define VARIANTS(name, label, tile, ...) \
    VARIANT(name, label, tile, 1, 0, __VA_ARGS__) \
    VARIANT(name, label, tile, 2, 0, __VA_ARGS__) \
    VARIANT(name, label, tile, 1, 1, __VA_ARGS__) \
    VARIANT(name, label, tile, 2, 1, __VA_ARGS__)
#define TABLE_ROW(name, label) \
    {{name##_##label##_1_0, name##_##label##_1_1}, {name##_##label##_2_0, name##_##label##_2_1}}
#define TABLE(name, parameters, ...) \
    VARIANTS(name, third, TILE_PART, parameters, __VA_ARGS__) \
    VARIANTS(name, thirds, 2 * TILE_PART, parameters, __VA_ARGS__) \
    VARIANTS(name, whole, TILE, parameters, __VA_ARGS__) \
    static void(*const name##_of[3][2][2]) parameters = { \
        TABLE_ROW(name, third), TABLE_ROW(name, thirds), TABLE_ROW(name, whole) \
    };

INLINE int64_t tile_for(int64_t left) {
    return left > 2 * TILE_PART ? TILE : left > TILE_PART ? 2 * TILE_PART : TILE_PART;
}

/* Rows of units to columns of them: to[c * to_row + r] = from[r][c], widened if they are bf16. */
static void pack_transposed(
    float *to, int64_t to_row, const void *from, int64_t from_row, int64_t rows, int64_t columns, int widen
) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            if (r + LANES <= rows && c + LANES <= columns) {
                vf square[LANES];
                UNROLLED for (int row = 0; row < LANES; row++) {
                    int64_t at = (r + row) * from_row + c;
                    square[row] = widen ? load_bf16((const uint16_t *)from + at) : load((const float *)from + at);
                }
                transpose(square);
                UNROLLED for (int row = 0; row < LANES; row++) store(to + (c + row) * to_row + r, square[row]);
                continue;
            }
            for (int64_t row = r; row < smaller(rows, r + LANES); row++)
                for (int64_t column = c; column < smaller(columns, c + LANES); column++) {
                    int64_t at = row * from_row + column;
                    if (widen) to[column * to_row + row] = widened(((const uint16_t *)from)[at]);
                    else memcpy(to + column * to_row + row, (const float *)from + at, 4);
                }
        }
}

/* One row of values to units. */
INLINE void pack_row(float *to, const void *from, int64_t count, int bf16) {
    if (!bf16) {
        memcpy(to, from, 4 * (size_t)count);
        return;
    }
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, load_bf16((const uint16_t *)from + at));
    for (; at < count; at++) to[at] = widened(((const uint16_t *)from)[at]);
}

/* Two rows of bf16 values to pairs. */
INLINE void pack_pairs(float *to, const uint16_t *first, const uint16_t *second, int64_t count) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        vh one, other;
        memcpy(&one, first + at, sizeof one);
        memcpy(&other, second + at, sizeof other);
        store(to + at, (vf)(__builtin_convertvector(one, vu) | __builtin_convertvector(other, vu) << 16));
    }
    for (; at < count; at++) {
        uint32_t both = first[at] | (uint32_t)second[at] << 16;
        memcpy(to + at, &both, 4);
    }
}

typedef struct {
    int bf16, pairs, forward;
    int64_t tokens, lines, others_count, inner, outer; /* a block takes `inner` terms to `outer` results of a line */
    int64_t steps, padded; /* of units: of a block's terms; of a line's results */
    int64_t spans;         /* of a block's terms, each of SPAN units of a token */
    int64_t a, b;
    const int32_t *row_starts, *starts, *others;
    const int32_t *numbers;
    const void *values, *in;
    int64_t in_row;
    void *out;
} Product;

/* A block's weights as (steps x padded) units. */
static void pack_block(const Product *p, int64_t line, int64_t entry, float *to) {
    int64_t row = p->forward ? line : p->others[entry];
    int64_t first = p->row_starts[row], width = (p->row_starts[row + 1] - first) * p->b;
    int64_t at = first * p->a * p->b + ((p->numbers ? p->numbers[entry] : entry) - first) * p->b;
    const uint16_t *narrow = (const uint16_t *)p->values + at;
    const void *from = p->bf16 ? (const void *)narrow : (const void *)((const float *)p->values + at);
    if (p->padded != p->outer) memset(to, 0, 4 * (size_t)(p->steps * p->padded));
    if (p->forward) {
        if (!p->pairs) {
            pack_transposed(to, p->padded, from, width, p->outer, p->inner, p->bf16);
            return;
        }
        float units[LANES]; /* rows of an odd number of pairs are no rows of units */
        for (int64_t r = 0; r < p->outer; r++)
            for (int64_t s = 0; s < p->steps; s += LANES) {
                int64_t count = smaller(LANES, p->steps - s);
                memcpy(units, narrow + r * width + 2 * s, 4 * (size_t)count);
                for (int64_t one = 0; one < count; one++) to[(s + one) * p->padded + r] = units[one];
            }
        return;
    }
    for (int64_t s = 0; s < p->steps; s++) {
        float *unit = to + s * p->padded;
        if (p->pairs) pack_pairs(unit, narrow + 2 * s * width, narrow + (2 * s + 1) * width, p->outer);
        else if (p->bf16) pack_row(unit, narrow + s * width, p->outer, 1);
        else pack_row(unit, (const float *)from + s * width, p->outer, 0);
    }
}

/* Tokens to [tile][block][span][TILE][SPAN]: the rows of a tile lie at constant distances, each in a cache line of its own.
 * Tokens that are none are zero. */
static void pack_tokens(const Product *p, int64_t from, int64_t to, float *panel) {
    int64_t tile_units = p->others_count * p->spans * TILE * SPAN;
    for (int64_t token = from; token < rounded_up(to - from, TILE) + from; token++) {
        float *unit = panel + (token - from) / TILE * tile_units + (token - from) % TILE * SPAN;
        for (int64_t block = 0; block < p->others_count; block++)
            for (int64_t step = 0; step < p->steps; step += SPAN, unit += TILE * SPAN) {
                int64_t count = smaller(SPAN, p->steps - step), at = token * p->in_row + block * p->inner + step;
                if (token >= to) memset(unit, 0, 4 * (size_t)count);
                else if (p->pairs) memcpy(unit, (const uint16_t *)p->in + at + step, 4 * (size_t)count);
                else if (p->bf16) pack_row(unit, (const uint16_t *)p->in + at, count, 1);
                else pack_row(unit, (const float *)p->in + at, count, 0);
            }
    }
}

/* A tile of tokens times one or two vectors of a line's results. */
INLINE void product_tile(
    int tile, int vectors, int pairs, const Product *p, int64_t line, int64_t result, const float *weights,
    const float *panel, int64_t token, int64_t valid
) {
    int64_t width = p->lines * p->outer, at = token * width + line * p->outer + result;
    UNROLLED for (int m = 0; m < tile; m++) {
        if (m < valid) __builtin_prefetch((const char *)p->out + (at + m * width) * (p->bf16 ? 2 : 4), 1, 2);
    }
    vf sums[TILE][2];
    UNROLLED for (int m = 0; m < tile; m++)
        UNROLLED for (int v = 0; v < vectors; v++) sums[m][v] = all(0);
    for (int64_t entry = p->starts[line]; entry < p->starts[line + 1]; entry++)
        for (int64_t span = 0; span < p->spans; span++)
            multiply_add(
                tile, vectors, pairs, sums, panel + (p->others[entry] * p->spans + span) * TILE * SPAN, SPAN, 1,
                weights + (entry * p->steps + span * SPAN) * p->padded + result, p->padded,
                smaller(SPAN, p->steps - span * SPAN)
            );
    UNROLLED for (int m = 0; m < tile; m++) {
        if (m < valid)
            UNROLLED for (int v = 0; v < vectors; v++)
                put(p->out, at + m * width + v * LANES, sums[m][v], p->outer - result - v * LANES, p->bf16);
    }
}

TABLE(
    product_tile,
    (const Product *p, int64_t line, int64_t result, const float *weights, const float *panel, int64_t token, int64_t valid),
    p, line, result, weights, panel, token, valid
)

static void product_part(const Product *p, Part part, const float *weights, float *panel, int64_t panel_tokens) {
    int64_t tile_units = p->others_count * p->spans * TILE * SPAN;
    for (int64_t from = part.tokens_from; from < part.tokens_to; from += panel_tokens) {
        int64_t to = smaller(part.tokens_to, from + panel_tokens);
        pack_tokens(p, from, to, panel);
        for (int64_t line = part.lines_from; line < part.lines_to; line++)
            for (int64_t result = 0; result < p->padded; result += 2 * LANES) {
                const float *tile_panel = panel;
                for (int64_t token = from; token < to; token += TILE, tile_panel += tile_units) {
                    int64_t valid = smaller(TILE, to - token), rows = tile_for(valid);
                    product_tile_of[rows / TILE_PART - 1][result + 2 * LANES <= p->padded][p->pairs](
                        p, line, result, weights, tile_panel, token, valid
                    );
                }
            }
    }
}

/* y (forward) or the gradient of x from y's, `in`, (tokens x grid_columns * b) or (tokens x grid_rows * a).
 *
 * Returns 0, or 1 if there was no memory. */
int ws_blocks_product(
    int bf16, int forward, int64_t tokens, const void *in, int64_t in_row, void *out, const void *values,
    int64_t grid_rows, int64_t grid_columns, int64_t a, int64_t b, const int32_t *row_starts, const int32_t *starts,
    const int32_t *others, const int32_t *numbers, int threads
) {
    int pairs = PAIRS && bf16 && a % 2 == 0 && b % 2 == 0, failed = 0;
    int64_t inner = forward ? b : a, outer = forward ? a : b;
    int64_t steps = pairs ? inner / 2 : inner, padded = rounded_up(outer, LANES);
    Product p = {
        bf16, pairs, forward, tokens, forward ? grid_rows : grid_columns, forward ? grid_columns : grid_rows, inner, outer,
        steps, padded, (steps + SPAN - 1) / SPAN, a, b, row_starts, starts, others, numbers, values, in, in_row, out,
    };
    int64_t entries = starts[p.lines], token_bytes = 4 * p.others_count * p.spans * SPAN;
    int64_t panel_tokens = larger(1, PANEL_BYTES / (TILE * larger(1, token_bytes))) * TILE;
    float *weights = room(4 * entries * steps * padded);
    if (!weights) return 1;
#pragma omp parallel num_threads(threads)
    {
        int thread = thread_number(), count = thread_count();
        int64_t entry = share(entries, thread, count), last = share(entries, thread + 1, count);
        for (int64_t line = line_of(starts, p.lines, entry); entry < last; entry++) {
            while (entry >= starts[line + 1]) line++;
            pack_block(&p, line, entry, weights + entry * steps * padded);
        }
        Part part = part_of(thread, count, tokens, TILE, starts, p.lines, 1);
        int64_t most = rounded_up(smaller(panel_tokens, part.tokens_to - part.tokens_from), TILE);
        float *panel = room(most * token_bytes);
#pragma omp barrier
        if (!panel) {
#pragma omp atomic write
            failed = 1;
        } else {
            product_part(&p, part, weights, panel, panel_tokens);
        }
        free(panel);
    }
    free(weights);
    return failed;
}

/* One factor of W's gradient as [block][term][padded]: of a chunk of tokens those of some blocks. */
static void pack_terms(
    int bf16, int pairs, const void *in, int64_t in_row, int64_t size, int64_t padded, int64_t from, int64_t to, int64_t terms,
    int64_t block, float *packed
) {
    for (int64_t term = 0; term < terms; term++) {
        float *unit = packed + (block * terms + term) * padded;
        int64_t token = from + (pairs ? 2 * term : term), at = token * in_row + block * size;
        if (padded != size) memset(unit + size, 0, 4 * (size_t)(padded - size));
        if (pairs) {
            const uint16_t *first = (const uint16_t *)in + at;
            if (token + 1 < to) pack_pairs(unit, first, first + in_row, size);
            else
                for (int64_t one = 0; one < size; one++) {
                    uint32_t both = first[one]; /* and a term of zero */
                    memcpy(unit + one, &both, 4);
                }
        } else if (bf16) {
            pack_row(unit, (const uint16_t *)in + at, size, 1);
        } else {
            pack_row(unit, (const float *)in + at, size, 0);
        }
    }
}

INLINE void gradient_tile(
    int tile, int vectors, int pairs, float *sums_at, int64_t b_padded, const float *left, int64_t a_padded,
    const float *right, int64_t terms
) {
    vf sums[TILE][2];
    UNROLLED for (int m = 0; m < tile; m++)
        UNROLLED for (int v = 0; v < vectors; v++) sums[m][v] = load(sums_at + m * b_padded + v * LANES);
    multiply_add(tile, vectors, pairs, sums, left, 1, a_padded, right, b_padded, terms);
    UNROLLED for (int m = 0; m < tile; m++)
        UNROLLED for (int v = 0; v < vectors; v++) store(sums_at + m * b_padded + v * LANES, sums[m][v]);
}

TABLE(
    gradient_tile,
    (float *sums_at, int64_t b_padded, const float *left, int64_t a_padded, const float *right, int64_t terms),
    sums_at, b_padded, left, a_padded, right, terms
)

/* The gradient of W at its non-zeros, from that of y and from x; `starts` and `columns` are W by rows.
 *
 * Returns 0, or 1 if there was no memory. */
int ws_blocks_gradient(
    int bf16, int64_t tokens, const void *grad, int64_t grad_row, const void *x, int64_t x_row, void *out, int64_t grid_rows,
    int64_t grid_columns, int64_t a, int64_t b, const int32_t *starts, const int32_t *columns, int threads
) {
    int pairs = PAIRS && bf16;
    int64_t a_padded = rounded_up(a, TILE_PART), b_padded = rounded_up(b, LANES), entries = starts[grid_rows];
    int64_t term_bytes = 4 * larger(1, grid_rows * a_padded + grid_columns * b_padded);
    int64_t terms_at_once = smaller(256, larger(32, CHUNK_BYTES / term_bytes / 16 * 16));
    int64_t chunk = pairs ? 2 * terms_at_once : terms_at_once;
    int64_t block_units = a_padded * b_padded;
    if (!entries) return 0;
    float *sums = room(4 * entries * block_units);
    int64_t left_units = terms_at_once * grid_rows * a_padded, right_units = terms_at_once * grid_columns * b_padded;
    float *lefts = room(2 * 4 * left_units), *rights = room(2 * 4 * right_units); /* while one is read the next is packed */
    int failed = !sums || !lefts || !rights;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            int thread = thread_number(), count = thread_count();
            int64_t first = share(entries, thread, count), last = share(entries, thread + 1, count);
            int64_t first_row = line_of(starts, grid_rows, first);
            float *left = lefts, *right = rights;
            memset(sums + first * block_units, 0, 4 * (size_t)((last - first) * block_units));
            for (int64_t from = 0; from < tokens; from += chunk) {
                int64_t to = smaller(tokens, from + chunk), terms = pairs ? (to - from + 1) / 2 : to - from;
                for (int64_t i = share(grid_rows, thread, count); i < share(grid_rows, thread + 1, count); i++)
                    pack_terms(bf16, pairs, grad, grad_row, a, a_padded, from, to, terms, i, left);
                for (int64_t j = share(grid_columns, thread, count); j < share(grid_columns, thread + 1, count); j++)
                    pack_terms(bf16, pairs, x, x_row, b, b_padded, from, to, terms, j, right);
#pragma omp barrier
                int64_t row = first_row;
                for (int64_t entry = first; entry < last; entry++) {
                    while (entry >= starts[row + 1]) row++;
                    const float *g = left + row * terms * a_padded, *h = right + columns[entry] * terms * b_padded;
                    for (int64_t r = 0; r < a_padded;) {
                        int64_t tile = tile_for(a_padded - r);
                        if (tile > a_padded - r) tile = a_padded - r; /* a multiple of TILE_PART */
                        for (int64_t c = 0; c < b_padded; c += 2 * LANES)
                            gradient_tile_of[tile / TILE_PART - 1][c + 2 * LANES <= b_padded][pairs](
                                sums + entry * block_units + r * b_padded + c, b_padded, g + r, a_padded, h + c, terms
                            );
                        r += tile;
                    }
                }
                left = left == lefts ? lefts + left_units : lefts;
                right = right == rights ? rights + right_units : rights;
            }
            int64_t row = first_row;
            for (int64_t entry = first; entry < last; entry++) {
                while (entry >= starts[row + 1]) row++;
                int64_t width = (starts[row + 1] - starts[row]) * b;
                int64_t at = (int64_t)starts[row] * a * b + (entry - starts[row]) * b;
                for (int64_t r = 0; r < a; r++)
                    for (int64_t c = 0; c < b; c += LANES)
                        put(out, at + r * width + c, load(sums + entry * block_units + r * b_padded + c), b - c, bf16);
            }
        }
    }
    free(sums);
    free(lefts);
    free(rights);
    return failed;
}

/* Elements */

#define WIDE 4 /* vectors of tokens at once */
#define WIDE_BYTES (1 << 20) /* of a panel; beyond, half as many tokens */

/* Some tokens (at most `vectors` * LANES) as columns: panel[c][vector]. Where values are bf16, lane p of unit vector v holds
 * tokens 2 v LANES + p and (2 v + 1) LANES + p. */
static void turn_tokens(
    int bf16, const void *in, int64_t in_row, int64_t from, int64_t to, int64_t columns_from, int64_t columns_to, int vectors,
    float *panel
) {
    int64_t units = bf16 ? vectors / 2 : vectors, step = bf16 ? 2 * LANES : LANES, size = bf16 ? 2 : 4;
    for (int64_t c = columns_from; c < columns_to; c += step)
        for (int64_t v = 0; v < vectors; v += bf16 ? 2 : 1) {
            vf squares[2][LANES];
            int64_t count = smaller(step, columns_to - c);
            for (int side = 0; side < (bf16 ? 2 : 1); side++) {
                for (int row = 0; row < LANES; row++) {
                    int64_t token = from + (v + side) * LANES + row;
                    const char *at = (const char *)in + (token * in_row + c) * size;
                    if (token >= to) squares[side][row] = all(0);
                    else if (count == step) squares[side][row] = load(at);
                    else {
                        float units_left[LANES] = {0};
                        memcpy(units_left, at, (size_t)(count * size));
                        squares[side][row] = load(units_left);
                    }
                }
                transpose(squares[side]);
            }
            for (int64_t one = 0; one < count; one++) {
                float *unit = panel + ((c + one) * units + (bf16 ? v / 2 : v)) * LANES;
                if (!bf16) {
                    store(unit, squares[0][one]);
                    continue;
                }
                vu low = (vu)squares[0][one / 2], high = (vu)squares[1][one / 2];
                store(unit, one % 2 ? (vf)(low >> 16 | (high & 0xffff0000u)) : (vf)((low & 0xffffu) | high << 16));
            }
        }
}

/* One line's results of a panel of tokens. */
INLINE void element_sums(
    int vectors, int bf16, const float *panel, const int32_t *others, const float *weights, int64_t count, vf sums[WIDE]
) {
    UNROLLED for (int v = 0; v < vectors; v++) sums[v] = all(0);
    for (int64_t entry = 0; entry < count; entry++) {
        vf weight = all(weights[entry]);
        if (bf16) {
            const float *at = panel + (int64_t)others[entry] * (vectors / 2) * LANES;
            UNROLLED for (int v = 0; v < vectors / 2; v++) {
                vu both = (vu)load(at + v * LANES);
                sums[2 * v] = times_plus(weight, (vf)(both << 16), sums[2 * v]);
                sums[2 * v + 1] = times_plus(weight, (vf)(both & 0xffff0000u), sums[2 * v + 1]);
            }
        } else {
            const float *at = panel + (int64_t)others[entry] * vectors * LANES;
            UNROLLED for (int v = 0; v < vectors; v++) sums[v] = times_plus(weight, load(at + v * LANES), sums[v]);
        }
    }
}

static void element_lines(
    int vectors, int bf16, const float *panel, const int32_t *starts, const int32_t *others, const float *weights,
    int64_t lines, int64_t first, int64_t last, int64_t from, int64_t to, void *out
) {
    for (int64_t line = first; line < last; line += LANES) {
        vf squares[WIDE][LANES];
        int64_t count = smaller(LANES, last - line);
        for (int64_t row = 0; row < LANES; row++) {
            vf sums[WIDE] = {all(0), all(0), all(0), all(0)};
            if (row < count) {
                int64_t start = starts[line + row], own = starts[line + row + 1] - start;
#define SUMS(number, narrow) element_sums(number, narrow, panel, others + start, weights + start, own, sums)
                if (bf16) {
                    if (vectors == 4) SUMS(4, 1);
                    else SUMS(2, 1);
                } else if (vectors == 4) SUMS(4, 0);
                else if (vectors == 3) SUMS(3, 0);
                else if (vectors == 2) SUMS(2, 0);
                else SUMS(1, 0);
#undef SUMS
            }
            for (int v = 0; v < vectors; v++) squares[v][row] = sums[v];
        }
        for (int v = 0; v < vectors; v++) {
            transpose(squares[v]);
            for (int64_t lane = 0; lane < smaller(LANES, to - from - v * LANES); lane++)
                put(out, (from + v * LANES + lane) * lines + line, squares[v][lane], count, bf16);
        }
    }
}

INLINE int vectors_for(int64_t tokens, int bf16) {
    int64_t step = bf16 ? 2 * LANES : LANES;
    return (int)(rounded_up(tokens, step) / LANES);
}

/* y or the gradient of x, (tokens x lines), from `in` (tokens x columns); `numbers` take values to the order of entries, or
 * are none where they lie so.
 *
 * Returns 0, or 1 if there was no memory. */
int ws_elements_product(
    int bf16, int64_t tokens, const void *in, int64_t in_row, int64_t columns, void *out, int64_t lines, const void *values,
    const int32_t *starts, const int32_t *others, const int32_t *numbers, int threads
) {
    int64_t entries = starts[lines], size = bf16 ? 2 : 4;
    int64_t panel_tokens = WIDE * LANES * size * columns > WIDE_BYTES ? WIDE / 2 * LANES : WIDE * LANES;
    int failed = 0, as_they_lie = !bf16 && !numbers;
    float *packed = as_they_lie ? NULL : room(4 * entries);
    if (!as_they_lie && !packed) return 1;
    const float *weights = as_they_lie ? values : packed;
#pragma omp parallel num_threads(threads)
    {
        int thread = thread_number(), count = thread_count();
        if (!as_they_lie)
            for (int64_t entry = share(entries, thread, count); entry < share(entries, thread + 1, count); entry++) {
                int64_t at = numbers ? numbers[entry] : entry;
                packed[entry] = bf16 ? widened(((const uint16_t *)values)[at]) : ((const float *)values)[at];
            }
        Part part = part_of(thread, count, tokens, bf16 ? 2 * LANES : LANES, starts, lines, LANES);
        float *panel = room(panel_tokens * columns * size);
#pragma omp barrier
        if (!panel) {
#pragma omp atomic write
            failed = 1;
        } else {
            for (int64_t from = part.tokens_from; from < part.tokens_to; from += panel_tokens) {
                int64_t to = smaller(part.tokens_to, from + panel_tokens);
                int vectors = vectors_for(to - from, bf16);
                turn_tokens(bf16, in, in_row, from, to, 0, columns, vectors, panel);
                element_lines(
                    vectors, bf16, panel, starts, others, weights, lines, part.lines_from, part.lines_to, from, to, out
                );
            }
        }
        free(panel);
    }
    free(packed);
    return failed;
}

/* Some entries of one row: dot products of WIDE vectors of tokens. */
INLINE void element_dots(int bf16, const float *left, const float *panel, const int32_t *others, int64_t count, float *sums) {
    enum { UNITS = WIDE };
    int units = bf16 ? UNITS / 2 : UNITS;
    vf g[UNITS];
    UNROLLED for (int v = 0; v < units; v++) g[v] = load(left + v * LANES);
    for (int64_t entry = 0; entry < count; entry += LANES) {
        vf dots[LANES];
        UNROLLED for (int64_t one = 0; one < LANES; one++) {
            /* beyond the last one nothing is kept */
            const float *at = panel + (int64_t)others[smaller(entry + one, count - 1)] * units * LANES;
            vf sum = all(0);
            UNROLLED for (int v = 0; v < units; v++) {
                vf h = load(at + v * LANES);
                if (!bf16) sum = times_plus(g[v], h, sum);
                else if (PAIRS) sum = dot_plus(g[v], h, sum);
                else {
                    sum = times_plus((vf)((vu)g[v] << 16), (vf)((vu)h << 16), sum);
                    sum = times_plus((vf)((vu)g[v] & 0xffff0000u), (vf)((vu)h & 0xffff0000u), sum);
                }
            }
            dots[one] = sum;
        }
        vf found = summed(dots);
        if (entry + LANES <= count) store(sums + entry, load(sums + entry) + found);
        else
            for (int64_t one = 0; one < count - entry; one++) sums[entry + one] += found[one];
    }
}

/* The gradient of W at its non-zeros, from that of y (tokens x rows) and from x (tokens x columns).
 *
 * Returns 0, or 1 if there was no memory. */
int ws_elements_gradient(
    int bf16, int64_t tokens, const void *grad, int64_t grad_row, const void *x, int64_t x_row, void *out, int64_t rows,
    int64_t columns, const int32_t *starts, const int32_t *others, int threads
) {
    int64_t entries = starts[rows], size = bf16 ? 2 : 4, panel_tokens = WIDE * LANES;
    if (!entries) return 0;
    float *sums = bf16 ? room(4 * entries) : out;
    int64_t units = panel_tokens * size / 4; /* of a row or column */
    float *lefts = room(2 * 4 * units * rows), *rights = room(2 * 4 * units * columns);
    int failed = !sums || !lefts || !rights;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            int thread = thread_number(), count = thread_count();
            int64_t first = share(entries, thread, count), last = share(entries, thread + 1, count);
            int64_t first_row = line_of(starts, rows, first);
            int64_t steps_left = (rows + 31) / 32, steps_right = (columns + 31) / 32;
            float *left = lefts, *right = rights;
            memset(sums + first, 0, 4 * (size_t)(last - first));
            for (int64_t from = 0; from < tokens; from += panel_tokens) {
                int64_t to = smaller(tokens, from + panel_tokens);
                turn_tokens(
                    bf16, grad, grad_row, from, to, 32 * share(steps_left, thread, count),
                    smaller(rows, 32 * share(steps_left, thread + 1, count)), WIDE, left
                );
                turn_tokens(
                    bf16, x, x_row, from, to, 32 * share(steps_right, thread, count),
                    smaller(columns, 32 * share(steps_right, thread + 1, count)), WIDE, right
                );
#pragma omp barrier
                for (int64_t entry = first, row = first_row; entry < last; row++) {
                    int64_t stop = smaller(last, starts[row + 1]);
                    if (bf16) element_dots(1, left + row * units, right, others + entry, stop - entry, sums + entry);
                    else element_dots(0, left + row * units, right, others + entry, stop - entry, sums + entry);
                    entry = stop;
                }
                left = left == lefts ? lefts + units * rows : lefts;
                right = right == rights ? rights + units * columns : rights;
            }
            if (bf16)
                for (int64_t entry = first; entry < last; entry += LANES) {
                    float rest[LANES] = {0};
                    memcpy(rest, sums + entry, 4 * (size_t)smaller(LANES, last - entry));
                    put(out, entry, load(rest), last - entry, 1);
                }
        }
    }
    if (bf16) free(sums);
    free(lefts);
    free(rights);
    return failed;
}
