"""`weightstream simulate` as a person uses it: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.machine.profiles import profile

from weightstream.cli import main
from weightstream.cluster import Cluster
from weightstream.errors import PlanError
from weightstream.prediction.costing import hardware_of
from weightstream.simulator.published import FIGURES

GPT_J = ("--model", "gpt-j-6b", "--cluster", "cs-2", "--workers", "2", "--batch", "120")


def simulate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["weightstream", "simulate", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: simulate(monkeypatch, capsys, *arguments)


def test_a_preset_is_simulated_and_shown(command: Any, tmp_path: Path) -> None:
    html, trace = tmp_path / "step.html", tmp_path / "step.json"
    code, out, _ = command(*GPT_J, "--tokens", "1e9", "--html", str(html), "--trace", str(trace), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens_per_s"] == pytest.approx(120 * 2048 / found["step_s"])
    assert found["hours"] == pytest.approx(1e9 / found["tokens_per_s"] / 3600)
    assert found["energy_kwh"] == pytest.approx(found["hours"] * 30)  # two systems of 15 kW
    assert sum(found["critical_path_s"].values()) == pytest.approx(found["step_s"], rel=1e-3)
    assert [point["workers"] for point in found["scaling"]] == [1, 2]
    assert any("unverified" in line for line in found["rests_on"])
    kinds = {
        event["name"].split("(")[0] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"
    }
    assert {"Forward", "Backward", "Fetch", "Update"} <= kinds
    assert "<script src" not in html.read_text()
    code, out, _ = command(*GPT_J)
    assert (code, "binds" in out, "unverified" in out) == (0, True, True)


def test_failures_and_stragglers_make_a_run_longer(command: Any) -> None:
    even = json.loads(command(*GPT_J, "--json")[1])
    late = json.loads(command(*GPT_J, "--stragglers", "0.2", "--failures", "0.01", "--recovery", "300", "--json")[1])
    assert late["step_s"] > 1.01 * even["step_s"]
    assert late["goodput"] < even["goodput"] == 1
    assert late["hours"] == pytest.approx(late["tokens"] / late["tokens_per_s"] / 3600 / late["goodput"])


def test_a_configuration_is_simulated_on_a_preset(command: Any, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 5, num_attention_heads: 4}\n"
        "data: {sources: [stdlib], tokenizer: {size: 8192}}\n"
        "training: {micro_batches: 4, micro_batch_size: 2, sequence_length: 128}\n"
    )
    html, trace = tmp_path / "step.html", tmp_path / "step.json"
    code, out, _ = command(str(config), "--cluster", "h100", "--json", "--html", str(html), "--trace", str(trace))
    found = json.loads(out)
    assert code == 0
    page, events = html.read_text(), json.loads(trace.read_text())["traceEvents"]
    assert "llama on 1 × h100" in page
    assert "<script src" not in page
    # all of the last step is there: each of five layers, embedding and head goes forward, all but the head's visit back again
    forward = [event for event in events if event["ph"] == "X" and event["name"].startswith("Forward(")]
    assert len(forward) == 3 * 7 * found["micro_batches_each"]  # three steps are simulated
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") >= found["step_s"] * 1e6
    # embedding and head of 8,192 rows, and layers of 4 + 3 · 688/256 matrices of 256 × 256
    assert found["parameters"] == 2 * 8192 * 256 + 5 * (4 * 256 * 256 + 3 * 256 * 688)
    assert (found["batch"], found["sequence"], found["clipping"]) == (8, 128, True)


def test_the_sparsity_of_a_configuration_is_simulated(command: Any, tmp_path: Path) -> None:
    """Feed-forward matrices at a tenth, once GMP has come to its end; all else is dense."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {model_type: llama, hidden_size: 256, intermediate_size: 768, num_hidden_layers: 2, num_attention_heads: 4}\n"
        "data: {sources: [stdlib], tokenizer: {size: 8192}}\n"
        "training: {steps: 40, micro_batches: 4, micro_batch_size: 2, sequence_length: 128}\n"
        "sparsity: {groups: [{patterns: ['*.mlp.*'], algorithm: gmp, sparsity: 0.875, block: [32, 32], every: 5, end: 30}]}\n"
    )
    found = json.loads(command(str(config), "--cluster", "h100", "--json")[1])
    mlp, attention, tables = 2 * 3 * 256 * 768, 2 * 4 * 256 * 256, 2 * 8192 * 256
    assert found["nonzeros"] == pytest.approx(mlp // 8 + attention + tables, abs=2 * 32 * 32)
    assert found["sparsity"]["share"] == pytest.approx(mlp / (mlp + attention))
    assert found["sparsity"]["block"] == [32, 32]
    assert any("after step 30" in line or "after step 40" in line for line in found["rests_on"])
    dense = json.loads(command(str(config), "--cluster", "h100", "--json", "--sparsity", "0")[1])
    assert found["store_bytes"] < dense["store_bytes"]
    assert found["room_parameters"] > found["room_parameters_dense"] == dense["room_parameters"]
    assert dense["sparsity"] is None
    text = command(str(config), "--cluster", "h100")[1]
    assert "products dense" in text
    assert "were it dense" in text
    faster = command(*GPT_J, "--sparsity", "0.9", "--multiply", "nonzeros", "--json")[1]
    assert json.loads(faster)["step_s"] < 0.5 * json.loads(command(*GPT_J, "--json")[1])["step_s"]
    assert any("unverified: only non-zeros are multiplied" in line for line in json.loads(faster)["rests_on"])


def test_this_machine_is_a_cluster_of_its_cores(command: Any, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 2, num_attention_heads: 4}\n"
        "data: {sources: [stdlib], tokenizer: {size: 8192}}\n"
        "training: {micro_batches: 4, micro_batch_size: 1, sequence_length: 64, clip_norm: null}\n"
        f"out: {tmp_path / 'run'}\n"
    )
    told = ("--profile", str(tmp_path / "profile.toml"), "--json")
    code, _, err = command(str(config), *told)
    assert (code, "run `weightstream calibrate` first" in err) == (2, True)
    profile().save(tmp_path / "profile.toml")
    code, out, err = command(str(config), "--workers", "2", *told)
    found = json.loads(out)
    assert code == 0
    assert "is of another machine" in err
    alone = json.loads(command(str(config), "--workers", "1", *told)[1])
    assert 0.9 < alone["compute_share"] <= 1  # activations are kept, and nothing is computed again
    one, two = found["scaling"]
    assert (found["cluster"], found["energy_kwh"], one["workers"], two["workers"]) == ("this-machine", 0, 1, 2)
    # 1 GFLOP/s of one core: 3 to 4 passes of 2 operations per parameter and token, embedding apart; nothing goes faster
    layers = 2 * (4 * 256 * 256 + 3 * 256 * 688) + 8192 * 256
    assert one["step_s"] >= 4 * 64 * 6 * layers / 1e9
    # a second core that both slow down by a quarter less than it gains
    assert one["step_s"] / 2 < two["step_s"] < one["step_s"]
    assert "1 to 2 cores" in command(str(config), "--workers", "3", *told)[2]


