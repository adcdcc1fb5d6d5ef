"""Dead bytes in files that records share, and how they come back.

A file of which less than half is live is emptied: what is live there is copied to other files of the commit under way, and
the manifest points there from then on. Those of which least is live come first, as they give most back for what is copied.
What is copied lies in files of its own: it was not changed for a while, so that these stay live for long, while the
commit's own versions soon die.

It happens in the commit thread, while the next step computes, and is paced: for each byte that commits write to such files
it writes at most `share` bytes, and reads as many. That bounds the dead bytes: while they are more than `1 / share` times
the live ones, there is a file of which less than `share / (1 + share)` is live, and emptying such files gives back more
than `1 / share` bytes for each that is copied, so that a commit frees more than its own versions leave behind. Dead bytes
are therefore at most `1 / share` times the live ones, those that snapshots hold among them, besides one file
(`shared.FILE_BYTES`) and what one commit writes. After a snapshot was deleted, what that freed comes on top until commits
have worked it off.

Bytes of a header that says less than there was room for count as dead: a file with one small record left would else keep
its room for thousands.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightstream.errors import ConfigError, DamagedRecordError, StoreError
from weightstream.store.layout import Part
from weightstream.store.records import Entry
from weightstream.store.rows import Move, RecordRow, SharedRow
from weightstream.store.segments import AlignedBuffer
from weightstream.store.shared import Batch
from weightstream.store.tiers import Extent

if TYPE_CHECKING:
    from weightstream.store.versions import Versions

SHARE = 0.25
"""What compaction may write for each byte that commits write, unless a store is told otherwise."""
KEPT_BYTES = 16 << 20
"""What is not used of that is kept for later commits, up to so much."""
_BUFFER_BYTES = 8 << 20
_FILES_AT_ONCE = 64


def check_share(share: float) -> float:
    """Refuses what is no share.

    Raises:
        ConfigError: it is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(
            f"compaction_share: expected a number above 0 and at most 1, the bytes that compaction may write for each byte "
            f"that steps write, found {share!r}; without it dead bytes would never come back"
        )
    return share


@dataclass(slots=True)
class Pace:
    """How much compaction may write.

    Args:
        share: for each byte that commits write to shared files.
        allowed_bytes: what it may write at present. Below 0 after a record that was larger: others make up for it.
    """

    share: float = SHARE
    allowed_bytes: float = 0.0
    written_bytes: int = 0
    """What commits wrote to shared files, of versions that they published, since the store was opened."""
    copied_bytes: int = 0
    """What compaction wrote since then."""

    @classmethod
    def after(cls, session: Mapping[str, Any]) -> "Pace":
        """Goes on where the last session of a store ended: runs that are short must not be without compaction."""
        return cls(SHARE, allowed_bytes=float(session.get("compaction", {}).get("allowed_bytes", 0.0)))

    def earn(self, written_bytes: int) -> None:
        """A commit writes so much."""
        self.written_bytes += written_bytes
        self.allowed_bytes = min(self.allowed_bytes, KEPT_BYTES) + self.share * written_bytes

    def spend(self, nbytes: int) -> bool:
        """Whether a record of so many bytes may be copied now; then it counts as copied."""
        if self.allowed_bytes <= 0:
            return False
        self.allowed_bytes -= nbytes
        self.copied_bytes += nbytes
        return True

    def to_json(self) -> dict[str, float]:
        """As it is committed."""
        return {
            "share": self.share, "allowed_bytes": round(self.allowed_bytes), "written_bytes": self.written_bytes,
            "copied_bytes": self.copied_bytes,
        }  # fmt: skip


@dataclass(slots=True)
class Copied:
    """Records that were copied to other files: what changes in the manifest, and their versions there."""

    moves: list[Move] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def compact(versions: "Versions", batch: Batch, published: Mapping[int, Entry]) -> Copied:
    """Copy live records of mostly dead files to files of a commit, in the commit thread.

    Raises:
        DamagedRecordError: a record of the last commit is not what was written.
        StoreError: it cannot be read, or there is no room.
    """
    versions.pace.earn(sum(versions.layouts.parts_nbytes(index) for index, entry in published.items() if entry.offset))
    if versions.pace.allowed_bytes <= 0:
        return Copied()
    files = versions.shared.manifest.mostly_dead_files(_FILES_AT_ONCE, versions.shared.is_ours)
    at_most = min(versions.pace.allowed_bytes, sum(file.live_bytes for file in files))
    copied, apart = Copied(), Batch(expected_bytes=int(at_most))
    try:
        for group in _groups(versions, files, published):
            _copy(versions, apart, group, copied)
    finally:
        batch.files += apart.files
    return copied


def _groups(
    versions: "Versions", files: Sequence[SharedRow], published: Mapping[int, Entry]
) -> Iterator[list[list[RecordRow]]]:
    """Records to be copied, as the rows that point to each, in groups that fit the buffer; one file in each."""
    for file in files:
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
            if not versions.pace.spend(nbytes):
                break
            group.append(rows)
        if group:
            yield group
        if versions.pace.allowed_bytes <= 0:
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
