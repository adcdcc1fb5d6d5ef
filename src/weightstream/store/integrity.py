"""Damage: finding it in everything that a store holds, and going back to what is whole.

Every live byte is compared with a checksum: parts with those in the manifest, headers with the ones that would be
written (of files that records share: with their checksums), rows of the manifest with their own. Padding inside a part
is part of it; free pages of the manifest, files that nothing points to, and bytes of shared files that no version takes,
are not live.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.audit import largest_record
from weightstream.store.directory import SEGMENTS
from weightstream.store.layout import MASK
from weightstream.store.masks import bits_of
from weightstream.store.records import Entry, slot_of
from weightstream.store.rows import RecordRow, SharedRow
from weightstream.store.segments import AlignedBuffer, RecordBuffer

if TYPE_CHECKING:
    from weightstream.store.store import Store

MADE_ANEW = frozenset({"header", "copy"})
"""What can be computed from the rest of a record."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One part of one version of a record that is not what was written; `part` may be `header` or `file`."""

    row: RecordRow
    part: str
    message: str


def verify(store: "Store") -> list[str]:
    """Read every file that the last commit or a snapshot points to; one line per damage, which says what is whole. Of a mask
    the number of ones and the order of indices are compared, too."""
    try:
        damages = find(store)
    except StoreError as error:
        return [str(error)]
    lines: dict[str, None] = {}  # a damaged header of a file is the damage of every record in it, and said once
    for damage in damages:
        if damage.row.died is not None:
            where = f"only snapshots hold it ({', '.join(_holders(store, damage.row))}); delete them to be rid of it"
        elif _made_anew(store, [d for d in damages if d.row == damage.row]):
            where = "verify --repair makes it anew from the rest of the record"
        elif (name := _whole_snapshot(store, damages)) is not None:
            where = f"snapshot {name!r} is whole, verify --repair goes back to it"
        else:
            where = "no snapshot is whole; restore the file from a copy of the store"
        lines[f"{damage.message}; {where}"] = None
    return list(lines)


def find(store: "Store") -> list[Damage]:
    """All damage in segments.

    Raises:
        DamagedRecordError: a row of the manifest was changed.
    """
    with store.manifest.at_one_moment():
        store.manifest.check()
        held = set(store.manifest.snapshots().values())
        # a row that is kept to go back one commit may name a file that is used again
        rows = [
            row for row in store.manifest.records() if row.died is None or any(row.lives_at(number) for number in held)
        ]
        files = {row.file: row for row in store.manifest.shared()}
    found: list[Damage] = []
    buffer = RecordBuffer(largest_record(store, rows))
    try:
        headers: dict[str, str | None] = {}
        for row in rows:
            if not row.offset:
                found += _find_in(store, row, buffer)
                continue
            if row.file not in headers:
                headers[row.file] = _shared_header(store, row.file, files.get(row.file))
            found += _find_in_shared(store, row, buffer, headers[row.file])
    finally:
        buffer.close()
    return found


def repair(store: "Store") -> list[str]:
    """Undo damage of the last commit; one line for each thing done.

    Where only headers and bf16 copies are damaged, these records are written anew and nothing is lost. Else the store
    goes back to the newest snapshot that is whole: a record of another step among the others would be a model that was
    never trained.

    Raises:
        DamagedRecordError: nothing whole is left to go back to, or a row of the manifest was changed.
    """
    damages = find(store)
    living = [damage for damage in damages if damage.row.died is None]
    if not living:
        return []
    rows = {damage.row.block: damage.row for damage in living}
    if all(_made_anew(store, [d for d in living if d.row == row]) for row in rows.values()):
        for row in rows.values():
            _write_anew(store, row)
        store.commit(store.step, store.progress).result()
        names = ", ".join(repr(store.layout(block).block) for block in rows)
        return [f"store '{store.path}': wrote {len(rows)} records anew from their masters ({names}); nothing is lost"]
    name = _whole_snapshot(store, damages)
    if name is None:
        raise DamagedRecordError(
            f"store '{store.path}': {len(rows)} records of the last commit are damaged and no snapshot is whole; "
            f"restore the files from a copy of the store:\n  " + "\n  ".join(damage.message for damage in living)
        )
    before = store.step
    store.restore(name, discard=True)
    return [f"store '{store.path}': went back from step {before} to snapshot {name!r} (step {store.step})"]


