"""Every plan is legal, whatever the facts; what is not legal is refused by the operation's name."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.schedule.examples import chain, plan, tight_facts

from weightstream.schedule.allotment import Facts, allot
from weightstream.schedule.operations import (
    Backward,
    Commit,
    Evict,
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
    Visit,
    Write,
    describe,
)
from weightstream.schedule.planner import build
from weightstream.schedule.verify import IllegalScheduleError, verify


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tight_facts(), st.data())
def test_every_plan_is_legal(facts: Facts, data: st.DataObject) -> None:
    allotment = allot(facts)
    assert allotment.device_bytes <= facts.device_memory
    assert allotment.host_bytes <= facts.host_memory
    first = build(facts, allotment)
    assert verify(first, facts, allotment) <= facts.device_memory
    if not facts.deferred:
        return
    trained = [block.index for block in facts.blocks if block.trainable]
    pending = frozenset(data.draw(st.sets(st.sampled_from(trained)))) if trained else frozenset()
    loads = [index for index in first.loads_next if index in pending]  # as the engine filters them
    loaded = tuple(loads[: data.draw(st.integers(0, len(loads)))])
    verify(build(facts, allotment, pending=pending, loaded=loaded), facts, allotment)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tight_facts())
def test_a_plan_is_layer_major(facts: Facts) -> None:
    """All micro-batches make a visit before the next one, but for the last two blocks, which they make one by one."""
    schedule = build(facts, allot(facts))
    order = [(op.visit, op.micro_batch) for op in schedule.operations if isinstance(op, Forward)]
    runs = [len(list(run)) for _, run in groupby(visit.block for visit in facts.visits)]  # consecutive, fetched once
    first = len(facts.visits) - sum(runs[-2:])
    layer_major = [(v, m) for v in range(first) for m in range(facts.micro_batches)]
    assert order == layer_major + [(v, m) for m in range(facts.micro_batches) for v in range(first, len(facts.visits))]
    back = [(op.visit, op.micro_batch) for op in schedule.operations if isinstance(op, Backward)]
    assert back == [(v, m) for v in reversed(range(len(facts.visits))) for m in range(facts.micro_batches)]


# illegal schedules

SPILLED = {"boundaries": ("disk", "host", "disk", "device")}


def steady() -> tuple[Schedule, Facts, object]:
    facts = chain()
    schedule, allotment = plan(facts, **SPILLED)
    return schedule, facts, allotment


def immediate() -> tuple[Schedule, Facts, object]:
    facts = chain(deferred=False)
    schedule, allotment = plan(facts, **SPILLED)
    return schedule, facts, allotment


def without(schedule: Schedule, *unwanted: Operation) -> Schedule:
    left = list(schedule.operations)
    for operation in unwanted:
        left.remove(operation)
    return replace(schedule, operations=tuple(left))


def moved(schedule: Schedule, operation: Operation, *, before: Operation) -> Schedule:
    """The first such operation, moved before the first such other."""
    left = list(schedule.operations)
    left.remove(operation)
    left.insert(left.index(before), operation)
    return replace(schedule, operations=tuple(left))


def inserted(schedule: Schedule, operation: Operation, *, after: Operation) -> Schedule:
    left = list(schedule.operations)
    left.insert(left.index(after) + 1, operation)
    return replace(schedule, operations=tuple(left))


def refuse(schedule: Schedule, facts: Facts, allotment: object, culprit: str, *words: str) -> None:
    with pytest.raises(IllegalScheduleError) as caught:
        verify(schedule, facts, allotment)  # type: ignore[arg-type]
    message = str(caught.value)
    assert culprit in message.split(" needs ")[0], message
    assert all(word in message for word in words), message


def first(schedule: Schedule, kind: type) -> Operation:
    return next(operation for operation in schedule.operations if isinstance(operation, kind))


def test_evict_before_the_last_use() -> None:
    facts = chain(5, prefetch=1)
    schedule, allotment = plan(facts, slabs=2)
    evict = first(schedule, Evict)
    assert isinstance(evict, Evict)
    use = next(op for op in schedule.operations if isinstance(op, Forward) and op.block == evict.block)
    refuse(moved(schedule, evict, before=use), facts, allotment, describe(use), f"Fetch({evict.block})")


def test_fetch_into_a_slab_that_is_held() -> None:
    facts = chain(5, prefetch=1)
    schedule, allotment = plan(facts, slabs=2)
    evict = first(schedule, Evict)
    later = [op for op in schedule.operations if isinstance(op, Fetch) and op.slab == evict.slab]  # type: ignore[union-attr]
    refuse(without(schedule, evict), facts, allotment, describe(later[1]), "free")


def test_fetch_into_a_slab_that_is_not_there() -> None:
    schedule, facts, allotment = steady()
    fetch = first(schedule, Fetch)
    assert isinstance(fetch, Fetch)
    changed = tuple(Fetch(op.block, 99) if op == fetch else op for op in schedule.operations)
    refuse(replace(schedule, operations=changed), facts, allotment, "Fetch(0 -> slab 99)", "slab below")


@pytest.mark.parametrize("make", [steady, immediate])
def test_missing_restore(make: Callable[[], tuple[Schedule, Facts, object]]) -> None:
    schedule, facts, allotment = make()
    restore = first(schedule, Restore)
    assert isinstance(restore, Restore)
    culprit = Backward(restore.visit, facts.visits[restore.visit].block, restore.micro_batch)
    refuse(without(schedule, restore), facts, allotment, describe(culprit), describe(restore))


def test_restore_of_what_was_not_spilled() -> None:
    schedule, facts, allotment = steady()
    spill = first(schedule, Spill)
    assert isinstance(spill, Spill)
    restore = Restore(spill.visit, spill.micro_batch)
    refuse(without(schedule, spill), facts, allotment, describe(restore), describe(spill))


def test_update_without_load() -> None:
    schedule, facts, allotment = steady()
    refuse(without(schedule, Load(4)), facts, allotment, "Update(4)", "Load(4)")


def test_update_without_a_gradient() -> None:
    schedule, facts, allotment = steady()
    refuse(replace(schedule, pending=schedule.pending - {2}), facts, allotment, "Update(2)", "staged gradient")
    schedule, facts, allotment = immediate()
    refuse(without(schedule, Reduce(3)), facts, allotment, "Update(3)", "staged gradient")


def test_update_that_is_left_out() -> None:
    schedule, facts, allotment = steady()
    refuse(without(schedule, Update(2), Write(2)), facts, allotment, "Forward(2, visit=1, mb=0)", "Update(2)")


def test_forward_at_an_old_version() -> None:
    schedule, facts, allotment = steady()
    fetch = next(op for op in schedule.operations if isinstance(op, Fetch) and op.block == 3)
    early = moved(schedule, fetch, before=Update(3))
    refuse(early, facts, allotment, "Update(3)", "no slab to hold the version before")


def test_backward_with_weights_that_were_updated_meanwhile() -> None:
    schedule, facts, allotment = immediate()
    backward = Backward(1, 2, 1)
    reordered = moved(
        moved(moved(schedule, Load(2), before=backward), Reduce(2), before=backward), Update(2), before=backward
    )
    refuse(reordered, facts, allotment, "Reduce(2)", "Backward of block 2")


@pytest.mark.parametrize("make", [steady, immediate])
def test_write_missing_before_commit(make: Callable[[], tuple[Schedule, Facts, object]]) -> None:
    schedule, facts, allotment = make()
    refuse(without(schedule, Write(2)), facts, allotment, "", "Write")


@pytest.mark.parametrize("make", [steady, immediate])
def test_commit_of_a_part_of_a_step(make: Callable[[], tuple[Schedule, Facts, object]]) -> None:
    """A crash after such a commit would find some blocks of a step updated and others not."""
    schedule, facts, allotment = make()
    refuse(inserted(schedule, Commit(), after=Write(2)), facts, allotment, "Commit()", "Update")


@pytest.mark.parametrize("make", [steady, immediate])
def test_commit_missing(make: Callable[[], tuple[Schedule, Facts, object]]) -> None:
    schedule, facts, allotment = make()
    refuse(without(schedule, Commit()), facts, allotment, "the end of the step", "Commit()")


@pytest.mark.parametrize("make", [steady, immediate])
def test_reduce_before_the_last_backward(make: Callable[[], tuple[Schedule, Facts, object]]) -> None:
    schedule, facts, allotment = make()
    refuse(
        moved(schedule, Reduce(2), before=Backward(1, 2, 1)), facts, allotment, "Reduce(2)", "every Backward of block 2"
    )
    for early in (Turn(0), Backward(0, 1, 1)):  # the resident block's gradients come with all others
        refuse(moved(schedule, Reduce(0), before=early), facts, allotment, "Reduce(0)", "every Backward of block 0")


def test_reduce_before_the_backward_of_an_earlier_micro_batch() -> None:
    """Gradients are summed in order of micro-batch, so that the last one's backward closes the sum."""
    schedule, facts, allotment = steady()
    swapped = moved(schedule, Backward(1, 2, 1), before=Backward(1, 2, 0))
    refuse(swapped, facts, allotment, "Backward(2, visit=1, mb=1)", "mb=0")


