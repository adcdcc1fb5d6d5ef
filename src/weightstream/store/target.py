"""A place that commits are pushed to and pulled from: a directory, or whatever an fsspec URL names.

No more is asked of it than to write an object, read, list and remove. No object is ever changed. On a local file system
an object is written beside its name, synced, and moved there; elsewhere it is put under its name, which object stores do
whole or not at all. Where a file system leaves half an object, its size tells, and for an index its checksum.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import fsspec
from fsspec.implementations.local import LocalFileSystem

from weightstream.errors import StoreError, WeightstreamError
from weightstream.store.syncing import sync_directory
from weightstream.units import format_bytes

PARTIAL = ".partial"
"""Ends the name of an object that is being written, on a local file system."""

PIECE_BYTES = 16 << 20

_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"})
"""Object stores: there, making a folder would make a bucket of a name that was mistyped."""

Place = Union["Target", str, os.PathLike[str]]
Say = Callable[[str], None]

_SAY_EVERY_S = 5.0


class MissingObjectError(StoreError):
    """An object that is not there."""


class Counted:
    """Bytes moved so far, said now and then."""

    def __init__(self, verb: str, total_bytes: int, say: Say | None) -> None:
        self.done_bytes = 0
        self._verb, self._total_bytes, self._say = verb, total_bytes, say
        self._said = time.monotonic()

    def add(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self._say is not None and time.monotonic() - self._said >= _SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(f"{self._verb} {format_bytes(self.done_bytes)} of {format_bytes(self._total_bytes)}")


class Target:
    """A folder of an fsspec file system. Names of objects count from it and have at most one folder: `segments/x`."""

    def __init__(self, filesystem: Any, path: str, name: str = "") -> None:
        self.filesystem = filesystem
        self.path = path.rstrip("/")
        self.name = name or path
        self.local = isinstance(filesystem, LocalFileSystem)

    @classmethod
    def of(cls, place: Place) -> "Target":
        """The target that a path or URL names.

        Raises:
            StoreError: no such kind of file system, or what it needs is not installed.
        """
        if isinstance(place, Target):
            return place
        text = os.fspath(place)
        if "://" not in text:
            return cls(LocalFileSystem(), str(Path(text).absolute()), text)
        try:
            filesystem, path = fsspec.core.url_to_fs(text)
        except Exception as error:  # each kind of file system has errors of its own
            raise StoreError(
                f"target '{text}': expected a directory or an fsspec URL such as s3://bucket/folder, found {error}; "
                "correct the URL, or install the package that it needs"
            ) from error
        return cls(filesystem, str(path), text)

    def prepare(self, folders: Sequence[str]) -> None:
        """Make the folders, where the file system has such things.

        Raises:
            StoreError: the folders cannot be made.
        """
        protocol = self.filesystem.protocol
        if not _WITHOUT_FOLDERS.isdisjoint((protocol,) if isinstance(protocol, str) else protocol):
            return
        with self._spoken("make the folders", ""):
            for folder in folders:
                self.filesystem.makedirs(f"{self.path}/{folder}", exist_ok=True)
            if self.local:
                sync_directory(Path(self.path))

    def names(self) -> list[str]:
        """What is directly in the target, files and folders; nothing if it does not exist; a file gives its own name."""
        with self._spoken("list", ""):
            self.filesystem.invalidate_cache()
            own = str(self.filesystem._strip_protocol(self.path)).rstrip("/")
            if self.filesystem.isfile(own):
                return [own.rsplit("/", 1)[-1]]
            try:
                entries = self.filesystem.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
            paths = {str(entry).rstrip("/") for entry in entries}
            return sorted(path.rsplit("/", 1)[-1] for path in paths - {own})  # some list a folder in itself

    def sizes(self, folder: str) -> dict[str, int]:
        """Object → bytes, for all in a folder; nothing if it does not exist."""
        with self._spoken("list", folder):
            self.filesystem.invalidate_cache()
            root = str(self.filesystem._strip_protocol(f"{self.path}/{folder}"))
            try:
                found = self.filesystem.find(root, detail=True)
            except FileNotFoundError:
                return {}
            return {f"{folder}/{path[len(root) :].lstrip('/')}": int(info["size"]) for path, info in found.items()}

    def write(self, name: str, pieces: Sequence[memoryview | bytes]) -> int:
        """Put an object of these bytes; gives how many. What was there under its name is replaced."""
        path = f"{self.path}/{name}"
        nbytes = sum(len(piece) for piece in pieces)
        with self._spoken("write", name):
            if self.local:
                _write_local(Path(path), pieces)
            elif nbytes <= PIECE_BYTES:
                self.filesystem.pipe_file(path, b"".join(pieces))
            else:
                self._write_stream(path, pieces)
        return nbytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of an object from `start` to `stop`.

        Raises:
            MissingObjectError: there is no such object.
        """
        with self._spoken("read", name):
            try:
                return bytes(self.filesystem.cat_file(f"{self.path}/{name}", start=start, end=stop))
            except FileNotFoundError as error:
                raise MissingObjectError(f"target '{self.name}': expected an object {name}, found none") from error

    def read_into(self, name: str, view: memoryview) -> int:
        """Fill memory from the start of an object; gives how many bytes there were for it."""
        position = 0
        while position < view.nbytes:
            piece = self.read(name, position, min(position + PIECE_BYTES, view.nbytes))
            view[position : position + len(piece)] = piece
            position += len(piece)
            if not piece:
                break
        return position

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with self._spoken("remove", name):
            try:
                self.filesystem.rm_file(f"{self.path}/{name}")
            except FileNotFoundError:
                pass

    def _write_stream(self, path: str, pieces: Sequence[memoryview | bytes]) -> None:
        handle = self.filesystem.open(path, "wb")
        try:
            for piece in pieces:
                for start in range(0, len(piece), PIECE_BYTES):
                    handle.write(bytes(piece[start : start + PIECE_BYTES]))
        except BaseException:
            # closing would make an object of what was written so far
            try:
                handle.discard()
                handle.closed = True
            except Exception:
                pass
            raise
        handle.close()

    @contextmanager
    def _spoken(self, doing: str, name: str) -> Iterator[None]:
        """Each file system raises errors of its own; a person needs to know at which object and what now."""
        try:
            yield
        except WeightstreamError:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise StoreError(
                f"target '{self.name}': cannot {doing}{f' {name}' if name else ''}: {reason}; see that it can be "
                "reached and has room, then run the command again: it goes on where it stopped"
            ) from error


def _write_local(path: Path, pieces: Sequence[memoryview | bytes]) -> None:
    """Beside its name, synced, then moved there: a file of this name is whole, also after a loss of power."""
    partial = path.with_name(path.name + PARTIAL)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest.nbytes:
                rest = rest[os.write(handle, rest[:PIECE_BYTES]) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    partial.replace(path)
    sync_directory(path.parent)
