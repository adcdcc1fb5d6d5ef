"""What the store knows of each record while it is open: versions, files that hold them, parts kept in memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from weightstream.store.futures import NOW
from weightstream.store.rows import RecordRow
from weightstream.store.segments import AlignedBuffer
from weightstream.store.sparsity import DENSE, Sparsity

FILES_PER_RECORD = 3
"""The last commit, one that is being committed, and one that is being written; snapshots come on top."""
MEMBERS_KEPT, FORGOTTEN_AT_ONCE = 1024, 2
_ELSEWHERE = "./"


@dataclass(eq=False, slots=True)
class Entry:
    """One version of one record. Without a slot it is made by the generator: nobody has updated it yet.

    Where it shares its file, `slot` is that file's name, and its parts begin at `offset`.
    """

    version: int
    optimizer_steps: int
    slot: str | None = None
    checksums: Mapping[str, int] = field(default_factory=dict)
    offset: int = 0
    ready: "Future[Any]" = NOW  # its file is written and synced
    readers: "list[Future[Any]]" = field(default_factory=list)
    claimed: "Future[None]" = NOW  # it has a file, though perhaps not written
    unchecked: set[str] = field(default_factory=set)  # parts that were read without a check
    sparsity: Sparsity = DENSE

    def users(self) -> "list[Future[Any]]":
        """What must end before this version's file may be overwritten."""
        return [future for future in (self.ready, *self.readers) if not future.done()]

    def add_reader(self, future: "Future[Any]") -> None:
        self.readers = [reader for reader in self.readers if not reader.done()]
        self.readers.append(future)


@dataclass(eq=False)
class PinnedPart:
    """One part of one record in memory. `entry` is the version that it holds, or will when `ready` is done."""

    buffer: AlignedBuffer
    entry: Entry | None = None
    ready: "Future[Any]" = NOW
    users: "list[Future[Any]]" = field(default_factory=list)

    def busy(self) -> "list[Future[Any]]":
        """What must end before the memory may be written again."""
        return [future for future in (self.ready, *self.users) if not future.done()]

    def add_user(self, future: "Future[Any]") -> None:
        self.users = [user for user in self.users if not user.done()]
        self.users.append(future)

    def expect(self, entry: Entry, ready: "Future[Any]") -> None:
        """From now on this part holds `entry`, once `ready` is done."""
        self.users = self.busy()
        self.entry, self.ready = entry, ready

    def forget(self) -> None:
        """It holds nothing; what still works on the memory is remembered."""
        self.users = self.busy()
        self.entry = None


@dataclass(eq=False, slots=True)
class Record:
    """One record: its versions and files.

    `newest` is what is served, `accepted` what an undone step goes back to, `committed` what the last commit published,
    `committing` what commits under way will publish, in order. `slots` maps each file of the record to the version that
    it was last given to.
    """

    committed: Entry
    newest: Entry
    accepted: Entry
    committing: list[Entry] = field(default_factory=list)
    slots: dict[str, Entry | None] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # files that snapshots point to
    unsynced: set[str] = field(default_factory=set)  # files whose names may not be on the medium
    doubtful: set[str] = field(default_factory=set)  # files of commits that failed, which may be found after a crash
    pinned: dict[str, PinnedPart] = field(default_factory=dict)
    claimed: "Future[None]" = NOW  # of the version written last
    folder: str = ""  # that this rank's segments are in
    initial: Sparsity = DENSE  # of what the generator makes

    @property
    def pending(self) -> bool:
        """Whether it has a version that no commit has been asked to publish."""
        return self.newest is not (self.committing[-1] if self.committing else self.committed)

    @classmethod
    def of(cls, entry: Entry) -> "Record":
        """A record that has just been opened or made."""
        return cls(committed=entry, newest=entry, accepted=entry)

    @classmethod
    def load(
        cls, rows: Iterable[RecordRow], held: Collection[int], folder: str = "", initial: Sparsity = DENSE
    ) -> "Record":
        """What the rows of one record say; `held` are the commits that snapshots name, `initial` the sparsity of what the
        generator makes."""
        record = cls.of(Entry(version=0, optimizer_steps=0, sparsity=initial))
        record.folder, record.initial = folder, initial
        for row in rows:
            entry = record.entry_of(row)
            if row.died is None:
                record.go_to(entry)
            if not row.offset and any(row.lives_at(number) for number in held):
                record.held.add(slot_of(row.file, folder))
        return record

    def go_to(self, entry: Entry) -> None:
        """The commit has changed under it."""
        self.committed = self.newest = self.accepted = entry

    def undo(self, *, to_commit: bool) -> None:
        """Forget versions that were not accepted, or all that no commit was asked to publish."""
        last = self.committing[-1] if self.committing else self.committed
        if to_commit:
            self.accepted = last
        self.newest = self.accepted
        for pin in self.pinned.values():
            if pin.entry is not self.newest:
                pin.forget()

    def has(self, entry: Entry) -> bool:
        """Whether this version may still be served or published."""
        return any(entry is other for other in (self.committed, self.newest, self.accepted, *self.committing))

    @property
    def idle(self) -> bool:
        """Whether everything about it is in the manifest."""
        return (
            not (self.pending or self.committing or self.pinned or self.unsynced or self.doubtful)
            and self.accepted is self.committed
            and not self.committed.users()
            and not any(self.users(slot) for slot in self.slots)
        )

    def in_use(self) -> set[str]:
        """Files of the versions that this process may still serve or publish."""
        entries = (self.committed, self.newest, self.accepted, *self.committing)
        return {entry.slot for entry in entries if entry.slot is not None}

    def live(self) -> set[str]:
        """Files that may not be overwritten."""
        return self.held | self.doubtful | self.in_use()

    def claim(self, entry: Entry) -> "list[Future[Any]] | None":
        """Give the entry a file: a dead one, else a new one. Returns what must end before it may be written.

        None if all files that the record may have are live: a commit must end first.
        """
        live = self.live()
        dead = [slot for slot in self.slots if slot not in live]
        if dead:
            slot = min(dead, key=lambda name: (len(self.users(name)), name))
            waits = self.users(slot)
        elif len(self.slots.keys() - self.held - self.doubtful) < FILES_PER_RECORD:
            slot = next(name for name in slot_names() if name not in self.slots)
            waits = []
        else:
            return None
        self.slots[slot] = entry
        entry.slot = slot
        return waits

    def forget(self, slot: str) -> None:
        """The file of that slot is gone."""
        self.held.discard(slot)
        self.slots.pop(slot, None)

    def entry_of(self, row: RecordRow | None) -> Entry:
        """The version that a row of the manifest stands for; without one, what the generator makes."""
        if row is None:
            return Entry(version=0, optimizer_steps=0, sparsity=self.initial)
        if row.offset:
            here = self.committed
            same = (here.version, here.slot, here.offset) == (row.version, row.file, row.offset)
            return here if same else Entry(row.version, row.optimizer_steps, row.file, row.checksums, row.offset)
        slot = slot_of(row.file, self.folder)
        known = self.slots.get(slot)
        wanted = (row.version, row.checksums, row.sparsity)
        if known is not None and (known.version, known.checksums, known.sparsity) == wanted:
            return known
        entry = Entry(row.version, row.optimizer_steps, slot, row.checksums, sparsity=row.sparsity)
        if not is_elsewhere(slot):
            self.slots[slot] = entry
        return entry

    def users(self, slot: str) -> "list[Future[Any]]":
        """What must end before this file may be written again or removed."""
        owner = self.slots.get(slot)
        return owner.users() if owner is not None else []


