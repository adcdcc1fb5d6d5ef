"""Resources on a virtual clock: what is shared among all who want it, what serves one after another, and buffers.

A job is so many seconds of work at full rate. Whenever one comes or goes, the rates of those that are left are found
anew, so that between two changes everything is linear: the only error is that of rounding.
"""

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

import simpy

T = TypeVar("T")
Process = Generator[simpy.Event, Any, T]


@dataclass(slots=True, eq=False)
class Job:
    """Work under way: `left_s` seconds of it at full rate, of which it gets `rate` at present."""

    left_s: float
    done: simpy.Event
    value: object
    demand: float = 1.0
    lane: int = 0
    rate: float = 0.0
    ends_s: float = 0.0


class Flow(ABC):
    """Jobs that progress together, each at its own rate; `_share` says at which.

    `used_s` are the seconds of full use so far, by lane.
    """

    def __init__(self, env: simpy.Environment, lanes: int = 1) -> None:
        self.env = env
        self.active: list[Job] = []
        self._used = [0.0] * lanes
        self._at = env.now
        self._round = 0

    def used_s(self) -> list[float]:
        """Seconds of full use up to now, by lane."""
        self._advance()
        return list(self._used)

    @abstractmethod
    def _share(self) -> None:
        """Sets the rate of every active job."""

    def _ended(self, job: Job) -> None:  # noqa: B027
        """A job is done, and no longer active; most resources have nothing to do then."""

    def _use(self, job: Job) -> float:
        """How much of the resource a job has at present."""
        return job.rate

    def _advance(self) -> None:
        passed = self.env.now - self._at
        if passed > 0:
            for job in self.active:
                job.left_s -= job.rate * passed
                self._used[job.lane] += self._use(job) * passed
            self._at = self.env.now

    def _plan(self) -> None:
        """Finds the rates anew, and waits for whoever is done first."""
        self._share()
        self._round += 1
        now, first, number = self.env.now, inf, self._round
        for job in self.active:
            if job.rate > 0:
                job.ends_s = ends_s = now + max(job.left_s, 0.0) / job.rate
                first = min(first, ends_s)
        if first < inf:
            wake = self.env.timeout(first - now)
            assert wake.callbacks is not None
            wake.callbacks.append(lambda _: self._wake(number, first))

    def _wake(self, number: int, first: float) -> None:
        if number != self._round:
            return  # the rates have changed meanwhile
        self._advance()
        done = [job for job in self.active if job.rate > 0 and job.ends_s <= first]
        self.active = [job for job in self.active if not (job.rate > 0 and job.ends_s <= first)]
        for job in done:
            self._ended(job)
            job.done.succeed(job.value)
        self._plan()


class Shared(Flow):
    """A capacity that all who are there share, max-min fair: nobody gets more than it wants, and what it leaves is the
    others'. As wide as `capacity`, in the unit of the jobs' demands.
    """

    def __init__(self, env: simpy.Environment, capacity: float = 1.0) -> None:
        super().__init__(env)
        self.capacity = capacity

    def run(self, seconds: float, demand: float = 1.0, value: object = None) -> simpy.Event:
        """Begins a job that takes so long if it gets all it wants."""
        done = self.env.event()
        if seconds <= 0:
            return done.succeed(value)
        self._advance()
        insort(self.active, Job(seconds, done, value, demand), key=lambda job: job.demand)
        self._plan()
        return done

    def _share(self) -> None:
        left, count = self.capacity, len(self.active)
        for job in self.active:  # those that want least first
            granted = min(job.demand, left / count)
            job.rate = granted / job.demand
            left, count = left - granted, count - 1

    def _use(self, job: Job) -> float:
        return job.rate * job.demand / self.capacity


Rates = Callable[[Sequence[bool]], Sequence[float]]
"""Which lanes have something to do → the rate of each."""


class Lanes(Flow):
    """Queues that progress side by side, in each of them one job after another."""

    def __init__(self, env: simpy.Environment, rates: Rates = lambda _: (1.0,), lanes: int = 1) -> None:
        super().__init__(env, lanes)
        self._rates = rates
        self._queues: list[deque[tuple[Job, Callable[[object], None]]]] = [deque() for _ in range(lanes)]

    def run(
        self, seconds: float, lane: int = 0, value: object = None, begun: Callable[[object], None] = lambda _: None
    ) -> simpy.Event:
        """Queues a job. `begun` is called at its turn, with the value of the one that it waited for, if it did."""
        job = Job(seconds, self.env.event(), value, lane=lane)
        queue = self._queues[lane]
        queue.append((job, begun))
        if len(queue) == 1:
            self._advance()
            begun(None)
            self._start(job)
            if job in self.active:
                self._plan()
        return job.done

    def _start(self, job: Job) -> None:
        if job.left_s > 0:
            self.active.append(job)
        else:
            self._ended(job)
            job.done.succeed(job.value)

    def _ended(self, job: Job) -> None:
        queue = self._queues[job.lane]
        queue.popleft()
        if queue:
            following, begun = queue[0]
            begun(job.value)
            self._start(following)

    def _share(self) -> None:
        heads = [False] * len(self._queues)
        for job in self.active:
            heads[job.lane] = True
        rates = self._rates(heads)
        for job in self.active:
            job.rate = rates[job.lane]


@dataclass(slots=True)
class Pool:
    """Buffers that are taken in order of asking; events carry what set the buffer free."""

    env: simpy.Environment
    free: int
    grown: int = 0
    _waiting: deque[simpy.Event] = field(default_factory=deque)
    _returning: int = 0

    def take(self) -> simpy.Event:
        """Triggered when a buffer is there; it is the taker's until `give`."""
        event = self.env.event()
        if self.free:
            self.free -= 1
            return event.succeed()
        self._waiting.append(event)
        return event

    def take_or_grow(self, *, patient: bool = True) -> simpy.Event:
        """The same, but where no buffer is on its way back (or if not `patient`) there is one more from now on."""
        if not self.free and (not patient or self._returning <= len(self._waiting)):
            self.grown += 1
            return self.env.event().succeed()
        return self.take()

    def give(self, after: simpy.Event) -> None:
        """Returns a buffer as soon as `after` is over."""
        if after.callbacks is None:
            self._hand_on(after.value)
            return
        self._returning += 1

        def back(event: simpy.Event) -> None:
            self._returning -= 1
            self._hand_on(event.value)

        after.callbacks.append(back)

    def _hand_on(self, value: object) -> None:
        if self._waiting:
            self._waiting.popleft().succeed(value)
        else:
            self.free += 1
