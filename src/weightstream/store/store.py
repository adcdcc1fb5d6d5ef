"""The store: durable, versioned records, moved in the background, published by commits.

An update never touches what was published. It writes a new version to a file that nothing points to, and a commit makes
all such versions, the training step and the caller's progress current in one SQLite transaction. So a crash at any
instant finds the last commit whole, and the store is the checkpoint.
"""

import json
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from weightstream.blocks import PANEL_ELEMENTS, Block, Parameter, Unit, cut
from weightstream.cluster import owner_of, owners
from weightstream.errors import StoreError, StoreMismatchError
from weightstream.store import audit, directory, figures, integrity, presence
from weightstream.store.branch import branch
from weightstream.store.compaction import check_share
from weightstream.store.facts import block_rows, blocks_of, masks_of, units_of
from weightstream.store.families import Family, Layouts, Recipes
from weightstream.store.initial import Recipe
from weightstream.store.layout import Precision, RecordLayout
from weightstream.store.manifest import Manifest
from weightstream.store.members import ALONE, Members, common_commit, first_look, folder_of, level, place_of
from weightstream.store.optimizers import Optimizer
from weightstream.store.records import Record, Records
from weightstream.store.rows import CommitRow, RecordRow
from weightstream.store.scratch import Scratch
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import InitialMask, Sparsity
from weightstream.store.tiers import Disk, Memory
from weightstream.store.transaction import Tensors, Transaction, tensors_of
from weightstream.store.versions import Versions
from weightstream.trace.recorder import Log


