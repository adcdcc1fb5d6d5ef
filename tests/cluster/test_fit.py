"""The command itself on several ranks: the digest of one rank, whichever rank is lost, and whatever number goes on."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from weightstream.processes import children

COMMAND = Path(sysconfig.get_path("scripts")) / "weightstream"
STEPS = 6


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(6):
        words = " ".join(f"word{(number * 7 + i * i) % 53}" for i in range(600))
        (text / f"{number}.txt").write_text(words)
    values: dict[str, Any] = {
        "model": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
        },
        "data": {"sources": [str(text)], "tokenizer": {"size": 300}},
        "optimizer": {"lr": 1e-3},
        "training": {
            "steps": STEPS, "sequence_length": 32, "micro_batch_size": 1, "micro_batches": 8, "clip_norm": 1.0,
            "validation": {"every": 3, "sequences": 5}, "snapshots": {"every": 2, "keep_last": 1},
            "sample": {"prompts": ["word1 "], "tokens": 4, "temperature": 0.0},
        },
        "engine": {
            "device_memory": "64MiB", "host_memory": "128MiB", "threads_per_worker": 1, "panel_elements": 2048,
        },
        "cluster": {"timeout_s": 20},
        "out": str(folder / "run"),
    }  # fmt: skip
    values.update(changes)
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def command(*arguments: object, code: int = 0, timeout: float = 240) -> dict[str, Any]:
    ended = subprocess.run(
        [COMMAND, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert ended.returncode == code, ended.stderr
    return json.loads(ended.stdout) if code == 0 else {"stderr": ended.stderr}


def digest(run: Path) -> str:
    return str(command("store", "digest", run / "run")["digest"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    report = command("fit", write_config(folder))
    return {"report": report, "digest": digest(folder)}


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_but_time_and_sizes_change(alone: dict[str, Any], tmp_path: Path) -> None:
    """Three workers, of which one is killed in the middle; then two with two memory ranks apart; then one process."""
    config = write_config(tmp_path)
    first = subprocess.Popen(
        [COMMAND, "fit", config, "training.steps=4", "optimizer.steps=6", "cluster.workers=3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    (agent,) = children(first.pid)
    os.kill(children(agent.pid)[1].pid, signal.SIGKILL)
    out, err = first.communicate(timeout=180)
    assert first.returncode == 0, err
    assert "was killed by SIGKILL" in err
    assert err.count("starting all 3 ranks anew") == 1
    assert (tmp_path / "run" / "metrics" / "rank-2.jsonl").exists()
    found = command("fit", config, "training.steps=5", "optimizer.steps=6", "cluster.workers=2", "cluster.memory=2")
    assert found["step"] == 5
    report = command("fit", config, "optimizer.steps=6")
    assert report["step"] == STEPS
    assert digest(tmp_path) == alone["digest"]
    for key in ("loss_before", "loss_after", "samples"):
        assert report[key] == alone["report"][key]
    assert out


@pytest.mark.slow
def test_what_a_person_must_put_right_is_said_once(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for settings, said in (
        (["cluster.workers=9"], "cluster.workers=9: expected at most engine.reduction_groups=8"),
        (["cluster.workers=3", "training.micro_batches=2"], "training.micro_batches=4"),
        (["cluster.workers=2", "engine.device_memory=1KiB"], "the smallest value that works is device_memory="),
        (["cluster.workers=2", "data.sources=[nothing]"], "nothing"),
    ):
        refused = command("fit", config, *settings, code=2)["stderr"]
        assert refused.count("weightstream:") == 1, refused
        assert said in refused
    assert not (tmp_path / "run" / "store").exists()


def test_the_button_plans_the_rest(tmp_path: Path) -> None:
    from weightstream.presets import push_button

    one, many = (push_button("llama-1m", workers=n, out=tmp_path, steps=3) for n in (1, 8))
    assert one.model_dump() | {"cluster": None} == many.model_dump() | {"cluster": None}
    most = push_button("llama-1m", workers=192, out=tmp_path, steps=3)
    most.cluster.roles.check(most.training.micro_batches, most.engine.reduction_groups)
    ended = subprocess.run(
        [sys.executable, "-m", "weightstream", "fit", "--model", "llama-6m", "--out", str(tmp_path / "x")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "did you mean llama-60m?" in ended.stderr or "did you mean llama-8m?" in ended.stderr
