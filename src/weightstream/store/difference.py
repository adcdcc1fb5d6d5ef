"""How far two stores are from each other, tensor by tensor: bit for bit equal, or the norm of the difference.

Parameters are matched by name, so the stores may be split into blocks, and cut, in different ways. One record of each
store is in memory at a time. Two stores without any difference have equal digests.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightstream.store.audit import largest_record
from weightstream.store.layout import DTYPE_NAMES, TensorSpec
from weightstream.store.whole import Reader, spec_of

if TYPE_CHECKING:
    from weightstream.store.store import Store

STEPS = "optimizer_steps"
"""Stands for a part where the count of optimizer steps is what differs."""
FAMILY, RECORD = "(family)", "(record)"
"""Stand for a part where a whole template, or that a record was ever written, is what differs."""

_CHUNK_ELEMENTS = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

State = Literal["equal", "differs", "other shape", "only in A", "only in B"]


@dataclass(frozen=True, slots=True)
class Distance:
    """From tensor a to tensor b, in fp64. `norm` and `largest` are over elements that are finite in both."""

    elements: int
    differing: int  # elements whose bits differ: 0.0 and -0.0 do, a NaN and the same NaN do not
    not_finite: int  # of these, those that are NaN or infinite in a or b
    norm: float  # L2 of a - b
    largest: float  # the largest |a - b|
    norm_a: float  # L2 of a's finite elements

    @property
    def relative(self) -> float | None:
        """The norm of the difference relative to a's; None where a is zero and the difference is not."""
        if self.norm == 0.0:
            return 0.0
        return self.norm / self.norm_a if self.norm_a else None

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(
            self.elements + other.elements,
            self.differing + other.differing,
            self.not_finite + other.not_finite,
            math.hypot(self.norm, other.norm),
            max(self.largest, other.largest),
            math.hypot(self.norm_a, other.norm_a),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one tensor; `a` and `b` describe the two where they cannot be subtracted."""

    name: str
    part: str
    state: State
    distance: Distance | None = None
    a: str = ""
    b: str = ""

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "part": self.part, "state": self.state}
        if self.distance is not None and self.state == "differs":
            found |= _distance_json(self.distance)
        return found | {key: text for key, text in (("a", self.a), ("b", self.b)) if text}

    def __str__(self) -> str:
        what = f"{self.name} {self.part}"
        if self.distance is not None and self.state == "differs":
            return f"{what}: {_described(self.distance)}"
        if self.a and self.b:
            return f"{what}: {self.a} in A, {self.b} in B"
        return f"{what}: {self.state}"


def distance(a: Tensor, b: Tensor) -> Distance:
    """Of two contiguous CPU tensors of one shape and dtype, with a few MiB of memory beside them."""
    total = Distance(0, 0, 0, 0.0, 0.0, 0.0)
    flat_a, flat_b = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, flat_a.numel(), _CHUNK_ELEMENTS):
        total += _chunk_distance(flat_a[start : start + _CHUNK_ELEMENTS], flat_b[start : start + _CHUNK_ELEMENTS])
    return total


def rows(a: "Store", b: "Store") -> Iterator[Row]:
    """Every tensor of both stores: first all of A's, record by record, then what only B has."""
    of_a, of_b = Reader(a, largest_record(a)), Reader(b, largest_record(b))
    try:
        for unit in a.units:
            # neighbours in B are read together, whatever their order in A
            names = [parameter.name for parameter in unit.parameters if parameter.row == 0]
            for in_b, name in sorted((list(b.units_with(name)), name) for name in names):
                yield from _parameter(of_a, a.units_with(name), of_b, in_b, name)
        yield from _families(of_a, of_b)
    finally:
        of_a.close()
        of_b.close()
    for unit in b.units:
        names = [parameter.name for parameter in unit.parameters if parameter.row == 0]
        for name in names:
            if not a.units_with(name):
                yield from (Row(name, part, "only in B") for part in _specs(b, (unit.index,), name))


def difference(a: "Store", b: "Store") -> dict[str, Any]:
    """All of it as JSON: both steps, whether the stores are equal, every tensor in order of name, a distance for each
    part over the tensors that both have, and one line that says it.

    Raises:
        DamagedRecordError: bytes of a store are not those that were written.
    """
    found = sorted(rows(a, b), key=lambda row: (row.name, row.part))
    parts: dict[str, Distance] = {}
    for row in found:
        if row.distance is not None:
            parts[row.part] = parts[row.part] + row.distance if row.part in parts else row.distance
    return {
        "a": {"path": str(a.path), "step": a.step},
        "b": {"path": str(b.path), "step": b.step},
        "equal": all(row.state == "equal" for row in found),
        "summary": _summary(found, parts),
        "parts": {name: _distance_json(found) for name, found in sorted(parts.items())},
        "tensors": [row.as_json() for row in found],
        "lines": [str(row) for row in found if row.state != "equal"],
    }


def _families(of_a: Reader, of_b: Reader) -> Iterator[Row]:
    """Records of families that were updated in either store; the others are equal where their templates and seeds are."""
    a, b = ({family.name: (first, family) for first, family in of.store.layouts.families} for of in (of_a, of_b))
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield Row(name, FAMILY, "only in A" if name in a else "only in B")
            continue
        (first_a, family_a), (first_b, family_b) = a[name], b[name]
        said_a, said_b = (f"{f.count} records, seed {of.store.seed}" for f, of in ((family_a, of_a), (family_b, of_b)))
        if said_a != said_b or family_a.to_json() != family_b.to_json():
            yield Row(name, FAMILY, "differs", a=said_a, b=said_b)
            continue
        written_a, written_b = (
            {row.block - first for row in of.store.living(first, first + family_a.count)}
            for of, first in ((of_a, first_a), (of_b, first_b))
        )
        for number in sorted(written_a | written_b):
            block = family_a.block(first_a + number, number)
            if number not in written_a or number not in written_b:
                yield Row(block.name, RECORD, "only in A" if number in written_a else "only in B")
            for parameter in block.parameters:
                yield from _parameter(of_a, (first_a + number,), of_b, (first_b + number,), parameter.name)


def _parameter(
    of_a: Reader, indices_a: Sequence[int], of_b: Reader, indices_b: Sequence[int], name: str
) -> Iterator[Row]:
    """All parts of a parameter that lies in these records of A and of B, if B has it."""
    specs_a, specs_b = _specs(of_a.store, indices_a, name), _specs(of_b.store, indices_b, name)
    shared: list[str] = []
    for part, spec_a in specs_a.items():
        spec_b = specs_b.get(part)
        if spec_b is None:
            yield Row(name, part, "only in A")
        elif (spec_a.whole_shape, spec_a.dtype) != (spec_b.whole_shape, spec_b.dtype):
            yield Row(name, part, "other shape", a=_shape(spec_a), b=_shape(spec_b))
        else:
            shared.append(part)
    for part, found in _distances(of_a, indices_a, of_b, indices_b, name, shared).items():
        yield Row(name, part, "differs" if found.differing else "equal", found)
    yield from (Row(name, part, "only in B") for part in specs_b if part not in specs_a)
    if indices_b:
        steps_a, steps_b = _steps(of_a.store, indices_a, name), _steps(of_b.store, indices_b, name)
        if steps_a != steps_b:
            yield Row(name, STEPS, "differs", a=steps_a, b=steps_b)


def _distances(
    of_a: Reader, indices_a: Sequence[int], of_b: Reader, indices_b: Sequence[int], name: str, parts: Sequence[str]
) -> dict[str, Distance]:
    if not parts:
        return {}
    if len(indices_a) == len(indices_b) == 1:
        return {
            part: distance(of_a.view(indices_a[0], name, part), of_b.view(indices_b[0], name, part)) for part in parts
        }
    found = dict.fromkeys(parts, Distance(0, 0, 0, 0.0, 0.0, 0.0))
    pieces_a, pieces_b = _pieces(of_a.store, indices_a, name), _pieces(of_b.store, indices_b, name)
    # rows that are one run in both; each record is read once
    for start, stop in pairwise(sorted({row for rows, _ in (*pieces_a, *pieces_b) for row in (rows.start, rows.stop)})):
        (rows_a, index_a), (rows_b, index_b) = (
            next(piece for piece in pieces if start in piece[0]) for pieces in (pieces_a, pieces_b)
        )
        for part in parts:
            a = of_a.view(index_a, name, part)[start - rows_a.start : stop - rows_a.start]
            b = of_b.view(index_b, name, part)[start - rows_b.start : stop - rows_b.start]
            found[part] += distance(a, b)
    return found


def _pieces(store: "Store", indices: Sequence[int], name: str) -> list[tuple[range, int]]:
    """Which rows of a parameter each of its records has."""
    specs = [(spec_of(store, index, name, "param"), index) for index in indices]
    return [(range(spec.row, spec.row + spec.piece_shape[0]), index) for spec, index in specs if spec is not None]


def _specs(store: "Store", indices: Sequence[int], name: str) -> dict[str, TensorSpec]:
    """Part → what the parameter has there, by the first piece that has it: another one may be dense, and have no mask."""
    found: dict[str, TensorSpec] = {}
    for index in indices:
        for part in store.layout(index).states:
            spec = spec_of(store, index, name, part.name)
            if spec is not None:
                found.setdefault(part.name, spec)
    return found


def _steps(store: "Store", indices: Sequence[int], name: str) -> str:
    """How many optimizer steps a parameter has had; one that is frozen none, whatever its record has had."""
    trained = any(p.trainable for p in store.parameters_of(indices[0]) if p.name == name)
    counts = dict.fromkeys(store.optimizer_steps(index) if trained else 0 for index in indices)
    return " ".join(map(str, counts))


def _chunk_distance(a: Tensor, b: Tensor) -> Distance:
    bits = _BITS[a.dtype.itemsize]
    differing = a.view(bits) != b.view(bits)
    count = int(differing.sum())
    x = a.to(torch.float64)
    finite_a = torch.isfinite(x)
    norm_a = _norm(x[finite_a])
    if not count:
        return Distance(a.numel(), 0, 0, 0.0, 0.0, norm_a)
    y = b.to(torch.float64)
    both = differing & finite_a & torch.isfinite(y)
    gaps = (x[both] - y[both]).abs()
    largest = float(gaps.max()) if gaps.numel() else 0.0
    return Distance(a.numel(), count, count - int(both.sum()), _norm(gaps), largest, norm_a)


def _norm(values: Tensor) -> float:
    """L2, scaled so that squares of large fp64 values do not overflow."""
    scale = float(values.abs().max()) if values.numel() else 0.0
    return scale * float(torch.linalg.vector_norm(values / scale)) if 0.0 < scale < math.inf else scale


def _shape(spec: TensorSpec) -> str:
    return f"{DTYPE_NAMES[spec.dtype]} {list(spec.whole_shape)}"


def _distance_json(found: Distance) -> dict[str, Any]:
    """JSON has no infinities: what overflows fp64 is None."""
    values = asdict(found) | {"relative": found.relative}
    return {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}


def _described(found: Distance) -> str:
    relative = "A is zero" if found.relative is None else f"{found.relative:.3g} of A's"
    text = f"norm {found.norm:.6g} ({relative}), largest {found.largest:.6g}"
    text += f", {found.differing} of {found.elements} elements"
    return text + (f", {found.not_finite} of them not finite" if found.not_finite else "")


def _summary(found: Sequence[Row], parts: dict[str, Distance]) -> str:
    tensors = [row for row in found if row.part not in (STEPS, FAMILY, RECORD)]
    counts = {state: sum(row.state == state for row in tensors) for state in State.__args__}  # type: ignore[attr-defined]
    if all(row.state == "equal" for row in found):
        return f"equal: all {len(tensors)} tensors, bit for bit"
    said = [f"{counts['differs']} of {len(tensors)} tensors differ"]
    said += [f"{count} {state}" for state, count in counts.items() if count and state not in ("equal", "differs")]
    steps = sum(row.part == STEPS for row in found)
    said += [f"{steps} parameters had other numbers of optimizer steps"] if steps else []
    alone = sum(row.part in (FAMILY, RECORD) for row in found)
    said += [f"{alone} families or their records are not in both"] if alone else []
    said += [f"{name}: {_described(parts[name])}" for name in sorted(parts) if parts[name].differing]
    return "; ".join(said)
