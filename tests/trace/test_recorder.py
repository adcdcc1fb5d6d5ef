"""What a real step leaves as spans: the schedule's operations in order, every byte once, nothing on two places at once."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.engine.steps import StepResult
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.schedule.operations import Load, Schedule, Update, describe
from weightstream.schedule.verify import verify
from weightstream.trace.recorder import SHARE, WARM_UP_STEPS, Recorder
from weightstream.trace.spans import Span, shares, totals

WIDTH, ROWS = 64, 64


pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(5)
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).float().square().mean()


def loss_fn(model: nn.Module, micro_batch: Tensor) -> Tensor:
    return model(micro_batch)  # type: ignore[no-any-return]


class Traced:
    """An engine whose schedules are noted."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine = ws.Engine(
            Model, folder / "store", ws.AdamW(lr=1e-3), **{"threads_per_worker": 1, "prefetch": 2} | settings
        )
        self.schedule: Schedule | None = None
        plan = self.engine._plan

        def noted(micro_batches: int) -> Schedule:
            self.schedule = plan(micro_batches)
            return self.schedule

        self.engine._plan = noted  # type: ignore[method-assign]

    def step(self, micro_batches: int = 3) -> StepResult:
        dtype = torch.bfloat16 if self.engine.precision == "bf16" else torch.float32
        return self.engine.step([torch.randn(ROWS, WIDTH, dtype=dtype) for _ in range(micro_batches)], loss_fn)


# nothing stays in memory: gradients wait on disk, and so do activations where the device has no room for them
TIGHT = {"ram_tier": False, "host_memory": "600KiB", "device_memory": "600KiB", "activations": "recompute"}
CASES = pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": None, "ram_tier": False},
        {"clip_norm": 1.0, "ram_tier": False, "precision": "bf16"},
        {"clip_norm": 1.0},
        {"clip_norm": 1.0} | TIGHT,
        {"clip_norm": None} | TIGHT,
    ],
    ids=["no clip", "clip", "in memory", "clip, tight", "no clip, tight"],
)


@CASES
def test_a_step_is_its_schedule_and_its_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    traced = Traced(tmp_path, **settings)
    engine, store = traced.engine, traced.engine.store
    before, ram_before = _disk(store), _ram(store)
    moved, ram = [0, 0], 0
    for _ in range(4):
        result = traced.step()
        spans = engine.recorder.spans()
        assert {(span.step, span.rank) for span in spans} == {(engine.step_count, 0)}
        _check_order(traced, [span for span in spans if span.resource == "compute"])
        found = [sum(span.nbytes for span in spans if span.resource == way) for way in ("read", "write")]
        assert found == [result.bytes.read, result.bytes.written]
        moved = [sum(pair) for pair in zip(moved, found, strict=True)]
        ram += sum(span.nbytes for span in spans if span.resource == "memory")
        assert all(span.end_s >= span.begin_s and span.waited_s >= 0 and span.busy_s >= 0 for span in spans)
        assert max(span.end_s for span in spans) <= result.elapsed_s
    engine.commit()
    rest = engine.recorder.end()
    assert [sum(pair) for pair in zip(moved, rest, strict=True)] == [
        now - then for now, then in zip(_disk(store), before, strict=True)
    ]
    ram += sum(span.nbytes for span in engine.recorder.spans() if span.resource == "memory")
    assert ram == _ram(store) - ram_before
    engine.close()


def _check_order(traced: Traced, ran: list[Span]) -> None:
    """The compute track is a legal order of the plan, namely the plan's own, and one thing at a time."""
    schedule = traced.schedule
    assert schedule is not None
    between, ran = [s for s in ran if s.kind == "between"], [s for s in ran if s.kind != "between"]
    assert between[0].begin_s == 0
    assert between[0].end_s <= ran[-1].begin_s
    assert between[1].begin_s >= ran[-1].end_s
    if traced.engine.step_count < 3:  # what the step before left was applied before memory was divided anew
        ran = ran[-len(schedule.operations) :]
    by_name = {describe(operation): operation for operation in schedule.operations}
    operations = tuple(by_name[span.what] for span in ran)
    assert [span.kind for span in ran] == [type(operation).__name__.lower() for operation in operations]
    verify(replace(schedule, operations=operations), traced.engine.runtime.facts, traced.engine.allotment)
    assert operations == schedule.operations
    assert all(one.end_s <= other.begin_s for one, other in pairwise(ran))


