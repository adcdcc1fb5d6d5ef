"""Pull: make a store of the commit that a target holds.

Everything is compared with its checksum before it is written, and the manifest comes last, so that the directory is a
store only when it is whole. A pull that was cut short goes on with the records that are there.
"""

import os
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store import directory
from weightstream.store.checksums import checksums
from weightstream.store.directory import SHARED
from weightstream.store.facts import masks_of, units_of
from weightstream.store.families import Family, Layouts
from weightstream.store.manifest import Manifest
from weightstream.store.many import extents_of
from weightstream.store.optimizers import Optimizer
from weightstream.store.pushed import FILES, Index, PushedFile, PushedRecord, newest
from weightstream.store.records import Entry, file_name
from weightstream.store.rows import RecordRow, SharedRow
from weightstream.store.segments import RecordBuffer
from weightstream.store.shared import WholeFile, whole_files
from weightstream.store.target import Counted, MissingObjectError, Place, Say, Target
from weightstream.store.tiers import Disk
from weightstream.units import format_bytes

_NOTE = "pull.unfinished"  # there until the pull has ended
_STAGED = "pull.sqlite"  # the manifest, before it is moved to its name
_PULLING = "pull."
_SLOT = "a"


def pull(target: Place, path: str | os.PathLike[str], *, say: Say | None = None) -> dict[str, Any]:
    """Make a store of the commit that a target holds; gives what was received, in records and bytes.

    Args:
        target: a directory or an fsspec URL that a store was pushed to.
        path: a new or empty directory, or one where a pull was interrupted.

    Raises:
        StoreError: the directory holds something else or lacks room, or nothing was pushed to the target.
        DamagedRecordError: a record at the target is missing or not what was pushed; no store is made.
    """
    place, where = Target.of(target), Path(path)
    _require_new(where)
    index = _pushed(place)
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / _NOTE).write_text("A pull is under way here, or was interrupted; run it again.\n")
    except OSError as error:
        raise StoreError(f"'{where}': a store cannot be made there: {error.strerror}; give another path") from error
    lock = directory.lock(where)
    try:
        while True:
            _require_new(where)
            attempt = _Attempt(place, index, where, say)
            try:
                return attempt.run()
            except MissingObjectError as error:
                # a push that ended meanwhile has removed it, else it was lost
                before, index = index, _pushed(place)
                if index.serial == before.serial:
                    raise DamagedRecordError(
                        f"{error}, though {index.name} names it; push again from the store"
                    ) from error
            finally:
                attempt.close()
    except OSError as error:
        raise StoreError(
            f"'{where}' could not be written: {error.strerror}; make room on the disk and pull again: it goes on with "
            "what is there"
        ) from error
    finally:
        directory.unlock(lock)


def _pushed(target: Target) -> Index:
    index = newest(target)
    if index is None:
        names = target.names()
        found = f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else "nothing"
        raise StoreError(
            f"target '{target.name}': expected a store that was pushed there to its end, found {found}; give the "
            "target of a push, or push again"
        )
    return index


def _require_new(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"'{path}': expected a new or empty directory for a store, found a file; give another path")
    if (path / directory.MANIFEST).exists():
        raise StoreError(f"'{path}' already holds a store, and nothing is pulled over it; give another path")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    begun = _NOTE in names or _STAGED in names
    ours = (directory.SEGMENTS, directory.SCRATCH, directory.LOCK, FILES)
    if other := [name for name in names if not (begun and (name in ours or name.startswith(_PULLING)))]:
        raise StoreError(
            f"'{path}': expected a new or empty directory, or one where a pull was interrupted, found "
            f"{', '.join(other[:3])}{' and more' if len(other) > 3 else ''}; give another path"
        )


