"""At which density does a product with non-zeros only beat the dense one? Every kernel beside it, in turn.

    python benchmarks/sparse_kernels.py --json

One linear layer, forward and both gradients (of the input; of the weight, at non-zeros only for a kernel). The dense
side is the product alone: its weight lies there whole, and nothing of its gradient is gathered. All sides run in one
process, dense, kernel, kernel, …, `--turns` times after one turn that does not count; a turn is as many calls as last
`--least-s`. Masks have so many blocks as the density says, at random places; what is prepared once per mask is prepared.
A kernel that took more than four times as long as the dense product is not measured at higher densities of the same layer.

Keys: `crossover` by kernel, block and dtype: the density below which it wins, least over all layers (null: in one of them
at least it never wins); `block_speedup`: the speedup in blocks of 32×32 at 10% where compute sets the pace, that is with the
most tokens, the least over dtypes and over all shapes, by the kernel that is fastest so (null: not measured); `best`: the
same by block, dtype and tokens, with the kernel; `block_speedups`: the same by kernel; `worst_error`: largest difference
between a kernel's y and the dense one, by the largest element of that, by dtype; `curves`: by layer, kernel, block and
dtype, `densities`, `speedups` (of medians), `crossover`, `kernel_s` and `dense_s` with `*_spread` (least and most). The
curves are drawn in `results/sparse_kernels.html`.
"""

import argparse
import time
from collections.abc import Callable
from math import ceil
from statistics import median
from typing import Any

import torch
from results import RESULTS, provenance, write

from weightstream.machine.kernels import name_of
from weightstream.machine.sparsity import dense_layer, sparse_layer, structure
from weightstream.report.figures import Line, Section, curve, page
from weightstream.sparse.choosing import crossover
from weightstream.sparse.kernels import Kernel, multiply, supports
from weightstream.sparse.structure import Structure
from weightstream.worker.allocator import keep_memory

Call = Callable[[], Any]
Side = tuple[Kernel, tuple[int, int]]

SIDES: tuple[Side, ...] = (
    ("native", (16, 16)), ("native", (32, 32)), ("native", (64, 64)), ("native", (128, 128)), ("native", (1, 1)),
    ("gathered", (32, 32)), ("gathered", (64, 64)), ("gathered", (128, 128)), ("bsr", (32, 32)), ("bsr", (64, 64)),
    ("csr", (1, 1)),
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOST = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "1024x2816", "2816x1024"], help="out x in")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--least-s", type=float, default=0.02, help="seconds of a turn at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    curves, errors = [], {}
    for text in arguments.shapes:
        rows, columns = (int(part) for part in text.split("x"))
        for dtype in (DTYPES[name] for name in arguments.dtypes):
            error = largest_error((rows, columns), dtype, arguments.device)
            errors[name_of(dtype)] = max(error, errors.get(name_of(dtype), 0.0))
            for tokens in arguments.tokens:
                curves += layer((rows, columns), dtype, tokens, arguments)
    named = "sparse_kernels" if arguments.device == "cpu" else f"sparse_kernels_{arguments.device}"
    result = {
        "benchmark": named, "threads": arguments.threads, "crossover": crossovers(curves),
        "block_speedup": block_speedup(curves), "best": best(curves), "block_speedups": block_speedups(curves),
        "worst_error": errors, "curves": curves,
    }  # fmt: skip
    if arguments.device != "cpu":
        result["accelerator"] = torch.cuda.get_device_name(arguments.device)
    result |= provenance(arguments.turns)
    write(named, result, as_json=arguments.json, record=not arguments.no_record)
    if not arguments.no_record:
        about = f"{result['machine']['cpu']}, {arguments.threads} threads, commit {result['commit']}"
        (RESULTS / f"{named}.html").write_text(drawn(curves, about))


