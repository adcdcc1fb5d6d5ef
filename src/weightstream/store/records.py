"""What the store knows of each record while it is open: versions, files that hold them, parts kept in memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from weightstream.store.futures import done, new_future
from weightstream.store.segments import AlignedBuffer

FILES_PER_RECORD = 3
"""The last commit, one that is being committed, and one that is being written; snapshots come on top."""


@dataclass(eq=False)
class Entry:
    """One version of one record. Without a slot it is made by the generator: nobody has updated it yet."""

    version: int
    optimizer_steps: int
    slot: str | None = None
    checksums: Mapping[str, int] = field(default_factory=dict)
    ready: "Future[Any]" = field(default_factory=lambda: done(None))  # its file is written and synced
    readers: "list[Future[Any]]" = field(default_factory=list)
    claimed: "Future[None]" = field(default_factory=new_future)  # it has a file, though perhaps not written
    unchecked: set[str] = field(default_factory=set)  # parts that were read without a check

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
    ready: "Future[Any]" = field(default_factory=lambda: done(None))
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


@dataclass(eq=False)
class Record:
    """One record: its versions and files.

    `newest` is what is served, `committed` what the last commit published, `committing` what commits under way will
    publish, in order. `slots` maps each file of the record to the version that it was last given to.
    """

    committed: Entry
    newest: Entry
    committing: list[Entry] = field(default_factory=list)
    slots: dict[str, Entry | None] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # files that snapshots point to
    unsynced: set[str] = field(default_factory=set)  # files whose names may not be on the medium
    doubtful: set[str] = field(default_factory=set)  # files of commits that failed, which may be found after a crash
    pinned: dict[str, PinnedPart] = field(default_factory=dict)
    claimed: "Future[None]" = field(default_factory=lambda: done(None))  # of the version written last

    @property
    def pending(self) -> bool:
        """Whether it has a version that no commit has been asked to publish."""
        return self.newest is not (self.committing[-1] if self.committing else self.committed)

    def live(self) -> set[str]:
        """Files that may not be overwritten."""
        entries = (self.committed, self.newest, *self.committing)
        return self.held | self.doubtful | {entry.slot for entry in entries if entry.slot is not None}

    def claim(self, entry: Entry) -> "list[Future[Any]] | None":
        """Give the entry a file: a dead one, else a new one. Returns what must end before it may be written.

        None if all files that the record may have are live: a commit must end first.
        """
        live = self.live()
        dead = [slot for slot in self.slots if slot not in live]
        if dead:
            slot = min(dead, key=lambda name: (len(self._users(name)), name))
            waits = self._users(slot)
        elif len(self.slots) - len(self.held | self.doubtful) < FILES_PER_RECORD:
            slot = next(name for name in slot_names() if name not in self.slots)
            waits = []
        else:
            return None
        self.slots[slot] = entry
        entry.slot = slot
        return waits

    def _users(self, slot: str) -> "list[Future[Any]]":
        owner = self.slots[slot]
        return owner.users() if owner is not None else []


def slot_names() -> Iterator[str]:
    """a, b, …, z, aa, ab, …"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield from letters
    for prefix in slot_names():
        yield from (prefix + letter for letter in letters)


def file_name(block: int, slot: str) -> str:
    """The name of a segment file."""
    return f"{block:05d}.{slot}.safetensors"


def slot_of(name: str) -> str:
    """The slot in the name of a segment file."""
    return name.split(".")[-2]


def pin_parts(record: Record, parts: Iterable[tuple[str, int]]) -> None:
    """Keep these parts (name, bytes) in memory from their next read or write on."""
    for name, nbytes in parts:
        if name not in record.pinned:
            record.pinned[name] = PinnedPart(AlignedBuffer(nbytes))


def unpin_parts(record: Record, parts: Collection[str]) -> None:
    """Let the memory go; what still reads it keeps it until it has ended."""
    for name in parts:
        record.pinned.pop(name, None)
