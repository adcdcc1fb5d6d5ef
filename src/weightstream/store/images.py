"""How a whole block lies in memory: in a slab, and as a gradient. Each is what its units have, one after another.

Every unit's span begins on a page, but for further panels of a tensor that is cut, which lie one after another without
gaps (dense ones from page to page all the same). So these are one tensor here, and whoever owns a unit reads or writes
its span where it lies. Of a sparse tensor a gradient has the non-zeros, as (non-zeros, 1), panel by panel.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from weightstream.blocks import Unit
from weightstream.store.layout import ALIGN_PART, ALIGN_TENSOR, RecordLayout, TensorSpec
from weightstream.store.sparsity import DENSE, Sparsity
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
    """What is streamed of a block whose units have these layouts: of a tensor that is sparse in them the non-zeros."""
    return _image([_streamed(layout) for layout in layouts])


def _streamed(layout: RecordLayout) -> tuple[Sequence[TensorSpec], int]:
    tensors = layout.streamed.tensors
    goes_on = bool(tensors) and tensors[-1].piece is not None and not tensors[-1].last
    # the next panel's non-zeros follow without a gap; dense panels end on a page
    return tensors, tensors[-1].offset + tensors[-1].nbytes if goes_on else layout.streamed.nbytes


def gradient_image(units: Iterable[Unit], sparsity: Mapping[int, Sparsity] | None = None) -> Image:
    """The fp32 gradients of a block's trained parameters, each on a cache line.

    Args:
        sparsity: by unit, which of them have gradients at non-zeros only; by default none.
    """
    return _image(_gradients(units, sparsity or {}))


def owned_gradients(units: Iterable[Unit], sparsity: Mapping[int, Sparsity] | None = None) -> Image:
    """The same for some of a block's units: tensors of which a panel may be missing are not put together."""
    pieces, spans = _placed(_gradients(units, sparsity or {}))
    return Image(_end(spans), pieces, (), spans, {})


def _gradients(units: Iterable[Unit], sparsity: Mapping[int, Sparsity]) -> list[tuple[tuple[TensorSpec, ...], int]]:
    members: list[tuple[tuple[TensorSpec, ...], int]] = []
    for unit in units:
        sparse = {piece.name: piece for piece in sparsity.get(unit.index, DENSE)}
        specs: list[TensorSpec] = []
        position = nbytes = 0
        for p in unit.parameters:
            if p.trainable:
                piece = sparse.get(p.name)
                shape = p.shape if piece is None else (piece.nonzeros, 1)
                dense_shape = None if piece is None else p.shape
                nbytes = prod(shape) * 4
                place = (position, nbytes, p.row, p.rows)
                specs.append(TensorSpec(p.name, torch.float32, shape, *place, piece, dense_shape))
                position += align(nbytes, ALIGN_TENSOR)
        goes_on = bool(specs) and not specs[-1].last  # the next panel follows without a gap
        members.append((tuple(specs), nbytes if goes_on else align(position, ALIGN_PART)))
    return members


def _placed(
    members: Iterable[tuple[Sequence[TensorSpec], int]],
) -> tuple[tuple[TensorSpec, ...], tuple[tuple[int, int], ...]]:
    """Every piece at its place in the image, and the span of each unit."""
    pieces: list[TensorSpec] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for specs, nbytes in members:
        if not specs or specs[0].row == 0:
            position = align(position, ALIGN_PART)
        pieces += [replace(spec, offset=position + spec.offset) for spec in specs]
        spans.append((position, position + nbytes))
        position += nbytes
    return tuple(pieces), tuple(spans)


def _image(members: Iterable[tuple[Sequence[TensorSpec], int]]) -> Image:
    pieces, spans = _placed(members)
    tensors: list[TensorSpec] = []
    panels: dict[str, list[Panel]] = {}
    for spec in pieces:
        elements, first = prod(spec.shape), 0
        if spec.row > 0:
            tensor = tensors[-1]
            first = prod(tensor.shape)
            begun = tensor.offset + first * spec.dtype.itemsize
            assert (tensor.name, begun) == (spec.name, spec.offset), "panels lie one after another, without gaps"
            elements += first
        if spec.rows is not None:
            panels.setdefault(spec.name, []).append(Panel(spec.row, first, elements))
        shape = spec.shape if spec.rows is None else (elements, 1)
        if spec.last and elements == prod(spec.whole_shape):
            shape = spec.whole_shape
        tensors[len(tensors) - (spec.row > 0) :] = [
            TensorSpec(
                spec.name, spec.dtype, shape, spec.offset - first * spec.dtype.itemsize, elements * spec.dtype.itemsize
            )
        ]
    return Image(_end(spans), pieces, tuple(tensors), spans, {name: tuple(found) for name, found in panels.items()})


def _end(spans: Sequence[tuple[int, int]]) -> int:
    return align(spans[-1][1], ALIGN_PART) if spans else 0
