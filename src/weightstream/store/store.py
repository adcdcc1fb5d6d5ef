"""The store: durable, versioned records, moved in the background, published by commits.

An update never touches what was published. It writes a new version to a file that nothing points to, and a commit makes
all such versions, the training step and the caller's progress current in one SQLite transaction. So a crash at any
instant finds the last commit whole, and the store is the checkpoint.
"""

import json
import os
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from weightstream.blocks import Block, Parameter
from weightstream.errors import StoreError, StoreMismatchError
from weightstream.store import audit, directory
from weightstream.store.initial import Recipe
from weightstream.store.layout import Precision, RecordLayout, record_layout
from weightstream.store.manifest import Manifest
from weightstream.store.optimizers import Optimizer
from weightstream.store.scratch import Scratch
from weightstream.store.segments import RecordBuffer
from weightstream.store.tiers import Disk, Memory
from weightstream.store.versions import Versions


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
        self.blocks = tuple(_block_from_facts(index, name, facts) for index, name, facts in blocks)
        self.recipes: dict[str, Recipe] = {
            name: Recipe.from_json(recipe) for _, _, facts in blocks for name, recipe in facts["recipes"].items()
        }
        self._layouts = [record_layout(block, self.precision, self.optimizer) for block in self.blocks]
        records = directory.records(self.path, self._layouts, rows, held, keep_dead=self.writable)
        self._scratch = Scratch(disk, path / directory.SCRATCH)
        self._closed = False
        # called before anything looks at the whole store: an engine applies the updates that still wait
        self.before_look: Callable[[], None] = lambda: None
        self.versions = Versions(
            path,
            self._layouts,
            records,
            last,
            manifest=manifest,
            disk=disk,
            memory=self.memory,
            recipes=self.recipes,
            seed=self.seed,
            writable=self.writable,
        )

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
                "id": uuid.uuid4().hex,  # by which a target of a push knows the store that it holds
                "contract": _as_json("contract", contract),
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
        try:
            store._materialise_frozen()
        except BaseException:
            store.close()
            raise
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

    @property
    def step(self) -> int:
        """The training step of the last commit; 0 in a new store."""
        return self.versions.step

    @property
    def progress(self) -> dict[str, Any]:
        """What the caller kept with the last commit."""
        return self.versions.progress

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

    def layout(self, block_index: int) -> RecordLayout:
        """Where the numbers of this block's record lie."""
        return self._layouts[block_index]

    def version(self, block_index: int) -> int:
        """The newest version, pending ones included."""
        return self.versions.records[block_index].newest.version

    def optimizer_steps(self, block_index: int) -> int:
        """How many optimizer steps the newest version has had."""
        return self.versions.records[block_index].newest.optimizer_steps

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
        return self.versions.read(block_index, {part.name: view[: part.nbytes]}, "copy")

    def load(
        self, block_index: int, record: RecordBuffer, parts: Collection[str] | None = None, *, check: bool = True
    ) -> "Future[int]":
        """Fill a buffer with masters and states (or the parts named) of the newest version, at their places.

        Binds the buffer to this block's layout. The bf16 copy is not loaded unless named: an update makes it anew.
        With `check=False` the bytes from disk must not be used before `check` has been called.
        """
        layout = self._layouts[block_index]
        record.bind(layout)
        wanted = layout.states if parts is None else tuple(layout.part(name) for name in parts)
        return self.versions.read(
            block_index, {part.name: record.view(part.name) for part in wanted}, "states", check=check
        )

    def check(self, block_index: int, record: RecordBuffer) -> None:
        """Compare what `load(check=False)` read with its checksums, by all cores: to be called where compute waits.

        Raises:
            DamagedRecordError: the bytes are not those that were written.
        """
        self.versions.check(block_index, record)

    def checksums(self, block_index: int, record: RecordBuffer) -> dict[str, int]:
        """The checksum of each part of a record that is about to be written, by all cores."""
        return self.versions.sums(block_index, record)

    def write(
        self,
        block_index: int,
        record: RecordBuffer,
        version: int,
        optimizer_steps: int,
        checksums: Mapping[str, int] | None = None,
    ) -> "Future[None]":
        """Write the whole image as a new version, to be published by the next commit; done when synced.

        From now on `fetch` and `load` serve this version, once it is written. Without `checksums` of all its parts they
        are made on the way to the disk.

        Raises:
            StoreError: opened for reading, or an earlier commit failed and `discard` was not called.
            ValueError: a version older than the newest, or a buffer bound to another layout.
        """
        self._require_writable()
        return self.versions.write(block_index, record, version, optimizer_steps, checksums)

    def commit(self, step: int, progress: Mapping[str, Any]) -> "Future[None]":
        """Publish every version written so far, with the step and the caller's progress, in one transaction.

        Waits for these writes. When the future is done the commit survives a crash, and files of older versions that
        no snapshot holds may be used again.

        Raises (in the future):
            StoreError: a write failed; the last commit is whole, `discard` goes back to it.
        """
        self._require_writable()
        return self.versions.commit(step, _as_json("progress", progress))

    def discard(self) -> None:
        """Forget every version that no commit was asked to publish: the undo of a step.

        After a failed commit or write it makes the store usable again, at its last commit.
        """
        self.versions.discard()

    def pin(self, block_index: int, parts: Collection[str]) -> None:
        """Keep these parts of a record in memory: filled by their next read or write, written through, read from
        memory afterwards. Parts that the record does not have are left out."""
        self.versions.pin(block_index, parts)

    def unpin(self, block_index: int, parts: Collection[str] | None = None) -> None:
        """Let go of the memory of these parts (of all, by default)."""
        self.versions.unpin(block_index, parts)

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
        states in their own dtype. One record is in memory at a time."""
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
        """SHA-256 over what was committed: masters, states and optimizer steps, in order of name. It does not depend
        on tiers, files, or when a record was last written."""
        self.before_look()
        return audit.digest(self)

    def verify(self) -> list[str]:
        """Read every live file and compare it with its checksums; one line per damage found."""
        self.before_look()
        return audit.verify(self)

    def info(self) -> dict[str, Any]:
        """Sizes, versions and counters, as JSON."""
        return audit.info(self)

    def snapshot(self, name: str) -> None:
        """Hold the last commit under a name: one row, no data is copied."""
        self._require_writable()
        self.before_look()
        self.versions.add_snapshot(name)

    def remove_snapshot(self, name: str) -> None:
        """Give up a snapshot; files that it alone held are used again."""
        self._require_writable()
        self.versions.remove_snapshot(name)

    def snapshots(self) -> dict[str, int]:
        """Name of each snapshot → training step that it holds."""
        return {name: self.manifest.commit_row(number).step for name, number in self.manifest.snapshots().items()}

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
            directory.clear_scratch(self.path)
            directory.unlock(self._lock_handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        if any(state.pending for state in self.versions.records):
            self.commit(0, {}).result()

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"store '{self.path}' was opened for reading; open it with writable=True")
        if self._closed:
            raise StoreError(f"store '{self.path}' is closed; open it again")


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


def _as_json(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they will be read back: tuples are lists."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be plain JSON without NaN or infinities, found {values!r}: {error}") from error
    return found


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "nothing"
