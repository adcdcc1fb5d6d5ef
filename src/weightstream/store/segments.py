"""Memory that direct I/O can move: page-aligned buffers, and records laid out in them exactly as in their files.

Buffers are made once and reused. They are anonymous maps aligned to huge pages where they are large, so that the kernel
can give huge pages and a 4 MiB transfer pins two pages rather than a thousand.
"""

import ctypes
import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from weightstream.store.layout import ALIGN_PART, Part, RecordLayout, gaps
from weightstream.units import align

_HUGE_PAGE = 2 << 20


def address(view: memoryview) -> int:
    """Where a writable view's bytes lie in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory as bytes, without a copy; keeps the memory alive."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"expected a contiguous CPU tensor, found {tuple(tensor.shape)} with strides {tensor.stride()} on "
            f"{tensor.device}; call .cpu().contiguous() first"
        )
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class AlignedBuffer:
    """`nbytes` of zeroed memory, aligned to a page, and to a huge page where it holds one.

    Nothing is resident until it is touched. `close` gives the memory back as soon as the last view of it is gone.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        rounded = align(max(nbytes, 1), ALIGN_PART)
        slack = _HUGE_PAGE if rounded >= _HUGE_PAGE else 0
        # private: the kernel gives huge pages to private maps only; kept out of forks, which would copy pages under I/O
        self._map = mmap.mmap(-1, rounded + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._map.madvise(mmap.MADV_DONTFORK)
        whole = memoryview(self._map)
        start = -address(whole) % _HUGE_PAGE if slack else 0
        if slack and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                # Whole huge pages only: a rounded-up tail would be resident memory that no budget knows of.
                self._map.madvise(mmap.MADV_HUGEPAGE, start, rounded // _HUGE_PAGE * _HUGE_PAGE)
            except OSError:
                pass  # a kernel without transparent huge pages: slower, otherwise the same
        self.view: memoryview = whole[start : start + nbytes]

    def tensor(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> Tensor:
        """A tensor that is a view of the bytes from `offset` on."""
        count = prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self.view, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))

    def discard(self) -> None:
        """Give up what outlives the process: of this memory, nothing."""

    def close(self) -> None:
        """Drop this object's hold; tensors and views that are still in use keep the memory until they go."""
        self.view = memoryview(b"")
        try:
            self._map.close()
        except BufferError:
            pass


class RecordBuffer:
    """A working buffer for any record whose image fits; bound to one layout at a time.

    Args:
        capacity: bytes of the largest image that it will hold, or the layout of it, to which it is then bound.
        within: memory of someone else and where in it to begin, a multiple of pages; by default memory of its own.
    """

    def __init__(self, capacity: RecordLayout | int, within: tuple[AlignedBuffer, int] | None = None) -> None:
        self.capacity_bytes = capacity if isinstance(capacity, int) else capacity.image_nbytes
        self._shares = within is not None
        self._buffer, self._start = within or (AlignedBuffer(self.capacity_bytes), 0)
        self._layout: RecordLayout | None = None
        self._tensors: dict[str, dict[str, Tensor]] = {}
        if isinstance(capacity, RecordLayout):
            self.bind(capacity)

    @property
    def layout(self) -> RecordLayout:
        """The layout it is bound to."""
        assert self._layout is not None, "bind the buffer to a layout first"
        return self._layout

    def bind(self, layout: RecordLayout) -> None:
        """Take the places of this layout. Padding is zeroed, so that an image depends on its tensors alone.

        Raises:
            ValueError: its image is larger than the buffer.
        """
        if layout is self._layout:
            return
        if layout.image_nbytes > self.capacity_bytes:
            raise ValueError(
                f"block {layout.block!r} needs {layout.image_nbytes} bytes, this buffer has {self.capacity_bytes}; "
                "make the buffer as large as the largest record"
            )
        self._layout = layout
        self._tensors = {}
        for part in layout.parts:
            view = self.view(part.name)
            for start, stop in gaps(part):
                view[start:stop] = bytes(stop - start)

    @property
    def image(self) -> memoryview:
        """All bytes of the record as they lie in its file, header included."""
        return self._buffer.view[self._start : self._start + self.layout.image_nbytes]

    def view(self, part: str) -> memoryview:
        """The bytes of one part."""
        place = self.layout.part(part)
        return self._buffer.view[self._start + place.offset : self._start + place.offset + place.nbytes]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Parameter name → tensor of this part, as views of the buffer."""
        if part not in self._tensors:
            place = self.layout.part(part)
            self._tensors[part] = {
                spec.name: self._buffer.tensor(spec.dtype, self._start + place.offset + spec.offset, spec.shape)
                for spec in place.tensors
            }
        return self._tensors[part]

    def close(self) -> None:
        """Give the memory back once the last tensor on it is gone."""
        self._tensors = {}
        self._layout = None
        if not self._shares:
            self._buffer.close()


def part_tensors(part: Part, view: memoryview) -> dict[str, Tensor]:
    """Parameter name → tensor, as views of the bytes of one part (such as a slab that a part was fetched into)."""
    found: dict[str, Tensor] = {}
    for spec in part.tensors:
        count = prod(spec.shape)
        if count == 0:
            found[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
        else:
            flat = torch.frombuffer(view, dtype=spec.dtype, count=count, offset=spec.offset)
            found[spec.name] = flat.reshape(spec.shape)
    return found
