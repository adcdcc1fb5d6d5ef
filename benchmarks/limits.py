"""Hard limits on a process, set by the operating system: on its memory, with what it says when that kills; on its disk.

A memory cgroup (v1 or v2) below the one this process is in, where one can be made; else RLIMIT_DATA, under which an
allocation fails instead. A disk is held to a speed by a cgroup or not at all.
"""

import os
import resource
import time
from contextlib import suppress
from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")
_GROUPS = Path("/proc/self/cgroup")


class MemoryGroup:
    """A new memory cgroup with a limit; `enter` is called in the child before it starts its program.

    Raises:
        OSError: no group can be made here.
    """

    kind = "cgroup"

    def __init__(self, limit_bytes: int) -> None:
        version, parent = _own_group()
        self.path = parent / f"weightstream-benchmark-{os.getpid()}-{time.monotonic_ns()}"
        self.path.mkdir()
        names = {
            1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
            2: ("memory.max", "memory.peak", "memory.events"),
        }[version]
        self._limit, self._peak, self._events = (self.path / name for name in names)
        try:
            self._limit.write_text(str(limit_bytes))
            swap = self.path / ("memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max")
            if swap.exists():
                swap.write_text(str(limit_bytes if version == 1 else 0))
        except OSError:
            self.path.rmdir()
            raise

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        words = self._events.read_text().split()
        return int(words[words.index("oom_kill") + 1]) > 0

    def peak_bytes(self) -> int:
        """The most memory that the group was charged, page cache included."""
        return int(self._peak.read_text()) if self._peak.exists() else 0

    def remove(self) -> None:
        _remove(self.path)


def _remove(group: Path) -> None:
    for _ in range(50):  # the kernel lets go of a group a moment after its last process
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


class DataLimit:
    """RLIMIT_DATA: heap and private anonymous mappings together."""

    kind = "RLIMIT_DATA"

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def enter(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (self.limit_bytes, self.limit_bytes))

    def killed(self) -> bool:
        return False  # allocations fail instead; the process says so and ends with an error

    def peak_bytes(self) -> int:
        return 0

    def remove(self) -> None:
        pass


class DiskGroup:
    """A new cgroup whose reads from and writes to the disk of a folder each reach so many bytes per second, if they are
    direct (version 1 does not see to whom buffered writes belong); `enter` as above.

    Raises:
        OSError: no such group can be made here.
    """

    def __init__(self, limit_bytes_per_s: int, folder: Path) -> None:
        version, parent = _own_group("blkio", "io")
        self.path = parent / f"weightstream-benchmark-{os.getpid()}-{time.monotonic_ns()}"
        self.path.mkdir()
        disk = _disk_of(folder)
        try:
            if version == 1:
                for way in ("read", "write"):
                    (self.path / f"blkio.throttle.{way}_bps_device").write_text(f"{disk} {limit_bytes_per_s}")
            else:
                (self.path / "io.max").write_text(f"{disk} rbps={limit_bytes_per_s} wbps={limit_bytes_per_s}")
        except OSError:
            self.path.rmdir()
            raise

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        _remove(self.path)


def _disk_of(folder: Path) -> str:
    """`major:minor` of the whole disk that a folder is on, of which it may be a partition."""
    number = folder.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    if (device / "partition").exists():
        device = device.parent
    return (device / "dev").read_text().strip()


def memory_limit(limit_bytes: int) -> MemoryGroup | DataLimit:
    """The hardest limit that can be had here."""
    try:
        return MemoryGroup(limit_bytes)
    except OSError:
        return DataLimit(limit_bytes)


def _own_group(first: str = "memory", second: str = "memory") -> tuple[int, Path]:
    """(cgroup version, folder) of the group that this process is in, of a controller by its names in versions 1 and 2."""
    mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    for line in _GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for _, folder, kind, options, *_ in mounts:
            if kind == "cgroup" and first in controllers.split(",") and first in options.split(","):
                return 1, Path(folder) / path.lstrip("/")
            if kind == "cgroup2" and not controllers:
                group = Path(folder) / path.lstrip("/")
                if (group / f"{second}.max").exists() or second in (group / "cgroup.controllers").read_text().split():
                    return 2, group
    raise FileNotFoundError(f"no {first} cgroup is mounted")
