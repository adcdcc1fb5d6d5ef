"""Records in motion: which version is served, which file it is written to, and what a commit publishes.

Every rule that keeps published bytes safe is here. A version is written to a file that nothing points to
(`Record.claim`), after whatever still reads that file has ended. A version may be read only after it is written; who
asks earlier waits, without a thread. A commit waits for its writes and for the commit before it.

Nothing waits for what was issued later, which is why nothing waits for ever. In particular the versions of a record
take their files in order: an earlier one would else wait for the file of a later one, whose pins may wait for its
readers.
"""

import sqlite3
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store import directory
from weightstream.store.checksums import checksums
from weightstream.store.families import Layouts
from weightstream.store.futures import chain, forward, gather, new_future, settle
from weightstream.store.generator import generation_tasks
from weightstream.store.initial import Recipe
from weightstream.store.layout import Part
from weightstream.store.manifest import CommitRow, Manifest, RecordRow
from weightstream.store.members import ALONE, Members, folder_of
from weightstream.store.records import (
    Entry,
    PinnedPart,
    Records,
    file_name,
    is_elsewhere,
    pin_parts,
    slot_of,
    unpin_parts,
)
from weightstream.store.segments import RecordBuffer
from weightstream.store.tiers import Disk, Extent, Memory

Targets = Mapping[str, memoryview]
"""Which parts of a record are wanted, and the memory that each goes to."""