def test_micro_batches_turn_in_order() -> None:
    schedule, facts, allotment = steady()
    operations = [
        replace(op, micro_batch=1 - op.micro_batch)
        if isinstance(op, Turn) or (isinstance(op, (Forward, Backward)) and op.visit == 3)
        else op
        for op in schedule.operations
    ]
    with pytest.raises(IllegalScheduleError, match="mb=1"):
        verify(replace(schedule, operations=tuple(operations)), facts, allotment)  # type: ignore[arg-type]


def test_forward_out_of_order() -> None:
    schedule, facts, allotment = steady()
    refuse(without(schedule, Forward(1, 2, 0)), facts, allotment, "Forward(3, visit=2, mb=0)", "Forward of visit 1")


def test_forward_of_another_block() -> None:
    schedule, facts, allotment = steady()
    changed = tuple(Forward(1, 3, 0) if op == Forward(1, 2, 0) else op for op in schedule.operations)
    refuse(
        replace(schedule, operations=changed), facts, allotment, "Forward(3, visit=1, mb=0)", "visit 1 to be of block 3"
    )


def test_backward_before_the_turn() -> None:
    schedule, facts, allotment = steady()
    refuse(without(schedule, Turn(1)), facts, allotment, "Backward(4, visit=3, mb=1)", "Turn(mb=1)")


