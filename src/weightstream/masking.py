"""Which parameters of a store are sparse, how sparse each of their versions is, and what an update does to their masks.

A piece (a tensor, or a panel of one) is named by its parameter and its first row. How many cells it has after an update
follows from how many it had, the step and the settings alone, or from a search that all ranks take part in
(`apportioning.py`): so every rank knows it of every piece, whoever owns it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import product
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightstream.blocks import Parameter, Unit
from weightstream.errors import ConfigError
from weightstream.sparse.algorithms import Turn, Updated, carry, next_mask, turn, update
from weightstream.sparse.codec import encode_mask
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Mask, given_mask
from weightstream.sparse.pieces import SparsePiece, kept_cells, sparse_pieces
from weightstream.sparse.settings import Sparsity
from weightstream.store import masks
from weightstream.store import sparsity as kept
from weightstream.store.optimizer import Optimizer
from weightstream.store.owned import Holding, Largest, Piece, WorkingBuffer
from weightstream.store.sparsity import InitialMask

Key = tuple[str, int]
Gradients = Mapping[Key, Tensor]


@dataclass(frozen=True)
class _Renewed:
    """What a piece is after its update, before it has been written to its place."""

    values: Tensor
    states: Mapping[str, Tensor]
    mask: Mask | None


@dataclass
class Masking:
    """The sparse pieces of a store under one run's settings.

    Args:
        given: cells of pieces, by their names, where the settings do not say how many: known once a store is there, and
            of masks in files before.
    """

    settings: Sparsity
    units: Sequence[Unit]
    dense: frozenset[str]
    seed: int
    given: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = [p for unit in self.units for p in unit.parameters]
        found = sparse_pieces(self.settings, parameters, dense=self.dense, given_counts=self.given)
        self.pieces: dict[Key, SparsePiece] = {(p.parameter.name, p.parameter.row): p for p in found}
        self.of_unit: dict[int, list[SparsePiece]] = {}
        for unit in self.units:
            own = [self.pieces[p.name, p.row] for p in unit.parameters if (p.name, p.row) in self.pieces]
            if own:
                self.of_unit[unit.index] = own
        self.searched: tuple[tuple[SparsePiece, ...], ...] = tuple(
            tuple(sorted(pieces, key=lambda piece: (piece.parameter.name, piece.parameter.row)))
            for group in self.settings.groups
            if group.searched and (pieces := [piece for piece in found if piece.group is group])
        )
        """The pieces of each group in which only a search over all of them tells how many cells each keeps; in order of name,
        as that of records changes with the blocks that a model is cut into."""
        self._found: tuple[int, Mapping[Key, int]] = 0, {}
        self._grown: dict[str, int] = {}

    # how sparse

    def take(self, step: int, counts: Mapping[Key, int]) -> None:
        """What a search told: how many cells these pieces have after a step."""
        self._found = step, counts

    def found(self, piece: SparsePiece, step: int) -> int | None:
        """How many cells a piece has after a step, where that was searched for; None where it keeps those that it has."""
        searched, counts = self._found
        return counts.get((piece.parameter.name, piece.parameter.row)) if searched == step else None

    def cells(self, piece: SparsePiece, now: kept.Sparsity) -> int:
        """How many cells a piece has at present."""
        return self._cells(piece, next((found for found in now if found.name == piece.parameter.name), None))

    def initial(self) -> dict[str, InitialMask]:
        """How the mask of each parameter begins."""
        found: dict[str, list[SparsePiece]] = {}
        for piece in self.pieces.values():
            found.setdefault(piece.parameter.name, []).append(piece)
        return {name: _initial(pieces) for name, pieces in found.items()}

    def whole(self, step: int) -> frozenset[Key]:
        """The pieces of which a step forms and sums the dense gradient."""
        return frozenset(key for key, piece in self.pieces.items() if turn(piece, step, 0).dense_gradient)

    def after(self, unit: int, before: kept.Sparsity, step: int) -> kept.Sparsity:
        """How sparse a unit is after the update of a step."""
        found = {piece.name: piece for piece in before}
        for piece in self.of_unit.get(unit, ()):
            name = piece.parameter.name
            cells = self._cells(piece, found.get(name))
            target = piece.count(step) or self.found(piece, step) or cells
            if target != cells:
                found[name] = _kept(piece, target)
                if target == piece.grid.cells:
                    del found[name]
        return tuple(found[p.name] for p in self.units[unit].parameters if p.name in found)

    def expected(self, version: int) -> dict[int, kept.Sparsity]:
        """How sparse units are in a version, from the settings alone; where counts are searched for, in proportion."""
        found: dict[int, kept.Sparsity] = {}
        for unit, pieces in self.of_unit.items():
            own = []
            for piece in pieces:
                cells = piece.count(version)
                if cells is None:
                    cells = _likely(piece, version)
                own += [] if cells == piece.grid.cells else [_kept(piece, cells)]
            found[unit] = self._ordered(unit, own)
        return found

    def alike(self, steps: int) -> list[tuple[int, int]]:
        """Training steps that differ in how many non-zeros there are or in which gradients are dense, in order: the last of
        those that are alike, and how many there are from 1 to `steps`."""
        groups = {id(piece.group): piece for piece in self.pieces.values()}.values()
        found: dict[tuple[tuple[float, bool], ...], tuple[int, int]] = {}
        for step in range(1, steps + 1):
            key = tuple((piece.group.sparsity_at(step - 1), turn(piece, step, 0).dense_gradient) for piece in groups)
            found[key] = step, found.get(key, (0, 0))[1] + 1
        return sorted(found.values())

    def turn(self, piece: SparsePiece, before: kept.Sparsity, step: int) -> Turn:
        """What the update of a piece consists of."""
        return turn(piece, step, self.cells(piece, before), self.found(piece, step))

    def _cells(self, piece: SparsePiece, own: kept.SparsePiece | None) -> int:
        return piece.grid.cells if own is None else own.ones

    def densities(self, now: Mapping[int, kept.Sparsity]) -> dict[str, tuple[int, int]]:
        """By name of each parameter that may be sparse, how many non-zeros it has and how many elements."""
        found: dict[str, tuple[int, int]] = {}
        for unit, pieces in self.of_unit.items():
            own = {piece.name: piece for piece in now[unit]}
            for piece in pieces:
                name = piece.parameter.name
                nonzeros, elements = found.get(name, (0, 0))
                cells = self._cells(piece, own.get(name))
                found[name] = nonzeros + cells * piece.grid.cell_elements, elements + piece.grid.elements
        return found

    def largest(self, now: Mapping[int, kept.Sparsity] | None = None) -> Largest:
        """How sparse versions may be; `now` are those that there are already."""
        records, gradients, mixed = {}, {}, []
        for unit, pieces in self.of_unit.items():
            own = (now or {}).get(unit)
            options = [own] if own is not None else []
            options += [
                tuple(piece for found in chosen for piece in found)
                for chosen in product(*map(_extremes, _by_group(pieces)))
            ]
            records[unit] = [self._ordered(unit, option) for option in dict.fromkeys(options)]
            moving = {p.parameter.name for p in pieces if p.group.algorithm == "rigl"}
            always = set.intersection(*({piece.name for piece in option} for option in options)) - moving
            found = [piece for option in options for piece in option if piece.name in always]
            gradients[unit] = self._ordered(unit, sorted(found, key=lambda piece: piece.nonzeros))  # the largest stays
            if any(map(_unknown, pieces)) or any(map(_turn_apart, _by_group(pieces))):
                mixed.append(unit)
        return Largest(records, gradients, frozenset(mixed))

    def in_proportion(self) -> dict[int, kept.Sparsity]:
        """How sparse units are at version 0 if what only a search tells is shared out by size: right in sum."""
        return {
            unit: self._ordered(unit, (found for piece in pieces for found in _in_proportion(piece)))
            for unit, pieces in self.of_unit.items()
        }

    def _ordered(self, unit: int, pieces: Iterable[kept.SparsePiece]) -> kept.Sparsity:
        found = {piece.name: piece for piece in pieces}
        return tuple(found[p.name] for p in self.units[unit].parameters if p.name in found)

    def resizes(self, unit: int) -> bool:
        """Whether versions of a unit have other layouts than the one before."""
        return any(_changes(piece) for piece in self.of_unit.get(unit, ()))

    def constant(self, name: str) -> int | None:
        """How many non-zeros a parameter has in every version; None where that changes, or is searched for."""
        pieces = [piece for (own, _), piece in self.pieces.items() if own == name]
        if any(_changes(piece) or piece.count(0) in (None, piece.grid.cells) for piece in pieces):
            return None
        return sum(piece.nonzeros(0) or 0 for piece in pieces)

    def update_bytes(self, unit: int) -> int:
        """Host memory that the mask update of a unit needs, at most: keys, random numbers and places of one piece's cells,
        and of those whose size changes the numbers while they move."""
        pieces = [p for p in self.of_unit.get(unit, ()) if p.group.algorithm != "static" or _changes(p)]
        cells = max((piece.grid.cells for piece in pieces), default=0)
        elements = max((piece.grid.elements for piece in pieces), default=0)
        return 40 * cells + 24 * elements

    # updates

    def update(
        self, holding: Holding, block: int, buffer: WorkingBuffer, gradients: Gradients, optimizer: Optimizer, step: int
    ) -> None:
        """The update of a block in its working buffer: the optimizer's step, then new masks where they are due."""
        after = {u: self.after(u, holding.sparsity[u], step) for u in holding.updated(block) if u in self.of_unit}
        resized = {unit: found for unit, found in after.items() if found != holding.sparsity[unit]}
        renewed: dict[tuple[int, str], _Renewed] = {}
        for piece in holding.pieces(block, buffer):
            grad = gradients.get((piece.name, piece.row))
            facts = self.pieces.get((piece.name, piece.row))
            due = None if facts is None else self.turn(facts, holding.sparsity[piece.unit], step)
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

    def become(self, holding: Holding, block: int, step: int) -> None:
        """Notes how sparse a block is that was just updated, wherever its records are."""
        units = holding.store.units_of(block)
        holding.become({u: self.after(u, holding.sparsity[u], step) for u in units if u in self.of_unit})

    def _chosen(self, facts: SparsePiece, piece: Piece, step: int) -> Mask | None:
        """The mask of a piece whose count was searched for: by the values that the search saw, before the optimizer's step."""
        found = self.found(facts, step)
        if found is None:
            return None
        mask = mask_of(piece, facts)
        if found == mask.count:
            return None
        values = piece.master.view(mask.nonzeros, 1)
        return next_mask(facts, values, mask, None, step=step, seed=self.seed, found=found)

    def _moved(
        self, facts: SparsePiece, piece: Piece, grad: Tensor | None, due: Turn, step: int, chosen: Mask | None
    ) -> _Renewed | None:
        """A piece with its next mask, which may be chosen already; None where RigL has nothing to grow by."""
        mask = mask_of(piece, facts)
        if due.dense_gradient and grad is None and chosen is None and facts.count(step) in (None, mask.count):
            return None
        nonzeros = mask.nonzeros
        values = piece.master.view(nonzeros, 1)
        states = {name: state.view(nonzeros, 1) for name, state in piece.states.items() if state.numel() == nonzeros}
        dense = None if grad is None else grad.reshape(facts.parameter.shape)
        found: Updated = (
            update(facts, values, states, mask, dense, step=step, seed=self.seed)
            if chosen is None
            else carry(values, states, mask, chosen)
        )
        grown = found.grown * facts.grid.cell_elements
        self._grown[piece.name] = self._grown.get(piece.name, 0) + grown
        others = {name: state.clone() for name, state in piece.states.items() if name not in states}
        return _Renewed(found.values, found.states | others, found.mask)


