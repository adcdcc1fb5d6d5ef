"""Parts of records that nobody has updated yet: initial values made anew at each read, and states of zeros."""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from weightstream.errors import StoreError
from weightstream.store.initial import generate_range
from weightstream.store.layout import MASK, Part, TensorSpec, gaps
from weightstream.store.masks import dense_of, put_bits, random_bits
from weightstream.store.segments import address, part_tensors

if TYPE_CHECKING:
    from weightstream.store.initial import Recipe
    from weightstream.store.sparsity import InitialMask

# One task makes this many elements: enough to be worth a thread, little enough that its fp32 temporary stays small.
TASK_ELEMENTS = 1 << 18
_SERIAL_ELEMENTS = 1 << 15


def generation_tasks(
    part: Part,
    view: memoryview,
    recipes: "Mapping[str, Recipe]",
    seed: int,
    block: str,
    masks: "Mapping[str, InitialMask] | None" = None,
) -> list[Callable[[], None]]:
    """Tasks, in any order and thread, that together fill `view` with the part at version 0.

    Raises:
        StoreError: a parameter has no recipe, or its mask is given and was never written.
    """
    for start, stop in gaps(part):
        view[start:stop] = bytes(stop - start)
    if part.name == MASK:
        found = zip(part.tensors, part_tensors(part, view).values(), strict=True)
        return [partial(_choose, seed, spec, tensor) for spec, tensor in found]
    if part.name not in ("copy", "param"):
        return [partial(_zero, view)]
    missing = [spec.name for spec in part.tensors if spec.name not in recipes]
    if missing:
        raise StoreError(
            f"block {block!r}: parameter {missing[0]!r} was never written and has no recipe for its initial value; "
            "import its values, or create the store with a recipe for it"
        )
    given = [name for name, mask in (masks or {}).items() if mask.rule == "given" and part.has(name)]
    if given:
        raise StoreError(
            f"block {block!r}: the mask of parameter {given[0]!r} is given, and was never written; import its values, or "
            "create the store with a rule for its mask"
        )
    tasks: list[Callable[[], None]] = []
    for spec, tensor in zip(part.tensors, part_tensors(part, view).values(), strict=True):
        flat = tensor.reshape(-1)
        if spec.piece is not None:
            tasks.append(partial(_generate_kept, recipes[spec.name], seed, spec, flat))
            continue
        for start in range(0, flat.numel(), TASK_ELEMENTS):
            piece = flat[start : start + TASK_ELEMENTS]
            tasks.append(partial(_generate, recipes[spec.name], seed, spec, start, piece))
    return tasks


def _generate(recipe: "Recipe", seed: int, spec: TensorSpec, start: int, piece: torch.Tensor) -> None:
    start += spec.first_element
    stop = start + piece.numel()
    out = piece if piece.dtype == torch.float32 else torch.empty(piece.numel(), dtype=torch.float32)
    generate_range(recipe, seed, spec.name, spec.whole_shape, start, stop, out)
    if out is not piece:
        # In pieces below the size from which PyTorch would start an OpenMP team in this thread.
        for at in range(0, out.numel(), _SERIAL_ELEMENTS):
            piece[at : at + _SERIAL_ELEMENTS].copy_(out[at : at + _SERIAL_ELEMENTS])


def _choose(seed: int, spec: TensorSpec, mask: torch.Tensor) -> None:
    put_bits(spec, random_bits(seed, spec), mask)


def _generate_kept(recipe: "Recipe", seed: int, spec: TensorSpec, values: torch.Tensor) -> None:
    """The initial values at the non-zeros of a piece: those that the dense tensor would have there."""
    kept = dense_of(spec, random_bits(seed, spec)).reshape(-1)
    done = 0
    for start in range(0, kept.numel(), TASK_ELEMENTS):
        mask = kept[start : start + TASK_ELEMENTS]
        first = spec.first_element + start
        dense = generate_range(recipe, seed, spec.name, spec.whole_shape, first, first + mask.numel())
        found = dense[mask]
        values[done : done + found.numel()].copy_(found)
        done += found.numel()


def _zero(view: memoryview) -> None:
    ctypes.memset(address(view), 0, view.nbytes)
