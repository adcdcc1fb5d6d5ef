"""How many cells each piece of a group keeps where that is decided over all of them: `distribution: global`.

The decision falls before any record of the step is updated, by the weights that the step began with; so there is one point
at which every owner of records has all that it needs, and from then on the counts are known to all ranks, as others are.
They need not be kept: a step that is done again finds them again, and records say how many cells they have.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.masking import Key, Masking, read_mask
from weightstream.sparse.algorithms import existing_keys, initial_mask
from weightstream.sparse.masks import Keys, Mask, magnitude_keys, some_and_every
from weightstream.sparse.pieces import SparsePiece, global_count
from weightstream.sparse.threshold import Gather, Own, kept_counts
from weightstream.store.layout import MASK, TensorSpec
from weightstream.store.masks import mask_of
from weightstream.store.owned import Holding
from weightstream.store.segments import RecordBuffer

Values = Callable[[Collection[str]], Iterator[tuple[TensorSpec, Tensor]]]
"""By names of parameters: the dense values of their pieces."""


class FirstMasks:
    """The masks of version 0 that follow from a store's first values or from files, as `store.given.fill` asks for them.

    Args:
        values: the first values; asked for a few times where masks are searched for.
    """

    def __init__(self, masking: Masking, values: Values) -> None:
        self._masking, self._values, self._searched = masking, values, False
        self._unlike = Counter(piece.group.patterns for piece in masking.pieces.values() if piece.group.init == "zeros")
        """By group, how many of its pieces have not been seen while none had a zero."""

    def __call__(self, spec: TensorSpec, values: Tensor) -> Tensor | None:
        piece = self._masking.pieces.get((spec.name, spec.row))
        if piece is None:
            return None
        if piece.group.given is not None:
            return read_mask(piece.group.given, piece.parameter, piece.grid.block).dense(piece.parameter.shape)
        if piece.group.init == "zeros":
            return self._nonzeros(piece, values)
        if piece.count(0) is None and not self._searched:
            self._search()
        found = self._masking.found(piece, 0)
        return initial_mask(piece, values, seed=self._masking.seed, found=found).dense(piece.parameter.shape)

    def _nonzeros(self, piece: SparsePiece, values: Tensor) -> Tensor:
        """Where a masked checkpoint has weights; of a piece that has none its first cell."""
        some, _ = some_and_every(piece.grid, values != 0)
        cells = some.reshape(-1)
        if not cells.any():
            cells[0] = True
        patterns = piece.group.patterns
        if not cells.all():
            self._unlike.pop(patterns, None)
        elif patterns in self._unlike:
            self._unlike[patterns] -= 1
            if not self._unlike[patterns]:
                raise ConfigError(
                    f"sparsity group {', '.join(patterns)}: init: expected given weights of which some are zero, found none "
                    "that is; give the weights of a masked model, or init: magnitude to prune these"
                )
        return Mask(piece.grid, cells).dense(piece.parameter.shape)

    def _search(self) -> None:
        def own(pieces: Sequence[SparsePiece]) -> Iterator[tuple[int, Keys]]:
            number = _numbers(pieces)
            for spec, values in self._values({piece.parameter.name for piece in pieces}):
                place = number[spec.name, spec.row]
                yield place, magnitude_keys(pieces[place].grid, values)

        counts: dict[Key, int] = {}
        for pieces in self._masking.searched:
            if pieces[0].count(0) is None:
                counts |= _counts(pieces, 0, partial(own, pieces), lambda value: [value])
        self._masking.take(0, counts)
        self._searched = True


def apportion(
    masking: Masking,
    holding: Holding,
    step: int,
    gather: Gather,
    wait: Callable[["Future[Any]"], Any],
) -> None:
    """Finds the counts that pieces have after a step, where a schedule has come to a search. Every rank calls it, while all
    records are as the step before left them.

    Args:
        gather: a JSON value of every rank.
        wait: for bytes.
    """
    counts: dict[Key, int] = {}
    for pieces in masking.searched:
        if _due(masking, holding, pieces, step):
            counts |= _counts(pieces, step, partial(_keys, masking, holding, pieces, wait), gather)
    masking.take(step, counts)


def _due(masking: Masking, holding: Holding, pieces: Sequence[SparsePiece], step: int) -> bool:
    """Whether pieces have more cells than they are to have together after a step: a function of what all ranks know."""
    if pieces[0].count(step) is not None:
        return False
    numbers = _numbers(pieces)
    now = sum(
        masking.cells(piece, holding.sparsity[unit])
        for unit, found in masking.of_unit.items()
        for piece in found
        if (piece.parameter.name, piece.parameter.row) in numbers
    )
    return global_count(pieces, step) < now


def _counts(pieces: Sequence[SparsePiece], step: int, own: Own, gather: Gather) -> dict[Key, int]:
    bits = 32 if pieces[0].grid.block == (1, 1) else 64  # of `magnitude_keys`
    found = kept_counts(len(pieces), global_count(pieces, step), bits, own, gather)
    return dict(zip(_numbers(pieces), found, strict=True))


def _keys(
    masking: Masking, holding: Holding, pieces: Sequence[SparsePiece], wait: Callable[["Future[Any]"], Any]
) -> Iterator[tuple[int, Keys]]:
    """The keys of the cells that exist, of the pieces whose records are owned here: record by record, masters alone."""
    store, numbers = holding.store, _numbers(pieces)
    units = {
        unit: own
        for unit in sorted(holding.owned & masking.of_unit.keys())
        if (own := [p for p in masking.of_unit[unit] if (p.parameter.name, p.parameter.row) in numbers])
    }
    buffer = RecordBuffer(max((store.layout(unit).image_nbytes for unit in units), default=0))
    try:
        for unit, own in units.items():
            layout = store.layout(unit)
            wait(store.load(unit, buffer, [part for part in ("param", MASK) if layout.has(part)]))
            masters, masks = buffer.tensors("param"), buffer.tensors(MASK) if layout.has(MASK) else {}
            for piece in own:
                name, spec = piece.parameter.name, layout.spec(MASK, piece.parameter.name)
                mask = Mask.full(piece.grid) if spec is None else mask_of(spec, masks[name])
                yield numbers[name, piece.parameter.row], existing_keys(mask, masters[name].view(mask.nonzeros, 1))
    finally:
        buffer.close()


def _numbers(pieces: Iterable[SparsePiece]) -> dict[Key, int]:
    """The place of each piece in its group."""
    return {(piece.parameter.name, piece.parameter.row): place for place, piece in enumerate(pieces)}
