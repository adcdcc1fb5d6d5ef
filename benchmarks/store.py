"""Records through the store against the same bytes by bare preads and pwrites; commits; snapshots of a large store.

    python benchmarks/store.py --json

Records are decoder layers of step.py's model (width 1,024: 180 MB of streamed copy, masters and moments). One round is
each way of moving them in turn, each round begins with another way; keys are medians over rounds, `*_spread` least and
most. The bare loop (`bare_io.BareFiles`) has the store's queue depth and piece size, the same memory, the same files to
read, files allocated in the same way to write, and syncs them within its time: each when it is written, or all at the
end, whichever is faster.

Keys: `read_ratio`, `write_ratio`, `write_new_ratio` = bare / store, reading with checks, writing with checksums made on
the way to files that were written before, and to new ones; `checksum_share` = the part of the store's time, read and
write together, that is gone where nothing is checked and checksums are given (`read_`, `write_checksum_share`: of each);
`commit_ms`: the commit of a step that wrote all records of the large store (`commit_records`), all of them synced;
`snapshot_ms`: a snapshot of the large store (`store_bytes`); `open_ms`: opening it. `--gigabytes` is its size. Files
that are to be new are kept to the end, since the kernel discards what is removed: 25 GB of disk, 2 GB of memory.
`catalogue_open_s`, `catalogue_rss_bytes`: opening a store with a family of `catalogue_records` records
(`catalogue_parameters` parameters), and what that adds to the memory of a process with the same imports;
`catalogue_record_ratio`: the time to read or to update one record against the same in a family of 1,000, the greatest of
four: each before and after `catalogue_touched` records were updated.
"""

import argparse
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bare_io import BareFiles
from catalogue import measure
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from workload import BETAS, EPSILON, LEARNING_RATE, WEIGHT_DECAY

import weightstream as ws
from weightstream.blocks import Block, Parameter
from weightstream.store.segments import RecordBuffer
from weightstream.store.tiers import Disk

BUFFERS = 4  # records in memory while the large store is written
DEPTH = 6  # the store's own, of reads and of writes

Ways = Mapping[str, Callable[[], float]]
"""Ways to move the same bytes, by name; each gives its seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the layer that a record holds")
    parser.add_argument("--records", type=int, default=5, help="that one round reads and writes")
    parser.add_argument("--rounds", type=int, default=7, help="counted ones")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of the large store")
    parser.add_argument("--commits", type=int, default=5, help="counted ones, each of the whole large store")
    parser.add_argument("--snapshots", type=int, default=15, help="counted ones")
    parser.add_argument("--touched", type=int, default=100_000, help="records of the family that are updated")
    parser.add_argument("--record-rounds", type=int, default=50, help="counted reads and updates of single records")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "store"}
    with scratch(arguments.scratch, "store") as folder:
        for section in (transfers, large_store, catalogue):
            result |= section(arguments, folder / section.__name__)
            shutil.rmtree(folder / section.__name__)
    write("store", result | provenance(arguments.rounds), as_json=arguments.json, record=not arguments.no_record)


def transfers(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Reading and writing some records, with checksums and without, against the bare loop."""
    with new_store(folder, arguments.records, arguments.width) as store:
        records = Records(store, folder / "bare")
        # New files first: as long as a snapshot holds what was written, every write needs another file.
        new = in_turn(records.new_files(), arguments)
        records.let_go()
        recycled = in_turn(records.recycled_files(), arguments)
        read = in_turn(records.reads(), arguments)
        damaged = records.differing()
        records.close()
    if damaged:
        raise SystemExit(f"records {damaged} were read other than they were written; no figure of this run counts")
    return {
        "width": arguments.width, "records": arguments.records, "read_bytes": records.read_bytes,
        "write_bytes": records.write_bytes, "depth": DEPTH, "chunk_bytes": store.disk.chunk_bytes,
        "direct_io": store.disk.device.direct,
        **ratio("read", read), **ratio("write", recycled), **ratio("write_new", new),
        **share("checksum_share", read, recycled),
        **share("read_checksum_share", read), **share("write_checksum_share", recycled),
        **seconds("read", read), **seconds("write", recycled), **seconds("write_new", new),
    }  # fmt: skip


