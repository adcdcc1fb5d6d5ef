"""The fixed-order sum of a block's gradients, on its way from the workers to the store.

The order is the numerical contract's: inside a group by index of micro-batch, across groups in one binary tree, and for
a tied parameter each use on its own, then over uses in order of first use. All sums are fp32.

What is to be added is noted first and done later, for as many gradients as may be held, piece by piece: a piece of the
sum stays in the cache while every gradient's piece is added to it, and its squares are summed there too. Layer-major
order makes this possible, since all micro-batches' gradients of a block come one after another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightstream.schedule.reduction import group_of, subtrees, tree
from weightstream.store.images import Panel

NORM_PIECE = 65_536
SUM_PIECE = 2 * NORM_PIECE  # elements: the sum, a partial sum and a few gradients of it fit a core's second-level cache

Squares = dict[tuple[str, int], float]
"""fp64 sums of squares of gradients by parameter and first row: 0 for a whole tensor, one for each panel of a cut one."""

Place = Tensor | int
"""Where a partial sum lives: a flat tensor, or the number of a buffer that holds one piece."""


@dataclass(slots=True)
class _Partial:
    """A partial sum. Until something is added to it, it may be nothing but its only gradient."""

    place: Place
    source: Tensor | None


@dataclass(slots=True)
class _TreeSum:
    """One parameter's sum over micro-batches for one use. The leftmost partial sum lives in `target`."""

    target: Tensor
    first: bool
    partials: dict[tuple[int, int], _Partial] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    merged: int = 0
    latest: int = -1
    used: set[int] = field(default_factory=set)


class _Program:
    """Copies and additions that wait to be done, in order; each is elementwise, so that pieces may be done in turn."""

    def __init__(self) -> None:
        self._operations: list[tuple[Place, Place, bool]] = []
        self.gradients = 0

    def copy(self, target: Place, source: Place) -> None:
        self._operations.append((target, source, False))

    def add(self, target: Place, source: Place) -> None:
        self._operations.append((target, source, True))

    def run(
        self, scratch: Callable[[int], Tensor], panels: Sequence[Panel] = (), squares_of: Tensor | None = None
    ) -> list[float]:
        """Does all of it and forgets it; returns the fp64 sums of squares of `squares_of` (flat) as it is afterwards: one,
        or those of its panels."""
        operations, self._operations, self.gradients = self._operations, [], 0
        sizes, ends = _pieces(panels)
        cut: dict[int, tuple[Tensor, ...]] = {}
        for target, source, _ in operations:
            for place in (target, source):
                if isinstance(place, Tensor) and id(place) not in cut:
                    cut[id(place)] = place.split(sizes)
        if squares_of is not None and id(squares_of) not in cut:
            cut[id(squares_of)] = squares_of.split(sizes)
        squares, total = 0.0, []
        for index in range(max(map(len, cut.values()), default=0)):
            length = next(iter(cut.values()))[index].numel()

            def piece(place: Place, index: int = index, length: int = length) -> Tensor:
                return cut[id(place)][index] if isinstance(place, Tensor) else scratch(place)[:length]

            for target, source, add in operations:
                if add:
                    piece(target).add_(piece(source))
                else:
                    piece(target).copy_(piece(source))
            if squares_of is not None:
                squares = add_squares(squares, piece(squares_of))
                if index in ends:
                    total.append(squares)
                    squares = 0.0
        return total or [squares]


def _pieces(panels: Sequence[Panel]) -> tuple[int | list[int], set[int]]:
    """How a flat tensor is cut into pieces, none of which is in two panels; and which pieces end a panel."""
    sizes: list[int] = []
    ends: set[int] = set()
    for panel in panels:
        count = panel.stop - panel.start
        sizes += [min(SUM_PIECE, count - start) for start in range(0, count, SUM_PIECE)]
        ends.add(len(sizes) - 1)
    return sizes or SUM_PIECE, ends


