"""The same training with one rank and with 192: the same digest, and the same bytes out of the store.

    python benchmarks/ranks192.py --json

Every rank has its own worker, slabs and runtime and executes its part of the schedule, over the same store and fabric
code as a real cluster; the ranks are threads of one process (`fabric/local.py`) and compute in turns. One rank more owns
all records. `--workers` are the numbers of compute ranks that are compared, beside a run without any fabric (`0`).

Keys: `digest_equal`, `digest`, `ranks`, and by number of compute ranks `egress_bytes` (weights out of the store per step),
`ingress_bytes` (gradients into it per step), `seconds_per_step`, `most_sent_bytes` (by one compute rank per step).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from results import SCRATCH, provenance, write
from scratch import scratch

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.store.store import Store

VOCABULARY = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 16, 192])
    parser.add_argument("--micro-batches", type=int, default=192, help="and reduction groups")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, Any]] = {
        key: {} for key in ("egress_bytes", "ingress_bytes", "most_sent_bytes", "seconds_per_step")
    }
    digests = {}
    with scratch(arguments.scratch, "ranks192") as folder:
        for workers in arguments.workers:
            started = time.perf_counter()
            traffic = train(arguments, folder / f"{workers}", workers)
            found["seconds_per_step"][workers] = (time.perf_counter() - started) / arguments.steps
            with Store.open(folder / f"{workers}", writable=False) as store:
                digests[workers] = store.digest()
            if workers:
                own, *others = traffic
                found["egress_bytes"][workers] = own["down"] / arguments.steps
                found["ingress_bytes"][workers] = own["in"] / arguments.steps
                found["most_sent_bytes"][workers] = max(each["down"] + each["up"] for each in others) / arguments.steps
    result = {
        "benchmark": "ranks192", "ranks": max(arguments.workers), "micro_batches": arguments.micro_batches,
        "layers": arguments.layers, "width": arguments.width, "steps": arguments.steps,
        "digest_equal": len(set(digests.values())) == 1, "digest": next(iter(digests.values())),
        "egress_equal": len(set(found["egress_bytes"].values())) == 1, **found,
    }  # fmt: skip
    write("ranks192", result | provenance(1), as_json=arguments.json, record=not arguments.no_record)
    if not result["digest_equal"]:
        raise SystemExit(f"digests differ: {digests}")


def train(arguments: argparse.Namespace, path: Path, workers: int) -> list[dict[str, int]]:
    """Bytes by rank; without any workers the run has no fabric."""
    if not workers:
        steps(arguments, path, None, None)
        return []
    cluster = Cluster(workers, 1)

    def work(links: Links) -> dict[str, int]:
        steps(arguments, path, cluster, links)
        return {
            "down": links.down.traffic.sent.total(), "up": links.up.traffic.sent.total(),
            "in": links.up.traffic.received.total(),
        }  # fmt: skip

    return run_ranks(cluster, work, timeout_s=600)


def steps(arguments: argparse.Namespace, path: Path, cluster: Cluster | None, links: Links | None) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=arguments.width, intermediate_size=2 * arguments.width,
        num_hidden_layers=arguments.layers, num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    engine = ws.Engine(
        lambda: transformers.LlamaForCausalLM(config), path, ws.AdamW(lr=1e-3, weight_decay=0.1), clip_norm=1.0,
        precision="bf16", device_memory="64MiB", host_memory="64MiB", threads_per_worker=1, ram_tier=False,
        reduction_groups=arguments.micro_batches, cluster=cluster, links=links,
    )  # fmt: skip
    with engine:
        for step in range(arguments.steps):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, VOCABULARY, (arguments.micro_batches, 1, arguments.length), generator=generator)
            engine.step([{"input_ids": row, "labels": row} for row in ids])
        engine.commit()


if __name__ == "__main__":
    main()