def test_more_records_than_buffers() -> None:
    schedule, facts, allotment = steady()
    refuse(moved(schedule, Load(4), before=Update(0)), facts, allotment, "Load(4)", "record buffer")


def test_a_record_must_not_wait_for_the_buffer_of_one_that_is_written_later() -> None:
    """`Update` of the second waits for a buffer that only the `Write` of the first gives back: a deadlock if run."""
    facts = chain(3, micro_batches=1, root=False)
    schedule, allotment = plan(facts, record_buffers=1)
    operations = list(schedule.operations)
    operations.remove(Write(0))
    operations.insert(operations.index(Update(1)) + 1, Write(0))
    refuse(replace(schedule, operations=tuple(operations)), facts, allotment, "Load(1)", "record buffer")


def test_more_memory_than_there_is() -> None:
    schedule, facts, allotment = steady()
    refuse(schedule, replace(facts, device_memory=100), allotment, "the schedule", "of 100")


KINDS = [Load, Update, Write, Fetch, Evict, Forward, Turn, Backward, Reduce, Restore, Commit]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.data())
def test_an_operation_left_out_is_refused(kind: type, deferred: bool, data: st.DataObject) -> None:
    facts = chain(5, prefetch=1, deferred=deferred)
    boundaries = ("disk", "host", "disk", "disk", "device")
    schedule, allotment = plan(facts, boundaries=boundaries, slabs=2)
    places = [i for i, op in enumerate(schedule.operations) if isinstance(op, kind)]
    place = data.draw(st.sampled_from(places))
    left = replace(schedule, operations=schedule.operations[:place] + schedule.operations[place + 1 :])
    with pytest.raises(IllegalScheduleError, match=r"(operation \d+, \w+\(.*|the end of the step) needs "):
        verify(left, facts, allotment)


@pytest.mark.parametrize("kind", [*KINDS, Spill], ids=lambda kind: kind.__name__)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.data())
def test_an_operation_done_twice_is_refused(kind: type, deferred: bool, data: st.DataObject) -> None:
    facts = chain(5, prefetch=1, deferred=deferred)
    boundaries = ("disk", "host", "disk", "disk", "device")
    schedule, allotment = plan(facts, boundaries=boundaries, slabs=2)
    places = [i for i, op in enumerate(schedule.operations) if isinstance(op, kind)]
    place = data.draw(st.sampled_from(places))
    operation = schedule.operations[place]
    twice = replace(schedule, operations=(*schedule.operations[: place + 1], *schedule.operations[place:]))
    with pytest.raises(IllegalScheduleError, match=re.escape(f"operation {place + 1}, {describe(operation)} needs ")):
        verify(twice, facts, allotment)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tight_facts(), st.data())
def test_compute_of_one_block_that_changes_places_is_refused(facts: Facts, data: st.DataObject) -> None:
    """Any two operations of compute of the same micro-batch, or of the same visit, have one order."""
    allotment = allot(facts)
    schedule = build(facts, allotment)
    micro_batch = data.draw(st.integers(0, facts.micro_batches - 1))
    compute = (Forward, Turn, Backward)
    places = [
        i for i, op in enumerate(schedule.operations) if isinstance(op, compute) and op.micro_batch == micro_batch
    ]
    one, other = sorted(data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True)))
    a, b = schedule.operations[one], schedule.operations[other]
    operations = list(schedule.operations)
    operations[one], operations[other] = b, a
    with pytest.raises(IllegalScheduleError):
        verify(replace(schedule, operations=tuple(operations)), facts, allotment)


def test_operations_print() -> None:
    schedule, _, _ = steady()
    lines = schedule.text().splitlines()
    assert lines[0].startswith("# 4 visits, 2 micro-batches")
    assert len(lines) == 2 + len(schedule.operations)
    assert Visit(1, "b1") in schedule.visits
