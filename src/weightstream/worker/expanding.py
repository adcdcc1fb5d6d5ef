"""Sparse blocks between the link and the slab: non-zeros and masks land beside it, and are expanded when they are needed.

A block without sparse parameters lands in its slab. Of another one the places of its non-zeros are kept as long as it is
in a slab, so that gradients, which autograd forms densely, are gathered there before they are summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightstream.sparse.codec import Places, decode_mask, expand, gather
from weightstream.sparse.masks import Mask
from weightstream.store.layout import MASK, RecordLayout, TensorSpec
from weightstream.store.masks import grid_of
from weightstream.store.owned import Holding
from weightstream.store.segments import part_tensors
from weightstream.worker.slabs import Slab


@dataclass(frozen=True, slots=True)
class _Panel:
    """The non-zeros of a tensor's elements [`start`, `stop`): those of `places`, or all."""

    row: int
    start: int
    stop: int
    places: Places | None

    @property
    def nonzeros(self) -> int:
        return self.stop - self.start if self.places is None else self.places.nonzeros


class Expansion:
    """Where blocks land, and where their non-zeros are while they are in slabs."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._landed: dict[int, tuple[RecordLayout, ...]] = {}
        self._panels: dict[int, dict[str, list[_Panel]]] = {}

    def landing(self, block: int, slab: Slab) -> memoryview:
        """Where a block that comes to a slab has to land."""
        if not self._holding.is_sparse(block):
            return slab.landing
        self._landed[block] = tuple(self._holding.layout(unit) for unit in self._holding.store.units_of(block))
        return slab.compressed

    def expand(self, block: int, slab: Slab) -> bool:
        """Fills a slab with the block that has landed; whether there was anything to do."""
        layouts = self._landed.pop(block, None)
        if layouts is None:
            return False
        panels: dict[str, list[_Panel]] = {}
        targets = iter(self._holding.slabs[block].pieces)
        start = 0
        for layout in layouts:
            view = slab.compressed[start : start + layout.fetched_nbytes]
            start += layout.fetched_nbytes
            streamed, masks = layout.streamed, dict[str, Tensor]()
            if layout.has(MASK):
                masks = part_tensors(layout.part(MASK), view[streamed.nbytes :])
            values = part_tensors(streamed, view)
            for spec in streamed.tensors:
                target = next(targets)
                assert (target.name, target.row) == (spec.name, spec.row), "a slab has what is streamed, in its order"
                places = None if spec.piece is None else _places(spec, masks)
                _fill(slab, target, values[spec.name], places)
                first = spec.first_element
                stop = first + target.nbytes // target.dtype.itemsize
                panels.setdefault(spec.name, []).append(_Panel(spec.row, first, stop, places))
        self._panels[block] = {
            name: found for name, found in panels.items() if any(panel.places is not None for panel in found)
        }
        return True

    def forget(self, block: int) -> None:
        """The block leaves its slab."""
        self._landed.pop(block, None)
        self._panels.pop(block, None)

    def gathered(self, block: int, name: str, grad: Tensor) -> Tensor:
        """A dense gradient at the non-zeros that are summed, (non-zeros, 1); itself where all of it is."""
        panels = self._panels.get(block, {}).get(name)
        if panels is None:
            return grad
        whole = self._holding.whole
        wanted = [panel if (name, panel.row) not in whole else _whole(panel) for panel in panels]
        if all(panel.places is None for panel in wanted):
            return grad
        flat = grad.contiguous().view(-1)
        out = torch.empty((sum(panel.nonzeros for panel in wanted), 1), dtype=grad.dtype, device=grad.device)
        at = 0
        for panel in wanted:
            part, target = flat[panel.start : panel.stop], out[at : at + panel.nonzeros]
            at += panel.nonzeros
            if panel.places is None:
                target.copy_(part.view(-1, 1))
            else:
                gather(part, panel.places, target)
        return out


def _whole(panel: _Panel) -> _Panel:
    return _Panel(panel.row, panel.start, panel.stop, None)


def _places(spec: TensorSpec, masks: Mapping[str, Tensor]) -> Places:
    grid, ones = grid_of(spec), spec.sparse[0].ones
    return Places.of(decode_mask(grid, ones, masks[spec.name].numpy()) if ones < grid.cells else Mask.full(grid))


def _fill(slab: Slab, target: TensorSpec, values: Tensor, places: Places | None) -> None:
    """Writes a piece to its place in a slab's host memory, of which no graph knows."""
    count = target.nbytes // target.dtype.itemsize
    if not count:
        return
    dense = torch.frombuffer(slab.landing, dtype=target.dtype, count=count, offset=target.offset)
    if places is None:
        dense.copy_(values.reshape(-1))
    else:
        expand(values, places, dense)
