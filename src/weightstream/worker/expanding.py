"""Sparse blocks between the link and the slab: non-zeros and masks land beside it, and are expanded when they are needed.

A block without sparse parameters lands in its slab. Of another one the places of its non-zeros are kept as long as it is
in a slab, so that gradients, which autograd forms densely, are gathered there before they are summed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from weightstream.sparse.codec import Places, expand, gather
from weightstream.sparse.driving import drive
from weightstream.sparse.kernels import Kernel
from weightstream.sparse.masks import Mask
from weightstream.sparse.structure import Structure
from weightstream.store.layout import MASK, RecordLayout, TensorSpec
from weightstream.store.masks import mask_of
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


@dataclass(frozen=True, slots=True)
class Driven:
    """A parameter that is not expanded: `module` multiplies by its non-zeros, `nonzeros` at all times."""

    module: nn.Linear
    kernel: Kernel
    block: tuple[int, int]
    nonzeros: int


class Expansion:
    """Where blocks land, and where their non-zeros are while they are in slabs.

    Args:
        driven: by name the parameters that kernels multiply by: of these a slab has the non-zeros, where else the dense
            tensor would begin.
        device: where products are computed.
    """

    def __init__(
        self, holding: Holding, driven: Mapping[str, Driven] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._holding, self._driven, self._device = holding, driven or {}, device
        self._undo: dict[int, list[Callable[[], None]]] = {}
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
        masks_of: dict[str, list[Mask]] = {}
        offsets: dict[str, int] = {}
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
                if spec.name in self._driven:
                    at = offsets.get(spec.name, target.offset)
                    _copy(slab, spec, values[spec.name], at)
                    offsets[spec.name] = at + spec.nbytes
                    masks_of.setdefault(spec.name, []).append(mask_of(spec, masks[spec.name]))
                    continue
                places = None if spec.piece is None else Places.of(mask_of(spec, masks[spec.name]))
                _fill(slab, target, values[spec.name], places)
                first = spec.first_element
                stop = first + target.nbytes // target.dtype.itemsize
                panels.setdefault(spec.name, []).append(_Panel(spec.row, first, stop, places))
        self._panels[block] = {
            name: found for name, found in panels.items() if any(panel.places is not None for panel in found)
        }
        self._undo[block] = [self._drive(self._driven[name], found) for name, found in masks_of.items()]
        return True

    def _drive(self, driven: Driven, masks: Sequence[Mask]) -> Callable[[], None]:
        """The module of a parameter multiplies by what its slab has, until this is undone."""
        kept = torch.from_numpy(np.concatenate([mask.cells.reshape(-1, mask.grid.across) for mask in masks]))
        return drive(driven.module, Structure(kept, driven.block, self._device), driven.kernel)

    def forget(self, block: int) -> None:
        """The block leaves its slab."""
        self._landed.pop(block, None)
        self._panels.pop(block, None)
        for undo in self._undo.pop(block, ()):
            undo()

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


def _copy(slab: Slab, spec: TensorSpec, values: Tensor, offset: int) -> None:
    """Writes non-zeros as they are to a place in a slab's host memory."""
    count = spec.nbytes // spec.dtype.itemsize
    torch.frombuffer(slab.landing, dtype=spec.dtype, count=count, offset=offset).copy_(values.view(-1))


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
