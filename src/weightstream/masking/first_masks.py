"""The masks that a store begins with: where they are given, and those that follow from the first values of its weights."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import prod

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightstream.blocks import Parameter, Unit
from weightstream.errors import ConfigError
from weightstream.masking.apportioning import counts_of, numbers_of
from weightstream.masking.masking import Key, Masking
from weightstream.sparse.algorithms import initial_mask
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Keys, Mask, given_mask, magnitude_keys, some_and_every
from weightstream.sparse.pieces import SparsePiece
from weightstream.sparse.settings import Sparsity
from weightstream.store import sparsity as kept
from weightstream.store.layout import TensorSpec

Values = Callable[[Collection[str]], Iterator[tuple[TensorSpec, Tensor]]]
"""By names of parameters: the dense values of their pieces."""


class FirstMasks:
    """The masks of version 0 that follow from a store's first values or from files, as `store.given.fill` asks for them.

    Args:
        values: the first values; asked for a few times where masks are searched for.
    """

    def __init__(self, masking: Masking, values: Values) -> None:
        self._masking, self._values, self._searched = masking, values, False
        self._unlike = Counter(piece.group.patterns for piece in masking.pieces.values() if piece.group.init == "zeros")
        """By group, how many of its pieces have not been seen while none had a zero."""

    def __call__(self, spec: TensorSpec, values: Tensor) -> Tensor | None:
        piece = self._masking.pieces.get((spec.name, spec.row))
        if piece is None:
            return None
        if piece.group.given is not None:
            return _read_mask(piece.group.given, piece.parameter, piece.grid.block).dense(piece.parameter.shape)
        if piece.group.init == "zeros":
            return self._nonzeros(piece, values)
        if piece.count(0) is None and not self._searched:
            self._search()
        found = self._masking.found(piece, 0)
        return initial_mask(piece, values, seed=self._masking.seed, found=found).dense(piece.parameter.shape)

    def _nonzeros(self, piece: SparsePiece, values: Tensor) -> Tensor:
        """Where a masked checkpoint has weights; of a piece that has none its first cell."""
        some, _ = some_and_every(piece.grid, values != 0)
        cells = some.reshape(-1)
        if not cells.any():
            cells[0] = True
        patterns = piece.group.patterns
        if not cells.all():
            self._unlike.pop(patterns, None)
        elif patterns in self._unlike:
            self._unlike[patterns] -= 1
            if not self._unlike[patterns]:
                raise ConfigError(
                    f"sparsity group {', '.join(patterns)}: init: expected given weights of which some are zero, found none "
                    "that is; give the weights of a masked model, or init: magnitude to prune these"
                )
        return Mask(piece.grid, cells).dense(piece.parameter.shape)

    def _search(self) -> None:
        def own(pieces: Sequence[SparsePiece]) -> Iterator[tuple[int, Keys]]:
            number = numbers_of(pieces)
            for spec, values in self._values({piece.parameter.name for piece in pieces}):
                place = number[spec.name, spec.row]
                yield place, magnitude_keys(pieces[place].grid, values)

        counts: dict[Key, int] = {}
        for pieces in self._masking.searched:
            if pieces[0].count(0) is None:
                counts |= counts_of(pieces, 0, partial(own, pieces), lambda value: [value])
        self._masking.take(0, counts)
        self._searched = True


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
                counts[str(parameter)] = _read_mask(group.given, parameter, group.block).count
    return counts


def _read_mask(path: str, parameter: Parameter, block: tuple[int, int]) -> Mask:
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
    if bool(((rows != 0) & (rows != 1)).any()):
        raise ConfigError(
            f"mask of {parameter.name!r} in {path}: expected 0 or 1 for each element, found other numbers; give masks, not "
            "weights"
        )
    grid = Grid.of(parameter.shape, block, name=str(parameter))
    return given_mask(grid, rows, parameter.shape, name=str(parameter))
