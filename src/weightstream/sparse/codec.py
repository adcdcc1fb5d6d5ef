"""Between dense memory and non-zeros, and masks as bytes.

Non-zeros are vectors in row-major order of their dense positions. They are moved in *segments*: consecutive elements
that exist together, one element or the width of a block.

A mask is written in the form that needs the fewest bytes, which depends on counts alone, so that a record's layout is
known before its mask is: nothing at all where every cell exists, a bitmap, or gaps. Gaps are the numbers of missing
cells before each existing one, in one or two bytes; the largest number means that many missing cells and no existing
one, and the rest of the room is filled with it.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.errors import DamagedRecordError
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Mask

Form = Literal["full", "bitmap", "gaps8", "gaps16"]
Indices = NDArray[np.intp] | NDArray[np.int32]

_GAP_BYTES: dict[Form, int] = {"gaps8": 1, "gaps16": 2}
_CHUNK = 1 << 16
"""Segments that are moved at a time: temporaries stay in the cache and do not grow with the piece."""


def mask_form(cells: int, count: int) -> tuple[Form, int]:
    """The form of a mask with `count` of `cells` existing, and its bytes."""
    if count == cells:
        return "full", 0
    options: list[tuple[int, Form]] = [(-(-cells // 8), "bitmap")]
    for form, each in _GAP_BYTES.items():
        options.append(((count + (cells - count) // _most(each)) * each, form))
    nbytes, form = min(options, key=lambda option: option[0])
    return form, nbytes


def encode_mask(mask: Mask) -> NDArray[np.uint8]:
    """The mask's bytes, as many as `mask_form` says; equal masks have equal bytes."""
    form, nbytes = mask_form(mask.grid.cells, mask.count)
    match form:
        case "full":
            return np.empty(0, np.uint8)
        case "bitmap":
            return np.packbits(mask.cells, bitorder="little")
        case "gaps8" | "gaps16":
            each = _GAP_BYTES[form]
            most = _most(each)
            places = np.flatnonzero(mask.cells)
            gaps = np.diff(places, prepend=-1) - 1
            out = np.full(nbytes // each, most, f"<u{each}")
            out[np.arange(places.size) + np.cumsum(gaps // most)] = gaps % most
            return out.view(np.uint8)
        case _:
            assert_never(form)


def decode_mask(grid: Grid, count: int, data: NDArray[np.uint8]) -> Mask:
    """The mask that `encode_mask` wrote.

    Raises:
        DamagedRecordError: bytes that are no mask of `count` cells.
    """
    form, nbytes = mask_form(grid.cells, count)
    if data.nbytes != nbytes:
        raise DamagedRecordError(
            f"mask with {count} of {grid.cells} cells: expected {nbytes} bytes, found {data.nbytes}; verify the store"
        )
    match form:
        case "full":
            return Mask.full(grid)
        case "bitmap":
            cells = np.unpackbits(data, count=grid.cells, bitorder="little").view(np.bool_)
        case "gaps8" | "gaps16":
            places = _places(data, form)
            if places.size and places[-1] >= grid.cells:
                raise DamagedRecordError(
                    f"mask of {grid.cells} cells: found cell {places[-1]}, beyond the last; verify the store"
                )
            cells = np.zeros(grid.cells, np.bool_)
            cells[places] = True
        case _:
            assert_never(form)
    mask = Mask(grid, cells)
    if mask.count != count:
        raise DamagedRecordError(f"mask: expected {count} cells that exist, found {mask.count}; verify the store")
    return mask


def _places(data: NDArray[np.uint8], form: Form) -> NDArray[np.intp]:
    """The existing cells of a mask in gaps, in order."""
    each = _GAP_BYTES[form]
    gaps = np.ascontiguousarray(data).view(f"<u{each}")
    real = gaps != _most(each)
    ends = np.cumsum(gaps, dtype=np.intp)
    ends += np.cumsum(real, dtype=np.intp)
    places: NDArray[np.intp] = ends[real] - 1
    return places


def _most(gap_bytes: int) -> int:
    """The largest number of so many bytes."""
    return (1 << 8 * gap_bytes) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """A mask's segments by their numbers in the dense tensor: the expanded form, worth keeping between steps.

    `cached_nbytes` is what keeping it takes; `wide` indices take twice as much and save their conversion at each use.
    """

    segments: Indices
    width: int
    elements: int

    @staticmethod
    def of(mask: Mask, *, wide: bool = False) -> "Places":
        segments = np.flatnonzero(mask.segments())
        width = mask.grid.block[1]
        narrow = not wide and mask.grid.elements // width < 1 << 31
        return Places(segments.astype(np.int32) if narrow else segments, width, mask.grid.elements)

    @property
    def nonzeros(self) -> int:
        return self.segments.size * self.width

    @property
    def cached_nbytes(self) -> int:
        return self.segments.nbytes


def expand(values: Tensor, places: Places, out: Tensor) -> None:
    """Fill the dense `out` with zeros and the non-zeros: (nonzeros, 1) or (nonzeros,) → the piece's shape, any device.

    Both have one dtype and are contiguous; `out` may be a view of a slab. Temporaries do not grow with the piece.
    """
    _check(values, places, out)
    out.zero_()
    if out.device.type == "cpu":
        source, target = _segments(values, places.width), _segments(out, places.width)
        for start in range(0, places.segments.size, _CHUNK):
            part = places.segments[start : start + _CHUNK]
            target[part] = source[start : start + _CHUNK]
        return
    flat, rows = out.view(-1, places.width), values.view(-1, places.width)
    flat.index_copy_(0, torch.from_numpy(places.segments).to(out.device, torch.int64), rows)


def gather(dense: Tensor, places: Places, out: Tensor) -> None:
    """The elements of a dense tensor at the non-zeros: the piece's shape → (nonzeros, 1) or (nonzeros,), any device."""
    _check(out, places, dense)
    if dense.device.type == "cpu":
        source, target = _segments(dense, places.width), _segments(out, places.width)
        for start in range(0, places.segments.size, _CHUNK):
            part = places.segments[start : start + _CHUNK]
            np.take(source, part, axis=0, out=target[start : start + _CHUNK], mode="clip")
        return
    index = torch.from_numpy(places.segments).to(dense.device, torch.int64)
    torch.index_select(dense.view(-1, places.width), 0, index, out=out.view(-1, places.width))


def _check(values: Tensor, places: Places, dense: Tensor) -> None:
    assert values.numel() == places.nonzeros, (values.shape, places.nonzeros)
    assert dense.numel() == places.elements, (dense.shape, places.elements)
    assert values.dtype == dense.dtype, (values.dtype, dense.dtype)


_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _segments(tensor: Tensor, width: int) -> NDArray[np.generic]:
    """A contiguous CPU tensor as segments; numpy knows no bf16, so that numbers travel as integers of their size."""
    carrier = _CARRIERS[tensor.element_size()]
    array: NDArray[np.generic] = tensor.detach().view(-1).view(carrier).numpy()
    return array if width == 1 else array.reshape(-1, width)
