"""The time that a step's bytes take by bare direct I/O: what no streaming from this disk can beat.

`preadv` and `pwritev` with O_DIRECT on preallocated files, from threads, reads and writes together, the fastest over
queue depths and chunk sizes. The files are written once in full before anything is timed, so that no block is allocated
(and no read served from a hole) while the clock runs; nothing is left in the page cache. What was written is synced
(fdatasync) within the time, since the store must sync too.
"""

import mmap
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

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
        for kind, path in self.paths.items():
            self.files[kind] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            os.posix_fallocate(self.files[kind], 0, max(self.nbytes[kind], 1))
            self._transfer(kind, os.pwritev, depth=4, chunk_bytes=4 * MIB)
            os.fsync(self.files[kind])

    def measure(self, setting: Setting) -> float:
        """Seconds for all the bytes, reads and writes at once, until the writes are synced."""
        threads = []
        started = time.perf_counter()
        for kind, call, depth in (("read", os.preadv, setting.read_depth), ("write", os.pwritev, setting.write_depth)):
            threads += self._start(kind, call, depth=depth, chunk_bytes=setting.chunk_bytes)
        for thread in threads:
            thread.join()
        os.fdatasync(self.files["write"])
        return time.perf_counter() - started

    def describe(self, setting: Setting) -> dict[str, int]:
        return asdict(setting) | {"read_bytes": self.nbytes["read"], "write_bytes": self.nbytes["write"]}

    def close(self) -> None:
        for kind, file in self.files.items():
            os.close(file)
            self.paths[kind].unlink(missing_ok=True)

    def _transfer(self, kind: str, call, *, depth: int, chunk_bytes: int) -> None:
        for thread in self._start(kind, call, depth=depth, chunk_bytes=chunk_bytes):
            thread.join()

    def _start(self, kind: str, call, *, depth: int, chunk_bytes: int) -> list[Thread]:
        file, nbytes = self.files[kind], self.nbytes[kind]
        chunks = iter(range(0, nbytes, chunk_bytes))  # `next` on it is atomic: threads draw from one queue

        def run(buffer: mmap.mmap) -> None:
            with memoryview(buffer) as view:
                for offset in chunks:
                    wanted = min(chunk_bytes, nbytes - offset)
                    if (done := call(file, [view[:wanted]], offset)) != wanted:
                        raise OSError(f"{kind} of {wanted} bytes at {offset} moved {done}")

        buffers = self.targets if kind == "read" else [self.source] * depth
        threads = [Thread(target=run, args=(buffers[index],)) for index in range(depth)]
        for thread in threads:
            thread.start()
        return threads


def _whole_pages(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096
