"""Starts one process a rank, as torchrun would, each where it is told to, and collects what they write."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what its command is preceded by, and what else is in its environment."""

    before: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def run_ranks(
    wanted: dict[str, Any], folder: Path, places: Sequence[Place], *, master: str = "127.0.0.1", timeout_s: float = 900
) -> list[dict[str, Any]]:
    """What each rank of `emulated_rank.py` found.

    Raises:
        SystemExit: a rank failed, or the time is over; with the end of its log.
    """
    folder.mkdir(parents=True)
    (folder / "wanted.json").write_text(json.dumps(wanted))
    port = str(_free_port())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, place in enumerate(places):
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(len(places)), "MASTER_ADDR": master, "MASTER_PORT": port,
                "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", **place.environment,
            }  # fmt: skip
            command = [*place.before, sys.executable, str(BENCHMARKS / "emulated_rank.py"), str(folder / "wanted.json")]
            with (folder / f"rank-{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log))
        _wait(processes, folder, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(places))]


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, until: float) -> None:
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll():
                time.sleep(1)  # the others say what they saw of it
                tail = (folder / f"rank-{rank}.log").read_text()[-2000:]
                raise SystemExit(f"rank {rank} ended with code {process.returncode}:\n{tail}")
        if time.monotonic() > until:
            raise SystemExit(f"the ranks of {folder} did not end in time; see their logs")
        time.sleep(0.05)
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {folder} failed; see its log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
