"""A disk that remembers what lay on it before each call, and disks that are full or cannot be read.

One run gives every crash. Before each call that can change a file (of the device, of the manifest's SQLite, and the few
that the store makes beside both) the recorder keeps a `Moment`: all files and names as they are then. That is what a
process that dies there leaves behind, so a crash is tried by laying a moment's files down in a new directory and opening
them. Nothing depends on threads taking the same turns in every run: each moment carries what may be found at it, and
every one of a run is tried.

A moment also keeps what was on the medium for certain: of each file its contents since it was last synced, of each
directory its names when it was last synced. That is what a loss of power leaves to chance.

Of SQLite's own files (`manifest*`) only the names that the store itself makes are left to chance. Their contents are
taken as they are at the moment: SQLite promises that a COMMIT that has returned outlives a loss of power and that one
that has not is there as a whole or not at all, and this is relied upon. Both outcomes of a COMMIT are moments: the one
before it and the one after it.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.store.cases import Wrapped

from weightstream.store.device import Device

SECTOR_BYTES = 512
PAGE_BYTES = 4096

Image = Mapping[str, "tuple[int, bytes] | None"]
"""Files by path: (which file, contents), None for a directory. A file under two paths has two hard links."""

_CALLS = ("open", "mkdir", "rmdir", "unlink", "rename", "ftruncate", "pwrite", "fsync", "fdatasync")


@dataclass(frozen=True)
class Moment:
    """The disk before one call. `expected` is whatever the run said may be found."""

    call: str
    names: Mapping[str, int]
    synced_names: Mapping[str, int]
    versions: Mapping[int, tuple[bytes, ...]]  # file → its contents since its last sync, the synced ones first
    expected: Any

    def image(self) -> Image:
        """What a process that dies here leaves behind."""
        return {
            path: (file, self.versions[file][-1]) if file in self.versions else None
            for path, file in self.names.items()
        }

    def key(self) -> Any:
        """Equal moments need to be tried once. The index of the write-ahead log is made anew by who opens it."""
        image = {path: found for path, found in self.image().items() if not path.endswith("-shm")}
        return frozenset((path, found and found[1]) for path, found in image.items()), self.expected


class Recorder:
    """Keeps a moment before every call on the files below `root`, from any thread; calls happen one at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self.expected: Any = None
        self.failures: list[BaseException] = []
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._numbers: dict[str, int] = {}  # path → inode; an inode may be given to another file once it is free
        self._synced_names: dict[str, int] = {}
        self._versions: dict[int, tuple[bytes, ...]] = {}
        self._files = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Whatever runs inside is recorded: SQLite by its statements, and calls beside the device."""
        connect = sqlite3.connect

        def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            connection.set_trace_callback(lambda statement: self.before(f"SQL {_kind(statement)}"))
            return connection

        with (
            mock.patch.object(sqlite3, "connect", connected),
            mock.patch.multiple(os, **{name: self._watched(name, getattr(os, name)) for name in _CALLS}),
        ):
            self._look()
            self._synced_names = dict(self._names)
            yield
            self.before("end")
        assert not self.failures, self.failures

    def device(self) -> "Recorded":
        """A device whose calls are recorded."""
        return Recorded(self)

    def before(self, call: str) -> None:
        """Keep the moment before this call."""
        with self._lock:
            try:
                self._look()
                self._keep(call, self._versions)
            except BaseException as error:  # SQLite would swallow it
                self.failures.append(error)

    def before_half(self, call: str, handle: int, view: memoryview, offset: int) -> None:
        """Keep the moment at which half of these bytes are written."""
        with self._lock:
            self._look()
            file = self._of_handle(handle)
            assert file is not None, "written files lie below the root"
            half = bytes(view[: view.nbytes // 2 // SECTOR_BYTES * SECTOR_BYTES])
            whole = self._versions[file][-1]
            torn = whole[:offset].ljust(offset, b"\0") + half + whole[offset + len(half) :]
            self._keep(f"{call}, half of it", self._versions | {file: (*self._versions[file], torn)})

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """A call and the moment before it, undisturbed by other threads."""
        with self._lock:
            yield

    def _keep(self, call: str, versions: Mapping[int, tuple[bytes, ...]]) -> None:
        self.moments.append(Moment(call, dict(self._names), dict(self._synced_names), dict(versions), self.expected))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.before(f"os.{name}")
                result = real(*arguments, **options)
                if name in ("fsync", "fdatasync"):
                    self._synced(arguments[0])
                return result

        return call

    def _look(self) -> None:
        """Take in what is on the disk by looking, so that nothing that reached it can be missed."""
        names: dict[str, int] = {}
        numbers: dict[str, int] = {}
        known = {number: self._names[path] for path, number in self._numbers.items()}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            numbers[name] = number = path.lstat().st_ino
            if number not in known:
                self._files += 1
                known[number] = self._files
            names[name] = file = known[number]
            if path.is_dir():
                continue
            contents = path.read_bytes()  # lets SQLite's file locks go, which nobody else asks for here
            before = self._versions.get(file, (contents if _is_sqlite(name) else b"",))
            if before[-1] != contents:
                before = (contents,) if _is_sqlite(name) else (*before, contents)
            self._versions[file] = before
        self._names, self._numbers = names, numbers

    def _synced(self, handle: int) -> None:
        """What lies in this file, or the names in this directory, are on the medium from now on."""
        self._look()
        file = self._of_handle(handle)
        if file in self._versions:
            self._versions[file] = self._versions[file][-1:]
        elif file is not None or _same(handle, self.root):
            (directory,) = [path for path, found in self._names.items() if found == file] or ["."]
            inside = {path: found for path, found in self._names.items() if _parent(path) == directory}
            outside = {path: found for path, found in self._synced_names.items() if _parent(path) != directory}
            self._synced_names = outside | inside

    def _of_handle(self, handle: int) -> int | None:
        number = os.fstat(handle).st_ino
        return next((self._names[path] for path, found in self._numbers.items() if found == number), None)


class Recorded(Wrapped):
    """A device that tells the recorder of each call, and of each write also when half of it is done."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            with self._recorder.one_at_a_time():
                self._recorder.before(f"Device.{name}")
                return found(*arguments, **options)

        return call

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        with self._recorder.one_at_a_time():
            self._recorder.before("Device.write")
            self._recorder.before_half("Device.write", handle, view, offset)
            return self._device.write(handle, view, offset)


