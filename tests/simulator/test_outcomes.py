"""What a job comes to: the short cuts against the whole, stragglers, failures, published figures, and the page of claims."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from weightstream.simulator import outcomes
from weightstream.simulator.claims import page
from weightstream.simulator.clusters import CLUSTERS, GPT_J_EFFICIENCY
from weightstream.simulator.jobs import Job, prepare
from weightstream.simulator.models import MODELS
from weightstream.simulator.outcomes import Failures, curve, least_batch, one_for_all, operations_of, run, stragglers
from weightstream.simulator.published import FIGURES, GPT_J_ONE
from weightstream.simulator.validation import calibrate_efficiency, validate

PUBLISHED = pytest.mark.xdist_group("published figures")  # which a process computes once
CLAIMS = Path(__file__).resolve().parents[2] / "docs" / "claims.md"


def job(model: str, workers: int, each: float, **settings: object) -> Job:
    chosen = MODELS[model]
    return Job(model=chosen, cluster=CLUSTERS["cs-2"], workers=workers, batch=each * workers, sequence=2048, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("each", [1, 8])  # what binds: the link, the processor
def test_one_system_stands_for_all(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job("cerebras-gpt-1.3b", 12, each)
    every = run(asked, every_system=True)
    assert one_for_all(every.prepared).hardware.cluster.workers == 1
    monkeypatch.setattr(outcomes, "MOST_OPERATIONS", 500)
    one = run(asked)
    assert one.layers == asked.model.layers
    assert one.step_s == pytest.approx(every.step_s, rel=1e-3)
    assert one.down_bytes == every.down_bytes


@pytest.mark.parametrize("each", [1, 6])
def test_two_shorter_models_stand_for_a_deep_one(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job("gpt3-175b", 4, each)
    whole = run(asked)
    assert whole.layers == asked.model.layers
    monkeypatch.setattr(outcomes, "MOST_OPERATIONS", 100)
    two = run(asked)
    assert two.layers < asked.model.layers
    # exact where all layers are alike; else some spill and others do not, and so many of few are not quite the same part
    assert (whole.prepared.spilled == 0) == (each == 1)
    assert two.step_s == pytest.approx(whole.step_s, rel=1e-9 if each == 1 else 0.01)
    assert two.down_bytes == pytest.approx(whole.down_bytes, rel=0.01)
    for resource in ("compute", "down", "up"):
        assert two.busy_s[resource] == pytest.approx(whole.busy_s[resource], rel=0.02)


def test_no_step_is_shorter_than_what_it_computes_or_moves() -> None:
    for each in (1, 4, 16):
        found = run(job("gpt-j-6b", 4, each))
        link = found.job.cluster.link
        assert link is not None
        assert found.step_s >= found.job.compute_s
        assert found.step_s >= max(found.down_bytes, found.up_bytes) / link.bytes_per_s
        assert max(found.utilisation.values()) <= 1 + 1e-9


def test_the_slowest_system_makes_the_step() -> None:
    asked = job("cerebras-gpt-1.3b", 4, 16)
    even, late = run(asked), run(replace(asked, slowdown={2: 2.0}))
    assert even.compute_share > 0.95  # else a slower processor might not show
    assert late.step_s == pytest.approx(2 * even.step_s, rel=0.05)


def test_stragglers_are_the_same_for_the_same_seed() -> None:
    assert stragglers(8, 0.1, 1) == stragglers(8, 0.1, 1) != stragglers(8, 0.1, 2)
    assert all(factor >= 1 for factor in stragglers(100, 0.1, 1).values())


def test_goodput_is_what_failing_at_random_gives() -> None:
    """Poisson failures, counted: whatever is under way is lost, and so is a recovery that fails."""
    step_s, workers, failures = 600.0, 20, Failures(rate_per_hour=0.1, recovery_s=120.0)
    numbers, rate = Random(3), failures.rate_per_hour * workers / 3600
    now, steps = 0.0, 20_000
    for _ in range(steps):
        left = step_s
        while (fails := numbers.expovariate(rate)) < left:
            now, left = now + fails, step_s
            while (again := numbers.expovariate(rate)) < failures.recovery_s:
                now += again
            now += failures.recovery_s
        now += step_s
    assert failures.goodput(step_s, workers) == pytest.approx(steps * step_s / now, rel=0.01)
    assert Failures(0.0, 120.0).goodput(step_s, workers) == 1.0
    assert Failures(1e9, 120.0).goodput(step_s, workers) == 0.0


def test_the_efficiency_is_calibrated_on_one_row_alone() -> None:
    assert [figure for figure in FIGURES if figure.calibrates] == [GPT_J_ONE]
    assert calibrate_efficiency() == pytest.approx(GPT_J_EFFICIENCY, rel=1e-3)


@PUBLISHED
def test_which_published_figures_are_met() -> None:
    rows = {row.figure.name: row for row in validate()}
    assert len(rows) == len(FIGURES)
    failing = {name for name, row in rows.items() if not row.passes}
    assert failing == {"GenSLM, 2 to 4 CS-2"}
    assert all(rows[name].reason and rows[name].figure.otherwise for name in failing)
    assert all(row.figure.tolerance == 0.1 for row in rows.values() if "weak scaling" not in row.figure.name)


def test_more_systems_never_train_slower_and_never_more_than_in_proportion() -> None:
    points = curve(job("gpt3-175b", 192, 8))
    assert points[-1].workers == 192
    rates = [point.tokens_per_s for point in points]
    assert rates == sorted(rates)
    assert all(point.efficiency <= 1.005 for point in points)


def test_the_least_batch_is_the_least() -> None:
    asked = job("gpt3-175b", 192, 1)
    least = least_batch(asked, 0.95)
    assert least is not None
    assert run(replace(asked, batch=least)).compute_share >= 0.95
    assert run(replace(asked, batch=least - 192)).compute_share < 0.95


@pytest.mark.slow
def test_192_systems_and_a_thousand_blocks_are_as_many_operations_as_they_need() -> None:
    """What a simulation costs is its operations: two a block and micro-batch, and a few a block whatever the systems."""
    asked = replace(job("cerebras-gpt-111m", 192, 1), model=replace(MODELS["cerebras-gpt-111m"], layers=998))
    whole = prepare(asked)
    assert len(whole.facts.visits) == 1000
    assert (whole.each, whole.spilled) == (1, 0.0)
    computing = 2 * 192 * 1000 + 192
    assert computing < operations_of(whole) < computing + 10 * 1000
    assert operations_of(one_for_all(whole)) < 13 * 1000


@pytest.mark.slow
@PUBLISHED
def test_the_page_of_claims_is_what_the_command_writes() -> None:
    assert CLAIMS.read_text(encoding="utf-8") == page(), (
        "write it anew: weightstream simulate --claims > docs/claims.md"
    )