def mask_of(piece: Piece, facts: SparsePiece) -> Mask:
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


def _kept(piece: SparsePiece, cells: int) -> kept.SparsePiece:
    return kept.SparsePiece(piece.parameter.name, cells * piece.grid.cell_elements, piece.grid.block)


def _likely(piece: SparsePiece, version: int) -> int:
    """The cells of a piece whose count is not known beforehand; of zeros that nobody has looked at nothing is known."""
    searched = piece.group.searched
    return kept_cells(piece.grid.cells, piece.group.sparsity_at(version)) if searched else piece.grid.cells


def _in_proportion(piece: SparsePiece) -> list[kept.SparsePiece]:
    cells = piece.count(0)
    if cells is None:
        cells = _likely(piece, 0)
    return [] if cells == piece.grid.cells else [_kept(piece, cells)]


def _initial(pieces: Sequence[SparsePiece]) -> InitialMask:
    """Of the pieces of one parameter."""
    first = pieces[0]
    counts = [piece.count(0) for piece in pieces]
    if all(count == piece.grid.cells for count, piece in zip(counts, pieces, strict=True)):
        return InitialMask("dense", first.grid.block)
    if not first.group.by_chance:
        return InitialMask("given", first.grid.block)
    return InitialMask("random", first.grid.block, tuple(piece.nonzeros(0) or 0 for piece in pieces))


