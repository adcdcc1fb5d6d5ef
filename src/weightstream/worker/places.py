"""Where the non-zeros of blocks are, kept in host memory from one fetch to the next.

What is kept is known by the bytes of the mask that it was made from, which come with every fetch: so it can never belong to
another version than the values that it is used for, whatever was updated, undone, or fetched ahead meanwhile.
"""

from collections.abc import Collection

import xxhash
from torch import Tensor

from weightstream.sparse.codec import Places
from weightstream.store.layout import TensorSpec
from weightstream.store.masks import places_of


class KeptPlaces:
    """The places of some blocks' non-zeros, each piece's as its latest mask says. Pieces may be asked for at once by
    several threads, though none by two.

    Args:
        blocks: of which they are kept, as a plan has room for; those of others are found anew at each fetch.
    """

    def __init__(self, blocks: Collection[int] = ()) -> None:
        self.blocks = frozenset(blocks)
        self._kept: dict[tuple[int, str, int], tuple[bytes, Places]] = {}

    @property
    def nbytes(self) -> int:
        """Host memory that is in use."""
        return sum(places.nbytes for _, places in self._kept.values())

    def of(self, block: int, spec: TensorSpec, mask: Tensor) -> Places:
        """Where the non-zeros of a piece are.

        Raises:
            DamagedRecordError: the mask's bytes are none.
        """
        if block not in self.blocks:
            return places_of(spec, mask)
        key = block, spec.name, spec.row
        # the count too: it says in which form the bytes are
        known = xxhash.xxh3_128_digest(mask.numpy().data) + spec.sparse[0].ones.to_bytes(8, "little")
        kept = self._kept.pop(key, None)
        if kept is None or kept[0] != known:
            kept = None  # not two of them at once
            kept = known, places_of(spec, mask)
        self._kept[key] = kept
        return kept[1]
