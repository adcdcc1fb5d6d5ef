"""Tensors on pages of their own: what outlives an operation on a CPU, kept out of the heap.

Among an operation's temporaries each would leave a hole when it is freed, and glibc's aligned allocation asks for more
than a tensor of the same size has left, so that holes grow with the number of micro-batches (benchmarks/LOG.md). The
pages of a tensor that is gone serve the next one of the same size, and can be emptied before, at the same address.
"""

import mmap
import weakref
from collections import defaultdict

import torch
from torch import Tensor

from weightstream.units import align

MIN_BYTES = 1 << 18
_PAGE_BYTES = mmap.PAGESIZE
_in_use: dict[int, mmap.mmap] = {}  # by address
_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by size
_wanted: set[int] = set()  # sizes asked for since the last `trim`
_spilled: set[int] = set()  # addresses whose bytes were elsewhere for a time: the plan has no room for them


def on_pages(tensor: Tensor) -> Tensor:
    """The same values on pages of their own, without a graph; the tensor itself if it is small, a part, or elsewhere."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if not whole or tensor.device.type != "cpu" or tensor.nbytes < MIN_BYTES or has_pages(tensor):
        return tensor
    size = align(tensor.nbytes, _PAGE_BYTES)
    _wanted.add(size)
    free = _free[size]
    pages = free.pop() if free else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(pages)  # the storage holds this view, and nothing else does: it goes with the storage
    storage = torch.frombuffer(view, dtype=torch.uint8, count=tensor.nbytes).untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())  # no view of anything
    made.copy_(tensor.detach())
    _in_use[made.data_ptr()] = pages
    weakref.finalize(view, _give, made.data_ptr(), size).atexit = False
    return made


def _give(address: int, size: int) -> None:
    """Keeps the pages for the next tensor. Of one that was spilled they are empty: on the way back all of these come once
    more, one after another, and what nobody uses would gather there (one boundary for every visit and micro-batch)."""
    pages = _in_use.pop(address)
    if address in _spilled:
        _spilled.discard(address)
        pages.madvise(mmap.MADV_DONTNEED)
    _free[size].append(pages)


def has_pages(tensor: Tensor) -> bool:
    """Whether a tensor's storage is one that `on_pages` made."""
    return tensor.untyped_storage().data_ptr() in _in_use


def empty(tensor: Tensor) -> None:
    """Returns the pages under a tensor's storage to the kernel; they read as zeros until they are filled again."""
    address = tensor.untyped_storage().data_ptr()
    _in_use[address].madvise(mmap.MADV_DONTNEED)
    _spilled.add(address)


def trim() -> None:
    """Returns free pages to the kernel, but for sizes in which there was need since the last time."""
    for size in [size for size in _free if size not in _wanted]:
        del _free[size]
    _wanted.clear()


def release() -> None:
    """Returns all free pages to the kernel."""
    _free.clear()
