"""A block down to every rank and its gradient back up, beside the library's own collectives in the same processes.

    python benchmarks/fabric.py --json

Ranks are processes on loopback. Two layouts: `apart`, where rank 0 owns the block and the others compute (the library
broadcasts from rank 0, and sums to it), and `colocated`, where all ranks compute and own a part each (the library: the
faster of one call for each owner, and of the collective that serves all of them). Both sides move the same memory, in
turn; a call's time is from its first start to its last end over all ranks. Sums are compared once.

Keys: `broadcast_ratio_min`, `reduce_ratio_min` (the library's seconds by ours, least over layouts and numbers of ranks),
`egress_bytes` (by ranks: what the owner sends of one block, apart); by layout and number of ranks `broadcast_s`,
`reduce_s`, those of the `library`, `*_spread` (least and most), `*_ratio`; and `*_cpu_s`, the processor time of all ranks.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.distributed import connect
from weightstream.fabric.heads import Head
from weightstream.fabric.links import Links
from weightstream.fabric.reduce import Reduction
from weightstream.fabric.unit_sums import UnitGradient
from weightstream.schedule.reduction import subtrees
from weightstream.store.futures import done

Call = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layouts", nargs="+", choices=["apart", "colocated"], default=["apart", "colocated"])
    parser.add_argument("--mebibytes", type=float, default=64, help="of a block, in its slab and as a gradient")
    parser.add_argument("--units", type=int, default=8, help="of a block")
    parser.add_argument("--turns", type=int, default=7, help="counted turns of each side")
    parser.add_argument("--warm-up", type=int, default=2, help="turns that do not count")
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    found: dict[str, dict[int, Any]] = {layout: {} for layout in arguments.layouts}
    with scratch(arguments.scratch, "fabric") as folder:
        for layout in arguments.layouts:
            for ranks in arguments.ranks:
                answer = folder / f"{layout}-{ranks}.json"
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                mp.spawn(one_rank, (ranks, layout, port, arguments, answer), nprocs=ranks)
                found[layout][ranks] = json.loads(answer.read_text())
    every = [each for by_ranks in found.values() for each in by_ranks.values()]
    result = {
        "benchmark": "fabric", "block_bytes": int(arguments.mebibytes * (1 << 20)), "units": arguments.units,
        **{f"{what}_ratio_min": min(each[f"{what}_ratio"] for each in every) for what in ("broadcast", "reduce")},
        "egress_bytes": {ranks: each["egress_bytes"] for ranks, each in found.get("apart", {}).items()},
        **found,
    }  # fmt: skip
    write("fabric", result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


def one_rank(rank: int, ranks: int, layout: str, port: int, arguments: argparse.Namespace, answer: Path) -> None:
    """The process of one rank; rank 0 leaves the figures in `answer`."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)  # as torchrun has it
    cluster = Cluster(ranks - 1, 1) if layout == "apart" else Cluster(ranks)
    links = connect()
    links.divide(cluster)
    sides = Sides(links, cluster, int(arguments.mebibytes * (1 << 20)), arguments.units)
    sides.compare()
    calls = sides.calls()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-arguments.warm_up, arguments.turns):
        for name, call in calls.items():
            dist.barrier()
            before, started = time.process_time(), time.monotonic()
            call()
            measured = links.control.gather([started, time.monotonic(), time.process_time() - before])
            if turn >= 0:
                starts, ends, used = zip(*measured, strict=True)
                seconds[name].append(max(ends) - min(starts))
                cpu[name].append(sum(used))
    if rank == 0:
        answer.write_text(json.dumps(figures(seconds, cpu) | {"egress_bytes": sides.egress_bytes}))
    sides.close()
    links.close()