def large_store(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Commits of all records, snapshots, and opening, of a store of many gigabytes."""
    each = record_bytes(arguments.width)
    count = max(1, round(arguments.gigabytes * 1e9 / each))
    commits_ms, snapshots_ms, opens_ms = [], [], []
    with new_store(folder, count, arguments.width) as store:
        buffers = [filled(store, index) for index in range(min(BUFFERS, count))]
        sums = [store.checksums(index, buffer) for index, buffer in enumerate(buffers)]
        for version in range(1, arguments.commits + 2):  # the first makes the files
            write_all(store, buffers, sums, version)
            commits_ms.append(1e3 * timed(lambda step: store.commit(step, {}).result(), version))
            print(f"commit {version} of {count} records: {commits_ms[-1]:.1f} ms", file=sys.stderr)
        for number in range(arguments.snapshots + 1):
            snapshots_ms.append(1e3 * timed(store.snapshot, f"snapshot-{number}"))
    for _ in range(arguments.warm_up + arguments.rounds):
        started = time.perf_counter()
        store = ws.Store.open(folder)
        opens_ms.append(1e3 * (time.perf_counter() - started))
        store.close()
    return {
        "store_bytes": count * each, "commit_records": count,
        **summary("commit_ms", commits_ms[1:]), "first_commit_ms": commits_ms[0],
        **summary("snapshot_ms", snapshots_ms[1:]), "first_snapshot_ms": snapshots_ms[0],
        **summary("open_ms", opens_ms[arguments.warm_up :]),
    }  # fmt: skip


def catalogue(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A family of billions of records against one of 1,000 (`catalogue.py`)."""
    return measure(arguments, folder)


class Records:
    """Some records in memory, and the ways to write and read them. A way gives its seconds; what comes between two
    ways (a commit, a snapshot) is not in them."""

    def __init__(self, store: ws.Store, bare_folder: Path) -> None:
        bare_folder.mkdir()
        self.store, self.bare_folder = store, bare_folder
        self.buffers = [filled(store, unit.index) for unit in store.units]
        self.sums = [store.checksums(index, buffer) for index, buffer in enumerate(self.buffers)]
        layouts = [buffer.layout for buffer in self.buffers]
        self.header_bytes = layouts[0].header_nbytes
        self.read_bytes = sum(layout.image_nbytes - layout.header_nbytes for layout in layouts)
        self.write_bytes = sum(layout.image_nbytes for layout in layouts)
        self.bare = BareFiles(depth=DEPTH, chunk_bytes=store.disk.chunk_bytes)
        self.version = 0
        self._bare_generation = 0

    def new_files(self) -> Ways:
        return {
            "bare": lambda: self._bare_write(sync_at_end=False, keep=True),
            "bare_synced_at_end": lambda: self._bare_write(sync_at_end=True, keep=True),
            "store": lambda: self._write(checksums=False, keep=True),
        }

    def recycled_files(self) -> Ways:
        return {
            "bare": lambda: self._bare_write(sync_at_end=False),
            "bare_synced_at_end": lambda: self._bare_write(sync_at_end=True),
            "store": lambda: self._write(checksums=False),
            "store_unchecked": lambda: self._write(checksums=True),
        }

    def reads(self) -> Ways:
        return {
            "bare": self._bare_read,
            "store": lambda: self._read(check=True),
            "store_unchecked": lambda: self._read(check=False),
        }

    def let_go(self) -> None:
        """From now on files are used again: the store's dead ones, and the first two generations of the bare loop's."""
        for name in self.store.snapshots():
            self.store.remove_snapshot(name)
        self._bare_generation = 0

    def differing(self) -> list[int]:
        """Records whose bytes, as they were last read, are not those that were written."""
        return [i for i, buffer in enumerate(self.buffers) if self.store.checksums(i, buffer) != self.sums[i]]

    def close(self) -> None:
        self.bare.close()

    def _read(self, *, check: bool) -> float:
        def read() -> None:
            wait([
                self.store.load(index, buffer, [part.name for part in buffer.layout.parts], check=check)
                for index, buffer in enumerate(self.buffers)
            ])  # fmt: skip

        return timed(read)

    def _write(self, *, checksums: bool, keep: bool = False) -> float:
        self.version += 1

        def written() -> None:
            wait([
                self.store.write(i, buffer, self.version, self.version, self.sums[i] if checksums else None)
                for i, buffer in enumerate(self.buffers)
            ])  # fmt: skip

        seconds = timed(written)
        self.store.commit(self.version, {}).result()
        if keep:
            self.store.snapshot(f"version-{self.version}")
        return seconds

    def _bare_read(self) -> float:
        """The very files that the store reads."""
        versions = self.store.versions
        paths = [versions.segment_path(i, versions.records[i].committed) for i in range(len(self.buffers))]
        return self.bare.read(paths, [buffer.image[self.header_bytes :] for buffer in self.buffers], self.header_bytes)

    def _bare_write(self, *, sync_at_end: bool, keep: bool = False) -> float:
        self._bare_generation += 1
        generation = self._bare_generation if keep else self._bare_generation % 2 + 1
        paths = [self.bare_folder / f"{i:05}.{generation}" for i in range(len(self.buffers))]
        return self.bare.write(paths, [buffer.image for buffer in self.buffers], sync_at_end=sync_at_end)


def new_store(folder: Path, count: int, width: int) -> ws.Store:
    """An empty store of `count` decoder layers, each one record."""
    optimizer = ws.AdamW(lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    disk = Disk(read_depth=DEPTH, write_depth=DEPTH)
    blocks = [layer(index, width) for index in range(count)]
    return ws.Store.create(
        folder, blocks=blocks, recipes={}, optimizer=optimizer, precision="bf16", contract={}, disk=disk,
        panel_elements=record_bytes(width),
    )  # fmt: skip


def layer(index: int, width: int) -> Block:
    """A decoder layer of the model in workload.py."""
    name, hidden = f"layers.{index:04}", width * 11 // 4
    shapes = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    shapes |= {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    shapes |= dict.fromkeys(("input_norm", "post_attention_norm"), (width,))
    parameters = tuple(Parameter(f"{name}.{key}.weight", shape) for key, shape in shapes.items())
    return Block(index, name, parameters, (name,))


def record_bytes(width: int) -> int:
    """Streamed copy, masters and two moments."""
    return 14 * sum(prod(parameter.shape) for parameter in layer(0, width).parameters)


def filled(store: ws.Store, index: int) -> RecordBuffer:
    """Random numbers in every tensor of a record."""
    buffer = RecordBuffer(store.layout(index))
    generator = torch.Generator().manual_seed(index)
    for part in buffer.layout.parts:
        for tensor in buffer.tensors(part.name).values():
            tensor.uniform_(-1.0, 1.0, generator=generator)
    return buffer


def write_all(
    store: ws.Store, buffers: Sequence[RecordBuffer], sums: Sequence[Mapping[str, int]], version: int
) -> None:
    """A new version of every record, with the numbers of a few, until all are synced."""
    writing: list[Future[None]] = []
    for unit in store.units:
        turn = unit.index % len(buffers)
        if len(writing) >= len(buffers):
            writing[-len(buffers)].result()
        buffers[turn].bind(store.layout(unit.index))
        writing.append(store.write(unit.index, buffers[turn], version, version, sums[turn]))
    wait(writing)


def in_turn(ways: Ways, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way in every counted round."""
    taken: dict[str, list[float]] = defaultdict(list)
    names = list(ways)
    for number in range(arguments.warm_up + arguments.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent = ways[name]()
            if number >= arguments.warm_up:
                taken[name].append(spent)
        print("  ".join(f"{name} {times[-1]:.3f} s" for name, times in taken.items()), file=sys.stderr)
    return taken


def timed(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def wait(futures: "Sequence[Future[Any]]") -> None:
    for future in futures:
        future.result()


def control(taken: Mapping[str, list[float]]) -> list[float]:
    """The fastest bare way."""
    return min((times for name, times in taken.items() if name.startswith("bare")), key=median)


def ratio(key: str, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    bare, store = control(taken), taken["store"]
    rounds = [one / other for one, other in zip(bare, store, strict=True)]
    return {f"{key}_ratio": median(bare) / median(store), f"{key}_ratio_spread": [min(rounds), max(rounds)]}


def share(key: str, *sides: Mapping[str, list[float]]) -> dict[str, Any]:
    """The part of the store's time that is gone without checksums."""
    checked, unchecked = (sum(median(taken[way]) for taken in sides) for way in ("store", "store_unchecked"))
    rounds = [
        1 - sum(without) / sum(with_)
        for with_, without in zip(
            zip(*(taken["store"] for taken in sides), strict=True),
            zip(*(taken["store_unchecked"] for taken in sides), strict=True),
            strict=True,
        )
    ]
    return {key: 1 - unchecked / checked, f"{key}_spread": [min(rounds), max(rounds)]}


def seconds(key: str, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median and spread of every way."""
    found: dict[str, Any] = {}
    for name, times in taken.items():
        found |= summary(f"{key}_{name}_s", times)
    return found


if __name__ == "__main__":
    main()
