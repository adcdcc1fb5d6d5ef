"""What sparse layers save where they are stored, moved and updated; and what that is worth where the disk sets the pace.

    python benchmarks/sparse.py --json

Two streamed runs of one model in turn, one with nine tenths of every layer's matrices missing (static random masks,
multiplied densely), the other dense; everything on disk, no RAM tier. Embedding and head are dense in both.

Keys: `store_bytes_ratio`, `streamed_bytes_ratio` (sparse over dense, of the layers' matrices with their masks, as records
have them), `optimizer_ratio` (updates of the layers: gradients scaled, AdamW, the cast, checksums), `dense_s`, `sparse_s`
(median seconds per step), `disk_bound_speedup`, `bytes_ratio` (read and written per step, all parameters),
`codec_gb_per_s` (dense bf16 output of one thread, places of non-zeros kept), `codec_cold_gb_per_s` (from the mask as it is
stored). Products with non-zeros only: `sparse_kernels.py`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from turns import Side, in_turn
from workload import Workload

from weightstream.sparse.codec import Places, encode_mask, expand
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import random_mask

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser, tokens=128, micro_batches=1)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, nargs=2, default=[1, 1])
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7, help="counted turns of each side")
    parser.add_argument("--steps-per-turn", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each side that do not count")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    with scratch(arguments.scratch, "sparse") as folder:
        result = {"benchmark": "sparse"} | compare(workload, arguments, folder)
    result |= codec((workload.width, workload.width * 11 // 4), arguments)
    write("sparse", result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


def compare(workload: Workload, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, in turn."""
    common = [sys.executable, HERE / "streamed.py", *workload.arguments(), "--serve", "--activations", "recompute"]
    common += ["--threads", str(arguments.threads), "--device-memory", arguments.device_memory]
    common += ["--host-memory", arguments.host_memory]
    ways = {"dense": [], "sparse": ["--sparsity", str(arguments.sparsity), "--block", *map(str, arguments.block)]}
    sides: dict[str, Side] = {}
    try:
        for name, own in ways.items():
            command = [*common, *own, "--store", folder / name]
            sides[name] = Side(name, command, log=folder / f"{name}.log")
        in_turn(list(sides.values()), turns=arguments.turns, steps=arguments.steps_per_turn, warm_up=arguments.warm_up)
        closed = {name: side.close() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.abandon()
    dense, sparse = sides["dense"], sides["sparse"]
    moved = {name: median(fact["read"] + fact["written"] for fact in side.facts) for name, side in sides.items()}
    updates = {name: [fact["layer_updates_s"] for fact in side.facts] for name, side in sides.items()}
    had = {name: found["layer_bytes"] for name, found in closed.items()}
    speedups = [one / other for one, other in zip(dense.turns, sparse.turns, strict=True)]
    return {
        "layers": workload.layers, "width": workload.width, "tokens": workload.tokens,
        "micro_batches": workload.micro_batches, "parameters": workload.parameter_count(),
        "sparsity": arguments.sparsity, "block": arguments.block, "threads": arguments.threads,
        "device_memory": arguments.device_memory, "host_memory": arguments.host_memory,
        "store_bytes_ratio": had["sparse"]["stored"] / had["dense"]["stored"],
        "streamed_bytes_ratio": had["sparse"]["streamed"] / had["dense"]["streamed"],
        "optimizer_ratio": median(updates["sparse"]) / median(updates["dense"]),
        **summary("dense_updates_s", updates["dense"]), **summary("sparse_updates_s", updates["sparse"]),
        **summary("dense_s", dense.turns), **summary("sparse_s", sparse.turns),
        "disk_bound_speedup": median(dense.turns) / median(sparse.turns),
        "disk_bound_speedup_spread": [min(speedups), max(speedups)],
        "bytes_ratio": moved["sparse"] / moved["dense"], "dense_bytes": moved["dense"], "sparse_bytes": moved["sparse"],
        "dense_seconds": dense.facts[-1]["seconds"], "sparse_seconds": sparse.facts[-1]["seconds"],
        "stalled_s": {name: median(fact["stalled_s"] for fact in side.facts) for name, side in sides.items()},
        "peak_rss_bytes": {name: side.peak.nbytes for name, side in sides.items()},
        "store_bytes": {name: found["disk_bytes"] for name, found in closed.items()},
    }  # fmt: skip


def codec(shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s of dense bf16 output, one thread, of two matrices that take turns."""
    grid = Grid.of(shape, tuple(arguments.block))
    masks = [
        random_mask(grid, round((1 - arguments.sparsity) * grid.cells), seed=seed, name="codec") for seed in range(2)
    ]
    values = [torch.randn(mask.nonzeros, 1).to(torch.bfloat16) for mask in masks]
    written = [encode_mask(mask) for mask in masks]
    outs = [torch.empty(shape, dtype=torch.bfloat16) for _ in masks]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        places = [Places.of(mask) for mask in masks]
        kept = [lambda i=i, p=p: expand(values[i], p, outs[i]) for i, p in enumerate(places)]
        cold = [
            lambda i=i: expand(values[i], Places.decoded(grid, masks[i].count, written[i]), outs[i])
            for i in range(len(masks))
        ]
        return _rates("codec_gb_per_s", kept, outs) | _rates("codec_cold_gb_per_s", cold, outs)
    finally:
        torch.set_num_threads(before)


def _rates(key: str, calls: list[Callable[[], None]], outs: list[torch.Tensor], turns: int = 9) -> dict[str, Any]:
    rates = []
    for turn in range(turns + 2):
        started = time.perf_counter()
        for call in calls:
            call()
        if turn >= 2:
            rates.append(sum(out.nbytes for out in outs) / (time.perf_counter() - started) / 1e9)
    return summary(key, rates)


if __name__ == "__main__":
    main()
