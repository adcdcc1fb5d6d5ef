/* Products with single elements. */

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
