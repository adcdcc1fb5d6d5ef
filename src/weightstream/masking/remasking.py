"""The update of a block that has sparse parameters: the optimizer's step, and new masks where they are due.

A mask changes where the records are, in the working buffer of the update: by masters, mask, the dense gradient of a step
that forms one, step and seed alone. What the next one is like follows from `masking.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightstream.masking.masking import Key, Masking
from weightstream.sparse.algorithms import Turn, Updated, carry, next_mask, update
from weightstream.sparse.codec import encode_mask
from weightstream.sparse.masks import Mask
from weightstream.sparse.pieces import SparsePiece
from weightstream.store import masks
from weightstream.store.optimizer import Optimizer
from weightstream.store.owned import Holding, Piece, WorkingBuffer

Gradients = Mapping[Key, Tensor]


@dataclass(frozen=True)
class _Renewed:
    """What a piece is after its update, before it has been written to its place."""

    values: Tensor
    states: Mapping[str, Tensor]
    mask: Mask | None


class Remasking:
    """Updates blocks of one rank, and counts what comes to exist: for as long as an engine is open."""

    def __init__(self, masking: Masking) -> None:
        self.masking = masking
        self._grown: dict[str, int] = {}

    def update(
        self, holding: Holding, block: int, buffer: WorkingBuffer, gradients: Gradients, optimizer: Optimizer, step: int
    ) -> None:
        """The update of a block in its working buffer: the optimizer's step, then new masks where they are due."""
        after = {
            u: self.masking.after(u, holding.sparsity[u], step)
            for u in holding.updated(block)
            if u in self.masking.of_unit
        }
        resized = {unit: found for unit, found in after.items() if found != holding.sparsity[unit]}
        renewed: dict[tuple[int, str], _Renewed] = {}
        for piece in holding.pieces(block, buffer):
            grad = gradients.get((piece.name, piece.row))
            facts = self.masking.pieces.get((piece.name, piece.row))
            due = None if facts is None else self.masking.turn(facts, holding.sparsity[piece.unit], step)
            chosen = None if facts is None else self._chosen(facts, piece, step)
            if due is None or due.optimizer:
                piece.optimize(optimizer, grad, step)
            found = None
            if facts is not None and due is not None and due.mask:
                found = self._moved(facts, piece, grad if due.dense_gradient else None, due, step, chosen)
            if resized:
                renewed[piece.unit, piece.name] = found or _as_it_is(piece)
            elif found is not None:
                _put(piece, found)
        if resized:
            # one buffer has all units of the block: where one changes its size, those behind it lie elsewhere
            holding.rebind(block, buffer, resized)
            for piece in holding.pieces(block, buffer):
                _put(piece, renewed[piece.unit, piece.name])
        for piece in holding.pieces(block, buffer):
            piece.renew_copy()

    def take_grown(self) -> dict[str, int]:
        """By parameter whose mask was changed here since this was last asked: how many of its elements came to exist."""
        grown, self._grown = self._grown, {}
        return grown

    def _chosen(self, facts: SparsePiece, piece: Piece, step: int) -> Mask | None:
        """The mask of a piece whose count was searched for: by the values that the search saw, before the optimizer's step."""
        found = self.masking.found(facts, step)
        if found is None:
            return None
        mask = _mask_of(piece, facts)
        if found == mask.count:
            return None
        values = piece.master.view(mask.nonzeros, 1)
        return next_mask(facts, values, mask, None, step=step, seed=self.masking.seed, found=found)

    def _moved(
        self, facts: SparsePiece, piece: Piece, grad: Tensor | None, due: Turn, step: int, chosen: Mask | None
    ) -> _Renewed | None:
        """A piece with its next mask, which may be chosen already; None where RigL has nothing to grow by."""
        mask = _mask_of(piece, facts)
        if due.dense_gradient and grad is None and chosen is None and facts.count(step) in (None, mask.count):
            return None
        nonzeros = mask.nonzeros
        values = piece.master.view(nonzeros, 1)
        states = {name: state.view(nonzeros, 1) for name, state in piece.states.items() if state.numel() == nonzeros}
        dense = None if grad is None else grad.reshape(facts.parameter.shape)
        found: Updated = (
            update(facts, values, states, mask, dense, step=step, seed=self.masking.seed)
            if chosen is None
            else carry(values, states, mask, chosen)
        )
        grown = found.grown * facts.grid.cell_elements
        self._grown[piece.name] = self._grown.get(piece.name, 0) + grown
        others = {name: state.clone() for name, state in piece.states.items() if name not in states}
        return _Renewed(found.values, found.states | others, found.mask)


def _mask_of(piece: Piece, facts: SparsePiece) -> Mask:
    """The mask of a piece in a working buffer."""
    return Mask.full(facts.grid) if piece.mask is None else _kept_mask(piece)


def _as_it_is(piece: Piece) -> _Renewed:
    states = {name: state.clone() for name, state in piece.states.items()}
    return _Renewed(piece.master.clone(), states, None if piece.mask is None else _kept_mask(piece))


def _kept_mask(piece: Piece) -> Mask:
    assert piece.mask is not None
    assert piece.spec is not None
    return masks.mask_of(piece.spec, piece.mask)


def _put(piece: Piece, found: _Renewed) -> None:
    """Writes a piece to its place in a working buffer."""
    piece.master.copy_(found.values.view(piece.master.shape))
    for name, state in found.states.items():
        piece.states[name].copy_(state.view(piece.states[name].shape))
    if piece.mask is not None:
        assert found.mask is not None
        piece.mask.copy_(torch.from_numpy(encode_mask(found.mask)))
