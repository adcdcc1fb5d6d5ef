"""What holds of every simulated step, whatever the model, the machine, and the division of work."""

from dataclasses import replace
from math import isclose

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.simulator.examples import Case, cases
from tests.trace.legal import Act, check_order, check_times

from weightstream.schedule.flows import flows_of
from weightstream.schedule.operations import (
    Backward,
    Fetch,
    Forward,
    Load,
    Operation,
    Reduce,
    Restore,
    Schedule,
    Spill,
    Turn,
    Update,
    Write,
)
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Disk, Hardware
from weightstream.simulator.simulator import Simulation, _Run, _schedules, simulate

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEARLY = 1 + 1e-9  # what rounding adds up to


def run(case: Case, **changes: object) -> Simulation:
    found = replace(case, **changes)  # type: ignore[arg-type]
    return simulate(found.facts, found.allotment, found.durations, found.hardware, keep_spans=True)


@QUICK
@given(cases())
def test_a_step_ends_within_its_memory_and_takes_as_long_as_what_it_does(case: Case) -> None:
    found = run(case)
    assert found.peak_device_bytes <= case.allotment.device_bytes
    assert found.peak_host_bytes <= case.allotment.host_bytes
    flows = flows_of(case.facts, case.allotment, ranks=case.hardware.cluster.size)
    assert (flows.down.planned, flows.up.planned) == (found.down_bytes, found.up_bytes)
    for name, seconds in found.busy_s.items():
        assert seconds <= found.step_s * NEARLY, name
    assert isclose(sum(found.path_s.values()), found.step_s, rel_tol=1e-9, abs_tol=1e-9)
    assert found.waited_s <= found.step_s * NEARLY
    for span in found.spans:
        assert span.begin_s <= span.begin_s + span.waited_s <= span.end_s * NEARLY + 1e-9, span


@QUICK
@given(cases())
def test_operations_begin_in_a_legal_order(case: Case) -> None:
    found = run(case)
    check_order(found.order, found.schedule, case.facts, case.allotment)


@QUICK
@given(cases())
def test_nothing_is_used_before_it_is_there_or_by_two_at_once(case: Case) -> None:
    """By the checker of the runtime's traces."""
    schedules = _schedules(case.facts, case.allotment, 3)
    carried_out = _Run(case.facts, case.allotment, case.durations, case.hardware, schedules, every_rank=True)
    carried_out.run(keep_spans=False)
    acts = [
        Act(
            rank.number,
            log.step,
            place(schedule, work.operation),
            work.operation,
            work.resource,
            work.begun_s,
            work.ended_s,
        )
        for rank in carried_out.ranks.values()
        for log, schedule in zip(rank.logs, schedules, strict=True)
        for work in log.works
        if work.operation is not None
    ]
    assert check_times(acts, dict(enumerate(schedules, start=1)), case.facts, case.allotment) > 0


def place(schedule: Schedule, operation: Operation) -> int:
    """Of this very operation, which may have equals; or of one that there is once."""
    found = [number for number, each in enumerate(schedule.operations) if each is operation]
    return found[0] if found else schedule.operations.index(operation)


@QUICK
@given(cases(alone=True), st.sampled_from([1024.0, 2.0**20]))
def test_the_bytes_of_a_step_are_those_of_its_operations(case: Case, rate: float) -> None:
    """Counted anew from the schedule: what is not pinned, not in RAM, and not just updated moves."""
    disk = Disk(read_bytes_per_s=rate, write_bytes_per_s=2 * rate)
    found = run(case, hardware=replace(case.hardware, disk=disk))
    facts, allotment = case.facts, case.allotment
    boundary = facts.boundary_bytes or (0,) * len(facts.visits)
    operations = found.schedule.operations
    read = written = 0
    just_updated: set[int] = set()
    for operation in operations:
        match operation:
            case Load(index):
                read += 0 if index in allotment.pinned_states else facts.blocks[index].load_bytes
            case Update(index):
                just_updated.add(index)
                if facts.deferred and index not in allotment.staged_in_ram:
                    read += facts.blocks[index].staged_bytes
            case Write(index):
                just_updated.discard(index)
                written += facts.blocks[index].record_bytes
            case Reduce(index):
                if facts.deferred and index not in allotment.staged_in_ram:
                    written += facts.blocks[index].staged_bytes
            case Fetch(index):
                if index not in just_updated and index not in allotment.pinned_copies:
                    read += facts.blocks[index].fetched_bytes
            case Spill(visit) if allotment.boundaries[visit] == "disk":
                written += boundary[visit]
            case Restore(visit) if allotment.boundaries[visit] == "disk":
                read += boundary[visit]
            case _:
                pass
    assert (found.read_bytes, found.written_bytes) == (read, written)
    flows = flows_of(facts, allotment)
    assert (flows.disk_read.planned, flows.disk_written.planned) == (read, written)


