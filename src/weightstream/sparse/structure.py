"""Where the non-zeros of a matrix are, prepared once per mask for products with it.

Values lie in row-major order of their dense positions, whatever the pattern. So the values of one row of blocks, k blocks
of a×b, are a dense a × k·b matrix already: products read them where they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.sparse.codec import Indices, index_type

Block = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """Rows of blocks (or columns of them) that hold equally many blocks.

    `others` are the block columns (or block rows) of each line's blocks, ascending; `places` where those blocks lie
    among all, in the order of `Structure.by_row`.
    """

    lines: Tensor  # (n,)
    others: Tensor  # (n, k)
    places: Tensor  # (n, k)


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """Non-zeros by row, as `torch.sparse_csr_tensor` and `torch.sparse_bsr_tensor` take them; `order` takes blocks from
    the order of `Structure.by_row` (for elements: from the values' own order) to this one."""

    starts: Tensor  # (rows + 1,)
    columns: Tensor  # (count,)
    order: Tensor  # (count,)


class Structure:
    """The blocks of a (rows × columns) matrix that are there; elements are blocks of 1×1.

    It is known by its blocks row by row: `row_starts` (rows / a + 1,), and `columns` (count,), the block columns, ascending
    within each row. `prepared` is for what a kernel finds out about it once.

    Args:
        kept: which blocks are there, bool, (rows / a) × (columns / b).
        block: a×b.
        device: where products are computed.

    Raises:
        ConfigError: `kept` is no matrix of bool.
    """

    def __init__(self, kept: Tensor, block: Block, device: torch.device | str = "cpu") -> None:
        if kept.dim() != 2 or kept.dtype != torch.bool or min(block) < 1:
            raise ConfigError(
                f"mask of blocks {block[0]}×{block[1]}: expected one bool per block in two dimensions, found {kept.dtype} "
                f"of shape {tuple(kept.shape)}; give `mask.view(rows // {block[0]}, -1)` as bool"
            )
        self._found_at(np.flatnonzero(kept.cpu().numpy()), (kept.shape[0], kept.shape[1]), block, device)

    @classmethod
    def at(cls, positions: Tensor, shape: tuple[int, int], block: Block, device: torch.device | str = "cpu") -> Self:
        """From ascending numbers of the blocks that are there, counted row by row.

        Raises:
            ConfigError: the blocks do not divide the shape, or a number is outside.
        """
        grid = (shape[0] // block[0], shape[1] // block[1])
        if (grid[0] * block[0], grid[1] * block[1]) != shape:
            raise ConfigError(f"blocks of {block[0]}×{block[1]} do not divide a matrix of {shape[0]}×{shape[1]}")
        total = grid[0] * grid[1]
        numbers = positions.cpu().numpy()
        if numbers.size and not 0 <= numbers[0] <= numbers[-1] < total:
            found = f"{numbers[0]} to {numbers[-1]}"
            raise ConfigError(f"mask of {total} blocks: expected numbers of 0 to {total - 1}, found {found}")
        one = cls.__new__(cls)
        one._found_at(numbers, grid, block, device)
        return one

    def _found_at(self, numbers: Indices, grid: tuple[int, int], block: Block, device: torch.device | str) -> None:
        """From ascending numbers of blocks; by one thread, whatever thread that is."""
        self.block, self.device = block, torch.device(device)
        self.shape = (grid[0] * block[0], grid[1] * block[1])
        self._grid, self.count = grid, numbers.size
        numbers = numbers.astype(index_type(grid[0] * grid[1]), copy=False)
        firsts = np.arange(grid[0] + 1, dtype=numbers.dtype) * grid[1]
        starts = np.searchsorted(numbers, firsts)
        columns = numbers - np.repeat(firsts[:-1], np.diff(starts))
        self.row_starts = torch.from_numpy(starts.astype(index_type(self.count), copy=False))
        self.columns = torch.from_numpy(columns.astype(index_type(grid[1]), copy=False))
        self.prepared: dict[str, Any] = {}

    def __str__(self) -> str:
        (rows, columns), (a, b) = self.shape, self.block
        return f"{rows}×{columns} with {self.count} blocks of {a}×{b}"

    @cached_property
    def _where(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the blocks, row-major, each (count,)."""
        counts = self.row_starts.diff()
        return torch.arange(self._grid[0]).repeat_interleave(counts), self.columns.long()

    @property
    def _row(self) -> Tensor:
        return self._where[0]

    @property
    def _column(self) -> Tensor:
        return self._where[1]

    @property
    def nnz(self) -> int:
        """Values."""
        return self.count * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def row_values(self) -> list[int]:
        """How many values each row of blocks has."""
        counts: list[int] = torch.bincount(self._row, minlength=self._grid[0]).tolist()
        return [self.block[0] * self.block[1] * count for count in counts]

    @cached_property
    def fills_rows(self) -> bool:
        """Whether every row has a non-zero."""
        return bool((self.row_starts.diff() > 0).all())

    @cached_property
    def fills_columns(self) -> bool:
        """Whether every column has one."""
        found = np.zeros(self._grid[1], dtype=np.bool_)
        found[self.columns.numpy()] = True
        return bool(found.all())

    @cached_property
    def by_row(self) -> tuple[Lines, ...]:
        """Rows of blocks that are not empty, those with fewest blocks first; blocks are numbered in this order."""
        return self._grouped(self._row, self._column, self._grid[0], torch.arange(self.count), renumber=True)

    @cached_property
    def row_order(self) -> list[int]:
        """The rows of `by_row`, one after another."""
        return [row for group in self.by_row for row in group.lines.tolist()]

    @cached_property
    def by_column(self) -> tuple[Lines, ...]:
        """Columns of blocks that are not empty, and their blocks from the top down."""
        order = self._columns_first
        return self._grouped(self._column[order], self._row[order], self._grid[1], self._numbers[order], renumber=False)

    @cached_property
    def _numbers(self) -> Tensor:
        """The number that a block has in `by_row`, in row-major order of the blocks."""
        numbers = torch.empty(self.count, dtype=torch.long)
        starts = torch.cat(
            [torch.zeros(1, dtype=torch.long), torch.bincount(self._row, minlength=self._grid[0]).cumsum(0)]
        )
        for group in self.by_row:
            first = starts[group.lines.cpu()]
            numbers[first[:, None] + torch.arange(group.others.shape[1])] = group.places.cpu()
        return numbers

    @cached_property
    def _columns_first(self) -> Tensor:
        return torch.argsort(self._column * max(1, self._grid[0]) + self._row)

    def _grouped(
        self, line: Tensor, other: Tensor, lines: int, numbers: Tensor, *, renumber: bool
    ) -> tuple[Lines, ...]:
        """`line` ascends; `other` ascends within each line."""
        counts = torch.bincount(line, minlength=lines)
        starts = counts.cumsum(0) - counts
        groups, before = [], 0
        for count in counts.unique().tolist():
            if count == 0:
                continue
            chosen = (counts == count).nonzero().view(-1)
            at = starts[chosen][:, None] + torch.arange(count)
            places = before + torch.arange(at.numel()).view(at.shape) if renumber else numbers[at]
            before += at.numel()
            groups.append(Lines(*(one.to(self.device) for one in (chosen, other[at], places))))
        return tuple(groups)

    @cached_property
    def rows_compressed(self) -> Compressed:
        """The matrix itself."""
        order = torch.arange(self.count) if self.block == (1, 1) else self._numbers
        return self._compressed(self._row, self._column, self._grid[0], order)

    @cached_property
    def columns_compressed(self) -> Compressed:
        """The transposed matrix."""
        order = self._columns_first
        numbers = order if self.block == (1, 1) else self._numbers[order]
        return self._compressed(self._column[order], self._row[order], self._grid[1], numbers)

    def _compressed(self, line: Tensor, other: Tensor, lines: int, order: Tensor) -> Compressed:
        starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(line, minlength=lines).cumsum(0)])
        # MKL takes 32-bit indices as they are, and copies others
        return Compressed(
            starts.to(self.device, torch.int32), other.to(self.device, torch.int32), order.to(self.device)
        )

    @cached_property
    def elements(self) -> "Structure":
        """The same non-zeros, as blocks of 1×1."""
        if self.block == (1, 1):
            return self
        return Structure(self.mask(), (1, 1), self.device)

    def kept(self) -> Tensor:
        """One bool per block, in two dimensions, on the CPU."""
        kept = torch.zeros(self._grid, dtype=torch.bool)
        kept[self._where] = True
        return kept

    def mask(self) -> Tensor:
        """One bool per element, of the dense shape, on the CPU."""
        return self.kept().repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)


def portions(total: int, at_once: int) -> Sequence[slice]:
    """`total` lines, so many at once."""
    bounds = [*range(0, total, max(1, at_once)), total]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


__all__ = ["Block", "Compressed", "Lines", "Structure", "portions"]
