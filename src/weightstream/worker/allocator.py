"""glibc's allocator, told to keep what it has, and to give back what it does not use where it becomes too much.

By default every tensor above 32 MiB, and at first every one above 128 KiB, is mapped afresh and its pages are zeroed by
the kernel each time: a tenth of a step for models of this kind. But what is kept lies scattered: sizes in between leave
holes, whose pages would come on top of every budget, the more the deeper the model. So a `Ceiling` returns them to the
kernel whenever the process has grown beyond its budgets. The number of arenas is left alone: with a single one the
threads of a kernel wait for each other's small allocations, and attention's backward takes 2.7 times as long.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from weightstream.worker import pages

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSE_BELOW_BYTES = 1 << 30
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
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
    pages.release()
    if _trim is not None:
        _trim(0)


def anonymous_bytes() -> int:
    """What of this process lies in memory and in no file; 0 where the system does not say."""
    try:
        _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE_BYTES


class Ceiling:
    """Holds the process to what it has now and 2% more than `budget_bytes`: beyond it, holes are given back.

    Returned pages cost the time of zeroing them anew (0.1 s for 300 MB), so it happens only where it must. What is in
    use stays; where that alone is beyond the ceiling, the next attempt waits until a twentieth more has gathered.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.slack_bytes = budget_bytes // 20
        self.limit_bytes = anonymous_bytes() + budget_bytes + budget_bytes // 50
        self.returns = 0
        self._next = self.limit_bytes

    def check(self) -> None:
        """Gives memory back if the process is above its ceiling."""
        now = anonymous_bytes()
        if now <= self.limit_bytes:
            self._next = self.limit_bytes
        elif now > self._next:
            give_back()
            self.returns += 1
            self._next = max(self.limit_bytes, anonymous_bytes() + self.slack_bytes)
