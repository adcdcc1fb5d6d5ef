"""The catalogue part of `store.py`: a family of billions of records against one of 1,000.

Each opening runs in a process of its own that has imported the store before. Records are read and updated at random;
`touched` of them are then updated once, in commits of 1,000, and everything is measured again.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from results import summary

import weightstream as ws
from weightstream.store.segments import RecordBuffer

RECORDS, SMALL = 8_589_934_592, 1_000
SHAPE = (128, 112)  # 14,336 parameters
COMMIT_RECORDS = 1_000

_OPENING = """
import json, sys, time
from pathlib import Path
import torch, weightstream as ws
from weightstream.store.segments import RecordBuffer
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
(path,) = sys.argv[1:]
ws.Store
before, started = resident(), time.perf_counter()
store = ws.Store.open(path)
print(json.dumps({"open_s": time.perf_counter() - started, "rss_bytes": resident() - before}))
store.close()
"""


def family(count: int) -> ws.Family:
    """`count` records of one matrix each."""
    name = "expert.{}"
    return ws.Family(name, count, (ws.Parameter(name, SHAPE),), {name: ws.Recipe.normal(0.0, 0.02)})


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Opening, reading and updating, of both families in turn, before and after many records were touched."""
    folder.mkdir()
    sides = {"large": RECORDS, "small": SMALL}
    for name, count in sides.items():
        new_store(folder / name, count).close()
    found: dict[str, Any] = {
        "catalogue_records": RECORDS,
        "catalogue_parameters": RECORDS * SHAPE[0] * SHAPE[1],
        "catalogue_touched": arguments.touched,
        **opened(arguments, folder, "catalogue_open_s", "catalogue_rss_bytes"),
    }
    draw = random.Random(0)
    stores = {name: ws.Store.open(folder / name) for name in sides}
    fresh = taken_in_turn(arguments, stores, sides, draw)
    for name, store in stores.items():
        started = time.perf_counter()
        touch(store, draw.sample(range(sides[name]), min(arguments.touched, sides[name])))
        print(f"{name}: touched in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        store.close()
    found |= opened(arguments, folder, "catalogue_open_touched_s", "catalogue_rss_touched_bytes")
    stores = {name: ws.Store.open(folder / name) for name in sides}
    touched = taken_in_turn(arguments, stores, sides, draw)
    for store in stores.values():
        store.close()
    ratios: dict[str, float] = {}
    for when, taken in (("", fresh), ("touched_", touched)):
        for way in ("read", "update"):
            for name in sides:
                found |= summary(f"catalogue_{when}{way}_{name}_ms", [1e3 * t for t in taken[f"{way} {name}"]])
            ratios[f"catalogue_{when}{way}_ratio"] = median(taken[f"{way} large"]) / median(taken[f"{way} small"])
    return found | ratios | {"catalogue_record_ratio": max(ratios.values())}


def new_store(path: Path, count: int) -> ws.Store:
    return ws.Store.create(
        path, blocks=(), recipes={}, families=(family(count),), optimizer=ws.AdamW(lr=1e-3), precision="bf16",
        contract={"seed": 0},
    )  # fmt: skip


def opened(arguments: argparse.Namespace, folder: Path, seconds: str, memory: str) -> dict[str, Any]:
    """Opening the store of the large family, each time in a new process."""
    runs = []
    for _ in range(arguments.rounds):
        command = [sys.executable, "-c", _OPENING, str(folder / "large")]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return summary(seconds, [run["open_s"] for run in runs]) | {memory: max(run["rss_bytes"] for run in runs)}


def taken_in_turn(
    arguments: argparse.Namespace, stores: dict[str, ws.Store], counts: dict[str, int], draw: random.Random
) -> dict[str, list[float]]:
    """Seconds to read, and to update and commit, one record drawn at random; both families in turn."""
    taken: dict[str, list[float]] = {f"{way} {name}": [] for way in ("read", "update") for name in stores}
    for number in range(arguments.warm_up + arguments.record_rounds):
        for name in sorted(stores, reverse=bool(number % 2)):
            index = stores[name].index("expert.{}", draw.randrange(counts[name]))
            for way, work in (("read", stores[name].read), ("update", lambda i, s=stores[name]: update(s, [i]))):
                started = time.perf_counter()
                work(index)
                if number >= arguments.warm_up:
                    taken[f"{way} {name}"].append(time.perf_counter() - started)
    return taken


def update(store: ws.Store, indices: list[int]) -> None:
    """A new version of each, in one commit."""
    with store.transaction(step=store.step + 1) as transaction:
        for index in indices:
            for tensors in transaction[index].values():
                tensors["param"].mul_(0.5)


def touch(store: ws.Store, numbers: list[int]) -> None:
    """Update many records, each written from the same memory."""
    most_bytes = store.layout(store.index("expert.{}", max(numbers))).image_nbytes
    buffers = [RecordBuffer(most_bytes) for _ in range(8)]
    writing: list[Any] = []
    for position, number in enumerate(numbers, 1):
        index, turn = store.index("expert.{}", number), buffers[position % len(buffers)]
        if len(writing) >= len(buffers):
            writing[-len(buffers)].result()
        turn.bind(store.layout(index))
        version = store.version(index) + 1
        writing.append(store.write(index, turn, version, version))
        if position % COMMIT_RECORDS == 0 or position == len(numbers):
            store.commit(store.step + 1, {}).result()
            writing.clear()
    for used in buffers:
        used.close()
