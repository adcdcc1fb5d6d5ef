"""Looking at a whole store: every tensor in order of name, the digest, figures."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weightstream.store import directory
from weightstream.store.layout import DTYPE_NAMES
from weightstream.store.records import Entry, Record, file_name
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


def info(store: "Store") -> dict[str, Any]:
    """Figures of an open store, as JSON."""
    layouts = [store.layout(block.index) for block in store.blocks]
    names = [
        file_name(block.index, slot) for block in store.blocks for slot in store.versions.records[block.index].slots
    ]
    segments = store.path / directory.SEGMENTS
    shared = [row for row in store.manifest.shared() if row.live_bytes]
    return {
        "path": str(store.path),
        "step": store.step,
        "precision": store.precision,
        "optimizer": store.optimizer.to_json(),
        "blocks": len(store.blocks),
        "families": [
            {
                "name": family.name,
                "records": family.count,
                "parameters": family.count * family.numel,
                "records_written": store.manifest.count_living(first, first + family.count),
            }
            for first, family in store.layouts.families
        ],
        "parameters": sum(block.numel for block in store.blocks) + sum(f.count * f.numel for f in store.families),
        "record_bytes": sum(layout.image_nbytes for layout in layouts),
        "records_written": sum(
            store.versions.records[block.index].committed.slot is not None for block in store.blocks
        ),
        "versions": [store.versions.records[block.index].committed.version for block in store.blocks],
        "segment_files": len(names),
        "segment_bytes": sum((segments / name).stat().st_size for name in names if (segments / name).exists()),
        "shared_files": len(shared),
        "shared_bytes": sum(row.nbytes for row in shared),
        "shared_live_bytes": sum(row.live_bytes for row in shared),
        "pinned_bytes": store.pinned_bytes,
        "snapshots": _snapshots(store),
        "direct_io": store.disk.device.direct,
        "busy_s": {"disk": dict(store.disk.traffic.busy_s), "ram": dict(store.memory.traffic.busy_s)},
        "counters": {f"{tier}/{kind}": moved for (tier, kind), moved in store.counters.items()},
    }


def _snapshots(store: "Store") -> dict[str, dict[str, int]]:
    """Step of each snapshot and the bytes that it alone holds: what deleting it would free."""
    numbers = store.manifest.snapshots()
    holders: dict[tuple[str, int], set[str]] = defaultdict(set)  # place → who holds it; "" is the last commit
    sizes: dict[tuple[str, int], int] = {}
    for row in store.manifest.records():
        sizes[row.place] = row.nbytes or store.layout(row.block).image_nbytes
        holders[row.place] |= {name for name, number in numbers.items() if row.lives_at(number)}
        holders[row.place] |= {""} if row.died is None else set()
    return {
        name: {
            "step": step,
            "own_bytes": sum(sizes[place] for place, names in holders.items() if names == {name}),
        }
        for name, step in store.snapshots().items()
    }


def largest_record(store: "Store") -> int:
    """Bytes of a buffer in which any record of the store fits."""
    # of a family, that of its last record, whose number is the longest
    lasts = [store.layout(first + family.count - 1) for first, family in store.layouts.families]
    return max((layout.image_nbytes for layout in (*store.layouts.blocks, *lasts)), default=0)
