"""The two tiers that records live in: the disk, through direct I/O, and memory.

The disk is two thread pools, one for reads and one for writes, each first in first out. A transfer is cut into chunks,
so that one record alone fills the queue; small pieces that are neighbours in the file are moved in one call. Each chunk
is checked (xxh3_64) in the thread that moves it, while it is in the cache, unless the caller sees to that
(`checksums.py`). Python holds its lock in none of this: `preadv`, `pwritev`, xxhash and memmove all let it go.
"""

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError
from weightstream.store.checksums import part_checksums
from weightstream.store.device import Device
from weightstream.store.futures import gather, new_future, settle
from weightstream.store.layout import ALIGN_PART
from weightstream.store.segments import AlignedBuffer, address
from weightstream.trace.recorder import NO_LOG, Log
from weightstream.units import align

log = logging.getLogger("weightstream.store")

Extent = tuple[int, memoryview]
"""Where bytes lie in a file (a multiple of 4,096) and where they lie in memory."""

CHUNK_BYTES = 4 << 20
RUN_BYTES = 1 << 20
"""Neighbours are moved together up to so many bytes."""
DEEP = 32
"""Reads at a time where many small records are wanted at once."""

# A memmove that releases the interpreter's lock, which a memoryview assignment does not.
_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)

URGENT_KINDS = frozenset({"copy", "scratch"})  # streamed copies, staged gradients, activations
URGENT_DEPTH = 3


class Traffic:
    """What a tier has moved: bytes by kind and direction, and the seconds in which at least one operation ran.

    Args:
        resource: what it is called in notes; default: `read` and `write`, each by itself.
    """

    def __init__(self, resource: str | None = None) -> None:
        self.log: Log = NO_LOG
        self._resource = resource
        self.read_bytes: Counter[str] = Counter()
        self.written_bytes: Counter[str] = Counter()
        self.busy_s = {"read": 0.0, "write": 0.0}
        self._active = {"read": 0, "write": 0}
        self._since = {"read": 0.0, "write": 0.0}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def operation(self, direction: str, kind: str, nbytes: int, what: Hashable = None) -> Any:
        """Count and note one operation and the time it takes; bytes count when it succeeds."""
        began_s = time.perf_counter()
        with self._lock:
            if self._active[direction] == 0:
                self._since[direction] = began_s
            self._active[direction] += 1
        moved = 0
        try:
            yield
            moved = nbytes
        finally:
            ended_s = time.perf_counter()
            self.log.note(kind, what, self._resource or direction, began_s, ended_s, moved)
            with self._lock:
                self._active[direction] -= 1
                if self._active[direction] == 0:
                    self.busy_s[direction] += ended_s - self._since[direction]
                (self.read_bytes if direction == "read" else self.written_bytes)[kind] += moved


@dataclass
class _Transfer:
    """One read or write of several extents of a file, while its chunks are on their way."""

    path: Path
    kind: str
    extents: Sequence[Extent]
    write: bool
    digest: bool
    sync: bool = False
    allocate_bytes: int = 0
    recycle: bool = False
    exact: bool = False
    what: Hashable = None
    chunks: list[tuple[int, int, memoryview]] = field(default_factory=list)  # (extent, file offset, memory)
    moves: list[range] = field(default_factory=list)  # chunks that one call moves
    digests: list[bytes] = field(default_factory=list)
    handle: int | None = None
    remaining: int = 0
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    future: "Future[list[int]]" = field(default_factory=new_future)


