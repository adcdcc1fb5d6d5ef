/* Products with blocks that fill vectors. */

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
                        int64_t tile = tile_for(a_padded - r); /* what is left is a multiple of TILE_PART */
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
