"""How many cells each piece of a group keeps where that is decided over all of them: `distribution: global`.

The decision falls before any record of the step is updated, by the weights that the step began with; so there is one point
at which every owner of records has all that it needs, and from then on the counts are known to all ranks, as others are.
They need not be kept: a step that is done again finds them again, and records say how many cells they have.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from weightstream.masking.masking import Key, Masking
from weightstream.sparse.algorithms import existing_keys
from weightstream.sparse.masks import Keys, Mask
from weightstream.sparse.pieces import SparsePiece, global_count
from weightstream.sparse.threshold import Gather, Own, kept_counts
from weightstream.store.layout import MASK
from weightstream.store.masks import mask_of
from weightstream.store.owned import Holding
from weightstream.store.segments import RecordBuffer


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
            counts |= counts_of(pieces, step, partial(_keys, masking, holding, pieces, wait), gather)
    masking.take(step, counts)


def _due(masking: Masking, holding: Holding, pieces: Sequence[SparsePiece], step: int) -> bool:
    """Whether pieces have more cells than they are to have together after a step: a function of what all ranks know."""
    if pieces[0].count(step) is not None:
        return False
    numbers = numbers_of(pieces)
    now = sum(
        masking.cells(piece, holding.sparsity[unit])
        for unit, found in masking.of_unit.items()
        for piece in found
        if (piece.parameter.name, piece.parameter.row) in numbers
    )
    return global_count(pieces, step) < now


def counts_of(pieces: Sequence[SparsePiece], step: int, own: Own, gather: Gather) -> dict[Key, int]:
    """How many cells each piece of a group keeps after a step; see `sparse.threshold.kept_counts`."""
    bits = 32 if pieces[0].grid.block == (1, 1) else 64  # of `magnitude_keys`
    found = kept_counts(len(pieces), global_count(pieces, step), bits, own, gather)
    return dict(zip(numbers_of(pieces), found, strict=True))


def _keys(
    masking: Masking, holding: Holding, pieces: Sequence[SparsePiece], wait: Callable[["Future[Any]"], Any]
) -> Iterator[tuple[int, Keys]]:
    """The keys of the cells that exist, of the pieces whose records are owned here: record by record, masters alone."""
    store, numbers = holding.store, numbers_of(pieces)
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


def numbers_of(pieces: Iterable[SparsePiece]) -> dict[Key, int]:
    """The place of each piece in its group."""
    return {(piece.parameter.name, piece.parameter.row): place for place, piece in enumerate(pieces)}