class Disk:
    """Direct reads and writes of whole extents, in the background, in order of issue; fetches before loads.

    Four requests at a time fill an NVMe disk; two more threads keep it so while others check what they have moved.
    """

    def __init__(
        self,
        read_depth: int = 6,
        write_depth: int = 6,
        chunk_bytes: int = CHUNK_BYTES,
        device: Device | None = None,
    ) -> None:
        if chunk_bytes <= 0 or chunk_bytes % ALIGN_PART:
            raise ValueError(f"chunk_bytes must be a positive multiple of {ALIGN_PART}, found {chunk_bytes}")
        self.chunk_bytes = chunk_bytes
        self.device = device or Device()
        self.traffic = Traffic()
        self._run_bytes = min(RUN_BYTES, chunk_bytes)
        self._readers = ThreadPoolExecutor(read_depth, thread_name_prefix="store-read")
        # what compute waits for next must not queue behind records that are read far ahead
        self._urgent = ThreadPoolExecutor(URGENT_DEPTH, thread_name_prefix="store-fetch")
        self._writers = ThreadPoolExecutor(write_depth, thread_name_prefix="store-write")
        self._deep: ThreadPoolExecutor | None = None  # few stores ever need so many threads
        self._bounce = threading.local()

    def read(
        self,
        path: Path,
        extents: Sequence[Extent],
        kind: str,
        *,
        digest: bool = True,
        deep: bool = False,
        what: Hashable = None,
    ) -> "Future[list[int]]":
        """Fill each extent's memory from the file; the future gives the checksum of each (0 without `digest`).

        The memory may lie anywhere and have any length; what is not page-aligned goes through a bounce buffer. With
        `deep` up to 32 calls are under way at a time, as many small reads in different places need. `what` says in notes
        which unit or key it is for.

        Raises (in the future):
            DamagedRecordError: the file ends too early.
            OSError: the system could not read.
        """
        if deep and self._deep is None:
            self._deep = ThreadPoolExecutor(DEEP, thread_name_prefix="store-deep")
        pool = self._deep if deep and self._deep else self._urgent if kind in URGENT_KINDS else self._readers
        return self._issue(_Transfer(path, kind, extents, write=False, digest=digest, what=what), pool)

    def write(
        self,
        path: Path,
        extents: Sequence[Extent],
        kind: str,
        *,
        allocate_bytes: int,
        digest: bool = True,
        sync: bool = True,
        recycle: bool = False,
        exact: bool = False,
        what: Hashable = None,
    ) -> "Future[list[int]]":
        """Write each extent to a file of at least `allocate_bytes`; done when synced. Gives the checksum of each.

        With `recycle`, a file that has other hard links is left to them and a new one takes its name; with `exact`, a
        file that is longer is cut off.

        Raises (in the future):
            OSError: the system could not write, for example for want of space.
        """
        transfer = _Transfer(path, kind, extents, True, digest, sync, allocate_bytes, recycle, exact, what)
        return self._issue(transfer, self._writers)

    def close(self) -> None:
        """Finish what was issued and end the threads."""
        self._readers.shutdown(wait=True)
        self._urgent.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        if self._deep is not None:
            self._deep.shutdown(wait=True)

    def _issue(self, transfer: _Transfer, pool: ThreadPoolExecutor) -> "Future[list[int]]":
        for index, (offset, view) in enumerate(transfer.extents):
            for start in range(0, view.nbytes, self.chunk_bytes):
                transfer.chunks.append((index, offset + start, view[start : start + self.chunk_bytes]))
        transfer.moves = self._moves(transfer)
        transfer.remaining = len(transfer.moves)
        transfer.digests = [b""] * len(transfer.chunks)
        if not transfer.chunks:
            # a record of empty tensors: its parts have the checksum of nothing, as when they were written
            transfer.future.set_result(self._checksums(transfer))
        for move in transfer.moves:
            pool.submit(self._run_move, transfer, move)
        return transfer.future

    def _moves(self, transfer: _Transfer) -> list[range]:
        """Chunks that follow one another in the file, together up to the bound; each at least by itself."""
        moves: list[range] = []
        first, total, end = 0, 0, -1
        for number, (_, offset, view) in enumerate(transfer.chunks):
            if number and (offset != end or end % ALIGN_PART or total + view.nbytes > self._run_bytes):
                moves.append(range(first, number))
                first, total = number, 0
            total, end = total + view.nbytes, offset + view.nbytes
        return [*moves, range(first, len(transfer.chunks))] if transfer.chunks else []

    def _run_move(self, transfer: _Transfer, move: range) -> None:
        if transfer.error is None:
            nbytes = sum(transfer.chunks[number][2].nbytes for number in move)
            try:
                direction = "write" if transfer.write else "read"
                with self.traffic.operation(direction, transfer.kind, nbytes, transfer.what):
                    self._move(transfer, move, nbytes)
            except BaseException as error:
                transfer.error = error
        with transfer.lock:
            transfer.remaining -= 1
            if transfer.remaining:
                return
        settle(transfer.future, lambda: self._finish(transfer))

    def _move(self, transfer: _Transfer, move: range, nbytes: int) -> None:
        handle = self._open(transfer)
        offset = transfer.chunks[move[0]][1]
        views = [transfer.chunks[number][2] for number in move]
        whole = _joined(views)
        direct = whole
        if direct is None or (self.device.direct and (nbytes % ALIGN_PART or address(direct) % ALIGN_PART)):
            direct = self._bounce_view(align(nbytes, ALIGN_PART) if self.device.direct else nbytes)
        if transfer.write:
            self._digest(transfer, move, views)
            if direct is not whole:
                _gathered(views, direct, into=True)
            self._all_of(transfer.path, self.device.write, handle, direct, offset)
        else:
            self._all_of(transfer.path, self.device.read, handle, direct, offset)
            if direct is not whole:
                _gathered(views, direct, into=False)
            self._digest(transfer, move, views)

    def _digest(self, transfer: _Transfer, move: range, views: Sequence[memoryview]) -> None:
        if transfer.digest:
            for number, view in zip(move, views, strict=True):
                transfer.digests[number] = xxhash.xxh3_64_digest(view)

    def _all_of(
        self, path: Path, call: Callable[[int, memoryview, int], int], handle: int, view: memoryview, offset: int
    ) -> None:
        """Repeat a system call until all bytes are moved; the kernel may move fewer at a time."""
        position = 0
        while position < view.nbytes:
            moved = call(handle, view[position:] if position else view, offset + position)
            if moved <= 0:
                raise DamagedRecordError(
                    f"file '{path}': expected {view.nbytes} bytes at offset {offset}, found {position}; the file was "
                    "cut short, restore it from a snapshot or a copy"
                )
            position += moved

    def _open(self, transfer: _Transfer) -> int:
        with transfer.lock:
            if transfer.handle is None:
                handle = self.device.open(transfer.path, write=transfer.write)
                if transfer.recycle and self.device.links(handle) > 1:
                    os.close(handle)
                    self.device.unlink(transfer.path)
                    handle = self.device.open(transfer.path, write=True)
                    self.device.sync_directory(transfer.path.parent)
                transfer.handle = handle
                if transfer.write:
                    self.device.allocate(handle, transfer.allocate_bytes)
                    if transfer.exact and os.fstat(handle).st_size > transfer.allocate_bytes:
                        self.device.truncate(handle, transfer.allocate_bytes)
            return transfer.handle

    def _finish(self, transfer: _Transfer) -> list[int]:
        if transfer.handle is not None:
            try:
                if transfer.sync and transfer.error is None:
                    with self.traffic.operation("write", transfer.kind, 0, transfer.what):
                        self.device.sync(transfer.handle)
            finally:
                self.device.close(transfer.handle, wrote=transfer.write)
        if transfer.error is not None:
            raise transfer.error
        return self._checksums(transfer)

    def _checksums(self, transfer: _Transfer) -> list[int]:
        if not transfer.digest:
            return [0] * len(transfer.extents)
        return part_checksums(len(transfer.extents), (index for index, _, _ in transfer.chunks), transfer.digests)

    def _bounce_view(self, nbytes: int) -> memoryview:
        """This thread's own aligned memory, for what direct I/O cannot move where it lies."""
        if not hasattr(self._bounce, "buffer") or self._bounce.buffer.nbytes < nbytes:
            self._bounce.buffer = AlignedBuffer(max(nbytes, self._run_bytes))
        view: memoryview = self._bounce.buffer.view
        return view[:nbytes]