def _counts(piece: SparsePiece) -> list[int]:
    """The counts of cells that a piece may have, as far as the largest partial one and the full one go, and the least."""
    group = piece.group
    versions = {0, group.begin, group.dense_until, group.last, *_partial(piece)}
    if group.dense_from is not None:
        versions |= {group.dense_from - 1, group.dense_from}
    return sorted({piece.count(version) or 0 for version in versions})


def _partial(piece: SparsePiece) -> tuple[int, ...]:
    """Of the versions in which a schedule changes counts, the first and the last in which a piece is not whole; between them
    it never is, since schedules only rise or only fall."""
    group = piece.group
    if group.algorithm != "gmp":
        return ()
    few, updates = sorted({0, group.dense_until, group.last}), range(group.begin, group.last + 1, group.every)
    orders = merge(few, updates), merge(reversed(few), reversed(updates), reverse=True)
    ends = (next((one for one in order if (piece.count(one) or 0) < piece.grid.cells), None) for order in orders)
    return tuple(version for version in ends if version is not None)


def _turn_apart(pieces: Sequence[SparsePiece]) -> bool:
    """Whether pieces of one group come to be whole, or cease to be it, in other versions than others of it."""
    return len({versions for piece in pieces if not _unknown(piece) and (versions := _partial(piece))}) > 1


