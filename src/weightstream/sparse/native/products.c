/* Products of tokens with the non-zeros of a matrix W: y = x W^T, the gradient of x, and that of W at its non-zeros.
 *
 * Compiled on the machine that runs it (compiling.py), as one unit. Two ways:
 *
 *   blocks.h    outputs (of W's gradient: columns of a block) lie in the lanes of vectors, and a tile of tokens (rows of a
 *               block) times two vectors is summed in registers; weights are packed once per call, tokens panel by panel.
 *   elements.h  tokens lie in the lanes: a panel of tokens is transposed so that it fits a core's L2, and each non-zero is
 *               one scalar times a few vectors. For single elements, and for blocks that are smaller than a vector.
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
#include "vectors.h"
#include "lines.h"
#include "blocks.h"
#include "elements.h"