def _find_in(store: "Store", row: RecordRow, buffer: RecordBuffer) -> list[Damage]:
    """In a file of a record's own."""
    layout = store.layout_of(row.block, row.sparsity)
    path = store.path / SEGMENTS / row.file
    what = f"store '{store.path}': block {row.block} {layout.block!r} at version {row.version}"
    found: list[Damage] = []
    header = AlignedBuffer(layout.header_nbytes)
    try:
        if path.stat().st_size != layout.image_nbytes:
            text = f"{what}: {path.name} should have {layout.image_nbytes} bytes, it has {path.stat().st_size}"
            return [Damage(row, "file", text)]
        store.disk.read(path, [(0, header.view)], "states").result()
        if header.view != layout.header(row.version):
            found.append(Damage(row, "header", f"{what}: the header of {path.name} is not the one that was written"))
        found += _damaged_parts(store, row, buffer)
    except OSError as error:
        found.append(Damage(row, "file", f"{what}: {path.name} cannot be read: {error.strerror}"))
    finally:
        header.close()
    return found


def _find_in_shared(store: "Store", row: RecordRow, buffer: RecordBuffer, problem: str | None) -> list[Damage]:
    """In a file that others share; `problem` is what is wrong with the file itself."""
    path = store.path / SEGMENTS / row.file
    what = f"store '{store.path}': block {row.block} {store.layout(row.block).block!r} at version {row.version}"
    try:
        if path.stat().st_size < row.offset + row.nbytes:
            text = f"{what}: {path.name} should have {row.nbytes} bytes from {row.offset} on, it ends at"
            return [Damage(row, "file", f"{text} {path.stat().st_size}")]
        found = [Damage(row, "header", problem)] if problem else []
        return found + _damaged_parts(store, row, buffer)
    except OSError as error:
        return [Damage(row, "file", f"{what}: {path.name} cannot be read: {error.strerror}")]


def _shared_header(store: "Store", file: str, row: SharedRow | None) -> str | None:
    """What is wrong with a shared file, but for the parts in it."""
    what = f"store '{store.path}': {file}"
    if row is None:
        return f"{what} is not in table shared of the manifest, though records lie in it"
    header = AlignedBuffer(row.header_nbytes)
    path = store.path / SEGMENTS / file
    try:
        if path.stat().st_size != row.nbytes:
            return f"{what} should have {row.nbytes} bytes, it has {path.stat().st_size}"
        (found,) = store.disk.read(path, [(0, header.view)], "states").result()
        return None if f"{found:016x}" == row.header_checksum else f"{what}: its header is not the one that was written"
    except (OSError, StoreError):
        return None  # every record in it says so
    finally:
        header.close()


def _damaged_parts(store: "Store", row: RecordRow, buffer: RecordBuffer) -> list[Damage]:
    layout = store.layout_of(row.block, row.sparsity)
    buffer.bind(layout)
    slot = row.file if row.offset else slot_of(row.file, store.members.folder)
    entry = Entry(row.version, row.optimizer_steps, slot, row.checksums, row.offset, sparsity=row.sparsity)
    found = []
    for part in layout.parts:
        try:
            store.versions.read_entry(row.block, entry, {part.name: buffer.view(part.name)}, "states").result()
        except StoreError as error:
            found.append(Damage(row, part.name, str(error).partition(";")[0]))
    if layout.has(MASK) and not any(damage.part == MASK for damage in found):
        what = f"store '{store.path}': block {row.block} {layout.block!r} at version {row.version}"
        for spec in layout.part(MASK).tensors:
            try:
                bits_of(spec, buffer.tensors(MASK)[spec.name])
            except DamagedRecordError as error:
                said = str(error).partition(";")[0]
                found.append(Damage(row, MASK, f"{what}: the mask of {spec.name!r} was written wrong: {said}"))
    return found


def _made_anew(store: "Store", damages: Sequence[Damage]) -> bool:
    return all(damage.part in MADE_ANEW for damage in damages)


def _write_anew(store: "Store", row: RecordRow) -> None:
    """The same version once more, in another file."""
    layout = store.layout(row.block)
    buffer = RecordBuffer(layout)
    try:
        store.load(row.block, buffer).result()
        if layout.has("copy"):
            for name, copy in buffer.tensors("copy").items():
                copy.copy_(buffer.tensors("param")[name].to(torch.bfloat16))
        store.write(row.block, buffer, row.version, row.optimizer_steps).result()
    finally:
        buffer.close()


def _holders(store: "Store", row: RecordRow) -> list[str]:
    """The snapshots that hold a version."""
    return [name for name, number in store.manifest.snapshots().items() if row.lives_at(number)]


def _whole_snapshot(store: "Store", damages: Sequence[Damage]) -> str | None:
    """The newest snapshot without damage."""
    for name, number in reversed(store.manifest.snapshots().items()):
        if not any(damage.row.lives_at(number) for damage in damages):
            return name
    return None
