"""`weightstream demo`: what the project promises, shown in about a minute, offline, on this machine.

One small model is trained twice on the standard library's own text. One run is left alone; the other is killed with
SIGKILL in the middle of a step and started again. Both are ordinary `weightstream fit` processes with the same
configuration. In the end their stores must have the same digest.
"""

import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightstream.config.config import RunConfig, check_config
from weightstream.errors import WeightstreamError
from weightstream.training.metrics import read_metrics
from weightstream.units import format_bytes, format_count, format_seconds

Say = Callable[[str], None]
_KILL_AFTER_STEP = 6
_PATIENCE_S = 300.0
_SAME = "equal, bit for bit"


def run(say: Say) -> dict[str, Any]:
    """Both runs, one after the other, in a temporary folder.

    Raises:
        WeightstreamError: a run failed; its own words are in the message.
    """
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="weightstream-demo-") as folder:
        whole, killed = _config(Path(folder) / "whole"), _config(Path(folder) / "killed")
        say("1/3  a run that nobody interrupts")
        report = _fit(whole)
        say(f"2/3  the same again, killed with SIGKILL in the middle of step {_KILL_AFTER_STEP + 1}")
        kill_s = _kill_in_mid_step(killed)
        resumed_from = _store_step(killed)
        say(f"3/3  the same command once more: it goes on from step {resumed_from}, the last commit")
        _fit(killed)
        digests = [_digest(config) for config in (whole, killed)]
        differs = _first_difference(whole, killed)
    return {
        "equal": digests[0] == digests[1],
        "digest_uninterrupted": digests[0],
        "digest_killed_and_resumed": digests[1],
        "first_step_that_differs": differs,
        "killed_in_step": _KILL_AFTER_STEP + 1,
        "killed_after_s": kill_s,
        "resumed_from_step": resumed_from,
        "seconds": time.monotonic() - began_s,
        "run": report,
    }


def summary(report: dict[str, Any]) -> str:
    """What the demonstration showed."""
    run_report = report["run"]
    times = run_report["state_bytes"] / run_report["device_memory_bytes"]
    return "\n".join(
        [
            "",
            f"digest, uninterrupted        {report['digest_uninterrupted']}",
            f"digest, killed and resumed   {report['digest_killed_and_resumed']}",
            " " * 29 + (_SAME if report["equal"] else f"NOT EQUAL, from step {report['first_step_that_differs']} on"),
            "",
            f"model          {format_count(run_report['parameters'])} parameters, {run_report['steps']} steps, "
            f"perplexity {run_report['perplexity_before']:.0f} before, {run_report['perplexity_after']:.0f} after",
            f"state          {format_bytes(run_report['state_bytes'])} of masters and moments, on disk only",
            f"device memory  {format_bytes(run_report['device_memory_bytes'])}: slabs, gradients, activations "
            f"(the state is {times:.1f} times that)",
            f"process        {format_bytes(run_report['peak_rss_bytes'])} at most, Python and its libraries included",
            f"bytes moved    {format_bytes(run_report['read_bytes'] + run_report['written_bytes'])}, "
            f"{run_report['moved_over_bound']:.3f} times the lower bound of that many steady steps",
            f"checkpoints    {run_report['steps']}, one per step, none of them a copy",
            f"all of it      {format_seconds(report['seconds'])}",
        ]
    )


def _config(out: Path) -> RunConfig:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return check_config(
        {
            "model": {
                "model_type": "llama",
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 256,
            },
            "data": {
                "sources": [str(stdlib / name) for name in ("asyncio", "collections", "json", "email")],
                "tokenizer": {"size": 2048},
            },
            "optimizer": {"lr": 2e-3, "warmup": 3},
            "training": {
                "steps": 12,
                "micro_batches": 4,
                "micro_batch_size": 1,
                "sequence_length": 128,
                "validation": {"sequences": 16, "micro_batch_size": 4},
                "tensorboard": False,
            },
            "engine": {"reduction_groups": 1, "device_memory": "8MiB", "host_memory": "64MiB", "ram_tier": False},
            "out": str(out),
        },
        source="demo",
    )


def _start(config: RunConfig) -> "subprocess.Popen[str]":
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / "demo.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "weightstream", "fit", str(file), "--json"]
    with (config.out / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def _fit(config: RunConfig) -> dict[str, Any]:
    process = _start(config)
    try:
        out, _ = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise WeightstreamError(
            f"a run of the demo took more than {_PATIENCE_S:.0f} s; {_last_words(config)}"
        ) from None
    if process.returncode:
        raise WeightstreamError(f"a run of the demo ended with exit code {process.returncode}; {_last_words(config)}")
    return dict(json.loads(out))


def _kill_in_mid_step(config: RunConfig) -> float:
    """Kill a run halfway through the step after `_KILL_AFTER_STEP`; the seconds since the one before it had ended."""
    process = _start(config)
    metrics, deadline_s = config.out / "metrics.jsonl", time.monotonic() + _PATIENCE_S
    try:
        while time.monotonic() < deadline_s and process.poll() is None:
            done = [line for line in _lines(metrics) if line["kind"] == "train"]
            if done and done[-1]["step"] >= _KILL_AFTER_STEP:
                half_s = done[-1]["seconds"] / 2
                time.sleep(half_s)
                return half_s
            time.sleep(0.005)
        raise WeightstreamError(
            f"the run that was to be killed never got to step {_KILL_AFTER_STEP}; {_last_words(config)}"
        )
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return read_metrics(metrics) if metrics.is_file() else []


def _first_difference(one: RunConfig, two: RunConfig) -> int | None:
    """The first step whose loss or gradient norm differs, to say where to look if the digests do."""
    seen = [
        {
            line["step"]: (line["loss"], line.get("grad_norm"))
            for line in _lines(config.out / "metrics.jsonl")
            if line["kind"] == "train"
        }
        for config in (one, two)
    ]
    return min((step for step in seen[0] if seen[0][step] != seen[1].get(step)), default=None)


def _last_words(config: RunConfig) -> str:
    lines = (config.out / "log.txt").read_text(encoding="utf-8").splitlines()
    return "its last words:\n  " + "\n  ".join(lines[-8:])


def _store_step(config: RunConfig) -> int:
    from weightstream.store.store import Store

    with Store.open(config.store, writable=False) as store:
        return store.step


def _digest(config: RunConfig) -> str:
    from weightstream.store.store import Store

    with Store.open(config.store, writable=False) as store:
        return store.digest()
