"""The demonstration of 123 trillion parameters, on a small model with as many experts."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from weightstream.cli import app
from weightstream.demo_120t import demonstration
from weightstream.demo_120t.progress import Progress
from weightstream.demo_120t.summary import summary
from weightstream.errors import ConfigError, PlanError

STEPS = 8
SMALL = {"width": 64, "hidden": 8, "tokens": 128, "length": 32}


class GoneError(Exception):
    """Stands for the end of the demonstration's own process."""


class Listening(Console):
    """A console that ends the demonstration when it has said a line that begins so, the second time that it does."""

    def __init__(self, last: str | None = None) -> None:
        super().__init__(file=io.StringIO(), width=200)
        self.said: list[str] = []
        self.last, self._again = last, False

    def print(self, *objects: Any, **settings: Any) -> None:
        self.said.append(str(objects[0]))
        if self.last is not None and self.said[-1].startswith(self.last):
            if self._again:
                raise GoneError
            self._again = True


def shown(out: Path, last: str | None = None) -> tuple[dict[str, Any], list[str]]:
    console = Listening(last)
    try:
        return demonstration.run(console, out, STEPS, SMALL), console.said
    except GoneError:
        return {}, console.said


@pytest.mark.slow
def test_it_goes_on_wherever_it_was_itself_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is found before anything is trained; then it ends between two kills, in the steps that are taken again,
    and in a branch."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        with pytest.raises(PlanError, match=r"8 steps need up to .* has 1.00 MiB free; give fewer --steps"):
            shown(out)
    assert not (out / demonstration.MAIN).exists()
    kills = []
    for last in ("SIGKILL", f"{STEPS:>6}", f"{STEPS + 2:>6}"):
        report, said = shown(out, last)
        assert not report, said
        kills.append(sum(line.startswith("SIGKILL") for line in said))
    report, said = shown(out)
    assert kills == [2, 1, 0]
    assert said[0].startswith("going on in")
    assert report["equal"], summary(report)
    assert len(report["killed_after_step"]) == 3
    assert all(4 <= step <= STEPS for step in report["killed_after_step"])
    assert len(report["losses"]) == STEPS
    assert [len(losses) for losses in report["losses_by_rate"].values()] == 2 * [demonstration.BRANCH_STEPS]
    one, other = report["losses_by_rate"].values()
    assert one[0] == other[0]  # the first step's loss comes before its update
    assert one[-1] != other[-1]
    of_experts = report["layers"] * report["experts"] * report["expert_parameters"]
    assert of_experts == 2 * 256**4 * 1024
    assert report["dense"]["state_bytes"] == 12 * of_experts
    assert report["dense"]["flop"] == 6 * of_experts * 128
    assert 0 < report["disk_bytes"] <= Progress.begun(out, None, SMALL).done["text"]["most_bytes"]
    assert report["branch_bytes"] < report["disk_bytes"] / 10
    again, said = shown(out)
    assert again == report | {"seconds": again["seconds"]}
    assert len(said) == 1
    text = summary(report)
    assert "equal, bit for bit" in text
    assert f"{report['parameters']:,}" in text
    assert "What it does not show: quality." in text
    assert "NOT EQUAL" in summary(report | {"equal": False})


def test_what_it_cannot_begin_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps must be at least 8, .* found 7"):
        demonstration.run(Listening(), tmp_path / "few", 7)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "demo.json").write_text("{")
    with pytest.raises(ConfigError, match="how far the demonstration is, cannot be read: .*; give another --out"):
        demonstration.run(Listening(), tmp_path / "damaged", 8)
    with pytest.raises(ConfigError, match="holds something else"):
        demonstration.run(Listening(), tmp_path / "other")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "demo.json.partial").write_text('{"ste')  # of one that was killed as it began
    Progress.begun(tmp_path / "begun", 10, {})
    with pytest.raises(ConfigError, match="holds a demonstration of 10 steps, this one is to have 12"):
        demonstration.run(Listening(), tmp_path / "begun", 12)
    assert Progress.begun(tmp_path / "begun", None, {}).steps == 10


def test_its_options_are_of_no_other_demonstration(tmp_path: Path) -> None:
    for option in (("--steps", "9"), ("--out", str(tmp_path))):
        error = CliRunner().invoke(app, ["demo", "workers", *option]).exception
        assert isinstance(error, ConfigError)
        assert "demo workers: --steps and --out are of `weightstream demo 120t` alone" in str(error)


def test_kills_are_planned_where_steps_are_left() -> None:
    for steps in (8, 9, 24):
        for _ in range(50):
            planned = Progress.new(steps, {}).planned
            assert len({after for after, _ in planned}) == 3
            assert planned == sorted(planned)
            assert all(steps // 2 <= after <= steps - 2 and 0 <= part < 1 for after, part in planned)
