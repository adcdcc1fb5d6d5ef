/* W by rows and by columns; shares of work, and memory to work in. */
#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* The single elements of W by rows (starts, columns) from its blocks of height x width by rows. */
void ws_elements(
    const int32_t *block_starts, const int32_t *block_columns, int64_t grid_rows, int64_t height, int64_t width,
    int32_t *row_starts, int32_t *columns
) {
    int64_t entry = 0;
    row_starts[0] = 0;
    for (int64_t i = 0; i < grid_rows; i++)
        for (int64_t r = 0; r < height; r++) {
            for (int32_t at = block_starts[i]; at < block_starts[i + 1]; at++)
                for (int64_t c = 0; c < width; c++) columns[entry++] = (int32_t)(block_columns[at] * width + c);
            row_starts[i * height + r + 1] = (int32_t)entry;
        }
}

/* W by columns (starts, rows, numbers) from W by rows (starts, columns).
 *
 * Returns 0, or 1 if there was no memory. */
int ws_turned(
    const int32_t *row_starts, const int32_t *columns, int64_t all_rows, int64_t all_columns, int32_t *column_starts,
    int32_t *rows, int32_t *numbers
) {
    int32_t *next = calloc((size_t)(all_columns + 1), sizeof *next); /* of a column: at first how many, then where */
    if (!next) return 1;
    for (int32_t at = 0; at < row_starts[all_rows]; at++) next[columns[at]]++;
    int32_t start = 0;
    for (int64_t column = 0; column < all_columns; column++) {
        int32_t count = next[column];
        column_starts[column] = next[column] = start;
        start += count;
    }
    column_starts[all_columns] = start;
    for (int64_t row = 0; row < all_rows; row++)
        for (int32_t at = row_starts[row]; at < row_starts[row + 1]; at++) {
            int32_t to = next[columns[at]]++;
            rows[to] = (int32_t)row;
            numbers[to] = at;
        }
    free(next);
    return 0;
}


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
