"""One training step, streamed from disk against resident in memory, in turn; beside it the disk's own time.

    python benchmarks/step.py --layers 12 --width 1024 --tokens 2048 --micro-batches 4 --json

Keys: `resident_s`, `streamed_s` (median seconds per step), `ratio` = resident / streamed, `bare_io_s` (the bytes of the
bound by bare direct I/O, `bare_io.py`, in the same run), `floor_ratio` = streamed / max(resident, bare I/O),
`bytes_read`, `bytes_written` (per step, as the engine counts them; `os_bytes_*` as the kernel does), `bytes_bound`
(`bound.py`), `stalled_s`, `peak_rss_bytes`, `resident_peak_rss_bytes`; `*_spread` are least and most over the turns.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
from bare_io import SETTINGS, BareIo, Setting
from bound import Bound, bytes_bound
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from turns import Side, in_turn
from workload import Workload

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser)
    parser.add_argument("--activations", choices=["keep", "recompute"], default="recompute", help="of both sides")
    parser.add_argument("--no-clip", action="store_true", help="of both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-memory", default="512MiB", help="of the streamed side")
    parser.add_argument("--host-memory", default="2GiB", help="of the streamed side")
    parser.add_argument("--staged-on-disk", action="store_true", help="host memory too small for staged gradients")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7, help="counted turns of each side")
    parser.add_argument("--steps-per-turn", type=int, help="default: 2, or 4 below 2,048 tokens")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each side that do not count")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    bound = bytes_bound(
        workload, precision="bf16", clipped=not arguments.no_clip, staged_on_disk=arguments.staged_on_disk
    )
    with scratch(arguments.scratch, f"step-{workload.tokens}") as folder:
        result = {"benchmark": "step"} | compare(workload, bound, arguments, folder)
    name = f"step-{workload.tokens}" + ("-keep" if arguments.activations == "keep" else "")
    name += ("-no-clip" if arguments.no_clip else "") + ("" if arguments.device == "cpu" else f"-{arguments.device}")
    write(name, result | provenance(arguments.turns), as_json=arguments.json, record=not arguments.no_record)


def compare(workload: Workload, bound: Bound, arguments: argparse.Namespace, folder: Path) -> dict:
    """Both sides and the bare disk, in turn."""
    steps = arguments.steps_per_turn or (2 if workload.tokens >= 2048 else 4)
    common = [*workload.arguments(), "--serve", "--activations", arguments.activations]
    common += ["--threads", str(arguments.threads), "--device", arguments.device]
    common += ["--no-clip"] if arguments.no_clip else []
    memory = ["--device-memory", arguments.device_memory, "--host-memory", arguments.host_memory]
    disk = BareIo(folder, read_bytes=bound.read, write_bytes=bound.written)
    sides: list[Side] = []
    try:
        python = sys.executable
        resident = Side("resident", [python, HERE / "resident.py", *common], log=folder / "resident.log")
        sides.append(resident)
        streamed_command = [python, HERE / "streamed.py", *common, *memory, "--store", folder / "store"]
        streamed = Side("streamed", streamed_command, log=folder / "streamed.log")
        sides.append(streamed)
        tried = sorted(SETTINGS, key=disk.measure)[:3]
        bare: dict[Setting, list[float]] = {setting: [] for setting in tried}

        def bare_turn(_: int) -> None:
            for setting, seconds in bare.items():
                seconds.append(disk.measure(setting))

        in_turn([resident, streamed], turns=arguments.turns, steps=steps, warm_up=arguments.warm_up, between=bare_turn)
        flushed = streamed.close()
        resident.close()
    finally:
        for side in sides:
            side.abandon()
        disk.close()
    setting = min(bare, key=lambda one: median(bare[one]))
    resident_s, streamed_s, bare_s = median(resident.turns), median(streamed.turns), median(bare[setting])
    ratios = [one / other for one, other in zip(resident.turns, streamed.turns, strict=True)]
    read, written = (median(fact[key] for fact in streamed.facts) for key in ("read", "written"))
    return {
        "layers": workload.layers, "width": workload.width, "tokens": workload.tokens,
        "micro_batches": workload.micro_batches, "parameters": workload.parameter_count(),
        "activations": arguments.activations, "clipped": not arguments.no_clip, "threads": arguments.threads,
        "device_memory": arguments.device_memory, "host_memory": arguments.host_memory,
        **summary("resident_s", resident.turns), **summary("streamed_s", streamed.turns),
        "ratio": resident_s / streamed_s, "ratio_spread": [min(ratios), max(ratios)],
        **summary("bare_io_s", bare[setting]), "bare_io_setting": disk.describe(setting),
        "floor_ratio": streamed_s / max(resident_s, bare_s),
        "bytes_read": read, "bytes_written": written, "bytes_bound": bound.total,
        "bytes_ratio": (read + written) / bound.total,
        "os_bytes_read": streamed.disk_read_bytes_per_step, "os_bytes_written": streamed.disk_written_bytes_per_step,
        **summary("stalled_s", [fact["stalled_s"] for fact in streamed.facts]),
        "peak_rss_bytes": streamed.peak.nbytes, "resident_peak_rss_bytes": resident.peak.nbytes,
        "store_bytes": flushed["disk_bytes"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
