"""Whole tensors by parameter name, however they are cut into units."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightstream.store.layout import MASK, TensorSpec
from weightstream.store.masks import bits_of, dense_of, expanded
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import DENSE

if TYPE_CHECKING:
    from weightstream.store.store import Store


class Reader:
    """Records of a store's newest version, one at a time; the last one is kept, as neighbours are asked for together.

    Args:
        largest_bytes: room for the largest record that will be asked for.
        parts: what to load of a record; by default masters and states.
    """

    def __init__(self, store: "Store", largest_bytes: int, parts: Collection[str] | None = None) -> None:
        self.store = store
        self._parts = parts
        self._buffer = RecordBuffer(largest_bytes)
        self._loaded: int | None = None
        self._kept: dict[str, Tensor] = {}  # dense masks of that record

    def view(self, index: int, name: str, part: str) -> Tensor:
        """A tensor of one record, or its panel of it, until another record is asked for; dense, a mask as bool."""
        if index != self._loaded:
            self._loaded, self._kept = None, {}
            parts = self._parts
            if parts is not None:  # values that are sparse are of no use without their mask
                layout = self.store.layout(index)
                parts = [wanted for wanted in dict.fromkeys((*parts, MASK)) if layout.has(wanted)]
            self.store.load(index, self._buffer, parts).result()
            self._loaded = index
        spec = self._buffer.layout.spec(MASK, name)
        if spec is None:
            if part == MASK:  # another panel is sparse
                masters = self.store.layout_of(index, DENSE).spec("param", name)
                assert masters is not None, "every parameter has masters"
                return torch.ones(masters.shape, dtype=torch.bool)
            return self._buffer.tensors(part)[name]
        if name not in self._kept:
            self._kept[name] = dense_of(spec, bits_of(spec, self._buffer.tensors(MASK)[name]))
        return self._kept[name] if part == MASK else expanded(self._buffer.tensors(part)[name], self._kept[name])

    def whole(self, indices: Sequence[int], name: str, parts: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a parameter that lies in these records, in order of row, by part: copies."""
        found: dict[str, Tensor] = {}
        for index in indices:
            for part in parts:
                spec = spec_of(self.store, index, name, part)
                if spec is None:
                    continue
                if part not in found:  # of a panel that is dense where another is sparse every position is kept
                    empty = torch.ones if part == MASK else torch.empty
                    found[part] = empty(spec.whole_shape, dtype=spec.dtype)
                piece, height = self.view(index, name, part), spec.piece_shape[0] if spec.rows is not None else 0
                (found[part] if spec.rows is None else found[part][spec.row : spec.row + height]).copy_(piece)
        return found

    def close(self) -> None:
        self._buffer.close()


def spec_of(store: "Store", index: int, name: str, part: str) -> TensorSpec | None:
    """Where a parameter lies in a part of one record; None if it is not there. A mask is bool, as it is read."""
    spec = store.layout(index).spec(part, name)
    return spec if spec is None or part != MASK else replace(spec, dtype=torch.bool)


def parameters(store: "Store", part: str) -> Iterator[TensorSpec]:
    """What lies in one part: every whole tensor that the blocks have there, in order of unit, by its first piece."""
    for unit in store.units:
        for parameter in unit.parameters:
            if parameter.row == 0:
                found = (spec_of(store, index, parameter.name, part) for index in store.units_with(parameter.name))
                spec = next((spec for spec in found if spec is not None), None)
                if spec is not None:
                    yield spec


def tensors(store: "Store", part: str) -> Iterator[Tensor]:
    """The tensors of `parameters(store, part)`, in that order."""
    largest = max((store.layout(unit.index).image_nbytes for unit in store.units), default=0)
    reader = Reader(store, largest, [part])
    try:
        for spec in parameters(store, part):
            indices = store.units_with(spec.name)
            yield (
                reader.view(indices[0], spec.name, part)
                if spec.rows is None
                else (reader.whole(indices, spec.name, [part])[part])
            )
    finally:
        reader.close()
