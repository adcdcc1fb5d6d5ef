"""How a parameter gets its first values, as data: a short list of steps on one tensor.

A recipe is what a model's own initialisation did to a parameter, without the numbers. It takes no space to speak of,
reads and writes as JSON, and `initial.py` makes from it any range of the tensor at any time. `recording.py` writes it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from weightstream.errors import StoreError

Operation = Literal[
    "fill",  # (value)
    "literal",  # the elements of the region in order of their index
    "uniform",  # (low, high)
    "normal",  # (mean, std)
    "truncated_normal",  # (mean, std, low, high, cdf of low, cdf of high)
    "multiply",  # (factor)
    "divide",  # (divisor)
    "add",  # (term)
    "clamp",  # (low, high); infinite where there is none
    "erfinv",
    "log",
    "sqrt",
    "absolute",
    "reciprocal",
]
OPERATIONS: frozenset[str] = frozenset(get_args(Operation))
# These give an element a value whatever it held; the others change what is there.
ASSIGNS: frozenset[str] = frozenset({"fill", "literal", "uniform", "normal", "truncated_normal"})
DRAWS: frozenset[str] = frozenset({"uniform", "normal", "truncated_normal"})


@dataclass(frozen=True, slots=True)
class Region:
    """Some elements of a tensor, by their index in row-major order: `offset + Σ i_k · strides_k`, `i_k < sizes_k`.

    Strides fall, and each exceeds what the ones after it span, so that an index tells its own place.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def last(self) -> int:
        """The highest index in it."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))

    @staticmethod
    def of(offset: int, sizes: Sequence[int], strides: Sequence[int]) -> "Region | None":
        """The region of a view; None where elements overlap or interleave so that an index has no single place."""
        dims = sorted(((s, n) for n, s in zip(sizes, strides, strict=True) if n != 1), key=lambda dim: -dim[0])
        merged: list[tuple[int, int]] = []  # (size, stride)
        for stride, size in dims:
            if merged and merged[-1][1] == stride * size:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        span = 0
        for size, stride in reversed(merged):
            if stride <= span:
                return None
            span += (size - 1) * stride
        return Region(offset, tuple(size for size, _ in merged), tuple(stride for _, stride in merged))


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the elements of `region` (None: all of them).

    `draw` numbers the random steps of a parameter, so that each has numbers of its own. Where two parameters were
    given the same random numbers, `source` names the parameter whose they are.
    """

    operation: Operation
    values: tuple[float, ...] = ()
    region: Region | None = None
    draw: int = 0
    source: str | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"operation": self.operation}
        if self.values:
            data["values"] = [value if math.isfinite(value) else str(value) for value in self.values]
        if self.region is not None:
            data["region"] = [self.region.offset, list(self.region.sizes), list(self.region.strides)]
        if self.draw:
            data["draw"] = self.draw
        if self.source is not None:
            data["source"] = self.source
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Step":
        operation = data["operation"]
        if operation not in OPERATIONS:
            raise StoreError(
                f"recipe step: expected an operation of {', '.join(sorted(OPERATIONS))}, found {operation!r}; "
                "the store may have been written by a later version of weightstream"
            )
        region = data.get("region")
        return Step(
            operation,
            tuple(float(value) for value in data.get("values", ())),
            None if region is None else Region(int(region[0]), tuple(region[1]), tuple(region[2])),
            int(data.get("draw", 0)),
            data.get("source"),
        )

    def __str__(self) -> str:
        values = self.values if len(self.values) <= 6 else (*self.values[:3], math.nan)
        inside = ", ".join("…" if math.isnan(value) else f"{value:g}" for value in values)
        place = "" if self.region is None else f" on {self.region.numel} elements from {self.region.offset}"
        return f"{self.operation}({inside}){place}{f' as {self.source}' if self.source else ''}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps that give a parameter its first values, in order; `str(recipe)` reads `normal(0, 0.02), fill(0) on …`."""

    steps: tuple[Step, ...]

    @classmethod
    def normal(cls, mean: float, std: float) -> "Recipe":
        """Independent normal numbers, made in fp64 by a counter-based generator (`store/generator.py`) and rounded to fp32."""
        return cls((Step("normal", (mean, std)),))

    @classmethod
    def fill(cls, value: float) -> "Recipe":
        """One value everywhere."""
        return cls((Step("fill", (value,)),))

    def to_json(self) -> list[dict[str, Any]]:
        """Its steps as JSON; `from_json` reads them."""
        return [step.to_json() for step in self.steps]

    @staticmethod
    def from_json(data: Sequence[Mapping[str, Any]]) -> "Recipe":
        """The recipe that `to_json` wrote.

        Raises:
            StoreError: a step that this version does not know.
        """
        return Recipe(tuple(Step.from_json(step) for step in data))

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps))
