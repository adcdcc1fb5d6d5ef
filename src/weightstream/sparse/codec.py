"""Between dense memory and non-zeros, and masks as bytes.

Non-zeros are vectors in row-major order of their dense positions. They are moved in *segments*: consecutive elements
that exist together, one element or the width of a block.

A mask is written in the form that needs the fewest bytes, which depends on counts alone, so that a record's layout is
known before its mask is: nothing at all where every cell exists, a bitmap, or gaps. Gaps are the numbers of missing
cells before each existing one, in one or two bytes; the largest number means that many missing cells and no existing
one, and the rest of the room is filled with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.errors import DamagedRecordError
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Mask

Form = Literal["full", "bitmap", "gaps8", "gaps16"]
Indices = NDArray[np.signedinteger[Any]]

_GAP_BYTES: dict[Form, int] = {"gaps8": 1, "gaps16": 2}
_CHUNK = 1 << 15
"""Segments that are moved at a time: temporaries stay in the cache and do not grow with the piece."""
_BITMAP_CHUNK = 1 << 16
_NARROW = (1 << 31) - 1
"""The largest number of four bytes."""


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
    if form == "full":
        return Mask.full(grid)
    if form == "bitmap":
        cells = np.unpackbits(data, count=grid.cells, bitorder="little").view(np.bool_)
    else:
        cells = np.zeros(grid.cells, np.bool_)
        cells[_existing(data, form, grid.cells, count)] = True
    mask = Mask(grid, cells)
    if mask.count != count:
        raise _damaged(count, mask.count)
    return mask


def decode_cells(grid: Grid, count: int, data: NDArray[np.uint8]) -> Indices:
    """The numbers of the cells that exist in the mask that `encode_mask` wrote, in order.

    Raises:
        DamagedRecordError: bytes that are no mask of `count` cells.
    """
    form, nbytes = mask_form(grid.cells, count)
    if form == "full" or data.nbytes != nbytes:
        return np.flatnonzero(decode_mask(grid, count, data).cells).astype(index_type(grid.cells), copy=False)
    return _existing(data, form, grid.cells, count)


def decoding_steps(cells: int, count: int) -> int:
    """What finding the existing cells of a mask takes, in steps through its bits or gaps."""
    form, nbytes = mask_form(cells, count)
    match form:
        case "full":
            return 0
        case "bitmap":
            return cells
        case "gaps8" | "gaps16":
            return nbytes // _GAP_BYTES[form]
        case _:
            assert_never(form)


def _existing(data: NDArray[np.uint8], form: Form, cells: int, count: int) -> Indices:
    """The existing cells of a mask in gaps or bits, in order.

    Raises:
        DamagedRecordError: they are not `count`, or lie beyond the last cell.
    """
    places = _in_bitmap(data, cells, count) if form == "bitmap" else _in_gaps(data, _GAP_BYTES[form], cells, count)
    if places.size != count:
        raise _damaged(count, places.size)
    if count and places[-1] >= cells:
        raise DamagedRecordError(f"mask of {cells} cells: found cell {places[-1]}, beyond the last; verify the store")
    return places


def _in_bitmap(data: NDArray[np.uint8], cells: int, count: int) -> Indices:
    """Part by part, so that what is unpacked stays in the cache and takes little memory."""
    places, found = np.empty(count, index_type(cells)), 0
    for start in range(0, data.size, _BITMAP_CHUNK):
        first = 8 * start
        bits = np.unpackbits(
            data[start : start + _BITMAP_CHUNK], count=min(8 * _BITMAP_CHUNK, cells - first), bitorder="little"
        )
        part = np.flatnonzero(bits.view(np.bool_))
        if found + part.size > count:
            raise _damaged(count, found + part.size)
        np.add(part, first, out=places[found : found + part.size], casting="same_kind")
        found += part.size
    return places[:found]


def _in_gaps(data: NDArray[np.uint8], gap_bytes: int, cells: int, count: int) -> Indices:
    gaps, most = np.ascontiguousarray(data).view(f"<u{gap_bytes}"), _most(gap_bytes)
    real = gaps != most
    if real[:count].all() and not real[count:].any():  # as a rule: what fills the room stands at its end
        gaps, real = gaps[:count], real[:count]
    # a gap and the cell behind it are as many cells as the largest number at most, so that they fit its type
    narrow = gaps.size * (most + 1) <= _NARROW
    ends: Indices = np.cumsum(gaps + real, dtype=np.int32 if narrow else np.int64)
    if not real.all():
        ends = ends[real]
    ends -= 1
    return ends.astype(index_type(cells), copy=False)


def _damaged(count: int, found: int) -> DamagedRecordError:
    return DamagedRecordError(f"mask: expected {count} cells that exist, found {found}; verify the store")


def _most(gap_bytes: int) -> int:
    """The largest number of so many bytes."""
    return (1 << 8 * gap_bytes) - 1


def index_type(segments: int) -> type[np.signedinteger[Any]]:
    """The type of the numbers of so many segments."""
    return np.int32 if segments <= _NARROW else np.int64


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """A mask's segments by their numbers in the dense tensor: the expanded form, worth keeping between steps.

    Four bytes each (eight where a tensor has more than 2³¹ segments): they are made wide where they are used, which
    takes less time than reading them as wide ones would.
    """

    segments: Tensor
    width: int
    elements: int

    @staticmethod
    def of(mask: Mask) -> "Places":
        width = mask.grid.block[1]
        kind = index_type(mask.grid.elements // width)
        return _places(np.flatnonzero(mask.segments()).astype(kind, copy=False), mask.grid)

    @staticmethod
    def decoded(grid: Grid, count: int, data: NDArray[np.uint8]) -> "Places":
        """Those of the mask that `encode_mask` wrote, without the mask where cells are no higher than one row.

        Raises:
            DamagedRecordError: bytes that are no mask of `count` cells.
        """
        if grid.block[0] > 1:
            return Places.of(decode_mask(grid, count, data))
        return _places(decode_cells(grid, count, data), grid)

    @staticmethod
    def nbytes_of(grid: Grid, count: int) -> int:
        """The bytes of those of `count` cells."""
        segments = grid.elements // grid.block[1]
        return count * grid.block[0] * np.dtype(index_type(segments)).itemsize

    @property
    def nonzeros(self) -> int:
        return self.segments.numel() * self.width

    @property
    def nbytes(self) -> int:
        return self.segments.nbytes

    def to(self, device: torch.device) -> "Places":
        """The same on the device that computes."""
        return self if self.segments.device == device else Places(self.segments.to(device), self.width, self.elements)


def _places(segments: Indices, grid: Grid) -> Places:
    return Places(torch.from_numpy(segments), grid.block[1], grid.elements)


def expand(values: Tensor, places: Places, out: Tensor) -> None:
    """Fill the dense `out` with zeros and the non-zeros: (nonzeros, 1) or (nonzeros,) → the piece's shape, any device.

    Both have one dtype and are contiguous; `out` may be a view of a slab. Temporaries do not grow with the piece. On the
    CPU it is the work of one thread, whatever thread that is.
    """
    _check(values, places, out)
    if out.device.type != "cpu":
        out.zero_()
        flat, rows = out.view(-1, places.width), values.view(-1, places.width)
        flat.index_copy_(0, places.segments.to(out.device, torch.int64), rows)
        return
    out.detach().view(-1).view(torch.uint8).numpy().fill(0)
    source, target = _segments(places.width, values, out)
    for start, index in _chunks(places):
        part = source[start : start + _CHUNK]
        if target.dim() == 1:
            target.scatter_(0, index, part)
        else:
            target.numpy()[index.numpy()] = part.numpy()


def gather(dense: Tensor, places: Places, out: Tensor) -> None:
    """The elements of a dense tensor at the non-zeros: the piece's shape → (nonzeros, 1) or (nonzeros,), any device."""
    _check(out, places, dense)
    if dense.device.type != "cpu":
        index = places.segments.to(dense.device)
        torch.index_select(dense.view(-1, places.width), 0, index, out=out.view(-1, places.width))
        return
    source, target = _segments(places.width, dense, out)
    for start, index in _chunks(places):
        part = target[start : start + _CHUNK]
        if source.dim() == 1:
            torch.gather(source, 0, index, out=part)
        else:
            np.take(source.numpy(), index.numpy(), axis=0, out=part.numpy(), mode="clip")


def _chunks(places: Places) -> Iterator[tuple[int, Tensor]]:
    """The places part by part, as wide numbers, and where each part begins among them."""
    segments = places.segments.numpy()
    for start in range(0, segments.size, _CHUNK):
        yield start, torch.from_numpy(segments[start : start + _CHUNK].astype(np.int64, copy=False))


def _check(values: Tensor, places: Places, dense: Tensor) -> None:
    assert values.numel() == places.nonzeros, (values.shape, places.nonzeros)
    assert dense.numel() == places.elements, (dense.shape, places.elements)
    assert values.dtype == dense.dtype, (values.dtype, dense.dtype)


_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _segments(width: int, *tensors: Tensor) -> list[Tensor]:
    """Contiguous CPU tensors as segments: integers, which are moved fastest; one for each segment where that fits all."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    each_nbytes = flat[0].element_size()
    if width * each_nbytes in _CARRIERS and all(tensor.storage_offset() % width == 0 for tensor in flat):
        return [tensor.view(_CARRIERS[width * each_nbytes]) for tensor in flat]
    return [tensor.view(_CARRIERS[each_nbytes]).view(-1, width) for tensor in flat]