@pytest.mark.xdist_group("published figures")
def test_published_figures_are_printed_though_one_is_not_met(command: Any) -> None:
    code, out, _ = command("--validate", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert len(rows) == len(FIGURES)
    assert all({"name", "published", "predicted", "tolerance", "pass", "reason"} <= set(row) for row in rows)
    assert [row["reason"] == "" for row in rows] == [row["pass"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--model"),
        (("--model", "gpt-j"), "did you mean gpt-j-6b"),
        (("--model", "gpt-j-6b"), "--cluster"),
        (("--model", "gpt-j-6b", "--cluster", "cs-1"), "did you mean cs-"),
        (("--model", "gpt-j-6b", "--cluster", "cs-2"), "--batch"),
        ((*GPT_J, "--workers", "500"), "1 to 192"),
        ((*GPT_J, "--batch", "1"), "leaves 1 of 2"),
        ((*GPT_J, "--sparsity", "1"), "below 1"),
        ((*GPT_J, "--sparsity", "0.9", "--block", "32"), "such as 32x32"),
        ((*GPT_J, "--block", "32x32"), "--sparsity 0.9"),
        (("--model", "1t", "--cluster", "h100", "--batch", "8"), "disk"),
    ],
)
def test_what_cannot_be_is_refused(command: Any, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


LINK, DISK = profile().model_dump(mode="json")["link"], profile().model_dump(mode="json")["disk"]


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"link": None}, (), "no link between its cores"),
        (
            {"link": {**LINK, "broadcast_bytes_per_s": 0.0}},
            (),
            "link.broadcast_bytes_per_s: expected greater than 0, found 0",
        ),
        ({"disk": {**DISK, "write_bytes_per_s": 0.0}}, (), "disk.write_bytes_per_s: expected greater than 0, found 0"),
        ({}, ("engine.device_memory=64KiB",), "the smallest value that works is device_memory="),
        ({}, ("training.micro_batches=1", "training.micro_batch_size=1"), "leaves 1 of 2"),
    ],
)
def test_a_machine_that_cannot_work_is_refused(
    command: Any, tmp_path: Path, changes: dict[str, Any], overrides: tuple[str, ...], said: str
) -> None:
    """Clusters without a link, or with one that moves nothing; blocks larger than the device; fewer sequences than ranks."""
    config, place = tmp_path / "run.yaml", tmp_path / "profile.toml"
    config.write_text(
        "model: {model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 2, num_attention_heads: 4}\n"
        "data: {sources: [stdlib], tokenizer: {size: 8192}}\n"
        "training: {micro_batches: 4, micro_batch_size: 1, sequence_length: 64}\n"
        f"out: {tmp_path / 'run'}\n"
    )
    whole = profile().model_dump(mode="json", exclude_none=True) | changes
    place.write_text(tomli_w.dumps({key: value for key, value in whole.items() if value is not None}))
    code, out, err = command(str(config), *overrides, "--workers", "2", "--profile", str(place))
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_ranks_without_a_measured_link_are_not_predicted(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no link between processes.*calibrate"):
        hardware_of(profile(link=None), Cluster(2), threads=1)
