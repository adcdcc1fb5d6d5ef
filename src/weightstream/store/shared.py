"""Files that small records share: those of families that one commit wrote, one after another.

    shared/<folder>/<serial>.safetensors

Each is one safetensors file: a header that names every tensor of every record in it, then their parts, page-aligned. A
record is placed when it is written, at the end of the file that is being filled, and the header is written when the
commit comes: room for it is kept in front, and a file whose room is used up is followed by another one with more. Then
the file is synced once, and never written again until nothing points to any of it; as a whole it is then filled anew,
under a new name and only if it has no other hard link, or removed. Serial numbers grow, so that an opening finds what
was never committed by looking at the last folders alone.

Several memory ranks each have files of their own, in `<folder of the rank>/shared/`, and serial numbers that no other has:
of so many ranks every one takes its turn. What one of them commits all of them keep in their manifests.

How many bytes of a file are live is in the manifest (`SharedRow`); how the others come back is `compaction.py`.
"""

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weightstream.errors import StoreError
from weightstream.store.directory import SHARED
from weightstream.store.futures import chain, done, gather, new_future
from weightstream.store.layout import ALIGN_PART, RecordLayout, shared_header
from weightstream.store.manifest import Manifest
from weightstream.store.members import ALONE, Members, folder_of
from weightstream.store.records import Entry
from weightstream.store.rows import SharedRow
from weightstream.store.segments import AlignedBuffer
from weightstream.store.tiers import Disk
from weightstream.units import align

log = logging.getLogger("weightstream.store")

FILES_PER_FOLDER = 1024
FILE_BYTES = 256 << 20
"""A file that is as long is followed by another one: what is freed as a whole should not be too much at a time."""
LEAST_HEADER_BYTES, MOST_HEADER_BYTES = ALIGN_PART, 1 << 20
_GROWN_AT_ONCE_BYTES = 16 << 20


@dataclass(eq=False, slots=True)
class Place:
    """A record in a file that is not committed yet; `text` is what the header says of its tensors."""

    index: int
    entry: Entry
    nbytes: int
    text: str
    text_bytes: int

    @classmethod
    def of(cls, index: int, entry: Entry, layout: RecordLayout, base: int) -> "Place":
        """`base` is where its parts begin, from the end of the header."""
        text = layout.entries(base, index)
        said = f"{index}:{entry.version},"  # in the metadata
        return cls(index, entry, layout.parts_nbytes, text, len(text.encode()) + 1 + len(said))


@dataclass(eq=False, slots=True)
class SharedFile:
    """A file that is being filled or committed."""

    serial: int
    name: str
    header_nbytes: int
    end: int
    allocate_bytes: int
    text_bytes: int = 256  # the metadata's own, and more
    places: dict[int, Place] = field(default_factory=dict)  # by offset

    def has_room(self, nbytes: int, text_bytes: int) -> bool:
        return self.text_bytes + text_bytes <= self.header_nbytes and (
            not self.places or self.end + nbytes <= FILE_BYTES
        )