def _disk(store: Any) -> list[int]:
    found = [moved for (tier, _), moved in store.counters.items() if tier == "disk"]
    return [sum(moved[way] for moved in found) for way in ("read", "written")]


def _ram(store: Any) -> int:
    return sum(sum(moved.values()) for (tier, _), moved in store.counters.items() if tier == "ram")


def test_what_is_moved_lies_on_its_track_under_its_operations_name(tmp_path: Path) -> None:
    traced = Traced(tmp_path, clip_norm=1.0, **TIGHT)
    for _ in range(3):
        traced.step()
    spans = traced.engine.recorder.spans()
    moved = [span for span in spans if span.resource != "compute"]
    assert {(span.kind, span.resource) for span in moved} == {
        ("load", "read"), ("fetch", "read"), ("restore", "read"),
        ("write", "write"), ("reduce", "write"), ("spill", "write"), ("commit", "manifest"),
    }  # fmt: skip
    assert traced.schedule is not None
    names = {describe(operation) for operation in traced.schedule.operations}
    assert {span.what for span in moved} <= names
    ran = {span.what: span for span in spans if span.resource == "compute"}
    for span in moved:
        if span.kind in ("fetch", "write", "spill", "restore", "commit"):  # none of these was issued by the step before
            assert span.begin_s >= min(s.begin_s for s in spans if s.what == span.what and s.resource == "compute")
    layouts = traced.engine.store.layouts.units
    writes = {span.what: span.nbytes for span in moved if span.kind == "write"}
    for unit in traced.engine.store.units:
        block = [u.index for u in traced.engine.store.units if u.block == unit.block]
        image = sum(layouts[u].header_nbytes + sum(part.nbytes for part in layouts[u].parts) for u in block)
        assert writes[f"Write({unit.block})"] == image
    assert ran.keys() - {"between steps"} == names
    traced.engine.close()


def test_what_is_moved_outside_of_steps_belongs_to_none(tmp_path: Path) -> None:
    traced = Traced(tmp_path, clip_norm=None, ram_tier=False)
    engine = traced.engine
    traced.step()
    engine.commit()
    engine.recorder.end()
    before = _disk(engine.store)
    with engine.module() as model, torch.no_grad():
        loss_fn(model, torch.randn(ROWS, WIDTH))
    since = _disk(engine.store)
    assert since[0] > before[0]
    moved = traced.step().bytes
    _check_order(traced, [span for span in engine.recorder.spans() if span.resource == "compute"])
    engine.commit()
    read, written = engine.recorder.end()
    assert [moved.read + read, moved.written + written] == [
        now - then for now, then in zip(_disk(engine.store), since, strict=True)
    ]
    engine.close()


def test_a_slow_disk_shows_as_waiting_not_as_work(tmp_path: Path) -> None:
    """A load that gets no buffer before another record is written waits; it does not read."""
    recorder = Recorder(0, [0, 1])
    recorder.begin(1)
    start = recorder._now.began_s = time.perf_counter() - 10
    recorder.ran(Load(1), start, start + 0.001, 0.0)
    recorder.ran(Update(1), start + 0.001, start + 9, 8.0)
    recorder.log.note("states", 1, "read", start + 5, start + 7, 100)
    recorder.log.note("states", 1, "read", start + 6, start + 8, 50)
    assert recorder.end() == (150, 0)
    load = next(span for span in recorder.spans() if span.resource == "read")
    assert (load.kind, load.what, load.nbytes) == ("load", "Load(1)", 150)
    assert load.waited_s == pytest.approx(5, abs=0.01)
    assert load.busy_s == pytest.approx(3, abs=0.01)
    assert totals(recorder.spans())["update", "compute"].seconds == pytest.approx(1, abs=0.01)


