"""Against DeepSpeed ZeRO-Infinity 0.19.8, parameters and optimizer state on the same disk; same model and tokens.

    apt-get update && apt-get install -y libaio-dev g++    # once, as root: DeepSpeed compiles its I/O against it
    python benchmarks/peers/deepspeed_nvme.py --setup      # once: its own environment, compiled operators (minutes)
    python benchmarks/peers/deepspeed_nvme.py --tokens 2048 --json

First DeepSpeed's settings are tried one at a time, each trial a new process (`CHOICES`: one micro-batch or four, keep
or recompute, its buffers, its I/O, the allocator), keeping what was fastest; then both sides run in turn. The streamed
side too is tried with recompute and auto. `--peer` gives DeepSpeed's settings and skips the trials. Its environment is
`benchmarks/peers/.venv`, which git ignores.

Keys: `streamed_s`, `peer_s`, `speedup` = peer / streamed, `peak_rss_bytes`, `peer_peak_rss_bytes`, `memory_ratio`.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from limits import DataLimit
from results import SCRATCH, provenance, summary, write
from scratch import scratch
from turns import Side, SideEndedError, in_turn
from workload import Workload

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
EXTENSIONS = ENVIRONMENT / "torch_extensions"
REQUIREMENTS = (
    "torch==2.13.0",
    "deepspeed==0.19.8",
    "transformers==5.23.0",
    "ninja",
    "py-cpuinfo",
    "setuptools",
    "wheel",
)
OPERATORS = """
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
AsyncIOBuilder().load()
CPUAdamBuilder().load()
"""
# Tried in this order; of each group the fastest is kept, and the next group starts from it. What never worked here, or was
# refused by DeepSpeed, is in LOG.md and not tried again: its own checkpointing with prefetch, pinned and pipelined buffers,
# all parameters live.
CHOICES: tuple[tuple[str, ...], ...] = (
    ("--micro-batches 4", "--micro-batches 1"),
    ("--activations keep", "--activations recompute"),
    ("", "--prefetch-elements 0"),
    ("", "--sub-group-elements 15000000", "--sub-group-elements 100000000"),
    ("", "--aio-threads 8 --aio-queue-depth 32", "--aio-threads 1"),
    ("--allocator glibc", "--allocator reuse"),
)
TRIAL_LIMIT_S = 180  # some settings never answer


def peer_environment() -> dict[str, str]:
    """The process environment of the peer: its own interpreter first, its compiled operators in its own folder."""
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "DS_ACCELERATOR": "cpu"}


def setup() -> None:
    """Make the peer's environment and compile its operators; a lock left by an interrupted compilation is removed."""
    if shutil.which("g++") is None or not Path("/usr/include/libaio.h").exists():
        raise SystemExit("DeepSpeed compiles its operators; first, as root: apt-get install -y libaio-dev g++")
    if not (ENVIRONMENT / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    for lock in EXTENSIONS.glob("*/lock"):
        lock.unlink()
    subprocess.run([ENVIRONMENT / "bin" / "python", "-c", OPERATORS], check=True, env=peer_environment())
    print("DeepSpeed's environment is ready", file=sys.stderr)


class Contest:
    """Starts sides for one workload; what DeepSpeed swaps and our store lie under `folder`."""

    def __init__(self, workload: Workload, arguments: argparse.Namespace, folder: Path) -> None:
        self.workload, self.arguments, self.folder = workload, arguments, folder
        self.trials: list[dict] = []

    def peer(self, settings: str) -> Side:
        swap = self.folder / "swap"
        shutil.rmtree(swap, ignore_errors=True)
        command = [ENVIRONMENT / "bin" / "python", HERE / "deepspeed_side.py", *self.workload.arguments()]
        command += ["--threads", str(self.arguments.threads), "--folder", swap, *shlex.split(settings)]
        # Some of its settings ask for more memory than there is: the trial then fails, and not the machine.
        limit = DataLimit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4)
        log = self.folder / "deepspeed.log"
        return Side(
            "deepspeed", command, log=log, environment=peer_environment(), enter=limit.enter, time_limit_s=TRIAL_LIMIT_S
        )

    def streamed(self, settings: str) -> Side:
        arguments = self.arguments
        command = [sys.executable, HERE.parent / "streamed.py", "--serve", *self.workload.arguments()]
        command += ["--threads", str(arguments.threads), "--store", self.folder / "store", *shlex.split(settings)]
        command += ["--device-memory", arguments.device_memory, "--host-memory", arguments.host_memory, "--replace"]
        return Side("streamed", command, log=self.folder / "streamed.log")

    def trial(self, start, settings: str, *, warm_up: int) -> float:
        """Seconds per step of one setting alone: the least of three steps; infinite where it fails."""
        try:
            side = start(settings)
        except SideEndedError as failure:
            self._note(start.__name__, settings, str(failure).splitlines()[-1])
            return float("inf")
        try:
            side.turn(warm_up, counted=False)
            seconds = min(side.turn(1, counted=True) for _ in range(3))
            side.close()
        except SideEndedError as failure:
            self._note(start.__name__, settings, str(failure).splitlines()[-1])
            return float("inf")
        finally:
            side.abandon()
        self._note(start.__name__, settings, seconds)
        return seconds

    def fastest(self, start, choices: Sequence[Sequence[str]], *, warm_up: int) -> str:
        """The fastest settings found by changing one group at a time."""
        settings, best = "", float("inf")
        for group in choices:
            options = {f"{settings} {option}".strip(): None for option in group}
            tried = {
                # Unchanged settings were tried in the group before.
                option: best
                if option == settings and best < float("inf")
                else self.trial(start, option, warm_up=warm_up)
                for option in options
            }
            settings = min(tried, key=lambda option: tried[option])
            best = tried[settings]
        if best == float("inf"):
            raise SystemExit(f"no setting of {start.__name__} works; see {self.folder}")
        return settings

    def _note(self, side: str, settings: str, outcome: float | str) -> None:
        self.trials.append({"side": side, "settings": settings, "outcome": outcome})
        print(f"trial  {side:<9} {settings:<60} {outcome}", file=sys.stderr)

    def run(self) -> dict:
        arguments = self.arguments
        peer_settings = arguments.peer or self.fastest(self.peer, CHOICES, warm_up=2)
        policies = [("--activations recompute", "--activations auto")]
        streamed_settings = arguments.streamed or self.fastest(self.streamed, policies, warm_up=4)
        sides: list[Side] = []
        try:
            sides.append(self.peer(peer_settings))
            sides.append(self.streamed(streamed_settings))
            peer, streamed = sides
            in_turn(sides, turns=arguments.turns, steps=arguments.steps_per_turn, warm_up=arguments.warm_up)
            for side in sides:
                side.close()
        finally:
            for side in sides:
                side.abandon()
            shutil.rmtree(self.folder / "swap", ignore_errors=True)
            shutil.rmtree(self.folder / "store", ignore_errors=True)
        speedups = [one / other for one, other in zip(peer.turns, streamed.turns, strict=True)]
        peaks = streamed.peak.nbytes, peer.peak.nbytes
        return {
            "layers": self.workload.layers, "width": self.workload.width, "tokens": self.workload.tokens,
            "parameters": self.workload.parameter_count(), "threads": arguments.threads,
            **summary("streamed_s", streamed.turns), **summary("peer_s", peer.turns),
            "speedup": median(peer.turns) / median(streamed.turns), "speedup_spread": [min(speedups), max(speedups)],
            "peak_rss_bytes": peaks[0], "peer_peak_rss_bytes": peaks[1], "memory_ratio": peaks[0] / peaks[1],
            "losses": {"streamed": streamed.facts[-1]["loss"], "peer": peer.facts[-1]["loss"]},
            "peer_settings": peer_settings, "streamed_settings": streamed_settings, "trials": self.trials,
            "device_memory": arguments.device_memory, "host_memory": arguments.host_memory,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser)
    parser.add_argument("--setup", action="store_true", help="make DeepSpeed's environment and stop")
    parser.add_argument("--peer", help="DeepSpeed's settings, as arguments of deepspeed_side.py; no trials of it")
    parser.add_argument("--streamed", help="the streamed side's settings, as arguments of streamed.py; no trials of it")
    parser.add_argument("--device-memory", default="512MiB", help="of the streamed side")
    parser.add_argument("--host-memory", default="2GiB", help="of the streamed side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps-per-turn", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    if arguments.setup:
        setup()
        return
    if not EXTENSIONS.exists():
        raise SystemExit("DeepSpeed is not set up; run: python benchmarks/peers/deepspeed_nvme.py --setup")
    workload = Workload.of(arguments)
    result = {"benchmark": "deepspeed_nvme", "peer": REQUIREMENTS[1]}
    with scratch(arguments.scratch, f"deepspeed-{workload.tokens}") as folder:
        result |= Contest(workload, arguments, folder).run()
    result |= provenance(arguments.turns)
    write(f"deepspeed-{workload.tokens}", result, as_json=arguments.json, record=not arguments.no_record)


if __name__ == "__main__":
    main()