@dataclass(eq=False, slots=True)
class Batch:
    """The files of one commit. `free` are places that an undone or replaced version leaves, by their bytes; SQLite was
    `asked` for the commit. `expected_bytes` of records are about to come, if that is known."""

    files: list[SharedFile] = field(default_factory=list)
    asked: bool = False
    expected_bytes: int | None = None
    free: dict[int, list[tuple[SharedFile, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def nbytes(self) -> int:
        return sum(file.end for file in self.files)


class _Users:
    """How many operations are under way on each file."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._counts: Counter[str] = Counter()
        self._waiting: dict[str, Future[None]] = {}

    def add(self, name: str, future: "Future[Any]") -> None:
        self._counts[name] += 1
        future.add_done_callback(lambda _: self._end(name))

    def idle(self, name: str) -> "Future[None]":
        """Done when nothing is under way on the file."""
        return self._waiting.setdefault(name, new_future()) if self._counts[name] else done(None)

    def _end(self, name: str) -> None:
        with self._lock:
            self._counts[name] -= 1
            waiting = None
            if not self._counts[name]:
                del self._counts[name]
                waiting = self._waiting.pop(name, None)
        if waiting is not None:
            waiting.set_result(None)


class SharedFiles:
    """The files of one open store that records share. Callers hold `lock`, unless it is said otherwise.

    Args:
        segments: the store's folder of segments.
        lock: guards the versions, too, since a record's place and its file change together.
        members: this memory rank among all of them.
    """

    def __init__(
        self, segments: Path, disk: Disk, manifest: Manifest, lock: threading.RLock, members: Members = ALONE
    ) -> None:
        self.segments, self.disk, self.manifest, self.lock, self._members = segments, disk, manifest, lock, members
        self._next = self._serial_after(manifest.last_serial())
        self.filling = Batch()
        self._open: dict[str, SharedFile] = {}  # those that are being filled or committed
        self._readers, self._writers = _Users(lock), _Users(lock)
        self._last_text_bytes = 0
        self._last_bytes = [0, 0]  # that the last two commits wrote
        self._spare: list[str] = []  # dead files that may be filled anew
        self._resting: set[str] = set()  # dead files that somebody still reads
        self._gone: list[str] = []  # dead files that are no more, though the manifest may name them
        self._changed: set[Path] = set()  # folders whose names may not be on the medium
        self._doubtful: list[SharedFile] = []  # of commits that failed, which may be found after a crash

    def _serial_after(self, last: int) -> int:
        """The first serial number of this rank that is greater."""
        return last + 1 + (self._members.rank - last - 1) % self._members.count

    def is_ours(self, name: str) -> bool:
        """Whether this rank is who fills a file anew, empties or removes it: its own, and the first one those of ranks that
        are no more."""
        folder = name.partition(f"{SHARED}/")[0].rstrip("/")
        active = {folder_of(rank) for rank in range(self._members.count)}
        return folder == self._members.folder or (self._members.rank == 0 and folder not in active)

    # Filling.

    def place(self, index: int, layout: RecordLayout, entry: Entry, batch: Batch | None = None, more: int = 1) -> None:
        """Give a version its place, in `entry.slot` and `entry.offset`. `more` records are about to be placed.

        Raises:
            OSError: a folder could not be made.
        """
        batch = batch or self.filling
        if self._reuse(index, layout, entry, batch):
            return
        nbytes = layout.parts_nbytes
        file = batch.files[-1] if batch.files else None
        place = Place.of(index, entry, layout, file.end - file.header_nbytes if file is not None else 0)
        if file is None or not file.has_room(nbytes, place.text_bytes):
            # offsets take the more digits the further they are
            file = self._start(batch, Place.of(index, entry, layout, FILE_BYTES), more)
            place = Place.of(index, entry, layout, 0)
        self._put(file, file.end, place)
        file.end += nbytes
        if file.end > file.allocate_bytes:
            # a file that grows makes its writers wait: not with every record, once there are many
            grown = min(file.end, _GROWN_AT_ONCE_BYTES) if file.end >= _GROWN_AT_ONCE_BYTES // 8 else 0
            file.allocate_bytes = file.end + max(grown, min(more - 1, FILE_BYTES // nbytes) * nbytes if nbytes else 0)

    def allocate_bytes(self, entry: Entry) -> int:
        """The length that the file of a version that was just placed should have."""
        assert entry.slot is not None
        return self._open[entry.slot].allocate_bytes

    def let_go(self, entry: Entry) -> None:
        """Nothing refers to this version any more: another one may take its place, if it was not committed."""
        file = next((file for file in self.filling.files if file.name == entry.slot), None)
        place = file.places.get(entry.offset) if file is not None else None
        if file is not None and place is not None and place.entry is entry:
            self.filling.free[place.nbytes].append((file, entry.offset))

    def reading(self, name: str, future: "Future[Any]") -> None:
        """The file is left alone until this is done."""
        self._readers.add(name, future)

    def writing(self, name: str, future: "Future[Any]") -> None:
        """The file is not closed until this is done."""
        self._writers.add(name, future)

    def _put(self, file: SharedFile, offset: int, place: Place) -> None:
        file.places[offset] = place
        file.text_bytes += place.text_bytes
        place.entry.slot, place.entry.offset = file.name, offset

    def _reuse(self, index: int, layout: RecordLayout, entry: Entry, batch: Batch) -> bool:
        """Take the place of a version that was undone or replaced before any commit; without such places, steps between
        two commits would fill the disk."""
        free = batch.free.get(layout.parts_nbytes, [])
        for number, (file, offset) in enumerate(free):
            before = file.places[offset]
            if before.entry.users():
                continue
            place = Place.of(index, entry, layout, offset - file.header_nbytes)
            if file.text_bytes - before.text_bytes + place.text_bytes > file.header_nbytes:
                continue
            file.text_bytes -= before.text_bytes
            self._put(file, offset, place)
            del free[number]
            return True
        return False

    def _start(self, batch: Batch, first: Place, more: int) -> SharedFile:
        """Room for the header: as much as what is expected needs, or else as the last commit used or, in a later file of a
        commit, twice what the one before it uses; no more than the file can use. `first` is placed where its text is
        longest."""
        expected = 2 * batch.files[-1].text_bytes if batch.files else self._last_text_bytes
        if batch.expected_bytes is not None:
            expected = batch.expected_bytes // max(1, first.nbytes) * first.text_bytes
        asked = (more + more // 8) * first.text_bytes  # the numbers of other records may be longer
        wanted = min(max(expected, asked), (1 + FILE_BYTES // first.nbytes) * first.text_bytes)
        least = first.text_bytes + 512
        header_nbytes = align(max(min(wanted + 512, MOST_HEADER_BYTES), least, LEAST_HEADER_BYTES), ALIGN_PART)
        name = name_of(self._next, self._members.folder)
        path = self.segments / name
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            self._changed |= {path.parent.parent, path.parent.parent.parent, self.segments}
        self._fill_anew(path)
        file = SharedFile(self._next, name, header_nbytes, header_nbytes, header_nbytes)
        self._next += self._members.count
        batch.files.append(file)
        self._open[name] = file
        return file

    def _fill_anew(self, path: Path) -> None:
        """Give a dead file the name of a new one, if there is one that nobody shares."""
        while self._spare:
            name = self._spare.pop(0)
            dead = self.segments / name
            self._gone.append(name)
            self._changed.add(dead.parent)
            if not dead.exists():
                continue
            if dead.stat().st_nlink == 1:
                dead.rename(path)
                return
            self.disk.device.unlink(dead)

    # Committing: in the commit thread, one at a time.

    def take(self, published: Iterable[Entry]) -> Batch:
        """The files that hold versions to be published; what is written from now on goes to others."""
        names = {entry.slot for entry in published if entry.offset}
        if not any(file.name in names for file in self.filling.files):
            return Batch()
        batch, self.filling = self.filling, Batch()
        batch.free.clear()
        return batch

    def seal(self, batch: Batch, published: Iterable[Entry]) -> "Future[list[SharedRow]]":
        """Write the headers and sync; gives the rows of the files that hold something. Without the lock."""
        wanted = {id(entry) for entry in published}
        files = [file for file in batch.files if any(id(place.entry) in wanted for place in file.places.values())]
        return gather([self._seal(file, wanted) for file in files])

    def pending(self, batch: Batch) -> tuple[set[Path], list[str]]:
        """Folders to be synced before a commit, and the names of dead files that it may then forget.

        Those of the commit's own files are among them: a file is made by its first write, which may come after an earlier
        commit has synced the folder.
        """
        folders, self._changed = self._changed, set()
        return folders | {(self.segments / file.name).parent for file in batch.files}, list(self._gone)

    def again(self, folders: Collection[Path]) -> None:
        """These folders were not synced."""
        self._changed |= set(folders)

    def committed(self, batch: Batch, rows: Sequence[SharedRow], gone: Collection[str]) -> None:
        """It is durable: what died with it, or was left by commits that failed, may be used again."""
        self._gone = [name for name in self._gone if name not in gone]
        kept = {row.file for row in rows}
        # ranks that fill fewer files keep up, so that what was never committed is always in the last folders
        self._next = max(self._next, self._serial_after(max((row.serial for row in rows), default=0)))
        self._last_text_bytes = sum(file.text_bytes for file in batch.files)
        self._close(batch)
        self.left(file.name for file in (*batch.files, *self._doubtful) if file.name not in kept)
        self._doubtful = []
        self._last_bytes = [self._last_bytes[-1], batch.nbytes]
        self.collect()

    def collect(self) -> None:
        """Take up files that the manifest has no use for, and remove those beyond what the next commit will fill anew: as
        much as the larger of the last two did."""
        if self._next == self._serial_after(0):
            return  # there never was one
        try:
            known = {*self._spare, *self._gone, *self._resting}
            dead = [row.file for row in self.manifest.dead_files() if row.file not in known]
            self.left([name for name in dead if self.is_ours(name)])
            kept = 0
            for name in list(self._spare):
                kept += _size(self.segments / name)
                if kept > max(self._last_bytes):
                    self._spare.remove(name)
                    self._remove(name)
        except (OSError, StoreError) as error:
            log.warning("store '%s': dead files are left for the next commit: %s", self.segments.parent, error)

    def readers_gone(self, name: str) -> "Future[None]":
        """Done when nobody here reads the file."""
        return self._readers.idle(name)

    def failed(self, batch: Batch) -> None:
        """The commit failed. If SQLite was asked for it, it may yet be found after a crash: until one succeeds, its
        files are left alone."""
        self._close(batch)
        if batch.asked:
            self._doubtful += batch.files
        else:
            self.left(file.name for file in batch.files)

    def left(self, names: Iterable[str]) -> None:
        """Nothing points to these files; they may be used again when nobody reads or writes them."""
        for name in names:
            self._resting.add(name)
            waits = [self._readers.idle(name), self._writers.idle(name)]
            gather(waits).add_done_callback(partial(self._rested, name))

    def close(self) -> None:
        """What was written and not committed is removed."""
        for file in self.filling.files:
            self.disk.device.unlink(self.segments / file.name)

    def clear(self) -> None:
        """At an opening: remove what no commit has published, and take up the files that are dead."""
        first = max(self._next - FILES_PER_FOLDER, 1)
        known = {row.file for row in self.manifest.shared(first - first % FILES_PER_FOLDER)}
        for folder in self._folders(first):
            for path in sorted(folder.iterdir()):
                name = path.relative_to(self.segments).as_posix()
                if name not in known:
                    self.disk.device.unlink(path)
                    self._changed.add(folder)
        self._spare += [row.file for row in self.manifest.dead_files() if self.is_ours(row.file)]

    def _folders(self, serial: int) -> list[Path]:
        """The folders of files that are this rank's to clear, from the one of a serial number on."""
        first = Path(name_of(serial)).parent.name
        found = [folder for root in (SHARED, f"*/{SHARED}") for folder in self.segments.glob(f"{root}/*")]
        ours = [folder for folder in found if self.is_ours(f"{folder.relative_to(self.segments).as_posix()}/")]
        return sorted(folder for folder in ours if folder.name >= first)

    def _close(self, batch: Batch) -> None:
        for file in batch.files:
            del self._open[file.name]

    def _seal(self, file: SharedFile, wanted: Collection[int]) -> "Future[SharedRow]":
        live = {offset: place for offset, place in file.places.items() if id(place.entry) in wanted}
        dead, end = [], 0
        for offset, place in sorted(file.places.items()):
            start = offset - file.header_nbytes
            if offset not in live:
                dead.append((start, start + place.nbytes))
            assert start >= end, "places do not overlap"
            end = start + place.nbytes
        records = ",".join(f"{place.index}:{place.entry.version}" for place in live.values())
        text = shared_header((p.text for p in live.values()), records, _joined(dead), file.header_nbytes)
        header = AlignedBuffer(file.header_nbytes)
        header.view[:] = text
        file.places = {}
        with self.lock:
            written = self._writers.idle(file.name)
        path = self.segments / file.name

        def start_writing() -> "Future[list[int]]":
            return self.disk.write(path, [(0, header.view)], "segment", allocate_bytes=file.end, exact=True)

        out: Future[SharedRow] = new_future()

        def finish(finished: "Future[list[int]]") -> None:
            header.close()
            try:
                (checksum,) = finished.result()
            except BaseException as error:
                out.set_exception(error)
            else:
                said_nbytes = min(align(file.text_bytes, ALIGN_PART), file.header_nbytes)
                place = (file.serial, file.name, file.end, file.header_nbytes, said_nbytes)
                out.set_result(SharedRow(*place, f"{checksum:016x}"))

        chain([written], start_writing).add_done_callback(finish)
        return out

    def _rested(self, name: str, _: "Future[Any]") -> None:
        with self.lock:
            self._resting.discard(name)
            self._spare.append(name)

    def _remove(self, name: str) -> None:
        self.disk.device.unlink(self.segments / name)
        self._gone.append(name)
        self._changed.add((self.segments / name).parent)


@dataclass(slots=True)
class WholeFile:
    """A shared file of which all is known beforehand."""

    serial: int
    places: list[Place] = field(default_factory=list)
    parts_nbytes: int = 0
    text_bytes: int = 256

    @property
    def name(self) -> str:
        return name_of(self.serial)

    @property
    def header_nbytes(self) -> int:
        return align(self.text_bytes, ALIGN_PART)

    @property
    def nbytes(self) -> int:
        return self.header_nbytes + self.parts_nbytes

    def header(self) -> bytes:
        """Its first bytes."""
        records = ",".join(f"{place.index}:{place.entry.version}" for place in self.places)
        return shared_header((place.text for place in self.places), records, (), self.header_nbytes)


def whole_files(records: Iterable[tuple[int, RecordLayout, Entry]]) -> list[WholeFile]:
    """These versions one after another, in as many files as the bounds need; each gets its place."""
    files: list[WholeFile] = []
    for index, layout, entry in records:
        if not files or files[-1].parts_nbytes + layout.parts_nbytes > FILE_BYTES:
            files.append(WholeFile(len(files) + 1))
        place = Place.of(index, entry, layout, files[-1].parts_nbytes)
        if files[-1].text_bytes + place.text_bytes > MOST_HEADER_BYTES and files[-1].places:
            files.append(WholeFile(len(files) + 1))
            place = Place.of(index, entry, layout, 0)
        files[-1].places.append(place)
        files[-1].parts_nbytes += place.nbytes
        files[-1].text_bytes += place.text_bytes
    for file in files:
        offset = file.header_nbytes
        for place in file.places:
            place.entry.slot, place.entry.offset = file.name, offset
            offset += place.nbytes
    return files


def name_of(serial: int, folder: str = "") -> str:
    """The name of a shared file, from the folder of segments; `folder` is that of a memory rank."""
    name = f"{SHARED}/{serial // FILES_PER_FOLDER:06d}/{serial:09d}.safetensors"
    return f"{folder}/{name}" if folder else name


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring spans as one."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
