"""Many records of families in one call: placed together and moved by few large transfers.

They are written to the files that records share, one after another, and read in the order in which they lie, with many
reads under way at a time. What one record costs in Python, and in memory until its commit, is kept small.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from weightstream.errors import StoreError
from weightstream.store.futures import gather, new_future, settle
from weightstream.store.layout import Part, RecordLayout
from weightstream.store.records import Entry, Record
from weightstream.store.rows import RecordRow
from weightstream.store.segments import RecordBuffer
from weightstream.store.tiers import Extent

if TYPE_CHECKING:
    from weightstream.store.versions import Versions

Writing = tuple[int, RecordBuffer, int, int, Mapping[str, int] | None]
"""Index, image, version, optimizer steps, checksums of all parts if they are known."""

_ASKED_AT_ONCE = 500
_MADE_AT_ONCE = 16


def write_many(versions: "Versions", records: Sequence[Writing]) -> "Future[None]":
    """Make these images the newest versions of records of families; done when they are in their files and pins. The
    commit syncs.

    Raises:
        StoreError: an earlier commit failed, or there is no room for the name of a file.
        ValueError: a buffer that is bound to another layout, or an older version than the newest.
    """
    out: Future[None] = new_future()
    copies: list[Future[None]] = []
    written: dict[str, list[tuple[Entry, RecordLayout, RecordBuffer]]] = defaultdict(list)
    latest: dict[int, int] = {}
    with versions.shared.lock:
        versions.commits.check_usable()
        states = _states(versions, [index for index, _, _, _, _ in records])
        entries = []
        for index, record, version, steps, sums in records:
            newest = max(states[index].newest.version, latest.get(index, 0))
            versions.check_write(index, record, version, newest)
            latest[index] = version
            entries.append(Entry(version, steps, checksums=sums or {}, ready=out))
        _place(versions, records, entries)
        for (index, record, _, _, _), entry in zip(records, entries, strict=True):
            state = versions.records.keep(index, states[index])
            versions.make_newest(index, state, entry)
            copies += [
                versions.copy_into_pin(pin, entry, record.view(name), index) for name, pin in state.pinned.items()
            ]
            assert entry.slot is not None
            written[entry.slot].append((entry, record.layout, record))
        versions.track(out)
        for name in written:
            versions.shared.writing(name, out)
    moved = [_write(versions, name, placed) for name, placed in written.items()]
    failing = f"{len(records)} records of families, the first of them block {records[0][0]}" if records else "nothing"
    gather([*moved, *copies]).add_done_callback(
        lambda finished: settle(out, lambda: versions.written(finished, failing))
    )
    return out


def _states(versions: "Versions", indices: Sequence[int]) -> dict[int, Record]:
    """These records; what the manifest says of those that are not in memory is asked for together."""
    found = {index: versions.records.known(index) for index in indices}
    cold = [index for index, record in found.items() if record is None]
    rows: dict[int, RecordRow] = {}
    for start in range(0, len(cold), _ASKED_AT_ONCE):
        living = versions.shared.manifest.living(cold[start : start + _ASKED_AT_ONCE])
        rows.update((row.block, row) for row in living)
    return {index: record or Record.load([rows[index]] if index in rows else [], ()) for index, record in found.items()}


def _place(versions: "Versions", records: Sequence[Writing], entries: Sequence[Entry]) -> None:
    try:
        for number, (index, record, _, _, _) in enumerate(records):
            versions.shared.place(index, record.layout, entries[number], more=len(records) - number)
    except OSError as error:
        entries[0].ready.set_exception(error)
        for entry in entries:
            versions.shared.let_go(entry)
        raise StoreError(
            f"store '{versions.path}': {len(records)} records of families could not be written: {error.strerror}; the "
            f"commit of step {versions.step} is whole, make room on the disk and run again"
        ) from error


def _write(versions: "Versions", name: str, placed: list[tuple[Entry, RecordLayout, RecordBuffer]]) -> "Future[None]":
    """Into one file, in order of place."""
    placed.sort(key=lambda item: item[0].offset)
    extents: list[Extent] = []
    for entry, layout, record in placed:
        extents += extents_of(entry, layout, {part.name: record.view(part.name) for part in layout.parts})
    with versions.shared.lock:
        allocate_bytes = versions.shared.allocate_bytes(placed[0][0])
    out: Future[None] = new_future()

    def keep(found: Sequence[int]) -> None:
        position = 0
        for entry, layout, _ in placed:
            if not entry.checksums:
                sums = found[position : position + len(layout.parts)]
                entry.checksums = {part.name: value for part, value in zip(layout.parts, sums, strict=True)}
            position += len(layout.parts)

    versions.shared.disk.write(
        versions.shared.segments / name, extents, "segment", allocate_bytes=allocate_bytes, sync=False,
        digest=any(not entry.checksums for entry, _, _ in placed),
    ).add_done_callback(lambda finished: settle(out, lambda: keep(finished.result())))  # fmt: skip
    return out


def read_many(
    versions: "Versions", records: Sequence[tuple[int, RecordBuffer]], parts: Collection[str] | None, kind: str
) -> "Future[list[int]]":
    """Fill each buffer with masters and states (or these parts) of a record's newest version; gives the versions, in the
    order asked for. Files are read in order of place, 32 reads at a time.

    Raises (in the future):
        DamagedRecordError: the bytes are not those that were written.
    """
    futures: list[Future[Any]] = []
    for start in range(0, len(records), _ASKED_AT_ONCE):
        futures += _read_some(versions, records[start : start + _ASKED_AT_ONCE], parts, kind)
    return gather(futures)


def read_entries(
    versions: "Versions", records: Sequence[tuple[int, Entry, RecordBuffer]], kind: str
) -> "Future[list[int]]":
    """The same of these versions of records of families, which lie in files and need not be the newest.

    Raises (in the future):
        DamagedRecordError: the bytes are not those that were written.
    """
    wanted: list[list[Part]] = []
    futures: list[Future[int] | None] = [None] * len(records)
    for index, entry, record in records:
        record.bind(versions.layout_of(index, entry))
        wanted.append(list(record.layout.states))
    with versions.shared.lock:
        found = [(number, entry) for number, (_, entry, _) in enumerate(records)]
        _read_together(versions, found, [(index, record) for index, _, record in records], wanted, kind, futures)
    return gather(future for future in futures if future is not None)


def _read_some(
    versions: "Versions", records: Sequence[tuple[int, RecordBuffer]], parts: Collection[str] | None, kind: str
) -> "list[Future[int]]":
    """A future for each record. Those whose versions lie ready in shared files are read together, file by file, and those
    that were never written are made together."""
    wanted: list[list[Part]] = []
    for index, record in records:
        layout = versions.newest_layout(index)
        record.bind(layout)
        wanted.append(list(layout.states if parts is None else (p for p in layout.parts if p.name in parts)))
    futures: list[Future[int] | None] = [None] * len(records)
    with versions.shared.lock:
        entries, unwritten = _entries(versions, [index for index, _ in records])
        found = [(n, entries[index]) for n, (index, _) in enumerate(records) if index in entries and wanted[n]]
        _read_together(versions, found, records, wanted, kind, futures)
    made = _made(versions, [(*records[n], wanted[n]) for n, (index, _) in enumerate(records) if index in unwritten])
    alone = []
    for number, (index, record) in enumerate(records):
        if index in unwritten:
            alone.append(made)
            continue
        targets = {part.name: record.view(part.name) for part in wanted[number]}
        alone.append(futures[number] or versions.read(index, targets, kind))
    return alone


def _made(versions: "Versions", records: Sequence[tuple[int, RecordBuffer, Sequence[Part]]]) -> "Future[int]":
    """Records of families at version 0, by few tasks: one for each is more work than small records are."""
    out: Future[int] = new_future()
    if not records:
        settle(out, lambda: 0)
        return out

    def make(some: Sequence[tuple[int, RecordBuffer, Sequence[Part]]]) -> None:
        for _, record, parts in some:
            for task in versions.generation(record.layout, {part.name: record.view(part.name) for part in parts}):
                task()

    tasks = [partial(make, records[start : start + _MADE_AT_ONCE]) for start in range(0, len(records), _MADE_AT_ONCE)]
    versions.track(out)
    versions.make(tasks).add_done_callback(lambda finished: settle(out, lambda: finished.result() or 0))
    return out


def _entries(versions: "Versions", indices: Sequence[int]) -> tuple[dict[int, Entry], set[int]]:
    """The versions that lie ready in shared files, and which of the records were never written. Of records that are not in
    memory a writer's manifest tells, at once and without taking them there; a reader must see to it that each is of the
    commit that it opened."""
    found: dict[int, Entry] = {}
    cold, unwritten = [], set[int]()
    for index in indices:
        if not versions.layouts.is_member(index):
            continue
        if versions.writable and versions.records.known(index) is None:
            cold.append(index)
            continue
        state = versions.records[index]
        if state.newest.offset and _is_written(state.newest) and not state.pinned:
            found[index] = state.newest
        elif state.newest.slot is None and not state.pinned:
            unwritten.add(index)
    for row in versions.shared.manifest.living(cold):
        found[row.block] = Entry(row.version, row.optimizer_steps, row.file, row.checksums, row.offset)
    unwritten.update(index for index in cold if index not in found)
    return found, unwritten


def _is_written(entry: Entry) -> bool:
    """Whether it lies in its file. Of one that could not be written whoever reads it by itself is told why."""
    return entry.ready.done() and entry.ready.exception() is None


def _read_together(
    versions: "Versions",
    found: Sequence[tuple[int, Entry]],
    records: Sequence[tuple[int, RecordBuffer]],
    wanted: Sequence[Sequence[Part]],
    kind: str,
    futures: "list[Future[int] | None]",
) -> None:
    """Begins to read versions that lie in shared files, file by file, and puts a future for each into its place. The caller
    holds the lock: a commit may move them as soon as it is let go.

    Args:
        found: the versions, each with its place among the records.
    """
    files: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
    for number, entry in found:
        assert entry.slot is not None
        files[entry.slot].append((number, entry))
        futures[number] = future = new_future()
        entry.add_reader(future)
        versions.shared.reading(entry.slot, future)
        versions.track(future)
    for name, placed in files.items():
        _read_file(versions, name, placed, records, wanted, kind, futures)


def _read_file(
    versions: "Versions",
    name: str,
    found: list[tuple[int, Entry]],
    records: Sequence[tuple[int, RecordBuffer]],
    wanted: Sequence[Sequence[Part]],
    kind: str,
    futures: Sequence["Future[int] | None"],
) -> None:
    found.sort(key=lambda item: item[1].offset)
    extents: list[Extent] = []
    for number, entry in found:
        record = records[number][1]
        extents += extents_of(entry, record.layout, {part.name: record.view(part.name) for part in wanted[number]})

    def finish(finished: "Future[list[int]]") -> None:
        position = 0
        for number, entry in found:
            index, parts = records[number][0], wanted[number]
            future, start = futures[number], position
            position += len(parts)

            def version(
                index: int = index, entry: Entry = entry, parts: Sequence[Part] = parts, at: int = start
            ) -> int:
                sums = versions.read_result(finished, index, entry)
                versions.compare(index, entry, parts, sums[at : at + len(parts)])
                return entry.version

            assert future is not None
            settle(future, version)

    versions.shared.disk.read(versions.shared.segments / name, extents, kind, deep=True).add_done_callback(finish)


def extents_of(entry: Entry, layout: RecordLayout, targets: Mapping[str, memoryview]) -> list[Extent]:
    """Where these parts of a version lie in its file, and the memory that they go to or come from."""
    shift = entry.offset - layout.header_nbytes if entry.offset else 0
    return [(shift + layout.part(name).offset, view) for name, view in targets.items()]
