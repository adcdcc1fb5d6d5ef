"""glibc's allocator, told to keep what it has.

By default every tensor above 32 MiB, and at first every one above 128 KiB, is mapped afresh and its pages are zeroed by
the kernel each time: a tenth of a step for models of this kind. The number of arenas is left alone: with a single one the
threads of a kernel wait for each other's small allocations, and attention's backward takes 2.7 times as long.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSE_BELOW_BYTES = 1 << 30
_done = False


def keep_memory() -> bool:
    """Has freed memory of this process reused, once; returns whether the C library took it."""
    global _done
    if not _done:
        try:
            libc = ctypes.CDLL("libc.so.6")
            mallopt, trim = libc.mallopt, libc.malloc_trim
        except (OSError, AttributeError):  # not glibc: its own allocator decides
            return False
        trim(0)  # what is free now is of other sizes than what comes
        _done = all(
            mallopt(option, value)
            for option, value in (
                (_M_MMAP_THRESHOLD, _REUSE_BELOW_BYTES),
                (_M_TRIM_THRESHOLD, _REUSE_BELOW_BYTES),
            )
        )
    return _done