def device_calls() -> set[str]:
    """Every method that a device has."""
    return {f"Device.{name}" for name in vars(Device) if not name.startswith("_")}


def lay_down(image: Image, directory: Path) -> None:
    """Make the files of an image; what the image gives under two paths becomes one file with two names."""
    made: dict[int, Path] = {}
    for name, found in sorted(image.items()):
        path = directory / name
        if found is None:
            path.mkdir()
        elif found[0] in made:
            path.hardlink_to(made[found[0]])
        else:
            path.write_bytes(found[1])
            made[found[0]] = path


def left_to_chance(moment: Moment) -> tuple[list[str], dict[int, int]]:
    """What a loss of power decides: names that differ from those on the medium, and files (with the number of contents
    that they had since their last sync) that were written and not synced."""
    both = sorted(moment.names.keys() | moment.synced_names.keys())
    names = [
        path for path in both if not _is_sqlites_own(path) and moment.names.get(path) != moment.synced_names.get(path)
    ]
    return names, {file: len(versions) for file, versions in moment.versions.items() if len(versions) > 1}


def after_power_loss(
    moment: Moment, name_survives: Callable[[str], bool], version_of: Callable[[int, int | None], int]
) -> Image:
    """What is there when power comes back.

    `name_survives` decides for each path whether what became of it since its directory was synced (made, removed, given
    to another file) is on the medium; a rename is two of these, harsher than file systems are. `version_of` decides for
    each sector of a file, and for its length (sector None), from which of its contents since its last sync it is.
    """
    chosen: dict[str, int] = {}
    for path in sorted(moment.names.keys() | moment.synced_names.keys()):
        current, synced = moment.names.get(path), moment.synced_names.get(path)
        if _is_sqlites_own(path) or current == synced or name_survives(path):
            found = current
        else:
            found = synced
        if found is not None and (_parent(path) in chosen or _parent(path) == "."):
            chosen[path] = found
    return {
        path: (file, _mixed(moment.versions[file], file, version_of)) if file in moment.versions else None
        for path, file in chosen.items()
    }


