"""What a job comes to: one steady step on the virtual clock, and what follows from it for a whole run.

Two short cuts keep large jobs quick, and tests compare them with the whole: layers are alike, so that of a deep model two
shorter ones are simulated, and the difference goes on; without stragglers all systems do the same at the same time, so
that one of them stands for many.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, expm1, log
from random import Random

from weightstream.cluster import Cluster
from weightstream.errors import PlanError
from weightstream.schedule.planner import build
from weightstream.simulator.jobs import Job, Prepared, prepare, shortened
from weightstream.simulator.simulator import Simulation, simulate
from weightstream.trace import Span

MOST_OPERATIONS = 40_000
"""Forward and backward operations of a step up to which a model is simulated with all its layers, or system by system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A steady step of a job.

    Args:
        busy_s: by resource, seconds that it works, of the rank whose it is busiest.
        down_bytes, up_bytes: through the link of one system.
        critical_path: seconds by kind of operation, along the chain that made the step as long as it is.
        path_s: the same by resource.
        layers: how many were simulated; fewer than the model has if two shorter models stand for it.
    """

    prepared: Prepared
    step_s: float
    busy_s: Mapping[str, float]
    down_bytes: float
    up_bytes: float
    read_bytes: float
    written_bytes: float
    critical_path: Mapping[str, float]
    path_s: Mapping[str, float]
    layers: int
    spans: Sequence[Span] = ()

    @property
    def job(self) -> Job:
        return self.prepared.job

    @property
    def samples_per_s(self) -> float:
        return self.job.batch / self.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.job.tokens / self.step_s

    @property
    def utilisation(self) -> dict[str, float]:
        """By resource, the share of the step in which it works."""
        return {resource: busy / self.step_s for resource, busy in sorted(self.busy_s.items())}

    @property
    def compute_share(self) -> float:
        """The share of the step in which a system computes: 1 if nothing makes it wait; less than `Job.compute_s` where
        activations are kept."""
        return min(self.job.compute_s, self.busy_s["compute"]) / self.step_s

    @property
    def binds(self) -> str:
        """The resource with the greatest part in the critical path."""
        return max(self.path_s, key=lambda resource: self.path_s[resource], default="compute")

    @property
    def watts(self) -> float:
        return self.job.cluster.watts * self.job.workers + self.job.cluster.host_watts

    def hours(self, tokens: float) -> float:
        """To train with so many tokens, nothing failing."""
        return tokens / self.tokens_per_s / 3600

    def energy_kwh(self, tokens: float) -> float:
        """For so many tokens, all systems at their full power."""
        return self.hours(tokens) * self.watts / 1000


def run(job: Job, *, every_system: bool = False, keep_spans: bool = False) -> Outcome:
    """Plans a job and simulates a steady step of it.

    Args:
        every_system: simulate each of them; by default those that do the same at the same time once.

    Raises:
        PlanError: it does not fit its cluster.
    """
    plan = prepare(job)
    one = plan if every_system else one_for_all(plan)
    if plan.layers < job.model.layers or one.operations > MOST_OPERATIONS:
        return _by_two(plan, every_system=every_system, keep_spans=keep_spans)
    return _outcome(plan, plan, _simulate(plan, every_system, keep_spans))


def one_for_all(plan: Prepared) -> Prepared:
    """One system that is as far from the store as the farthest of all is, and does what each of them does."""
    job, link = plan.job, plan.hardware.link
    if not job.cluster.apart or job.workers == 1 or job.slowdown or link is None:
        return plan
    far = replace(link, latency_s=link.fill_s(job.workers))
    return replace(
        plan, facts=replace(plan.facts, micro_batches=plan.each, reduction_groups=1),
        hardware=replace(plan.hardware, cluster=Cluster(1, 1), hosts=(0, 1), link=far),
    )  # fmt: skip


def _simulate(plan: Prepared, every_system: bool, keep_spans: bool) -> Simulation:
    if not every_system and plan.operations > MOST_OPERATIONS:
        plan = one_for_all(plan)
    return simulate(
        plan.facts, plan.allotment, plan.durations, plan.hardware, keep_spans=keep_spans, every_rank=every_system
    )


def operations_of(prepared: Prepared) -> int:
    """All operations of a step's schedule, the ones that only move bytes included."""
    return len(build(prepared.facts, prepared.allotment).operations)


