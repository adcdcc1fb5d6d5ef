"""Looking at a whole store: every tensor in order of name, the digest."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightstream.store.arena import Arena
from weightstream.store.families import Family
from weightstream.store.layout import DTYPE_NAMES, MASK, RecordLayout
from weightstream.store.many import read_entries
from weightstream.store.masks import bits_of, dense_of, expanded
from weightstream.store.records import Entry, Record
from weightstream.store.rows import RecordRow
from weightstream.store.segments import RecordBuffer, bytes_of
from weightstream.store.whole import Reader

if TYPE_CHECKING:
    from weightstream.store.store import Store

READ_BYTES = 16 << 20
"""Of records of families that the digest reads, as many are read at a time as fit here, two at least."""


def items(store: "Store") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Parameter by parameter in order of name, whole however it is cut; a record is read once for each run of neighbours
    that it holds. Families follow, by number; what was never updated is made from its recipe."""
    names = sorted(parameter.name for block in store.blocks for parameter in block.parameters)
    places = ((name, store.units_with(name)) for name in names)
    reader = Reader(store, largest_record(store))
    try:
        for name, indices in chain(places, _members_parameters(store)):
            parts = dict.fromkeys(part.name for index in indices for part in store.layout(index).states)
            yield name, reader.whole(indices, name, list(parts))
    finally:
        reader.close()


def _members_parameters(store: "Store") -> Iterator[tuple[str, Sequence[int]]]:
    for first, family in store.layouts.families:
        for index in range(first, first + family.count):
            for parameter in store.layouts.member(index).parameters:
                yield parameter.name, (index,)


def tensor(store: "Store", name: str, part: str) -> Tensor:
    """A copy of one tensor of the newest version."""
    indices = store.units_with(name)
    if not indices and (member := store.layouts.owner(name)) is not None:
        indices = (member,)
    if not indices:
        raise KeyError(f"store '{store.path}' has no parameter {name!r}")
    if not any(store.layout(index).has(part) for index in indices):
        store.layout(indices[0]).part(part)  # says which parts there are
    reader = Reader(store, max(store.layout(index).image_nbytes for index in indices), [part])
    try:
        found = reader.whole(indices, name, [part])
        if part not in found:
            raise KeyError(f"parameter {name!r} has no part {part!r}; it is {'dense' if part == MASK else 'frozen'}")
        return found[part]
    finally:
        reader.close()


def digest(store: "Store") -> str:
    """Each tensor is hashed where it lies, record by record, the panels of one that is cut after one another; the hashes
    are then put in order of name. A sparse one is hashed as the dense tensor with zeros elsewhere, and so is its mask, a byte
    for each position: neither blocks nor the form of a mask count.

    So that one read of the store is enough whatever the names are, and it does not matter how it is cut. A family counts
    by its template, the seed and those of its records that were ever updated: nobody could hash billions that were not.
    """
    lines: list[str] = []
    buffer = RecordBuffer(largest_record(store))
    hashing: dict[tuple[str, str], _Hashing] = {}
    try:
        for unit in store.units:
            entry = store.versions.records[unit.index].committed
            buffer.bind(layout := store.versions.layout_of(unit.index, entry))
            targets = {part.name: buffer.view(part.name) for part in layout.states}
            store.versions.read_entry(unit.index, entry, targets, "states").result()
            lines += _lines(store, unit.index, entry, buffer, hashing)
        for first, family in store.layouts.families:
            facts = json.dumps([family.name, family.count, family.to_json(), store.seed], sort_keys=True)
            lines.append(f"family {facts}\n")
            lines += _lines_of_family(store, first, family, hashing)
    finally:
        buffer.close()
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(slots=True)
class _Hashing:
    """A tensor whose panels are being hashed, and the optimizer steps of each."""

    state: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    steps: list[int] = field(default_factory=list)
    sparse: bool = False  # any of them