def test_a_record_and_its_gradient_are_read_by_one_operation_each_in_its_time() -> None:
    """The gradient is read ahead of the record that waits for a buffer: the disk does not work for it meanwhile."""
    recorder = Recorder(0, [0])
    recorder.begin(1)
    start = recorder._now.began_s = time.perf_counter() - 10
    recorder.ran(Load(0), start, start + 0.001, 0.0)
    recorder.log.note("scratch", ("gradient", 0), "read", start + 1, start + 2, 100)
    recorder.log.note("states", 0, "read", start + 7, start + 8, 300)
    recorder.end()
    gradient, record = (span for span in recorder.spans() if span.resource == "read")
    assert [(each.what, each.nbytes) for each in (gradient, record)] == [("Load(0)", 100), ("Load(0)", 300)]
    assert totals(recorder.spans())["load", "read"].seconds == pytest.approx(2, abs=0.01)


def test_a_resource_is_shared_by_what_it_works_for() -> None:
    busy = [(0.0, 4.0, "load"), (2.0, 6.0, "fetch"), (2.0, 4.0, "fetch"), (8.0, 9.0, "load")]
    found = shares(busy)
    assert found["load"] == pytest.approx(2 + 2 / 3 + 1)
    assert found["fetch"] == pytest.approx(2 * 2 / 3 + 2)
    assert sum(found.values()) == pytest.approx(7)  # the time in which it was busy at all


def test_totals_leave_out_the_first_steps_and_cost_next_to_nothing() -> None:
    recorder = Recorder(0, [0])
    for step in range(1, 200):
        recorder.begin(step)
        for _ in range(20):
            now = time.perf_counter()
            recorder.ran(Load(0), now, now, 0.0)
        time.sleep(0.0002)
        recorder.end()
    elapsed_s = time.perf_counter() - recorder._first_s
    longest_s = 0.05  # one step's totals may be made before it is known what they cost
    assert recorder._spent_s <= SHARE * elapsed_s + longest_s
    assert 1 <= recorder.steps < 199 - WARM_UP_STEPS
    assert recorder.totals["load", "compute"].count == 20 * recorder.steps


def test_between_a_memory_rank_and_a_worker_every_byte_lies_on_the_link(tmp_path: Path) -> None:
    cluster = Cluster(workers=1, memory=1)

    def work(links: Links) -> tuple[list[Span], list[int]]:
        spans: list[Span] = []
        traced = Traced(tmp_path, clip_norm=None, cluster=cluster, links=links)
        for _ in range(4):
            traced.step()
            spans += traced.engine.recorder.spans()
        traced.engine.commit()
        traced.engine.recorder.end()
        spans += traced.engine.recorder.spans()
        down, up = links.down.traffic, links.up.traffic
        moved = [traffic.total() for traffic in (down.sent, down.received, up.sent, up.received)]
        traced.engine.close()
        return spans, moved

    (memory, moved_there), (worker, moved_here) = run_ranks(cluster, work)
    assert [bool(nbytes) for nbytes in moved_there] == [True, False, False, True]
    assert moved_here == [moved_there[1], moved_there[0], moved_there[3], moved_there[2]]
    for spans, rank in ((memory, 0), (worker, 1)):
        assert {span.rank for span in spans} == {rank}
        found = {resource: [span for span in spans if span.resource == resource] for resource in ("down", "up")}
        assert sum(span.nbytes for span in found["down"]) == max(moved_there[:2])
        assert sum(span.nbytes for span in found["up"]) == max(moved_there[2:])
        assert {span.kind for span in found["down"]} == {"fetch"}
        assert {span.kind for span in found["up"]} == {"reduce"}
        assert all(span.what.startswith(("Fetch(", "Reduce(")) for span in found["down"] + found["up"])
    computed = ("forward", "backward", "turn")
    assert not any(span.kind in computed for span in memory)
    assert sum(span.kind == "forward" for span in worker) == 4 * 3 * 6
