"""What is measured while a machine was not at its best is measured again, for as long as there is patience."""

from collections.abc import Iterator
from itertools import count
from unittest import mock

import pytest

from weightstream.machine import steady
from weightstream.machine.kernels import seconds
from weightstream.machine.steady import Steadiness, steadily, watched

FAST, SLOW = 1.0, 1.4


@pytest.fixture(autouse=True)
def no_pauses() -> Iterator[None]:
    with mock.patch.object(steady, "_PAUSE_S", 0.0):
        yield


def of(states: list[float], patience_s: float = 10.0) -> Steadiness:
    """One that finds these, look by look."""
    return Steadiness(patience_s, reference=iter(states).__next__)


def test_what_was_disturbed_in_the_end_is_measured_again() -> None:
    found = of([FAST, SLOW, SLOW, FAST, FAST])
    measured = iter(["at first", "again"])
    assert found.measured(lambda: next(measured)) == "again"
    assert (found.looks, found.disturbed, found.times) == (5, 2, pytest.approx(SLOW))
    assert found.share == pytest.approx(0.4)


def test_it_is_not_begun_before_the_machine_is_at_its_best() -> None:
    found = of([FAST, FAST, SLOW, SLOW, FAST, FAST])
    assert found.measured(lambda: found.looks) == 1
    assert found.measured(lambda: found.looks) == 5


def test_what_is_best_is_learned() -> None:
    found = of([SLOW, SLOW, FAST, SLOW])
    assert [found.look() for _ in range(4)] == [True, True, True, False]


def test_patience_ends() -> None:
    found = of([FAST, *[SLOW] * 50], patience_s=0.05)
    assert found.look()
    with mock.patch.object(steady, "_PAUSE_S", 0.02):
        assert found.measured(lambda: "as it is") == "as it is"
    assert found.patience_s <= 0
    looks = found.looks
    assert found.measured(lambda: "as it is") == "as it is"
    assert found.looks == looks + 1, "nothing is waited for any more"


def test_measuring_in_vain_is_waiting() -> None:
    found = of([FAST, SLOW, FAST, SLOW, FAST, SLOW, FAST], patience_s=10.5)
    with mock.patch.object(steady.time, "perf_counter", side_effect=count(0.0, 5.0)):
        found.measured(lambda: None)
    assert found.patience_s <= 0
    assert found.looks == 7


def test_kernels_are_measured_so_where_somebody_watches() -> None:
    found = of([FAST, FAST] * 3)
    assert seconds(lambda: None) > 0
    assert found.looks == 0
    with watched(found):
        assert seconds(lambda: None) > 0
    assert found.looks == 2
    assert steadily(lambda: "nobody") == "nobody"
    assert found.looks == 2
