"""The last commit of a store, held still for as long as it is read beside the process that writes it.

A writer uses the file of a replaced version again. It does so only if the file has no other name (`tiers.Device.links`),
as a branch has. So its files are given a second name in a folder beside the store for the time that they are read; where
that cannot be done they are read where they are, and the reader is told if the writer went on.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightstream.errors import DamagedRecordError, StoreError, StoreInUseError
from weightstream.store import directory
from weightstream.store.many import extents_of
from weightstream.store.records import Entry
from weightstream.store.rows import CommitRow, RecordRow
from weightstream.store.segments import RecordBuffer
from weightstream.store.store import Store

_ATTEMPTS = 5


class WriterWentOnError(StoreError):
    """Files were used again while they were read; the newer commit can be read instead."""


@dataclass(frozen=True)
class Held:
    """One commit of a store opened for reading; `records` are the versions that it published."""

    store: Store
    meta: dict[str, Any]
    blocks: Sequence[tuple[int, str, dict[str, Any]]]
    families: Sequence[tuple[int, str, int, dict[str, Any]]]
    commit: CommitRow
    records: Sequence[RecordRow]
    folder: Path

    def read(self, row: RecordRow, buffer: RecordBuffer) -> None:
        """Fill the buffer with a version's whole image, each part compared with its checksum.

        Raises:
            WriterWentOnError: the file was used again meanwhile.
            DamagedRecordError: the bytes are not those that were written.
        """
        layout = self.store.layouts.of(row.block, row.sparsity)
        buffer.bind(layout)
        what = f"store '{self.store.path}': block {row.block} {layout.block!r} at version {row.version}"
        try:
            entry = Entry(row.version, row.optimizer_steps, row.file, row.checksums, row.offset)
            extents = extents_of(entry, layout, {part.name: buffer.view(part.name) for part in layout.parts})
            found = self.store.disk.read(self.folder / row.file, extents, "states").result()
        except (FileNotFoundError, DamagedRecordError) as error:
            self._check_still(what)
            raise DamagedRecordError(f"{what} cannot be read: {error}") from error
        for part, checksum in zip(layout.parts, found, strict=True):
            if checksum != row.checksums[part.name]:
                self._check_still(what)
                raise DamagedRecordError(
                    f"{what}, part {part.name!r} in {row.file}: expected checksum {row.checksums[part.name]:016x}, "
                    f"found {checksum:016x}; the file was damaged or changed; restore it from a snapshot or a copy"
                )
        buffer.image[: layout.header_nbytes] = layout.header(row.version)

    def _check_still(self, what: str) -> None:
        number = self.store.manifest.last_commit().number
        if number != self.commit.number:
            raise WriterWentOnError(f"{what} was replaced: commit {self.commit.number} was read, now it is {number}")


@contextmanager
def held(path: Path) -> Iterator[Held]:
    """Open a store for reading and hold its last commit; one process at a time may.

    What a reader that was killed left beside the store is removed by the next one.

    Raises:
        StoreError: there is no store.
        StoreInUseError: another process holds it so.
    """
    directory.require_store(path)
    with _alone(path), Store.open(path, writable=False) as store:
        links = path.resolve().with_name(f".{path.resolve().name}.push")
        shutil.rmtree(links, ignore_errors=True)
        try:
            yield _hold(store, links)
        finally:
            shutil.rmtree(links, ignore_errors=True)


def _hold(store: Store, links: Path) -> Held:
    segments = store.path / directory.SEGMENTS
    for _ in range(_ATTEMPTS):
        found = _last_commit(store, segments)
        try:
            # a writer makes new files for what it would have used again; that must not fill its disk
            files = {row.file for row in found.records}
            if shutil.disk_usage(store.path).free < sum((segments / file).stat().st_size for file in files):
                break
            for folder in {(links / file).parent for file in files} | {links}:
                folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                os.link(segments / file, links / file)
        except FileNotFoundError:
            pass  # replaced and removed since the manifest was read
        except OSError:
            break  # no such links here, or nothing may be written
        else:
            # A file is used again only after a commit that replaced its version. There was none since the manifest was
            # read, so each link is to the version that was meant, and from now on it stays so.
            if store.manifest.last_commit().number == found.commit.number:
                return replace(found, folder=links)
        shutil.rmtree(links, ignore_errors=True)
    shutil.rmtree(links, ignore_errors=True)
    return _last_commit(store, segments)


def _last_commit(store: Store, folder: Path) -> Held:
    manifest = store.manifest
    with manifest.at_one_moment():
        living = [row for row in manifest.records() if row.died is None]
        blocks, families = manifest.blocks(), manifest.families()
        return Held(store, manifest.meta(), blocks, families, manifest.last_commit(), living, folder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    handle = os.open(path / directory.SEGMENTS, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreInUseError(
                    f"store '{path}' is being pushed by another process; wait for it, or end it"
                ) from None
            # a file system without locks: two pushes at a time are the person's to avoid
        yield
    finally:
        os.close(handle)
