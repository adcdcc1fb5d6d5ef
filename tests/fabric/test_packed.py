"""Packed gradients add up in the contract's order, bit for bit, as soon as they may, and in no more memory than that takes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fabric.contract import groups_of, sum_over_uses
from torch import Tensor

from weightstream.fabric.packed import Gradients, Packed, Sums, over_groups
from weightstream.schedule.reduction import partial_sums, subtrees

RECORDS, SHAPES = 5, ((3,), (2, 2))
UNIT = 8 + 4 * (3 + 4)
"""Bytes of one record's number and gradients."""


def gradients(generator: torch.Generator, count: int) -> list[Tensor]:
    """Of widely different magnitudes, so that every order of sums gives other bits."""
    scales = torch.randint(-6, 7, (count,), generator=generator)
    return [
        torch.randn((count, *shape), generator=generator) * (10.0**scales).view(-1, *[1] * len(shape))
        for shape in SHAPES
    ]


def total_of(sums: Sums, groups: int) -> Packed | None:
    """What an owner makes of partial sums, as `Touched.close_sums` does."""
    total: Packed | None = None
    for use in sorted(sums):
        summed = over_groups(sums[use], groups)
        total = summed if total is None else total.plus(summed)
    return total


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_any_shares_have_the_sum_of_the_contract(
    data: st.DataObject, count: int, groups: int, uses: int, told: bool
) -> None:
    """Micro-batches reach some records, perhaps in several calls; ranks have neighbouring groups; whether they are told that a
    micro-batch is through, or learn it from the next one, is all the same."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    cuts = sorted({0, groups, *data.draw(st.lists(st.integers(0, groups), max_size=3))})
    shares = [range(low, high) for low, high in pairwise(cuts)]
    members = groups_of(count, groups)
    dense: list[list[list[list[Tensor | None]]]] = [  # by place in the record's parameters, record, use, micro-batch
        [[[None] * count for _ in range(uses)] for _ in range(RECORDS)] for _ in SHAPES
    ]
    sums: Sums = {}
    for share in shares:
        own = [index for group in share for index in members[group]]
        held = Gradients(groups)
        held.begin(count, share)
        for use in reversed(range(uses)):  # backward reaches the last use first
            for index in own:
                for numbers in data.draw(st.lists(st.sets(st.integers(0, RECORDS - 1), min_size=1), max_size=2)):
                    order = torch.tensor(data.draw(st.permutations(sorted(numbers))))
                    given_now = gradients(generator, len(numbers))
                    for place, whole in enumerate(given_now):
                        for number, grad in zip(order.tolist(), whole.clone(), strict=True):
                            before = dense[place][number][use][index]
                            dense[place][number][use][index] = grad if before is None else before + grad
                    held.add(use, index, order, given_now)
                if told:
                    held.through(use, index)
        for use, nodes in held.partial_sums().items():
            assert nodes.keys() <= set(subtrees(groups, share))
            sums.setdefault(use, {}).update(nodes)
        assert held.nbytes == 0
    total = total_of(sums, groups)
    reached = [] if total is None else total.numbers.tolist()
    assert len(set(reached)) == len(reached)
    for place in range(len(SHAPES)):
        for number in range(RECORDS):
            expected = sum_over_uses(dense[place][number], groups)
            assert (expected is not None) == (number in reached)
            if expected is not None:
                assert total is not None
                assert torch.equal(total.tensors[place][reached.index(number)], expected)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_what_is_held_does_not_grow_with_micro_batches(groups: int) -> None:
    """All of them reach the same records: at most the partial sums that the tree asks for and what one micro-batch gives; one
    sum as soon as the last one is through. It was as much for each of them."""
    generator, numbers = torch.Generator().manual_seed(0), torch.arange(RECORDS)
    for count in (1, 8, 100):
        held, most = Gradients(groups), 0
        held.begin(count, range(groups))
        for index in range(count):
            held.add(0, index, numbers, gradients(generator, RECORDS))
            most = max(most, held.nbytes)
            held.through(0, index)
        assert most <= (partial_sums(count, groups) + 1) * RECORDS * UNIT
        assert held.nbytes == RECORDS * UNIT


def test_a_gradient_that_comes_too_late_is_our_own_mistake() -> None:
    held, numbers = Gradients(2), torch.arange(RECORDS)
    held.begin(4, range(2))
    values = gradients(torch.Generator().manual_seed(0), RECORDS)
    held.add(0, 1, numbers, values)
    held.through(0, 1)
    for late in (0, 1):
        with pytest.raises(AssertionError, match=f"micro-batch {late} in use 0: it was through already"):
            held.add(0, late, numbers, values)
