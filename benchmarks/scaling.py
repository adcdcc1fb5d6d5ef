"""Weak scaling of the whole runtime with compute emulated; and on a limited link, what of the transfer is hidden.

    python benchmarks/scaling.py --json

Engine, schedule, store on disk, fabric over processes and updates are real; each forward and backward waits for the time
that it takes on a real device (`emulated.Profile`), and hands over gradients of the real size. One rank owns all
records, `--workers` compute one micro-batch each. Bytes of a block and seconds of compute are both divided by `factor`.

Then the same in network namespaces with a limited link (`--limited-only`, `--no-limited`; needs root and iproute2): one
memory rank and two workers, 1 Gbit/s each way, sends 0.2 ms late, and compute that takes `--ratios` times what the
busiest link takes in the forward and in the backward. `limited_link_ratio` is a step over the larger of the two plus the
first block's way. Chunks are smaller there, as blocks are (`--limited-chunk-bytes`). `link_bytes_per_s` is what one TCP
connection gets there, measured in the same run.
"""

import argparse
import os
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from emulated import Profile, shrunk_parameters
from limited import traffic
from namespaces import address, hosts, measured_rate, missing
from ranks import Place, run_ranks
from results import SCRATCH, provenance, summary, write
from scratch import scratch

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import CHUNK_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=8, help="of every width: the factor is near its square")
    parser.add_argument("--tokens", type=int, default=Profile().tokens, help="of one worker in one step")
    parser.add_argument("--groups", type=int, default=16, help="reduction groups")
    parser.add_argument("--slabs", type=int, default=4, help="blocks that fit in device memory")
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--panel-elements", type=int, default=8 << 20, help="of the units of a block")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1, 2], help="compute over transfer")
    parser.add_argument("--bits-per-s", type=float, default=1e9, help="of the limited link")
    parser.add_argument("--latency-s", type=float, default=2e-4, help="added to its sends")
    parser.add_argument("--limited-panel-elements", type=int, default=1 << 20)
    parser.add_argument(
        "--limited-chunk-bytes", type=int, default=256 << 10, help="the fabric's 2 MiB, made smaller too"
    )
    parser.add_argument("--no-limited", action="store_true")
    parser.add_argument("--limited-only", action="store_true")
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--ram-tier", action="store_true", help="keep in it what host memory has room for")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    profile = Profile(tokens=arguments.tokens)
    parameters = shrunk_parameters(profile, arguments.shrink)
    factor = profile.parameters / parameters
    block_bytes = -(-2 * parameters // 4096) * 4096
    result: dict[str, Any] = {
        "benchmark": "scaling", "factor": factor,
        "profile": {
            "layer": "Llama 3 8B", "parameters": profile.parameters, "block_bytes": 2 * profile.parameters,
            "tokens": profile.tokens, "flops": profile.flops,
            "forward_s": profile.forward_s, "backward_s": profile.backward_s,
        },
        "block_bytes": block_bytes, "layers": arguments.layers, "reduction_groups": arguments.groups,
        "compute_s": arguments.layers * (profile.forward_s + profile.backward_s) / factor,
    }  # fmt: skip
    wanted = {
        "memory": 1, "shrink": arguments.shrink, "layers": arguments.layers, "groups": arguments.groups,
        "device_memory": arguments.slabs * block_bytes + (1 << 16), "host_memory": arguments.host_memory,
        "ram_tier": arguments.ram_tier,
        "chunk_bytes": CHUNK_BYTES,
        "prefetch": arguments.prefetch, "block_bytes": block_bytes, "panel_elements": arguments.panel_elements,
        "steps": arguments.warm_up + arguments.steps, "latency_s": 0.0,
        "forward_s": profile.forward_s / factor, "backward_s": profile.backward_s / factor,
    }  # fmt: skip
    with scratch(arguments.scratch, "scaling") as folder:
        wanted["store"] = str(folder / "store")
        if not arguments.limited_only:
            result |= weak_scaling(arguments, wanted, folder)
        if not arguments.no_limited:
            result |= limited_link(arguments, profile, wanted, folder)
    name = "scaling-limited" if arguments.limited_only else "scaling"
    write(name, result | provenance(arguments.steps), as_json=arguments.json, record=not arguments.no_record)


def weak_scaling(arguments: argparse.Namespace, wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One worker after another number of them, on the same store."""
    keys = ("efficiency", "step_s", "step_s_spread", "cpu_share_by_rank", "cpu_share_machine", "waited_s")
    found: dict[str, Any] = {key: {} for key in keys}
    for workers in arguments.workers:
        ranks = run_ranks(wanted | {"workers": workers}, folder / f"workers-{workers}", [Place()] * (workers + 1))
        seconds = step_seconds(ranks, arguments.steps)
        found["step_s"][workers] = median(seconds)
        found["step_s_spread"][workers] = summary("step_s", seconds)["step_s_spread"]
        found["cpu_share_by_rank"][workers] = cpu_shares(ranks, arguments.steps)
        found["cpu_share_machine"][workers] = machine_share(ranks, arguments.steps)
        found["waited_s"][workers] = [
            median(s["stalled_s"] for s in rank["steps"][-arguments.steps :]) for rank in ranks
        ]
        found["efficiency"][workers] = found["step_s"][arguments.workers[0]] / found["step_s"][workers]
    return found


def limited_link(
    arguments: argparse.Namespace, profile: Profile, wanted: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """One memory rank and two workers in namespaces of their own."""
    refused = missing()
    if refused is not None:
        return {"limited_link_ratio": None, "limited_link_refused": refused}
    cluster, panels = Cluster(2, 1), arguments.limited_panel_elements
    counted = traffic(
        profile, arguments.shrink, arguments.layers, cluster=cluster, groups=arguments.groups, panel_elements=panels,
        slabs=arguments.slabs,
    )  # fmt: skip
    keys = (
        "limited_link_ratio",
        "limited_step_s",
        "limited_step_s_spread",
        "limited_bound_s",
        "limited_cpu_share_by_rank",
    )
    found: dict[str, Any] = {key: {} for key in keys}
    with hosts(cluster.size, arguments.bits_per_s) as places:
        rate = measured_rate(places)
        forward_s, backward_s = counted.forward / rate, counted.backward / rate
        fill_s = wanted["block_bytes"] / rate + cluster.workers * arguments.latency_s
        for ratio in arguments.ratios:
            own = {
                "workers": cluster.workers, "latency_s": arguments.latency_s, "panel_elements": panels,
                "chunk_bytes": arguments.limited_chunk_bytes,
                "store": str(folder / "limited"),
                "forward_s": ratio * forward_s / arguments.layers, "backward_s": ratio * backward_s / arguments.layers,
            }  # fmt: skip
            ranks = run_ranks(wanted | own, folder / f"limited-{ratio:g}", places, master=address(0))
            sent = {
                sum(s["sent"][:1]) - sum(b["sent"][:1]) for b, s in pairwise(ranks[0]["steps"][arguments.warm_up :])
            }
            if sent != {counted.egress}:
                raise SystemExit(f"the memory rank sent {sent} bytes a step, counted were {counted.egress}")
            seconds = step_seconds(ranks, arguments.steps)
            bound = max(1.0, ratio) * (forward_s + backward_s) + fill_s
            found["limited_step_s"][ratio] = median(seconds)
            found["limited_step_s_spread"][ratio] = summary("step_s", seconds)["step_s_spread"]
            found["limited_bound_s"][ratio] = bound
            found["limited_link_ratio"][ratio] = median(seconds) / bound
            found["limited_cpu_share_by_rank"][ratio] = cpu_shares(ranks, arguments.steps)
    return found | {
        "link_bytes_per_s": rate, "limited_forward_transfer_s": forward_s, "limited_backward_transfer_s": backward_s,
        "limited_fill_s": fill_s, "limited_workers": cluster.workers, "limited_panel_elements": panels,
        "latency_s": arguments.latency_s, "limited_chunk_bytes": arguments.limited_chunk_bytes,
        "ram_tier": arguments.ram_tier, "host_memory": arguments.host_memory,
    }  # fmt: skip


def step_seconds(ranks: list[dict[str, Any]], count: int) -> list[float]:
    """From the end of one step to the end of the next, on the last rank to end each."""
    ends = [max(rank["steps"][number]["ended"] for rank in ranks) for number in range(-count - 1, 0)]
    return [after - before for before, after in pairwise(ends)]


def cpu_shares(ranks: list[dict[str, Any]], count: int) -> list[float]:
    """Of one core, by rank, over the steps that count."""
    shares = []
    for rank in ranks:
        first, last = rank["steps"][-count - 1], rank["steps"][-1]
        shares.append((last["cpu_s"] - first["cpu_s"]) / (last["ended"] - first["ended"]))
    return shares


def machine_share(ranks: list[dict[str, Any]], count: int) -> float:
    """Of all cores, whoever used them: other processes and the kernel's own work, too."""
    (busy, total), (busy_then, total_then) = (ranks[0]["steps"][place]["machine_s"] for place in (-1, -count - 1))
    return (busy - busy_then) / max(total - total_then, 1 / os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    main()