def layer(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The curves of one layer."""
    device = arguments.device
    sides = [side for side in SIDES if supports(*side, dtype, torch.device(device))]
    found: dict[Side, dict[str, list[Any]]] = {side: _rows() for side in sides}
    dense = dense_layer(shape, dtype, tokens, device=device)
    for density in sorted(arguments.densities):
        calls = {
            side: sparse_layer(side[0], structures(shape, side, density, device), dtype, tokens)
            for side in sides
            if not found[side]["speedups"] or found[side]["speedups"][-1] >= LOST
        }
        if not calls:
            break
        dense_s, *others = in_turn([dense, *calls.values()], arguments.turns, arguments.least_s, device)
        for side, taken in zip(calls, others, strict=True):
            rows = found[side]
            rows["densities"].append(structures(shape, side, density, device)[0].density)
            rows["speedups"].append(median(dense_s) / median(taken))
            for key, samples in (("kernel_s", taken), ("dense_s", dense_s)):
                rows[key].append(median(samples))
                rows[f"{key}_spread"].append([min(samples), max(samples)])
    about = {"shape": list(shape), "tokens": tokens, "dtype": name_of(dtype)}
    return [
        {"kernel": kernel, "block": list(block), **about, "crossover": crossover(rows["densities"], rows["speedups"])}
        | rows
        for (kernel, block), rows in found.items()
    ]


def _rows() -> dict[str, list[Any]]:
    return {key: [] for key in ("densities", "speedups", "kernel_s", "kernel_s_spread", "dense_s", "dense_s_spread")}


def structures(shape: tuple[int, int], side: Side, density: float, device: str) -> list[Structure]:
    """Two masks that take turns."""
    return [structure(shape, side[1], density, seed=seed, device=device) for seed in range(2)]


def in_turn(calls: list[Call], turns: int, least_s: float, device: str) -> list[list[float]]:
    """Seconds per call, by call and turn: A B C A B C …"""
    counts = [max(1, ceil(least_s / timed(call, 1, device))) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, count, samples in zip(calls, counts, found, strict=True):
            seconds = timed(call, count, device)
            if turn:
                samples.append(seconds)
    return found


def timed(call: Call, count: int, device: str) -> float:
    """Seconds per call of so many."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def largest_error(shape: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """Between y of every kernel and y of the dense product, by the largest element of the latter."""
    worst = 0.0
    for kernel, block in SIDES:
        if not supports(kernel, block, dtype, torch.device(device)):
            continue
        one = structure(shape, block, 0.1, device=device)
        mask = one.mask().to(device)
        weight = torch.randn(shape, device=device).to(dtype) * mask
        x = torch.randn(128, shape[1], device=device).to(dtype)
        dense = torch.nn.functional.linear(x, weight).double()
        sparse = multiply(x, weight[mask].view(-1, 1), None, one, kernel).double()
        worst = max(worst, float((sparse - dense).abs().max() / dense.abs().max()))
    return worst


def crossovers(curves: list[dict[str, Any]]) -> dict[str, float | None]:
    """By kernel, block and dtype, the least over all layers."""
    found: dict[str, list[float | None]] = {}
    for one in curves:
        a, b = one["block"]
        found.setdefault(f"{one['kernel']} {a}x{b} {one['dtype']}", []).append(one["crossover"])
    return {key: None if None in each else min(one for one in each if one is not None) for key, each in found.items()}


def block_speedups(curves: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """At a tenth of the blocks, the least over all shapes, by block, dtype and tokens, and by kernel."""
    found: dict[str, dict[str, float]] = {}
    for one in curves:
        a, b = one["block"]
        for density, speedup in zip(one["densities"], one["speedups"], strict=True):
            if 0.09 <= density <= 0.11:
                kernels = found.setdefault(f"{a}x{b} {one['dtype']} {one['tokens']}", {})
                kernels[one["kernel"]] = min(speedup, kernels.get(one["kernel"], speedup))
    return found


def best(curves: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest of those kernels, as a choice by what was measured takes it."""
    found = {}
    for key, kernels in block_speedups(curves).items():
        kernel = max(kernels, key=lambda one: kernels[one])
        found[key] = {"kernel": kernel, "speedup": kernels[kernel]}
    return found


def block_speedup(curves: list[dict[str, Any]]) -> float | None:
    """The least of the best of 32×32 with the most tokens."""
    most, fastest = max(one["tokens"] for one in curves), best(curves)
    keys = [f"32x32 {name_of(dtype)} {most}" for dtype in DTYPES.values()]
    return min((fastest[key]["speedup"] for key in keys if key in fastest), default=None)


def drawn(curves: list[dict[str, Any]], about: str) -> str:
    """One figure for each layer and dtype: every kernel's curve, and a cross where it meets the dense product."""
    sections = []
    layers = dict.fromkeys((tuple(one["shape"]), one["tokens"], one["dtype"]) for one in curves)
    for shape, tokens, dtype in layers:
        own = [one for one in curves if (tuple(one["shape"]), one["tokens"], one["dtype"]) == (shape, tokens, dtype)]
        lines = [
            Line(
                f"{one['kernel']} {one['block'][0]}×{one['block'][1]}", one["densities"], one["speedups"], markers=True
            )
            for one in own
        ]
        figure = curve(lines, x="density", y="times as fast as dense", log_x=True, log_y=True)
        figure.add_hline(y=1, line={"dash": "dot", "width": 1})
        marked = [one["crossover"] for one in own if one["crossover"] is not None]
        figure.add_scatter(
            x=marked, y=[1] * len(marked), mode="markers", name="crossover",
            marker={"symbol": "x", "size": 9, "color": "black"},
        )  # fmt: skip
        sections.append(Section(f"{shape[0]}×{shape[1]}, {tokens} tokens, {dtype}", [figure]))
    return page("Products with non-zeros only, forward and both gradients", sections, subtitle=about)


if __name__ == "__main__":
    main()
