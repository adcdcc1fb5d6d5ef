"""Predicts a step: lays out the schedules of a few steps in a row, and carries them out on a virtual clock.

Nothing is computed and no byte moves; what waits for what is as in the runtime. What goes on in the background at the end
of a step goes on into the next one, so that the last step is a steady one.
"""

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

import simpy

from weightstream.errors import PlanError
from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.operations import Commit, Fetch, Load, Operation, Reduce, Schedule, Update, Write, describe
from weightstream.schedule.planner import build
from weightstream.schedule.reduction import subtrees
from weightstream.schedule.verify import verify
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Hardware
from weightstream.simulator.machine import RECORDS, URGENT, WRITES, Fabric, Host, Work
from weightstream.simulator.programs import Program, programs, representatives
from weightstream.simulator.rank import Log, Rank
from weightstream.simulator.resources import Process
from weightstream.trace import Span


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a steady step comes to.

    Args:
        step_s, first_step_s: from the end of the step before to the end of this one, on the rank that ends last.
        busy_s: seconds of full use by resource, of the rank or host that is busiest with it. `compute` is time in which
            a rank computes, `cores` are all of a host, `down` and `up` the busiest link in each direction.
        utilisation: the same as a share of the step.
        waited_s: how long the compute of the rank that computes longest stood still for bytes.
        read_bytes, written_bytes: between host and disk, of the rank that moves most.
        down_bytes, up_bytes: what leaves and reaches all memory ranks together.
        peak_device_bytes, peak_host_bytes: of the rank that has most; buffers count whether they are full or not.
        binds: the resource with the greatest part in the critical path.
        spans: of all steps and simulated ranks, each from the beginning of its own step on.
        critical_path: from the end of the step backwards, each span with the one whose end let it begin behind it;
            times count from the beginning of the last step, and what began before it has negative ones.
        path_s: the critical path's seconds by resource; together they are the step.
        order: operations as they began, on one rank that computes; where that owns no records, with those of one that
            does.
    """

    step_s: float
    first_step_s: float
    busy_s: Mapping[str, float]
    utilisation: Mapping[str, float]
    waited_s: float
    read_bytes: int
    written_bytes: int
    down_bytes: int
    up_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    binds: str
    path_s: Mapping[str, float]
    critical_path: tuple[Span, ...]
    order: tuple[Operation, ...]
    schedule: Schedule
    spans: tuple[Span, ...] = ()


def simulate(
    facts: Facts,
    allotment: Allotment,
    durations: Durations,
    hardware: Hardware,
    *,
    steps: int = 3,
    keep_spans: bool = False,
    every_rank: bool = False,
) -> Simulation:
    """Carries out so many steps, of which the last is told about.

    Args:
        every_rank: simulate all ranks, also those that do the same as others at the same time.

    Raises:
        PlanError: the durations are of another model, or the micro-batches cannot be divided among the workers.
    """
    _check(facts, durations, hardware, steps)
    schedules = _schedules(facts, allotment, steps)
    return _Run(facts, allotment, durations, hardware, schedules, every_rank).run(keep_spans)


def _check(facts: Facts, durations: Durations, hardware: Hardware, steps: int) -> None:
    if steps < 1:
        raise PlanError(f"steps={steps}: expected at least 1")
    for what, expected in (("visits", len(facts.visits)), ("blocks", len(facts.blocks))):
        fields = ("forward", "recompute", "backward") if what == "visits" else ("update", "reduce", "expand")
        for name in fields:
            found = len(getattr(durations, name))
            if name == "expand" and not found:
                continue  # nothing is sparse
            if found != expected:
                raise PlanError(f"durations.{name} has {found} entries, the model has {expected} {what}")
    hardware.cluster.check(facts.micro_batches, facts.reduction_groups)


def _schedules(facts: Facts, allotment: Allotment, steps: int) -> list[Schedule]:
    """Steps in a row: with clipping each leaves its updates, and the records that it has begun to load, to the next."""
    touched = {visit.block for visit in facts.visits} | {b.index for b in facts.blocks if b.resident}
    trained = frozenset(b.index for b in facts.blocks if b.trainable and b.index in touched)
    made: dict[tuple[frozenset[int], tuple[int, ...]], Schedule] = {}
    schedules: list[Schedule] = []
    pending: frozenset[int] = frozenset()
    loaded: tuple[int, ...] = ()
    for _ in range(steps):
        schedule = made.get((pending, loaded))
        if schedule is None:
            schedule = made[pending, loaded] = build(facts, allotment, pending=pending, loaded=loaded)
            verify(schedule, facts, allotment)
        schedules.append(schedule)
        pending = trained if facts.deferred else frozenset()
        loaded = tuple(block for block in schedule.loads_next if block in pending)
    return schedules


Used = dict[tuple[str, int], float]
"""Resource and place (a host, a rank) → seconds of full use so far."""


@dataclass(slots=True)
class _Run:
    facts: Facts
    allotment: Allotment
    durations: Durations
    hardware: Hardware
    schedules: Sequence[Schedule]
    every_rank: bool
    env: simpy.Environment = field(default_factory=simpy.Environment)
    ranks: dict[int, Rank] = field(default_factory=dict)
    hosts: dict[int, Host] = field(default_factory=dict)
    used: list[Used] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    _fabric: Fabric | None = None
    _ended: Counter[int] = field(default_factory=Counter)

    def run(self, keep_spans: bool) -> Simulation:
        facts, hardware, cluster = self.facts, self.hardware, self.hardware.cluster
        groups = facts.reduction_groups
        shares = {rank: cluster.share(rank, facts.micro_batches, groups) for rank in range(cluster.size)}
        made = {id(schedule): programs(schedule, shares) for schedule in self.schedules}

        def steps_of(rank: int) -> list[Program]:
            return [by_rank[rank] for by_rank in made.values()]

        every = tuple(range(cluster.size))
        chosen = every if self.every_rank else representatives(hardware, shares, steps_of)
        images = max(len(subtrees(groups, cluster.groups_of(rank, groups))) for rank in cluster.compute_ranks)
        self._fabric = Fabric(self.env, hardware, len(chosen), images)
        self.hosts = {host: Host(self.env, hardware, host) for host in {hardware.hosts[rank] for rank in chosen}}
        counter = count()
        for rank in chosen:
            self.ranks[rank] = Rank(
                self.env, rank, facts, self.allotment, self.durations, hardware,
                self.hosts[hardware.hosts[rank]], self._fabric, shares[rank], counter,
            )  # fmt: skip
        loops = [self.env.process(self._loop(rank, made)) for rank in self.ranks.values()]
        with _without_collections():
            self.env.run()
        stuck = [rank.number for rank, loop in zip(self.ranks.values(), loops, strict=True) if loop.is_alive]
        assert not stuck, f"ranks {stuck} wait for ever in steps {[self.ranks[rank].log.step for rank in stuck]}"
        return self._told(keep_spans)

    def _loop(self, rank: Rank, made: Mapping[int, Mapping[int, Program]]) -> Process[None]:
        for number, schedule in enumerate(self.schedules):
            yield from rank.run(schedule, made[id(schedule)][rank.number])
            self._ended[number] += 1
            if self._ended[number] == len(self.ranks):
                self.ends_s.append(self.env.now)
                self.used.append(self._used())

    def _used(self) -> Used:
        found: Used = {}
        for number, host in self.hosts.items():
            found["cores", number] = host.cores.used_s()[0]
            found["memory", number] = host.memory.used_s()[0]
            if host.disk is not None:
                lanes = host.disk.used_s()
                found["read", number] = lanes[URGENT] + lanes[RECORDS]
                found["write", number] = lanes[WRITES]
        for number, rank in self.ranks.items():
            if rank.records is not None and self.hardware.updates_beside:
                found["optimizer", number] = rank.records.optimizer.used_s()[0]
        if self._fabric is not None and self.hardware.cluster.size > 1:
            found |= {(way, 0): seconds for way, seconds in self._fabric.used_s().items()}
        return found

    # what came of it

    def _told(self, keep_spans: bool) -> Simulation:
        ranks, schedule = list(self.ranks.values()), self.schedules[-1]
        begin_s = self.ends_s[-2] if len(self.ends_s) > 1 else 0.0
        step_s = self.ends_s[-1] - begin_s
        busy_s = self._busy_s()
        path, path_s = _critical_path(max(ranks, key=lambda rank: rank.log.end_s).log.last, begin_s, self.ends_s[-1])
        facts, several = self.facts, self.hardware.cluster.size > 1
        return Simulation(
            step_s=step_s,
            first_step_s=self.ends_s[0],
            busy_s=busy_s,
            utilisation={name: seconds / step_s if step_s else 0.0 for name, seconds in busy_s.items()},
            waited_s=max(ranks, key=lambda rank: _computed_s(rank.log)).log.waited_s,
            read_bytes=round(max(rank.log.read_bytes for rank in ranks)),
            written_bytes=round(max(rank.log.written_bytes for rank in ranks)),
            down_bytes=several * _sum_over(schedule, Fetch, [block.fetched_bytes for block in facts.blocks]),
            up_bytes=several * _sum_over(schedule, Reduce, [block.gradient_bytes for block in facts.blocks]),
            peak_device_bytes=max(rank.memory.peak_device_bytes for rank in ranks),
            peak_host_bytes=max(rank.peak_host_bytes for rank in ranks),
            binds=max(path_s, key=lambda name: path_s[name]) if path_s else "compute",
            path_s=path_s,
            critical_path=tuple(_span(work, begin_s) for work in path),
            order=self._order(),
            schedule=schedule,
            spans=self._spans() if keep_spans else (),
        )

    def _busy_s(self) -> dict[str, float]:
        before: Used = self.used[-2] if len(self.used) > 1 else {}
        found: dict[str, float] = {"compute": max(_computed_s(rank.log) for rank in self.ranks.values())}
        spent = {place: seconds - before.get(place, 0.0) for place, seconds in self.used[-1].items()}
        for (name, _), seconds in spent.items():
            found[name] = max(found.get(name, 0.0), seconds)
        return found

    def _order(self) -> tuple[Operation, ...]:
        computing = next(rank for rank in self.ranks.values() if rank.share)
        began = list(computing.log.began)
        if computing.records is None:
            owning = next(rank for rank in self.ranks.values() if rank.records)
            began += [each for each in owning.log.began if isinstance(each[2], Load | Update | Write | Commit)]
        return tuple(operation for _, _, operation in sorted(began, key=lambda each: each[:2]))

    def _spans(self) -> tuple[Span, ...]:
        logs = [log for rank in self.ranks.values() for log in rank.logs]
        return tuple(_span(work, log.begin_s) for log in logs for work in sorted(log.works, key=attrgetter("issued_s")))


@contextmanager
def _without_collections() -> Iterator[None]:
    """All that a simulation makes is kept to its end: collections would look through it again and again, for a fifth of the
    time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _computed_s(log: Log) -> float:
    return sum(work.ended_s - work.begun_s for work in log.works if work.resource == "compute")


def _sum_over(schedule: Schedule, kind: type[Fetch] | type[Reduce], nbytes: Sequence[int]) -> int:
    return sum(nbytes[operation.block] for operation in schedule.operations if isinstance(operation, kind))


def _critical_path(last: Work | None, begin_s: float, end_s: float) -> tuple[list[Work], dict[str, float]]:
    """The works that the end of a step waited for, back to its beginning, and their seconds by resource."""
    path: list[Work] = []
    seconds: dict[str, float] = defaultdict(float)
    work, until_s = last, end_s
    while work is not None and until_s > begin_s:
        path.append(work)
        from_s = max(min(work.begun_s, until_s), begin_s)
        seconds[work.resource] += until_s - from_s
        until_s, work = from_s, work.cause
    return path, dict(seconds)


def _span(work: Work, begin_s: float) -> Span:
    kind = "between" if work.operation is None else type(work.operation).__name__.lower()
    return Span(
        work.step, work.rank, kind, work.resource, describe(work.operation) if work.operation else "between steps",
        work.issued_s - begin_s, work.ended_s - begin_s, work.nbytes, work.begun_s - work.issued_s,
    )  # fmt: skip
