"""What the operating system says of a process from outside: peak memory, children included; bytes to and from disk."""

from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """The process ids below `pid`, itself included."""
    found = [pid]
    for one in found:  # grows while it is walked
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
    return found


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
    """The largest resident sets of the processes of a tree, added up, as the kernel keeps them.

    Nothing runs beside what is measured: threads that looked 20 times a second at each of six processes, of which five stood
    still, made the steps of the sixth a tenth longer on two cores, whose threads wait for one another.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.nbytes = pid, 0

    def look(self) -> int:
        """Takes in what there is now; a process that ends between two looks is missed."""
        self.nbytes = max(self.nbytes, sum(high_water_bytes(pid) for pid in children(self.pid)))
        return self.nbytes
