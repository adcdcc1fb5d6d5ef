"""Which pieces of a model are sparse, and how many cells each has at each version: exact integers.

A tensor's density follows from its group's distribution; a piece of it (a panel, or all of it) keeps
`cells - round(sparsity * cells)` cells, halves to the even number, and at least one.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch import nn

from weightstream.blocks import Parameter
from weightstream.errors import ConfigError
from weightstream.sparse.grid import Grid, Shape, matrix_shape
from weightstream.sparse.settings import Sparsity, SparsityGroup

_HEADS = frozenset({"lm_head", "head", "embed_out", "score", "classifier"})


def dense_by_default(model: nn.Module) -> frozenset[str]:
    """Names of parameters that stay dense unless a group says `include_all`: embeddings, norms and the head.

    The head is what `get_output_embeddings` returns, or a module of a usual name (`lm_head`, `head`, …).
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    found: set[str] = set()
    for name, module in model.named_modules():
        kept = isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower()
        if kept or module is output or name.rpartition(".")[2] in _HEADS:
            found.update(names[id(parameter)] for parameter in module.parameters(recurse=False))
    return frozenset(found)


@lru_cache(maxsize=256)
def erdos_renyi(shapes: tuple[Shape, ...], sparsity: float) -> tuple[float, ...]:
    """The density of each tensor, such that together they have the density 1 - `sparsity`.

    Evci et al., "Rigging the Lottery", ICML 2020, section 3 (ERK): densities are ε · Σ dims / Π dims, with the kernel's
    dimensions for convolutions; a tensor that would exceed 1 is dense, and ε is found anew for the others. Each matrix of
    a stack counts by itself.
    """
    dims = [shape[1:] if len(shape) == 3 else shape for shape in shapes]
    raw = [sum(sizes) / prod(sizes) for sizes in dims]
    sizes = [prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        free = [index for index in range(len(shapes)) if index not in dense]
        if not free:
            return (1.0,) * len(shapes)
        budget = (1.0 - sparsity) * sum(sizes) - sum(sizes[index] for index in dense)
        epsilon = budget / sum(raw[index] * sizes[index] for index in free)
        highest = max(raw[index] for index in free)
        if highest * epsilon <= 1.0:
            return tuple(1.0 if index in dense else epsilon * raw[index] for index in range(len(shapes)))
        dense.update(index for index in free if raw[index] == highest)


def kept_cells(cells: int, sparsity: float) -> int:
    """How many of `cells` exist."""
    return max(1, cells - round(sparsity * cells))


@dataclass(frozen=True, slots=True)
class SparsePiece:
    """A whole tensor, or a panel of one, with a mask of its own.

    `family` are the whole shapes of all tensors of its group, in order, and `member` which of them it is cut from.
    `given_count` are its cells where the settings do not say how many, as far as that is known and stays so.
    """

    parameter: Parameter
    group: SparsityGroup
    grid: Grid
    family: tuple[Shape, ...]
    member: int
    given_count: int | None = None

    @property
    def first_cell(self) -> int:
        """The number of its first cell in the whole tensor."""
        return self.parameter.row * (self.parameter.numel // self.parameter.shape[0]) // self.grid.cell_elements

    def count(self, version: int) -> int | None:
        """How many cells exist in `version`; None where the settings do not say: after version 0 as many as before, unless a
        search over all pieces of the group tells otherwise."""
        if not self.group.sparse_at(version):
            return self.grid.cells
        if self.given_count is not None or self.group.masks_given:
            return self.given_count
        sparsity = self.group.sparsity_at(version)
        if sparsity == 0.0:
            return self.grid.cells
        if self.group.searched:
            return None
        if self.group.distribution == "erdos_renyi":
            return kept_cells(self.grid.cells, 1.0 - erdos_renyi(self.family, sparsity)[self.member])
        return kept_cells(self.grid.cells, sparsity)

    def nonzeros(self, version: int) -> int | None:
        """How many elements exist in `version`."""
        count = self.count(version)
        return None if count is None else count * self.grid.cell_elements


def global_count(pieces: Collection[SparsePiece], version: int) -> int:
    """How many cells the pieces of one group have together in `version`, where its distribution is `global`: each has at
    least one."""
    cells, group = sum(piece.grid.cells for piece in pieces), next(iter(pieces)).group
    if not group.sparse_at(version):
        return cells
    return max(len(pieces), kept_cells(cells, group.sparsity_at(version)))


def sparse_pieces(
    sparsity: Sparsity,
    pieces: Iterable[Parameter],
    *,
    dense: Collection[str] = (),
    given_counts: Mapping[str, int] | None = None,
) -> tuple[SparsePiece, ...]:
    """The pieces that have masks, in the order of `pieces`.

    Args:
        pieces: whole tensors and panels, as `blocks.cut` leaves them.
        dense: names that only a group with `include_all` takes (`dense_by_default`).
        given_counts: cells where the settings do not say how many, by the pieces' own names (`str(parameter)`).

    Raises:
        ConfigError: a group that matches nothing, blocks that do not divide a piece.
    """
    chosen: list[tuple[Parameter, SparsityGroup]] = []
    matched: set[int] = set()
    for piece in pieces:
        group = sparsity.group_of(piece.name)
        if group is None or not piece.trainable or len(piece.shape) < 2 or min(piece.shape) == 0:
            continue
        if piece.name in dense and not group.include_all:
            continue
        matched.add(id(group))
        if group.sparsity != 0.0 or group.masks_given:
            chosen.append((piece, group))
    for group in sparsity.groups:
        if id(group) not in matched:
            raise ConfigError(
                f"sparsity group {', '.join(group.patterns)}: matches no trainable matrix that an earlier group left; "
                "embeddings, norms and the head stay dense unless include_all is true; correct or remove its patterns"
            )
    families: dict[int, dict[str, Shape]] = {}
    for piece, group in chosen:
        whole = piece.shape if piece.rows is None else (piece.rows, *piece.shape[1:])
        families.setdefault(id(group), {})[piece.name] = whole
    for number, family in families.items():  # in order of name: that of pieces changes with the blocks of a model
        families[number] = dict(sorted(family.items()))
    return tuple(_sparse_piece(piece, group, families[id(group)], given_counts or {}) for piece, group in chosen)


def _sparse_piece(
    piece: Parameter, group: SparsityGroup, family: Mapping[str, Shape], given_counts: Mapping[str, int]
) -> SparsePiece:
    grid = Grid.of(piece.shape, group.block, name=str(piece))
    given = None if group.counted else given_counts.get(str(piece))
    _aligned(piece, grid)
    return SparsePiece(piece, group, grid, tuple(family.values()), list(family).index(piece.name), given)


def _aligned(piece: Parameter, grid: Grid) -> None:
    """A panel begins where a row of blocks does."""
    rows_each = matrix_shape(piece.shape)[0] // piece.shape[0]
    if piece.row * rows_each % grid.block[0]:
        raise ConfigError(
            f"sparsity of {str(piece)!r}: blocks of {grid.block[0]} rows do not divide the panel's first row "
            f"{piece.row}; give a lower block, or engine.panel_elements that does not cut this tensor"
        )
