"""How a whole block lies in memory: in a slab, and as a gradient. Each is what its units have, one after another.

Every unit's span begins on a page, and only the last panel of a tensor may end before one does. So the panels of a
tensor that is cut are one tensor here, and whoever owns a unit reads or writes its span where it lies.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from weightstream.blocks import Unit
from weightstream.store.layout import ALIGN_PART, ALIGN_TENSOR, RecordLayout, TensorSpec
from weightstream.units import align


@dataclass(frozen=True, slots=True)
class Panel:
    """The elements [`start`, `stop`) of a tensor that is cut; `row` is the first of its rows."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Image:
    """`nbytes` of memory, a multiple of pages.

    `tensors` are whole; `spans` are the bytes (start, stop) of each of the block's units, in order; `panels` are those
    of the tensors that are cut.
    """

    nbytes: int
    tensors: tuple[TensorSpec, ...]
    spans: tuple[tuple[int, int], ...]
    panels: Mapping[str, tuple[Panel, ...]]


def slab_image(layouts: Sequence[RecordLayout]) -> Image:
    """What is streamed of a block whose units have these layouts."""
    return _image([(layout.streamed.tensors, layout.streamed.nbytes) for layout in layouts])


def gradient_image(units: Iterable[Unit]) -> Image:
    """The fp32 gradients of a block's trained parameters, each on a cache line."""
    return _image([_gradients(unit) for unit in units])


def gradient_bytes(unit: Unit) -> int:
    """Bytes of a unit's span in the gradient image of its block."""
    return _gradients(unit)[1]


def _gradients(unit: Unit) -> tuple[list[TensorSpec], int]:
    specs: list[TensorSpec] = []
    position = 0
    for p in unit.parameters:
        if p.trainable:
            specs.append(TensorSpec(p.name, torch.float32, p.shape, position, p.numel * 4, p.row, p.rows))
            position += align(p.numel * 4, ALIGN_TENSOR)
    return specs, align(position, ALIGN_PART)


def _image(members: Iterable[tuple[Sequence[TensorSpec], int]]) -> Image:
    tensors: list[TensorSpec] = []
    spans: list[tuple[int, int]] = []
    panels: dict[str, list[Panel]] = {}
    position = 0
    for specs, nbytes in members:
        for spec in specs:
            if spec.rows is not None:
                first = spec.first_element
                panels.setdefault(spec.name, []).append(Panel(spec.row, first, first + prod(spec.shape)))
            if spec.row == 0:
                whole = prod(spec.whole_shape) * spec.dtype.itemsize
                tensors.append(TensorSpec(spec.name, spec.dtype, spec.whole_shape, position + spec.offset, whole))
            else:
                begun = tensors[-1].offset + spec.first_element * spec.dtype.itemsize
                assert (tensors[-1].name, begun) == (spec.name, position), "panels lie one after another, without gaps"
        spans.append((position, position + nbytes))
        position += nbytes
    return Image(position, tuple(tensors), tuple(spans), {name: tuple(found) for name, found in panels.items()})
