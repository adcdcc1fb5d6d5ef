"""Where each number of a record lies: the image of a segment file, as data.

A segment file is one image: a safetensors header, padded so that data starts on a page boundary, then the record's
parts one after another: `copy` (what is streamed, in bf16 precision), `param` (fp32 masters), one part per optimizer
state. Of a sparse tensor these have its non-zeros only, as (non-zeros, 1), and a part `mask` behind the streamed one says
where they lie (`masks.py`): so what workers need of a record is one run of bytes. Every part starts on a page, so that it
can be moved by direct I/O alone; every tensor starts on a cache line. The gaps are declared as U8 tensors named
`pad/<n>`, because safetensors refuses files with holes.

A file that records share is a safetensors file, too: one header for all of them, then their parts (`shared.py`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, Protocol

import torch

from weightstream.blocks import Block, Parameter, Unit
from weightstream.errors import StoreError
from weightstream.store.sparsity import DENSE, SparsePiece, Sparsity, form_of
from weightstream.units import align

ALIGN_TENSOR = 64
ALIGN_PART = 4096
FORMAT = "weightstream-1"

Precision = Literal["bf16", "fp32"]

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_Wanted = tuple[Parameter, torch.dtype, tuple[int, ...]]

# Keys of the file begin with a part's name; these are taken.
_RESERVED_STATES = ("copy", "param", "mask", "pad")

MASK = "mask"
"""The part that says where the non-zeros of sparse tensors lie."""


class HasStates(Protocol):
    """The little that a layout needs to know of an optimizer."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one part; `name` is the parameter's name, `offset` counts bytes from the start of its part.

    `row` and `rows` are those of the parameter (`blocks.Parameter`): with `rows` it is a panel of a tensor of so many.
    Of a sparse one, and of its mask, `piece` says how sparse it is and `dense_shape` what it expands to.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row: int = 0
    rows: int | None = None
    piece: SparsePiece | None = None
    dense_shape: tuple[int, ...] | None = None

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Its own shape, expanded if it is sparse."""
        return self.shape if self.dense_shape is None else self.dense_shape

    @property
    def sparse(self) -> tuple[SparsePiece, tuple[int, ...]]:
        """How sparse it is, and its dense shape; only where it is."""
        assert self.piece is not None, "only sparse tensors have masks"
        assert self.dense_shape is not None
        return self.piece, self.dense_shape

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this is a panel of, or of the tensor itself."""
        shape = self.piece_shape
        return shape if self.rows is None else (self.rows, *shape[1:])

    @property
    def first_element(self) -> int:
        """Where it begins in the whole tensor, in elements."""
        return self.row * prod(self.piece_shape[1:])

    @property
    def last(self) -> bool:
        """Whether the whole tensor ends with it."""
        return self.rows is None or self.row + self.piece_shape[0] == self.rows


@dataclass(frozen=True, slots=True)
class Part:
    """What is read and checked as a whole: `offset` in the image and `nbytes` are multiples of `ALIGN_PART`."""

    name: str
    offset: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]

    def has(self, name: str) -> bool:
        """Whether a parameter lies in it."""
        return any(spec.name == name for spec in self.tensors)


