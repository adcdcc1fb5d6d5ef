"""What a store is in figures: its size and where it goes, its tiers, and how long its disk will stand the writing.

A store knows what it has written in its life, and what each tier moved in the last session of its writer: both are
committed with every commit (table `life`), so that whoever looks later sees them.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightstream.sparse.choosing import CHOSEN_KERNELS
from weightstream.store import directory
from weightstream.store.directory import SHARED
from weightstream.store.rows import LifeRow
from weightstream.store.tiers import Traffic
from weightstream.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from weightstream.store.store import Store

_DAY_S = 86_400.0


@dataclass(slots=True)
class Session:
    """The time since a store was opened for writing."""

    before: LifeRow
    tiers: dict[str, Traffic]
    began_s: float = field(default_factory=time.monotonic)
    first_step: int = 0

    def row(self, pinned_bytes: int, step: int, compaction: Mapping[str, float]) -> LifeRow:
        """What is committed now, with a step: bytes written in the store's life, and the session's figures."""
        tiers = {name: _moved(traffic) for name, traffic in self.tiers.items()}
        session = {
            "seconds": round(time.monotonic() - self.began_s, 3), "steps": step - self.first_step,
            "pinned_bytes": pinned_bytes, "tiers": tiers, "compaction": dict(compaction),
        }  # fmt: skip
        return LifeRow(self.before.written_bytes + int(tiers["disk"]["written_bytes"]), session)

    def step_s(self, step: int) -> float | None:
        """Seconds from one committed step to the next, on average: in this session or, before it has any, in the last one."""
        steps, seconds = step - self.first_step, time.monotonic() - self.began_s
        if steps <= 0:
            steps, seconds = self.before.session.get("steps", 0), self.before.session.get("seconds", 0.0)
        return seconds / steps if steps > 0 else None


def _moved(traffic: Traffic) -> dict[str, float]:
    """What a tier has moved; its counters may grow meanwhile, also by a kind."""
    return {
        "read_bytes": sum(list(traffic.read_bytes.values())),
        "written_bytes": sum(list(traffic.written_bytes.values())),
        "busy_read_s": round(traffic.busy_s["read"], 3),
        "busy_write_s": round(traffic.busy_s["write"], 3),
    }


def info(store: "Store", *, tbw_bytes: float | None = None) -> dict[str, Any]:
    """Figures of an open store, as JSON. `tbw_bytes`: what the disk is said to stand in its life."""
    space = _space(store)
    life = store.manifest.life()
    if store.writable:
        life = store.versions.session.row(store.pinned_bytes, store.step, store.versions.pace.to_json())
    shared = [row for row in store.manifest.shared() if row.live_bytes]
    committed = [store.versions.records[unit.index].committed for unit in store.units]
    found = {
        "path": str(store.path),
        "step": store.step,
        "precision": store.precision,
        "optimizer": store.optimizer.to_json(),
        "blocks": len(store.blocks),
        "units": len(store.units),
        "panel_elements": store.panel_elements,
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
        "record_bytes": sum(store.layout(unit.index).image_nbytes for unit in store.units),
        **_density(store),
        "records_written": sum(entry.slot is not None for entry in committed),
        "versions": [entry.version for entry in committed],
        **space,
        "shared_files": len(shared),
        "shared_bytes": sum(row.nbytes for row in shared),
        "shared_live_bytes": sum(row.live_bytes for row in shared),
        "pinned_bytes": store.pinned_bytes,
        "direct_io": store.disk.device.direct,
        "busy_s": {"disk": dict(store.disk.traffic.busy_s), "ram": dict(store.memory.traffic.busy_s)},
        "counters": {f"{tier}/{kind}": moved for (tier, kind), moved in store.counters.items()},
        "session": life.session,
        "life_written_bytes": life.written_bytes,
    }
    seconds = life.session.get("seconds", 0.0)
    rate = life.session["tiers"]["disk"]["written_bytes"] / seconds * _DAY_S if seconds else 0.0
    found["written_bytes_per_day"] = round(rate)
    if tbw_bytes is not None:
        left = max(0.0, tbw_bytes - life.written_bytes)
        found |= {"tbw_bytes": round(tbw_bytes), "disk_life_left_days": left / rate if rate else None}
    return found


def describe(found: dict[str, Any]) -> str:
    """`info` as a person reads it."""
    lines = {
        "store": f"{found['path']}, step {found['step']}, {found['precision']}",
        "parameters": f"{format_count(found['parameters'])} in {found['blocks']} blocks",
    }
    if sparse := found.get("sparse"):
        densities = [kept["density"] for kept in sparse.values()]
        lines["sparse"] = (
            f"{len(sparse)} parameters, density {min(densities):.3g} to {max(densities):.3g}, "
            f"{format_count(sum(kept['nonzeros'] for kept in sparse.values()))} non-zeros"
        )
        by_kernel = Counter(kept["kernel"] for kept in sparse.values() if "kernel" in kept)
        if by_kernel:
            lines["products"] = ", ".join(
                f"{count} parameters by {kernel}" for kernel, count in sorted(by_kernel.items())
            )
    for family in found["families"]:
        lines[f"family {family['name']}"] = (
            f"{family['records']} records, {format_count(family['parameters'])} parameters, {family['records_written']} "
            "records were ever written"
        )
    if versions := found["versions"]:
        same = min(versions) == max(versions)
        lines["versions"] = f"{versions[0]}" if same else f"{min(versions)} to {max(versions)}, by block"
    lines["on disk"] = (
        f"{format_bytes(found['disk_bytes'])}: the last commit {format_bytes(found['last_commit_bytes'])}, snapshots alone "
        f"{format_bytes(found['snapshots_bytes'])}, to be used again {format_bytes(found['reusable_bytes'])}"
    )
    if found["shared_files"]:
        lines["shared files"] = (
            f"{found['shared_files']} with {format_bytes(found['shared_bytes'])}, live "
            f"{format_bytes(found['shared_live_bytes'])}"
        )
        moved = found["session"].get("compaction")
        if moved:
            lines["compaction"] = (
                f"{format_bytes(moved['copied_bytes'])} copied, for {format_bytes(moved['written_bytes'])} that commits wrote "
                f"to shared files in the last session; at most {moved['share']:g} of that"
            )
    for name, snapshot in found["snapshots"].items():
        lines[f"snapshot {name}"] = f"step {snapshot['step']}, alone {format_bytes(snapshot['own_bytes'])}"
    session = found["session"]
    for tier, moved in session.get("tiers", {}).items():
        kept = f"{format_bytes(session['pinned_bytes'])} kept, " if tier == "ram" else ""
        lines[f"tier {tier}"] = (
            f"{kept}{format_bytes(moved['read_bytes'])} read, {format_bytes(moved['written_bytes'])} written, in the last "
            f"session of {format_seconds(session['seconds'])}"
        )
    lines["written"] = (
        f"{format_bytes(found['life_written_bytes'])} so far, {format_bytes(found['written_bytes_per_day'])} a day at the "
        "rate of the last session"
    )
    if "tbw_bytes" in found:
        lines["disk life"] = _life_left(found)
    width = max(map(len, lines))
    return "\n".join(f"{key:{width}}  {value}" for key, value in lines.items())


def _life_left(found: dict[str, Any]) -> str:
    rated = f"of {found['tbw_bytes'] / 1e12:g} TB that it is rated for"
    if found["disk_life_left_days"] is None:
        return f"nothing was written in the last session; {format_bytes(found['life_written_bytes'])} {rated} are used"
    return f"{found['disk_life_left_days']:.1f} days left at this rate, {rated}, if this store alone writes to it"


def _density(store: "Store") -> dict[str, Any]:
    """Of a store with sparse parameters: how much of each is kept in the newest versions."""
    found: dict[str, dict[str, float | str]] = {}
    for name in sorted(store.masks):
        specs = [store.layout(index).spec("param", name) for index in store.units_with(name)]
        kept = sum(prod(spec.shape) for spec in specs if spec is not None)
        numel = sum(prod(spec.piece_shape) for spec in specs if spec is not None)
        kernel = _kernel_of(store.contract, name)
        found[name] = {"nonzeros": kept, "density": kept / numel if numel else 1.0} | (
            {"kernel": kernel} if kernel else {}
        )
    return {"sparse": found} if found else {}


def _kernel_of(contract: Mapping[str, Any], name: str) -> str | None:
    """What a run of this contract multiplies by a sparse parameter with, if it does not expand it."""
    kernels = contract.get("kernels", {})
    if kernels == "auto":
        kernels = contract[CHOSEN_KERNELS]
    return next((kernel for pattern, kernel in kernels.items() if fnmatchcase(name, pattern)), None)


def _space(store: "Store") -> dict[str, Any]:
    """Bytes on the disk and who needs them; by snapshot, those that deleting it would free."""
    numbers = store.manifest.snapshots()
    holders: dict[tuple[str, int], set[str]] = defaultdict(set)  # place → who holds it; "" is the last commit
    sizes: dict[tuple[str, int], int] = {}
    for row in store.manifest.records():
        sizes[row.place] = row.nbytes or store.layouts.of(row.block, row.sparsity).image_nbytes
        holders[row.place] |= {name for name, number in numbers.items() if row.lives_at(number)}
        holders[row.place] |= {""} if row.died is None else set()
    segments = store.path / directory.SEGMENTS
    files = dict(_files(segments))
    live = {file for file, _ in sizes}
    disk_bytes = sum(files.values())
    disk_bytes += sum(row.nbytes for row in store.manifest.shared() if (segments / row.file).exists())
    last = sum(sizes[place] for place, names in holders.items() if "" in names)
    held = sum(sizes[place] for place, names in holders.items() if "" not in names)
    return {
        "disk_bytes": disk_bytes,
        "last_commit_bytes": last,
        "snapshots_bytes": held,
        "reusable_bytes": max(0, disk_bytes - last - held),
        "segment_files": sum(name in live for name in files),
        "segment_bytes": sum(nbytes for name, nbytes in files.items() if name in live),
        "snapshots": {
            name: {
                "step": step,
                "own_bytes": sum(sizes[place] for place, names in holders.items() if names == {name}),
            }
            for name, step in store.snapshots().items()
        },
    }


def _files(segments: Path) -> Iterator[tuple[str, int]]:
    """Files of one record each, by name as the manifest has it, and their bytes."""
    for folder, folders, names in os.walk(segments):
        folders[:] = [name for name in folders if name != SHARED]
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(segments).as_posix(), path.stat().st_size