class _Attempt:
    """One attempt at one commit; the directory is locked."""

    def __init__(self, target: Target, index: Index, path: Path, say: Say | None) -> None:
        self.target, self.index, self.path, self.say = target, index, path, say
        self.disk = Disk(chunk_bytes=int(index.meta["chunk_bytes"]))
        self.layouts = Layouts(
            units_of(index.blocks),
            [Family.from_json(name, count, facts) for _, name, count, facts in index.families],
            index.meta["precision"],
            Optimizer.from_json(index.meta["optimizer"]),
            masks_of(index.blocks),
        )
        self.buffer = RecordBuffer(max((record.nbytes for record in index.records), default=0))

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        segments = self.path / directory.SEGMENTS
        for folder in (segments, self.path / directory.SCRATCH):
            folder.mkdir(exist_ok=True)
        records = self.index.records
        self.entries = {r.block: Entry(r.version, r.optimizer_steps, checksums=r.checksums) for r in records}
        for block, entry in self.entries.items():
            if not self.layouts.is_member(block):
                entry.slot = file_name(block, _SLOT)
        members = sorted(block for block in self.entries if self.layouts.is_member(block))
        self.shared = whole_files((block, self.layouts[block], self.entries[block]) for block in members)
        sizes = {file.name: file.nbytes for file in self.shared}
        sizes |= {self._name(r): r.nbytes for r in records if not self.layouts.is_member(r.block)}
        self._clear(segments, sizes)
        folders = {(segments / name).parent for name in sizes} | ({segments / SHARED} if self.index.families else set())
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self._check_room(sum(n for name, n in sizes.items() if not _has_size(segments / name, n)))
        self.disk.device.probe(self.path / directory.SCRATCH)

        missing = [record for record in records if not self._is_there(record, sizes[self._name(record)])]
        received = Counted("received", sum(record.nbytes for record in missing), self.say)
        for record in missing:
            self._receive(record, sizes[self._name(record)])
            received.add(record.nbytes)
        shared = [self._close_file(file) for file in self.shared]
        for folder in sorted(folders | {segments}, reverse=True):
            self.disk.device.sync_directory(folder)
        shutil.rmtree(self.path / FILES, ignore_errors=True)
        file_bytes = sum(self._receive_file(file) for file in self.index.files)
        self._write_manifest(shared)
        return {
            "store": str(self.path),
            "step": self.index.commit.step,
            "records": len(records),
            "record_bytes": sum(record.nbytes for record in records),
            "received_records": len(missing),
            "received_bytes": received.done_bytes + file_bytes,
            "seconds": round(time.monotonic() - started, 3),
        }

    def close(self) -> None:
        self.disk.close()
        self.buffer.close()

    def _name(self, record: PushedRecord) -> str:
        return self.entries[record.block].slot or ""

    def _clear(self, segments: Path, wanted: Collection[str]) -> None:
        """Remove what has no place in this commit; a file of another length is begun anew."""
        for path in segments.rglob("*"):
            if not path.is_dir() and str(path.relative_to(segments)) not in wanted:
                path.unlink()

    def _check_room(self, needed_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self.path).free
        if needed_bytes > free_bytes:
            raise StoreError(
                f"'{self.path}': the store needs {format_bytes(needed_bytes)} more, its disk has "
                f"{format_bytes(free_bytes)} free; make room, or give a path on another disk"
            )

    def _is_there(self, record: PushedRecord, file_bytes: int) -> bool:
        """Whether an earlier pull has brought this version, and it is whole."""
        file, entry = self.path / directory.SEGMENTS / self._name(record), self.entries[record.block]
        if not _has_size(file, file_bytes):
            return False
        layout = self.layouts.of(record.block, record.sparsity)
        self.buffer.bind(layout)
        header = b"" if entry.offset else layout.header(record.version)
        found_header = memoryview(bytearray(len(header)))
        extents = [(0, found_header)] if header else []
        extents += extents_of(entry, layout, {part.name: self.buffer.view(part.name) for part in layout.parts})
        found = self.disk.read(file, extents, "states").result()[len(extents) - len(layout.parts) :]
        named = {part.name: checksum for part, checksum in zip(layout.parts, found, strict=True)}
        return found_header == header and named == record.checksums

    def _receive(self, record: PushedRecord, file_bytes: int) -> None:
        layout = self.layouts.of(record.block, record.sparsity)
        self.buffer.bind(layout)
        what = f"target '{self.target.name}': block {record.block} {layout.block!r} at version {record.version}"
        remedy = f"no store was made; remove {record.object} there and push again, then pull again"
        found_bytes = self.target.read_into(record.object, self.buffer.image)
        if found_bytes != layout.image_nbytes:
            raise DamagedRecordError(
                f"{what}: expected {layout.image_nbytes} bytes in {record.object}, found {found_bytes}; {remedy}"
            )
        views = [self.buffer.view(part.name) for part in layout.parts]
        for part, checksum in zip(layout.parts, checksums(views, self.disk.chunk_bytes), strict=True):
            if checksum != record.checksums.get(part.name):
                raise DamagedRecordError(
                    f"{what}, part {part.name!r} in {record.object}: expected checksum "
                    f"{record.checksums.get(part.name, 0):016x}, found {checksum:016x}; {remedy}"
                )
        if self.buffer.image[: layout.header_nbytes] != layout.header(record.version):
            raise DamagedRecordError(f"{what}: the header of {record.object} is not the one that was sent; {remedy}")
        file, entry = self.path / directory.SEGMENTS / self._name(record), self.entries[record.block]
        if not entry.offset:
            file.unlink(missing_ok=True)
        extents = [] if entry.offset else [(0, self.buffer.image[: layout.header_nbytes])]
        extents += extents_of(entry, layout, {part.name: view for part, view in zip(layout.parts, views, strict=True)})
        self.disk.write(
            file, extents, "segment", allocate_bytes=file_bytes, digest=False, sync=not entry.offset, exact=True
        ).result()

    def _close_file(self, file: WholeFile) -> SharedRow:
        """The header of a file that records share, and all of it on the medium."""
        header = file.header()
        path, extents = self.path / directory.SEGMENTS / file.name, [(0, memoryview(bytearray(header)))]
        (checksum,) = self.disk.write(path, extents, "segment", allocate_bytes=file.nbytes, exact=True).result()
        said_nbytes = file.header_nbytes
        return SharedRow(file.serial, file.name, file.nbytes, file.header_nbytes, said_nbytes, f"{checksum:016x}")

    def _receive_file(self, file: PushedFile) -> int:
        relative = PurePosixPath(file.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise DamagedRecordError(
                f"target '{self.target.name}': {self.index.name} names a file outside {FILES}/: {file.path!r}; "
                "no store was made"
            )
        data = self.target.read(file.object)
        if xxhash.xxh3_64_hexdigest(data) != file.checksum:
            raise DamagedRecordError(
                f"target '{self.target.name}': {file.object} is not what was sent; no store was made; remove it there "
                "and push again, then pull again"
            )
        path = self.path / FILES / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        return len(data)

    def _write_manifest(self, shared: Sequence[SharedRow]) -> None:
        """The last thing: from here on there is a store."""
        staged = self.path / _STAGED
        for leftover in self.path.glob(f"{_PULLING}*"):
            if leftover.name != _NOTE:
                leftover.unlink()
        Manifest.create(
            staged,
            meta=self.index.meta,
            blocks=self.index.blocks,
            families=self.index.families,
            step=self.index.commit.step,
            progress=self.index.commit.progress,
            records=[
                RecordRow(
                    record.block, record.version, self._name(record), record.checksums, record.optimizer_steps,
                    offset=self.entries[record.block].offset,
                    nbytes=self.layouts[record.block].parts_nbytes if self.entries[record.block].offset else 0,
                    sparsity=record.sparsity,
                )
                for record in self.index.records
            ],
            shared=shared,
        )  # fmt: skip
        (self.path / _NOTE).unlink()
        staged.rename(self.path / directory.MANIFEST)
        self.disk.device.sync_directory(self.path)


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes
