"""How sparse the pieces of a record are in one version: the counts that its layout follows from, and how masks begin.

A piece is a whole tensor or a panel of one, seen as a matrix (`sparse.grid`). What is kept of a sparse one are its
non-zeros and a mask. A version in which a piece is dense says nothing of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from weightstream.blocks import Parameter, Unit
from weightstream.errors import ConfigError, StoreError
from weightstream.sparse.grid import Grid

if TYPE_CHECKING:
    from weightstream.sparse.codec import Form

Rule = Literal["random", "given", "dense"]


@dataclass(frozen=True, slots=True)
class SparsePiece:
    """A piece of parameter `name` with so many non-zeros, which come in blocks of this shape."""

    name: str
    nonzeros: int
    block: tuple[int, int] = (1, 1)

    @property
    def ones(self) -> int:
        """Blocks that the mask keeps."""
        return self.nonzeros // prod(self.block)


Sparsity = tuple[SparsePiece, ...]
"""The sparse pieces of one version of a record, in order of its parameters."""

DENSE: Sparsity = ()


@dataclass(frozen=True, slots=True)
class InitialMask:
    """How the mask of a sparse parameter begins.

    Args:
        rule: `random`: so many non-zeros in each piece, the blocks with the smallest random numbers of (seed, name,
            index); `given`: written as version 0 before anything is read; `dense`: no mask at first.
        block: the shape of blocks, which divides every piece.
        counts: of non-zeros in each piece, in order of row, for `random`.
    """

    rule: Rule
    block: tuple[int, int] = (1, 1)
    counts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rule": self.rule, "block": list(self.block)}
        return found | ({"counts": list(self.counts)} if self.rule == "random" else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "InitialMask":
        rows, columns = data["block"]
        return cls(data["rule"], (rows, columns), tuple(data.get("counts", ())))


def cells_of(shape: Sequence[int], block: tuple[int, int]) -> int:
    """How many blocks a piece has."""
    return prod(shape) // prod(block)


def form_of(shape: Sequence[int], piece: SparsePiece) -> "tuple[Form, int]":
    """How a mask is written, and its bytes."""
    from weightstream.sparse.codec import mask_form  # with torch, which a glance at a manifest does without

    return mask_form(cells_of(shape, piece.block), piece.ones)


def check_piece(parameter: Parameter, piece: SparsePiece) -> None:
    """Refuse what cannot be kept sparsely.

    Raises:
        StoreError: saying why.
    """
    what = f"parameter '{parameter}' of shape {parameter.shape}"
    if len(parameter.shape) < 2 or not parameter.trainable:
        kind = "a frozen one" if not parameter.trainable else f"one of {len(parameter.shape)} dimensions"
        raise StoreError(
            f"{what}: only trained parameters of two or more dimensions are sparse, found {kind}; keep it dense"
        )
    high, wide = piece.block
    if high < 1 or wide < 1:
        raise StoreError(f"{what}: expected blocks of one element or more, found {high} x {wide}; give other blocks")
    try:
        Grid.of(parameter.shape, piece.block, name=str(parameter))
    except ConfigError as error:
        raise StoreError(str(error)) from None
    if not 0 <= piece.nonzeros <= parameter.numel or piece.nonzeros % (high * wide):
        raise StoreError(
            f"{what}: expected a multiple of {high * wide} non-zeros from 0 to {parameter.numel}, found {piece.nonzeros}; "
            "give another count"
        )


def initial_sparsities(units: Iterable[Unit], masks: Mapping[str, InitialMask]) -> list[Sparsity]:
    """The sparsity of every unit at version 0, as far as a rule gives it: elsewhere dense.

    Raises:
        StoreError: a mask is of no parameter, or of one that cannot have it.
    """
    units, begun, found = list(units), dict.fromkeys(masks, 0), list[Sparsity]()
    for unit in units:
        pieces = []
        for parameter in unit.parameters:
            mask = masks.get(parameter.name)
            if mask is None:
                continue
            number = begun[parameter.name]
            begun[parameter.name] += 1
            check_piece(parameter, SparsePiece(parameter.name, 0, mask.block))
            if mask.rule == "random":
                if number >= len(mask.counts):
                    raise _counts(parameter.name, number + 1, mask)
                pieces.append(SparsePiece(parameter.name, mask.counts[number], mask.block))
                check_piece(parameter, pieces[-1])
        found.append(tuple(pieces))
    for name, count in begun.items():
        if not count:
            raise StoreError(f"a mask is given for {name!r}, which is no parameter of the model; give names of its own")
        if masks[name].rule == "random" and count != len(masks[name].counts):
            raise _counts(name, count, masks[name])
    return found


def _counts(name: str, pieces: int, mask: InitialMask) -> StoreError:
    return StoreError(
        f"parameter {name!r} is stored in {pieces} or more pieces, {len(mask.counts)} counts of non-zeros are given; give "
        "one for each piece"
    )


def sparsity_to_json(sparsity: Sparsity) -> list[list[Any]]:
    return [[piece.name, piece.nonzeros, *piece.block] for piece in sparsity]


def sparsity_from_json(data: Iterable[Sequence[Any]]) -> Sparsity:
    return tuple(SparsePiece(name, nonzeros, (high, wide)) for name, nonzeros, high, wide in data)
