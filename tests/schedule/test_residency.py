"""What stays in RAM, against every other choice."""

from dataclasses import replace
from itertools import chain, combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schedule.examples import chain as chain_of

from weightstream.schedule.allotment import Facts, allot, records_room
from weightstream.schedule.cost import BlockFacts, lower_bound
from weightstream.schedule.residency import Candidate, most_saved

SIZES = st.sampled_from([1, 2, 3, 5, 8, 13])


def subsets(keys: list[object]) -> list[tuple[object, ...]]:
    return list(chain.from_iterable(combinations(keys, size) for size in range(len(keys) + 1)))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIZES, st.integers(0, 20)), max_size=9),
    capacity=st.integers(0, 60),
)
def test_no_other_set_saves_more(sizes: list[tuple[int, int]], capacity: int) -> None:
    candidates = [Candidate(index, nbytes, saved) for index, (nbytes, saved) in enumerate(sizes)]
    chosen = most_saved(candidates, capacity)
    assert sum(sizes[index][0] for index in chosen) <= capacity

    def saved(keys: object) -> int:
        return sum(sizes[index][1] for index in keys)  # type: ignore[attr-defined]

    fitting = [keys for keys in subsets(list(range(len(sizes)))) if sum(sizes[i][0] for i in keys) <= capacity]  # type: ignore[index]
    assert saved(chosen) == max(saved(keys) for keys in fitting)


def test_a_deep_model_is_quick() -> None:
    layers = [Candidate(("copy", i), 24, 24) for i in range(400)] + [
        Candidate(("states", i), 147, 147) for i in range(400)
    ]
    odd = [Candidate((kind, 400 + i), 50 * (i + 1) + 7, 57) for i in range(2) for kind in ("copy", "states")]
    chosen = most_saved(layers + odd, 30_011)
    assert sum(c.nbytes for c in layers + odd if c.key in chosen) <= 30_011
    assert len(chosen) > 200


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    frozen=st.sets(st.integers(0, 3)),
    deferred=st.booleans(),
    room=st.integers(0, 60),
)
def test_a_plan_moves_the_least_bytes(sizes: list[int], frozen: set[int], deferred: bool, room: int) -> None:
    """Of all sets of copies and states that fit where the plan put its own."""
    facts = chain_of(deferred=deferred)
    blocks = [block for block in facts.blocks if not block.resident][: len(sizes)]
    changed = {
        block.index: replace(
            block,
            trainable=place not in frozen,
            streamed_bytes=size * 4096,
            load_bytes=3 * size * 4096 if place not in frozen else 0,
            record_bytes=(4 * size + 1) * 4096,
        )
        for place, (block, size) in enumerate(zip(blocks, sizes, strict=False))
    }
    blocks_now = tuple(changed.get(block.index, block) for block in facts.blocks)
    facts = replace(facts, blocks=blocks_now, device_memory=1 << 30, host_memory=1 << 30, ram_tier=False)
    # enough for every record buffer, and a bit
    facts = replace(facts, ram_tier=True, host_memory=allot(facts).host_bytes + room * 4096)
    found = allot(facts)
    assert found.host_bytes <= facts.host_memory
    # record buffers beyond the third take what pins leave
    later = records_room(blocks_now, found.record_buffers) - records_room(blocks_now, min(3, found.record_buffers))
    spare = facts.host_memory - found.host_bytes + max(0, later)
    room_bytes = sum(_bytes(facts, found.pinned_copies, found.pinned_states)) + spare  # copies for evaluation included
    visited = {visit.block for visit in facts.visits}
    considered = [block for block in facts.blocks if block.index in visited or block.resident]
    recent = list(dict.fromkeys(visit.block for visit in reversed(facts.visits)))[: found.slabs]

    def moved(copies: frozenset[int], states: frozenset[int]) -> int:
        return lower_bound(
            considered,
            deferred=deferred,
            kept_across_turn=frozenset(recent),
            pinned_copies=copies,
            pinned_states=states,
        ).total

    keys: list[object] = [("copy", b.index) for b in considered if not b.resident]
    keys += [("states", b.index) for b in considered if b.trainable]
    least_bytes = min(
        moved(copies, states)
        for copies, states in map(_split, subsets(keys))
        if sum(_bytes(facts, copies, states)) <= room_bytes
    )
    assert moved(found.pinned_copies, found.pinned_states) == least_bytes


def _split(keys: tuple[object, ...]) -> tuple[frozenset[int], frozenset[int]]:
    copies = frozenset(index for kind, index in keys if kind == "copy")  # type: ignore[misc,attr-defined]
    states = frozenset(index for kind, index in keys if kind == "states")  # type: ignore[misc,attr-defined]
    return copies, states


def _bytes(facts: Facts, copies: frozenset[int], states: frozenset[int]) -> tuple[int, int]:
    def of(block: BlockFacts) -> tuple[int, int]:
        return block.streamed_bytes * (block.index in copies), block.load_bytes * (block.index in states)

    found = [of(block) for block in facts.blocks]
    return sum(a for a, _ in found), sum(b for _, b in found)
