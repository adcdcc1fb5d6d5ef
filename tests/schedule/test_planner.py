"""Memory is allotted within its budgets; what does not fit is refused with a value that does."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.schedule.examples import KIB, block, chain, facts, smallest, tight_facts

from weightstream.errors import PlanError
from weightstream.schedule.allotment import Facts, allot, records_room
from weightstream.schedule.cost import StepBytes, lower_bound
from weightstream.units import MIB, parse_bytes

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(facts(), st.sampled_from(["device_memory", "host_memory"]))
def test_a_refusal_names_a_value_that_works(some: Facts, budget: str) -> None:
    least = smallest(some, budget)
    if least == 0:
        return
    with pytest.raises(PlanError) as caught:
        allot(replace(some, **{budget: least - 1}))
    named = re.findall(rf"{budget}=(\d+MiB)", str(caught.value))
    assert len(named) == 1, str(caught.value)
    allot(replace(some, **{budget: parse_bytes(named[0])}))
    assert parse_bytes(named[0]) < least + MIB  # and none that is needlessly large


def test_what_is_refused_says_which_buffers_there_are() -> None:
    """Where each block has its own, they are as large as these, not as the largest."""
    few = chain(2, root=False, ram_tier=False)
    few = replace(few, blocks=(block(0, 64), block(1)))
    with pytest.raises(PlanError, match=r"too small: a record buffer for each of 2 blocks, 20\.8 KiB, "):
        allot(replace(few, host_memory=0))
    with pytest.raises(PlanError, match=r"too small: 2 record buffers of 16\.0 KiB, "):
        allot(replace(chain(3, root=False), host_memory=0))


@QUICK
@given(facts())
def test_keeping_everything_is_refused_with_a_value_that_works(some: Facts) -> None:
    some = replace(some, activations="keep")
    least = smallest(some, "device_memory")
    if least == 0:
        return
    with pytest.raises(PlanError) as caught:
        allot(replace(some, device_memory=least - 1))
    named = re.findall(r"the smallest value that works is device_memory=(\d+MiB)", str(caught.value))
    assert len(named) == 1, str(caught.value)
    allotment = allot(replace(some, device_memory=parse_bytes(named[0])))
    if some.kept_bytes is not None:
        assert allotment.keep >= set(range(len(some.visits) - 1))


@QUICK
@given(tight_facts(), st.sampled_from(["device_memory", "host_memory"]), st.integers(0, 4 * MIB))
def test_more_memory_is_never_refused(some: Facts, budget: str, more: int) -> None:
    one, other = allot(some), allot(replace(some, **{budget: getattr(some, budget) + more}))
    assert other.slabs >= one.slabs


@QUICK
@given(facts(), st.lists(st.integers(0, 4 * MIB), min_size=2, max_size=6))
def test_more_memory_is_never_refused_where_everything_is_kept(some: Facts, sizes: list[int]) -> None:
    """What is spent on more slabs must not be missing for the activations."""
    works = []
    for size in sorted(sizes):
        try:
            allot(replace(some, activations="keep", device_memory=size))
            works.append(True)
        except PlanError:
            works.append(False)
    assert works == sorted(works)


@QUICK
@given(tight_facts())
def test_an_allotment_is_within_its_budgets(some: Facts) -> None:
    allotment = allot(some)
    assert allotment.device_bytes <= some.device_memory
    assert allotment.host_bytes <= some.host_memory
    assert allotment.slabs >= min(2, len({visit.block for visit in some.visits}))
    sizes = {b.index: b for b in some.blocks}
    held = (
        records_room(some.blocks, allotment.record_buffers)
        + allotment.gradient_buffers * allotment.gradient_bytes
        + sum(sizes[index].gradient_bytes for index in allotment.staged_in_ram)
        + sum(sizes[index].fetched_bytes for index in allotment.pinned_copies)
        + sum(sizes[index].load_bytes for index in allotment.pinned_states)
        + sum(sizes[index].kept_places_bytes for index in allotment.kept_places)
    )
    assert held <= some.host_memory


def test_plenty_keeps_everything_in_memory() -> None:
    some = chain(boundary_bytes=(4 * KIB,) * 4, kept_bytes=(64 * KIB,) * 4)
    allotment = allot(some)
    assert allotment.keep == {0, 1, 2}
    assert set(allotment.boundaries) == {"device"}
    assert allotment.staged_in_ram == {0, 1, 2, 3, 4}
    assert allotment.pinned_states == {0, 1, 2, 3, 4}
    assert allotment.pinned_copies == {1, 2, 3, 4}
    assert allotment.gradient_buffers == 0
    nothing = allot(replace(some, ram_tier=False))
    assert nothing.pinned_copies == nothing.pinned_states == frozenset()


def test_places_that_save_most_are_kept_first() -> None:
    """Of three sparse blocks: the third's are found without a step, so that nothing is saved; a fourth is not visited."""
    some = chain(3, ram_tier=False, deferred=False)
    sparse = [
        block(index, kept_places_bytes=4 * KIB, decoding_steps=steps)
        for index, steps in enumerate((5000, 9000, 0, 9999), start=1)
    ]
    some = replace(some, blocks=(some.blocks[0], *sparse))
    least = smallest(some, "host_memory")
    kept = [allot(replace(some, host_memory=least + room * KIB)).kept_places for room in range(64)]
    assert set(kept) == {frozenset(), frozenset({2}), frozenset({1, 2})}
    assert kept[0] == frozenset()
    assert kept[-1] == {1, 2}


class TestLowerBound:
    """By hand: 1,024 parameters in fp32 under Adam are 4 KiB streamed, 12 KiB loaded, 16 KiB written, 4 KiB gradient."""

    blocks = (block(0), block(1))

    def test_clip_with_everything_on_disk(self) -> None:
        # forward: the copy comes out of the update; backward reads it again
        found = lower_bound(self.blocks, deferred=True)
        assert found == StepBytes(read=2 * (12 + 4) * KIB, written=2 * 16 * KIB)
        assert found.total == 64 * KIB

    def test_no_clip_reads_the_copy_in_both_directions(self) -> None:
        assert lower_bound(self.blocks, deferred=False) == StepBytes(2 * (12 + 4 + 4) * KIB, 2 * 16 * KIB)

    def test_kept_across_the_turn(self) -> None:
        found = lower_bound(self.blocks, deferred=True, kept_across_turn=frozenset({1}))
        assert found == StepBytes((16 + 12) * KIB, 32 * KIB)

    def test_staged_on_disk_is_written_and_read(self) -> None:
        found = lower_bound(self.blocks, deferred=True, staged_on_disk=frozenset({0}))
        assert found == StepBytes((32 + 4) * KIB, (32 + 4) * KIB)

    def test_pinned(self) -> None:
        copies = lower_bound(self.blocks, deferred=False, pinned_copies=frozenset({0, 1}))
        assert copies == StepBytes(2 * 12 * KIB, 32 * KIB)
        states = lower_bound(self.blocks, deferred=True, pinned_states=frozenset({0}))
        assert states == StepBytes((4 + 16) * KIB, 32 * KIB)

    def test_frozen_and_resident(self) -> None:
        # a frozen block has no update to come out of: read in both directions, never written
        assert lower_bound([block(0, trainable=False)], deferred=True) == StepBytes(8 * KIB, 0)
        assert lower_bound([block(0, resident=True)], deferred=True) == StepBytes(12 * KIB, 16 * KIB)
        assert lower_bound([block(0, resident=True)], deferred=False) == StepBytes(16 * KIB, 16 * KIB)
