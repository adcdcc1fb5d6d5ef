"""Looking at a whole store: every tensor in order of name, the digest, verification, figures."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weightstream.errors import StoreError
from weightstream.store import directory
from weightstream.store.layout import DTYPE_NAMES
from weightstream.store.records import Entry, file_name, slot_of
from weightstream.store.segments import AlignedBuffer, RecordBuffer, bytes_of

if TYPE_CHECKING:
    from weightstream.store.store import Store


def items(store: "Store") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Parameter by parameter in order of name; a record is read once for each run of neighbours that it holds."""
    places = sorted((parameter.name, block.index) for block in store.blocks for parameter in block.parameters)
    record = RecordBuffer(_largest(store))
    loaded = None
    try:
        for name, index in places:
            if index != loaded:
                store.load(index, record).result()
                loaded = index
            parts = [part.name for part in store.layout(index).states]
            tensors = {part: record.tensors(part) for part in parts}
            yield name, {part: found[name].clone() for part, found in tensors.items() if name in found}
    finally:
        record.close()


def tensor(store: "Store", name: str, part: str) -> Tensor:
    """A copy of one tensor of the newest version."""
    for block in store.blocks:
        if any(parameter.name == name for parameter in block.parameters):
            record = RecordBuffer(store.layout(block.index))
            try:
                store.load(block.index, record, [part]).result()
                return record.tensors(part)[name].clone()
            finally:
                record.close()
    raise KeyError(f"store '{store.path}' has no parameter {name!r}")


def digest(store: "Store") -> str:
    """Each tensor is hashed where it lies, record by record; the hashes are then put in order of name.

    So that one read of the store is enough whatever the names are.
    """
    lines: list[str] = []
    buffer = RecordBuffer(_largest(store))
    try:
        for block in store.blocks:
            layout, entry = store.layout(block.index), store.versions.records[block.index].committed
            buffer.bind(layout)
            targets = {part.name: buffer.view(part.name) for part in layout.states}
            store.versions.read_entry(block.index, entry, targets, "states").result()
            for part in layout.states:
                for name, found in buffer.tensors(part.name).items():
                    hashed = hashlib.sha256(bytes_of(found)).hexdigest()
                    facts = f"{DTYPE_NAMES[found.dtype]} {list(found.shape)} {entry.optimizer_steps}"
                    lines.append(f"{name!r} {part.name!r} {facts} {hashed}\n")
    finally:
        buffer.close()
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def verify(store: "Store") -> list[str]:
    """Every file that the last commit or a snapshot points to, read and compared with its checksums."""
    problems: list[str] = []
    try:
        with store.manifest.at_one_moment():
            store.manifest.meta(), store.manifest.blocks(), store.manifest.last_commit(), store.manifest.snapshots()
            rows = store.manifest.records()
    except StoreError as error:
        return [str(error)]
    buffer = RecordBuffer(_largest(store))
    header = AlignedBuffer(max((store.layout(block.index).header_nbytes for block in store.blocks), default=0))
    try:
        for row in rows:
            layout = store.layout(row.block)
            buffer.bind(layout)
            entry = Entry(row.version, row.optimizer_steps, slot_of(row.file), row.checksums)
            path = store.versions.segment_path(row.block, entry)
            view = header.view[: layout.header_nbytes]
            try:
                store.disk.read(path, [(0, view)], "states").result()
                if view != layout.header(row.version):
                    problems.append(
                        f"store '{store.path}': block {row.block} {layout.block!r} at version {row.version}: the "
                        f"header of {path.name} is not the one that was written; restore the file from a copy"
                    )
                for part in layout.parts:
                    try:
                        targets = {part.name: buffer.view(part.name)}
                        store.versions.read_entry(row.block, entry, targets, "states").result()
                    except StoreError as error:
                        problems.append(str(error))
            except (OSError, StoreError) as error:
                problems.append(f"store '{store.path}': block {row.block} {layout.block!r} in {path.name}: {error}")
    finally:
        buffer.close()
        header.close()
    return problems


def info(store: "Store") -> dict[str, Any]:
    """Figures of an open store, as JSON."""
    layouts = [store.layout(block.index) for block in store.blocks]
    names = [
        file_name(block.index, slot) for block in store.blocks for slot in store.versions.records[block.index].slots
    ]
    segments = store.path / directory.SEGMENTS
    return {
        "path": str(store.path),
        "step": store.step,
        "precision": store.precision,
        "optimizer": store.optimizer.to_json(),
        "blocks": len(store.blocks),
        "parameters": sum(block.numel for block in store.blocks),
        "record_bytes": sum(layout.image_nbytes for layout in layouts),
        "records_written": sum(
            store.versions.records[block.index].committed.slot is not None for block in store.blocks
        ),
        "versions": [store.versions.records[block.index].committed.version for block in store.blocks],
        "segment_files": len(names),
        "segment_bytes": sum((segments / name).stat().st_size for name in names if (segments / name).exists()),
        "pinned_bytes": store.pinned_bytes,
        "snapshots": store.snapshots(),
        "direct_io": store.disk.device.direct,
        "busy_s": {"disk": dict(store.disk.traffic.busy_s), "ram": dict(store.memory.traffic.busy_s)},
        "counters": {f"{tier}/{kind}": moved for (tier, kind), moved in store.counters.items()},
    }


def _largest(store: "Store") -> int:
    return max((store.layout(block.index).image_nbytes for block in store.blocks), default=0)
