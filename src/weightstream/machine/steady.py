"""Whether the machine is as it is at its best.

A host gives a virtual machine whatever processors are free, and moves it: at times two of its threads share a cache, and at
times they are far apart and take several times as long to meet. Kernels that all threads share then take longer, small ones
most; large products and what one thread does alone hardly notice. It comes and goes by the second or by the minute, so that
what is measured in one state says little about a run in the other.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")

_ELEMENTS, _CALLS, _ROUNDS = 100_000, 40, 5
"""The reference: kernels of ten microseconds, one after another, each shared by all threads; two milliseconds of them."""
NOTICED = 1.15
"""So many times the least that the reference ever took, and it is not the same machine."""
FEW = 0.2
"""The part of many measurements that may be disturbed: their medians hardly notice."""
_PAUSE_S = 1.5
"""A host leaves processors where they are that are idle for less."""


@dataclass(slots=True)
class Steadiness:
    """Looks whether threads meet as fast as they ever did here.

    Args:
        patience_s: how long is waited, all waits together; what is measured after that is measured as it is.
        reference: seconds of the reference by now.
    """

    patience_s: float = 0.0
    reference: Callable[[], float] | None = None
    looks: int = 0
    disturbed: int = 0
    times: float = 1.0
    """How many times longer the reference took at most, where it was noticed."""
    _least_s: dict[int, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part of all looks that found threads apart."""
        return self.disturbed / self.looks if self.looks else 0.0

    def look(self) -> bool:
        """Whether the machine is at its best now, as far as that is known; one thread meets nobody."""
        threads = torch.get_num_threads()
        if threads == 1:
            return True
        taken_s = (self.reference or _reference_s)()
        least_s = self._least_s[threads] = min(taken_s, self._least_s.get(threads, taken_s))
        self.looks += 1
        steady = taken_s <= NOTICED * least_s
        if not steady:
            self.disturbed += 1
            self.times = max(self.times, taken_s / least_s)
        return steady

    def wait(self) -> bool:
        """Until it is, or until patience is used up; whether it is."""
        started = time.perf_counter()
        while not self.look():
            if self.patience_s <= 0:
                return False
            time.sleep(_PAUSE_S)
            self.patience_s -= time.perf_counter() - started
            started = time.perf_counter()
        return True

    def at_best(self, measure: Callable[[], T]) -> T:
        """What comes of many measurements that look, each, before they begin (`look`): all of them again, while patience
        lasts, where more than a few found the machine disturbed; of those the least disturbed."""
        found: list[tuple[float, T]] = []
        while True:
            looks, disturbed, started = self.looks, self.disturbed, time.perf_counter()
            result = measure()
            share = (self.disturbed - disturbed) / max(1, self.looks - looks)
            found.append((share, result))
            if found[1:]:  # the first time is no waiting
                self.patience_s -= time.perf_counter() - started
            if share <= FEW or self.patience_s <= 0:
                return min(found, key=lambda each: each[0])[1]


def _reference_s() -> float:
    values, rounds = torch.ones(_ELEMENTS), []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_CALLS):
            values.mul(2.0)
        rounds.append(time.perf_counter() - started)
    return median(rounds)


_NOW: ContextVar[Steadiness | None] = ContextVar("steadiness", default=None)


@contextmanager
def watched(steadiness: Steadiness) -> Iterator[None]:
    """What is measured within looks first."""
    token = _NOW.set(steadiness)
    try:
        yield
    finally:
        _NOW.reset(token)


def look() -> None:
    """Before something is measured: `Steadiness.look`, where somebody watches."""
    steadiness = _NOW.get()
    if steadiness is not None:
        steadiness.look()
