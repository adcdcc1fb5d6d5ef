"""How many cells each piece of a group keeps if the largest of all of them are kept: an exact threshold, by radix selection.

Each pass takes 16 bits of the keys, from the top: every owner counts the keys of its pieces by those bits, the counts are
summed over owners, and all know the bits of the threshold. That is two passes for single elements (32-bit keys) and four
for blocks (64-bit keys), of 65,536 counts each, whatever the number of cells, and a last one that counts what each piece
has above it. Ties are settled by order of piece, then by index. Integers only: so it does not matter who owns what.

A piece keeps at least its largest cell, whatever the threshold: a layer without any weight would cut the model in two
(Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightstream.sparse.masks import Keys

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
Counts = NDArray[np.int64]

Own = Callable[[], Iterable[tuple[int, Keys]]]
"""The pieces of a group that are owned here, by number, and the keys of their cells; the same each time it is called."""

Gather = Callable[[Any], list[Any]]
"""A JSON value of every owner."""


def kept_counts(pieces: int, wanted: int, bits: int, own: Own, gather: Gather) -> list[int]:
    """How many cells each of a group's pieces keeps, if together they keep `wanted`: those of largest keys, and at least
    one of every piece. Every owner calls it.

    Args:
        wanted: at least the number of pieces and at most that of all keys.
        bits: of a key.
    """
    search = Search(bits, wanted)
    while not search.done:
        counts = np.zeros(_DIGITS, np.int64)
        for _, keys in own():
            counts += search.counts(_raised(keys))
        search = search.narrowed(np.sum([np.asarray(each, np.int64) for each in gather(counts.tolist())], axis=0))
    places = [[number, *_places(_raised(keys), search)] for number, keys in own()]
    found = sorted(place for each in gather(places) for place in each)
    assert [number for number, _, _ in found] == list(range(pieces)), "every piece is owned by one"
    ties = shared_ties([equal for _, _, equal in found], search)
    return [above + kept for (_, above, _), kept in zip(found, ties, strict=True)]


@dataclass(frozen=True, slots=True)
class Search:
    """How far it is: the top `known` of `bits` bits of the threshold are `prefix`, and `wanted` keys are still to be
    taken from those that begin so."""

    bits: int
    wanted: int
    known: int = 0
    prefix: int = 0

    @property
    def done(self) -> bool:
        return self.known == self.bits

    def counts(self, keys: Keys) -> Counts:
        """Of the keys that begin like the threshold, how many have each value of the next 16 bits."""
        shift = self.bits - self.known - _DIGIT_BITS
        if self.known:
            keys = keys[keys >> keys.dtype.type(shift + _DIGIT_BITS) == self.prefix]
        digits = (keys >> keys.dtype.type(shift)) & keys.dtype.type(_DIGITS - 1)
        return np.bincount(digits.astype(np.intp), minlength=_DIGITS)

    def narrowed(self, counts: Counts) -> "Search":
        """The search after a pass whose counts over all pieces are these; the largest keys are taken."""
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, self.wanted))
        taken = int(above[place - 1]) if place else 0
        prefix = (self.prefix << _DIGIT_BITS) | (_DIGITS - 1 - place)
        return Search(self.bits, self.wanted - taken, self.known + _DIGIT_BITS, prefix)


def shared_ties(per_piece: Sequence[int], search: Search) -> list[int]:
    """How many of its ties each piece keeps, the first pieces first."""
    left, kept = search.wanted, []
    for found in per_piece:
        kept.append(min(found, left))
        left -= kept[-1]
    return kept


def _places(keys: Keys, search: Search) -> tuple[int, int]:
    """How many keys of a piece lie above the threshold that was found, and how many equal it."""
    return int(np.count_nonzero(keys > search.prefix)), int(np.count_nonzero(keys == search.prefix))


def _raised(keys: Keys) -> Keys:
    """The keys of a piece with the largest of them, the first of equal ones, above those of all pieces."""
    raised = keys.copy()
    raised[np.argmax(keys)] = np.iinfo(keys.dtype).max
    return raised