def _lines_of_family(store: "Store", first: int, family: Family, hashing: dict[tuple[str, str], _Hashing]) -> list[str]:
    """Of the records that were ever updated, read in the order in which they lie; while some are hashed others are read."""
    rows = sorted(store.living(first, first + family.count), key=lambda row: (row.file, row.offset))
    layout = store.layout(first + family.count - 1)  # whose header is the longest
    at_once = max(1, READ_BYTES // 2 // Arena.slot_bytes(layout))
    arena = Arena(layout, min(2 * at_once, len(rows)))

    def read(start: int) -> "tuple[list[tuple[int, Entry, RecordBuffer]], Future[list[int]]]":
        entries = [
            (row.block, Record.load([row], ()).committed, arena.buffer(place % (2 * at_once)))
            for place, row in enumerate(rows[start : start + at_once], start)
        ]
        return entries, read_entries(store.versions, entries, "states")

    lines = []
    try:
        ahead = read(0)
        for start in range(0, len(rows), at_once):
            (entries, reading), ahead = ahead, read(start + at_once)
            reading.result()
            for index, entry, buffer in entries:
                lines += _lines(store, index, entry, buffer, hashing)
    finally:
        arena.close()
    return lines


def _lines(
    store: "Store", index: int, entry: Entry, buffer: RecordBuffer, hashing: dict[tuple[str, str], _Hashing]
) -> list[str]:
    """A line for each tensor that ends in this record, which is in the buffer. One that is frozen had no optimizer step,
    whatever its record had."""
    layout, lines = buffer.layout, []
    trained = {parameter.name for parameter in store.parameters_of(index) if parameter.trainable}
    kept = _kept(layout, buffer)
    for part in layout.states:
        if part.name == MASK:
            continue
        found = buffer.tensors(part.name)
        for spec in part.tensors:
            begun = hashing.setdefault((part.name, spec.name), _Hashing())
            mask, values = kept.get(spec.name), found[spec.name]
            begun.state.update(bytes_of(values if mask is None else expanded(values, mask)))
            begun.steps.append(entry.optimizer_steps if spec.name in trained else 0)
            if spec.last:
                del hashing[part.name, spec.name]
                steps = " ".join(map(str, dict.fromkeys(begun.steps)))  # one number, but for who changes single panels
                facts = f"{DTYPE_NAMES[spec.dtype]} {list(spec.whole_shape)} {steps}"
                lines.append(f"{spec.name!r} {part.name!r} {facts} {begun.state.hexdigest()}\n")
    for name in trained & store.masks.keys():
        master = layout.spec("param", name)
        assert master is not None, "every parameter has masters"
        begun = hashing.setdefault((MASK, name), _Hashing())
        begun.sparse |= name in kept
        begun.state.update(bytes_of(kept.get(name, torch.ones(master.piece_shape, dtype=torch.bool)).view(torch.uint8)))
        if master.last:
            del hashing[MASK, name]
            if begun.sparse:  # a tensor that is dense now has none
                lines.append(f"{name!r} {MASK!r} BOOL {list(master.whole_shape)} {begun.state.hexdigest()}\n")
    return lines


def _kept(layout: RecordLayout, buffer: RecordBuffer) -> dict[str, Tensor]:
    """Dense masks of a record's sparse tensors."""
    if not layout.has(MASK):
        return {}
    masks = buffer.tensors(MASK)
    return {spec.name: dense_of(spec, bits_of(spec, masks[spec.name])) for spec in layout.part(MASK).tensors}


def largest_record(store: "Store", rows: Iterable[RecordRow] = ()) -> int:
    """Bytes of a buffer in which any record of the store fits, in its newest and its committed version and in these."""
    # of a family, that of its last record, whose number is the longest
    lasts = [store.layout(first + family.count - 1) for first, family in store.layouts.families]
    layouts = [*store.layouts.units, *lasts]
    for index in range(len(store.units) if store.masks else 0):
        record = store.versions.records[index]
        layouts += [store.versions.layout_of(index, entry) for entry in (record.newest, record.committed)]
    layouts += [store.layout_of(row.block, row.sparsity) for row in rows if row.sparsity]
    return max((layout.image_nbytes for layout in layouts), default=0)
