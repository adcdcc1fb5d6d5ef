"""The cells of a tensor: what is zero or not as a whole, single elements or blocks of a×b."""

from dataclasses import dataclass
from math import prod

from weightstream.errors import ConfigError

Shape = tuple[int, ...]


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """A tensor as rows and columns, in memory's own order.

    Three dimensions are a stack of matrices (the experts of a layer); four or more are a convolution, whose rows are its
    output channels.
    """
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Grid:
    """`rows` × `columns` elements in blocks of `block`; cells are numbered row by row."""

    rows: int
    columns: int
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def of(shape: Shape, block: tuple[int, int] = (1, 1), *, name: str = "tensor") -> "Grid":
        """The grid of a piece of `shape`.

        Raises:
            ConfigError: fewer than two dimensions, or blocks that do not divide the piece.
        """
        if len(shape) < 2 or not prod(shape):
            raise ConfigError(
                f"sparsity of {name!r}: expected a matrix, found shape {shape}; leave it dense by a pattern that does "
                "not match it"
            )
        rows, columns = matrix_shape(shape)
        height = shape[1] if len(shape) == 3 else rows  # a block does not reach into the next matrix of a stack
        if height % block[0] or columns % block[1]:
            raise ConfigError(
                f"sparsity of {name!r}: blocks of {block[0]}×{block[1]} do not divide {height}×{columns}; give a block "
                "that does, or block: [1, 1] for single elements"
            )
        return Grid(rows, columns, block)

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def cell_elements(self) -> int:
        return self.block[0] * self.block[1]

    @property
    def cells(self) -> int:
        return self.elements // self.cell_elements

    @property
    def across(self) -> int:
        """Cells side by side."""
        return self.columns // self.block[1]