def _joined(views: Sequence[memoryview]) -> memoryview | None:
    """One view of them all, where they are neighbours in memory."""
    if len(views) == 1:
        return views[0]
    start = end = address(views[0])
    for view in views:
        if address(view) != end:
            return None
        end += view.nbytes
    # keeps no memory alive by itself: the transfer holds the views that do
    return memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B")


def _gathered(views: Sequence[memoryview], whole: memoryview, *, into: bool) -> None:
    """Copy pieces into a whole, one after another, or out of it."""
    position = address(whole)
    for view in views:
        target, source = (position, address(view)) if into else (address(view), position)
        _memmove(target, source, view.nbytes)
        position += view.nbytes


class Memory:
    """Work on memory in the background: copies of pinned parts, and parts made by the generator.

    Its own threads, so that a record that needs no disk does not queue behind those that do.
    """

    def __init__(self, threads: int = 2, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.traffic = Traffic("memory")
        self.chunk_bytes = chunk_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="store-memory")

    def copy(
        self, source: memoryview, target: memoryview, kind: str, *, write: bool, what: Hashable = None
    ) -> "Future[None]":
        """Copy bytes; `write` tells into the tier from out of it."""
        assert source.nbytes == target.nbytes
        direction = "write" if write else "read"
        tasks = []
        for start in range(0, source.nbytes, self.chunk_bytes):
            stop = start + self.chunk_bytes
            tasks.append(partial(self._copy, source[start:stop], target[start:stop], kind, direction, what))
        return self.run(tasks)

    def run(self, tasks: Sequence[Callable[[], None]]) -> "Future[None]":
        """Run every task in the pool; done when all are."""
        out: Future[None] = new_future()

        def finish(finished: "Future[Any]") -> None:
            settle(out, lambda: finished.result() and None)

        gather([self._pool.submit(task) for task in tasks]).add_done_callback(finish)
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _copy(self, source: memoryview, target: memoryview, kind: str, direction: str, what: Hashable) -> None:
        with self.traffic.operation(direction, kind, source.nbytes, what):
            _memmove(address(target), address(source), source.nbytes)
