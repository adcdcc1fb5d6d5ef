"""Which product is used for a sparse weight: densely after it was expanded, or by a kernel, from what was measured.

A pure function of measured curves and facts of the weight, so that all ranks that have the same profile choose alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from weightstream.section import Section
from weightstream.sparse.kernels import Kernel

DENSE: Final = "dense"
CHOSEN_KERNELS = "chosen_kernels"
"""Of a store's contract: by name, the parameters that kernels multiply by, where that was left to be measured."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Curve(Section):
    """How many times faster than the dense product one kernel is, forward and both gradients, by density."""

    kernel: Kernel
    dtype: str
    """As in `float32`."""
    device: str = "cpu"
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    tokens: int = Field(ge=1)
    threads: int = Field(ge=1)
    densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=1)
    """Ascending."""
    speedups: tuple[Positive, ...]
    """Where it finds out at each fetch where the non-zeros are, one after the other with the product."""
    prepared_speedups: tuple[Positive, ...] = ()
    """Where that is known, or found beside what is computed; none for kernels that find it out as they multiply."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(one >= other for one, other in pairwise(self.densities)):
            raise ValueError(f"expected densities in ascending order, found {list(self.densities)}")
        for each in (self.speedups, self.prepared_speedups or self.speedups):
            if len(each) != len(self.densities):
                raise ValueError(f"expected {len(self.densities)} speedups, one per density, found {len(each)}")
        return self

    @property
    def crossover(self) -> float | None:
        """The density below which the kernel wins; None if it never does, and the last one measured if it always does."""
        return crossover(self.densities, self.speedups)

    def speedup(self, density: float) -> float:
        """Between measured densities on logarithmic scales; thinner than measured counts as the thinnest, denser as lost."""
        return 0.0 if density > self.densities[-1] else _between(self.densities, self.speedups, density)

    def prepared_speedup(self, density: float) -> float:
        """The same of what was prepared, where that was measured; denser than measured counts as the densest."""
        return _between(self.densities, self.prepared_speedups or self.speedups, density)


def _between(densities: Sequence[float], speedups: Sequence[float], density: float) -> float:
    points = list(zip(densities, speedups, strict=True))
    if density <= densities[0] or density >= densities[-1]:
        return points[0 if density <= densities[0] else -1][1]
    (d0, s0), (d1, s1) = next((one, other) for one, other in pairwise(points) if density <= other[0])
    part = math.log(density / d0) / math.log(d1 / d0)
    return s0 * (s1 / s0) ** part


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A sparse weight (or a panel of it) as it is multiplied: its pattern, and by how much."""

    block: tuple[int, int]
    density: float
    dtype: str
    tokens: int
    threads: int
    device: str = "cpu"


def crossover(densities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """Where the speedup falls to 1 first, between measured densities on logarithmic scales."""
    if speedups[0] <= 1:
        return None
    for (d0, s0), (d1, s1) in pairwise(zip(densities, speedups, strict=True)):
        if s1 <= 1:
            return d0 * (d1 / d0) ** (math.log(s0) / math.log(s0 / s1))
    return densities[-1]


def choose(curves: Sequence[Curve], piece: Piece) -> Kernel | Literal["dense"]:
    """`"dense"`, or the kernel that is fastest at the piece's density, if it is below that kernel's crossover.

    Of one kernel's curves the nearest is taken: the largest measured block that divides the piece's, then the nearest
    number of threads, then of tokens. So blocks that are smaller than all measured ones are not taken for fast.
    """
    best: Kernel | Literal["dense"] = DENSE
    fastest = 1.0
    for kernel in sorted({curve.kernel for curve in curves}):
        fitting = [curve for curve in curves if curve.kernel == kernel and _fits(curve, piece)]
        if not fitting:
            continue
        nearest = min(fitting, key=lambda curve: _distance(curve, piece))
        limit, speedup = nearest.crossover, nearest.speedup(piece.density)
        if limit is not None and piece.density < limit and speedup > fastest:
            best, fastest = kernel, speedup
    return best


def speedup_of(curves: Sequence[Curve], kernel: Kernel, piece: Piece) -> float | None:
    """How many times faster than the dense product one kernel is that was prepared, by the nearest of its curves; None if none
    is like it."""
    fitting = [curve for curve in curves if curve.kernel == kernel and _fits(curve, piece)]
    if not fitting:
        return None
    return min(fitting, key=lambda curve: _distance(curve, piece)).prepared_speedup(piece.density)


def _fits(curve: Curve, piece: Piece) -> bool:
    divides = piece.block[0] % curve.block[0] == 0 and piece.block[1] % curve.block[1] == 0
    return divides and curve.dtype == piece.dtype and curve.device == piece.device


def _distance(curve: Curve, piece: Piece) -> tuple[float, ...]:
    return (
        -curve.block[0] * curve.block[1],
        abs(math.log(curve.threads / piece.threads)),
        abs(math.log(curve.tokens / piece.tokens)),
        *map(float, (curve.threads, curve.tokens, *curve.block)),  # ties: the smaller one
    )


__all__ = ["CHOSEN_KERNELS", "DENSE", "Curve", "Piece", "choose", "crossover", "speedup_of"]
