"""Initial values: any range of any parameter made from its recipe, at any time, in any order, on any machine.

Element i of parameter `name` depends on (seed, name, i) and the recipe alone. So a record that was never updated takes
no space, and threads, hosts and shards may each make the part they need.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.store import random_numbers
from weightstream.store.random_numbers import BLOCK_ELEMENTS, Floats, Words
from weightstream.store.recipes import DRAWS, Recipe, Region, Step
from weightstream.store.recording import record

__all__ = ["Recipe", "generate", "generate_range", "record"]

# Long enough that numpy is at work and not Python; the few fp64 arrays of this size in use at once fit a core's
# second-level cache.
_CHUNK_ELEMENTS = 1 << 15
# Where a step applies within a chunk: all of it, a run, or single elements.
_Place = slice | NDArray[np.intp]


def generate(recipe: Recipe, *, seed: int, name: str, shape: Sequence[int], out: Tensor | None = None) -> Tensor:
    """The initial values of parameter `name`, fp32, into `out` if given."""
    shape = tuple(shape)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32)
    elif not out.is_contiguous():
        raise ValueError(f"parameter {name!r}: expected a contiguous tensor to fill, found strides {out.stride()}")
    generate_range(recipe, seed, name, shape, 0, prod(shape), out.view(-1))
    return out


def generate_range(
    recipe: Recipe, seed: int, name: str, shape: Sequence[int], start: int, stop: int, out: Tensor | None = None
) -> Tensor:
    """Elements [start, stop), in row-major order, of the initial values of parameter `name`.

    Args:
        out: fp32, contiguous, `stop - start` elements; made where it is None.

    The result is the same for every way of cutting a tensor into ranges, and needs little memory beside `out`.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"parameter {name!r} of shape {tuple(shape)}: no elements [{start}, {stop})")
    if out is None:
        out = torch.empty(stop - start, dtype=torch.float32)
    if out.dtype != torch.float32 or out.numel() != stop - start or not out.is_contiguous():
        raise ValueError(
            f"parameter {name!r}: expected a contiguous fp32 tensor of {stop - start} elements, found "
            f"{tuple(out.shape)} in {out.dtype}"
        )
    target: NDArray[np.float32] = out.detach().view(-1).numpy()
    if start == stop:
        return out
    last = recipe.steps[-1]
    if last.operation == "fill" and last.region is None:
        target.fill(last.values[0])
        return out
    words = [
        Words(seed, name if step.source is None else step.source, step.draw) if step.operation in DRAWS else None
        for step in recipe.steps
    ]
    # Chunks begin at multiples of a Philox block wherever the range begins.
    for low in range(start - start % BLOCK_ELEMENTS, stop, _CHUNK_ELEMENTS):
        high = min(low + _CHUNK_ELEMENTS, stop)
        values = np.zeros(high - low)
        for step, source in zip(recipe.steps, words, strict=True):
            values = _apply(step, source, values, low)
        skipped = max(start - low, 0)
        # Rounded once, from fp64, at the end of the steps.
        with np.errstate(over="ignore"):
            target[low + skipped - start : high - start] = values[skipped:]
    return out


def _apply(step: Step, words: Words | None, values: Floats, low: int) -> Floats:
    """`step` on the elements [low, low + len(values)), given in `values`; the result may be the same array."""
    if step.region is None:
        return _compute(step, words, values, low, slice(None), None)
    found = _within(step.region, low, low + values.size)
    if found is not None:
        place, ranks = found
        values[place] = _compute(step, words, values, low, place, ranks)
    return values


def _compute(
    step: Step, words: Words | None, values: Floats, low: int, place: _Place, ranks: NDArray[np.int64] | None
) -> Floats:
    """The new values at `place`; `ranks` are their places within the step's region."""
    given = step.values
    if words is not None:
        drawn = words.take(low, values.size)[place]
        if step.operation == "normal":
            return _scaled(random_numbers.normal(drawn), given[1], given[0])
        fresh = random_numbers.uniform(drawn)
        if step.operation == "uniform":
            return _scaled(fresh, given[1] - given[0], given[0])
        mean, std, lowest, highest, cdf_low, cdf_high = given
        fresh = random_numbers.probit(_scaled(fresh, cdf_high - cdf_low, cdf_low - 0.5))
        return np.clip(_scaled(fresh, std, mean), lowest, highest)
    if step.operation == "fill":
        return np.full(values[place].shape, given[0])
    if step.operation == "literal":
        literal = np.asarray(given)
        return literal[low : low + values.size] if ranks is None else literal[ranks]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _arithmetic(step, values[place])


def _arithmetic(step: Step, old: Floats) -> Floats:
    match step.operation:
        case "multiply":
            return old * step.values[0]
        case "divide":
            return old / step.values[0]
        case "add":
            return old + step.values[0]
        case "clamp":
            return np.clip(old, step.values[0], step.values[1])
        case "erfinv":
            return random_numbers.erfinv(old)
        case "log":
            return random_numbers.log(old)
        case "sqrt":
            return np.sqrt(old)
        case "absolute":
            return np.abs(old)
        case "reciprocal":
            return 1.0 / old
        case _:
            raise AssertionError(f"{step.operation} is not arithmetic")


def _scaled(values: Floats, factor: float, term: float) -> Floats:
    """values * factor + term, in place."""
    if factor != 1.0:
        values *= factor
    if term != 0.0:
        values += term
    return values


def _within(region: Region, low: int, high: int) -> tuple[_Place, NDArray[np.int64]] | None:
    """Which of the elements [low, high) lie in `region`, as places from `low`, and their ranks within the region."""
    first, last = max(region.offset, low), min(region.last + 1, high)
    if first >= last:
        return None
    if region.strides in ((), (1,)):
        ranks = np.arange(first - region.offset, last - region.offset)
        return slice(first - low, last - low), ranks
    rest = np.arange(first - region.offset, last - region.offset)
    inside = np.ones(rest.size, dtype=bool)
    ranks = np.zeros(rest.size, dtype=np.int64)
    for size, stride in zip(region.sizes, region.strides, strict=True):
        digit, rest = np.divmod(rest, stride)
        inside &= digit < size
        ranks = ranks * size + digit
    inside &= rest == 0
    chosen = np.flatnonzero(inside)
    return (chosen + (first - low), ranks[chosen]) if chosen.size else None
