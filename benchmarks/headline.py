"""Training in a parameter space of 123 trillion: real steps on real text, of which each reaches some thousand experts.

    python benchmarks/headline.py --json

A small decoder on bytes (`demo_120t/bytewise.py`) with two layers of 256**4 experts, in turn with the same one with 131,072
experts a layer, and with none. It shows capacity and exactness, not quality (`docs/120t.md`). As it is by default it
needs some 60 GB of disk, that is both families' experts and about as many dead bytes again; fewer `--steps` need less.

Keys: `parameters`, `open_s` (an engine on the trained store; imports not counted), `seconds_per_step`,
`small_family_seconds_per_step`, `no_expert_seconds_per_step` (median of turns; `*_spread` least and most), `size_ratio`
(the first over the second, medians), `touched_experts`, `touched_parameters` (different ones, in all steps), `disk_bytes`
(of the store's files, peak), `peak_rss_bytes`, `loss_first` (of step 1), `loss_last` (mean of the last ten steps),
`validation_loss`, `small_family_validation_loss`, `no_expert_validation_loss` (nats per byte, held-out files).
`touched_per_step`, `new_per_step`, `bytes_read`, `bytes_written` are medians of counted steps, beside the arithmetic's
`expert_bytes_read` and `expert_bytes_written`.

`seconds_by_experts`, `rss_by_experts`: by experts per layer, 10**3 to 10**10, all in turn. A hash leads to the same
number of different experts in each, spread over the family (`bytewise.SpreadRouter`), so that a step reaches as many
records whatever their number; `touched_by_experts` says how many. `*_by_experts_ratio` are the most over the least.
"""

import argparse
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bytewise import Measured, add_settings
from memory import DiskPeak
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from turns import Side, in_turn

from weightstream.demo_120t.bytewise import TEXTS, write_text