def _by_group(pieces: Iterable[SparsePiece]) -> list[list[SparsePiece]]:
    found: dict[int, list[SparsePiece]] = {}
    for piece in pieces:
        found.setdefault(id(piece.group), []).append(piece)
    return list(found.values())


def _changes(piece: SparsePiece) -> bool:
    """Whether a piece has other counts in some versions than in others."""
    return not piece.group.settled if _unknown(piece) else len(_counts(piece)) > 1


def _unknown(piece: SparsePiece) -> bool:
    """Whether nothing but a bound is known of its counts."""
    return not piece.group.counted and piece.given_count is None


def _extremes(pieces: Sequence[SparsePiece]) -> list[list[kept.SparsePiece]]:
    """Of pieces of one group: all at their largest partial counts, and dense if some version is."""
    partial, full = [], False
    if any(map(_unknown, pieces)):
        most = [_at_most(piece) for piece in pieces]
        whole = any(found.ones >= piece.grid.cells - 1 for found, piece in zip(most, pieces, strict=True))
        options = [most, [_kept(piece, piece.grid.cells) for piece in pieces], []]  # the first masks may be whole, too
        return options if whole else options[:1]
    for piece in pieces:
        counts = _counts(piece)
        below = [count for count in counts if count < piece.grid.cells]
        if below:  # else it is whole in all versions, whatever becomes of others
            full |= piece.grid.cells in counts
            partial.append(_kept(piece, below[-1]))
    return [partial, []] if full else [partial]


