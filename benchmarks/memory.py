"""Memory: that it grows neither with depth nor with the number of micro-batches; and a hundred times the device budget.

    python benchmarks/memory.py --json
    python benchmarks/memory.py --hundredfold --json

The first: peak resident memory of the training process above an idle one with the same imports, with the same budgets;
keys `rss_12_bytes`, `rss_24_bytes`, `rss_48_bytes` (layers), `rss_mb_1_bytes`, `rss_mb_16_bytes` (micro-batches of the
same size), `budget_bytes` = device memory + host memory.

The second: training state (masters and moments, fp32) at least 100 times `device_bytes`, on disk, under a hard limit of
the operating system at most a fifth of the state (`limits.py`), in which the resident control dies; keys `state_bytes`,
`device_bytes`, `limit_bytes`, `peak_rss_bytes`, `disk_bytes` (peak), `steps`, `losses`, `resident_died`.
"""

import argparse
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from limits import memory_limit
from results import SCRATCH, provenance, write
from rss import high_water_bytes
from scratch import scratch
from turns import Side, SideEndedError
from workload import Workload

from weightstream.units import parse_bytes

HERE = Path(__file__).resolve().parent
STATE_BYTES = 12  # per parameter: fp32 master and AdamW's two moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hundredfold", action="store_true")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="of --hundredfold; default: as many as it takes")
    parser.add_argument("--device-memory", help="default: 320MiB, or 128MiB with --hundredfold")
    parser.add_argument("--host-memory", help="default: 1GiB, or 768MiB with --hundredfold")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=512, help="not of --hundredfold, which has 256")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk for the stores")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    defaults = ("128MiB", "768MiB") if arguments.hundredfold else ("320MiB", "1GiB")
    arguments.device_memory = arguments.device_memory or defaults[0]
    arguments.host_memory = arguments.host_memory or defaults[1]
    measure, name = (hundredfold, "hundredfold") if arguments.hundredfold else (growth, "memory")
    with scratch(arguments.scratch, name) as folder:
        result = measure(arguments, folder) | provenance(1)
    write(name, result, as_json=arguments.json, record=not arguments.no_record)


def streamed_command(workload: Workload, store: Path, arguments: argparse.Namespace) -> list[str | Path]:
    memory = ["--device-memory", arguments.device_memory, "--host-memory", arguments.host_memory]
    return [sys.executable, HERE / "streamed.py", "--serve", *workload.arguments(), "--store", store, *memory]


def growth(arguments: argparse.Namespace, folder: Path) -> dict:
    """Peak memory over depths and over numbers of micro-batches."""
    idle = idle_bytes()
    result: dict = {"benchmark": "memory", "width": arguments.width, "idle_bytes": idle, "steps": arguments.steps}
    result["budget_bytes"] = parse_bytes(arguments.device_memory) + parse_bytes(arguments.host_memory)
    result |= {"device_memory": arguments.device_memory, "host_memory": arguments.host_memory}
    cases = {"rss_12_bytes": (12, 4), "rss_24_bytes": (24, 4), "rss_48_bytes": (48, 4)}
    cases |= {"rss_mb_1_bytes": (12, 1), "rss_mb_16_bytes": (12, 16)}
    for key, (layers, micro_batches) in cases.items():
        tokens = arguments.tokens_per_micro_batch * micro_batches
        workload = Workload(layers=layers, width=arguments.width, tokens=tokens, micro_batches=micro_batches)
        side = Side(key, streamed_command(workload, folder / "store", arguments), log=folder / f"{key}.log")
        try:
            # Deferred updates and recycled files come in the second and third step: their buffers must be counted.
            side.turn(max(arguments.steps, 3), counted=True)
            side.close()
        finally:
            side.abandon()
            shutil.rmtree(folder / "store", ignore_errors=True)
        result[key] = side.peak.nbytes - idle
        print(f"{key}: {result[key] / 2**20:.0f} MiB above idle", file=sys.stderr)
    result["depth_ratio"] = result["rss_48_bytes"] / result["rss_12_bytes"]
    result["micro_batch_ratio"] = result["rss_mb_16_bytes"] / result["rss_mb_1_bytes"]
    result["budget_ratio"] = max(result[key] for key in cases) / result["budget_bytes"]
    return result