@dataclass(frozen=True)
class RecordLayout:
    """The image of one record: header, then parts without gaps, `image_nbytes` in all. The same for every version of one
    sparsity."""

    block: str
    parts: tuple[Part, ...]
    header_nbytes: int
    image_nbytes: int
    sparsity: Sparsity = DENSE

    @property
    def parts_nbytes(self) -> int:
        """Bytes of all parts: what the record takes in a file that it shares."""
        return self.image_nbytes - self.header_nbytes

    def entries(self, base: int, owner: int) -> str:
        """What the header of a shared file says of this record, whose parts begin `base` bytes behind that header; names
        of padding hold `owner`, so that no other record has them."""
        return _tensors_json(self.parts, base, f"{owner}.")[1:-1]

    def header(self, version: int) -> bytes:
        """The `header_nbytes` bytes in front of the parts: a safetensors header padded with spaces."""
        return _header(self._metadata(version), self._tensors_json).ljust(self.header_nbytes, b" ")

    def part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            KeyError: this record has no such part.
        """
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self._by_name)
            raise KeyError(f"block {self.block!r} has no part {name!r}; its parts are {known}") from None

    def has(self, name: str) -> bool:
        """Whether this record has a part of that name (blocks without trained parameters have no states)."""
        return name in self._by_name

    def renamed(self, block: str, names: Mapping[str, str]) -> "RecordLayout":
        """The same for a block and parameters of other names, which must not be longer."""
        parts = [
            Part(
                part.name, part.offset, part.nbytes,
                tuple(TensorSpec(names[spec.name], spec.dtype, spec.shape, spec.offset, spec.nbytes) for spec in part.tensors),
            )
            for part in self.parts
        ]  # fmt: skip
        return RecordLayout(block, tuple(parts), self.header_nbytes, self.image_nbytes)

    @property
    def streamed(self) -> Part:
        """What workers fetch: the bf16 copy, else the masters themselves."""
        return self.parts[0]

    @property
    def fetched(self) -> tuple[Part, ...]:
        """The same with the mask, if there is one: neighbours in the file."""
        return self.parts[: 2 if self.has(MASK) else 1]

    @property
    def fetched_nbytes(self) -> int:
        """Bytes of what workers fetch."""
        return sum(part.nbytes for part in self.fetched)

    @property
    def states(self) -> tuple[Part, ...]:
        """What an update needs: the masters and the optimizer's states, and the mask if there is one."""
        return tuple(part for part in self.parts if part.name != "copy")

    def spec(self, part: str, name: str) -> TensorSpec | None:
        """Where a parameter lies in a part; None if it is not there."""
        if not self.has(part):
            return None
        return next((spec for spec in self.part(part).tensors if spec.name == name), None)

    def _metadata(self, version: int) -> dict[str, str]:
        said = {"block": self.block, "format": FORMAT, "version": str(version)}
        if self.sparsity:
            masks = {
                spec.name: {"block": list(piece.block), "form": form_of(shape, piece)[0], "shape": list(shape)}
                for spec in self.part(MASK).tensors
                for piece, shape in (spec.sparse,)
            }
            said["masks"] = json.dumps(masks, separators=(",", ":"))
        return said

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    @cached_property
    def _tensors_json(self) -> str:
        return _tensors_json(self.parts)


def record_layout(
    block: Unit | Block, precision: Precision, optimizer: HasStates, sparsity: Sparsity = DENSE
) -> RecordLayout:
    """The layout of the record of a unit, or of a whole block: a pure function, the same in every run.

    Raises:
        StoreError: the optimizer has a state whose name or dtype cannot be stored, or which cannot be cut into panels.
    """
    pieces = {piece.name: piece for piece in sparsity}
    kept = {p.name: (pieces[p.name].nonzeros, 1) if p.name in pieces else p.shape for p in block.parameters}
    wanted: dict[str, list[_Wanted]] = {}
    for part_name, dtype in [("copy", torch.bfloat16)] * (precision == "bf16") + [("param", torch.float32)]:
        wanted[part_name] = [(parameter, dtype, kept[parameter.name]) for parameter in block.parameters]
        if pieces and MASK not in wanted:
            wanted[MASK] = [_mask(p, pieces[p.name]) for p in block.parameters if p.name in pieces]
    for parameter in block.parameters:
        if not parameter.trainable:
            continue
        for state, (dtype, shape) in optimizer.states(kept[parameter.name]).items():
            if state in _RESERVED_STATES or "/" in state or dtype not in DTYPE_NAMES:
                raise StoreError(
                    f"block {block.name!r}: optimizer state {state!r} of {dtype} cannot be stored; expected a name "
                    f"without '/' other than {', '.join(_RESERVED_STATES)} and one of the dtypes "
                    f"{', '.join(DTYPE_NAMES.values())}; rename the state or choose another optimizer"
                )
            sparse = parameter.name in pieces
            if (parameter.rows is not None or sparse) and tuple(shape) != kept[parameter.name]:
                raise StoreError(
                    f"block {block.name!r}: optimizer state {state!r} of {parameter} has shape {tuple(shape)}, expected "
                    f"{kept[parameter.name]}; an optimizer with such states is not elementwise, and its tensors stay "
                    f"{'dense' if sparse else 'whole'}"
                )
            wanted.setdefault(state, []).append((parameter, dtype, tuple(shape)))

    parts: list[Part] = []
    offset = 0
    for part_name, tensors in wanted.items():
        part = _part(part_name, offset, tensors, pieces)
        parts.append(part)
        offset += part.nbytes
    # The header may not change its size with the version: room is left for the longest one.
    unplaced = RecordLayout(block.name, tuple(parts), 0, offset, sparsity)
    header_nbytes = align(len(_header(unplaced._metadata(2**63), _tensors_json(parts))), ALIGN_PART)
    placed = tuple(Part(part.name, header_nbytes + part.offset, part.nbytes, part.tensors) for part in parts)
    return RecordLayout(block.name, placed, header_nbytes, header_nbytes + offset, sparsity)


