"""glibc's allocator, told to keep what it has, and to give back what it does not use.

By default every tensor above 32 MiB, and at first every one above 128 KiB, is mapped afresh and its pages are zeroed by
the kernel each time: a tenth of a step for models of this kind. But what is kept lies scattered: sizes in between leave
holes, whose pages would come on top of every budget, the more the deeper the model. So `give_back` returns them, often
enough to bound them and seldom enough to cost no time. The number of arenas is left alone: with a single one the
threads of a kernel wait for each other's small allocations, and attention's backward takes 2.7 times as long.
"""

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSE_BELOW_BYTES = 1 << 30
_done = False
_trim: Callable[[int], int] | None = None


def keep_memory() -> bool:
    """Has freed memory of this process reused, once; returns whether the C library took it."""
    global _done, _trim
    if not _done:
        try:
            libc = ctypes.CDLL("libc.so.6")
            mallopt, _trim = libc.mallopt, libc.malloc_trim
        except (OSError, AttributeError):  # not glibc: its own allocator decides
            return False
        give_back()  # what is free now is of other sizes than what comes
        _done = all(
            mallopt(option, value)
            for option, value in (
                (_M_MMAP_THRESHOLD, _REUSE_BELOW_BYTES),
                (_M_TRIM_THRESHOLD, _REUSE_BELOW_BYTES),
            )
        )
    return _done


def give_back() -> None:
    """Returns the pages of free memory to the kernel, also those between blocks in use."""
    if _trim is not None:
        _trim(0)
