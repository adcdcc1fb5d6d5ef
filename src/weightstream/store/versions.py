"""Records in motion: which version is served, and which file it is written to.

The rules that keep published bytes safe are here and in `committing.py`. A version is written to a file that nothing points to
(`Record.claim`), after whatever still reads that file has ended. A version may be read only after it is written; who
asks earlier waits, without a thread. Records of families share files (`shared.py`), which are closed and synced by the commit.

Nothing waits for what was issued later, which is why nothing waits for ever. In particular the versions of a record
take their files in order: an earlier one would else wait for the file of a later one, whose pins may wait for its
readers.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store import directory, snapshots
from weightstream.store.checksums import checksums
from weightstream.store.committing import Commits
from weightstream.store.compaction import Pace
from weightstream.store.families import Layouts
from weightstream.store.figures import Session
from weightstream.store.futures import NOW, chain, forward, gather, new_future, settle
from weightstream.store.generator import generation_tasks
from weightstream.store.initial import Recipe
from weightstream.store.lasting import LastingBuffer, LastingMemory
from weightstream.store.layout import MASK, Part, RecordLayout
from weightstream.store.manifest import Manifest
from weightstream.store.many import Writing, extents_of, read_many, write_many
from weightstream.store.members import ALONE, Members
from weightstream.store.records import (
    Entry,
    PinnedPart,
    Record,
    Records,
    file_name,
    pin_parts,
    unpin_parts,
)
from weightstream.store.rows import CommitRow
from weightstream.store.segments import RecordBuffer
from weightstream.store.shared import Batch, SharedFiles
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
        self.members = members
        self.layouts = layouts
        self.records = records
        self.writable = writable
        self._disk = disk
        self._memory = memory
        self._recipes = recipes
        self._seed = seed
        self._lasting = LastingMemory(manifest.meta()["id"])
        self._lock = threading.RLock()
        self.changed: set[int] = set()  # records with versions that no commit was asked to publish
        self._in_flight: set[Future[Any]] = set()
        life = manifest.life()
        self.pace = Pace.after(life.session)
        self.session = Session(life, {"disk": disk.traffic, "ram": memory.traffic}, first_step=last.step)
        self.shared = SharedFiles(path / directory.SEGMENTS, disk, manifest, self._lock, members)
        self.commits = Commits(self, members, last)

    @property
    def step(self) -> int:
        """The training step of the last commit."""
        return self.commits.step

    def write(
        self,
        block_index: int,
        record: RecordBuffer,
        version: int,
        optimizer_steps: int,
        sums: Mapping[str, int] | None = None,
    ) -> "Future[None]":
        """Make the buffer's image the newest version; done when it is in its file and in its pins, and synced if the file
        is its own."""
        if self.layouts.is_member(block_index):
            return write_many(self, [(block_index, record, version, optimizer_steps, sums)])
        out: Future[None] = new_future()
        with self._lock:
            self.commits.check_usable()
            state = self.records[block_index]
            self.check_write(block_index, record, version, state.newest.version)
            layout = record.layout
            record.image[: layout.header_nbytes] = layout.header(version)
            entry = Entry(
                version,
                optimizer_steps,
                checksums=sums or {},
                ready=out,
                claimed=new_future(),
                sparsity=layout.sparsity,
            )
            state.newest = entry
            self.changed.add(block_index)
            self.track(out)
            copies = [
                self.copy_into_pin(
                    self._fitting(block_index, state, name, layout), entry, record.view(name), block_index
                )
                for name in list(state.pinned)
                if layout.has(name)
            ]
            turn, state.claimed = state.claimed, entry.claimed
        moved = chain([turn], lambda: self._write_entry(block_index, entry, record))
        gather([moved, *copies]).add_done_callback(
            lambda finished: settle(
                out, lambda: self.written(finished, f"version {version} of {self._named(block_index)}")
            )
        )
        return out

    def write_many(self, records: Sequence[Writing]) -> "Future[None]":
        """The same for many; those of families together, at once."""
        members = [one for one in records if self.layouts.is_member(one[0])]
        writes = [write_many(self, members)] if members else []
        writes += [self.write(*one) for one in records if not self.layouts.is_member(one[0])]
        out: Future[None] = new_future()
        gather(writes).add_done_callback(lambda finished: settle(out, lambda: self.written(finished, "records")))
        return out

    def read_many(
        self, records: Sequence[tuple[int, RecordBuffer]], parts: Collection[str] | None, kind: str
    ) -> "Future[list[int]]":
        """Fill each buffer with the newest version of a record."""
        return read_many(self, records, parts, kind)

    def check_write(self, block_index: int, record: RecordBuffer, version: int, newest: int) -> None:
        """Refuse a version that cannot be written."""
        if not self.layouts.fits(block_index, record.layout):
            raise ValueError(f"write of block {block_index}: the buffer is bound to block {record.layout.block!r}")
        if version < newest:
            raise ValueError(f"write of block {block_index}: version {version} after {newest}")

    def make_newest(self, block_index: int, state: Record, entry: Entry) -> None:
        """From now on this version of a family's record is served; it has its place in a file."""
        before, state.newest = state.newest, entry
        self.changed.add(block_index)
        self._let_go(state, before)

    def _let_go(self, state: Record, *entries: Entry) -> None:
        """Places of versions that nobody will serve or publish can be used again."""
        for entry in entries:
            if entry.offset and not state.has(entry):
                self.shared.let_go(entry)

    def take_changed(self) -> tuple[dict[int, Entry], Batch]:
        """The versions that no commit was asked to publish, for one that is being asked for, and the files that records of
        families among them share."""
        published = {index: self.records[index].newest for index in sorted(self.changed)}
        self.changed.clear()
        for index, entry in published.items():
            state = self.records[index]
            state.committing.append(entry)
            before, state.accepted = state.accepted, entry
            self._let_go(state, before)
        return published, self.shared.take(published.values())

    def accept(self) -> None:
        """`discard` goes back to what is newest now, though it is not published yet."""
        with self._lock:
            self.commits.check_usable()
            for index in self.changed:
                state = self.records[index]
                before, state.accepted = state.accepted, state.newest
                self._let_go(state, before)

    def discard(self) -> None:
        """Go back to what was accepted last; after a failure, to the last commit that was asked for.

        A commit that was asked for after one that failed fails, too, and is discarded like it. With several ranks a failed
        commit cannot be discarded: the store must be opened anew."""
        with self._lock:
            failed = self.commits.forgive()
            for index in self.changed:
                state = self.records[index]
                before = state.newest, state.accepted
                state.undo(to_commit=failed)
                self._let_go(state, *before)
            self.changed = {index for index in self.changed if self.records[index].pending}

    def pin(self, block_index: int, parts: Collection[str]) -> None:
        """Keep these parts in memory from their next read or write on."""
        with self._lock:
            state = self.records[block_index]
            entry = state.newest
            layout = self.layout_of(block_index, entry)
            wanted = [(name, layout.part(name).nbytes) for name in parts if layout.has(name)]
            if MASK in parts and not layout.has(MASK) and self.layouts.varies(block_index):
                wanted.append((MASK, 0))  # another version may have one
            new = pin_parts(state, wanted, partial(self._lasting.buffer, block_index))
        for name, pin in new:
            self._attach(state, entry, name, pin)

    def _attach(self, state: Record, entry: Entry, name: str, pin: PinnedPart) -> None:
        """Memory that an earlier process left is of use if it holds this version."""
        if not (isinstance(pin.buffer, LastingBuffer) and pin.buffer.found and name in entry.checksums):
            return
        (found,) = checksums([pin.buffer.view], self._disk.chunk_bytes)
        with self._lock:
            if found == entry.checksums[name] and state.newest is entry and pin.entry is None:
                pin.expect(entry, NOW)

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
        self.commits.between(partial(snapshots.add, self, name))

    def remove_snapshot(self, name: str) -> int:
        """Between two commits, in their thread: remove the files that nothing else holds; gives their bytes."""
        return self.commits.between(partial(snapshots.remove, self, name))

    def restore(self, name: str) -> None:
        """In the commit thread: make what a snapshot holds the newest version of every record.

        Raises:
            StoreError: there are versions that were not committed.
        """
        with self._lock:
            self.commits.check_usable()
            if self.commits.under_way or self.changed:
                raise StoreError(
                    f"store '{self.path}' has changes that are not committed; commit or discard them first"
                )
        self.commits.between(partial(snapshots.restore, self, name))

    def track(self, future: "Future[Any]") -> None:
        """`close` waits for it."""
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)

    def close(self) -> None:
        """Wait for everything under way."""
        while waiting := [future for future in list(self._in_flight) if not future.done()]:
            gather(waiting).exception()
        self.commits.close()
        if self.writable:
            with self._lock:
                self.shared.close()

    # Reading.

    def sums(self, block_index: int, record: RecordBuffer, parts: Collection[str] | None = None) -> dict[str, int]:
        """The checksums of the parts in a buffer."""
        names = [part.name for part in record.layout.parts if parts is None or part.name in parts]
        views = [record.view(name) for name in names]
        return dict(zip(names, checksums(views, self._disk.chunk_bytes), strict=True))

    def check(self, block_index: int, record: RecordBuffer) -> None:
        """Compares what was read without a check."""
        with self._lock:
            entry = self.records[block_index].newest
            unchecked = set(entry.unchecked)
        found = self.sums(block_index, record, unchecked)
        parts = [record.layout.part(name) for name in found]
        self.compare(block_index, entry, parts, list(found.values()))
        entry.unchecked -= unchecked

    def read(self, block_index: int, targets: Targets, kind: str, *, check: bool = True) -> "Future[int]":
        """Fill the targets with the newest version, from memory where they are pinned."""
        out: Future[int] = new_future()
        with self._lock:
            state = self.records[block_index]
            entry = state.newest
            layout = self.layout_of(block_index, entry)
            for name, view in targets.items():
                if view.nbytes != layout.part(name).nbytes:
                    raise ValueError(
                        f"read of block {block_index}: part {name!r} has {layout.part(name).nbytes} bytes, there is memory "
                        f"for {view.nbytes}; its sparsity may have changed, ask for its layout again"
                    )
            from_pins: dict[str, tuple[PinnedPart, Future[Any]]] = {}
            fills: dict[str, PinnedPart] = {}
            waits: list[Future[Any]] = []
            filled: Future[Any] = new_future()
            for name in targets:
                pin = self._fitting(block_index, state, name, layout) if name in state.pinned else None
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
                self._add_reader(entry, out)
            self.track(out)
        others = {name: view for name, view in targets.items() if name not in from_pins}
        check = check or bool(fills) or entry.slot is None  # what goes into memory is checked once, here
        if not check:
            entry.unchecked.update(others)

        def start() -> "Future[list[None]]":
            moves: list[Future[None]] = []
            for name, (pin, ready) in from_pins.items():
                ready.result()
                moves.append(self._memory.copy(pin.buffer.view, targets[name], kind, write=False, what=block_index))
            if others:
                entry.ready.result()
                moves.append(chain((), lambda: self.read_entry(block_index, entry, others, kind, check=check)))
            return gather(moves)

        def fill_pins(read: "Future[list[None]]") -> "Future[list[None]]":
            read.result()
            return gather(
                self._memory.copy(targets[name], pin.buffer.view, kind, write=True, what=block_index)
                for name, pin in fills.items()
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
        layout = self.layout_of(block_index, entry)
        parts = [layout.part(name) for name in targets]
        if entry.slot is None:
            return self.make(self.generation(layout, targets))
        out: Future[None] = new_future()
        with self._lock:
            self._add_reader(entry, out)
            path = self.segment_path(block_index, entry)
            extents = extents_of(entry, layout, targets)
        self.track(out)

        def compare(finished: "Future[list[int]]") -> None:
            found = self.read_result(finished, block_index, entry)
            if check:
                self.compare(block_index, entry, parts, found)

        self._disk.read(path, extents, kind, digest=check, what=block_index).add_done_callback(
            lambda finished: settle(out, lambda: compare(finished))
        )
        return out

    def generation(self, layout: RecordLayout, targets: Targets) -> list[Callable[[], None]]:
        """Tasks that together fill the targets with a record's version 0."""
        return [
            task
            for name, view in targets.items()
            for task in generation_tasks(
                layout.part(name), view, self._recipes, self._seed, layout.block, self.layouts.masks
            )
        ]

    def make(self, tasks: Sequence[Callable[[], None]]) -> "Future[None]":
        """Runs tasks that fill memory; done when all are."""
        return self._memory.run(tasks)

    def read_result(self, finished: "Future[list[int]]", block_index: int, entry: Entry) -> list[int]:
        """The checksums of what was read of a version."""
        try:
            return finished.result()
        except DamagedRecordError as error:  # it ends too early
            raise DamagedRecordError(
                f"store '{self.path}': {self._named(block_index)} at version {entry.version}: {error}"
            ) from error
        except OSError as error:
            remedy = "nothing was changed, look after the disk and run again"
            if isinstance(error, FileNotFoundError) and not self.writable:
                remedy = "its writer went on and used the file again; open the store anew"
            raise StoreError(
                f"store '{self.path}': {self._named(block_index)} at version {entry.version} could not be read from "
                f"{self.segment_path(block_index, entry).name}: {error.strerror}; {remedy}"
            ) from error

    def _named(self, block_index: int) -> str:
        return f"block {block_index} {self.layouts[block_index].block!r}"

    def _add_reader(self, entry: Entry, future: "Future[Any]") -> None:
        entry.add_reader(future)
        if entry.offset and entry.slot is not None:
            self.shared.reading(entry.slot, future)

    def segment_path(self, block_index: int, entry: Entry) -> Path:
        """The file that holds this version."""
        assert entry.slot is not None
        return self.slot_path(block_index, entry.slot)

    def slot_path(self, block_index: int, slot: str) -> Path:
        """The same by its slot."""
        return self.path / directory.SEGMENTS / self.file_name(block_index, slot)

    def file_name(self, block_index: int, slot: str) -> str:
        """The name of a segment, from the folder of segments."""
        if self.layouts.is_member(block_index):
            return slot
        return file_name(block_index, slot, self.members.folder)

    def compare(self, block_index: int, entry: Entry, parts: Sequence[Part], found: Sequence[int]) -> None:
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

    def layout_of(self, block_index: int, entry: Entry) -> RecordLayout:
        """Where the numbers of this version lie."""
        return self.layouts.of(block_index, entry.sparsity)

    def newest_layout(self, block_index: int) -> RecordLayout:
        """Where the numbers of the newest version lie."""
        if not self.layouts.varies(block_index):  # a record of a family need not be in memory for that
            return self.layouts[block_index]
        return self.layout_of(block_index, self.records[block_index].newest)

    # Writing.

    def _fitting(self, block_index: int, state: Record, name: str, layout: RecordLayout) -> PinnedPart:
        """The memory of a pinned part, in the size that a layout asks for; who reads the old one keeps that."""
        pin, nbytes = state.pinned[name], layout.part(name).nbytes
        if pin.buffer.nbytes != nbytes:
            pin.buffer.discard()  # or the new one would be the same file, cut short under its readers
            pin = state.pinned[name] = PinnedPart(self._lasting.buffer(block_index, name, nbytes))
        return pin

    def copy_into_pin(self, pin: PinnedPart, entry: Entry, source: memoryview, index: int) -> "Future[None]":
        """Write a part through to its memory, once nothing else uses that."""
        waits = pin.busy()
        copied: Future[None] = new_future()
        pin.expect(entry, copied)
        return chain(
            waits, lambda: self._memory.copy(source, pin.buffer.view, "segment", write=True, what=index), copied
        )

    def _write_entry(self, block_index: int, entry: Entry, record: RecordBuffer) -> "Future[None]":
        """Find the entry a file and write its image there; waits for a commit if all files are live."""
        layout = self.layout_of(block_index, entry)
        with self._lock:
            state = self.records[block_index]
            known = set(state.slots)
            waits = state.claim(entry)
            if waits is None:
                earlier = self.commits.under_way[:1]
                assert earlier, "only a commit under way can keep three files of a record live"
                return chain(earlier, lambda: self._write_entry(block_index, entry, record))
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
                recycle=entry.slot in known,
                exact=self.layouts.varies(block_index),
                digest=not entry.checksums,
                what=block_index,
            )

        out: Future[None] = new_future()

        def keep(finished: "Future[list[int]]") -> None:
            if finished.exception() is not None:
                with self._lock:  # its name may be new, or of another file
                    self.records[block_index].unsynced.add(str(entry.slot))

            def checksums() -> None:
                found = finished.result()[1:]
                if not entry.checksums:
                    entry.checksums = {part.name: value for part, value in zip(layout.parts, found, strict=True)}

            settle(out, checksums)

        chain(waits, start).add_done_callback(keep)
        return out

    def written(self, finished: "Future[list[None]]", what: str) -> None:
        """Raises what became of a write, said for a person."""
        error = finished.exception()
        if isinstance(error, OSError):
            raise StoreError(
                f"store '{self.path}': {what} could not be written: {error.strerror}; the commit of step {self.step} is "
                "whole, make room on the disk and run again"
            ) from error
        finished.result()
