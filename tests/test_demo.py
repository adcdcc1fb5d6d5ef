"""The demonstrations themselves: what they print is what a newcomer sees first.

On less text and shorter sequences, as what is shown does not depend on them.
"""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tests.forks import Command

from weightstream.config.config import RunConfig, check_config
from weightstream.config.presets import push_button
from weightstream.demo import workers

TEXT = [str(Path(sysconfig.get_path("stdlib"), name)) for name in ("collections", "json")]
DEMO = """
import json
from tests.test_demo import shorter
from weightstream.demo import resume

resume.check_config, said = shorter, []
report = resume.run(said.append)
print(json.dumps([report, resume.summary(report), said]))
"""


def shorter(values: dict[str, Any], *, source: str) -> RunConfig:
    data = values["data"] | {"sources": TEXT, "validation_share": 0.1}
    training = values["training"] | {"sequence_length": 64, "steps": 9}
    return check_config(values | {"data": data, "training": training}, source=source)


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """It is forked, and so are its runs; the workers below are started as a shell does."""
    run = Command([sys.executable, "-c", DEMO], tmp_path)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    report, summary, said = json.loads(out)
    assert report["equal"], summary
    assert report["first_step_that_differs"] is None
    assert report["resumed_from_step"] in (report["killed_in_step"] - 1, report["killed_in_step"] - 2)
    assert report["run"]["state_bytes"] > 10 * report["run"]["device_memory_bytes"]
    assert report["run"]["moved_over_bound"] <= 1.02
    assert len(said) == 3
    assert "equal, bit for bit" in summary


@pytest.mark.slow
def test_workers_of_which_one_is_killed_end_like_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in place of four: each start of one costs a new interpreter seconds."""

    def with_less_text(*arguments: Any, overrides: list[str], **settings: Any) -> RunConfig:
        text = [f"data.sources={TEXT}", "data.validation_share=0.1"]
        return push_button(*arguments, overrides=[*overrides, *text], **settings)

    monkeypatch.setattr(workers, "WORKERS", 2)
    monkeypatch.setattr(workers, "KILLED", 1)
    monkeypatch.setattr(workers, "push_button", with_less_text)
    said: list[str] = []
    report = workers.run(said.append)
    assert report["equal"], workers.summary(report)
    assert any("rank 1 was killed by SIGKILL" in line for line in report["said"])
    assert report["sent_by_rank_0_bytes"] > 0
    assert "equal, bit for bit" in workers.summary(report)
