"""How a whole block lies in memory: in a slab, and as a gradient. Each is what its units have, one after another.

Every unit's span begins on a page, and only the last panel of a tensor may end before one does. So the panels of a
tensor that is cut are one tensor here, and whoever owns a unit reads or writes its span where it lies.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

    `pieces` are whole tensors and panels as units have them; `tensors` are whole, the panels of one put together;
    `spans` are the bytes (start, stop) of each unit, in order; `panels` are those of the tensors that are cut.
    """

    nbytes: int
    pieces: tuple[TensorSpec, ...]
    tensors: tuple[TensorSpec, ...]
    spans: tuple[tuple[int, int], ...]
    panels: Mapping[str, tuple[Panel, ...]]


def slab_image(layouts: Sequence[RecordLayout]) -> Image:
    """What is streamed of a block whose units have these layouts."""
    return _image([(layout.streamed.tensors, layout.streamed.nbytes) for layout in layouts])


def gradient_image(units: Iterable[Unit]) -> Image:
    """The fp32 gradients of a block's trained parameters, each on a cache line."""
    return _image(_gradients(units))


def owned_gradients(units: Iterable[Unit]) -> Image:
    """The same for some of a block's units: tensors of which a panel may be missing are not put together."""
    members = _gradients(units)
    pieces, spans = _placed(members)
    return Image(spans[-1][1] if spans else 0, pieces, (), spans, {})


def _gradients(units: Iterable[Unit]) -> list[tuple[tuple[TensorSpec, ...], int]]:
    members: list[tuple[tuple[TensorSpec, ...], int]] = []
    for unit in units:
        specs: list[TensorSpec] = []
        position = 0
        for p in unit.parameters:
            if p.trainable:
                specs.append(TensorSpec(p.name, torch.float32, p.shape, position, p.numel * 4, p.row, p.rows))
                position += align(p.numel * 4, ALIGN_TENSOR)
        members.append((tuple(specs), align(position, ALIGN_PART)))
    return members


def _placed(
    members: Iterable[tuple[Sequence[TensorSpec], int]],
) -> tuple[tuple[TensorSpec, ...], tuple[tuple[int, int], ...]]:
    """Every piece at its place in the image, and the span of each unit."""
    pieces: list[TensorSpec] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for specs, nbytes in members:
        pieces += [replace(spec, offset=position + spec.offset) for spec in specs]
        spans.append((position, position + nbytes))
        position += nbytes
    return tuple(pieces), tuple(spans)


def _image(members: Iterable[tuple[Sequence[TensorSpec], int]]) -> Image:
    pieces, spans = _placed(members)
    tensors: list[TensorSpec] = []
    panels: dict[str, list[Panel]] = {}
    for spec in pieces:
        if spec.rows is not None:
            first = spec.first_element
            panels.setdefault(spec.name, []).append(Panel(spec.row, first, first + prod(spec.shape)))
        if spec.row == 0:
            whole = prod(spec.whole_shape) * spec.dtype.itemsize
            tensors.append(TensorSpec(spec.name, spec.dtype, spec.whole_shape, spec.offset, whole))
        else:
            begun = tensors[-1].offset + spec.first_element * spec.dtype.itemsize
            assert (tensors[-1].name, begun) == (spec.name, spec.offset), "panels lie one after another, without gaps"
    nbytes = spans[-1][1] if spans else 0
    return Image(nbytes, pieces, tuple(tensors), spans, {name: tuple(found) for name, found in panels.items()})
