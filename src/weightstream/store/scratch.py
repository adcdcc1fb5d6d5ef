"""Scratch space: bytes that outlive memory but not the process (staged gradients, spilled activations).

One file under `scratch/`, cut into extents by a first-fit allocator that joins free neighbours, so that ragged sizes do
not make it grow from step to step. Nothing here is checksummed or synced: a crash loses it and nobody misses it.
"""

import threading
from bisect import bisect_left
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightstream.errors import StoreError
from weightstream.store.futures import chain, new_future, settle, when_settled
from weightstream.store.layout import ALIGN_PART
from weightstream.store.tiers import Disk
from weightstream.units import align


@dataclass(eq=False)
class _Item:
    offset: int
    nbytes: int
    space: int
    written: "Future[Any]" = field(default_factory=new_future)
    users: "list[Future[Any]]" = field(default_factory=list)


class Extents:
    """Free space of a file that grows as needed: first fit, neighbours joined."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (offset, nbytes), in order, never adjacent

    def take(self, nbytes: int) -> int:
        """The offset of `nbytes` that nobody uses."""
        for index, (offset, free) in enumerate(self._free):
            if free >= nbytes:
                if free == nbytes:
                    del self._free[index]
                else:
                    self._free[index] = (offset + nbytes, free - nbytes)
                return offset
        if self._free and sum(self._free[-1]) == self.end:
            offset, _ = self._free.pop()
        else:
            offset = self.end
        self.end = offset + nbytes
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """Take back what `take` gave."""
        index = bisect_left(self._free, (offset, 0))
        start, stop = offset, offset + nbytes
        if index < len(self._free) and self._free[index][0] == stop:
            stop += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop - start))


class Scratch:
    """Keys → bytes on disk, for the life of the process."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        self._disk = disk
        self._path = directory / "scratch.bin"
        self._extents = Extents()
        self._items: dict[Hashable, _Item] = {}
        self._lock = threading.Lock()

    @property
    def allocated_bytes(self) -> int:
        """The size that the file has reached."""
        return self._extents.end

    def write(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Keep these bytes under `key`; `view` may be reused when the future is done. Replaces what was there."""
        self.free(key)
        view = view.cast("B")
        space = align(max(view.nbytes, 1), ALIGN_PART)
        with self._lock:
            item = _Item(self._extents.take(space), view.nbytes, space)
            end = self._extents.end
            self._items[key] = item
            item.users.append(item.written)
        return chain(
            (),
            lambda: _to_none(
                self._disk.write(
                    self._path,
                    [(item.offset, view)],
                    "scratch",
                    allocate_bytes=end,
                    digest=False,
                    sync=False,
                    what=key,
                ),
                f"scratch file '{self._path}' could not be written",
            ),
            item.written,
        )

    def read(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Fill `view` with the bytes under `key`, once they are written.

        Raises:
            KeyError: nothing was written under this key, or it was freed.
            ValueError: `view` has another length.
        """
        view = view.cast("B")
        with self._lock:
            if key not in self._items:
                raise KeyError(f"scratch holds nothing under {key!r}")
            item = self._items[key]
            if view.nbytes != item.nbytes:
                raise ValueError(f"scratch holds {item.nbytes} bytes under {key!r}, the view has {view.nbytes}")
            out: Future[None] = new_future()
            item.users.append(out)

        def start() -> "Future[None]":
            item.written.result()
            return _to_none(
                self._disk.read(self._path, [(item.offset, view)], "scratch", digest=False, what=key),
                f"scratch file '{self._path}' could not be read",
            )

        return chain([item.written], start, out)

    def free(self, key: Hashable) -> None:
        """Forget the bytes under `key`; their space is used again once reads that are under way have ended."""
        with self._lock:
            item = self._items.pop(key, None)
        if item is not None:
            when_settled(item.users, lambda: self._release(item))

    def _release(self, item: _Item) -> None:
        with self._lock:
            self._extents.give(item.offset, item.space)


def _to_none(future: "Future[list[int]]", failing: str) -> "Future[None]":
    out: Future[None] = new_future()

    def finish(finished: "Future[list[int]]") -> None:
        try:
            finished.result()
        except OSError as error:
            raise StoreError(
                f"{failing}: {error.strerror}; the last commit is whole, make room on the disk and run again"
            ) from error

    future.add_done_callback(lambda finished: settle(out, lambda: finish(finished)))
    return out
