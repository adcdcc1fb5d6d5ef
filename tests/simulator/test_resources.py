"""Resources against an oracle in exact fractions, and by hand."""

from fractions import Fraction

import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstream.simulator.hardware import Disk
from weightstream.simulator.machine import RECORDS, URGENT, WRITES, disk_rates
from weightstream.simulator.resources import Lanes, Pool, Process, Shared

Arrivals = list[tuple[int, int, int]]  # when, how much work, how much of the capacity it wants
QUICK = settings(max_examples=100, deadline=None)


def fair(demands: list[Fraction], capacity: Fraction) -> list[Fraction]:
    """Max-min fair by its definition: the level at which all are cut off, found by trying each demand as that level."""
    if sum(demands) <= capacity:
        return demands
    for satisfied in range(len(demands)):
        least = sorted(demands)[:satisfied]
        level = (capacity - sum(least)) / (len(demands) - satisfied)
        if all(demand <= level for demand in least) and sorted(demands)[satisfied] >= level:
            return [min(demand, level) for demand in demands]
    raise AssertionError("no level")


def oracle(arrivals: Arrivals, capacity: Fraction) -> list[Fraction]:
    """When each job ends."""
    left = {number: Fraction(work) for number, (_, work, _) in enumerate(arrivals)}
    ends: dict[int, Fraction] = {}
    now = Fraction(0)
    while left:
        here = [number for number in left if arrivals[number][0] <= now]
        following = min((Fraction(arrivals[n][0]) for n in left if arrivals[n][0] > now), default=None)
        demands = [Fraction(arrivals[number][2]) for number in here]
        rates = [rate / demand for rate, demand in zip(fair(demands, capacity), demands, strict=True)]
        times = [now + left[number] / rate for number, rate in zip(here, rates, strict=True)]
        until = min([*times, *([following] if following is not None else [])])
        for number, rate, end in zip(here, rates, times, strict=True):
            left[number] -= rate * (until - now)
            if end == until:
                ends[number] = until
                del left[number]
        now = until
    return [ends[number] for number in range(len(arrivals))]


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_a_shared_resource_is_max_min_fair(arrivals: Arrivals, capacity: int) -> None:
    env = simpy.Environment()
    shared, ends = Shared(env, float(capacity)), [0.0] * len(arrivals)

    def job(number: int) -> Process[None]:
        when, work, demand = arrivals[number]
        yield env.timeout(when)
        yield shared.run(work, demand)
        ends[number] = env.now

    for number in range(len(arrivals)):
        env.process(job(number))
    env.run()
    for found, expected in zip(ends, oracle(arrivals, Fraction(capacity)), strict=True):
        assert abs(found - expected) <= 1e-12 * max(1, expected)
    work = sum(seconds * demand for _, seconds, demand in arrivals)
    assert abs(shared.used_s()[0] - work / capacity) < 1e-9


def run_disk(disk: Disk, jobs: list[tuple[float, int, float]]) -> list[float]:
    """When each job (begin, lane, seconds) ends."""
    env = simpy.Environment()
    lanes, ends = Lanes(env, disk_rates(disk), lanes=3), [0.0] * len(jobs)

    def job(number: int) -> Process[None]:
        begin, lane, seconds = jobs[number]
        yield env.timeout(begin)
        yield lanes.run(seconds, lane)
        ends[number] = env.now

    for number in range(len(jobs)):
        env.process(job(number))
    env.run()
    return ends


class TestDisk:
    def disk(self, together: float, urgent_share: float = 0.25) -> Disk:
        return Disk(read_bytes_per_s=1.0, write_bytes_per_s=1.0, together=together, urgent_share=urgent_share)

    def test_a_direction_alone_has_its_full_rate_and_serves_in_order(self) -> None:
        assert run_disk(self.disk(1.0), [(0, RECORDS, 2), (0, RECORDS, 3), (1, RECORDS, 1)]) == [2, 5, 6]

    def test_both_directions_share_what_they_reach_together(self) -> None:
        # half the rate each until the write is done, then the read alone
        assert run_disk(self.disk(1.0), [(0, RECORDS, 3), (0, WRITES, 1)]) == [4, 2]
        assert run_disk(self.disk(1.5), [(0, RECORDS, 3), (0, WRITES, 3)]) == [4, 4]
        assert run_disk(self.disk(2.0), [(0, RECORDS, 3), (0, WRITES, 3)]) == [3, 3]

    def test_what_is_urgent_does_not_queue_behind_records(self) -> None:
        # a quarter of the reads is its share; alone again, the record has all of it
        assert run_disk(self.disk(1.0), [(0, RECORDS, 5), (0, URGENT, 1)]) == [6, 4]

    def test_a_job_of_nothing_passes_at_its_turn(self) -> None:
        assert run_disk(self.disk(1.0), [(0, WRITES, 2), (1, WRITES, 0), (3, WRITES, 0)]) == [2, 2, 3]


class TestPool:
    def test_buffers_come_in_order_of_asking(self) -> None:
        env = simpy.Environment()
        pool = Pool(env, 1)
        taken = [pool.take() for _ in range(3)]
        assert [event.triggered for event in taken] == [True, False, False]
        pool.give(env.timeout(5, "first"))
        pool.give(env.timeout(2, "second"))
        env.run()
        assert [event.value for event in taken[1:]] == ["second", "first"]

    def test_it_grows_only_where_nothing_is_on_its_way_back(self) -> None:
        env = simpy.Environment()
        pool = Pool(env, 1)
        pool.take()
        back = env.timeout(1)
        pool.give(back)
        waiting = pool.take_or_grow()
        assert not waiting.triggered  # for the one on its way
        assert pool.take_or_grow().triggered  # the next would wait for nobody
        assert pool.grown == 1
        env.run()
        assert waiting.triggered