def scaled(durations: Durations, factor: float) -> Durations:
    def each(seconds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(factor * second for second in seconds)

    return Durations(
        forward=each(durations.forward), recompute=each(durations.recompute), backward=each(durations.backward),
        turn=factor * durations.turn, update=each(durations.update), reduce=each(durations.reduce),
        expand=each(durations.expand),
        overhead={kind: factor * seconds for kind, seconds in durations.overhead.items()},
        between_steps=factor * durations.between_steps,
    )  # fmt: skip


def faster(hardware: Hardware, factor: float) -> Hardware:
    disk, link = hardware.disk, hardware.link
    return replace(
        hardware,
        disk=disk and replace(
            disk, read_bytes_per_s=disk.read_bytes_per_s * factor, write_bytes_per_s=disk.write_bytes_per_s * factor,
            latency_s=disk.latency_s / factor,
        ),
        link=link and replace(link, bytes_per_s=link.bytes_per_s * factor, latency_s=link.latency_s / factor),
        memory_bytes_per_s=hardware.memory_bytes_per_s * factor,
        io_compute_s_per_byte=hardware.io_compute_s_per_byte / factor,
    )  # fmt: skip


@QUICK
@given(cases())
def test_a_machine_twice_as_fast_in_everything_takes_half_the_time(case: Case) -> None:
    slow = run(case)
    fast = run(case, durations=scaled(case.durations, 0.5), hardware=faster(case.hardware, 2.0))
    assert fast.step_s == slow.step_s / 2
    assert fast.waited_s == slow.waited_s / 2


@QUICK
@given(cases(quiet=True), st.integers(2, 4))
def test_where_nothing_is_shared_one_slow_rank_costs_at_most_its_factor(case: Case, factor: int) -> None:
    """Then a step is a longest path. Where queues are shared another order may win, so that nothing can be said."""
    even = run(case)
    for rank in case.hardware.cluster.compute_ranks:
        uneven = run(case, hardware=replace(case.hardware, slowdown={rank: float(factor)}))
        assert even.step_s <= uneven.step_s * NEARLY
        assert uneven.step_s <= factor * even.step_s * NEARLY


@QUICK
@given(cases(quiet=True))
def test_where_nothing_is_shared_a_faster_link_costs_nothing(case: Case) -> None:
    link = case.hardware.link
    if link is None:
        return
    quicker = replace(case.hardware, link=replace(link, bytes_per_s=3 * link.bytes_per_s))
    assert run(case, hardware=quicker).step_s <= run(case).step_s * NEARLY


@QUICK
@given(cases(quiet=True, alone=True))
def test_without_bytes_to_wait_for_a_step_is_its_compute(case: Case) -> None:
    """Counted anew from the schedule; seconds are multiples of 1/64, so that the sum is exact."""
    facts, durations = case.facts, case.durations
    found = run(case, hardware=replace(case.hardware, updates_beside=False))
    total = durations.between_steps
    for operation in found.schedule.operations:
        total += durations.overhead.get(type(operation).__name__.lower(), 0.0)
        match operation:
            case Forward(visit):
                total += durations.forward[visit]
            case Turn():
                total += durations.turn
            case Backward(visit):
                total += durations.backward[visit]
                if visit not in case.allotment.keep and visit != len(facts.visits) - 1:
                    total += durations.recompute[visit]
            case Update(block):
                total += durations.update[block]
            case Reduce(block):
                total += durations.reduce[block]
            case _:
                pass
    assert found.step_s == found.busy_s["compute"] == total
    assert found.waited_s == 0


@QUICK
@given(cases())
def test_one_rank_stands_for_all_that_do_the_same(case: Case) -> None:
    alike = simulate(case.facts, case.allotment, case.durations, case.hardware)
    every = simulate(case.facts, case.allotment, case.durations, case.hardware, every_rank=True)
    assert isclose(alike.step_s, every.step_s, rel_tol=1e-9)
    assert isclose(alike.first_step_s, every.first_step_s, rel_tol=1e-9)
    assert (alike.read_bytes, alike.written_bytes) == (every.read_bytes, every.written_bytes)
