"""Sparse blocks between the link and the slab: non-zeros and masks land beside it, and are expanded as soon as they are there.

A block without sparse parameters lands in its slab. Of another one the places of its non-zeros are kept as long as it is
in a slab, so that gradients, which autograd forms densely, are gathered there before they are summed. Where kernels
multiply by non-zeros, these are copied as they are, and what the kernels ask of the mask is found at the same time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from weightstream.sparse.codec import Places, expand, gather
from weightstream.sparse.driving import drive
from weightstream.sparse.kernels import Kernel
from weightstream.sparse.structure import Structure
from weightstream.store.futures import chain, done
from weightstream.store.futures import gather as gather_all
from weightstream.store.layout import MASK, RecordLayout, TensorSpec
from weightstream.store.owned import Holding
from weightstream.store.segments import part_tensors
from weightstream.worker.places import KeptPlaces
from weightstream.worker.slabs import Slab

T = TypeVar("T")


@dataclass(slots=True)
class _Panel:
    """The non-zeros of a tensor's elements [`start`, `stop`): those of `places`, or all. Places go to the device with the
    first gradient."""

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


@dataclass(frozen=True, slots=True)
class _Nonzeros:
    """A panel of a parameter that is not expanded, as it has landed, and its place in the slab."""

    spec: TensorSpec
    offset: int
    values: Tensor
    mask: Tensor


@dataclass(slots=True)
class _Landing:
    """A sparse block on its way: what its bytes are, and whether they are expanded; with what each piece came to."""

    layouts: tuple[RecordLayout, ...]
    expanded: "Future[list[tuple[str, _Panel | Structure]]] | None" = None


class Expansion:
    """Where blocks land, and where their non-zeros are while they are in slabs.

    A block is expanded as soon as its bytes are there, beside whatever is computed meanwhile: piece by piece, or matrix by
    matrix where kernels multiply, by as many threads as torch computes with.

    Args:
        driven: by name the parameters that kernels multiply by: of these a slab has the non-zeros.
        device: where products are computed.
        places: what is kept from one fetch to the next.
    """

    def __init__(
        self,
        holding: Holding,
        driven: Mapping[str, Driven] | None = None,
        device: torch.device | str = "cpu",
        places: KeptPlaces | None = None,
    ) -> None:
        self._holding, self._driven, self._device = holding, driven or {}, device
        self._places = KeptPlaces() if places is None else places
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="expand")
        self._undo: dict[int, list[Callable[[], None]]] = {}
        self._landings: dict[int, _Landing] = {}
        self._panels: dict[int, dict[str, list[_Panel]]] = {}

    def landing(self, block: int, slab: Slab) -> memoryview:
        """Where a block that comes to a slab has to land."""
        if not self._holding.is_sparse(block):
            return slab.landing
        layouts = tuple(self._holding.layout(unit) for unit in self._holding.store.units_of(block))
        self._landings[block] = _Landing(layouts)
        return slab.compressed

    def begin(self, block: int, slab: Slab, arrived: "Future[Any]") -> None:
        """Once a block has landed, fills its slab and sends that to the device; if it is one that is expanded."""
        landing = self._landings.get(block)
        if landing is None:
            return

        def start() -> "Future[list[tuple[str, _Panel | Structure]]]":
            arrived.result()
            return gather_all([self._threads.submit(piece) for piece in self._pieces(block, slab, landing.layouts)])

        filled = chain([arrived], start)
        landing.expanded = chain([filled], lambda: _uploaded(filled, slab))

    def finish(self, block: int, wait: "Callable[[Future[Any]], Any]" = Future.result) -> bool:
        """Waits until the slab of a block is full, and on its way to the device; kernels multiply by what is in it from now
        on. Whether it is one that is expanded.

        Args:
            wait: waits for that, and may note for how long.
        """
        landing = self._landings.get(block)
        if landing is None:
            return False
        assert landing.expanded is not None, "it was begun"
        pieces = wait(landing.expanded)
        del self._landings[block]
        panels: dict[str, list[_Panel]] = {}
        structures: dict[str, Structure] = {}
        for name, piece in pieces:
            if isinstance(piece, Structure):
                structures[name] = piece
            else:
                panels.setdefault(name, []).append(piece)
        self._panels[block] = {
            name: found for name, found in panels.items() if any(panel.places is not None for panel in found)
        }
        self._undo[block] = [
            drive(self._driven[name].module, structure, self._driven[name].kernel)
            for name, structure in structures.items()
        ]
        return True

    def _pieces(
        self, block: int, slab: Slab, layouts: Sequence[RecordLayout]
    ) -> Iterator[Callable[[], tuple[str, _Panel | Structure]]]:
        """What fills a slab with what has landed beside it: piece by piece, in any order."""
        targets = iter(self._holding.slabs[block].pieces)
        driven: dict[str, list[_Nonzeros]] = {}
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
                own, mask = values[spec.name], masks.get(spec.name)
                if spec.name in self._driven:
                    assert mask is not None
                    driven.setdefault(spec.name, []).append(_Nonzeros(spec, target.offset, own, mask))
                else:
                    yield partial(self._fill, block, slab, spec, target, own, mask)
        for name, panels in driven.items():
            yield partial(self._take, block, slab, name, panels)

    def _fill(
        self, block: int, slab: Slab, spec: TensorSpec, target: TensorSpec, values: Tensor, mask: Tensor | None
    ) -> tuple[str, _Panel]:
        """Writes a piece to its place in a slab's host memory, of which no graph knows."""
        count, first = target.nbytes // target.dtype.itemsize, spec.first_element
        if spec.piece is None:
            _copy(slab, target.offset, values)
            return spec.name, _Panel(spec.row, first, first + count, None)
        assert mask is not None, "a sparse piece has a mask"
        places = self._places.of(block, spec, mask)
        dense = torch.frombuffer(slab.landing, dtype=target.dtype, count=count, offset=target.offset)
        expand(values, places, dense)
        return spec.name, _Panel(spec.row, first, first + count, places)

    def _take(self, block: int, slab: Slab, name: str, panels: Sequence[_Nonzeros]) -> tuple[str, Structure]:
        """Writes non-zeros as they are to their places in a slab's host memory; and where they are in their matrix."""
        for panel in panels:
            _copy(slab, panel.offset, panel.values)
        masks = [(panel.spec, panel.mask) for panel in panels]
        return name, self._places.structure(block, masks, self._driven[name].kernel, self._device)

    def forget(self, block: int) -> None:
        """The block leaves its slab."""
        landing = self._landings.pop(block, None)
        if landing is not None and landing.expanded is not None:
            landing.expanded.exception()  # waits: nothing may be written to the slab any more
        self._panels.pop(block, None)
        for undo in self._undo.pop(block, ()):
            undo()

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown()

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
                panel.places = panel.places.to(grad.device)
                gather(part, panel.places, target)
        return out


def _whole(panel: _Panel) -> _Panel:
    return _Panel(panel.row, panel.start, panel.stop, None)


def _copy(slab: Slab, offset: int, values: Tensor) -> None:
    if values.numel():
        source = values.reshape(-1).view(torch.uint8).numpy()
        np.copyto(np.frombuffer(slab.landing, np.uint8, source.size, offset), source)


def _uploaded(filled: "Future[T]", slab: Slab) -> "Future[T]":
    found = filled.result()
    slab.upload()
    return done(found)
