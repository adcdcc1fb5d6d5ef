"""The store: durable, versioned records, moved in the background, published by commits.

An update never touches what was published. It writes a new version to a file that nothing points to, and a commit makes
all such versions, the training step and the caller's progress current in one SQLite transaction. So a crash at any
instant finds the last commit whole, and the store is the checkpoint.
"""

import json
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from weightstream.blocks import Block, Parameter
from weightstream.errors import DamagedRecordError, StoreError, StoreMismatchError
from weightstream.store import audit, directory
from weightstream.store.futures import chain, forward, gather, new_future, settle
from weightstream.store.generator import generation_tasks
from weightstream.store.initial import Recipe
from weightstream.store.layout import Part, Precision, RecordLayout, record_layout
from weightstream.store.manifest import Manifest, RecordRow
from weightstream.store.optimizers import Optimizer
from weightstream.store.records import Entry, PinnedPart, Record, file_name, pin_parts, slot_of, unpin_parts
from weightstream.store.scratch import Scratch
from weightstream.store.segments import RecordBuffer
from weightstream.store.tiers import Disk, Extent, Memory

Targets = Mapping[str, memoryview]
"""Which parts of a record are wanted, and the memory that each goes to."""


class Store:
    """A directory of records. One process may write; others may read what was committed when they opened it.

    Operations that move bytes return a future at once and run in the background, reads in order of issue, writes in
    order of issue. Memory given to an operation must be left alone until its future is done.
    """

    def __init__(self, path: Path, manifest: Manifest, disk: Disk, lock_handle: int | None) -> None:
        """Use `Store.create` or `Store.open`."""
        self.path = path
        self.writable = lock_handle is not None
        self.disk = disk
        self.memory = Memory(chunk_bytes=disk.chunk_bytes)
        self.manifest = manifest
        self._lock_handle = lock_handle
        with manifest.at_one_moment():
            meta = manifest.meta()
            rows = manifest.records()
            blocks = manifest.blocks()
            last = manifest.last_commit()
            held = set(manifest.snapshots().values())
        self.contract: dict[str, Any] = meta["contract"]
        self.precision: Precision = meta["precision"]
        self.optimizer = Optimizer.from_json(meta["optimizer"])
        self.seed = int(self.contract.get("seed", 0))
        self.step, self.progress = last.step, last.progress
        self.blocks = tuple(_block_from_facts(index, name, facts) for index, name, facts in blocks)
        self.recipes: dict[str, Recipe] = {
            name: Recipe.from_json(recipe) for _, _, facts in blocks for name, recipe in facts["recipes"].items()
        }
        self._layouts = [record_layout(block, self.precision, self.optimizer) for block in self.blocks]
        self._records = directory.records(self.path, self._layouts, rows, held, keep_dead=self.writable)
        self._scratch = Scratch(disk, path / directory.SCRATCH)
        self._lock = threading.RLock()
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="store-commit")
        self._commits: list[Future[Any]] = []
        self._in_flight: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._new_files = True  # names made before a crash may not be on the medium yet
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        blocks: Sequence[Block],
        recipes: Mapping[str, Recipe],
        optimizer: Optimizer,
        precision: Precision,
        contract: Mapping[str, Any],
        disk: Disk | None = None,
    ) -> Self:
        """Make a store in a new or empty directory. Nothing but frozen blocks takes space until it is updated.

        `recipes` says how each parameter (by name) begins; `contract` is what a resumed run may not change, as JSON.

        Raises:
            StoreError: the directory holds something else.
        """
        disk = disk or Disk()
        store_path = Path(path)
        facts = [(block.index, block.name, _block_facts(block, recipes)) for block in blocks]
        layouts = [record_layout(block, precision, optimizer) for block in blocks]
        assert [block.index for block in blocks] == list(range(len(blocks))), "blocks are numbered in order"
        lock_handle = directory.make(store_path)
        try:
            disk.device.probe(store_path / directory.SCRATCH)
            meta = {
                "contract": json.loads(json.dumps(dict(contract))),
                "precision": precision,
                "optimizer": optimizer.to_json(),
                "chunk_bytes": disk.chunk_bytes,
                "record_bytes": sum(layout.image_nbytes for layout in layouts),
            }
            Manifest.create(store_path / directory.MANIFEST, meta=meta, blocks=facts)
            manifest = Manifest.open(store_path / directory.MANIFEST, writable=True)
            store = cls(store_path, manifest, disk, lock_handle)
        except BaseException:
            directory.unlock(lock_handle)
            raise
        store._materialise_frozen()
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = True, disk: Disk | None = None) -> Self:
        """Open a store at its last commit; what was written after it is gone.

        Raises:
            StoreError: there is no store, or files are missing.
            StoreInUseError: another process writes to it.
            DamagedRecordError: the manifest was damaged or a file was cut short.
        """
        store_path = Path(path)
        directory.require_store(store_path)
        lock_handle = directory.lock(store_path) if writable else None
        try:
            manifest = Manifest.open(store_path / directory.MANIFEST, writable=writable)
            try:
                chunk_bytes = int(manifest.meta()["chunk_bytes"])
                disk = disk or Disk(chunk_bytes=chunk_bytes)
                if disk.chunk_bytes != chunk_bytes:
                    raise StoreError(
                        f"store '{store_path}': its checksums are over chunks of {chunk_bytes} bytes, the disk given "
                        f"uses {disk.chunk_bytes}; give Disk(chunk_bytes={chunk_bytes})"
                    )
                if writable:
                    directory.clear_scratch(store_path)
                    disk.device.probe(store_path / directory.SCRATCH)
                return cls(store_path, manifest, disk, lock_handle)
            except BaseException:
                manifest.close()
                raise
        except BaseException:
            if lock_handle is not None:
                directory.unlock(lock_handle)
            raise

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether there is a whole store to open; an interrupted creation is none and may be created again."""
        return (Path(path) / directory.MANIFEST).is_file()

    def check_contract(self, contract: Mapping[str, Any]) -> None:
        """Refuse a run under settings that may not change.

        Raises:
            StoreMismatchError: naming each key with both values.
        """
        given = json.loads(json.dumps(dict(contract)))
        differing = [
            f"{key}: the store has {_shown(self.contract, key)}, this run has {_shown(given, key)}"
            for key in sorted(self.contract.keys() | given.keys())
            if key not in self.contract or key not in given or self.contract[key] != given[key]
        ]
        if differing:
            raise StoreMismatchError(
                f"store '{self.path}' was made under settings that may not change:\n  "
                + "\n  ".join(differing)
                + "\nrun with the store's values, or give another store"
            )

    def layout(self, block_index: int) -> RecordLayout:
        """Where the numbers of this block's record lie."""
        return self._layouts[block_index]

    def version(self, block_index: int) -> int:
        """The newest version, pending ones included."""
        return self._records[block_index].newest.version

    def optimizer_steps(self, block_index: int) -> int:
        """How many optimizer steps the newest version has had."""
        return self._records[block_index].newest.optimizer_steps

    # Operations in the background.

    def fetch(self, block_index: int, view: memoryview) -> "Future[int]":
        """Fill page-aligned memory with the streamed part of the newest version; the future gives that version.

        Raises (in the future):
            DamagedRecordError: the bytes are not those that were written.
        """
        part = self._layouts[block_index].streamed
        view = view.cast("B")
        if view.nbytes < part.nbytes:
            raise ValueError(f"fetch of block {block_index} needs {part.nbytes} bytes, the view has {view.nbytes}")
        return self._read(block_index, {part.name: view[: part.nbytes]}, "copy")

    def load(self, block_index: int, record: RecordBuffer, parts: Collection[str] | None = None) -> "Future[int]":
        """Fill a buffer with masters and states (or the parts named) of the newest version, at their places.

        Binds the buffer to this block's layout. The bf16 copy is not loaded unless named: an update makes it anew.
        """
        layout = self._layouts[block_index]
        record.bind(layout)
        wanted = layout.states if parts is None else tuple(layout.part(name) for name in parts)
        return self._read(block_index, {part.name: record.view(part.name) for part in wanted}, "states")

    def write(self, block_index: int, record: RecordBuffer, version: int, optimizer_steps: int) -> "Future[None]":
        """Write the whole image as a new version, to be published by the next commit; done when synced.

        From now on `fetch` and `load` serve this version, once it is written.

        Raises:
            StoreError: opened for reading, or an earlier commit failed and `discard` was not called.
            ValueError: a version older than the newest, or a buffer bound to another layout.
        """
        layout = self._layouts[block_index]
        if record.layout != layout:
            raise ValueError(f"write of block {block_index}: the buffer is bound to block {record.layout.block!r}")
        out: Future[None] = new_future()
        with self._lock:
            self._check_usable()
            state = self._records[block_index]
            if version < state.newest.version:
                raise ValueError(f"write of block {block_index}: version {version} after {state.newest.version}")
            record.image[: layout.header_nbytes] = layout.header(version)
            entry = Entry(version, optimizer_steps, ready=out)
            state.newest = entry
            self._track(out)
            copies = [self._copy_into_pin(pin, entry, record.view(name)) for name, pin in state.pinned.items()]
        moved = chain((), lambda: self._write_entry(block_index, entry, record))
        gather([moved, *copies]).add_done_callback(
            lambda finished: settle(out, lambda: self._written(finished, block_index, entry))
        )
        return out

    def commit(self, step: int, progress: Mapping[str, Any]) -> "Future[None]":
        """Publish every version written so far, with the step and the caller's progress, in one transaction.

        Waits for these writes. When the future is done the commit survives a crash, and files of older versions that
        no snapshot holds may be used again.

        Raises (in the future):
            StoreError: a write failed; the last commit is whole, `discard` goes back to it.
        """
        kept = json.loads(json.dumps(dict(progress)))
        out: Future[None] = new_future()
        with self._lock:
            self._check_usable()
            published = {index: state.newest for index, state in enumerate(self._records) if state.pending}
            for index, entry in published.items():
                self._records[index].committing.append(entry)
            waits = [entry.ready for entry in published.values()] + self._commits[-1:]
            self._commits.append(out)
            self._track(out)
        published_run = chain(waits, lambda: self._committer.submit(self._publish, step, kept, published))

        def finish(finished: "Future[None]") -> None:
            with self._lock:
                self._commits.remove(out)
                for index, entry in published.items():
                    self._records[index].committing.remove(entry)
                error = finished.exception()
                if error is None:
                    for index, entry in published.items():
                        self._records[index].committed = entry
                    self.step, self.progress = step, kept
                else:
                    self._failure = error
            settle(out, finished.result)

        published_run.add_done_callback(finish)
        return out

    def discard(self) -> None:
        """Forget every version that no commit was asked to publish: the undo of a step.

        After a failed commit or write it makes the store usable again, at its last commit.
        """
        with self._lock:
            self._failure = None
            for state in self._records:
                if state.pending:
                    state.newest = state.committing[-1] if state.committing else state.committed
                    for pin in state.pinned.values():
                        if pin.entry is not state.newest:
                            pin.forget()

    def pin(self, block_index: int, parts: Collection[str]) -> None:
        """Keep these parts of a record in memory: filled by their next read or write, written through, read from
        memory afterwards. Parts that the record does not have are left out."""
        layout = self._layouts[block_index]
        with self._lock:
            pin_parts(
                self._records[block_index],
                [(name, layout.part(name).nbytes) for name in parts if layout.has(name)],
            )

    def unpin(self, block_index: int, parts: Collection[str] | None = None) -> None:
        """Let go of the memory of these parts (of all, by default)."""
        with self._lock:
            state = self._records[block_index]
            unpin_parts(state, list(state.pinned) if parts is None else parts)

    @property
    def pinned_bytes(self) -> int:
        """Memory set aside for pinned parts."""
        with self._lock:
            return sum(pin.buffer.nbytes for state in self._records for pin in state.pinned.values())

    def scratch_write(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Keep bytes on disk under a key until they are freed or the store is closed."""
        self._require_writable()
        return self._track(self._scratch.write(key, view))

    def scratch_read(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Fill memory of the same length with the bytes under a key."""
        return self._track(self._scratch.read(key, view))

    def scratch_free(self, key: Hashable) -> None:
        """Forget the bytes under a key, if there are any."""
        self._scratch.free(key)

    # The whole store, synchronously.

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every parameter in order of name, with its optimizer states, as copies of the newest version: fp32 `param`,
        states in their own dtype. One record is in memory at a time."""
        return audit.items(self)

    def tensor(self, name: str, part: str = "param") -> Tensor:
        """A copy of one tensor of the newest version.

        Raises:
            KeyError: no such parameter, or no such part of it.
        """
        return audit.tensor(self, name, part)

    def digest(self) -> str:
        """SHA-256 over what was committed: masters, states and optimizer steps, in order of name. It does not depend
        on tiers, files, or when a record was last written."""
        return audit.digest(self)

    def verify(self) -> list[str]:
        """Read every live file and compare it with its checksums; one line per damage found."""
        return audit.verify(self)

    def info(self) -> dict[str, Any]:
        """Sizes, versions and counters, as JSON."""
        return audit.info(self)

    def snapshot(self, name: str) -> None:
        """Hold the last commit under a name: one row, no data is copied."""
        self._require_writable()
        self._committer.submit(self._add_snapshot, name).result()

    def remove_snapshot(self, name: str) -> None:
        """Give up a snapshot; files that it alone held are used again."""
        self._require_writable()
        self._committer.submit(self._remove_snapshot, name).result()

    def snapshots(self) -> dict[str, int]:
        """Name of each snapshot → training step that it holds."""
        return {name: self.manifest.commit_row(number).step for name, number in self.manifest.snapshots().items()}

    def committed(self, block_index: int) -> Entry:
        """The version that the last commit published."""
        return self._records[block_index].committed

    def record_state(self, block_index: int) -> Record:
        """The versions and files of one record."""
        return self._records[block_index]

    @property
    def counters(self) -> dict[tuple[str, str], dict[str, int]]:
        """(tier, kind) → bytes `read` and `written` since the store was opened. Tiers: `disk`, `ram`; kinds: `copy`
        (fetches), `states` (loads), `segment` (writes), `scratch`."""
        found: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"read": 0, "written": 0})
        for tier, traffic in (("disk", self.disk.traffic), ("ram", self.memory.traffic)):
            for kind, nbytes in list(traffic.read_bytes.items()):
                found[tier, kind]["read"] = nbytes
            for kind, nbytes in list(traffic.written_bytes.items()):
                found[tier, kind]["written"] = nbytes
        return dict(found)

    def close(self) -> None:
        """Wait for what is under way and let the directory go. Versions that were not committed are lost."""
        if self._closed:
            return
        self._closed = True
        while waiting := [future for future in list(self._in_flight) if not future.done()]:
            gather(waiting).exception()
        self._committer.shutdown(wait=True)
        self.disk.close()
        self.memory.close()
        self.manifest.close()
        if self._lock_handle is not None:
            directory.clear_scratch(self.path)
            directory.unlock(self._lock_handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading.

    def _read(self, block_index: int, targets: Targets, kind: str) -> "Future[int]":
        """Fill the targets with the newest version, from memory where they are pinned."""
        out: Future[int] = new_future()
        with self._lock:
            state = self._records[block_index]
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
            self._track(out)
        others = {name: view for name, view in targets.items() if name not in from_pins}

        def start() -> "Future[list[None]]":
            moves: list[Future[None]] = []
            for name, (pin, ready) in from_pins.items():
                ready.result()
                moves.append(self.memory.copy(pin.buffer.view, targets[name], kind, write=False))
            if others:
                entry.ready.result()
                moves.append(chain((), lambda: self.read_entry(block_index, entry, others, kind)))
            return gather(moves)

        def fill_pins(read: "Future[list[None]]") -> "Future[list[None]]":
            read.result()
            return gather(
                self.memory.copy(targets[name], pin.buffer.view, kind, write=True) for name, pin in fills.items()
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

    def read_entry(self, block_index: int, entry: Entry, targets: Targets, kind: str) -> "Future[None]":
        """Fill the targets with one version, from its file or the generator, never from memory."""
        layout = self._layouts[block_index]
        parts = [layout.part(name) for name in targets]
        if entry.slot is None:
            tasks = [
                task
                for part in parts
                for task in generation_tasks(part, targets[part.name], self.recipes, self.seed, layout.block)
            ]
            return self.memory.run(tasks)
        extents: list[Extent] = [(part.offset, targets[part.name]) for part in parts]
        out: Future[None] = new_future()
        with self._lock:
            entry.add_reader(out)
        self._track(out)

        def check(finished: "Future[list[int]]") -> None:
            settle(out, lambda: self._check(block_index, entry, parts, finished.result()))

        self.disk.read(self.segment_path(block_index, entry), extents, kind).add_done_callback(check)
        return out

    def segment_path(self, block_index: int, entry: Entry) -> Path:
        """The file that holds this version."""
        assert entry.slot is not None
        return self.path / directory.SEGMENTS / file_name(block_index, entry.slot)

    def _check(self, block_index: int, entry: Entry, parts: Sequence[Part], found: Sequence[int]) -> None:
        for part, checksum in zip(parts, found, strict=True):
            if checksum != entry.checksums[part.name]:
                reason = "the file was damaged or changed; restore it from a snapshot or a copy"
                if not self.writable:
                    reason = "it was damaged, or its writer went on and used the file again; open the store anew"
                raise DamagedRecordError(
                    f"store '{self.path}': block {block_index} {self.blocks[block_index].name!r} at version "
                    f"{entry.version}, part {part.name!r} in {self.segment_path(block_index, entry).name}: expected "
                    f"checksum {entry.checksums[part.name]:016x}, found {checksum:016x}; {reason}"
                )

    # Writing.

    def _copy_into_pin(self, pin: PinnedPart, entry: Entry, source: memoryview) -> "Future[None]":
        waits = pin.busy()
        copied: Future[None] = new_future()
        pin.expect(entry, copied)
        return chain(waits, lambda: self.memory.copy(source, pin.buffer.view, "segment", write=True), copied)

    def _write_entry(self, block_index: int, entry: Entry, record: RecordBuffer) -> "Future[None]":
        """Find the entry a file and write its image there; waits for a commit if all files are live."""
        layout = self._layouts[block_index]
        with self._lock:
            state = self._records[block_index]
            known = set(state.slots)
            waits = state.claim(entry)
            if waits is None:
                assert self._commits, "only a commit under way can keep three files of a record live"
                return chain(self._commits[:1], lambda: self._write_entry(block_index, entry, record))
            self._new_files |= entry.slot not in known

        def start() -> "Future[list[int]]":
            image = record.image
            extents: list[Extent] = [(0, image[: layout.header_nbytes])]
            extents += [(part.offset, record.view(part.name)) for part in layout.parts]
            return self.disk.write(
                self.segment_path(block_index, entry),
                extents,
                "segment",
                allocate_bytes=layout.image_nbytes,
                recycle=entry.slot in known,
            )

        out: Future[None] = new_future()

        def keep(finished: "Future[list[int]]") -> None:
            def checksums() -> None:
                found = finished.result()[1:]
                entry.checksums = {part.name: value for part, value in zip(layout.parts, found, strict=True)}

            settle(out, checksums)

        chain(waits, start).add_done_callback(keep)
        return out

    def _written(self, finished: "Future[list[None]]", block_index: int, entry: Entry) -> None:
        error = finished.exception()
        if isinstance(error, OSError):
            raise StoreError(
                f"store '{self.path}': version {entry.version} of block {block_index} "
                f"{self.blocks[block_index].name!r} could not be written: {error.strerror}; the commit of step "
                f"{self.step} is whole, make room on the disk and run again"
            ) from error
        finished.result()

    def _publish(self, step: int, progress: dict[str, Any], published: Mapping[int, Entry]) -> None:
        """In the commit thread: everything that the transaction points to is on the medium before it."""
        if self._failure is not None:
            raise StoreError(f"store '{self.path}': step {step} follows a commit that failed") from self._failure
        rows = []
        for index, entry in published.items():
            entry.ready.result()
            name = self.segment_path(index, entry).name
            rows.append(RecordRow(index, entry.version, name, entry.checksums, entry.optimizer_steps))
        with self._lock:
            new_files, self._new_files = self._new_files, False
        if new_files and rows:
            self.disk.device.sync_directory(self.path / directory.SEGMENTS)
        try:
            self.manifest.publish(step, progress, rows)
        except sqlite3.Error as error:
            raise StoreError(
                f"store '{self.path}': the commit of step {step} failed: {error}; the commit of step {self.step} is "
                "whole, make room on the disk and run again"
            ) from error

    def _materialise_frozen(self) -> None:
        """Give blocks that are never trained a file: they would be generated anew at every fetch."""
        for block in self.blocks:
            if block.trainable or any(parameter.name not in self.recipes for parameter in block.parameters):
                continue
            layout = self._layouts[block.index]
            record = RecordBuffer(layout)
            self.load(block.index, record, [part.name for part in layout.parts]).result()
            self.write(block.index, record, 0, 0).result()
            record.close()
        if any(state.pending for state in self._records):
            self.commit(0, {}).result()

    # Snapshots, in the commit thread.

    def _add_snapshot(self, name: str) -> None:
        self.manifest.add_snapshot(name)
        with self._lock:
            for state in self._records:
                if state.committed.slot is not None:
                    state.held.add(state.committed.slot)

    def _remove_snapshot(self, name: str) -> None:
        self.manifest.remove_snapshot(name)
        held = set(self.manifest.snapshots().values())
        with self._lock:
            for state in self._records:
                state.held = set()
            for row in self.manifest.records():
                if any(row.born <= number and (row.died is None or number < row.died) for number in held):
                    self._records[row.block].held.add(slot_of(row.file))

    # Small things.

    def _track(self, future: "Future[Any]") -> "Future[Any]":
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"store '{self.path}' was opened for reading; open it with writable=True")
        if self._closed:
            raise StoreError(f"store '{self.path}' is closed; open it again")

    def _check_usable(self) -> None:
        self._require_writable()
        if self._failure is not None:
            raise StoreError(
                f"store '{self.path}': a commit failed ({self._failure}); discard() goes back to step {self.step}"
            ) from self._failure


def _block_facts(block: Block, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    return {
        "parameters": [
            {"name": parameter.name, "shape": list(parameter.shape), "trainable": parameter.trainable}
            for parameter in block.parameters
        ],
        "modules": list(block.modules),
        "resident": block.resident,
        "recipes": {
            parameter.name: recipes[parameter.name].to_json()
            for parameter in block.parameters
            if parameter.name in recipes
        },
    }


def _block_from_facts(index: int, name: str, facts: Mapping[str, Any]) -> Block:
    parameters = tuple(Parameter(fact["name"], tuple(fact["shape"]), fact["trainable"]) for fact in facts["parameters"])
    return Block(index, name, parameters, tuple(facts["modules"]), facts["resident"])


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "nothing"
