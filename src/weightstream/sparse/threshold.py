"""The exact threshold above which the wanted number of cells lie, over all pieces of a group: radix selection.

Each pass takes 16 bits of the keys, from the top: every owner counts the keys of its pieces by those bits, the counts are
summed over owners, and all know the bits of the threshold. That is two passes for single elements (32-bit keys) and four
for blocks (64-bit keys), of 512 KiB of counts each, whatever the number of cells. Ties are settled by order of piece, then
by index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightstream.sparse.masks import Bools, Keys

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
Counts = NDArray[np.int64]


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


def ties(keys: Keys, search: Search) -> int:
    """How many keys of a piece equal the threshold that was found."""
    return int(np.count_nonzero(keys == search.prefix))


def shared_ties(per_piece: Sequence[int], search: Search) -> list[int]:
    """How many of its ties each piece keeps, the first pieces first."""
    left, kept = search.wanted, []
    for found in per_piece:
        kept.append(min(found, left))
        left -= kept[-1]
    return kept


def above(keys: Keys, search: Search, kept_ties: int) -> Bools:
    """The keys of a piece that are kept; none may be: only here a piece can be left without non-zeros."""
    chosen: Bools = keys > search.prefix
    chosen[np.flatnonzero(keys == search.prefix)[:kept_ties]] = True
    return chosen
