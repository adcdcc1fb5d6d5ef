"""Where the non-zeros of blocks are, kept in host memory from one fetch to the next.

What is kept is known by the bytes of the masks that it was made from, which come with every fetch: so it can never belong
to another version than the values that it is used for, whatever was updated, undone, or fetched ahead meanwhile.
"""

import weakref
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np
import torch
import xxhash
from torch import Tensor

from weightstream.sparse.codec import Places, index_type
from weightstream.sparse.kernels import Kernel, held_bytes, prepare
from weightstream.sparse.structure import Structure
from weightstream.store.layout import TensorSpec
from weightstream.store.masks import cells_of, grid_of, places_of

Masked = tuple[TensorSpec, Tensor]
"""A piece, and its mask as it came."""


class KeptPlaces:
    """The places of some blocks' non-zeros, each piece's as its latest mask says; of matrices that kernels multiply by, what
    these ask of them. Pieces and matrices may be asked for at once by several threads, though none by two.

    Args:
        blocks: of which they are kept, as a plan has room for; those of others are found anew at each fetch.
    """

    def __init__(self, blocks: Collection[int] = ()) -> None:
        self.blocks = frozenset(blocks)
        self._kept: dict[tuple[int, str, int], tuple[bytes, Places]] = {}
        self._structures: dict[tuple[int, str], Structure] = {}
        self._latest: dict[tuple[int, str], tuple[bytes, weakref.ref[Structure]]] = {}

    @property
    def nbytes(self) -> int:
        """Host memory that is in use."""
        structures = sum(map(held_bytes, self._structures.values()))
        return sum(places.nbytes for _, places in self._kept.values()) + structures

    def of(self, block: int, spec: TensorSpec, mask: Tensor) -> Places:
        """Where the non-zeros of a piece are.

        Raises:
            DamagedRecordError: the mask's bytes are none.
        """
        if block not in self.blocks:
            return places_of(spec, mask)
        key = block, spec.name, spec.row
        known = _known([(spec, mask)])
        kept = self._kept.pop(key, None)
        if kept is None or kept[0] != known:
            kept = None  # not two of them at once
            kept = known, places_of(spec, mask)
        self._kept[key] = kept
        return kept[1]

    def structure(self, block: int, panels: Sequence[Masked], kernel: Kernel, device: torch.device | str) -> Structure:
        """Where the non-zeros of a matrix are, prepared for a kernel. One that something still needs, such as the way back of
        a product with it, is given again even where none are kept.

        Args:
            panels: of the matrix, from the top down.

        Raises:
            DamagedRecordError: the bytes of a mask are none.
        """
        key = block, panels[0][0].name
        known = _known(panels)
        latest = self._latest.get(key)
        found = latest[1]() if latest is not None and latest[0] == known else None
        if found is None:
            self._structures.pop(key, None)  # not two of them at once
            found = _structure(panels, device)
            prepare(found, kernel)
            self._latest[key] = known, weakref.ref(found)
        if block in self.blocks and held_bytes(found):
            self._structures[key] = found
        return found


def _known(pieces: Sequence[Masked]) -> bytes:
    digest = xxhash.xxh3_128()
    for spec, mask in pieces:
        digest.update(mask.numpy().data)
        digest.update(spec.sparse[0].ones.to_bytes(8, "little"))  # the count, too: it says in which form the bytes are
    return digest.digest()


def _structure(panels: Sequence[Masked], device: torch.device | str) -> Structure:
    grids = [grid_of(spec) for spec, _ in panels]
    block, columns = grids[0].block, grids[0].columns
    firsts = [0, *accumulate(grid.cells for grid in grids)]
    kind = index_type(firsts[-1])
    cells = [
        cells_of(spec, mask).astype(kind, copy=False) + kind(first)
        for (spec, mask), first in zip(panels, firsts, strict=False)
    ]
    shape = sum(grid.rows for grid in grids), columns
    return Structure.at(torch.from_numpy(np.concatenate(cells)), shape, block, device)
