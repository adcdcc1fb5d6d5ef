"""Masks of pieces: which cells exist, chosen at random, by magnitude, or given.

Whatever is chosen is chosen by integer keys, and of equal keys the lower index wins; so the choice does not depend on
threads, on the library's way to sort, or on the machine.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.sparse.grid import Grid

Bools = NDArray[np.bool_]
Keys = NDArray[np.uint32] | NDArray[np.uint64]

_WORDS = 4  # 64-bit words of one Philox block


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Which cells of a piece exist: one bool for each, in order. Nobody changes `cells`."""

    grid: Grid
    cells: Bools

    @staticmethod
    def full(grid: Grid) -> "Mask":
        return Mask(grid, np.ones(grid.cells, np.bool_))

    @property
    def count(self) -> int:
        """Cells that exist."""
        return int(np.count_nonzero(self.cells))

    @property
    def nonzeros(self) -> int:
        """Elements that exist."""
        return self.count * self.grid.cell_elements

    def segments(self) -> Bools:
        """One bool for each `block[1]` consecutive elements of the dense tensor; they exist together."""
        height, across = self.grid.block[0], self.grid.across
        if height == 1:
            return self.cells
        return np.repeat(self.cells.reshape(-1, across), height, axis=0).reshape(-1)

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """One bool for each element, in a tensor of the piece's `shape`."""
        return torch.from_numpy(np.repeat(self.segments(), self.grid.block[1])).view(shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.grid == other.grid and bool((self.cells == other.cells).all())

    __hash__ = None  # type: ignore[assignment]


def smallest(keys: Keys, count: int) -> Bools:
    """The `count` smallest keys; of equal ones those of lower index."""
    return _chosen(keys, count, smallest=True)


def largest(keys: Keys, count: int) -> Bools:
    """The `count` largest keys; of equal ones those of lower index."""
    return _chosen(keys, count, smallest=False)


def _chosen(keys: Keys, count: int, *, smallest: bool) -> Bools:
    if not 0 <= count <= keys.size:
        raise AssertionError(f"{count} of {keys.size} keys")
    if count in (0, keys.size):
        return np.full(keys.size, count > 0)
    rank = count - 1 if smallest else keys.size - count
    edge = np.partition(keys, rank)[rank]
    chosen: Bools = keys < edge if smallest else keys > edge
    # The edge itself is one value, whatever the order in which the rest was left: so ties are settled by index.
    ties = np.flatnonzero(keys == edge)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def random_keys(seed: int, name: str, step: int, start: int, count: int) -> NDArray[np.uint64]:
    """Random words of the cells [start, start + count) of a parameter: the same however they are asked for.

    Philox 4x64 with ten rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), its counter the
    cell's number, its key the SHA-256 of seed, name and step.
    """
    digest = hashlib.sha256(f"weightstream sparse masks\0{seed}\0{name}\0{step}".encode()).digest()
    block, skipped = divmod(start, _WORDS)
    philox = np.random.Philox(counter=block, key=int.from_bytes(digest[:16], "little"))
    words = philox.random_raw(-(-(skipped + count) // _WORDS) * _WORDS)
    return np.asarray(words, dtype=np.uint64)[skipped : skipped + count]


def magnitude_keys(grid: Grid, dense: Tensor) -> Keys:
    """Integers in the order of magnitude of the cells of a dense fp32 piece.

    A single element's is the bit pattern of its absolute value. A block's is that of the sum of its absolute values, as
    in the average pooling of Zhu and Gupta's own implementation (`model_pruning`, block_pooling_function), summed in
    fp64, first down its columns and then along them, so that the order of the sum is fixed.
    """
    array = dense.detach().reshape(grid.rows, grid.columns).numpy()
    if grid.block == (1, 1):
        return magnitude_bits(array)
    height, width = grid.block
    blocks = array.reshape(-1, height, grid.columns)
    sums = np.abs(blocks[:, 0], dtype=np.float64)
    for row in range(1, height):
        sums += np.abs(blocks[:, row])
    columns = sums.reshape(-1, grid.across, width)
    totals = columns[:, :, 0].copy()
    for column in range(1, width):
        totals += columns[:, :, column]
    keys: NDArray[np.uint64] = totals.reshape(-1).view(np.uint64)
    return keys


def relative(grid: Grid, dense: Tensor) -> Tensor:
    """|dense| divided by the norm of its row and by that of its column, where neither is zero: fp32, rows × columns.

    But for a factor of the whole piece what Adafactor estimates each element's size from (Shazeer and Stern, "Adafactor:
    Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, section 3). Squares are summed in fp64, line by line,
    so that the order of the sums is fixed.
    """
    size = np.abs(dense.detach().reshape(grid.rows, grid.columns).numpy(), dtype=np.float64)
    squares = np.square(size)
    columns = np.sqrt(np.add.reduce(squares, axis=0))
    rows = np.sqrt(np.add.reduce(np.ascontiguousarray(squares.T), axis=0))
    del squares
    size /= np.where(rows > 0, rows, 1.0)[:, np.newaxis]
    size /= np.where(columns > 0, columns, 1.0)
    return torch.from_numpy(size.astype(np.float32))


def magnitude_bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bit patterns of |values|, which are in the values' order; NaN is above all."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)


def random_mask(grid: Grid, count: int, *, seed: int, name: str, step: int = 0, first_cell: int = 0) -> Mask:
    """`count` cells of equal chance. A panel's cells are numbered from `first_cell` on."""
    return Mask(grid, smallest(random_keys(seed, name, step, first_cell, grid.cells), count))


def magnitude_mask(grid: Grid, count: int, dense: Tensor) -> Mask:
    """The `count` cells of largest magnitude of a dense fp32 piece."""
    return Mask(grid, largest(magnitude_keys(grid, dense), count))


def some_and_every(grid: Grid, dense: Tensor) -> tuple[Bools, Bools]:
    """Of which cells any element is set in a dense bool tensor of the piece's shape, and of which all are: two dimensions."""
    height, width = grid.block
    blocks = dense.detach().reshape(grid.rows // height, height, grid.across, width).numpy()
    return np.ascontiguousarray(blocks.any(axis=(1, 3))), np.ascontiguousarray(blocks.all(axis=(1, 3)))


def given_mask(grid: Grid, mask: Tensor, shape: tuple[int, ...], *, name: str) -> Mask:
    """The mask that a tensor of the piece's `shape` holds: what is not zero exists.

    Raises:
        ConfigError: another shape, a mask without any cell, or blocks that are kept in part.
    """
    if tuple(mask.shape) != shape:
        raise ConfigError(
            f"mask of {name!r}: expected shape {shape}, found {tuple(mask.shape)}; give masks of the same model"
        )
    height, width = grid.block
    some, every = some_and_every(grid, mask != 0)
    if (some != every).any():
        row, column = (int(place[0]) for place in np.nonzero(some != every))
        raise ConfigError(
            f"mask of {name!r}: the {height}×{width} block in block row {row}, block column {column} is kept in part; "
            "expected whole blocks; give a mask made for them, or block: [1, 1]"
        )
    if not some.any():
        raise ConfigError(f"mask of {name!r}: expected at least one element that exists, found none; leave it out")
    return Mask(grid, some.reshape(-1))
