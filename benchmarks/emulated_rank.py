"""One rank of a run whose compute is emulated: what `scaling.py` starts, with torchrun's variables in the environment.

Trains for some steps and writes, as JSON, when each step ended on this rank and what it cost.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from emulated import EmulatedEngine, Layers, Profile
from late import LateLinks

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.fabric import broadcast, reduce
from weightstream.fabric.distributed import connect
from weightstream.fabric.links import Links


def main() -> None:
    wanted = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    # blocks are a part of their true size, and so are the chunks in which they travel
    broadcast.CHUNK_BYTES, reduce.CHUNK = wanted["chunk_bytes"], wanted["chunk_bytes"] // 4
    cluster = Cluster(wanted["workers"], wanted["memory"])
    links: Links = connect()
    if wanted["latency_s"]:
        links = LateLinks(links, wanted["latency_s"])
    found = train(wanted, cluster, links)
    (Path(sys.argv[1]).parent / f"rank-{links.rank}.json").write_text(json.dumps(found))
    links.close()


def train(wanted: dict[str, Any], cluster: Cluster, links: Links) -> dict[str, Any]:
    """Times (on the machine's monotonic clock), CPU seconds, seconds that compute waited, and bytes, by step."""
    profile = Profile()
    micro_batches = [torch.zeros(1)] * wanted["workers"]
    steps = []
    engine = EmulatedEngine(
        lambda: Layers(profile, wanted["shrink"], wanted["layers"]), wanted["store"], ws.AdamW(lr=1e-4),
        clip_norm=1.0, precision="bf16", device_memory=wanted["device_memory"], host_memory=wanted["host_memory"],
        threads_per_worker=1, activations="recompute", ram_tier=wanted["ram_tier"], reduction_groups=wanted["groups"],
        prefetch=wanted["prefetch"], panel_elements=wanted["panel_elements"],
        forward_s=wanted["forward_s"], backward_s=wanted["backward_s"], cluster=cluster, links=links,
    )  # fmt: skip
    with engine:
        for _ in range(wanted["steps"]):
            result = engine.step(micro_batches, weights=[1 / len(micro_batches)] * len(micro_batches))
            steps.append({
                "ended": time.perf_counter(), "turned": engine.worker.turned,
                "cpu_s": time.process_time(), "machine_s": machine_seconds(),
                "stalled_s": result.stalled_s, "seconds": dict(result.seconds),
                "sent": [links.down.traffic.sent.total(), links.up.traffic.sent.total()],
                "received": [links.down.traffic.received.total(), links.up.traffic.received.total()],
            })  # fmt: skip
        slabs = engine.allotment.slabs
    return {"rank": links.rank, "computes": links.rank in cluster.compute_ranks, "slabs": slabs, "steps": steps}


def machine_seconds() -> tuple[float, float]:
    """CPU seconds that all cores were busy, and that there were, since the machine started."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(values) - values[3] - values[4]) / ticks, sum(values) / ticks


if __name__ == "__main__":
    main()