class BlockSum:
    """Sums the gradients of one block's trained parameters.

    Args:
        targets: `{parameter name: fp32 tensor}` where the finished sums are wanted; contiguous.
        partial: `(slot, parameter name) -> fp32 tensor` of the parameter's shape: room for partial sums that are alive
            beside the leftmost one; slots count from 0. Not called when all gradients of a parameter may be held.
        held: how many gradients of a parameter may be kept until they are added, at least one.
        panels: those of the parameters that are cut: their squares are summed apart.
        share: the groups whose micro-batches are added here, all by default; `close_partly` then gives partial sums.
        present: how many micro-batches that are, all by default.
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        partial: Callable[[int, str], Tensor],
        *,
        micro_batches: int,
        groups: int,
        held: int = 1,
        panels: Mapping[str, Sequence[Panel]] | None = None,
        share: range | None = None,
        present: int | None = None,
    ) -> None:
        self._targets, self._partial = targets, partial
        self._micro_batches, self._groups, self._held = micro_batches, groups, held
        self._share = range(groups) if share is None else share
        self._present = micro_batches if present is None else present
        self._nodes = tree(groups)
        if share is not None:
            self._nodes = tuple(node for node in self._nodes if share.start <= node[0] and node[2] <= share.stop)
            if len(subtrees(groups, share)) > 1:
                self._held = 1  # partial sums remain, so that each needs a place of its own
        self._sums: dict[str, dict[int, _TreeSum]] = {name: {} for name in targets}
        self._programs: dict[str, _Program] = {name: _Program() for name in targets}
        self._panels = panels or {}
        self._scratch: list[Tensor] = []
        self.squares: Squares = {}
        """After `close`: the fp64 sums of squares of each sum, in pieces of 65,536 added in order; on the CPU only."""

    def add(self, name: str, use: int, micro_batch: int, grad: Tensor) -> None:
        """Adds one micro-batch's gradient, in the dtype in which it was computed. Indices arrive in ascending order."""
        uses = self._sums[name]
        entry = uses.get(use)
        if entry is None:
            # a parameter that several visits use needs room of its own for each further use
            target = self._targets[name]
            entry = uses[use] = _TreeSum((torch.empty_like(target) if uses else target).view(-1), first=not uses)
        if micro_batch < entry.latest:
            raise AssertionError(f"gradient of {name}: micro-batch {micro_batch} after {entry.latest}")
        entry.latest = micro_batch
        program = self._programs[name]
        group = group_of(micro_batch, self._micro_batches, self._groups)
        self._merge(entry, name, group)
        leaf = (group, group + 1)
        held = entry.partials.get(leaf)
        if held is not None:
            self._settle(program, held)
            program.add(held.place, grad.reshape(-1))
        else:
            entry.partials[leaf] = _Partial(self._place(entry, name, leaf), grad.reshape(-1))
        program.gradients += 1
        if program.gradients >= self._held and self._held < self._present:
            self._flush(name)

    def _place(self, entry: _TreeSum, name: str, leaf: tuple[int, int]) -> Place:
        """Where a leaf's sum is to live: the target if it is the leftmost, else the first slot that is free."""
        if not entry.partials:
            return entry.target
        slot = next(i for i in range(len(entry.used) + 1) if i not in entry.used)
        entry.used.add(slot)
        entry.slots[leaf] = slot
        if self._held >= self._present and len(self._nodes) == len(self._share) - 1 and entry.first:
            return slot  # it is gone when the only run of the program ends
        return (self._partial(slot, name) if entry.first else torch.empty_like(entry.target)).view(-1)

    def _settle(self, program: _Program, partial: _Partial) -> None:
        """Copies the only gradient to its place, so that others can be added to it."""
        if partial.source is not None:
            program.copy(partial.place, partial.source)
            partial.source = None

    def _merge(self, entry: _TreeSum, name: str, below: int) -> None:
        """Closes every inner node whose groups are all complete, that is, below group `below`."""
        nodes, program = self._nodes, self._programs[name]
        while entry.merged < len(nodes) and nodes[entry.merged][2] <= below:
            low, middle, high = nodes[entry.merged]
            entry.merged += 1
            left, right = entry.partials.pop((low, middle), None), entry.partials.pop((middle, high), None)
            kept = (low, middle) if left is not None else (middle, high)
            slot = entry.slots.pop(kept, None)
            if left is not None and right is not None:
                self._settle(program, left)
                program.add(left.place, right.place if right.source is None else right.source)
                entry.used.discard(entry.slots.pop((middle, high), -1))
            result = left if left is not None else right
            if result is not None:
                entry.partials[low, high] = result
                if slot is not None:
                    entry.slots[low, high] = slot

    def _flush(self, name: str, squares_of: Tensor | None = None) -> list[float]:
        program = self._programs[name]
        for entry in self._sums[name].values():
            for partial in entry.partials.values():
                self._settle(program, partial)
        return program.run(lambda slot: self._piece(slot, self._targets[name]), self._panels.get(name, ()), squares_of)

    def _piece(self, slot: int, like: Tensor) -> Tensor:
        while slot >= len(self._scratch):
            self._scratch.append(torch.empty(SUM_PIECE, dtype=like.dtype, device=like.device))
        return self._scratch[slot]

    def close_partly(self) -> dict[str, dict[int, dict[tuple[int, int], Tensor]]]:
        """Flat partial sums by parameter, use and node of the tree: of the largest subtrees within the share."""
        result: dict[str, dict[int, dict[tuple[int, int], Tensor]]] = {}
        for name, uses in self._sums.items():
            for entry in uses.values():
                self._merge(entry, name, self._share.stop)
            self._flush(name)
            found: dict[int, dict[tuple[int, int], Tensor]] = {}
            for use, entry in uses.items():
                found[use] = {}
                for node, partial in entry.partials.items():
                    assert isinstance(partial.place, Tensor)
                    found[use][node] = partial.place
            if found:
                result[name] = found
        self._sums.clear()
        return result

    def close(self) -> dict[str, Tensor]:
        """`{name: fp32 sum}`, in the targets. A parameter that got no gradient is absent: "none", never zeros."""
        result: dict[str, Tensor] = {}
        for name, uses in self._sums.items():
            if not uses:
                continue
            program, target = self._programs[name], self._targets[name].view(-1)
            total: Place | None = None
            for use in sorted(uses):
                entry = uses[use]
                self._merge(entry, name, self._groups)
                (value,) = entry.partials.values()
                self._settle(program, value)
                if total is None:
                    total = value.place
                else:
                    program.add(total, value.place)
            if total is not uses[next(iter(uses))].target:  # the first use to arrive has the target
                assert total is not None
                program.copy(target, total)
            squares = self._flush(name, target if target.device.type == "cpu" else None)
            if target.device.type == "cpu":
                rows = [panel.row for panel in self._panels.get(name, ())] or [0]
                self.squares.update({(name, row): value for row, value in zip(rows, squares, strict=True)})
            result[name] = self._targets[name]
        self._sums.clear()
        return result


def add_squares(total: float, values: Tensor) -> float:
    """`total` plus the fp64 sums of squares of an fp32 tensor's pieces of 65,536 elements, added one after another."""
    for piece in values.split(NORM_PIECE):
        wide = piece.double()
        total += torch.dot(wide, wide).item()
    return total


def sum_of_squares(grad: Tensor) -> float:
    """fp64 sum of squares of an fp32 tensor, in pieces of 65,536 elements added in order, as the contract has it."""
    return add_squares(0.0, grad.reshape(-1))


def squares_of(name: str, grad: Tensor, panels: Sequence[Panel] = ()) -> Squares:
    """The sums of squares of one gradient on the CPU: of all of it, or of each of its panels."""
    flat = grad.reshape(-1)
    if not panels:
        return {(name, 0): sum_of_squares(flat)}
    return {(name, panel.row): sum_of_squares(flat[panel.start : panel.stop]) for panel in panels}
