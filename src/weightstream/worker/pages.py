"""Tensors on pages of their own: what outlives an operation on a CPU, kept out of the heap.

Among an operation's temporaries each would leave a hole when it is freed, and glibc's aligned allocation asks for more
than a tensor of the same size has left, so that holes grow with the number of micro-batches (benchmarks/LOG.md). Pages
go back to the kernel with their tensor, and can be emptied before, at the same address.
"""

import mmap
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from weightstream.units import align

MIN_BYTES = 1 << 18
_PAGE_BYTES = mmap.PAGESIZE
_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address; a map lives as long as its storage


def on_pages(tensor: Tensor) -> Tensor:
    """The same values on pages of their own, without a graph; the tensor itself if it is small, a part, or elsewhere."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if not whole or tensor.device.type != "cpu" or tensor.nbytes < MIN_BYTES or has_pages(tensor):
        return tensor
    pages = mmap.mmap(-1, align(tensor.nbytes, _PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    storage = torch.frombuffer(pages, dtype=torch.uint8, count=tensor.nbytes).untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())  # no view of anything
    made.copy_(tensor.detach())
    _maps[made.data_ptr()] = pages
    return made


def has_pages(tensor: Tensor) -> bool:
    """Whether a tensor's storage is one that `on_pages` made."""
    return tensor.untyped_storage().data_ptr() in _maps


def empty(tensor: Tensor) -> None:
    """Returns the pages under a tensor's storage to the kernel; they read as zeros until they are filled again."""
    _maps[tensor.untyped_storage().data_ptr()].madvise(mmap.MADV_DONTNEED)
