"""Sums of gradients that come packed: those of some records of a family, a tensor for each of its parameters.

They are added as soon as the contract's order has it: what a micro-batch gives is added to its group when the micro-batch
is through, and groups are added when a node of the tree is complete. So what a step holds of a family follows from the
records that it reaches and from the number of groups, not from that of micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightstream.schedule.reduction import group_of, tree

Node = tuple[int, int]
"""A node of the contract's tree: its first reduction group, and the one behind its last."""


@dataclass(slots=True)
class Packed:
    """A tensor per template parameter, (records, *shape) in fp32, of the records of these numbers."""

    numbers: Tensor
    tensors: list[Tensor]

    def of(self, which: Tensor) -> "Packed":
        """Those for which this is true."""
        return Packed(self.numbers[which], [tensor[which] for tensor in self.tensors])

    def plus(self, other: "Packed") -> "Packed":
        """The sum of both, in the memory of this one where that is enough. A record that only one has is as it is there."""
        found, by_number = torch.sort(self.numbers)
        place = torch.searchsorted(found, other.numbers).clamp_(max=found.numel() - 1)
        both = found[place] == other.numbers
        rows, only = by_number[place[both]], ~both
        if bool(both.all()):
            for mine, others in zip(self.tensors, other.tensors, strict=True):
                mine.index_add_(0, rows, others)
            return self
        self.numbers = torch.cat([self.numbers, other.numbers[only]])
        for position, others in enumerate(other.tensors):  # one after another, so that only one is there twice
            self.tensors[position] = torch.cat([self.tensors[position], others[only]])
            self.tensors[position].index_add_(0, rows, others[both])
        return self

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + sum(tensor.nbytes for tensor in self.tensors)


def gradient_bytes(numel: int) -> int:
    """What one record of so many elements takes, with its number."""
    return torch.int64.itemsize + numel * torch.float32.itemsize


Sums = dict[int, dict[Node, Packed]]
"""Partial sums of gradients, by use and by node."""


@dataclass(slots=True)
class _TreeSum:
    """The sum of one use: of complete subtrees, and apart what the micro-batch that is under way has given so far."""

    partials: dict[Node, Packed] = field(default_factory=dict)
    latest: Packed | None = None
    micro_batch: int = 0  # the one under way; none before it gives anything any more
    merged: int = 0  # nodes of the tree


class Gradients:
    """What a rank's micro-batches give of one family in a step, summed as far as they have come.

    Of each use there are as many partial sums as `schedule.reduction.partial_sums` says, at most, and what one
    micro-batch gives; when the last one is through, there are the largest subtrees of the rank's share: one, if it is alone.
    """

    def __init__(self, groups: int) -> None:
        self._groups, self._micro_batches = groups, 0
        self._nodes: Sequence[tuple[int, int, int]] = ()
        self._uses: dict[int, _TreeSum] = {}

    def begin(self, micro_batches: int, share: range) -> None:
        """A step of so many micro-batches begins; those in this share of the reduction groups give gradients here."""
        self._uses, self._micro_batches = {}, micro_batches
        self._nodes = [node for node in tree(self._groups) if share.start <= node[0] and node[2] <= share.stop]

    def add(self, use: int, micro_batch: int, numbers: Tensor, gradients: Sequence[Tensor]) -> None:
        """What a micro-batch gives, perhaps not for the last time. Micro-batches of a use come in ascending order."""
        entry = self._uses.setdefault(use, _TreeSum())
        if micro_batch < entry.micro_batch:
            raise AssertionError(f"gradients of micro-batch {micro_batch} in use {use}: it was through already")
        if micro_batch > entry.micro_batch:
            self._sum_up(entry, micro_batch)
        packed = Packed(numbers.cpu(), [gradient.to("cpu", torch.float32) for gradient in gradients])
        entry.latest = packed if entry.latest is None else entry.latest.plus(packed)

    def through(self, use: int, micro_batch: int) -> None:
        """A micro-batch is through a use: it has given all that it gives."""
        entry = self._uses.get(use)
        if entry is not None:
            self._sum_up(entry, micro_batch + 1)

    def partial_sums(self) -> Sums:
        """The sums of the largest subtrees that lie within the share; what was given is gone."""
        found, self._uses = self._uses, {}
        for entry in found.values():
            self._sum_up(entry, self._micro_batches)
        return {use: found[use].partials for use in sorted(found)}

    def _sum_up(self, entry: _TreeSum, following: int) -> None:
        """All micro-batches before this one are through."""
        latest, entry.latest = entry.latest, None
        if latest is not None:
            group = group_of(entry.micro_batch, self._micro_batches, self._groups)
            before = entry.partials.get((group, group + 1))
            entry.partials[group, group + 1] = latest if before is None else before.plus(latest)
        entry.micro_batch = following
        below = self._groups
        if following < self._micro_batches:
            below = group_of(following, self._micro_batches, self._groups)
        while entry.merged < len(self._nodes) and self._nodes[entry.merged][2] <= below:
            _merge(entry.partials, self._nodes[entry.merged])
            entry.merged += 1

    @property
    def nbytes(self) -> int:
        """What is held of gradients and of sums now."""
        held = [packed for entry in self._uses.values() for packed in (*entry.partials.values(), entry.latest)]
        return sum(packed.nbytes for packed in held if packed is not None)

    def clear(self) -> None:
        self._uses = {}


def over_groups(sums: dict[Node, Packed], groups: int) -> Packed:
    """The sum of partial sums that have no group in common, in the contract's order, whoever made them."""
    for node in tree(groups):
        _merge(sums, node)
    (total,) = sums.values()
    return total


def _merge(sums: dict[Node, Packed], node: tuple[int, int, int]) -> None:
    """Puts the sum of a node in the place of those that it is made of, as far as they are there."""
    low, middle, high = node
    left, right = sums.pop((low, middle), None), sums.pop((middle, high), None)
    total = left.plus(right) if left is not None and right is not None else left or right
    if total is not None:
        sums[low, high] = total
