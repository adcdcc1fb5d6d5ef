"""Dead bytes in files that records share, and how they come back.

A file of which less than half is live is emptied: what is live there is copied to the files of the commit under way, and
the manifest points there from then on. Those with the least that is live come first. A commit copies at most as many
bytes as it writes to such files, and 16 MiB besides, so that its cost is bounded by what is trained. It is enough: what
is copied out of a file is less than what that frees, so while files remain that are mostly dead a commit frees more than
its own versions leave behind; and where none remain, at most half of every file is dead. Dead bytes are therefore at most
as many as live ones, those that snapshots hold among them, besides one file (`shared.FILE_BYTES`) and what one commit writes.
After a snapshot was deleted, what that freed comes on top, less as many bytes as commits have written since.

Bytes of a header that says less than there was room for count as dead: a file with one small record left would else keep
its room for thousands.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.layout import Part
from weightstream.store.manifest import Move, RecordRow
from weightstream.store.records import Entry
from weightstream.store.segments import AlignedBuffer
from weightstream.store.shared import Batch
from weightstream.store.tiers import Extent

if TYPE_CHECKING:
    from weightstream.store.versions import Versions

COPIED_BYTES = 16 << 20
"""What a commit may copy besides as many bytes as it writes."""
_BUFFER_BYTES = 8 << 20
_FILES_AT_ONCE = 64


@dataclass(slots=True)
class Copied:
    """Records that were copied to other files: what changes in the manifest, and their versions there."""

    moves: list[Move] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def compact(versions: "Versions", batch: Batch, published: Mapping[int, Entry]) -> Copied:
    """Copy live records of mostly dead files to those of a commit, in the commit thread.

    Raises:
        DamagedRecordError: a record of the last commit is not what was written.
        StoreError: it cannot be read, or there is no room.
    """
    written = sum(versions.layouts.parts_nbytes(index) for index, entry in published.items() if entry.offset)
    copied = Copied()
    for group in _groups(versions, published, written + COPIED_BYTES):
        _copy(versions, batch, group, copied)
    return copied


def _groups(versions: "Versions", published: Mapping[int, Entry], budget_bytes: int) -> Iterator[list[list[RecordRow]]]:
    """Records to be copied, as the rows that point to each, in groups that fit the buffer; one file in each."""
    left = budget_bytes
    for file in versions.shared.manifest.mostly_dead_files(_FILES_AT_ONCE):
        if not versions.shared.is_ours(file.file):
            continue
        places: dict[int, list[RecordRow]] = defaultdict(list)
        for row in versions.shared.manifest.in_shared(file.file):
            places[row.offset].append(row)
        group: list[list[RecordRow]] = []
        for _, rows in sorted(places.items()):
            if rows[0].block in published and all(row.died is None for row in rows):
                continue  # dies with this commit, or the next one finds that a snapshot alone holds it
            nbytes = rows[0].nbytes
            if group and sum(found[0].nbytes for found in group) + nbytes > _BUFFER_BYTES:
                yield group
                group = []
            if nbytes > left and left < budget_bytes:
                left = 0
                break
            left -= nbytes
            group.append(rows)
        if group:
            yield group
        if left <= 0:
            return


def _copy(versions: "Versions", batch: Batch, group: Sequence[Sequence[RecordRow]], copied: Copied) -> None:
    buffer = AlignedBuffer(sum(rows[0].nbytes for rows in group))
    try:
        whole = [(rows, view) for rows, view in _read(versions, group, buffer)]
        targets: dict[str, list[Extent]] = defaultdict(list)
        entries: list[Entry] = []
        with versions.shared.lock:
            for number, (rows, view) in enumerate(whole):
                row, layout = rows[0], versions.layouts[rows[0].block]
                entry = Entry(row.version, row.optimizer_steps, checksums=row.checksums)
                versions.shared.place(row.block, layout, entry, batch, more=len(whole) - number)
                assert entry.slot is not None
                targets[entry.slot].append((entry.offset, view))
                entries.append(entry)
                copied.moves.append(Move(row.block, row.place, (entry.slot, entry.offset)))
            lengths = {entry.slot: versions.shared.allocate_bytes(entry) for entry in entries}
        copied.entries += entries
        writes = [
            versions.shared.disk.write(
                versions.shared.segments / name, sorted(extents, key=lambda extent: extent[0]), "compaction",
                allocate_bytes=lengths[name], digest=False, sync=False,
            )
            for name, extents in targets.items()
        ]  # fmt: skip
        failures = [write.exception() for write in writes]
        if failure := next(filter(None, failures), None):
            raise failure
    finally:
        buffer.close()


def _read(
    versions: "Versions", group: Sequence[Sequence[RecordRow]], buffer: AlignedBuffer
) -> Iterator[tuple[Sequence[RecordRow], memoryview]]:
    """Reads and checks them; leaves out what is damaged and held by snapshots alone: `verify` is who names that."""
    extents: list[Extent] = []
    wanted: list[tuple[Sequence[RecordRow], memoryview, Sequence[Part]]] = []
    position = 0
    for rows in group:
        row, layout = rows[0], versions.layouts[rows[0].block]
        view = buffer.view[position : position + row.nbytes]
        position += row.nbytes
        wanted.append((rows, view, layout.parts))
        for part in layout.parts:
            start = part.offset - layout.header_nbytes
            extents.append((row.offset + start, view[start : start + part.nbytes]))
    name = group[0][0].file
    try:
        found = versions.shared.disk.read(versions.shared.segments / name, extents, "compaction", deep=True).result()
    except (OSError, DamagedRecordError) as error:
        raise StoreError(
            f"store '{versions.path}': {name} could not be read: {error}; the commit of step {versions.step} is whole, "
            "look after the disk, or run `store verify`"
        ) from error
    sums = iter(found)
    for rows, view, parts in wanted:
        row = rows[0]
        differing = [part.name for part in parts if next(sums) != row.checksums[part.name]]
        if not differing:
            yield rows, view
        elif any(row.died is None for row in rows):
            layout = versions.layouts[row.block]
            raise DamagedRecordError(
                f"store '{versions.path}': block {row.block} {layout.block!r} at version {row.version}, part "
                f"{differing[0]!r} in {name}: its bytes are not those that were written; the file was damaged or "
                "changed; restore it from a snapshot or a copy"
            )