HERE = Path(__file__).resolve().parent
STATE_BYTES = 12  # per parameter: fp32 master and AdamW's two moments
SIZES = tuple(10**power for power in range(3, 11))
LAST = 10  # steps whose mean loss counts as the last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Measured.add_arguments(parser, "reaches")
    parser.add_argument("--small-experts", type=int, default=131_072, help="of each layer of the small family")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="families that are reached alike")
    add_settings(parser)
    parser.add_argument("--steps", type=int, default=200, help="counted steps of each side")
    parser.add_argument("--turns", type=int, default=5, help="in which a side has them")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each side that do not count")
    parser.add_argument("--size-steps", type=int, default=10, help="counted steps of each of --sizes")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    workload = Measured.of(arguments)
    for steps in (arguments.steps, *([arguments.size_steps] if arguments.sizes else [])):
        if steps < arguments.turns:
            raise SystemExit(f"{arguments.turns} turns need as many steps at least, found {steps}")
    with scratch(arguments.scratch, "headline") as folder:
        write_text(folder)
        result = {"benchmark": "headline"} | compare(workload, arguments, folder)
        if arguments.sizes:
            result |= by_experts(workload, arguments, folder)
        for name in TEXTS:
            (folder / name).unlink()
    write("headline", result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


@contextmanager
def sides_of(
    workloads: dict[str, Measured], arguments: argparse.Namespace, folder: Path, sequences: int
) -> Iterator[dict[str, Side]]:
    """A side for each; whatever happens, none is left."""
    sides: dict[str, Side] = {}
    settings = ["--threads", str(arguments.threads), "--sequences", str(sequences), "--text", folder]
    for name in ("device_memory", "host_memory", "experts_memory"):
        settings += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
    try:
        for name, workload in workloads.items():
            command = [sys.executable, HERE / "bytewise.py", "--serve", *workload.arguments(), *settings]
            sides[name] = Side(name, [*command, "--store", folder / name], log=folder / f"{name}.log")
        yield sides
    finally:
        for name, side in sides.items():
            side.abandon()
            shutil.rmtree(folder / name, ignore_errors=True)


def compare(workload: Measured, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The large family, the small one and no experts, in turn."""
    workloads = {
        "large": workload,
        "small": replace(workload, experts=arguments.small_experts),
        "none": replace(workload, experts=0),
    }
    disk = DiskPeak(folder / "large")
    try:
        with sides_of(workloads, arguments, folder, arguments.sequences) as sides:
            steps = arguments.steps // arguments.turns
            in_turn(list(sides.values()), turns=arguments.turns, steps=steps, warm_up=arguments.warm_up)
            closed = {name: side.close() for name, side in sides.items()}
    finally:
        disk_bytes = disk.stop()
    large, small, none = sides.values()
    of = {name: [fact[name] for fact in large.facts] for name in ("touched", "new", "read", "written")}
    each = workload.expert_parameters
    losses, touched_experts = closed["large"]["losses"], closed["large"]["touched_experts"]
    again = [touched - new for touched, new in zip(of["touched"], of["new"], strict=True)]
    ratios = [one / other for one, other in zip(large.turns, small.turns, strict=True)]
    return {
        "parameters": workload.parameter_count(), "layers": workload.layers, "width": workload.width,
        "hidden": workload.hidden, "experts": workload.experts, "small_experts": arguments.small_experts,
        "expert_parameters": each, "tokens": workload.tokens, "micro_batches": workload.micro_batches,
        "steps": len(losses), "threads": arguments.threads, "device_memory": arguments.device_memory,
        "host_memory": arguments.host_memory, "experts_memory": arguments.experts_memory,
        "open_s": closed["large"]["open_s"], "created_s": closed["large"]["created_s"],
        **summary("seconds_per_step", large.turns), **summary("small_family_seconds_per_step", small.turns),
        "size_ratio": median(large.turns) / median(small.turns), "size_ratio_spread": [min(ratios), max(ratios)],
        **summary("no_expert_seconds_per_step", none.turns),
        "touched_experts": touched_experts, "touched_parameters": touched_experts * each,
        "touched_per_step": median(of["touched"]), "new_per_step": median(of["new"]),
        "bytes_read": median(of["read"]), "bytes_written": median(of["written"]),
        "expert_bytes_read": STATE_BYTES * each * median(again),
        "expert_bytes_written": STATE_BYTES * each * median(of["touched"]),
        "os_bytes_read": large.disk_read_bytes_per_step, "os_bytes_written": large.disk_written_bytes_per_step,
        **summary("stalled_s", [fact["stalled_s"] for fact in large.facts]),
        "disk_bytes": disk_bytes, "peak_rss_bytes": large.peak.nbytes,
        "small_family_peak_rss_bytes": small.peak.nbytes, "no_expert_peak_rss_bytes": none.peak.nbytes,
        "loss_first": losses[0], "loss_last": fmean(losses[-LAST:]),
        "small_family_loss_last": fmean(closed["small"]["losses"][-LAST:]),
        "no_expert_loss_last": fmean(closed["none"]["losses"][-LAST:]),
        "validation_loss": closed["large"]["validation_loss"],
        "small_family_validation_loss": closed["small"]["validation_loss"],
        "no_expert_validation_loss": closed["none"]["validation_loss"],
        "losses": losses,
    }  # fmt: skip


def by_experts(workload: Measured, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Families of all sizes, of which each step reaches as much."""
    reached = min(arguments.sizes)
    workloads = {str(size): replace(workload, experts=size, reaches=reached) for size in arguments.sizes}
    with sides_of(workloads, arguments, folder, sequences=0) as sides:
        steps = arguments.size_steps // arguments.turns
        in_turn(list(sides.values()), turns=arguments.turns, steps=steps, warm_up=arguments.warm_up)
        for side in sides.values():
            side.close()
    seconds = {size: median(side.turns) for size, side in sides.items()}
    rss = {size: side.peak.nbytes for size, side in sides.items()}
    return {
        "seconds_by_experts": seconds, "seconds_by_experts_ratio": ratio(seconds.values()),
        "seconds_by_experts_spread": {size: [min(side.turns), max(side.turns)] for size, side in sides.items()},
        "rss_by_experts": rss, "rss_by_experts_ratio": ratio(rss.values()),
        "touched_by_experts": {size: fmean(fact["touched"] for fact in side.facts) for size, side in sides.items()},
    }  # fmt: skip


def ratio(values: Collection[float]) -> float:
    return max(values) / min(values)


if __name__ == "__main__":
    main()
