"""Memory of pinned parts that outlives the process.

Ranks that are started anew after a loss had the RAM tier in memory a moment ago. Where their launcher names a folder on a
memory file system (`LASTING_VARIABLE` in the environment), a pinned part is a file there, mapped shared, and the next process
finds it. Whether that is the version which the last commit holds is told by the checksum that the commit has of the part:
neither a copy that was cut short nor a step that was undone can pass. What does not pass is read from the disk.
"""

import logging
import mmap
import os
from pathlib import Path

from weightstream.cluster import LASTING_VARIABLE
from weightstream.store.layout import ALIGN_PART
from weightstream.store.segments import AlignedBuffer
from weightstream.units import align

log = logging.getLogger("weightstream.store")


class LastingBuffer(AlignedBuffer):
    """Memory that is a file; `found` is whether it was there already.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.nbytes, self._path = nbytes, path
        rounded = align(max(nbytes, 1), ALIGN_PART)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self.found = os.fstat(handle).st_size == rounded
            if not self.found:
                os.ftruncate(handle, 0)
            # here and now: a page for which there is no room when it is touched would kill the process
            os.posix_fallocate(handle, 0, rounded)
            self._map = mmap.mmap(handle, rounded)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(handle)
        self.view = memoryview(self._map)[:nbytes]

    def discard(self) -> None:
        """No later process needs it."""
        self._path.unlink(missing_ok=True)


class LastingMemory:
    """The memory of one store's pinned parts: files where the environment names a folder, else the process's own."""

    def __init__(self, store_id: str) -> None:
        named = os.environ.get(LASTING_VARIABLE)
        self._folder = Path(named) if named and hasattr(os, "posix_fallocate") else None
        self._store_id = store_id

    def buffer(self, index: int, part: str, nbytes: int) -> AlignedBuffer:
        """Memory for a part of a record; what it holds is for the caller to find out."""
        if self._folder is not None:
            try:
                return LastingBuffer(self._folder / f"{self._store_id}-{index:05d}-{part}", nbytes)
            except OSError as error:
                log.warning("pinned parts from record %d on will not outlive this process: %s", index, error)
                self._folder = None
        return AlignedBuffer(nbytes)
