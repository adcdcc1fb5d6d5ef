"""Broadcast and reduce of 64 MiB blocks over processes on loopback, beside the library's own collectives.

    python benchmarks/fabric.py --json

Rank 0 owns the block, the others compute: they receive it (broadcast), and their fp32 gradients of it are summed in the
contract's order on the way back to rank 0 (reduce). In turn with `torch.distributed.broadcast` and `reduce` (Gloo) of as
many bytes over the same processes, in which rank 0 takes part with zeros. One turn is timed from a barrier to the moment
when the last rank is done; the library sums in an order of its own, which changes with the number of ranks.

Keys: `broadcast_ratio_min`, `reduce_ratio_min` = the library's seconds / ours, the least over `processes`; seconds and
ratios by number of processes; `egress_bytes`: what rank 0 sent for one block, by number of processes, as its channel
counts them; `cpu_s_per_block`: processor seconds of all ranks for one block, ours and the library's.
"""

import argparse
import os
import socket
import sys
import time
from concurrent.futures import Future
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from results import provenance, summary, write

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.distributed import connect
from weightstream.fabric.reduce import Head, Reduction, UnitGradient
from weightstream.schedule.reduction import subtrees
from weightstream.store.futures import done
from weightstream.store.segments import AlignedBuffer

GROUPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--mebibytes", type=int, default=64, help="of a block")
    parser.add_argument("--units", type=int, default=4, help="that a block is cut into")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    found = {count: measure(count, arguments) for count in arguments.processes}
    result: dict[str, Any] = {"benchmark": "fabric", "block_bytes": arguments.mebibytes << 20, "units": arguments.units}
    for kind in ("broadcast", "reduce"):
        ratios = {}
        for count, taken in found.items():
            ours, library = taken[kind], taken[f"library_{kind}"]
            ratios[count] = median(library) / median(ours)
            result |= summary(f"{kind}_{count}_s", ours) | summary(f"library_{kind}_{count}_s", library)
        result[f"{kind}_ratio"] = ratios
        result[f"{kind}_ratio_min"] = min(ratios.values())
    result["egress_bytes"] = {count: taken["egress_bytes"] for count, taken in found.items()}
    result["egress_equal"] = len(set(result["egress_bytes"].values())) == 1
    result["cpu_s_per_block"] = {count: taken["cpu_s"] for count, taken in found.items()}
    write("fabric", result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


def measure(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All turns over so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(one_rank, (count, port, arguments, results), nprocs=count)  # type: ignore[no-untyped-call]
    found: dict[str, Any] = results.get()
    print(f"{count} processes: " + ", ".join(f"{k} {median(v):.3f} s" for k, v in found.items() if isinstance(v, list)),
          file=sys.stderr)  # fmt: skip
    return found


def one_rank(rank: int, count: int, port: int, arguments: argparse.Namespace, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    cluster = Cluster(count - 1, 1)
    links = connect(timeout_s=120)
    links.divide(cluster)
    turn = Turn(links, cluster, arguments)
    found: dict[str, Any] = {}
    ways = {
        "broadcast": turn.broadcast, "library_broadcast": turn.library_broadcast,
        "reduce": turn.reduce, "library_reduce": turn.library_reduce,
    }  # fmt: skip
    cpu: dict[str, float] = dict.fromkeys(ways, 0.0)
    for number in range(arguments.warm_up + arguments.turns):
        for name, way in ways.items():
            links.gather(None)
            spent, started = time.process_time(), time.perf_counter()
            way()
            seconds, spent = time.perf_counter() - started, time.process_time() - spent
            told = links.gather([seconds, spent])
            if number >= arguments.warm_up:
                found.setdefault(name, []).append(max(seconds for seconds, _ in told))
                cpu[name] += sum(spent for _, spent in told) / arguments.turns
    turn.check()
    if rank == 0:
        blocks = arguments.warm_up + arguments.turns
        found |= {"egress_bytes": links.down.traffic.sent.total() / blocks, "cpu_s": cpu}
        results.put(found)
    turn.close()
    links.close()


class Turn:
    """One rank's part in each way of moving a block."""

    def __init__(self, links: Any, cluster: Cluster, arguments: argparse.Namespace) -> None:
        self.links, self.rank = links, links.rank
        self.nbytes = arguments.mebibytes << 20
        each = self.nbytes // arguments.units
        self.slab, self.target = AlignedBuffer(self.nbytes), AlignedBuffer(self.nbytes)
        self.spans = [Span(unit, unit * each, (unit + 1) * each, 0) for unit in range(arguments.units)]
        elements = each // 4
        self.units = [
            UnitGradient(unit, 0, (unit * elements, (unit + 1) * elements), ((unit * elements, (unit + 1) * elements),),
                         self.nbytes // 4)
            for unit in range(arguments.units)
        ]  # fmt: skip
        self.nodes = subtrees(GROUPS, cluster.groups_of(self.rank, GROUPS))
        self.sums = {(0, node): torch.empty(self.nbytes // 4) for node in self.nodes}
        self.down, self.up = Broadcast(links.down, cluster), Reduction(links.up, cluster, GROUPS)
        self.bytes = self.slab.tensor(torch.uint8, 0, (self.nbytes,))
        self.whole = torch.zeros(self.nbytes // 4)
        if self.rank == 0:
            self.bytes.random_(0, 255, generator=torch.Generator().manual_seed(0))

    def broadcast(self) -> None:
        local: dict[int, Future[object]] = {}
        if self.rank == 0:
            local = {span.unit: done(None) for span in self.spans}
        here, passed = self.down.start(self.slab.view, self.spans, local)
        here.result()
        passed.result()

    def library_broadcast(self) -> None:
        dist.broadcast(self.bytes, 0)

    def reduce(self) -> None:
        for total in self.sums.values():
            total.fill_(1.0)
        heads = {node: {unit.unit: Head(True, {0: bytearray([1])}) for unit in self.units} for node in self.nodes}
        targets = {}
        if self.rank == 0:
            targets = {
                unit.unit: self.target.tensor(torch.float32, unit.span[0] * 4, (unit.span[1] - unit.span[0],))
                for unit in self.units
            }
        self.up.start(self.units, heads, dict(self.sums), targets).result()

    def library_reduce(self) -> None:
        self.whole.fill_(0.0 if self.rank == 0 else 1.0)
        dist.reduce(self.whole, 0)

    def check(self) -> None:
        """What came is what was sent."""
        told = self.links.gather(int(self.bytes.long().sum()))
        assert len(set(told)) == 1, told
        if self.rank == 0:
            nodes = sum(len(subtrees(GROUPS, Cluster(self.links.size - 1, 1).groups_of(rank, GROUPS)))
                        for rank in range(1, self.links.size))  # fmt: skip
            found = self.target.tensor(torch.float32, 0, (self.nbytes // 4,))
            assert bool((found == nodes).all()), found

    def close(self) -> None:
        self.down.close()
        self.up.close()


if __name__ == "__main__":
    main()
