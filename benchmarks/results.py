"""What every published figure carries: machine, command, commit, versions, number of runs, median and spread."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
TREE = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
SCRATCH = TREE / "runs" / "benchmarks"  # git ignores runs/; it must be on the disk that is measured


def summary(key: str, samples: Sequence[float]) -> dict[str, Any]:
    """`key` (the median) and `key_spread` (least and most) of the samples."""
    return {key: median(samples), f"{key}_spread": [min(samples), max(samples)]}


def provenance(runs: int) -> dict[str, Any]:
    """Where a figure comes from; `runs` is how many counted turns each side had."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], TREE), *_without_scratch(sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "machine": _machine(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }


def _without_scratch(arguments: Sequence[str]) -> list[str]:
    """Where a machine keeps its files is nobody else's concern."""
    kept, skipped = [], False
    for argument in arguments:
        if not skipped and argument != "--scratch" and not argument.startswith("--scratch="):
            kept.append(argument)
        skipped = argument == "--scratch"
    return kept


def write(name: str, result: dict[str, Any], *, as_json: bool, record: bool) -> None:
    """Print the result (JSON, or one key a line) and, where wanted, keep it as `results/<name>.json`."""
    text = json.dumps(result, indent=2)
    print(text if as_json else "\n".join(f"{key:<26} {_shown(value)}" for key, value in result.items()))
    if record:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")
        print(f"kept as {(RESULTS / name).relative_to(TREE)}.json", file=sys.stderr)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(one, float) for one in value):
        return " to ".join(f"{one:.4g}" for one in value)
    return str(value)


def _commit() -> str:
    """The commit, with `-dirty` where sources differ from it: a figure of changed code says so."""
    try:
        run = {"cwd": TREE, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "src", "benchmarks/*.py"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _machine() -> dict[str, Any]:
    lines = _lines("/proc/cpuinfo")
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "matrix_extensions": [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags],
        "memory_bytes": next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo")), 0),
        "kernel": platform.release(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
