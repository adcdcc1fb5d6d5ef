"""What is predicted of a run before it starts, held against the run: seconds, memory and bytes, over a grid of runs.

    python benchmarks/prediction.py --json

Some runs at a time: the machine is calibrated (or `--profile` given), each of them is predicted from its model, its plan
and the profile, and only then they are measured, two steps of each in turn, of which the second counts, each the median of
five after warm-up. A shared machine is not as fast in one quarter of an hour as in the next, so that a calibration holds for
its own runs; and a host moves the processors of a virtual one, by the second or by the minute: calibrations and steps wait
until a reference kernel is as fast as it ever was, and are taken back where it was not so afterwards (`--patience`). Some
runs are measured twice, by processes of their own, in turn with the others: what they differ by is noise that no prediction
can meet.

Keys: `runs` (how many), `step_error_median`, `step_error_p90` (of |predicted / measured - 1|), `memory_error_max`,
`memory_under` (runs that used more than was predicted), `bytes_exact` (whether all predicted bytes are those moved),
`noise_median`, `noise_max` (a run against itself), `calibrate_s` (of each calibration), `disturbed_share` (of all looks at
the reference), `disturbed_times` (how much longer it took then, at most), `taken_back` (pairs of steps); `table` has each run
with its figures.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import idle_bytes
from results import SCRATCH, provenance, write
from scratch import scratch
from trained import open_engine, workload_of
from turns import Side
from workload import loss_fn

from weightstream.cluster import Cluster
from weightstream.machine.calibrate import calibrate
from weightstream.machine.profile import Profile, load_profile
from weightstream.machine.steady import Steadiness
from weightstream.prediction.predicting import predict

HERE = Path(__file__).resolve().parent
AT_ONCE = 6
AGAIN = 5  # every fifth run is measured twice

# (layers, width, tokens, micro-batches, RAM tier, activations, clipped, workers)
GRID: tuple[tuple[int, int, int, int, bool, str, bool, int], ...] = (
    (2, 256, 256, 1, False, "recompute", True, 1), (2, 512, 1024, 2, True, "keep", False, 1),
    (2, 768, 512, 4, False, "keep", True, 1), (2, 768, 2048, 4, True, "recompute", True, 1),
    (3, 512, 256, 2, False, "recompute", False, 1), (3, 768, 1024, 4, False, "recompute", False, 1),
    (4, 256, 512, 4, True, "recompute", True, 1), (4, 256, 2048, 8, False, "recompute", True, 1),
    (4, 384, 1024, 4, True, "keep", True, 1), (4, 512, 512, 1, False, "keep", False, 1),
    (4, 512, 2048, 4, False, "recompute", True, 1), (4, 768, 256, 1, True, "recompute", True, 1),
    (5, 640, 1024, 2, False, "recompute", True, 1), (6, 256, 1024, 2, False, "keep", True, 1),
    (6, 384, 512, 4, False, "recompute", False, 1), (6, 512, 256, 1, True, "recompute", False, 1),
    (6, 768, 512, 2, False, "recompute", True, 1), (8, 256, 256, 1, True, "keep", True, 1),
    (8, 384, 2048, 8, True, "recompute", True, 1), (8, 512, 1024, 4, False, "recompute", True, 1),
    (4, 256, 1024, 4, False, "recompute", True, 2), (4, 512, 1024, 4, True, "recompute", True, 2),
    (6, 512, 2048, 8, False, "keep", False, 2), (2, 768, 1024, 2, False, "recompute", True, 2),
    (3, 384, 1024, 4, False, "recompute", True, 3), (4, 512, 2048, 8, False, "recompute", True, 4),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="instead of calibrating first")
    parser.add_argument("--once", action="store_true", help="calibrate before the first runs only")
    parser.add_argument("--runs", type=int, default=len(GRID), help="so many of the grid, spread over it")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4], help="only runs of so many")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each run")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of each run that do not count")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="seconds to wait for the machine, in each calibration and in its runs",
    )
    parser.add_argument("--device-memory", default="768MiB", help="of each rank")
    parser.add_argument("--host-memory", default="1GiB", help="of each rank")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the machine, for all ranks")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with scratch(arguments.scratch, "prediction") as folder:
        given = load_profile(arguments.profile, say) if arguments.profile else None
        steadiness = Steadiness()
        found = held_against(chosen(arguments), given, arguments, folder, steadiness)
    result = {"benchmark": "prediction"} | provenance(arguments.steps) | figures(found.table)
    result |= {
        "calibrate_s": found.calibrate_s, "disturbed_share": steadiness.share, "disturbed_times": steadiness.times,
        "taken_back": found.taken_back, "table": found.table,
    }  # fmt: skip
    write("prediction", result, as_json=arguments.json, record=not arguments.no_record)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def told(what: str, part: float) -> None:
    say(f"calibrate {part:4.0%}  {what}")


def chosen(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of the grid that are asked for."""
    keys = ("layers", "width", "tokens", "micro_batches", "ram_tier", "activations", "clip", "workers")
    every = [dict(zip(keys, row, strict=True)) for row in GRID if row[-1] in arguments.workers]
    count = min(arguments.runs, len(every))
    memory = {"device_memory": arguments.device_memory, "host_memory": arguments.host_memory}
    spread = [every[index * len(every) // count] for index in range(count)]
    return [run | memory | {"threads": max(1, arguments.threads // run["workers"])} for run in spread]


def predicted_of(run: dict[str, Any], profile: Profile, store: Path, idle: int) -> dict[str, Any]:
    """What is predicted of a run: one micro-batch is tried for its memory, in a process that has no other ranks."""
    cluster = Cluster(run["workers"])
    workload = workload_of(run)
    micro_batch = workload.batches(0)[0]
    with open_engine(run, store) as engine:
        engine.rehearse(micro_batch, loss_fn, micro_batches=cluster.largest_share(workload.micro_batches, 4))
        found = predict(
            engine, micro_batch, profile, micro_batches=workload.micro_batches, loss_fn=loss_fn, cluster=cluster,
            threads=run["threads"],
        )  # fmt: skip
    shutil.rmtree(store)
    return {
        "predicted_s": found.seconds_per_step, "binds": found.binds,
        "predicted_read": found.read_bytes, "predicted_written": found.written_bytes,
        "predicted_memory_bytes": found.all_memory_bytes + cluster.size * idle,
        "predicted_seconds": found.seconds_by_kind(),
    }  # fmt: skip


@dataclass
class Held:
    """The table: every run as it was predicted and as it was; the seconds of each calibration, and what was taken back."""

    table: list[dict[str, Any]]
    calibrate_s: list[float]
    taken_back: int = 0


def held_against(
    wanted: Sequence[dict[str, Any]],
    given: Profile | None,
    arguments: argparse.Namespace,
    folder: Path,
    steadiness: Steadiness,
) -> Held:
    """Some runs at a time: the machine is calibrated, they are predicted, and then measured, their steps in turn."""
    idle = idle_bytes()
    held = Held([], [])
    again: dict[int, float] = {}
    profile = given
    for first in range(0, len(wanted), AT_ONCE):
        if profile is None or not (given or arguments.once):
            profile = calibrated(folder, held, steadiness, arguments.patience)
        batch = list(enumerate(wanted))[first : first + AT_ONCE]
        predicted = {number: predicted_of(run, profile, folder / "plan", idle) for number, run in batch}
        repeated = [(number, run, True) for number, run in batch if number % AGAIN == 0]
        steadiness.patience_s = arguments.patience
        for number, repeats, side, closed in measure(
            [(n, run, False) for n, run in batch] + repeated, arguments, folder, held, steadiness
        ):
            taken = median(side.last_steps)
            if repeats:
                again[number] = taken
                continue
            held.table.append(row_of(wanted[number] | predicted[number], side, closed))
            row = held.table[-1]
            say(f"run {number}: predicted {row['predicted_s']:.3f} s, measured {taken:.3f} s ({row['error']:+.1%})")
    for number, taken in again.items():
        row = held.table[number]
        row["again_s"] = taken
        row["noise"] = abs(taken / row["measured_s"] - 1)
    return held


def calibrated(folder: Path, held: Held, steadiness: Steadiness, patience_s: float) -> Profile:
    """A profile of the machine as it is now."""
    started = time.perf_counter()
    steadiness.patience_s = patience_s
    profile = calibrate(folder, step=told, steadiness=steadiness)
    held.calibrate_s.append(time.perf_counter() - started)
    return profile


def row_of(predicted: dict[str, Any], side: Side, closed: dict[str, Any]) -> dict[str, Any]:
    """One run beside its prediction."""
    taken, facts = median(side.last_steps), side.facts[-1]
    read, written = closed.pop("whole_step")
    return predicted | {
        "measured_s": taken, "measured_s_spread": [min(side.last_steps), max(side.last_steps)],
        "error": predicted["predicted_s"] / taken - 1, "measured_read": read,
        "measured_written": written, "measured_memory_bytes": side.peak.nbytes,
        "memory_error": predicted["predicted_memory_bytes"] / side.peak.nbytes - 1,
        "measured_seconds": facts["seconds"], "stalled_s": facts["stalled_s"], **closed,
    }  # fmt: skip


def measure(
    batch: Sequence[tuple[int, dict[str, Any], bool]],
    arguments: argparse.Namespace,
    folder: Path,
    held: Held,
    steadiness: Steadiness,
) -> list[tuple[int, bool, Side, dict[str, Any]]]:
    """These runs, one step of each in turn."""
    sides: list[tuple[int, bool, Side]] = []
    try:
        for number, run, repeated in batch:
            name = f"run-{number}{'-again' if repeated else ''}"
            command = [sys.executable, HERE / "trained.py", json.dumps(run), "--store", folder / name]
            side = Side(name, command, log=folder / f"{name}.log")
            sides.append((number, repeated, side))
            side.turn(arguments.warm_up, counted=False)
        for _ in range(arguments.steps):
            for _, _, side in sides:
                held.taken_back += counted_turn(side, steadiness)
        found = [(number, repeated, side, side.close()) for number, repeated, side in sides]
    finally:
        for *_, side in sides:
            side.abandon()
            shutil.rmtree(folder / side.name, ignore_errors=True)
    return found


def counted_turn(side: Side, steadiness: Steadiness) -> int:
    """Two steps, of which the second counts: caches were the others' at first, and what is predicted is a step among its like.

    Returns:
        How many such pairs were taken back, since the machine was not at its best from beginning to end.
    """
    taken_back = 0
    while True:
        steady = steadiness.wait()
        started = time.perf_counter()
        side.turn(2, counted=True)
        if not steady or steadiness.patience_s <= 0 or steadiness.look():
            return taken_back
        steadiness.patience_s -= time.perf_counter() - started
        side.take_back()
        taken_back += 1


def figures(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the table comes to."""
    errors = sorted(abs(row["error"]) for row in table)
    memory = [row["memory_error"] for row in table]
    noise = [row["noise"] for row in table if "noise" in row]
    inexact = [
        number for number, row in enumerate(table)
        if (row["predicted_read"], row["predicted_written"]) != (row["measured_read"], row["measured_written"])
    ]  # fmt: skip
    return {
        "runs": len(table), "step_error_median": median(errors),
        "step_error_p90": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "memory_error_max": max(map(abs, memory)), "memory_under": sum(error < 0 for error in memory),
        "bytes_exact": not inexact, "bytes_inexact_runs": inexact,
        "noise_median": median(noise) if noise else None, "noise_max": max(noise) if noise else None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
