"""What the runtime leaves as its trace is a legal order of the schedule that it ran, and nothing is used before it is there.

By the same checker as the simulator's (`legal.py`), for random models, budgets and settings, under a disk that answers
whenever it likes.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.schedule.examples import smallest
from tests.trace.legal import Act, IllegalTimesError, check_order, check_times, order_of, through_scratch
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.fabric.local import run_ranks
from weightstream.runtime.runtime import Runtime
from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.operations import (
    Commit,
    Fetch,
    Forward,
    Load,
    Operation,
    Reduce,
    Restore,
    Schedule,
    Spill,
    Update,
    Write,
    describe,
)
from weightstream.schedule.verify import IllegalScheduleError
from weightstream.store import tiers
from weightstream.trace.spans import Span

WIDTH, ROWS = 32, 48  # inputs of blocks are large enough to be spilled
KNOWN, CHECKED = 2, 3
"""Steps until all is measured, and those that are checked; one more follows, in which the last ones' bytes come to rest."""

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and how slowly the disk answers."""

    inner: tuple[int, ...]
    order: tuple[int, ...]
    frozen: frozenset[int]
    root: bool
    micro_batches: int
    cluster: Cluster
    sparsity: ws.Sparsity | None
    kernels: bool
    slack: tuple[int, int]
    settings: dict[str, Any]
    seed: int


class Model(nn.Module):
    """Blocks in any order, some of them several times, maybe with parameters of its own between them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.order = case.order
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, inner), nn.Tanh(), nn.Linear(inner, WIDTH)) for inner in case.inner
        )
        for index in case.frozen:
            self.layers[index].requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(WIDTH)) if case.root else 1.0
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x) * self.scale
        return self.head(x).square().mean()


def loss_fn(model: nn.Module, micro_batch: Tensor) -> Tensor:
    return model(micro_batch)  # type: ignore[no-any-return]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 4))
    order = (*draw(st.permutations(range(count))), *draw(st.lists(st.integers(0, count - 1), max_size=2)))
    cluster = draw(st.sampled_from([Cluster(), Cluster(), Cluster(2), Cluster(1, 1)]))
    group = draw(
        st.sampled_from([
            None, None, {"algorithm": "static"}, {"algorithm": "set", "every": 2, "end": 40},
            {"algorithm": "rigl", "every": 2, "end": 40}, {"algorithm": "gmp", "every": 1, "begin": 1, "end": 8},
        ])
    )  # fmt: skip
    some = {
        "clip_norm": draw(st.sampled_from([None, 0.5])),
        "activations": draw(st.sampled_from(["auto", "recompute", "keep"])),
        "prefetch": draw(st.integers(1, 3)),
        "ram_tier": draw(st.booleans()),
        "precision": draw(st.sampled_from(["fp32", "bf16"])),
        "commit_every": draw(st.sampled_from([1, 1, 3])),
        "panel_elements": draw(st.sampled_from([None, 1024])),
    }  # fmt: skip
    return Case(
        inner=tuple(draw(st.lists(st.sampled_from([16, 64, 160]), min_size=count, max_size=count))),
        order=order,
        frozen=frozenset(draw(st.sets(st.integers(0, count - 1), max_size=1))),
        root=draw(st.booleans()),
        micro_batches=draw(st.integers(max(2, cluster.workers), 4)),
        cluster=cluster,
        sparsity=group and ws.Sparsity((ws.SparsityGroup(patterns=("layers.*",), sparsity=0.5, **group),)),
        kernels=group == {"algorithm": "static"} and some["precision"] == "fp32" and draw(st.booleans()),
        slack=(draw(st.sampled_from([0, 0, 1 << 16, 1 << 24])), draw(st.sampled_from([0, 0, 1 << 16, 1 << 24]))),
        settings=some,
        seed=draw(st.integers(0, 1 << 16)),
    )


