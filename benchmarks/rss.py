"""What the operating system says of a process from outside: peak memory, children included; bytes to and from disk."""

import os
import threading
from contextlib import suppress
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """The process ids below `pid`, itself included."""
    found = [pid]
    for one in found:  # grows while it is walked
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
    return found


def resident_bytes(pid: int) -> int:
    """Resident set of one process now; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0


def high_water_bytes(pid: int) -> int:
    """The kernel's own high-water mark of one process's resident set (VmHWM); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def disk_bytes(pid: int) -> tuple[int, int]:
    """Bytes that one process has so far had read from and written to storage, as the kernel counts them."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0, 0
    counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return counts["read_bytes"], counts["write_bytes"]


class PeakRss:
    """The largest resident set of a process tree, from now until `stop`.

    Sums are sampled; for a process alone the kernel's high-water mark is taken too, which misses nothing.
    """

    def __init__(self, pid: int, interval_s: float = 0.05) -> None:
        self.pid, self.interval_s, self.nbytes = pid, interval_s, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-rss", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._sample()

    def _sample(self) -> None:
        total = sum(resident_bytes(pid) for pid in children(self.pid))
        self.nbytes = max(self.nbytes, total, high_water_bytes(self.pid))

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.nbytes
