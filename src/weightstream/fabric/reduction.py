"""The fixed-order sum of a block's gradients, on its way from the workers to the store.

The order is the numerical contract's: inside a group by index of micro-batch, across groups in one binary tree, and for
a tied parameter each use on its own, then over uses in order of first use. All sums are fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightstream.schedule.reduction import group_of, tree

NORM_PIECE = 65_536


@dataclass(slots=True)
class _TreeSum:
    """One parameter's sum over micro-batches for one use. The leftmost partial sum lives in `target`."""

    target: Tensor
    first: bool
    partials: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    merged: int = 0
    latest: int = -1
    used: set[int] = field(default_factory=set)


class BlockSum:
    """Sums the gradients of one block's trained parameters.

    Args:
        targets: `{parameter name: fp32 tensor}` where the finished sums are wanted.
        partial: `(slot, parameter name) -> fp32 tensor` of the parameter's shape: room for partial sums that are alive
            beside the leftmost one; slots count from 0.
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        partial: Callable[[int, str], Tensor],
        *,
        micro_batches: int,
        groups: int,
    ) -> None:
        self._targets, self._partial = targets, partial
        self._micro_batches, self._groups = micro_batches, groups
        self._sums: dict[str, dict[int, _TreeSum]] = {name: {} for name in targets}

    def add(self, name: str, use: int, micro_batch: int, grad: Tensor) -> None:
        """Adds one micro-batch's gradient, in the dtype in which it was computed. Indices arrive in ascending order."""
        uses = self._sums[name]
        entry = uses.get(use)
        if entry is None:
            # a parameter that several visits use needs room of its own for each further use
            target = torch.empty_like(self._targets[name]) if uses else self._targets[name]
            entry = uses[use] = _TreeSum(target, first=not uses)
        if micro_batch < entry.latest:
            raise AssertionError(f"gradient of {name}: micro-batch {micro_batch} after {entry.latest}")
        entry.latest = micro_batch
        group = group_of(micro_batch, self._micro_batches, self._groups)
        self._merge(entry, name, group)
        leaf = (group, group + 1)
        held = entry.partials.get(leaf)
        if held is not None:
            held.add_(grad)
            return
        if entry.partials:
            slot = next(i for i in range(len(entry.used) + 1) if i not in entry.used)
            entry.used.add(slot)
            entry.slots[leaf] = slot
            entry.partials[leaf] = self._partial(slot, name) if entry.first else torch.empty_like(entry.target)
        else:
            entry.partials[leaf] = entry.target
        entry.partials[leaf].copy_(grad)

    def _merge(self, entry: _TreeSum, name: str, below: int) -> None:
        """Closes every inner node whose groups are all complete, that is, below group `below`."""
        nodes = tree(self._groups)
        while entry.merged < len(nodes) and nodes[entry.merged][2] <= below:
            low, middle, high = nodes[entry.merged]
            entry.merged += 1
            left, right = entry.partials.pop((low, middle), None), entry.partials.pop((middle, high), None)
            kept = (low, middle) if left is not None else (middle, high)
            slot = entry.slots.pop(kept, None)
            if left is not None and right is not None:
                left.add_(right)
                entry.used.discard(entry.slots.pop((middle, high), -1))
            result = left if left is not None else right
            if result is not None:
                entry.partials[low, high] = result
                if slot is not None:
                    entry.slots[low, high] = slot

    def close(self) -> dict[str, Tensor]:
        """`{name: fp32 sum}`, in the targets. A parameter that got no gradient is absent: "none", never zeros."""
        result: dict[str, Tensor] = {}
        for name, uses in self._sums.items():
            total: Tensor | None = None
            for use in sorted(uses):
                entry = uses[use]
                self._merge(entry, name, self._groups)
                (value,) = entry.partials.values()
                if total is None:
                    total = value
                else:
                    total.add_(value)
            if total is not None:
                if total is not self._targets[name]:
                    total = self._targets[name].copy_(total)
                result[name] = total
        self._sums.clear()
        return result


def sum_of_squares(grad: Tensor) -> float:
    """fp64 sum of squares of an fp32 tensor, in pieces of 65,536 elements added in order, as the contract has it."""
    total = 0.0
    for piece in grad.reshape(-1).split(NORM_PIECE):
        wide = piece.double()
        total += torch.dot(wide, wide).item()
    return total