class Dawdling(tiers.Device):
    """A disk that takes its time, now more and now less."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def _dawdle(self) -> None:
        time.sleep(self._random.choice((0, 0, 0, 0.0005, 0.003)))

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        self._dawdle()
        return super().read(handle, view, offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        self._dawdle()
        return super().write(handle, view, offset)


@dataclass
class Watched:
    """An engine whose steps are kept: schedules, and what was done for them by one clock."""

    engine: ws.Engine
    schedules: dict[int, Schedule] = field(default_factory=dict)
    ran: dict[str, list[tuple[int, int | None, float, float]]] = field(default_factory=lambda: defaultdict(list))
    moved: list[tuple[Span, float]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.engine._plan

        def noted(micro_batches: int) -> Schedule:
            self.schedules[self.engine.step_count + 1] = found = plan(micro_batches)
            return found

        self.engine._plan = noted  # type: ignore[method-assign]

    def step(self, count: int) -> None:
        dtype = torch.bfloat16 if self.engine.precision == "bf16" else torch.float32
        generator = torch.Generator().manual_seed(self.engine.step_count)
        every = [torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(count)]
        self.engine.step(every, loss_fn)
        self._note()

    def _note(self) -> None:
        recorder, step = self.engine.recorder, self.engine.step_count
        origin = recorder._steps[-1].began_s
        places: dict[str, list[int]] = defaultdict(list)
        for place, operation in enumerate(self.schedules[step].operations):
            places[describe(operation)].append(place)
        for span in recorder.spans():
            if span.resource != "compute":
                self.moved.append((span, origin))
            elif span.kind != "between":
                place = places[span.what].pop(0) if places[span.what] else None  # of no schedule
                self.ran[span.what].append((step, place, origin + span.begin_s, origin + span.end_s))

    def acts(self) -> list[Act]:
        """All that was done for schedules. Bytes belong to the last time that their operation was issued before."""
        found = []
        for issued in self.ran.values():
            for step, place, begin_s, end_s in issued:
                if place is not None:
                    # what a reduction waits for comes after its own sum is on its way, which an owner may have updated with
                    reduces = isinstance(self.schedules[step].operations[place], Reduce)
                    works_s = begin_s if reduces else self._works_from(begin_s, end_s)
                    found.append(self._act(step, place, "compute", (works_s, end_s)))
        for span, origin in self.moved:
            begin_s, end_s = origin + span.begin_s + span.waited_s, origin + span.end_s
            before = [each for each in self.ran.get(span.what, ()) if each[2] <= begin_s]
            if before and before[-1][1] is not None:
                found.append(self._act(before[-1][0], before[-1][1], span.resource, (begin_s, end_s)))
        return found

    def _act(self, step: int, place: int, resource: str, times_s: tuple[float, float]) -> Act:
        return Act(self.engine.rank, step, place, self.schedules[step].operations[place], resource, *times_s)

    def _works_from(self, begin_s: float, end_s: float) -> float:
        """When an operation stopped waiting for what it needs."""
        return max((end for begin, end in self.waits if begin >= begin_s and end <= end_s), default=begin_s)


@contextmanager
def watched(case: Case, store: Path, links: Any, **budgets: int) -> Iterator[Watched]:
    kernels: Any = {"layers.*.weight": "csr"} if case.kernels else None
    several = {} if links is None else {"cluster": case.cluster, "links": links}
    with ws.Engine(
        lambda: Model(case), store, ws.AdamW(lr=1e-3), threads_per_worker=1, reduction_groups=4, seed=case.seed,
        sparsity=case.sparsity, kernels=kernels, max_block_bytes="1MiB", **several, **budgets, **case.settings,
    ) as engine:  # fmt: skip
        yield Watched(engine)


@contextmanager
def noted_waits() -> Iterator[dict[int, list[tuple[float, float]]]]:
    """By rank, when the runtime waited."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    wait = Runtime.wait

    def noting(self: Runtime, future: "Future[Any]") -> Any:
        began_s = time.perf_counter()
        try:
            return wait(self, future)
        finally:
            found[self.peers.rank].append((began_s, time.perf_counter()))

    with mock.patch.object(Runtime, "wait", noting):
        yield found


@dataclass(frozen=True)
class Trained:
    """What is left of a run on one rank: the steps that are checked, and all that was done."""

    schedules: dict[int, Schedule]
    facts: Facts
    allotment: Allotment
    acts: list[Act]
    cut: frozenset[int]
    computes: bool


def run(case: Case, folder: Path) -> list[Trained]:
    """Trains with plenty of memory until all is measured, then within the least that is enough, or some more."""

    def work(links: Any) -> Trained:
        with watched(case, folder / "store", links) as first:
            for _ in range(KNOWN):
                first.step(case.micro_batches)
            facts = first.engine.runtime.facts
        least = {budget: smallest(facts, budget) for budget in ("device_memory", "host_memory")}
        budgets = {name: nbytes + more for (name, nbytes), more in zip(least.items(), case.slack, strict=True)}
        with watched(case, folder / "store", links, **budgets) as found:
            for _ in range(KNOWN):
                found.step(case.micro_batches)
            runtime = found.engine.runtime
            for _ in range(CHECKED + 1):
                found.step(case.micro_batches)
            assert found.engine.runtime is runtime
            found.waits = waits[found.engine.rank]
            begin = found.engine.step_count - CHECKED
            schedules = {step: found.schedules[step] for step in range(begin, begin + CHECKED)}
            units = Counter(unit.block for unit in found.engine.store.units)
            cut = frozenset(block for block, count in units.items() if count > 1)
            return Trained(schedules, runtime.facts, runtime.allotment, found.acts(), cut, found.engine.computes)

    device = Dawdling(case.seed)
    with noted_waits() as waits, mock.patch.object(tiers, "Device", return_value=device):
        return run_ranks(case.cluster, work) if case.cluster.size > 1 else [work(None)]


