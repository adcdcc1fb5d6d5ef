"""The time that bytes take by bare direct I/O: what nothing that uses this disk can beat.

`preadv` and `pwritev` with O_DIRECT from threads that draw pieces from one queue; nothing is left in the page cache.
What is written is synced (fdatasync) within the time, since the store must sync too. `BareIo` moves a step's bytes,
reads and writes together, the fastest over queue depths and chunk sizes; its files are written once in full before
anything is timed, so that no block is allocated (and no read served from a hole) while the clock runs. `BareFiles`
moves whole files one way, new ones or such as were written before, as the store moves records.
"""

import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

SystemCall = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`."""
Piece = TypeVar("Piece")

MIB = 1 << 20
LARGEST_CHUNK_BYTES, MOST_IN_FLIGHT = 16 * MIB, 16


@dataclass(frozen=True)
class Setting:
    """How the disk is asked: requests in flight for reads and for writes, bytes of each."""

    read_depth: int
    write_depth: int
    chunk_bytes: int


SETTINGS = tuple(
    Setting(reads, writes, chunk)
    for reads, writes in ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8))
    for chunk in (1 * MIB, 4 * MIB, 16 * MIB)
)


class BareIo:
    """Two preallocated files in `folder`, one to read and one to write, of as many bytes as a step moves each way."""

    def __init__(self, folder: Path, *, read_bytes: int, write_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Random, since a disk may store zeros for nothing; touched, so that no page fault is timed.
        self.source = mmap.mmap(-1, LARGEST_CHUNK_BYTES)
        self.source.write(os.urandom(LARGEST_CHUNK_BYTES))
        self.targets = [mmap.mmap(-1, LARGEST_CHUNK_BYTES) for _ in range(MOST_IN_FLIGHT)]
        for target in self.targets:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                target.madvise(mmap.MADV_HUGEPAGE)
            target.write(self.source)
        self.paths = {"read": folder / "bare-read.bin", "write": folder / "bare-write.bin"}
        self.nbytes = {"read": _whole_pages(read_bytes), "write": _whole_pages(write_bytes)}
        self.files: dict[str, int] = {}
        self.pool = ThreadPoolExecutor(2 * MOST_IN_FLIGHT)
        for kind, path in self.paths.items():
            self.files[kind] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            os.posix_fallocate(self.files[kind], 0, max(self.nbytes[kind], 1))
            _all(self._start(kind, os.pwritev, depth=4, chunk_bytes=4 * MIB))
            os.fsync(self.files[kind])

    def measure(self, setting: Setting) -> float:
        """Seconds for all the bytes, reads and writes at once, until the writes are synced."""
        moving: list[Future[None]] = []
        started = time.perf_counter()
        for kind, call, depth in (("read", os.preadv, setting.read_depth), ("write", os.pwritev, setting.write_depth)):
            moving += self._start(kind, call, depth=depth, chunk_bytes=setting.chunk_bytes)
        _all(moving)
        os.fdatasync(self.files["write"])
        return time.perf_counter() - started

    def describe(self, setting: Setting) -> dict[str, int]:
        return asdict(setting) | {"read_bytes": self.nbytes["read"], "write_bytes": self.nbytes["write"]}

    def close(self) -> None:
        self.pool.shutdown()
        for kind, file in self.files.items():
            os.close(file)
            self.paths[kind].unlink(missing_ok=True)

    def _start(self, kind: str, call: SystemCall, *, depth: int, chunk_bytes: int) -> "list[Future[None]]":
        file, nbytes = self.files[kind], self.nbytes[kind]
        buffers = self.targets if kind == "read" else [self.source] * depth

        def move(worker: int, offset: int) -> None:
            with memoryview(buffers[worker]) as view:
                _move(call, file, view[: min(chunk_bytes, nbytes - offset)], offset)

        return _draw(self.pool, depth, range(0, nbytes, chunk_bytes), move)


class BareFiles:
    """Whole files, each from or to memory of its own: `depth` threads, pieces of `chunk_bytes`, in order of file."""

    def __init__(self, *, depth: int, chunk_bytes: int) -> None:
        self.depth, self.chunk_bytes = depth, chunk_bytes
        self.pool = ThreadPoolExecutor(depth)

    def read(self, paths: Sequence[Path], views: Sequence[memoryview], offset: int) -> float:
        """Seconds to fill the memory from these files, each from `offset` on."""
        started = time.perf_counter()
        files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]

        def move(_: int, piece: tuple[int, int]) -> None:
            number, start = piece
            _move(os.preadv, files[number], views[number][start : start + self.chunk_bytes], offset + start)

        _all(_draw(self.pool, self.depth, self._pieces(views), move))
        for file in files:
            os.close(file)
        return time.perf_counter() - started

    def write(self, paths: Sequence[Path], views: Sequence[memoryview], *, sync_at_end: bool) -> float:
        """Seconds to write the memory to these files and sync them: each when it is written, or all at the end."""
        pieces, lock = self._pieces(views), Lock()
        left = Counter(number for number, _ in pieces)
        started = time.perf_counter()
        files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644) for path in paths]
        for file, view in zip(files, views, strict=True):
            if os.fstat(file).st_size < len(view):
                os.posix_fallocate(file, 0, len(view))

        def move(_: int, piece: tuple[int, int]) -> None:
            number, start = piece
            _move(os.pwritev, files[number], views[number][start : start + self.chunk_bytes], start)
            with lock:
                left[number] -= 1
                last = not left[number]
            if last and not sync_at_end:
                os.fdatasync(files[number])

        _all(_draw(self.pool, self.depth, pieces, move))
        for file in files:
            if sync_at_end:
                os.fdatasync(file)
            os.close(file)
        return time.perf_counter() - started

    def close(self) -> None:
        self.pool.shutdown()

    def _pieces(self, views: Sequence[memoryview]) -> list[tuple[int, int]]:
        """(file, where in its memory) of every piece."""
        return [(number, start) for number, view in enumerate(views) for start in range(0, len(view), self.chunk_bytes)]


def _draw(
    pool: ThreadPoolExecutor, depth: int, pieces: Iterable[Piece], move: Callable[[int, Piece], None]
) -> "list[Future[None]]":
    """`depth` workers that draw pieces from one queue; `move(worker, piece)`."""
    queue = iter(pieces)  # `next` on a list's or a range's iterator is atomic

    def work(worker: int) -> None:
        for piece in queue:
            move(worker, piece)

    return [pool.submit(work, worker) for worker in range(depth)]


def _move(call: SystemCall, file: int, view: memoryview, offset: int) -> None:
    if (done := call(file, [view], offset)) != len(view):
        raise OSError(f"{call.__name__} of {len(view)} bytes at {offset} moved {done}")


def _all(futures: "Iterable[Future[None]]") -> None:
    for future in futures:
        future.result()


def _whole_pages(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096
