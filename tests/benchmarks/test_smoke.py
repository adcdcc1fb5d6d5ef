"""Benchmarks run and print what they say they print; what they measure in a few seconds is no figure."""

import json
import os
import sys
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.forks import Command

import weightstream
from benchmarks import table

ROOT = Path(__file__).resolve().parents[2]


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a benchmark prints; nothing is kept under results/."""
    command = [sys.executable, ROOT / "benchmarks" / arguments[0], *arguments[1:]]
    command += ["--json", "--no-record", "--scratch", folder]
    sources = str(Path(weightstream.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([sources, os.environ.get("PYTHONPATH", "")])}
    with TemporaryDirectory() as outputs:
        run = Command(command, Path(outputs), environment)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert [path.name for path in folder.iterdir()] in (["lock"], [])
    return dict(json.loads(out))


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    small = ("--piece", "4", "--layers", "2", "--width", "32")
    found = measured(tmp_path, "kills.py", "--kills", "3", "--verify-every", "2", *small)
    assert found["kills"] == 3
    assert found["digest_equal"]
    assert found["lost_steps_max"] <= 2
    assert found["verified"] == 2
    assert found["damage"] == []
    assert sum(found["lost_steps"].values()) + found["before_opening"] == 3


@pytest.mark.slow
def test_store(tmp_path: Path) -> None:
    small = ("--width", "128", "--records", "3", "--rounds", "2", "--warm-up", "1", "--gigabytes", "0.02")
    few = ("--commits", "2", "--snapshots", "2", "--touched", "2000", "--record-rounds", "5")
    found = measured(tmp_path, "store.py", *small, *few)
    for key in ("read_ratio", "write_ratio", "write_new_ratio", "commit_ms", "snapshot_ms", "open_ms"):
        least, most = found[f"{key}_spread"]
        assert 0 < least <= most
        assert found[key] > 0
    assert found["commit_records"] == round(0.02e9 / (14 * 200_960))
    assert found["write_bytes"] > found["read_bytes"] >= 3 * 14 * 200_960


@pytest.mark.slow
def test_ranks192(tmp_path: Path) -> None:
    small = ("--workers", "0", "1", "3", "--micro-batches", "4", "--layers", "1", "--steps", "2")
    found = measured(tmp_path, "ranks192.py", *small)
    assert found["digest_equal"]
    assert found["egress_equal"]
    assert found["egress_bytes"]["3"] > 0


@pytest.mark.slow
def test_fabric(tmp_path: Path) -> None:
    small = ("--ranks", "2", "3", "--mebibytes", "0.5", "--units", "4", "--turns", "2", "--warm-up", "1")
    found = measured(tmp_path, "fabric.py", *small)
    assert found["egress_bytes"] == {"2": 1 << 19, "3": 1 << 19}
    for what in ("broadcast", "reduce"):
        assert found[f"{what}_ratio_min"] > 0
        for layout in ("apart", "colocated"):
            least, most = found[layout]["3"][f"{what}_s_spread"]
            assert 0 < least <= most


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    small = (
        "--workers",
        "1",
        "2",
        "--layers",
        "2",
        "--shrink",
        "64",
        "--groups",
        "2",
        "--steps",
        "2",
        "--warm-up",
        "1",
    )
    found = measured(tmp_path, "scaling.py", *small, "--no-limited")
    assert found["efficiency"]["1"] == 1
    assert 0 < found["efficiency"]["2"] < 2
    assert found["factor"] > 1000


@pytest.mark.slow
def test_headline(tmp_path: Path) -> None:
    small = ("--width", "64", "--hidden", "4", "--tokens", "128", "--length", "64", "--small-experts", "1000")
    few = ("--steps", "2", "--turns", "1", "--warm-up", "1", "--sequences", "2", "--threads", "1")
    found = measured(tmp_path, "headline.py", *small, *few, "--sizes", "100", str(10**10), "--size-steps", "1")
    assert found["parameters"] > 2 * 256**4 * found["expert_parameters"] == 2 * 256**4 * 512
    assert 0 < found["touched_per_step"] <= 2 * 128
    assert found["touched_per_step"] < found["touched_experts"] <= 3 * 2 * 128
    assert found["touched_parameters"] == 512 * found["touched_experts"]
    assert found["disk_bytes"] > 12 * found["touched_parameters"]
    assert len(found["losses"]) == found["steps"] == 3
    for side in ("", "small_family_", "no_expert_"):
        assert 0 < found[f"{side}validation_loss"] < 7
        assert found[f"{side}seconds_per_step"] > 0
    reached = found["touched_by_experts"]
    assert reached["100"] == reached[str(10**10)] > 0
    (tmp_path / "headline.json").write_text(json.dumps(found), encoding="utf-8")
    shown = table.headline(tmp_path)
    assert f"| {10**10:,} | {reached['100']:,.0f} |" in shown
    assert f"| {256**4:,} | {2 * 256**4 * 512:,} |" in shown


@pytest.mark.slow
def test_sparse_quality(tmp_path: Path) -> None:
    model = f"--layers 1 --width 64 --vocabulary 300 --lr 1e-2 --source {ROOT / 'src' / 'weightstream' / 'data'}"
    small = f"{model} --steps 16 --sequences 2 --length 32 --held-out 4 --evaluations 2 --seeds 1".split()
    static = {"algorithm": "static", "seed": 0, "parameters": 0, "loss": 1.25, "validation": [[0, 3.5], [16, 1.25]]}
    (tmp_path / "sparse_quality").mkdir()
    (tmp_path / "sparse_quality" / "static-0.json").write_text(json.dumps(static))  # as an interrupted call left it
    found = measured(tmp_path, "sparse_quality.py", *small)
    by_algorithm = {run["algorithm"]: run for run in found["trained"]}
    assert list(by_algorithm) == ["dense", "static", "set", "rigl", "rigl_relative", "gmp", "spdf"]
    assert by_algorithm.pop("static") == static
    assert found["loss"]["static"] == {"mean": 1.25, "spread": [1.25, 1.25], "by_seed": [1.25]}
    for algorithm, run in by_algorithm.items():
        assert [step for step, _ in run["validation"]] == [0, 8, 16]
        assert run["loss"] == run["validation"][-1][1] < run["validation"][0][1]
        assert found["loss"][algorithm]["by_seed"] == [run["loss"]]
    assert by_algorithm["gmp"]["validation"][0] == by_algorithm["dense"]["validation"][0]  # both begin dense
    assert by_algorithm["gmp"]["density"][-1][1] == pytest.approx(0.2, abs=1e-3)
    assert by_algorithm["spdf"]["density"][-1][1] == 1
    assert max(turnover for _, turnover in by_algorithm["rigl"]["turnover"]) == pytest.approx(0.3, abs=0.02)
    better = found["loss"]["set"]["mean"] - found["loss"]["rigl"]["mean"]
    assert found["order"][0] == {
        "expected": "RigL no worse than SET", "held": better >= 0,
        "by": pytest.approx(better), "by_seed": [pytest.approx(better)],
    }  # fmt: skip
    assert not found["order"][2]["held"]  # nothing learns to 1.25 in 16 steps


@pytest.mark.slow
def test_sparse_growth(tmp_path: Path) -> None:
    model = f"--layers 1 --width 64 --vocabulary 300 --lr 1e-2 --source {ROOT / 'benchmarks'} --seeds 1 --threads 1"
    small = f"{model} --steps 28 --sequences 2 --length 32 --held-out 4 --evaluations 2".split()
    found = measured(tmp_path, "sparse_growth.py", *small)
    by_arm = {run["arm"]: run for run in found["trained"]}
    assert by_arm.keys() == found["arms"].keys() == found["loss"].keys()
    for arm, run in by_arm.items():
        assert [step for step, _ in run["validation"]] == [14, 28]
        assert found["above_static"][arm]["mean"] == run["loss"] - by_arm["static"]["loss"]
    assert len({run["loss"] for run in by_arm.values()}) == len(by_arm)  # nothing that an arm changes is without effect
    assert by_arm["static"]["updates"] == []
    assert by_arm["static"]["explored"] == pytest.approx(0.1, abs=1e-3)
    steps = {arm: [update["step"] for update in run["updates"]] for arm, run in by_arm.items()}
    assert steps["set"] == steps["rigl"] == list(range(2, 21, 2))
    assert steps["rigl_every_third"] == [6, 12, 18]

    def average(arm: str, key: str) -> float:
        return mean(update[key] for update in by_arm[arm]["updates"] if key in update)

    assert 0.1 < average("rigl_drop_third", "new") * 3 < 0.3
    assert average("rigl", "new") <= average("set", "new") <= 0.3
    assert average("set", "crowded_rows") < average("rigl_spread", "crowded_rows") < average("rigl", "crowded_rows")
    assert 0 < average("rigl", "agreed") < 1