class Records:
    """Records by index: those of blocks always, those of families while they are in use and a while longer.

    Args:
        blocks: the records of the blocks.
        load: what the manifest says of another one.
    """

    def __init__(self, blocks: list[Record], load: Callable[[int], Record]) -> None:
        self._blocks, self._load = blocks, load
        self._members: OrderedDict[int, Record] = OrderedDict()
        self._lock = threading.RLock()

    def __getitem__(self, index: int) -> Record:
        if index < len(self._blocks):
            return self._blocks[index]
        with self._lock:
            return self.keep(index, self._members.get(index) or self._load(index))

    def known(self, index: int) -> Record | None:
        """The record if it is in memory."""
        if index < len(self._blocks):
            return self._blocks[index]
        with self._lock:
            return self._members.get(index)

    def keep(self, index: int, record: Record) -> Record:
        """Take in a family's record, unless it is in memory; gives the one that is."""
        with self._lock:
            found = self._members.setdefault(index, record)
            self._members.move_to_end(index)
            if len(self._members) > MEMBERS_KEPT:
                self._forget_idle()
            return found

    def in_memory(self) -> list[tuple[int, Record]]:
        """Every record that is in memory, with its index."""
        with self._lock:
            return [*enumerate(self._blocks), *self._members.items()]

    def _forget_idle(self) -> None:
        """Lets go of records of families that have rested longest, a few at a time."""
        excess = min(len(self._members) - MEMBERS_KEPT, FORGOTTEN_AT_ONCE)
        for index in list(islice(self._members, excess)):
            if self._members[index].idle:
                del self._members[index]
            else:
                self._members.move_to_end(index)  # it would be asked again and again


def slot_names() -> Iterator[str]:
    """a, b, …, z, aa, ab, …"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield from letters
    for prefix in slot_names():
        yield from (prefix + letter for letter in letters)


def file_name(block: int, slot: str, folder: str = "") -> str:
    """The name of a segment file of a record's own."""
    if is_elsewhere(slot):
        return slot.removeprefix(_ELSEWHERE)
    name = f"{block:05d}.{slot}.safetensors"
    return f"{folder}/{name}" if folder else name


def slot_of(name: str, folder: str = "") -> str:
    """The slot in the name of a segment file; the whole name, marked, of one that another memory rank wrote."""
    own = name.removeprefix(f"{folder}/") if folder else name
    if (folder and own == name) or "/" in own:
        return _ELSEWHERE + name
    return own.split(".")[-2]


def is_elsewhere(slot: str) -> bool:
    """Whether it names a file in the folder of another memory rank, which this one only reads."""
    return slot.startswith(_ELSEWHERE)


def pin_parts(
    record: Record, parts: Iterable[tuple[str, int]], memory: Callable[[str, int], AlignedBuffer]
) -> list[tuple[str, PinnedPart]]:
    """Keep these parts (name, bytes) in memory from their next read or write on; gives those that were not pinned yet."""
    new = [(name, PinnedPart(memory(name, nbytes))) for name, nbytes in parts if name not in record.pinned]
    record.pinned.update(new)
    return new


def unpin_parts(record: Record, parts: Collection[str]) -> None:
    """Let the memory go; what still reads it keeps it until it has ended."""
    for name in parts:
        if (pin := record.pinned.pop(name, None)) is not None:
            pin.buffer.discard()