def _at_most(piece: SparsePiece) -> kept.SparsePiece:
    """The most that a piece may keep if it is not left whole: all that the group keeps."""
    most = piece.grid.cells - 1
    if piece.group.searched and piece.group.settled:
        together = sum(prod(shape) for shape in piece.family) // piece.grid.cell_elements
        most = min(most, kept_cells(together, piece.group.sparsity_at(0)))
    return _kept(piece, max(1, most))


def counts_now(settings: Sparsity, units: Sequence[Unit], now: Mapping[int, kept.Sparsity]) -> dict[str, int]:
    """Cells of the pieces of which the settings do not say how many, and which stay as they are in a store.

    Args:
        now: how sparse units are.
    """
    counts: dict[str, int] = {}
    for unit in units:
        own = {piece.name: piece.ones for piece in now.get(unit.index, ())}
        for parameter in unit.parameters:
            group = settings.group_of(parameter.name)
            if group is not None and group.settled and not group.counted:
                counts[str(parameter)] = own.get(parameter.name, parameter.numel // prod(group.block))
    return counts


def require_said(
    settings: Sparsity, model: nn.Module, dense: Collection[str], given: Collection[str], path: object
) -> None:
    """Refuse to drop given weights unasked.

    Args:
        given: names of parameters whose first values are given.
        path: of the store that is to be made.

    Raises:
        ConfigError: with what to say.
    """
    for name, parameter in model.named_parameters():
        group = settings.group_of(name)
        if group is None or group.init is not None or not parameter.requires_grad or parameter.dim() < 2:
            continue
        if name in given and group.sparsity_at(0) and (name not in dense or group.include_all):
            raise ConfigError(
                f"store '{path}': weights are given for '{name}', which is to be sparse by group "
                f"{', '.join(group.patterns)}: expected init to say which of them exist, found nothing; give init: magnitude "
                "for the largest, zeros for those that are not zero, random, or a file of masks (`weightstream store import` "
                "takes the same by --masks)"
            )


def given_counts(settings: Sparsity, units: Sequence[Unit], dense: Collection[str]) -> dict[str, int]:
    """Cells of the masks that groups are given in files, by piece.

    Raises:
        ConfigError: a file cannot be read, lacks a mask, or has one of another shape.
    """
    counts: dict[str, int] = {}
    for unit in units:
        for parameter in unit.parameters:
            group = settings.group_of(parameter.name)
            if group is None or group.given is None or not parameter.trainable or len(parameter.shape) < 2:
                continue
            if parameter.name not in dense or group.include_all:
                counts[str(parameter)] = read_mask(group.given, parameter, group.block).count
    return counts


def read_mask(path: str, parameter: Parameter, block: tuple[int, int]) -> Mask:
    """The mask of a piece from a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            if parameter.name not in set(file.keys()):
                raise ConfigError(f"sparsity: {path} has no mask of {parameter.name!r}; add it, or give another init")
            found = file.get_slice(parameter.name)
            whole = parameter.shape if parameter.rows is None else (parameter.rows, *parameter.shape[1:])
            if tuple(found.get_shape()) != whole:
                raise ConfigError(
                    f"mask of {parameter.name!r} in {path}: expected shape {whole}, found {tuple(found.get_shape())}; give "
                    "masks of the same model"
                )
            rows = found[parameter.row : parameter.row + parameter.shape[0]]
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"sparsity: cannot read masks from {path}: {error}; give a safetensors file, or one of "
            "random, magnitude, zeros"
        ) from None
    grid = Grid.of(parameter.shape, block, name=str(parameter))
    return given_mask(grid, rows, parameter.shape, name=str(parameter))
