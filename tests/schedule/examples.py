"""Small facts of models, by hand and at random, for everything that plans."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from weightstream.schedule.allotment import Allotment, Facts, allot
from weightstream.schedule.cost import BlockFacts
from weightstream.schedule.operations import Schedule, Visit
from weightstream.schedule.planner import build
from weightstream.units import MIB

KIB = 1 << 10
PLENTY = 1 << 27


def block(index: int, numel: int = 1024, **settings: Any) -> BlockFacts:
    """A block of fp32 parameters under Adam: masters, two moments."""
    trainable = settings.get("trainable", True)
    return BlockFacts(
        index=index, name=f"b{index}", streamed_bytes=4 * numel, load_bytes=12 * numel if trainable else 0,
        record_bytes=12 * numel + 4 * KIB, gradient_bytes=4 * numel if trainable else 0, **settings,
    )  # fmt: skip


def sparse(dense: BlockFacts, tenths: int, decoding_steps: int) -> BlockFacts:
    """The same with so many tenths of its parameters, and what it needs beside its slab."""
    fewer = {
        name: -(-getattr(dense, name) * tenths // 10)
        for name in ("load_bytes", "record_bytes", "gradient_bytes", "tied_bytes")
    }
    numel = dense.streamed_bytes // 4
    return replace(
        dense, **fewer, compressed_bytes=-(-dense.streamed_bytes * tenths // 10) + -(-numel // 8),
        places_bytes=4 * numel * tenths // 10, kept_places_bytes=4 * numel * tenths // 10, decoding_steps=decoding_steps,
        masks_bytes=64 * numel if dense.trainable else 0,
    )  # fmt: skip


def chain(count: int = 4, *, micro_batches: int = 2, root: bool = True, **settings: Any) -> Facts:
    """An embedding, layers and a head, each used once, with a resident root before them."""
    blocks = [block(0, 64, resident=True)] if root else []
    blocks += [block(index) for index in range(len(blocks), len(blocks) + count)]
    visits = tuple(Visit(b.index, b.name) for b in blocks if not b.resident)
    chosen = {
        "blocks": tuple(blocks), "visits": visits, "micro_batches": micro_batches, "reduction_groups": 2,
        "deferred": True, "device_memory": 64 * MIB, "host_memory": 64 * MIB,
    } | settings  # fmt: skip
    return Facts(**chosen)


def plan(facts: Facts, *, steady: bool = True, **changes: Any) -> tuple[Schedule, Allotment]:
    """A schedule: of a steady step, with every gradient waiting and records loaded ahead, or of a first one.

    `changes` overwrite the allotment (a tight one is then easier to say).
    """
    allotted = allot(facts)
    allotment = replace(allotted, **{"record_buffers": min(3, allotted.record_buffers)} | changes)
    first = build(facts, allotment)
    if not steady or not facts.deferred:
        return first, allotment
    visited = {visit.block for visit in facts.visits}
    pending = frozenset(b.index for b in facts.blocks if b.trainable and (b.resident or b.index in visited))
    return build(facts, allotment, pending=pending, loaded=first.loads_next), allotment


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """Any model: block sizes, frozen, tied and resident ones, visits in any order, repeats, any settings."""
    count = draw(st.integers(1, 6))
    blocks = []
    for index in range(count):
        resident = count > 1 and index == 0 and draw(st.booleans())
        numel = draw(st.integers(1, 4096))
        tied = 8 * numel if draw(st.integers(0, 4)) == 0 else 0
        some = block(index, numel, resident=resident, trainable=draw(st.integers(0, 4)) > 0, tied_bytes=tied)
        tenths, steps = draw(st.integers(1, 9)), draw(st.integers(0, 8 * numel))
        blocks.append(sparse(some, tenths, steps) if draw(st.booleans()) else some)
    streaming = [b.index for b in blocks if not b.resident]
    order = draw(st.lists(st.sampled_from(streaming), min_size=1, max_size=9))
    visits = tuple(Visit(index, f"b{index}.{position}") for position, index in enumerate(order))
    sizes = st.lists(st.integers(0, 256 * KIB), min_size=len(visits), max_size=len(visits)).map(tuple)
    measured = draw(st.booleans())
    micro_batches = draw(st.integers(1, 9))
    ranks = draw(st.integers(1, micro_batches))
    return Facts(
        blocks=tuple(blocks),
        visits=visits,
        micro_batches=micro_batches,
        share=None if ranks == 1 else -(-micro_batches // ranks),
        reduction_groups=draw(st.integers(1, 9)),
        deferred=draw(st.booleans()),
        device_memory=PLENTY,
        host_memory=PLENTY,
        activations=draw(st.sampled_from(["auto", "recompute"])),
        prefetch=draw(st.integers(1, 4)),
        ram_tier=draw(st.booleans()),
        host_is_device=draw(st.booleans()),
        boundary_bytes=draw(sizes) if measured else None,
        kept_bytes=draw(sizes) if measured else None,
        workspace_bytes=draw(st.integers(0, 256 * KIB)),
    )


def smallest(facts: Facts, budget: str) -> int:
    """The smallest budget under which `allot` works, by bisection."""
    from weightstream.errors import PlanError

    low, high = 0, PLENTY
    while low < high:
        middle = (low + high) // 2
        try:
            allot(replace(facts, **{budget: middle}))
            high = middle
        except PlanError:
            low = middle + 1
    return low


@st.composite
def tight_facts(draw: st.DrawFn) -> Facts:
    """As `facts`, under budgets between the smallest that work and plenty."""
    some = draw(facts())
    device, host = smallest(some, "device_memory"), smallest(some, "host_memory")
    return replace(
        some,
        device_memory=device + draw(st.integers(0, 4 * MIB)),
        host_memory=host + draw(st.integers(0, 4 * MIB)),
    )