def gaps(part: Part) -> list[tuple[int, int]]:
    """The padding of a part as (start, stop) in bytes from its start."""
    found, position = [], 0
    for spec in part.tensors:
        if spec.offset > position:
            found.append((position, spec.offset))
        position = spec.offset + spec.nbytes
    if part.nbytes > position:
        found.append((position, part.nbytes))
    return found


def _mask(parameter: Parameter, piece: SparsePiece) -> _Wanted:
    return parameter, torch.uint8, (form_of(parameter.shape, piece)[1],)


def _part(name: str, offset: int, tensors: Iterable[_Wanted], pieces: Mapping[str, SparsePiece]) -> Part:
    specs, position = [], 0
    for parameter, dtype, shape in tensors:
        position = align(position, ALIGN_TENSOR)
        nbytes = prod(shape) * dtype.itemsize
        piece = pieces.get(parameter.name)
        dense_shape = None if piece is None else parameter.shape
        place = (position, nbytes, parameter.row, parameter.rows)
        specs.append(TensorSpec(parameter.name, dtype, tuple(shape), *place, piece, dense_shape))
        position += nbytes
    return Part(name, offset, align(position, ALIGN_PART), tuple(specs))


def shared_header(entries: Iterable[str], records: str, dead: Iterable[tuple[int, int]], nbytes: int) -> bytes:
    """The header of a file that records share.

    Args:
        entries: of each record (`RecordLayout.entries`).
        records: which records and versions these are, for whoever has the file alone: `<index>:<version>,…`.
        dead: bytes of no record, as (start, stop) from the end of the header.
        nbytes: of the whole header; it is padded to that.
    """
    unused = (
        f'"pad/{start}":{{"dtype":"U8","shape":[{stop - start}],"data_offsets":[{start},{stop}]}}'
        for start, stop in dead
    )
    text = _header({"format": FORMAT, "records": records}, "{" + ",".join((*entries, *unused)) + "}", nbytes)
    assert len(text) == nbytes, "room for the header was reckoned with every record"
    return text


def _tensors_json(parts: Iterable[Part], base: int = 0, owner: str = "") -> str:
    """The header's tensor entries, in order of offset; offsets count from the end of the header."""
    entries: dict[str, dict[str, object]] = {}
    pads = 0
    for part in parts:
        spans: list[tuple[int, int, str, str, tuple[int, ...]]] = [
            (spec.offset, spec.offset + spec.nbytes, f"{part.name}/{spec.name}", DTYPE_NAMES[spec.dtype], spec.shape)
            for spec in part.tensors
        ]
        for start, stop in gaps(part):
            spans.append((start, stop, f"pad/{owner}{pads}", "U8", (stop - start,)))
            pads += 1
        for start, stop, key, dtype, shape in sorted(spans, key=lambda span: span[:2]):
            entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [base + start, base + stop]}
        base += part.nbytes
    return json.dumps(entries, separators=(",", ":"))


def _header(metadata: Mapping[str, str], tensors_json: str, nbytes: int = 0) -> bytes:
    said = json.dumps(metadata, separators=(",", ":"))
    text = f'{{"__metadata__":{said}' + (f",{tensors_json[1:]}" if tensors_json != "{}" else "}")
    body = text.encode()
    # The length that safetensors stores counts the padding, so the body is padded before it is measured.
    padded = body.ljust(max(align(8 + len(body), ALIGN_PART), nbytes) - 8, b" ")
    return len(padded).to_bytes(8, "little") + padded
