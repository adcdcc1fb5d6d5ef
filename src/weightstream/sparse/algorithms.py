"""How masks change: static, gradual magnitude pruning, SET and RigL, piece by piece.

Everything follows from the piece's values, its mask, the dense gradient where one is asked for, the step and the seed.
At a step the store asks `turn` what is to be done, does the optimizer's step if there is one, and then calls `update`.

Survivors keep values and moments; cells that come to exist begin at zero with moments of zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightstream.sparse.codec import Places, expand
from weightstream.sparse.masks import (
    Bools,
    Keys,
    Mask,
    largest,
    magnitude_bits,
    magnitude_keys,
    random_keys,
    relative,
    smallest,
)
from weightstream.sparse.pieces import SparsePiece


@dataclass(frozen=True, slots=True)
class Turn:
    """What the update of one piece at one step consists of, in this order."""

    optimizer: bool
    mask: bool
    dense_gradient: bool


def turn(piece: SparsePiece, step: int, count: int, found: int | None = None) -> Turn:
    """What happens to a piece with `count` existing cells at training step `step`.

    A mask also changes where its count is not that of the schedule: at the schedule's own changes, and at the step after
    one that was skipped because its gradient was not finite.

    Args:
        found: the count after the step, where a search over all pieces of the group has told it.
    """
    moves = piece.group.updates_at(step)
    target = _target(piece, step, found)
    rigl = moves and piece.group.algorithm == "rigl"
    return Turn(optimizer=not rigl, mask=moves or (target is not None and target != count), dense_gradient=rigl)


@dataclass(frozen=True, slots=True)
class Updated:
    """A piece after its mask update; `dropped` and `grown` count cells that ceased and came to exist."""

    mask: Mask
    values: Tensor
    states: dict[str, Tensor]
    dropped: int
    grown: int


def update(
    piece: SparsePiece,
    values: Tensor,
    states: Mapping[str, Tensor],
    mask: Mask,
    dense_gradient: Tensor | None,
    *,
    step: int,
    seed: int,
) -> Updated:
    """The mask update of `step`, as `turn` announced it.

    Args:
        values: fp32, (nonzeros, 1); left as they are, like the states.
        states: those with a number per non-zero move with them, others stay.
        dense_gradient: fp32, of the piece's shape, where RigL grows by it.
    """
    return carry(values, states, mask, next_mask(piece, values, mask, dense_gradient, step=step, seed=seed))


def _target(piece: SparsePiece, step: int, found: int | None) -> int | None:
    """The count of a piece after a step; None where it stays as it is."""
    count = piece.count(step)
    return found if count is None else count


def next_mask(
    piece: SparsePiece,
    values: Tensor,
    mask: Mask,
    dense_gradient: Tensor | None,
    *,
    step: int,
    seed: int,
    found: int | None = None,
) -> Mask:
    """The mask after step `step`; `found` as in `turn`."""
    target = _target(piece, step, found)
    if target is not None and target != mask.count:
        return resized(piece, values, mask, target, step=step, seed=seed)
    if not piece.group.updates_at(step):
        return mask
    fraction = piece.group.drop_fraction_at(step)
    keys = existing_keys(mask, values)
    if piece.group.algorithm == "rigl":
        assert dense_gradient is not None, "RigL grows by the dense gradient"
        if piece.group.grow_by == "relative_gradient":
            dense_gradient = relative(mask.grid, dense_gradient)
        return _rigl(mask, keys, magnitude_keys(mask.grid, dense_gradient), fraction)
    numbers = random_keys(seed, piece.parameter.name, step, piece.first_cell, mask.grid.cells)
    return _set(mask, keys, values, numbers, fraction)


def existing_keys(mask: Mask, values: Tensor) -> Keys:
    """The magnitude of each existing cell as an integer, in order."""
    if mask.grid.block == (1, 1):
        return magnitude_bits(values.detach().numpy())
    dense = torch.empty(mask.grid.rows, mask.grid.columns)
    expand(values, Places.of(mask), dense)
    return magnitude_keys(mask.grid, dense)[mask.cells]


def resized(piece: SparsePiece, values: Tensor, mask: Mask, target: int, *, step: int, seed: int) -> Mask:
    """The mask with `target` cells: the largest of those that exist, or these and others at random.

    Fewer is one step of gradual magnitude pruning (Zhu and Gupta, 2017, section 3), and where a dense phase ends with
    `init: random` a random choice. What was pruned is gone: it does not come back by its old value.
    """
    if target > mask.count:
        numbers = random_keys(seed, piece.parameter.name, step, piece.first_cell, mask.grid.cells)
        return _replaced(mask, np.ones(mask.count, np.bool_), ~numbers, target - mask.count)
    by_chance = piece.group.algorithm != "gmp" and piece.group.by_chance
    if by_chance and mask.count == mask.grid.cells:
        numbers = random_keys(seed, piece.parameter.name, step, piece.first_cell, mask.grid.cells)
        return Mask(mask.grid, smallest(numbers, target))
    return _replaced(mask, largest(existing_keys(mask, values), target))


def _rigl(mask: Mask, keys: Keys, gradient_keys: Keys, fraction: float) -> Mask:
    """Drops the part `fraction` of the smallest |w| and grows as many of the largest |gradient|.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, algorithm 1: candidates are all cells but
    the survivors, so also those just dropped; one that is chosen again has not changed (as in the authors' code).
    """
    count = int(fraction * mask.count)
    return _replaced(mask, largest(keys, mask.count - count), gradient_keys, count)


def _set(mask: Mask, keys: Keys, values: Tensor, numbers: Keys, fraction: float) -> Mask:
    """Drops the part `fraction` of the positive weights and of the negative ones, the nearest to zero, and grows at random.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
    science", Nature Communications 9, 2018, algorithm 1; zeros count as positive, blocks have one sign. As with RigL a
    cell that was just dropped may be chosen again.
    """
    survivors = np.ones(mask.count, np.bool_)
    negative = np.zeros(mask.count, np.bool_)
    if mask.grid.block == (1, 1):
        negative = values.detach().reshape(-1).numpy() < 0
    for side in (negative, ~negative):
        places = np.flatnonzero(side)
        survivors[places] = largest(keys[places], places.size - int(fraction * places.size))
    return _replaced(mask, survivors, ~numbers, mask.count - int(np.count_nonzero(survivors)))


def _replaced(mask: Mask, survivors: Bools, scores: Keys | None = None, grown: int = 0) -> Mask:
    """The mask with those of its existing cells that survive, and the `grown` best others by `scores`."""
    cells = mask.cells.copy()
    cells[mask.cells] = survivors
    if scores is not None and grown:
        free = np.flatnonzero(~cells)
        cells[free[largest(scores[free], grown)]] = True
    return Mask(mask.grid, cells)


def carry(values: Tensor, states: Mapping[str, Tensor], old: Mask, new: Mask) -> Updated:
    """Values and states of one mask, moved to another."""
    before, after = old.segments(), new.segments()
    stays = before & after
    source, target = torch.from_numpy(stays[before]), torch.from_numpy(stays[after])
    width, nonzeros = old.grid.block[1], old.nonzeros

    def moved(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != nonzeros:
            return tensor.clone()
        out = tensor.new_zeros(new.nonzeros, *tensor.shape[1:])
        out.view(target.numel(), -1)[target] = tensor.reshape(source.numel(), -1)[source]
        assert tensor.numel() == source.numel() * width
        return out

    return Updated(
        new,
        moved(values),
        {name: moved(state) for name, state in states.items()},
        dropped=int(np.count_nonzero(old.cells & ~new.cells)),
        grown=int(np.count_nonzero(new.cells & ~old.cells)),
    )


def initial_mask(piece: SparsePiece, dense: Tensor | None, *, seed: int, found: int | None = None) -> Mask:
    """The mask of version 0 where it is not given.

    Args:
        dense: the piece's initial values, fp32; needed with `init: magnitude` alone.
        found: the count, where a search over all pieces of the group has told it.
    """
    count = _target(piece, 0, found)
    assert count is not None, "it is searched for before"
    assert not piece.group.masks_given, "it is given"
    if count == piece.grid.cells:
        return Mask.full(piece.grid)
    if piece.group.init == "magnitude":
        assert dense is not None, "magnitudes need values"
        return Mask(piece.grid, largest(magnitude_keys(piece.grid, dense), count))
    numbers = random_keys(seed, piece.parameter.name, 0, piece.first_cell, piece.grid.cells)
    return Mask(piece.grid, smallest(numbers, count))
