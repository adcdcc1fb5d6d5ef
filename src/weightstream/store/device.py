"""The system calls beneath the disk: direct I/O where the file system has it, else buffered, which is said once."""

import errno
import logging
import os
from pathlib import Path

from weightstream.store.layout import ALIGN_PART
from weightstream.store.segments import AlignedBuffer
from weightstream.store.syncing import sync_directory

log = logging.getLogger("weightstream.store")


class Device:
    """The system calls beneath the disk; wrap it to make it slow, full or faulty."""

    def __init__(self) -> None:
        self.direct = hasattr(os, "O_DIRECT")

    def probe(self, directory: Path) -> None:
        """Find out whether direct I/O works there; where it does not, say so once and go on buffered."""
        path = directory / "probe"
        buffer = AlignedBuffer(ALIGN_PART)
        reason = "this system has no O_DIRECT"
        if self.direct:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
                try:
                    os.pwrite(handle, buffer.view, 0)
                    os.preadv(handle, [buffer.view], 0)
                finally:
                    os.close(handle)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.direct, reason = False, "the file system refuses O_DIRECT"
            finally:
                path.unlink(missing_ok=True)
                buffer.close()
        if not self.direct:
            log.warning("store '%s': %s; reading and writing through the page cache", directory.parent, reason)

    def open(self, path: Path, *, write: bool) -> int:
        """A file descriptor, for direct I/O where there is any."""
        flags = (os.O_RDWR | os.O_CREAT) if write else os.O_RDONLY
        if self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o644)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
                log.warning("file '%s': the file system refuses O_DIRECT; going on through the page cache", path)
        return os.open(path, flags, 0o644)

    def allocate(self, handle: int, nbytes: int) -> None:
        """Give the file its full size at once: writes that extend a file are done one at a time by the kernel."""
        if os.fstat(handle).st_size >= nbytes:
            return
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.ftruncate(handle, nbytes)

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        return os.preadv(handle, [view], offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        return os.pwritev(handle, [view], offset)

    def truncate(self, handle: int, nbytes: int) -> None:
        """Cut off what is behind so many bytes."""
        os.ftruncate(handle, nbytes)

    def sync(self, handle: int) -> None:
        """Data, and what of the metadata is needed to read it back, are on the medium."""
        getattr(os, "fdatasync", os.fsync)(handle)

    def close(self, handle: int, *, wrote: bool) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # or the page cache would grow with the store
        os.close(handle)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def links(self, handle: int) -> int:
        """How many names the file has; more than one means that a branch shares it."""
        return os.fstat(handle).st_nlink

    def sync_directory(self, directory: Path) -> None:
        """Names made or removed in the directory are on the medium."""
        sync_directory(directory)