class Store:
    """A directory of records. One process may write; others may read what was committed when they opened it.

    Operations that move bytes return a future at once and run in the background, reads in order of issue, writes in
    order of issue. Memory given to an operation must be left alone until its future is done.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        disk: Disk,
        lock_handle: int | None,
        accept_damage: bool = False,
        members: Members = ALONE,
        common: CommitRow | None = None,
    ) -> None:
        """Use `Store.create` or `Store.open`."""
        self.path = path
        self.members = members
        self.writable = lock_handle is not None
        self.disk = disk
        self.memory = Memory(chunk_bytes=disk.chunk_bytes)
        self.manifest = manifest
        self._lock_handle = lock_handle
        with manifest.at_one_moment():
            meta = manifest.meta()
            blocks = manifest.blocks()
            families = manifest.families()
            self.blocks, self.units = blocks_of(blocks), units_of(blocks)
            last = manifest.last_commit()
            self._newest = last.number
            rows = manifest.records(stop=len(self.units))
            if common is not None and common.number != last.number:  # a reader: not all ranks have the last one yet
                last = manifest.commit_row(common.number)
                rows = [row.at(last.number) for row in rows if row.born <= last.number]
            held = set(manifest.snapshots().values())
        self.contract: dict[str, Any] = meta["contract"]
        self.precision: Precision = meta["precision"]
        self.optimizer = Optimizer.from_json(meta["optimizer"])
        self.seed = int(self.contract.get("seed", 0))
        self.panel_elements = int(meta["panel_elements"])
        self._units_of = _ranges(self.blocks, self.units)
        self._pieces: dict[str, list[int]] = defaultdict(list)
        for unit in self.units:
            for parameter in unit.parameters:
                self._pieces[parameter.name].append(unit.index)
        self.families = tuple(Family.from_json(name, count, facts) for _, name, count, facts in families)
        own = {name: Recipe.from_json(recipe) for _, _, facts in blocks for name, recipe in facts["recipes"].items()}
        self.recipes: Mapping[str, Recipe] = Recipes(own, self.families)
        self._layouts = Layouts(self.units, self.families, self.precision, self.optimizer, masks_of(blocks))
        self.owner = owners([layout.image_nbytes for layout in self._layouts.units], members.count)
        """The memory rank that owns each unit."""
        records = directory.records(
            self.path, self._layouts, rows, held, keep_dead=self.writable, accept_damage=accept_damage,
            folder=members.folder, active={folder_of(rank) for rank in range(members.count)},
            owned=None if members.count == 1 else {u for u, rank in enumerate(self.owner) if rank == members.rank},
        )  # fmt: skip
        self._place = place_of(path, members.rank)
        self._scratch = Scratch(disk, self._place / directory.SCRATCH)
        self._closed = False
        self._opened = last.number
        # called before anything looks at the whole store: an engine applies the updates that still wait
        self.before_look: Callable[[], None] = lambda: None
        self.attached = False  # an engine trains it
        self.versions = Versions(
            path,
            self._layouts,
            Records(records, self._member),
            last,
            manifest=manifest,
            disk=disk,
            memory=self.memory,
            recipes=self.recipes,
            seed=self.seed,
            writable=self.writable,
            members=members,
        )
        if self.writable:
            self.versions.shared.clear()

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
        families: Sequence[Family] = (),
        panel_elements: int = PANEL_ELEMENTS,
        masks: Mapping[str, InitialMask] | None = None,
    ) -> Self:
        """Make a store in a new or empty directory. Nothing but frozen units takes space until it is updated.

        `recipes` says how each parameter (by name) begins; `contract` is what a resumed run may not change, as JSON.
        Blocks are cut into units of about `panel_elements` (`blocks.cut`), each a record of its own. The records of
        `families` follow the units, in order; `index` gives the index of one. Parameters that `masks` names may be sparse:
        it says how their masks begin, and a version's layout says how sparse it is (`layout_of`).

        Raises:
            StoreError: the directory holds something else, or a mask does not fit its parameter.
        """
        disk = disk or Disk()
        store_path = Path(path)
        units = cut(blocks, panel_elements=panel_elements, panels=optimizer.elementwise)
        facts = block_rows(blocks, units, recipes, masks)
        layouts = Layouts(units, families, precision, optimizer, masks)
        assert [block.index for block in blocks] == list(range(len(blocks))), "blocks are numbered in order"
        _require_text(*(block.name for block in blocks), *(family.name for family in families))
        _require_text(*(parameter.name for unit in units for parameter in unit.parameters))
        _require_text(*(parameter.name for family in families for parameter in family.parameters))
        lock_handle = directory.make(store_path)
        try:
            disk.device.probe(store_path / directory.SCRATCH)
            meta = {
                "made_by": metadata.version("weightstream"),
                "id": uuid.uuid4().hex,  # by which a target of a push knows the store that it holds
                "contract": _as_json("contract", contract),
                "precision": precision,
                "optimizer": optimizer.to_json(),
                "chunk_bytes": disk.chunk_bytes,
                "panel_elements": panel_elements,
                "record_bytes": sum(layout.image_nbytes for layout in layouts.units),
            }
            if families:
                (store_path / directory.SEGMENTS / directory.SHARED).mkdir()
            directory.sync_place(store_path, disk.device)
            Manifest.create(store_path / directory.MANIFEST, meta=meta, blocks=facts, families=layouts.family_rows())
            manifest = Manifest.open(store_path / directory.MANIFEST, writable=True)
            store = cls(store_path, manifest, disk, lock_handle)
        except BaseException as error:
            directory.unlock(lock_handle)
            if isinstance(error, OSError):
                raise StoreError(
                    f"store '{store_path}' could not be made: {error.strerror}; make room or see to the permissions, and "
                    "try again"
                ) from error
            raise
        try:
            store._materialise_frozen()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = True,
        disk: Disk | None = None,
        accept_damage: bool = False,
        members: Members = ALONE,
    ) -> Self:
        """Open a store at its last commit; what was written after it is gone.

        With `accept_damage`, files that are missing or cut short are left for `verify` and `repair` to find. `members` are
        the memory ranks that open it together; it may have been written by another number of them.

        Raises:
            StoreError: there is no store, or files are missing.
            StoreInUseError: another process writes to it.
            DamagedRecordError: the manifest was damaged or a file was cut short.
        """
        store_path = Path(path)
        place = place_of(store_path, members.rank)
        lock_handle: int | None = None
        try:
            lock_handle, manifest = first_look(store_path, place, members, writable=writable)
            try:
                common = None
                if members.count > 1 or (manifest is not None and manifest.last_commit().ranks > 1):
                    common = common_commit(store_path, manifest, members)
                    if writable:
                        manifest = level(store_path, manifest, common, members)
                assert manifest is not None
                chunk_bytes = int(manifest.meta()["chunk_bytes"])
                disk = disk or Disk(chunk_bytes=chunk_bytes)
                if disk.chunk_bytes != chunk_bytes:
                    raise StoreError(
                        f"store '{store_path}': its checksums are over chunks of {chunk_bytes} bytes, the disk given "
                        f"uses {disk.chunk_bytes}; give Disk(chunk_bytes={chunk_bytes})"
                    )
                if writable:
                    (place / directory.SCRATCH).mkdir(exist_ok=True)
                    directory.clear_scratch(place)
                    disk.device.probe(place / directory.SCRATCH)
                store = cls(store_path, manifest, disk, lock_handle, accept_damage, members, common)
            except BaseException:
                if manifest is not None:
                    manifest.close()
                raise
        except BaseException as error:
            if lock_handle is not None:
                directory.unlock(lock_handle)
            if isinstance(error, OSError):
                raise StoreError(
                    f"store '{store_path}' could not be opened: {error.strerror}; make room or see to the permissions, and "
                    "try again"
                ) from error
            raise
        if writable and not accept_damage and members.count == 1:
            try:
                store._materialise_frozen()  # a creation that was cut short may not have come to it
            except BaseException:
                store.close()
                raise
        return store

    @property
    def step(self) -> int:
        """The training step of the last commit; 0 in a new store."""
        return self.versions.commits.step

    @property
    def progress(self) -> dict[str, Any]:
        """What the caller kept with the last commit."""
        return self.versions.commits.progress

    @property
    def compaction_share(self) -> float:
        """What compaction may write, for each byte that commits write to files that records of families share; may be set
        at any time. Dead bytes are at most one over it times the live ones."""
        return self.versions.pace.share

    @compaction_share.setter
    def compaction_share(self, share: float) -> None:
        self.versions.pace.share = check_share(share)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether there is a whole store to open; an interrupted creation is none and may be created again."""
        return (Path(path) / directory.MANIFEST).is_file()

    def check_contract(self, contract: Mapping[str, Any]) -> None:
        """Refuse a run under settings that may not change.

        Raises:
            StoreMismatchError: naming each key with both values.
        """
        given = _as_json("contract", contract)
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

    def units_of(self, block: int) -> range:
        """The indices of a block's units."""
        return self._units_of[block]

    def units_with(self, name: str) -> Sequence[int]:
        """The indices of the units that a parameter lies in, in order of row; none if there is no such parameter."""
        return self._pieces.get(name, ())

    def parameters_of(self, index: int) -> tuple[Parameter, ...]:
        """The tensors, or the panel of one, that a record has."""
        return self.units[index].parameters if index < len(self.units) else self._layouts.member(index).parameters

    def layout(self, index: int) -> RecordLayout:
        """Where the numbers of this record's newest version lie, pending ones included. Indices of records are those of the
        units, then of families' records."""
        return self.versions.newest_layout(index)

    def layout_of(self, index: int, sparsity: Sparsity) -> RecordLayout:
        """Where the numbers of a version that is so sparse lie: a new one is written from a buffer that is bound to this.

        Raises:
            StoreError: the record cannot be so sparse.
        """
        return self._layouts.of(index, sparsity)

    def sparsity(self, index: int) -> Sparsity:
        """How sparse the newest version is, pending ones included."""
        return self.layout(index).sparsity

    @property
    def masks(self) -> Mapping[str, InitialMask]:
        """The parameters that may be sparse, and how their masks begin."""
        return self._layouts.masks

    def index(self, family: str, number: int) -> int:
        """The index of a family's record, for every method that takes a record's index.

        Raises:
            KeyError: no such family, or no such number in it.
        """
        return self._layouts.index(family, number)

    @property
    def layouts(self) -> Layouts:
        """Where the numbers of every record lie."""
        return self._layouts

    def living(self, first: int, stop: int) -> list[RecordRow]:
        """The rows of records of families that the commit holds at which the store is open.

        Raises:
            StoreError: the store is open for reading, and its writer has replaced one of them since.
        """
        rows = self.manifest.records(first, stop)
        if self.writable:
            return [row for row in rows if row.died is None]
        found = [replace(row, died=None) for row in rows if row.lives_at(self._opened)]
        # a commit that not all memory ranks have keeps the one before, which was opened then
        whole = self._newest if self.manifest.last_commit().number == self._newest else self._opened
        if lost := {row.block for row in rows if row.born > whole} - {row.block for row in found}:
            raise StoreError(
                f"store '{self.path}': block {min(lost)} {self.layout(min(lost)).block!r} was written since the store was "
                "opened for reading; open it anew"
            )
        return found

    def _member(self, index: int) -> Record:
        return Record.load(self.living(index, index + 1), ())

    def version(self, index: int) -> int:
        """The newest version, pending ones included."""
        return self.versions.records[index].newest.version

    def optimizer_steps(self, index: int) -> int:
        """How many optimizer steps the newest version has had."""
        return self.versions.records[index].newest.optimizer_steps

    # For programs that use the store by itself.

    def read(self, index: int) -> Tensors:
        """Copies of a record's newest masters and states: parameter name → part → tensor.

        Raises:
            IndexError: there is no such record.
            DamagedRecordError: the bytes are not those that were written.
        """
        buffer = RecordBuffer(self.layout(index))
        try:
            self.load(index, buffer).result()
            return {name: {k: t.clone() for k, t in parts.items()} for name, parts in tensors_of(buffer).items()}
        finally:
            buffer.close()

    def transaction(self, *, step: int | None = None, progress: Mapping[str, Any] | None = None) -> Transaction:
        """Change records and publish them in one commit, as `with store.transaction() as t: t[index][name]["param"]…`.

        `step` and `progress` are committed with it; by default they stay as they are. Not under an engine.
        """
        self._require_writable()
        if self.attached:
            raise StoreError(f"store '{self.path}' is being trained; close its engine, then change records")
        return Transaction(self, self.step if step is None else step, self.progress if progress is None else progress)

    # Operations in the background.

    def fetch(self, index: int, view: memoryview) -> "Future[int]":
        """Fill page-aligned memory with the streamed part of the newest version, and with its mask behind it if it has one
        (`RecordLayout.fetched`); the future gives that version.

        Raises (in the future):
            DamagedRecordError: the bytes are not those that were written.
        """
        layout = self.layout(index)
        view = view.cast("B")
        if view.nbytes < layout.fetched_nbytes:
            raise ValueError(f"fetch of record {index} needs {layout.fetched_nbytes} bytes, the view has {view.nbytes}")
        targets, start = {}, 0
        for part in layout.fetched:
            targets[part.name] = view[start : start + part.nbytes]
            start += part.nbytes
        return self.versions.read(index, targets, "copy")

    def load(
        self, index: int, record: RecordBuffer, parts: Collection[str] | None = None, *, check: bool = True
    ) -> "Future[int]":
        """Fill a buffer with masters, states and mask (or the parts named) of the newest version, at their places.

        Binds the buffer to this record's layout. The bf16 copy is not loaded unless named: an update makes it anew.
        With `check=False` the bytes from disk must not be used before `check` has been called.
        """
        layout = self.layout(index)
        record.bind(layout)
        wanted = layout.states if parts is None else tuple(layout.part(name) for name in parts)
        return self.versions.read(index, {part.name: record.view(part.name) for part in wanted}, "states", check=check)

    def check(self, index: int, record: RecordBuffer) -> None:
        """Compare what `load(check=False)` read with its checksums, by all cores: to be called where compute waits.

        Raises:
            DamagedRecordError: the bytes are not those that were written.
        """
        self.versions.check(index, record)

    def checksums(self, index: int, record: RecordBuffer) -> dict[str, int]:
        """The checksum of each part of a record that is about to be written, by all cores."""
        return self.versions.sums(index, record)

    def write(
        self,
        index: int,
        record: RecordBuffer,
        version: int,
        optimizer_steps: int,
        checksums: Mapping[str, int] | None = None,
    ) -> "Future[None]":
        """Write the whole image as a new version, to be published by the next commit; done when synced (of a family's
        record: when written, the commit syncs).

        It is as sparse as the layout that the buffer is bound to (`layout_of`), whatever the version before was. From now on
        `fetch` and `load` serve this version, once it is written. Without `checksums` of all its parts they
        are made on the way to the disk.

        Raises:
            StoreError: opened for reading, or an earlier commit failed and `discard` was not called.
            ValueError: a version older than the newest, or a buffer bound to another record's layout.
        """
        self._require_writable()
        self._require_own(index)
        return self.versions.write(index, record, version, optimizer_steps, checksums)

    def write_many(self, records: Sequence[tuple[int, RecordBuffer, int, int]]) -> "Future[None]":
        """`write` of many records: (index, image, version, optimizer steps) of each. Those of families go to one file, one
        after another, in few large writes; done when all are written.

        Raises:
            StoreError, ValueError: as `write` does, and then none of the families' records is written.
        """
        self._require_writable()
        for index, *_ in records:
            self._require_own(index)
        return self.versions.write_many([(*one, None) for one in records])

    def read_many(
        self, records: Sequence[tuple[int, RecordBuffer]], parts: Collection[str] | None = None
    ) -> "Future[list[int]]":
        """`load` of many records: (index, buffer) of each. Those of families are read in the order in which they lie, up
        to 32 reads at a time; gives the versions, in the order asked for.

        Raises (in the future):
            DamagedRecordError: the bytes are not those that were written.
        """
        return self.versions.read_many(records, parts, "states")

    def written(self, indices: Collection[int]) -> set[int]:
        """Those of these records that were ever written, pending ones included; others are as the generator makes them."""
        return presence.written(self.versions, indices)

    def next_written(self, within: range, indices: Collection[int]) -> dict[int, int]:
        """For each of these records of a family (`within`: its indices) the first one that was ever written, from it on and
        then from the family's first.

        Raises:
            LookupError: none was.
        """
        return presence.next_written(self.versions, within, indices)

    def count_written(self, within: range) -> int:
        """How many records of a family were ever written, pending ones included; takes the longer the more there are."""
        return presence.count_written(self.versions, within)

    def commit(self, step: int, progress: Mapping[str, Any]) -> "Future[None]":
        """Publish every version written so far, with the step and the caller's progress, in one transaction.

        Waits for these writes. When the future is done the commit survives a crash, and files of older versions that
        no snapshot holds may be used again.

        Raises (in the future):
            StoreError: a write failed; the last commit is whole, `discard` goes back to it.
        """
        self._require_writable()
        return self.versions.commits.ask(step, _as_json("progress", progress))

    def accept(self) -> None:
        """Keep every version written so far, without a commit: from now on `discard` goes back to these."""
        self._require_writable()
        self.versions.accept()

    def discard(self) -> None:
        """Forget every version since the last `commit` or `accept`: the undo of a step.

        After a failed commit it makes the store usable again, at its last commit.
        """
        self.versions.discard()

    def pin(self, index: int, parts: Collection[str]) -> None:
        """Keep these parts of a record in memory: filled by their next read or write, written through, read from
        memory afterwards. Parts that the record does not have are left out."""
        self.versions.pin(index, parts)

    def unpin(self, index: int, parts: Collection[str] | None = None) -> None:
        """Let go of the memory of these parts (of all, by default)."""
        self.versions.unpin(index, parts)

    @property
    def pinned_bytes(self) -> int:
        """Memory set aside for pinned parts."""
        return self.versions.pinned_bytes

    def scratch_write(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Keep bytes on disk under a key until they are freed or the store is closed."""
        self._require_writable()
        written = self._scratch.write(key, view)
        self.versions.track(written)
        return written

    def scratch_read(self, key: Hashable, view: memoryview) -> "Future[None]":
        """Fill memory of the same length with the bytes under a key."""
        read = self._scratch.read(key, view)
        self.versions.track(read)
        return read

    def scratch_free(self, key: Hashable) -> None:
        """Forget the bytes under a key, if there are any."""
        self._scratch.free(key)

    # The whole store, synchronously.

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every parameter in order of name, with its optimizer states, as copies of the newest version: fp32 `param`,
        states in their own dtype, dense; of a sparse one also `mask`, as bool. One record is in memory at a time."""
        self.before_look()
        return audit.items(self)

    def tensor(self, name: str, part: str = "param") -> Tensor:
        """A copy of one tensor of the newest version.

        Raises:
            KeyError: no such parameter, or no such part of it.
        """
        self.before_look()
        return audit.tensor(self, name, part)

    def digest(self) -> str:
        """SHA-256 over what was committed: masters, states, masks and optimizer steps, in order of name. It does not depend
        on tiers, files, or when a record was last written."""
        self.before_look()
        return audit.digest(self)

    def verify(self) -> list[str]:
        """Read every live file and compare it with its checksums; one line per damage found, with what is still whole."""
        self.before_look()
        return integrity.verify(self)

    def repair(self) -> list[str]:
        """Undo damage of the last commit: make anew what follows from the rest of a record, else go back to the newest
        snapshot that is whole. One line for each thing done. Not under an engine.

        Raises:
            DamagedRecordError: nothing whole is left to go back to.
        """
        self._require_writable()
        return integrity.repair(self)

    def info(self, *, tbw_bytes: float | None = None) -> dict[str, Any]:
        """Sizes, versions, space by snapshot, tiers and counters, as JSON; with `tbw_bytes`, what a disk is said to stand
        in its life, also how many days of that are left at the rate of the last session."""
        return figures.info(self, tbw_bytes=tbw_bytes)

    def snapshot(self, name: str) -> None:
        """Hold the last commit under a name: one row, no data is copied.

        Raises:
            StoreError: the name is taken, or no text.
        """
        self._require_writable()
        _require_text(name)
        self.before_look()
        self.versions.add_snapshot(name)

    def remove_snapshot(self, name: str) -> int:
        """Give up a snapshot; the files that it alone held are removed. Gives their bytes."""
        self._require_writable()
        return self.versions.remove_snapshot(name)

    def restore(self, name: str, *, discard: bool = False) -> None:
        """Go back to what a snapshot holds, as a new commit: two rows change for each record that differs, no data is
        copied. Not under an engine.

        Raises:
            StoreError: no such snapshot; an engine trains this store; or the last commit is held by no snapshot, so
                that it would be lost, and `discard` does not allow that.
        """
        self._require_writable()
        if self.attached:
            raise StoreError(f"store '{self.path}' is being trained; close its engine, then restore")
        if not discard and self.manifest.last_commit().number not in self.manifest.snapshots().values():
            raise StoreError(
                f"store '{self.path}': the last commit (step {self.step}) is held by no snapshot and would be lost; "
                f"take one first, or allow it (discard=True, --discard)"
            )
        self.versions.restore(name)

    def branch(self, name: str, path: str | os.PathLike[str]) -> None:
        """Make a new store of what a snapshot holds. It shares the segments by hard link (or reflink): no data is
        copied, and both stores may go on by themselves.

        Raises:
            StoreError: no such snapshot, or the new path is taken or on another file system.
        """
        branch(self, name, Path(path))

    def snapshots(self) -> dict[str, int]:
        """Name of each snapshot → training step that it holds."""
        return {name: self.manifest.commit_row(number).step for name, number in self.manifest.snapshots().items()}

    def watch(self, log: Log) -> None:
        """From now on what is moved and committed is noted there, by unit or key."""
        self.disk.traffic.log = self.memory.traffic.log = self.versions.commits.log = log

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
        self.versions.close()
        self.disk.close()
        self.memory.close()
        self.manifest.close()
        if self._lock_handle is not None:
            try:
                directory.clear_scratch(self._place)
            finally:
                directory.unlock(self._lock_handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _materialise_frozen(self) -> None:
        """Give units that are never trained a file: they would be generated anew at every fetch."""
        for unit in self.units:
            if unit.trainable or any(parameter.name not in self.recipes for parameter in unit.parameters):
                continue
            if self.versions.records[unit.index].newest.slot is not None:
                continue
            layout = self._layouts[unit.index]
            record = RecordBuffer(layout)
            self.load(unit.index, record, [part.name for part in layout.parts]).result()
            self.write(unit.index, record, 0, 0).result()
            record.close()
        if self.versions.changed:
            self.commit(self.step, self.progress).result()

    def _require_own(self, index: int) -> None:
        if self.members.count == 1:
            return
        unit = index < len(self.owner)
        owner = self.owner[index] if unit else owner_of(self._layouts.number(index), self.members.count)
        if owner != self.members.rank:
            what = "unit" if unit else "record"
            raise ValueError(
                f"store '{self.path}': {what} {index} is owned by memory rank {owner}, not {self.members.rank}"
            )

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"store '{self.path}' was opened for reading; open it with writable=True")
        if self._closed:
            raise StoreError(f"store '{self.path}' is closed; open it again")


def _ranges(blocks: Sequence[Block], units: Sequence[Unit]) -> list[range]:
    """The units of each block: they are consecutive."""
    counts = Counter(unit.block for unit in units)
    ends = list(accumulate(counts[block.index] for block in blocks))
    return [range(end - counts[block.index], end) for block, end in zip(blocks, ends, strict=True)]


def _require_text(*names: str) -> None:
    """Refuse names that no file could hold: Python has strings that are no Unicode text.

    Raises:
        StoreError: naming the first.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StoreError(f"name {name!r} cannot be written as text: {error.reason}; give another name") from None


def _as_json(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they will be read back: tuples are lists."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be plain JSON without NaN or infinities, found {values!r}: {error}") from error
    return found


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "nothing"
