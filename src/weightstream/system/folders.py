"""Folders that last as long as a process, and are removed by a later one if it was killed.

Who has a folder holds a lock on `owner` in it, which the kernel lets go when the process ends, however it does.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNER = "owner"
_MEMORY = Path("/dev/shm")
_MEMORY_PREFIX = "weightstream-memory-"


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder beside other temporary ones; those of the same prefix that killed processes left are removed."""
    parent = Path(tempfile.gettempdir())
    for folder in _own(parent, prefix):
        _remove_left(folder)
    # a name that nobody looks for until it is locked
    new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    handle = _lock(new)
    assert handle is not None, "nobody else knows of it"
    folder = new.rename(parent / new.name.removeprefix("."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextmanager
def memory_folder(store: Path) -> Iterator[Path | None]:
    """A folder in memory for the ranks that work on a store. What a killed process left for the same store is still there;
    what one left for a store that is gone is removed. None where there is no memory file system, or another process has
    the folder."""
    if not (_MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)):
        yield None
        return
    name = _MEMORY_PREFIX + hashlib.sha256(os.fsencode(store.absolute())).hexdigest()[:16]
    for other in _own(_MEMORY, _MEMORY_PREFIX):
        if other.name != name and not _store_of(other).is_dir():
            _remove_left(other)
    folder = _MEMORY / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        yield None
        return
    handle = _lock(folder) if folder in _own(_MEMORY, name) else None
    if handle is None:
        yield None
        return
    os.pwrite(handle, os.fsencode(store.absolute()), 0)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _own(parent: Path, prefix: str) -> list[Path]:
    """This user's folders of that prefix; a link to one is none."""
    found = []
    for path in parent.glob(f"{prefix}*"):
        try:
            facts = path.lstat()
        except OSError:
            continue
        if facts.st_uid == os.getuid() and path.is_dir() and not path.is_symlink():
            found.append(path)
    return found


def _lock(folder: Path) -> int | None:
    """A handle that holds the lock; None if another process does."""
    handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_left(folder: Path) -> None:
    """Remove a folder whose owner is gone."""
    try:
        handle = _lock(folder)
    except OSError:  # it is being removed
        return
    if handle is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _store_of(folder: Path) -> Path:
    try:
        return Path(os.fsdecode((folder / _OWNER).read_bytes()))
    except OSError:
        return folder  # it is being made or removed
