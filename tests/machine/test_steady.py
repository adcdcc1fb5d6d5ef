"""What was measured while a machine was not at its best is measured again, for as long as there is patience."""

from collections.abc import Iterator
from itertools import count
from unittest import mock

import pytest
import torch

from weightstream.machine import steady
from weightstream.machine.kernels import seconds
from weightstream.machine.steady import Steadiness, watched

FAST, SLOW = 1.0, 1.4


@pytest.fixture(autouse=True)
def two_threads_and_no_pauses() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with mock.patch.object(steady, "_PAUSE_S", 0.0):
        yield
    torch.set_num_threads(before)


def of(states: list[float], patience_s: float = 10.0) -> Steadiness:
    """One that finds these, look by look."""
    return Steadiness(patience_s, reference=iter(states).__next__)


def looking(found: Steadiness, results: Iterator[str], looks: int) -> str:
    for _ in range(looks):
        found.look()
    return next(results)


def test_what_was_disturbed_is_measured_again() -> None:
    found = of([FAST, SLOW, SLOW, SLOW, FAST, SLOW, FAST, FAST, FAST, FAST])
    results = iter(["disturbed", "half", "quiet", "never"])
    assert found.at_best(lambda: looking(found, results, 3)) == "quiet"
    assert (found.looks, found.disturbed, found.times) == (9, 4, pytest.approx(SLOW))
    assert found.share == pytest.approx(4 / 9)


def test_without_patience_the_least_disturbed_counts() -> None:
    found = of([FAST, SLOW, SLOW, FAST, FAST, SLOW, SLOW, SLOW, FAST], patience_s=1.5)
    results = iter(["first", "best", "last"])
    with mock.patch.object(steady.time, "perf_counter", side_effect=count(0.0, 1.0)):
        assert found.at_best(lambda: looking(found, results, 3)) == "best"
    assert found.patience_s == -0.5
    with mock.patch.object(steady.time, "perf_counter", side_effect=count(0.0, 1.0)):
        impatient = of([FAST, SLOW, SLOW], patience_s=0.0)
        assert impatient.at_best(lambda: looking(impatient, iter(["as it is"]), 3)) == "as it is"


def test_one_thread_meets_nobody() -> None:
    torch.set_num_threads(1)
    try:
        assert of([]).look()
    finally:
        torch.set_num_threads(2)


def test_what_is_best_is_learned() -> None:
    found = of([SLOW, SLOW, FAST, SLOW])
    assert [found.look() for _ in range(4)] == [True, True, True, False]


def test_waiting_ends_with_the_disturbance_or_with_patience() -> None:
    found = of([FAST, SLOW, SLOW, FAST])
    assert found.look()
    assert found.wait()
    assert found.looks == 4
    found = of([FAST, *[SLOW] * 50], patience_s=0.05)
    with mock.patch.object(steady, "_PAUSE_S", 0.02):
        assert found.look()
        assert not found.wait()
    assert found.patience_s <= 0
    assert 3 <= found.looks < 10


def test_kernels_look_where_somebody_watches() -> None:
    found = of([FAST])
    assert seconds(lambda: None) > 0
    assert found.looks == 0
    with watched(found):
        assert seconds(lambda: None) > 0
    assert found.looks == 1
