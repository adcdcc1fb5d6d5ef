"""A training run of one rank or several as a side of a comparison (`turns.py`), for `prediction.py`.

The process that is started is the first rank and starts the others, in its own process group, so that all of them stop
when it is stopped. They do what it says: every step begins with a word from it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from turns import serve
from workload import BETAS, CLIP_NORM, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Workload, loss_fn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.fabric.distributed import connect
from weightstream.fabric.links import Links

STILL_S = 0.3  # without a transfer that ends: nothing is under way
GROUPS = 4  # reduction groups: as many as the most workers


def open_engine(
    wanted: dict[str, Any], store: Path, cluster: Cluster | None = None, links: Links | None = None
) -> ws.Engine:
    """The engine of a run, alone or as one rank."""
    return ws.Engine(
        model=workload_of(wanted).build, store=store,
        optimizer=ws.AdamW(lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY),
        clip_norm=CLIP_NORM if wanted["clip"] else None, precision="bf16", device_memory=wanted["device_memory"],
        host_memory=wanted["host_memory"], activations=wanted["activations"], ram_tier=wanted["ram_tier"],
        threads_per_worker=wanted["threads"], reduction_groups=GROUPS, cluster=cluster, links=links,
    )  # fmt: skip


def workload_of(wanted: dict[str, Any]) -> Workload:
    return Workload(**{key: wanted[key] for key in ("layers", "width", "tokens", "micro_batches")})


class Run:
    """The first rank of a run, and the processes of the others."""

    def __init__(self, wanted: dict[str, Any], store: Path) -> None:
        self.wanted, self.others, self.links = wanted, [], None
        cluster = Cluster(wanted["workers"])
        if cluster.size > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            place = {"WORLD_SIZE": str(cluster.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, __file__, json.dumps(wanted), "--store", store, "--follow"]
            for rank in range(1, cluster.size):
                self.others.append(subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank)}))
            os.environ |= place | {"RANK": "0"}
            self.links = connect(timeout_s=1800)  # sides out of turn stand still
        self.engine = open_engine(wanted, store, cluster if self.links else None, self.links)
        self.number = 0

    def step(self) -> dict[str, Any]:
        self.engine.gather("step")
        self.number += 1
        return stepped(self.engine, self.wanted, self.number)

    def close(self) -> dict[str, Any]:
        self.engine.gather("close")
        allotment = self.engine.allotment
        found = {
            "device_bytes": allotment.device_bytes, "host_bytes": allotment.host_bytes,
            "whole_step": whole_step(self.engine, self.wanted),
        }  # fmt: skip
        self.engine.close()
        if self.links is not None:
            self.links.close()
        for other in self.others:
            other.wait()
        return found


def stepped(engine: ws.Engine, wanted: dict[str, Any], number: int) -> dict[str, Any]:
    """One step on every rank; bytes are of all of them, seconds of this one."""
    result = engine.step(workload_of(wanted).batches(number), loss_fn)
    moved = engine.gather([result.bytes.read, result.bytes.written])
    return {
        "read": sum(read for read, _ in moved), "written": sum(written for _, written in moved),
        "stalled_s": result.stalled_s, "seconds": dict(result.seconds), "counts": dict(engine.runtime.outcome.counts),
    }  # fmt: skip


def whole_step(engine: ws.Engine, wanted: dict[str, Any]) -> tuple[int, int]:
    """Bytes read and written by one more step of all ranks, from its first to its last: a step's writes go on into the next
    one, and with clipping it reads ahead for it, as far as it comes. So a step begins and ends here where nothing moves."""
    before = settled_bytes(engine, wanted)
    engine.gather("all have counted")
    engine.step(workload_of(wanted).batches(0), loss_fn)
    both = [after - earlier for after, earlier in zip(settled_bytes(engine, wanted), before, strict=True)]
    every = engine.gather(both)
    return sum(read for read, _ in every), sum(written for _, written in every)


def settled_bytes(engine: ws.Engine, wanted: dict[str, Any]) -> tuple[int, int]:
    """What this rank has moved once all that is under way is done; with clipping a step's updates are the next one's."""
    if not wanted["clip"]:
        engine.commit()
    while True:
        moved = moved_bytes(engine)
        time.sleep(STILL_S)
        if moved_bytes(engine) == moved:
            return moved


def moved_bytes(engine: ws.Engine) -> tuple[int, int]:
    """What this rank has read from its disk and written to it so far."""
    counts = [found for (tier, _), found in engine.store.counters.items() if tier == "disk"]
    return sum(found["read"] for found in counts), sum(found["written"] for found in counts)


def follow(wanted: dict[str, Any], store: Path) -> None:
    """Another rank: does what the first one says."""
    links = connect(timeout_s=1800)
    engine = open_engine(wanted, store, Cluster(wanted["workers"]), links)
    number = 0
    while engine.gather(None)[0] == "step":
        number += 1
        stepped(engine, wanted, number)
    whole_step(engine, wanted)
    engine.close()
    links.close()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", type=json.loads, help="the run, as JSON")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--follow", action="store_true", help="another rank than the first")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.wanted["threads"])
    if arguments.follow:
        follow(arguments.wanted, arguments.store)
    else:
        serve(lambda: Run(arguments.wanted, arguments.store))


if __name__ == "__main__":
    main()