def idle_bytes() -> int:
    """Peak resident memory of a process that has imported what the streamed side imports, and done nothing."""
    program = "import streamed, weightstream.engine.engine; print('imported', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    nbytes = high_water_bytes(process.pid)
    process.communicate("\n")
    return nbytes


def hundredfold(arguments: argparse.Namespace, folder: Path) -> dict:
    """One run whose state is 100 times the device budget, and the control's death, under the same limit."""
    device_bytes = parse_bytes(arguments.device_memory)
    layers = arguments.layers or 1
    workload = Workload(layers=layers, width=arguments.width, tokens=512, micro_batches=2)
    while arguments.layers is None and workload.parameter_count() * STATE_BYTES < 100 * device_bytes:
        layers += 1
        workload = Workload(layers=layers, width=arguments.width, tokens=512, micro_batches=2)
    state_bytes = workload.parameter_count() * STATE_BYTES
    limit_bytes = state_bytes // 5 // 4096 * 4096
    control = [sys.executable, HERE / "resident.py", "--serve", *workload.arguments(), "--activations", "recompute"]
    died, cause = dies("resident", control, limit_bytes, folder / "resident.log")
    limit = memory_limit(limit_bytes)
    disk = DiskPeak(folder / "store")
    side = None
    try:
        side = Side(
            "streamed", streamed_command(workload, folder / "store", arguments), log=folder / "streamed.log",
            enter=limit.enter,
        )  # fmt: skip
        side.turn(arguments.steps, counted=True)
        side.close()
    finally:
        if side is not None:
            side.abandon()
        charged = limit.peak_bytes()
        limit.remove()
        disk_bytes = disk.stop()
        shutil.rmtree(folder / "store", ignore_errors=True)
    return {
        "benchmark": "hundredfold", "layers": workload.layers, "width": workload.width, "tokens": workload.tokens,
        "micro_batches": workload.micro_batches, "parameters": workload.parameter_count(),
        "state_bytes": state_bytes, "device_bytes": device_bytes, "state_over_device": state_bytes / device_bytes,
        "host_memory": arguments.host_memory, "limit_bytes": limit_bytes, "limit_kind": limit.kind,
        "peak_rss_bytes": side.peak.nbytes, "peak_charged_bytes": charged, "disk_bytes": disk_bytes,
        "steps": arguments.steps, "seconds_per_step": side.turns[0], "losses": [fact["loss"] for fact in side.facts],
        "resident_died": died, "resident_cause": cause,
    }  # fmt: skip


def dies(name: str, command: list[str | Path], limit_bytes: int, log: Path) -> tuple[bool, str]:
    """Whether a side dies for want of memory under the limit, and how; steps once if it does not."""
    limit = memory_limit(limit_bytes)
    side = None
    try:
        side = Side(name, command, log=log, enter=limit.enter)
        side.turn(1, counted=False)
        side.close()
    except SideEndedError as end:
        by_kernel = limit.killed()
        refused = "MemoryError" in str(end) or "allocate memory" in str(end)
        how = "an allocation failed" if refused else f"ended with code {end.code}"
        return by_kernel or refused, "killed by the kernel" if by_kernel else how
    else:
        return False, "lived"
    finally:
        if side is not None:
            side.abandon()
        limit.remove()


class DiskPeak:
    """The most bytes that the files below a folder had allocated, sampled."""

    def __init__(self, folder: Path, interval_s: float = 0.5) -> None:
        self.folder, self.interval_s, self.nbytes = folder, interval_s, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disk-peak", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            total = 0
            for path in self.folder.rglob("*"):
                with suppress(OSError):
                    total += path.stat().st_blocks * 512
            self.nbytes = max(self.nbytes, total)

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.nbytes


if __name__ == "__main__":
    main()