def _mixed(versions: tuple[bytes, ...], file: int, version_of: Callable[[int, int | None], int]) -> bytes:
    if len(versions) == 1:
        return versions[0]
    nbytes = len(versions[version_of(file, None)])
    sectors = []
    for start in range(0, nbytes, SECTOR_BYTES):
        stop = min(start + SECTOR_BYTES, nbytes)
        found = versions[version_of(file, start // SECTOR_BYTES)][start:stop]
        sectors.append(found.ljust(stop - start, b"\0"))  # what was never written reads as zeros
    return b"".join(sectors)


# Disks that fail.


class Filling(Wrapped):
    """A disk with room for so many more bytes, taken by growing files, or (`by="write"`) by every byte written, as where
    overwriting takes new space. None: as much as is wanted. Counts all files, or `only` those of one name."""

    def __init__(self, by: str = "allocate", *, only: str | None = None) -> None:
        super().__init__()
        self.by, self.only = by, only
        self._counted: dict[int, bool] = {}  # handle → whether its file is counted
        self.room_bytes: int | None = None
        self.refused = 0
        self._lock = threading.Lock()

    def open(self, path: Path, *, write: bool) -> int:
        handle = self._device.open(path, write=write)
        self._counted[handle] = self.only in (None, path.name)
        return handle

    def allocate(self, handle: int, nbytes: int) -> None:
        if self.by == "allocate" and self._counted[handle]:
            self._take(max(0, nbytes - os.fstat(handle).st_size))
        self._device.allocate(handle, nbytes)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        taken = view.nbytes
        if self.by == "write" and self._counted[handle]:
            taken = self._take(view.nbytes, unit=PAGE_BYTES)
        return self._device.write(handle, view[:taken], offset)

    def _take(self, wanted: int, unit: int | None = None) -> int:
        """How many bytes there is room for: all, or whole units of them, as the kernel writes what fits."""
        with self._lock:
            if self.room_bytes is None:
                return wanted
            taken = min(wanted, self.room_bytes // unit * unit if unit else wanted)
            if taken > self.room_bytes or (wanted and not taken):
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room_bytes -= taken
            return taken


class Unreadable(Wrapped):
    """Reads fail once `broken` is set."""

    broken = False

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._device.read(handle, view, offset)


@dataclass
class Statements:
    """Fails one of the manifest's statements that change something, by its number; `after` it was carried out (but
    for BEGIN, which writes nothing) or before."""

    fail_at: int | None = None
    after: bool = False
    unreadable: bool = False  # every SELECT fails, and ends its transaction, as where the log's index finds no room
    seen: list[str] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Connections that are opened inside are watched."""
        statements, connect = self, sqlite3.connect

        class Watched(sqlite3.Connection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                if statement.startswith("SELECT"):
                    if statements.unreadable:
                        if self.in_transaction:
                            super().execute("ROLLBACK")
                        error = sqlite3.OperationalError("database or disk is full")
                        error.sqlite_errorcode = sqlite3.SQLITE_FULL
                        raise error
                    return super().execute(statement, *arguments)
                statements.seen.append(_kind(statement))
                fails = len(statements.seen) - 1 == statements.fail_at
                if fails and (not statements.after or statement.startswith("BEGIN")):
                    raise sqlite3.OperationalError("database or disk is full")
                done = super().execute(statement, *arguments)
                if fails:
                    raise sqlite3.OperationalError("disk I/O error")
                return done

        def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
            return connect(*arguments, factory=Watched, **options)

        with mock.patch.object(sqlite3, "connect", connected):
            yield


def _kind(statement: str) -> str:
    """A statement without its values: its verb and its table."""
    words = statement.split()
    verb = words[0].upper()
    if verb == "SELECT":
        return f"SELECT {words[words.index('FROM') + 1]}"
    if verb in ("INSERT", "DELETE", "CREATE"):
        return " ".join(words[:3])
    return " ".join(words[:2]).split("=")[0] if verb in ("PRAGMA", "BEGIN") else verb


def _is_sqlite(name: str) -> bool:
    return Path(name).name.startswith("manifest")


def _is_sqlites_own(name: str) -> bool:
    """The journals, which SQLite makes, syncs and removes; the name of the database is the store's doing."""
    return _is_sqlite(name) and "-" in Path(name).name


def _parent(name: str) -> str:
    return str(Path(name).parent)


def _same(handle: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(handle), path.stat())