def figures(seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and spreads; the library's is its fastest call."""
    result: dict[str, Any] = {}
    for what in ("broadcast", "reduce"):
        others = [name for name in seconds if name.startswith(f"{what} ")]
        best = min(others, key=lambda name: median(seconds[name]))
        result[f"{what}_ratio"] = median(seconds[best]) / median(seconds[what])
        result |= summary(f"{what}_s", seconds[what]) | {f"{what}_cpu_s": median(cpu[what])}
        result |= summary(f"library_{what}_s", seconds[best])
        result |= {f"library_{what}": best.removeprefix(f"{what} "), f"library_{what}_cpu_s": median(cpu[best])}
    return result


class Sides:
    """One rank's part in moving a block, by the fabric and by the library."""

    def __init__(self, links: Links, cluster: Cluster, nbytes: int, units: int) -> None:
        self.links, self.cluster, self.rank = links, cluster, links.rank
        self.groups = cluster.workers
        self.down, self.up = Broadcast(links.down, cluster), Reduction(links.up, cluster, self.groups)
        each = ceil(nbytes / units / 4096) * 4096
        self.slab = bytearray(each * units)
        self.whole = torch.frombuffer(self.slab, dtype=torch.float32)
        self.gradient, self.total = torch.zeros(len(self.whole)), torch.zeros(len(self.whole))
        owners = [unit * len(cluster.memory_ranks) // units for unit in range(units)]
        self.spans = [Span(unit, unit * each, (unit + 1) * each, owner) for unit, owner in enumerate(owners)]
        self.parts = {
            owner: slice(owners.index(owner) * each // 4, (units - owners[::-1].index(owner)) * each // 4)
            for owner in sorted(set(owners))
        }
        self.unit_gradients = [
            UnitGradient(span.unit, span.owner, where, (where,), len(self.whole))
            for span in self.spans
            for where in [(span.start // 4, span.stop // 4)]
        ]
        self.egress_bytes = 0

    def calls(self) -> dict[str, Call]:
        """What is timed, ours and the library's by turns."""
        found = {"broadcast": self.broadcast, "broadcast calls of broadcast": self.broadcast_by_owner}
        if len(self.parts) == self.cluster.size and len(self.spans) % self.cluster.size == 0:
            found["broadcast all_gather"] = self.all_gather
        return found | {
            "reduce": self.reduce, "reduce calls of reduce": self.reduce_by_owner, "reduce all_reduce": self.all_reduce,
        }  # fmt: skip

    def broadcast(self) -> None:
        before = self.links.down.traffic.sent.total()
        local = {span.unit: done(None) for span in self.spans if span.owner == self.rank}
        for future in self.down.start(memoryview(self.slab), self.spans, local):
            future.result()
        self.egress_bytes = self.links.down.traffic.sent.total() - before

    def reduce(self) -> None:
        nodes = subtrees(self.groups, self.cluster.groups_of(self.rank, self.groups))
        flags = {unit.unit: Head(True, {0: bytearray([1])}) for unit in self.unit_gradients}
        sums = {(0, node): self.gradient for node in nodes}  # as many groups as workers: at most one
        targets = {unit.unit: self.total[slice(*unit.span)] for unit in self.unit_gradients if unit.owner == self.rank}
        self.up.start(self.unit_gradients, dict.fromkeys(nodes, flags), sums, targets).result()

    def broadcast_by_owner(self) -> None:
        self._wait([dist.broadcast(self.whole[part], owner, async_op=True) for owner, part in self.parts.items()])

    def all_gather(self) -> None:
        parts = [self.whole[part] for part in self.parts.values()]
        dist.all_gather(parts, parts[self.rank].clone())

    def reduce_by_owner(self) -> None:
        self._wait([dist.reduce(self.gradient[part], owner, async_op=True) for owner, part in self.parts.items()])

    def all_reduce(self) -> None:
        dist.all_reduce(self.gradient)

    def _wait(self, works: list[Any]) -> None:
        for work in works:
            work.wait()

    def compare(self) -> None:
        """Both sides end with the same numbers, of values whose sums are exact."""
        generator = torch.Generator()

        def values(rank: int) -> Tensor:
            generator.manual_seed(rank)
            return torch.randint(-1000, 1000, (len(self.whole),), generator=generator).float()

        own = self.parts.get(self.rank, slice(0))
        self.whole.zero_()
        self.whole[own] = values(99)[own]
        self.broadcast()
        computes = self.rank in self.cluster.compute_ranks
        if computes and not torch.equal(self.whole, values(99)):
            raise AssertionError(f"rank {self.rank} did not get the block")
        self.gradient.copy_(values(self.rank) if computes else torch.zeros(1))
        self.reduce()
        expected = sum(values(rank) for rank in self.cluster.compute_ranks)
        if not torch.equal(self.total[own], expected[own]):
            raise AssertionError(f"rank {self.rank} did not get the sum")
        self.gradient.zero_()  # sums in place would grow without end

    def close(self) -> None:
        self.down.close()
        self.up.close()


if __name__ == "__main__":
    main()
