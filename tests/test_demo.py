"""The demonstration itself: what it prints is what a newcomer sees first."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest

from weightstream import demo, demo_workers
from weightstream.config import RunConfig
from weightstream.presets import push_button


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not() -> None:
    said: list[str] = []
    report = demo.run(said.append)
    assert report["equal"], demo.summary(report)
    assert report["first_step_that_differs"] is None
    assert report["resumed_from_step"] in (report["killed_in_step"] - 1, report["killed_in_step"] - 2)
    assert report["run"]["state_bytes"] > 10 * report["run"]["device_memory_bytes"]
    assert report["run"]["moved_over_bound"] <= 1.02
    assert len(said) == 3
    assert "equal, bit for bit" in demo.summary(report)


@pytest.mark.slow
def test_four_workers_of_which_one_is_killed_end_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tenth of the text: what is shown does not depend on it, and preparing it twice took as long as all the rest."""

    def with_less_text(*arguments: Any, overrides: list[str], **settings: Any) -> RunConfig:
        stdlib = Path(sysconfig.get_path("stdlib"))
        sources = [str(stdlib / name) for name in ("asyncio", "collections", "json", "email")]
        return push_button(*arguments, overrides=[*overrides, f"data.sources={sources}"], **settings)

    monkeypatch.setattr(demo_workers, "push_button", with_less_text)
    said: list[str] = []
    report = demo_workers.run(said.append)
    assert report["equal"], demo_workers.summary(report)
    assert any("rank 2 was killed by SIGKILL" in line for line in report["said"])
    assert report["sent_by_rank_0_bytes"] > 0
    assert "equal, bit for bit" in demo_workers.summary(report)