def _by_two(whole: Prepared, *, every_system: bool, keep_spans: bool) -> Outcome:
    """Two shorter models of the same layers; from the one to the other a step grows as it goes on growing."""
    model = whole.job.model
    per_layer = max(1.0, (whole.blocks - 2) / model.layers)
    least = 6 * whole.allotment.slabs / per_layer  # enough that what stays in slabs is the same in both
    short = -(-ceil(least) // model.expert_every) * model.expert_every
    long = min(2 * short, model.layers)
    plans = [shortened(whole, layers) for layers in (short, long)]
    first, second = (_outcome(whole, plan, _simulate(plan, every_system, keep_spans)) for plan in plans)
    rest = (model.layers - long) / (long - short)

    def on(one: float, two: float) -> float:
        return two + (two - one) * rest

    def on_all(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
        return {key: on(one.get(key, 0.0), value) for key, value in two.items()}

    return replace(
        second, step_s=on(first.step_s, second.step_s), busy_s=on_all(first.busy_s, second.busy_s),
        down_bytes=on(first.down_bytes, second.down_bytes), up_bytes=on(first.up_bytes, second.up_bytes),
        read_bytes=on(first.read_bytes, second.read_bytes), written_bytes=on(first.written_bytes, second.written_bytes),
        critical_path=on_all(first.critical_path, second.critical_path), path_s=on_all(first.path_s, second.path_s),
    )  # fmt: skip


def stragglers(workers: int, spread: float, seed: int) -> dict[int, float]:
    """How much slower each system is: 1 + |x|, x normal around 0 with this spread; the same for the same seed."""
    numbers = Random(seed)
    return {worker: 1 + abs(numbers.gauss(0, spread)) for worker in range(workers)}


@dataclass(frozen=True, slots=True)
class Failures:
    """Systems fail by themselves, each at `rate_per_hour`; after `recovery_s` the step that was under way is made again.

    That a failure costs the step in flight and no more is what a commit at the end of each step gives (with clipping two
    steps). A failure while recovering starts the recovery anew.
    """

    rate_per_hour: float
    recovery_s: float

    def goodput(self, step_s: float, workers: int, *, steps_lost: int = 1) -> float:
        """The share of time that ends in committed steps.

        For failures at rate Λ of all systems together, work of length τ that is lost as a whole and recovery R, its
        expected time is e^(ΛR)·(e^(Λτ)-1)/Λ (Daly 2006, Future Generation Computer Systems 22, equation 13, with
        nothing to write; a first order in Λ of it is Young 1974). Goodput is τ over that.
        """
        rate = self.rate_per_hour * workers / 3600
        if rate <= 0:
            return 1.0
        work = step_s * steps_lost
        if rate * (work + self.recovery_s) > 700:  # beyond what a float holds: it never gets through
            return 0.0
        return rate * work / (exp(rate * self.recovery_s) * expm1(rate * work))


def counts_to(workers: int) -> list[int]:
    """1, 2, 4 and so on, and the last one itself."""
    powers = [1 << power for power in range(int(log(workers, 2)) + 1)]
    return powers if powers[-1] == workers else [*powers, workers]


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scaling curve: `efficiency` is tokens per second and system against the fewest that work."""

    workers: int
    step_s: float
    tokens_per_s: float
    efficiency: float
    binds: str


def curve(job: Job, *, per_system: bool = False, known: Outcome | None = None) -> list[Point]:
    """Throughput on 1 to `job.workers` systems, with the same batch in all, or the same batch for each system.

    Systems that are too few for the batch (its activations do not fit them) have no point.

    Args:
        known: an outcome of a job like this one, which is not simulated again.

    Raises:
        PlanError: even all of them are too few.
    """
    points: list[Point] = []
    for workers in counts_to(job.workers):
        batch = job.batch / job.workers * workers if per_system else job.batch
        try:
            found = _unless_known(replace(job, workers=workers, batch=batch, slowdown={}), known)
        except PlanError:
            if workers == job.workers:
                raise
            continue
        rate = found.tokens_per_s / workers
        first = points[0].tokens_per_s / points[0].workers if points else rate
        points.append(Point(workers, found.step_s, found.tokens_per_s, rate / first, found.binds))
    return points


def least_batch(job: Job, share: float, *, known: Outcome | None = None) -> int | None:
    """The fewest sequences, all systems together, with which they compute for this share of a step.

    None if their activations would not fit before that. `known` is as in `curve`.
    """

    def enough(each: int) -> bool | None:
        try:
            return _unless_known(replace(job, batch=each * job.workers), known).compute_share >= share
        except PlanError:
            return None

    high = 1
    while not (reached := enough(high)):
        if reached is None:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high * job.workers


def _unless_known(job: Job, known: Outcome | None) -> Outcome:
    return known if known is not None and known.job == job else run(job)


def _outcome(whole: Prepared, simulated: Prepared, found: Simulation) -> Outcome:
    path: defaultdict[str, float] = defaultdict(float)
    for span in found.critical_path:
        path[span.kind] += span.busy_s
    return Outcome(
        prepared=whole, step_s=found.step_s, busy_s=dict(found.busy_s), down_bytes=found.down_bytes,
        up_bytes=found.up_bytes, read_bytes=found.read_bytes, written_bytes=found.written_bytes,
        critical_path=dict(path), path_s=dict(found.path_s), layers=simulated.layers,
        spans=found.spans,
    )  # fmt: skip
