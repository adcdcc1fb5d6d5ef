"""Looking at a whole store: every tensor in order of name, the digest."""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from weightstream.store.layout import DTYPE_NAMES
from weightstream.store.records import Entry, Record
from weightstream.store.segments import RecordBuffer, bytes_of

if TYPE_CHECKING:
    from weightstream.store.store import Store


def items(store: "Store") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Parameter by parameter in order of name; a record is read once for each run of neighbours that it holds. Families
    follow, by number; what was never updated is made from its recipe."""
    places = sorted((parameter.name, block.index) for block in store.blocks for parameter in block.parameters)
    record = RecordBuffer(largest_record(store))
    loaded = None
    try:
        for name, index in chain(places, _members_parameters(store)):
            if index != loaded:
                store.load(index, record).result()
                loaded = index
            parts = [part.name for part in store.layout(index).states]
            tensors = {part: record.tensors(part) for part in parts}
            yield name, {part: found[name].clone() for part, found in tensors.items() if name in found}
    finally:
        record.close()


def _members_parameters(store: "Store") -> Iterator[tuple[str, int]]:
    for first, family in store.layouts.families:
        for index in range(first, first + family.count):
            for parameter in store.layouts.member(index).parameters:
                yield parameter.name, index


def tensor(store: "Store", name: str, part: str) -> Tensor:
    """A copy of one tensor of the newest version."""
    own = (block.index for block in store.blocks if any(parameter.name == name for parameter in block.parameters))
    index = next(own, None)
    if index is None:
        index = store.layouts.owner(name)
    if index is None:
        raise KeyError(f"store '{store.path}' has no parameter {name!r}")
    record = RecordBuffer(store.layout(index))
    try:
        store.load(index, record, [part]).result()
        return record.tensors(part)[name].clone()
    finally:
        record.close()


def digest(store: "Store") -> str:
    """Each tensor is hashed where it lies, record by record; the hashes are then put in order of name.

    So that one read of the store is enough whatever the names are. A family counts by its template, the seed and those
    of its records that were ever updated: nobody could hash billions that were not.
    """
    lines: list[str] = []
    buffer = RecordBuffer(largest_record(store))
    try:
        for block in store.blocks:
            lines += _lines(store, block.index, store.versions.records[block.index].committed, buffer)
        for first, family in store.layouts.families:
            facts = json.dumps([family.name, family.count, family.to_json(), store.seed], sort_keys=True)
            lines.append(f"family {facts}\n")
            for row in store.living(first, first + family.count):
                lines += _lines(store, row.block, Record.load([row], ()).committed, buffer)
    finally:
        buffer.close()
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _lines(store: "Store", index: int, entry: Entry, buffer: RecordBuffer) -> list[str]:
    """A line for each tensor of one version."""
    layout = store.layout(index)
    buffer.bind(layout)
    store.versions.read_entry(
        index, entry, {part.name: buffer.view(part.name) for part in layout.states}, "states"
    ).result()
    lines = []
    for part in layout.states:
        for name, found in buffer.tensors(part.name).items():
            hashed = hashlib.sha256(bytes_of(found)).hexdigest()
            facts = f"{DTYPE_NAMES[found.dtype]} {list(found.shape)} {entry.optimizer_steps}"
            lines.append(f"{name!r} {part.name!r} {facts} {hashed}\n")
    return lines


def largest_record(store: "Store") -> int:
    """Bytes of a buffer in which any record of the store fits."""
    # of a family, that of its last record, whose number is the longest
    lasts = [store.layout(first + family.count - 1) for first, family in store.layouts.families]
    return max((layout.image_nbytes for layout in (*store.layouts.blocks, *lasts)), default=0)
