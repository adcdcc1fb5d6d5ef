"""Processes as the operating system sees them: who ends with whom, and who is whose child."""

import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one that got the same number."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it runs, sleeps or is stopped: whether it has not ended."""
        found = _status(self.pid)
        return found is not None and found.state not in "ZX" and found.started == self.started

    def kill(self) -> None:
        """SIGKILL; nothing happens if it has ended."""
        if self.alive:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent ends, however that ends; at once if it has ended already.

    Linux does so by itself (`PR_SET_PDEATHSIG`); elsewhere a thread looks. Call it in the main thread of a new process.

    Args:
        parent: the parent's process id, which the parent itself has told.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    else:
        threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def children(parent: int) -> list[Process]:
    """A process's children that have not ended; none if it has ended itself."""
    try:
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        pids = [int(pid) for pid in listed.split()]
    except OSError:  # no such process, or a kernel that keeps no such list
        pids = _all()
    found = ((pid, _status(pid)) for pid in pids)
    return [
        Process(pid, status.started)
        for pid, status in found
        if status is not None and status.parent == parent and status.state not in "ZX"
    ]


@dataclass(frozen=True, slots=True)
class _Status:
    state: str
    parent: int
    started: int  # ticks since the system's start


def _status(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses before may hold anything
    return _Status(fields[0], int(fields[1]), int(fields[19])) if len(fields) > 19 else None


def _all() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return []
