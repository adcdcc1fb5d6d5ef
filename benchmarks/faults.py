"""Faults of every kind in runs of several ranks: no hang, no committed step lost, the digest of an undisturbed run.

    python benchmarks/faults.py --faults 60 --json

A small Llama trains on the standard library's text with 4 workers and 2 memory ranks apart, by the command
`weightstream fit … cluster.workers=4` itself. At a random moment of a random step one thing happens, kinds in turn:

- `worker killed`, `memory killed`: SIGKILL of one rank; the launcher starts all anew
- `worker hangs`, `memory hangs`: SIGSTOP of one rank; the others time out
- `link drops`: every connection of one rank is shut down under it
- `launcher killed`: SIGKILL of the launcher; its ranks end by themselves, and the command is given again, with another
  number of workers and memory ranks (`CLUSTERS`)

Then the run goes on until it has made some steps more, and the next fault comes. Keys: `faults`, `by_kind`, `hangs` (no
step within `--patience` seconds of a fault; the run is then killed and counted), `lost_committed_steps`, `digest_equal`,
`resume_s_median` (from the fault to the end of the next step; `resume_s` by kind), `timeout_s` (after which a silent rank
counts as lost, part of the time to resume of a hang), `orphans` (ranks that outlived their launcher by 10 s).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from results import SCRATCH, provenance, write
from scratch import scratch

KINDS = ("worker killed", "memory killed", "worker hangs", "memory hangs", "link drops", "launcher killed")
CLUSTERS = ((4, 2), (3, 1), (4, "colocated"), (2, 3))
COMMAND = Path(sysconfig.get_path("scripts")) / "weightstream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--timeout", type=float, default=8.0, help="seconds after which a silent rank counts as lost")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds without a step after which a run hangs")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk for the stores")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    with scratch(arguments.scratch, "faults") as folder:
        result = {"benchmark": "faults"} | experiment(arguments, folder)
    write("faults", result | provenance(arguments.faults), as_json=arguments.json, record=not arguments.no_record)
    if result["hangs"] or result["lost_committed_steps"] or not result["digest_equal"] or result["orphans"]:
        raise SystemExit("the promise is broken")


def experiment(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    draw = random.Random(arguments.seed)
    run = Run(arguments, folder / "disturbed")
    run.start()
    resume: dict[str, list[float]] = defaultdict(list)
    hangs = lost = orphans = 0
    for number in range(arguments.faults):
        kind = KINDS[number % len(KINDS)]
        run.wait_for_step(run.last_step() + 1)
        time.sleep(draw.random() * 0.5)
        committed = run.committed_step()
        began_s = time.monotonic()
        orphans += run.disturb(kind, draw)
        after = run.last_line()
        went_on = run.wait_for_line(after)
        if not went_on:
            hangs += 1
            run.kill_all()
            run.start()
            run.wait_for_line(after)
        else:
            resume[kind].append(time.monotonic() - began_s)
        lost += run.first_step_after(after) <= committed  # a step that was committed is made again
        print(f"{number + 1}/{arguments.faults} {kind}: {time.monotonic() - began_s:.1f} s", file=sys.stderr)
    steps = run.finish()
    whole = Run(arguments, folder / "whole")
    whole.alone(steps)
    digests = [one.digest() for one in (whole, run)]
    every = [seconds for kind in resume.values() for seconds in kind]
    return {
        "faults": arguments.faults, "by_kind": dict(Counter(KINDS[n % len(KINDS)] for n in range(arguments.faults))),
        "hangs": hangs, "lost_committed_steps": lost, "orphans": orphans, "digest_equal": digests[0] == digests[1],
        "digest": digests[1], "digest_undisturbed": digests[0], "steps": steps, "timeout_s": arguments.timeout,
        "resume_s_median": median(every), "resume_s_most": max(every),
        "resume_s": {kind: median(seconds) for kind, seconds in sorted(resume.items())},
        "clusters": [list(cluster) for cluster in CLUSTERS], "layers": arguments.layers, "width": arguments.width,
    }  # fmt: skip


class Run:
    """One run's folder, and the command that trains it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        folder.mkdir(parents=True)
        self.cluster = 0
        self.config = folder / "run.yaml"
        self.process: subprocess.Popen[bytes] | None = None
        self._write_config(100_000)

    def _write_config(self, steps: int) -> None:
        width = self.arguments.width
        values = {
            "model": {
                "model_type": "llama", "hidden_size": width, "intermediate_size": 2 * width,
                "num_hidden_layers": self.arguments.layers, "num_attention_heads": 2,
            },
            "data": {"tokenizer": {"size": 512}},
            "optimizer": {"lr": 1e-3, "schedule": "constant"},  # whatever the number of steps
            "training": {
                "steps": steps, "sequence_length": 64, "micro_batch_size": 1, "micro_batches": 8, "clip_norm": 1.0,
                "validation": {"every": 0, "sequences": 8},
            },
            "engine": {"device_memory": "64MiB", "host_memory": "128MiB", "threads_per_worker": 1, "panel_elements": 8192},
            "out": str(self.folder),
        }  # fmt: skip
        self.config.write_text(json.dumps(values))

    def start(self) -> None:
        """The command, with the ranks whose turn it is."""
        workers, memory = CLUSTERS[self.cluster % len(CLUSTERS)]
        settings = [
            f"cluster.workers={workers}",
            f"cluster.memory={memory}",
            f"cluster.timeout_s={self.arguments.timeout}",
        ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([COMMAND, "fit", self.config, *settings], stdout=log, stderr=log)

    def alone(self, steps: int) -> None:
        """The whole of it on one rank, undisturbed."""
        self._write_config(steps)
        subprocess.run([COMMAND, "fit", self.config], check=True, capture_output=True)

    def disturb(self, kind: str, draw: random.Random) -> int:
        """One fault; gives how many ranks outlived their launcher."""
        assert self.process is not None
        ranks = self.ranks()
        _, memory = CLUSTERS[self.cluster % len(CLUSTERS)]
        apart = memory if isinstance(memory, int) else 0
        if kind == "launcher killed":
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            _, alive = psutil.wait_procs(list(ranks.values()), timeout=10)
            for process in alive:
                process.kill()
            self.cluster += 1
            self.start()
            return len(alive)
        owners = [rank for rank in ranks if rank < apart] or list(ranks)
        workers = [rank for rank in ranks if rank >= apart]
        target = ranks[draw.choice(owners if kind.startswith("memory") else workers)]
        if kind.endswith("killed"):
            target.kill()
        elif kind.endswith("hangs"):
            target.suspend()
        else:
            shut_connections(target)
        return 0

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of all ranks; waits until they are there."""
        assert self.process is not None
        until = time.monotonic() + self.arguments.patience
        while time.monotonic() < until:
            found = {}
            for process in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    rank = process.environ().get("RANK")
                except psutil.Error:
                    continue
                if rank is not None:
                    found[int(rank)] = process
            workers, memory = CLUSTERS[self.cluster % len(CLUSTERS)]
            if len(found) == workers + (memory if isinstance(memory, int) else 0):
                return dict(sorted(found.items()))
            time.sleep(0.1)
        raise SystemExit(f"no ranks within {self.arguments.patience:g} s; see {self.folder / 'log'}")

    # what the run has said of its steps

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except OSError:
            return []
        return [line for line in map(json.loads, text.splitlines()) if line.get("kind") == "train"]

    def last_line(self) -> float:
        """When the last step ended, by the run's own clock."""
        return max((line["time"] for line in self._lines()), default=0.0)

    def last_step(self) -> int:
        return max((line["step"] for line in self._lines()), default=0)

    def first_step_after(self, moment: float) -> int:
        return min((line["step"] for line in self._lines() if line["time"] > moment), default=0)

    def wait_for_line(self, after: float) -> bool:
        """Whether a step ends after that moment, within patience."""
        until = time.monotonic() + self.arguments.patience
        while time.monotonic() < until:
            if self.last_line() > after:
                return True
            time.sleep(0.05)
        return False

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + self.arguments.patience
        while self.last_step() < step:
            if time.monotonic() > until:
                raise SystemExit(f"no step {step} within {self.arguments.patience:g} s; see {self.folder / 'log'}")
            time.sleep(0.05)

    def committed_step(self) -> int:
        found = subprocess.run([COMMAND, "store", "info", self.folder, "--json"], capture_output=True, check=True)
        return int(json.loads(found.stdout)["step"])

    def digest(self) -> str:
        found = subprocess.run([COMMAND, "store", "digest", self.folder, "--json"], capture_output=True, check=True)
        return str(json.loads(found.stdout)["digest"])

    def finish(self) -> int:
        """Stops as Ctrl-C does; the step at which it stands."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=self.arguments.patience)
        return self.committed_step()

    def kill_all(self) -> None:
        assert self.process is not None
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            process.kill()
        self.process.wait()


def shut_connections(process: psutil.Process) -> None:
    """Ends every TCP connection of a process under its hands, as a link that drops does for good."""
    if shutil.which("gdb") is None:
        raise SystemExit("dropping a link needs gdb (apt-get install gdb), to shut another process's sockets")
    handles = [connection.fd for connection in process.net_connections("tcp") if connection.raddr]
    calls = [argument for handle in handles for argument in ("-ex", f"call (int)shutdown({handle}, 2)")]
    subprocess.run(
        ["gdb", "-p", str(process.pid), "-batch", "-nx", *calls], capture_output=True, check=False,
        env={**os.environ, "DEBUGINFOD_URLS": ""},
    )  # fmt: skip


if __name__ == "__main__":
    main()
