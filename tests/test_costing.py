"""Seconds from a profile of round numbers: exact where they can be computed in the head, and in the right order else."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.machine.profiles import ELEMENTS, SIZES, profile
from tests.schedule.examples import chain

from weightstream.cluster import Cluster
from weightstream.prediction.census import Census, Kernel, VisitCensus
from weightstream.prediction.costing import Costs, Tables, hardware_of, slowdown_of
from weightstream.schedule.allotment import Facts, allot
from weightstream.simulator.durations import Durations

TABLES = Tables.of(profile(), 1)


def product(m: int, n: int, k: int, batch: int = 1) -> Kernel:
    return Kernel("mm", "bfloat16", m * n, 0, (batch, m, n, k), "nt")


def mul(elements: int, dtype: str = "float32", nbytes: int = 0) -> Kernel:
    return Kernel("mul", dtype, elements, nbytes)


def test_seconds_of_kernels() -> None:
    assert TABLES.kernel_s(product(100, 50, 10)) == pytest.approx(2 * 100 * 50 * 10 / 1e9)
    assert TABLES.kernel_s(mul(8192)) == pytest.approx(8192e-9)  # between two sizes that were measured
    assert TABLES.kernel_s(mul(10 * ELEMENTS[-1])) == pytest.approx(10 * ELEMENTS[-1] * 1e-9)
    assert TABLES.kernel_s(mul(1)) == pytest.approx(ELEMENTS[0] * 1e-9)  # a call takes its time
    assert TABLES.kernel_s(mul(1, "float16", nbytes=12 * 8192)) == pytest.approx(8192e-9)  # not measured: by bytes
    assert TABLES.kernel_s(Kernel("view", "", 0, 0, view=True)) == 0
    attention = Kernel("attention", "bfloat16", 1, 0, (4, 64, 64, 32), "causal")
    assert TABLES.kernel_s(attention) == pytest.approx(4 * 4 * 64 * 64 * 32 / 1e9)
    assert TABLES.kernel_s(replace(attention, name="attention_backward")) == pytest.approx(10 * 4 * 64 * 64 * 32 / 1e9)


def test_rates_between_sizes_lie_between() -> None:
    rates = tuple(float(10 ** (9 + index % 2)) for index in range(8))  # ten times faster for the larger k
    compute = profile().compute[0].model_copy(update={"products": {"nt bfloat16": rates}})
    tables = replace(TABLES, compute=compute)
    assert tables.kernel_s(product(16, 16, SIZES[0])) == pytest.approx(2 * 16**3 / 1e9)
    assert tables.kernel_s(product(16, 16, 64)) == pytest.approx(2 * 16 * 16 * 64 / 1e9 / 10**0.5)
    assert tables.kernel_s(product(16, 16, 4096)) == pytest.approx(2 * 16 * 16 * 4096 / 1e10)


def census(facts: Facts, *, elements: int = 8192) -> Census:
    visit = VisitCensus(
        Counter({product(64, 64, 64): 1, mul(elements): 2}), Counter({product(64, 64, 64): 1}),
        Counter({product(64, 64, 64): 2}), Counter(bfloat16=1024), 2,
    )  # fmt: skip
    return Census([visit.copy() for _ in facts.visits], Counter(), Counter({mul(elements): 1}))


def durations(facts: Facts, threads: int = 1, *, counted: Census | None = None, **settings: Any) -> Durations:
    settings = {"clipped": True, "dtype": "bfloat16"} | settings
    measured = settings.pop("measured", profile())
    return Costs(measured, threads).durations(
        counted or census(facts), facts, allot(facts), tensors=[2] * len(facts.blocks), **settings
    )


def test_durations_add_up() -> None:
    facts = chain(3, micro_batches=2, root=False, host_memory=1 << 30)
    found = durations(facts)
    one = 2 * 64**3 / 1e9
    assert found.forward == pytest.approx([one + 2 * 8192e-9 + 3e-6] * 3)
    assert found.recompute == pytest.approx([one + 1e-6] * 3)
    assert found.backward == pytest.approx([2 * one + 2e-6] * 3)
    # one copy, one addition and the squares of 1,024 elements, and two tensors
    assert found.reduce == pytest.approx([3 * 1024e-9 + 2e-5] * 3)
    block = facts.blocks[0]
    # scaled, stepped and cast; the states are copied out of memory and back and need no check, what is written gets one
    own = 3 * 1024e-9 + block.record_bytes / 1e9 + 2e-5
    assert found.update == pytest.approx([own + 2 * block.load_bytes / 1e9] * 3)
    assert found.between_steps == pytest.approx(1e-3 + 2 * 1e-3)
    assert "begin" not in found.overhead
    read = durations(replace(facts, ram_tier=False)).update
    assert read == pytest.approx([own + block.load_bytes / 1e9] * 3)
    assert durations(facts, clipped=False).update == pytest.approx([seconds - 1024e-9 for seconds in found.update])


def test_updates_take_longer_in_a_step_by_where_their_states_are() -> None:
    facts, plain = chain(3, root=False, host_memory=1 << 30), profile()
    longer = plain.executor.model_copy(update={"in_a_step": {"update": 3.0, "update in RAM": 0.5}})
    measured = plain.model_copy(update={"executor": longer})
    for ram_tier, times in ((True, 0.5), (False, 3.0)):
        placed = replace(facts, ram_tier=ram_tier)
        alone = durations(placed).update
        assert durations(placed, measured=measured).update == pytest.approx([
            times * (seconds - 2e-5) + 2e-5 for seconds in alone
        ])  # fmt: skip
        assert durations(placed, measured=measured).forward == durations(placed).forward


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 22))
def test_more_takes_longer(one: int, other: int) -> None:
    facts = chain(2, root=False)
    few, many = (durations(facts, counted=census(facts, elements=count)) for count in sorted((one, other)))
    assert few.turn <= many.turn
    assert few.forward <= many.forward


def test_threads_micro_batches_and_owners() -> None:
    facts = chain(2, micro_batches=2, root=False)
    assert durations(facts, 2).backward < durations(facts, 1).backward
    assert durations(replace(facts, micro_batches=3)).reduce > durations(facts).reduce
    whole, halved = durations(facts), durations(facts, owners=2)
    assert halved.update == pytest.approx([2 * seconds for seconds in whole.update])


def test_gradients_that_cannot_be_held_are_added_in_backward() -> None:
    facts = chain(2, micro_batches=12, root=False)
    assert allot(facts).held_gradients < 12
    assert durations(facts).backward[0] > durations(replace(facts, micro_batches=2)).backward[0]
    assert durations(facts).reduce[0] < durations(replace(facts, micro_batches=2)).reduce[0]


def test_ranks_that_share_a_host() -> None:
    found = profile()
    assert slowdown_of(found, 1, 1) == 1.0
    assert slowdown_of(found, 2, 1) == 1.25  # two cores for two ranks, yet slower
    assert slowdown_of(found, 4, 1) == 1.25  # 2.5 times, of which the simulator knows 2
    hardware = hardware_of(found, Cluster(2), threads=1)
    assert hardware.hosts == (0, 0)
    assert hardware.cores_per_host == 2
    assert hardware.link is not None
    assert hardware.link.bytes_per_s == 1e9
    assert hardware_of(found, Cluster(), threads=2).link is None
