"""Parts of records that nobody has updated yet: initial values made anew at each read, and states of zeros."""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from weightstream.errors import StoreError
from weightstream.store.initial import generate_range
from weightstream.store.layout import Part, TensorSpec, gaps
from weightstream.store.segments import address, part_tensors

if TYPE_CHECKING:
    from weightstream.store.initial import Recipe

# One task makes this many elements: enough to be worth a thread, little enough that its fp32 temporary stays small.
TASK_ELEMENTS = 1 << 18
_SERIAL_ELEMENTS = 1 << 15


def generation_tasks(
    part: Part, view: memoryview, recipes: "Mapping[str, Recipe]", seed: int, block: str
) -> list[Callable[[], None]]:
    """Tasks, in any order and thread, that together fill `view` with the part at version 0.

    Raises:
        StoreError: a parameter has no recipe.
    """
    for start, stop in gaps(part):
        view[start:stop] = bytes(stop - start)
    if part.name not in ("copy", "param"):
        return [partial(_zero, view)]
    missing = [spec.name for spec in part.tensors if spec.name not in recipes]
    if missing:
        raise StoreError(
            f"block {block!r}: parameter {missing[0]!r} was never written and has no recipe for its initial value; "
            "import its values, or create the store with a recipe for it"
        )
    tasks: list[Callable[[], None]] = []
    for spec, tensor in zip(part.tensors, part_tensors(part, view).values(), strict=True):
        flat = tensor.reshape(-1)
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


def _zero(view: memoryview) -> None:
    ctypes.memset(address(view), 0, view.nbytes)