class Versions:
    """The records of one open store. Methods may be called from any thread; memory given to them must be left alone
    until the future that they return is done."""

    def __init__(
        self,
        path: Path,
        layouts: Layouts,
        records: Records,
        last: CommitRow,
        *,
        manifest: Manifest,
        disk: Disk,
        memory: Memory,
        recipes: Mapping[str, Recipe],
        seed: int,
        writable: bool,
        members: Members = ALONE,
    ) -> None:
        self.path = path
        self._members = members
        self.layouts = layouts
        self.records = records
        self.step, self.progress = last.step, last.progress
        self.writable = writable
        self._manifest = manifest
        self._disk = disk
        self._memory = memory
        self._recipes = recipes
        self._seed = seed
        self._lock = threading.RLock()
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="store-commit")
        self._commits: list[Future[None]] = []  # under way, in order
        self.changed: set[int] = set()  # records with versions that no commit was asked to publish
        self._in_flight: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._names_synced = False  # a process that was killed may have left names that are not on the medium yet

    def write(
        self,
        block_index: int,
        record: RecordBuffer,
        version: int,
        optimizer_steps: int,
        sums: Mapping[str, int] | None = None,
    ) -> "Future[None]":
        """Make the buffer's image the newest version; done when it is synced and in its pins."""
        layout = self.layouts[block_index]
        if record.layout != layout:
            raise ValueError(f"write of block {block_index}: the buffer is bound to block {record.layout.block!r}")
        out: Future[None] = new_future()
        with self._lock:
            self._check_usable()
            state = self.records[block_index]
            if version < state.newest.version:
                raise ValueError(f"write of block {block_index}: version {version} after {state.newest.version}")
            record.image[: layout.header_nbytes] = layout.header(version)
            entry = Entry(version, optimizer_steps, checksums=sums or {}, ready=out)
            state.newest = entry
            self.changed.add(block_index)
            self.track(out)
            copies = [self._copy_into_pin(pin, entry, record.view(name)) for name, pin in state.pinned.items()]
            turn, state.claimed = state.claimed, entry.claimed
        moved = chain([turn], lambda: self._write_entry(block_index, entry, record))
        gather([moved, *copies]).add_done_callback(
            lambda finished: settle(out, lambda: self._written(finished, block_index, entry))
        )
        return out

    def commit(self, step: int, progress: dict[str, Any]) -> "Future[None]":
        """Publish the newest version of every record; later writes belong to the next commit."""
        out: Future[None] = new_future()
        with self._lock:
            self._check_usable()
            published = {index: self.records[index].newest for index in sorted(self.changed)}
            self.changed.clear()
            for index, entry in published.items():
                self.records[index].committing.append(entry)
                self.records[index].accepted = entry
            waits = [entry.ready for entry in published.values()] + self._commits[-1:]
            self._commits.append(out)
            self.track(out)
        return chain(waits, lambda: self._committer.submit(self._commit, out, step, progress, published), out)

    def accept(self) -> None:
        """`discard` goes back to what is newest now, though it is not published yet."""
        with self._lock:
            self._check_usable()
            for index in self.changed:
                self.records[index].accepted = self.records[index].newest

    def discard(self) -> None:
        """Go back to what was accepted last; after a failure, to the last commit that was asked for."""
        with self._lock:
            failed, self._failure = self._failure is not None, None
            for index in self.changed:
                self.records[index].undo(to_commit=failed)
            self.changed = {index for index in self.changed if self.records[index].pending}

    def pin(self, block_index: int, parts: Collection[str]) -> None:
        """Keep these parts in memory from their next read or write on."""
        layout = self.layouts[block_index]
        wanted = [(name, layout.part(name).nbytes) for name in parts if layout.has(name)]
        with self._lock:
            pin_parts(self.records[block_index], wanted)

    def unpin(self, block_index: int, parts: Collection[str] | None) -> None:
        """Let go of these parts, or of all."""
        with self._lock:
            state = self.records[block_index]
            unpin_parts(state, list(state.pinned) if parts is None else parts)

    @property
    def pinned_bytes(self) -> int:
        with self._lock:
            return sum(pin.buffer.nbytes for _, state in self.records.in_memory() for pin in state.pinned.values())

    def add_snapshot(self, name: str) -> None:
        """Between two commits, in their thread: hold the files of the last one."""
        self._committer.submit(self._add_snapshot, name).result()

    def remove_snapshot(self, name: str) -> int:
        """Between two commits, in their thread: remove the files that nothing else holds; gives their bytes."""
        return self._committer.submit(self._remove_snapshot, name).result()

    def restore(self, name: str) -> None:
        """In the commit thread: make what a snapshot holds the newest version of every record.

        Raises:
            StoreError: there are versions that were not committed.
        """
        with self._lock:
            self._check_usable()
            if self._commits or self.changed:
                raise StoreError(
                    f"store '{self.path}' has changes that are not committed; commit or discard them first"
                )
        self._committer.submit(self._restore, name).result()

    def track(self, future: "Future[Any]") -> None:
        """`close` waits for it."""
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)

    def close(self) -> None:
        """Wait for everything under way."""
        while waiting := [future for future in list(self._in_flight) if not future.done()]:
            gather(waiting).exception()
        self._committer.shutdown(wait=True)

    # Reading.

    def sums(self, block_index: int, record: RecordBuffer, parts: Collection[str] | None = None) -> dict[str, int]:
        """The checksums of the parts in a buffer."""
        names = [part.name for part in self.layouts[block_index].parts if parts is None or part.name in parts]
        views = [record.view(name) for name in names]
        return dict(zip(names, checksums(views, self._disk.chunk_bytes), strict=True))

    def check(self, block_index: int, record: RecordBuffer) -> None:
        """Compares what was read without a check."""
        with self._lock:
            entry = self.records[block_index].newest
            unchecked = set(entry.unchecked)
        found = self.sums(block_index, record, unchecked)
        parts = [self.layouts[block_index].part(name) for name in found]
        self._check(block_index, entry, parts, list(found.values()))
        entry.unchecked -= unchecked

    def read(self, block_index: int, targets: Targets, kind: str, *, check: bool = True) -> "Future[int]":
        """Fill the targets with the newest version, from memory where they are pinned."""
        out: Future[int] = new_future()
        with self._lock:
            state = self.records[block_index]
            entry = state.newest
            from_pins: dict[str, tuple[PinnedPart, Future[Any]]] = {}
            fills: dict[str, PinnedPart] = {}
            waits: list[Future[Any]] = []
            filled: Future[Any] = new_future()
            for name in targets:
                pin = state.pinned.get(name)
                if pin is not None and pin.entry is entry:
                    from_pins[name] = (pin, pin.ready)
                    waits.append(pin.ready)
                    pin.add_user(out)
                elif pin is not None:
                    fills[name] = pin
                    waits.extend(pin.busy())
                    pin.expect(entry, filled)
            if len(from_pins) < len(targets):
                waits.append(entry.ready)
                entry.add_reader(out)
            self.track(out)
        others = {name: view for name, view in targets.items() if name not in from_pins}
        check = check or bool(fills) or entry.slot is None  # what goes into memory is checked once, here
        if not check:
            entry.unchecked.update(others)

        def start() -> "Future[list[None]]":
            moves: list[Future[None]] = []
            for name, (pin, ready) in from_pins.items():
                ready.result()
                moves.append(self._memory.copy(pin.buffer.view, targets[name], kind, write=False))
            if others:
                entry.ready.result()
                moves.append(chain((), lambda: self.read_entry(block_index, entry, others, kind, check=check)))
            return gather(moves)

        def fill_pins(read: "Future[list[None]]") -> "Future[list[None]]":
            read.result()
            return gather(
                self._memory.copy(targets[name], pin.buffer.view, kind, write=True) for name, pin in fills.items()
            )

        read = chain(waits, start)
        complete = chain([read], lambda: fill_pins(read))
        complete.add_done_callback(lambda finished: self._read_done(finished, entry, fills, filled, out))
        return out

    def _read_done(
        self,
        finished: "Future[list[None]]",
        entry: Entry,
        fills: Mapping[str, PinnedPart],
        filled: "Future[Any]",
        out: "Future[int]",
    ) -> None:
        if finished.exception() is not None:
            with self._lock:
                for pin in fills.values():
                    if pin.entry is entry:
                        pin.forget()
        forward(finished, filled)

        def version() -> int:
            finished.result()
            return entry.version

        settle(out, version)

    def read_entry(
        self, block_index: int, entry: Entry, targets: Targets, kind: str, *, check: bool = True
    ) -> "Future[None]":
        """Fill the targets with one version, from its file or the generator, never from memory."""
        layout = self.layouts[block_index]
        parts = [layout.part(name) for name in targets]
        if entry.slot is None:
            tasks = [
                task
                for part in parts
                for task in generation_tasks(part, targets[part.name], self._recipes, self._seed, layout.block)
            ]
            return self._memory.run(tasks)
        extents: list[Extent] = [(part.offset, targets[part.name]) for part in parts]
        out: Future[None] = new_future()
        with self._lock:
            entry.add_reader(out)
        self.track(out)

        def compare(finished: "Future[list[int]]") -> None:
            try:
                found = finished.result()
            except OSError as error:
                raise StoreError(
                    f"store '{self.path}': block {block_index} {layout.block!r} at version {entry.version} could not be "
                    f"read from {path.name}: {error.strerror}; nothing was changed, look after the disk and run again"
                ) from error
            if check:
                self._check(block_index, entry, parts, found)

        path = self.segment_path(block_index, entry)
        self._disk.read(path, extents, kind, digest=check).add_done_callback(
            lambda finished: settle(out, lambda: compare(finished))
        )
        return out

    def segment_path(self, block_index: int, entry: Entry) -> Path:
        """The file that holds this version."""
        assert entry.slot is not None
        return self._slot_path(block_index, entry.slot)

    def _slot_path(self, block_index: int, slot: str) -> Path:
        return self.path / directory.SEGMENTS / self.file_name(block_index, slot)

    def file_name(self, block_index: int, slot: str) -> str:
        """The name of a segment, from the folder of segments."""
        member = self.layouts.is_member(block_index)
        return file_name(block_index, slot, member=member, folder=self._members.folder)

    def _check(self, block_index: int, entry: Entry, parts: Sequence[Part], found: Sequence[int]) -> None:
        for part, checksum in zip(parts, found, strict=True):
            if checksum != entry.checksums[part.name]:
                reason = "the file was damaged or changed; restore it from a snapshot or a copy"
                if not self.writable:
                    reason = "it was damaged, or its writer went on and used the file again; open the store anew"
                raise DamagedRecordError(
                    f"store '{self.path}': block {block_index} {self.layouts[block_index].block!r} at version "
                    f"{entry.version}, part {part.name!r} in {self.segment_path(block_index, entry).name}: expected "
                    f"checksum {entry.checksums[part.name]:016x}, found {checksum:016x}; {reason}"
                )

    # Writing.

    def _copy_into_pin(self, pin: PinnedPart, entry: Entry, source: memoryview) -> "Future[None]":
        waits = pin.busy()
        copied: Future[None] = new_future()
        pin.expect(entry, copied)
        return chain(waits, lambda: self._memory.copy(source, pin.buffer.view, "segment", write=True), copied)

    def _write_entry(self, block_index: int, entry: Entry, record: RecordBuffer) -> "Future[None]":
        """Find the entry a file and write its image there; waits for a commit if all files are live."""
        layout = self.layouts[block_index]
        with self._lock:
            state = self.records[block_index]
            known = set(state.slots)
            waits = state.claim(entry)
            if waits is None:
                assert self._commits, "only a commit under way can keep three files of a record live"
                return chain(self._commits[:1], lambda: self._write_entry(block_index, entry, record))
            if entry.slot is not None and entry.slot not in known:
                state.unsynced.add(entry.slot)
        entry.claimed.set_result(None)

        def start() -> "Future[list[int]]":
            image = record.image
            extents: list[Extent] = [(0, image[: layout.header_nbytes])]
            extents += [(part.offset, record.view(part.name)) for part in layout.parts]
            return self._disk.write(
                self.segment_path(block_index, entry),
                extents,
                "segment",
                allocate_bytes=layout.image_nbytes,
                recycle=entry.slot in known or self.layouts.is_member(block_index),
                digest=not entry.checksums,
            )

        out: Future[None] = new_future()

        def keep(finished: "Future[list[int]]") -> None:
            def checksums() -> None:
                found = finished.result()[1:]
                if not entry.checksums:
                    entry.checksums = {part.name: value for part, value in zip(layout.parts, found, strict=True)}

            settle(out, checksums)

        chain(waits, start).add_done_callback(keep)
        return out

    def _written(self, finished: "Future[list[None]]", block_index: int, entry: Entry) -> None:
        error = finished.exception()
        if isinstance(error, OSError):
            raise StoreError(
                f"store '{self.path}': version {entry.version} of block {block_index} "
                f"{self.layouts[block_index].block!r} could not be written: {error.strerror}; the commit of step "
                f"{self.step} is whole, make room on the disk and run again"
            ) from error
        finished.result()

    # Committing: what follows runs in the commit thread, one at a time.

    def _commit(self, out: "Future[None]", step: int, progress: dict[str, Any], published: Mapping[int, Entry]) -> None:
        try:
            self._publish(step, progress, published)
        except BaseException as error:
            with self._lock:
                self._failure = error
                self.changed.update(published)
                self._end_commit(out, published)
            raise
        with self._lock:
            for index, entry in published.items():
                self.records[index].committed = entry
            for _, state in self.records.in_memory():
                state.doubtful.clear()
            self.step, self.progress = step, progress
            self._end_commit(out, published)

    def _end_commit(self, out: "Future[None]", published: Mapping[int, Entry]) -> None:
        self._commits.remove(out)
        for index, entry in published.items():
            self.records[index].committing.remove(entry)

    def _publish(self, step: int, progress: dict[str, Any], published: Mapping[int, Entry]) -> None:
        """Everything that the transaction will point to is on the medium before it begins."""
        if self._failure is not None:
            raise StoreError(f"store '{self.path}': step {step} follows a commit that failed") from self._failure
        if self._members.count == 1:
            rows = self._rows(published)
            with self._committing(step):
                self._sync_names(published)
                self._publish_rows(step, progress, rows, published)
            return
        together = self._members
        rows, name = [], uuid.uuid4().hex
        with _Noted() as ready:
            rows = self._rows(published)
            with self._committing(step):
                self._sync_names(published)
        told = together.exchange([ready.reason, name, [row.to_json() for row in rows]])
        self._check_all(step, [reason for reason, *_ in told])
        rows = [RecordRow.from_json(row) for _, _, own in told for row in own]
        with _Noted() as done_here, self._committing(step):
            self._publish_rows(step, progress, rows, published, ranks=together.count, name=told[0][1])
        # until all have it, the files of the commit before are left alone
        self._check_all(step, together.exchange(done_here.reason))

    def _check_all(self, step: int, reasons: Sequence[str | None]) -> None:
        """Refuses a commit that a rank could not make."""
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise StoreError(f"memory rank {rank}: {reason}" if rank != self._members.rank else reason)

    def _rows(self, published: Mapping[int, Entry]) -> list[RecordRow]:
        """What the manifest will say of these versions, once they are written."""
        rows = []
        for index, entry in published.items():
            entry.ready.result()
            assert entry.slot is not None
            name = self.file_name(index, entry.slot)
            rows.append(RecordRow(index, entry.version, name, entry.checksums, entry.optimizer_steps))
        return rows

    def _publish_rows(
        self,
        step: int,
        progress: dict[str, Any],
        rows: Sequence[RecordRow],
        published: Mapping[int, Entry],
        *,
        ranks: int = 1,
        name: str = "",
    ) -> None:
        try:
            self._manifest.publish(step, progress, rows, ranks=ranks, name=name, keep_before=ranks > 1)
        except BaseException:
            self._doubt(published)
            raise

    @contextmanager
    def _committing(self, step: int) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"store '{self.path}': the commit of step {step} failed: {error}; the commit of step {self.step} is "
                "whole, make room on the disk and run again"
            ) from error

    def _doubt(self, published: Mapping[int, Entry]) -> None:
        """SQLite may have written a commit that it reports as failed, and find it after a crash: until one succeeds, its
        files are left alone."""
        with self._lock:
            for index, entry in published.items():
                if entry.slot is not None:
                    self.records[index].doubtful.add(entry.slot)

    def _sync_names(self, published: Mapping[int, Entry]) -> None:
        """Names of these versions' files are on the medium, also of a file that an undone version was the first in."""
        with self._lock:
            unsynced = [(index, e.slot) for index, e in published.items() if e.slot in self.records[index].unsynced]
        folders = {self._slot_path(index, slot).parent for index, slot in unsynced if slot is not None}
        if not self._names_synced:
            folders |= {self.path / directory.SEGMENTS, self.path / directory.SEGMENTS / self._members.folder}
        for folder in sorted(folders):
            self._disk.device.sync_directory(folder)
        self._names_synced = True
        with self._lock:
            for index, slot in unsynced:
                self.records[index].unsynced -= {slot}

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                f"store '{self.path}': {what} failed: {error}; the commit of step {self.step} is whole, make room on the "
                "disk and try again"
            ) from error

    def _add_snapshot(self, name: str) -> None:
        with self._changing(f"snapshot {name!r}"):
            self._manifest.add_snapshot(name)
        with self._lock:
            for _, state in self.records.in_memory():
                if state.committed.slot is not None:
                    state.held.add(state.committed.slot)

    def _remove_snapshot(self, name: str) -> int:
        nbytes, folders = 0, set[Path]()
        with self._changing(f"deleting snapshot {name!r}"):
            rows = self._manifest.remove_snapshot(name)
        for row in rows:
            path = self.path / directory.SEGMENTS / row.file
            if not self._is_ours(row.file) or not path.exists():
                continue
            nbytes += path.stat().st_size
            folders.add(path.parent)
            while (users := self._unlink(row.block, slot_of(row.file, self._members.folder), path)) is not None:
                users.exception()  # a reader that began before still has its file
        for folder in folders:
            self._disk.device.sync_directory(folder)
        self._hold(set(self._manifest.snapshots().values()))
        return nbytes

    def _is_ours(self, file: str) -> bool:
        """Whether this rank removes a file that nothing points to: its own, and the first one those of ranks that are no
        more."""
        slot = slot_of(file, self._members.folder)
        active = {folder_of(rank) for rank in range(self._members.count)}
        return not is_elsewhere(slot) or (self._members.rank == 0 and file.rpartition("/")[0] not in active)

    def _unlink(self, index: int, slot: str, path: Path) -> "Future[Any] | None":
        """Removes a file that nothing points to; gives what still uses it instead, if anything does."""
        with self._lock:  # no version may take the name meanwhile
            state = self.records[index]
            users = state.users(slot)
            if users:
                return gather(users)
            self._disk.device.unlink(path)
            state.forget(slot)
        return None

    def _hold(self, numbers: Collection[int]) -> None:
        """Notes which files of the records in memory the snapshots of these commits hold."""
        with self._lock:
            for index, state in self.records.in_memory():
                if state.held:
                    rows = self._manifest.records(index, index + 1)
                    state.held = {
                        slot_of(row.file, self._members.folder) for row in rows if any(row.lives_at(n) for n in numbers)
                    }

    def _restore(self, name: str) -> None:
        with self._changing(f"going back to snapshot {name!r}"):
            commit = self._manifest.restore(name)
        with self._lock:
            for index, state in self.records.in_memory():
                rows = [row for row in self._manifest.records(index, index + 1) if row.died is None]
                state.go_to(state.entry_of(rows[0] if rows else None))
                for pin in state.pinned.values():
                    if pin.entry is not state.newest:
                        pin.forget()
            self.step, self.progress = commit.step, commit.progress

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"store '{self.path}': a commit failed ({self._failure}); discard() goes back to step {self.step}"
            ) from self._failure


class _Noted:
    """Notes a refusal instead of raising it: the other ranks must hear of it first."""

    reason: str | None = None

    def __enter__(self) -> "_Noted":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, StoreError):
            self.reason = str(error)
            return True
        return False
