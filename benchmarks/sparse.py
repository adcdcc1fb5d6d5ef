"""What sparse layers save where they are stored, moved and updated; and what that is worth where the disk sets the pace.

    python benchmarks/sparse.py --json

Streamed runs of one model in turn: dense; with nine tenths of every layer's matrices missing (static random masks),
multiplied by a kernel; the same expanded and multiplied densely; and with as many missing in blocks, multiplied by a kernel.
Everything on disk, no RAM tier; embedding and head are dense in all. `--disk-limit` holds the disk to so many bytes per
second each way, as a slower one would.

Keys: `store_bytes_ratio`, `streamed_bytes_ratio` (sparse over dense, of the layers' matrices with their masks, as records
have them), `optimizer_ratio` (updates of the layers: gradients scaled, AdamW, the cast, checksums), `dense_s`, `sparse_s`
(median seconds per step), `disk_bound_speedup`, of the expanded run `expanded_s`, `disk_bound_expanded_speedup`, of the
run in blocks `block_s`, `disk_bound_block_speedup`, `bytes_ratio` (read and written per step, all parameters; not in
blocks), `codec_gb_per_s` (dense bf16 output of one thread,
places of non-zeros kept), `codec_cold_gb_per_s` (from the mask as it is stored). Products with non-zeros only:
`sparse_kernels.py`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from limits import DiskGroup
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from turns import Side, in_turn
from workload import Workload

from weightstream.sparse.codec import Places, encode_mask, expand
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import random_mask
from weightstream.units import parse_bytes

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser, tokens=128, micro_batches=1)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, nargs=2, default=[1, 1], help="of the runs that are not in blocks")
    parser.add_argument(
        "--multiply", default="native", help="kernel of the run that is not in blocks; none: all is expanded"
    )
    parser.add_argument("--kernel", default="native", help="of the run in blocks; none: there is no such run")
    parser.add_argument("--kernel-block", type=int, nargs=2, default=[32, 32])
    parser.add_argument(
        "--disk-limit", help="bytes per second, such as 500MB, of reads and of writes; results are kept apart"
    )
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
    named = "sparse" if arguments.disk_limit is None else f"sparse-disk-{arguments.disk_limit}"
    with scratch(arguments.scratch, "sparse") as folder:
        result = {"benchmark": named} | compare(workload, arguments, folder)
    result |= codec((workload.width, workload.width * 11 // 4), arguments)
    write(named, result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


def compare(workload: Workload, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, in turn."""
    common = [sys.executable, HERE / "streamed.py", *workload.arguments(), "--serve", "--activations", "recompute"]
    common += ["--threads", str(arguments.threads), "--device-memory", arguments.device_memory]
    common += ["--host-memory", arguments.host_memory]
    single = ["--sparsity", str(arguments.sparsity), "--block", *map(str, arguments.block)]
    ways = {"dense": [], "sparse": single}
    if arguments.multiply != "none":
        ways |= {"sparse": [*single, "--kernel", arguments.multiply], "expanded": single}
    if arguments.kernel != "none":
        blocks = ["--block", *map(str, arguments.kernel_block), "--kernel", arguments.kernel]
        ways["block"] = ["--sparsity", str(arguments.sparsity), *blocks]
    sides: dict[str, Side] = {}
    limit_bytes_per_s = None if arguments.disk_limit is None else parse_bytes(arguments.disk_limit)
    limit = None if limit_bytes_per_s is None else DiskGroup(limit_bytes_per_s, folder)
    try:
        for name, own in ways.items():
            command = [*common, *own, "--store", folder / name]
            enter = None if limit is None else limit.enter
            sides[name] = Side(name, command, log=folder / f"{name}.log", enter=enter)
        in_turn(list(sides.values()), turns=arguments.turns, steps=arguments.steps_per_turn, warm_up=arguments.warm_up)
        closed = {name: side.close() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.abandon()
        if limit is not None:
            limit.remove()
    dense, sparse = sides["dense"], sides["sparse"]
    moved = {name: median(fact["read"] + fact["written"] for fact in side.facts) for name, side in sides.items()}
    updates = {name: [fact["layer_updates_s"] for fact in side.facts] for name, side in sides.items()}
    had = {name: facts["layer_bytes"] for name, facts in closed.items()}
    found: dict[str, Any] = {"multiply": arguments.multiply}
    if "expanded" in sides:
        found |= {
            **summary("expanded_s", sides["expanded"].turns), **summary("expanded_updates_s", updates["expanded"]),
            **speedup("disk_bound_expanded_speedup", dense, sides["expanded"]),
            "expanded_seconds": sides["expanded"].facts[-1]["seconds"],
        }  # fmt: skip
    if "block" in sides:
        found |= {
            "kernel": arguments.kernel, "kernel_block": arguments.kernel_block,
            **summary("block_updates_s", updates["block"]), **summary("block_s", sides["block"].turns),
            **speedup("disk_bound_block_speedup", dense, sides["block"]),
            "block_store_bytes_ratio": had["block"]["stored"] / had["dense"]["stored"],
            "block_bytes": moved["block"], "block_seconds": sides["block"].facts[-1]["seconds"],
        }  # fmt: skip
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
        **speedup("disk_bound_speedup", dense, sparse), "disk_limit_bytes_per_s": limit_bytes_per_s,
        "bytes_ratio": moved["sparse"] / moved["dense"], "dense_bytes": moved["dense"], "sparse_bytes": moved["sparse"],
        "dense_seconds": dense.facts[-1]["seconds"], "sparse_seconds": sparse.facts[-1]["seconds"],
        "stalled_s": {name: median(fact["stalled_s"] for fact in side.facts) for name, side in sides.items()},
        "peak_rss_bytes": {name: side.peak.nbytes for name, side in sides.items()},
        "store_bytes": {name: facts["disk_bytes"] for name, facts in closed.items()},
    } | found  # fmt: skip


def speedup(key: str, slow: Side, fast: Side) -> dict[str, Any]:
    """Of medians, and the least and most of any turn."""
    each = [one / other for one, other in zip(slow.turns, fast.turns, strict=True)]
    return {key: median(slow.turns) / median(fast.turns), f"{key}_spread": [min(each), max(each)]}


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