def check(trained: Sequence[Trained]) -> int:
    acts, first = [act for each in trained for act in each.acts], trained[0]
    for rank, each in enumerate(trained):
        assert (each.schedules, each.facts, each.allotment) == (first.schedules, first.facts, first.allotment)
        for step, schedule in first.schedules.items():
            if each.computes:
                buffers = None if len(trained) == 1 else len(first.facts.blocks)  # each rank has its own
                order = order_of(acts, schedule, step, rank, through_scratch(first.facts, first.allotment))
                check_order(order, schedule, first.facts, first.allotment, buffers=buffers)
    return check_times(acts, first.schedules, first.facts, first.allotment, first.cut)


def trained_in(case: Case) -> list[Trained]:
    with TemporaryDirectory() as folder:
        return run(case, Path(folder))


SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(SLOW, max_examples=3, derandomize=True)
@given(cases())
def test_what_the_runtime_did_was_legal(case: Case) -> None:
    assert check(trained_in(case)) > 0


@pytest.mark.slow
@settings(SLOW, max_examples=15)
@given(cases())
def test_what_the_runtime_did_was_legal_in_many_cases(case: Case) -> None:
    assert check(trained_in(case)) > 0


# what the checker refuses

SIMPLE = Case(
    inner=(64, 64, 64), order=(0, 1, 2), frozen=frozenset(), root=True, micro_batches=2, cluster=Cluster(), sparsity=None,
    kernels=False, slack=(0, 0), seed=1, settings={"clip_norm": 0.5, "activations": "recompute", "ram_tier": False},
)  # fmt: skip


def test_a_rank_may_be_late_in_noting_what_it_has_sent() -> None:
    """Its sum is with the owner, who updates at once, before it looks at what else is on its way."""
    settle = Runtime.settle

    def late(self: Runtime, block: int) -> None:
        time.sleep(0.01)
        settle(self, block)

    with mock.patch.object(Runtime, "settle", late):
        case = replace(SIMPLE, cluster=Cluster(1, 1), settings=SIMPLE.settings | {"clip_norm": None})
        assert check(trained_in(case)) > 0


@pytest.fixture(scope="module")
def simple() -> Trained:
    (found,) = trained_in(SIMPLE)
    assert check([found]) > 100
    return found


def of(acts: Sequence[Act], kind: type[Operation], resource: str, step: int) -> Act:
    """The last such act of a step, not of the resident block."""
    return max(
        (a for a in acts if isinstance(a.operation, kind) and (a.resource, a.step) == (resource, step)
         and getattr(a.operation, "block", 1) != 0),
        key=lambda act: act.begin_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "resource", "earlier_s", "later_s"),
    [
        (Fetch, "read", 0.0, 1.0),  # ends after it was computed with
        (Fetch, "read", 1.0, 0.0),  # begins while its slab is in use
        (Load, "read", 0.0, 1.0),
        (Update, "compute", 1.0, 0.0),
        (Write, "write", 1.0, 0.0),
        (Write, "write", 0.0, 1.0),
        (Reduce, "write", 0.0, 1.0),
        (Spill, "write", 1.0, 0.0),
        (Restore, "read", 0.0, 1.0),
        (Restore, "read", 1.0, 0.0),
        (Commit, "manifest", 1.0, 0.0),
        (Forward, "compute", 1.0, 0.0),
    ],
)
def test_a_trace_that_is_not_legal_is_refused(
    simple: Trained, kind: type[Operation], resource: str, earlier_s: float, later_s: float
) -> None:
    step = sorted(simple.schedules)[1]
    wrong = of(simple.acts, kind, resource, step)
    moved = replace(wrong, begin_s=wrong.begin_s - earlier_s, end_s=wrong.end_s + later_s)
    acts = [moved if act is wrong else act for act in simple.acts]
    with pytest.raises(IllegalTimesError):
        check_times(acts, simple.schedules, simple.facts, simple.allotment, simple.cut)


def test_what_is_missing_is_missed(simple: Trained) -> None:
    step, schedule = next(iter(simple.schedules.items()))
    order = order_of(simple.acts, schedule, step, 0, through_scratch(simple.facts, simple.allotment))
    for place in range(len(order)):
        with pytest.raises((IllegalScheduleError, AssertionError)):
            check_order(order[:place] + order[place + 1 :], schedule, simple.facts, simple.allotment)
