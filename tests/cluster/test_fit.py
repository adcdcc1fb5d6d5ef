"""The command itself on several ranks: the digest of one rank, whichever rank is lost, and whatever number goes on.

Its processes are forked, but for one refusal; the demonstrations (`test_demo.py`) start theirs as a shell does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.forks import Command

from weightstream.store.store import Store
from weightstream.system.processes import children

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


def started(folder: Path, *arguments: object, environment: Mapping[str, str] = os.environ) -> Command:
    return Command([sys.executable, "-m", "weightstream", *arguments], folder, environment)


def command(folder: Path, *arguments: object, code: int = 0, timeout: float = 240) -> dict[str, Any]:
    run = started(folder, *arguments, "--json")
    out, err = run.communicate(timeout)
    assert run.returncode == code, err
    return json.loads(out) if code == 0 else {"stderr": err}


def digest(run: Path) -> str:
    with Store.open(run / "run" / "store", writable=False) as store:
        return store.digest()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    report = command(folder, "fit", write_config(folder))
    return {"report": report, "digest": digest(folder)}


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_but_time_and_sizes_change(alone: dict[str, Any], tmp_path: Path) -> None:
    """Three workers, of which one is killed in the middle; then two with two memory ranks apart; then one process."""
    config = write_config(tmp_path)
    first = started(tmp_path, "fit", config, "training.steps=4", "optimizer.steps=6", "cluster.workers=3")
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
    assert "sent_to_" in (tmp_path / "run" / "metrics" / "rank-2.jsonl").read_text()
    roles = ("cluster.workers=2", "cluster.memory=2")
    found = command(tmp_path, "fit", config, "training.steps=5", "optimizer.steps=6", *roles)
    assert found["step"] == 5
    report = command(tmp_path, "fit", config, "optimizer.steps=6")
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
        refused = command(tmp_path, "fit", config, *settings, code=2)["stderr"]
        assert refused.count("weightstream:") == 1, refused
        assert said in refused
    assert not (tmp_path / "run" / "store").exists()


@pytest.mark.slow
def test_a_stop_ends_both_ranks_after_the_same_step_and_is_said_once(alone: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    run = started(tmp_path, "fit", config, "cluster.workers=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 143, err
    assert [err.count(said) for said in ("SIGTERM: finishing", "stopped at step", "go on with:")] == [1, 1, 1], err
    assert command(tmp_path, "fit", config, "cluster.workers=4")["step"] == STEPS
    assert digest(tmp_path) == alone["digest"]


class Hosts:
    """Two ranks as an external torchrun starts them, each on a host of its own, as far as one host can pretend."""

    def __init__(self, config: Path) -> None:
        self.config = config

    def __call__(self, *own: Path, hosts: int = 1, settings: Sequence[str] = ()) -> list[tuple[int | None, str]]:
        """Exit code and stderr of each rank; `own` are their folders."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        told |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(2 // hosts)}
        ranks = [
            started(
                self.config.parent, "fit", self.config, "cluster.workers=2", f"out={own[rank]}", *settings,
                environment={**os.environ, **told, "RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        return [(rank.returncode, err) for rank in ranks for _, err in [rank.communicate(timeout=120)]]


@pytest.mark.slow
def test_hosts_that_share_no_files_keep_their_parts(tmp_path: Path) -> None:
    hosts = Hosts(write_config(tmp_path))
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for steps in (2, 3):  # made, and gone on with
        for code, err in hosts(one, two, settings=(f"training.steps={steps}", "optimizer.steps=3")):
            assert code == 0, err
    assert (two / "store" / "memory-1").is_dir()
    first, second = hosts(one, other)
    assert (first[0], second) == (2, (2, "")), second
    assert first[1].startswith("weightstream: rank 1 on "), first
    assert f"no part of a store at {other / 'store'}" in first[1]
    assert len(first[1].splitlines()) == 1
    assert not other.exists()


@pytest.mark.slow
def test_loopback_between_hosts_is_refused_at_once(tmp_path: Path) -> None:
    first, second = Hosts(write_config(tmp_path))(tmp_path / "one", tmp_path / "two", hosts=2)
    assert (first[0], second) == (2, (2, "")), second
    assert first[1].startswith("weightstream: cluster.address=127.0.0.1 is reached from its own host only")


def test_the_button_plans_the_rest(tmp_path: Path) -> None:
    from weightstream.config.presets import push_button

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


@pytest.mark.slow
def test_what_the_button_planned_is_not_kept_where_it_is_refused(tmp_path: Path) -> None:
    arguments = ("--model", "llama-1m", "--workers", "2", "--out", tmp_path / "none", "data.sources=[none]")
    refused = subprocess.run([COMMAND, "fit", *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("weightstream:") == 1, refused.stderr
    assert "no text found in data.sources: 'none'" in refused.stderr
    assert not (tmp_path / "none").exists()
