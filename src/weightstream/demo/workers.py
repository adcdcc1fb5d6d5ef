"""`weightstream demo workers`: four workers, one of them killed in mid-step, and the digest of one that worked alone.

Both runs are ordinary `weightstream fit` commands with the same configuration but for `cluster.workers`.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightstream.config.config import RunConfig
from weightstream.config.presets import push_button
from weightstream.errors import WeightstreamError
from weightstream.system.processes import children
from weightstream.training.metrics import read_metrics
from weightstream.units import format_bytes, format_seconds

Say = Callable[[str], None]
WORKERS, STEPS, KILL_AFTER_STEP, KILLED = 4, 8, 4, 2
_PATIENCE_S = 300.0


def run(say: Say) -> dict[str, Any]:
    """Both runs, one after the other, in a temporary folder.

    Raises:
        WeightstreamError: a run failed; its own words are in the message.
    """
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="weightstream-demo-") as folder:
        alone, together = (_config(Path(folder) / name) for name in ("alone", "together"))
        say("1/2  one worker, which nobody interrupts")
        _end(_start(alone, 1), alone)
        say(f"2/2  {WORKERS} workers; rank {KILLED} is killed with SIGKILL in the middle of step {KILL_AFTER_STEP + 1}")
        process = _start(together, WORKERS)
        _kill_in_mid_step(process, together)
        _end(process, together)
        words = [line for line in _log(together) if "killed" in line]
        for line in words:
            say(f"     {line}")
        digests = [_digest(config) for config in (alone, together)]
        lines = _lines(together)
        sent = sum(line.get("down_bytes", 0) + line.get("up_bytes", 0) for line in lines)
    return {
        "equal": digests[0] == digests[1],
        "digest_one_worker": digests[0],
        "digest_workers_one_killed": digests[1],
        "workers": WORKERS,
        "steps": STEPS,
        "killed_in_step": KILL_AFTER_STEP + 1,
        "said": words,
        "sent_by_rank_0_bytes": sent,
        "seconds": time.monotonic() - began_s,
    }


def summary(report: dict[str, Any]) -> str:
    """What the demonstration showed."""
    return "\n".join(
        [
            "",
            f"digest, one worker               {report['digest_one_worker']}",
            f"digest, {report['workers']} workers, one killed    {report['digest_workers_one_killed']}",
            " " * 33 + ("equal, bit for bit" if report["equal"] else "NOT EQUAL"),
            "",
            f"{report['steps']} steps; rank 0 sent {format_bytes(report['sent_by_rank_0_bytes'])} to the others; all of it "
            f"{format_seconds(report['seconds'])}",
        ]
    )


def _config(out: Path) -> RunConfig:
    settings = ["engine.threads_per_worker=1", "training.sequence_length=64", "data.tokenizer.size=1024",
                "engine.panel_elements=32768", "engine.device_memory=64MiB", "engine.host_memory=256MiB",
                "training.tensorboard=false"]  # fmt: skip
    return push_button("llama-1m", workers=1, out=out, steps=STEPS, overrides=settings)


def _start(config: RunConfig, workers: int) -> "subprocess.Popen[bytes]":
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / "demo.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "weightstream", "fit", str(file), f"cluster.workers={workers}", "--json"]
    with (config.out / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def _end(process: "subprocess.Popen[bytes]", config: RunConfig) -> None:
    try:
        code = process.wait(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code:
        raise WeightstreamError("a run of the demo failed; its last words:\n  " + "\n  ".join(_log(config)[-8:]))


def _kill_in_mid_step(process: "subprocess.Popen[bytes]", config: RunConfig) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s and process.poll() is None:
        done = _lines(config)
        if done and done[-1]["step"] >= KILL_AFTER_STEP:
            time.sleep(done[-1]["seconds"] / 2)
            (agent,) = children(process.pid)
            ranks = sorted(children(agent.pid), key=lambda rank: rank.pid)  # started in order
            os.kill(ranks[KILLED].pid, signal.SIGKILL)
            return
        time.sleep(0.005)
    raise WeightstreamError(f"the workers never got to step {KILL_AFTER_STEP}; " + "\n  ".join(_log(config)[-8:]))


def _lines(config: RunConfig) -> list[dict[str, Any]]:
    metrics = config.out / "metrics.jsonl"
    return [line for line in read_metrics(metrics) if line["kind"] == "train"] if metrics.is_file() else []


def _log(config: RunConfig) -> list[str]:
    return (config.out / "log.txt").read_text(encoding="utf-8").splitlines()


def _digest(config: RunConfig) -> str:
    from weightstream.store.store import Store

    with Store.open(config.store, writable=False) as store:
        return store.digest()
