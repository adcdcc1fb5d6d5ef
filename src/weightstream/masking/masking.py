"""Which parameters of a store are sparse, and how sparse each of their versions is.

A piece (a tensor, or a panel of one) is named by its parameter and its first row. How many cells it has after an update
follows from how many it had, the step and the settings alone, or from a search that all ranks take part in
(`apportioning.py`): so every rank knows it of every piece, whoever owns it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import product
from math import prod

from weightstream.blocks import Unit
from weightstream.sparse.algorithms import Turn, turn
from weightstream.sparse.pieces import SparsePiece, kept_cells, sparse_pieces
from weightstream.sparse.settings import Sparsity
from weightstream.store import sparsity as kept
from weightstream.store.block_bytes import Largest
from weightstream.store.owned import Holding
from weightstream.store.sparsity import InitialMask

Key = tuple[str, int]


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

    def become(self, holding: Holding, block: int, step: int) -> None:
        """Notes how sparse a block is that was just updated, wherever its records are."""
        units = holding.store.units_of(block)
        holding.become({u: self.after(u, holding.sparsity[u], step) for u in units if u in self.of_unit})


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
