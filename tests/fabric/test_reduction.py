"""Gradients add up in the contract's order, bit for bit, in no more room than was planned."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fabric.contract import sum_over_uses
from torch import Tensor

from weightstream.fabric.reduction import NORM_PIECE, SUM_PIECE, BlockSum, squares_of, sum_of_squares
from weightstream.schedule.reduction import partial_sums
from weightstream.store.images import Panel


class Room:
    """Gives partial sums and counts the slots in use; new ones hold NaN, so that nothing relies on zeros."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, str], Tensor] = {}

    def __call__(self, slot: int, name: str) -> Tensor:
        return self.slots.setdefault((slot, name), torch.full((5,), math.nan))

    @property
    def most(self) -> int:
        return max((slot + 1 for slot, _ in self.slots), default=0)


def gradients(seed: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Of widely different magnitudes, so that every order of sums gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-6, 7, (count,), generator=generator)
    return [(torch.randn(5, generator=generator) * 10.0**scale).to(dtype) for scale in scales.tolist()]


@pytest.mark.parametrize("held", [1, 3, 20])
@pytest.mark.parametrize("groups", range(1, 17))
def test_every_number_of_micro_batches(groups: int, held: int) -> None:
    for count in range(1, 21):
        grads, room, target = gradients(count, count, torch.float32), Room(), torch.full((5,), math.nan)
        total = BlockSum({"w": target}, room, micro_batches=count, groups=groups, held=held)
        for index, grad in enumerate(grads):
            total.add("w", 0, index, grad)
        result = total.close()
        expected = sum_over_uses([grads], groups)
        assert expected is not None
        assert result["w"] is target
        assert torch.equal(target, expected), (count, groups)
        assert room.most <= (partial_sums(count, groups) - 1 if held < count else 0)  # the leftmost lives in the target
        assert total.squares == {("w", 0): sum_of_squares(target)}


@settings(max_examples=150, deadline=None)
@given(
    st.data(), st.integers(1, 20), st.integers(1, 16), st.integers(1, 3), st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([1, 2, 5, 20]),
)  # fmt: skip
def test_absent_gradients_and_several_uses(
    data: st.DataObject, count: int, groups: int, uses: int, dtype: str, held: int
) -> None:
    present = data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=uses, max_size=uses))
    all_grads = [gradients(use, count, getattr(torch, dtype)) for use in range(uses)]
    grads = [
        [g if there else None for g, there in zip(*pair, strict=True)] for pair in zip(all_grads, present, strict=True)
    ]
    target, room = torch.full((5,), math.nan), Room()
    total = BlockSum({"w": target, "other": torch.zeros(5)}, room, micro_batches=count, groups=groups, held=held)
    for use in reversed(range(uses)):  # backward reaches the last use first
        for index, grad in enumerate(grads[use]):
            if grad is not None:
                before = grad.clone()
                total.add("w", use, index, grad)
                assert torch.equal(grad, before)
    result, expected = total.close(), sum_over_uses(grads, groups)
    assert "other" not in result  # none, never zeros
    if expected is None:
        assert result == {}
    else:
        assert result["w"] is target
        assert torch.equal(target, expected)


@pytest.mark.parametrize("size", [SUM_PIECE - 1, SUM_PIECE, 2 * SUM_PIECE + 77])
@pytest.mark.parametrize("held", [1, 2, 5])
def test_sums_of_several_pieces(size: int, held: int) -> None:
    generator = torch.Generator().manual_seed(size)
    grads = [torch.randn(1, size, generator=generator).bfloat16() for _ in range(5)]
    target = torch.full((1, size), math.nan)
    total = BlockSum(
        {"w": target}, lambda slot, name: torch.full((1, size), math.nan), micro_batches=5, groups=4, held=held
    )
    for index, grad in enumerate(grads):
        total.add("w", 0, index, grad)
    assert total.close()["w"] is target
    assert torch.equal(target, sum_over_uses([grads], 4))
    assert total.squares == {("w", 0): sum_of_squares(target)}


@pytest.mark.parametrize("held", [1, 2, 5])
def test_squares_of_panels_are_summed_apart(held: int) -> None:
    """Panels of more and of fewer elements than a piece; the sums are those of the whole."""
    rows, width = 70, 4096
    generator = torch.Generator().manual_seed(held)
    grads = [torch.randn(rows, width, generator=generator) for _ in range(5)]
    edges = [0, 40, 41, 70]
    panels = tuple(Panel(low, low * width, high * width) for low, high in pairwise(edges))
    target = torch.full((rows, width), math.nan)
    total = BlockSum(
        {"w": target}, lambda slot, name: torch.empty(rows, width), micro_batches=5, groups=4, held=held,
        panels={"w": panels},
    )  # fmt: skip
    for index, grad in enumerate(grads):
        total.add("w", 0, index, grad)
    total.close()
    assert torch.equal(target, sum_over_uses([grads], 4))
    expected = {("w", low): sum_of_squares(target[low:high]) for low, high in pairwise(edges)}
    assert total.squares == expected == squares_of("w", target, panels)
    assert list(total.squares) == sorted(total.squares)


def test_micro_batches_out_of_order_are_our_own_mistake() -> None:
    total = BlockSum({"w": torch.zeros(5)}, Room(), micro_batches=3, groups=2)
    total.add("w", 0, 1, torch.ones(5))
    with pytest.raises(AssertionError, match="micro-batch 0 after 1"):
        total.add("w", 0, 0, torch.ones(5))


@pytest.mark.parametrize("count", [0, 1, NORM_PIECE - 1, NORM_PIECE, NORM_PIECE + 1, 2 * NORM_PIECE + 77])
def test_the_norm_is_summed_in_pieces(count: int) -> None:
    grad = torch.randn(count, generator=torch.Generator().manual_seed(count))
    expected = 0.0
    for start in range(0, count, 65_536):
        piece = grad[start : start + 65_536].double()
        expected += torch.dot(piece, piece).item()
    assert sum_of_squares(grad) == expected
    assert sum_of_squares(torch.full((3,), 1e30)) == pytest.approx(3e60)  # beyond fp32
    assert not math.isfinite(sum_of_squares(torch.tensor([1.0, math.inf])))
    assert not math.isfinite(sum_of_squares(torch.tensor([math.nan])))
