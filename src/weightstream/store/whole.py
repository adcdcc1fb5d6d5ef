"""Whole tensors by parameter name, however they are cut into units."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightstream.store.layout import TensorSpec
from weightstream.store.segments import RecordBuffer

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

    def view(self, index: int, name: str, part: str) -> Tensor:
        """A tensor of one record, or its panel of it, until another record is asked for."""
        if index != self._loaded:
            self._loaded = None
            self.store.load(index, self._buffer, self._parts).result()
            self._loaded = index
        return self._buffer.tensors(part)[name]

    def whole(self, indices: Sequence[int], name: str, parts: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a parameter that lies in these records, in order of row, by part: copies."""
        found: dict[str, Tensor] = {}
        for index in indices:
            for part in parts:
                spec = spec_of(self.store, index, name, part)
                if spec is None:
                    continue
                if part not in found:
                    found[part] = torch.empty(spec.whole_shape, dtype=spec.dtype)
                piece = self.view(index, name, part)
                (found[part] if spec.rows is None else found[part][spec.row : spec.row + spec.shape[0]]).copy_(piece)
        return found

    def close(self) -> None:
        self._buffer.close()


def spec_of(store: "Store", index: int, name: str, part: str) -> TensorSpec | None:
    """Where a parameter lies in a part of one record; None if it is not there."""
    layout = store.layout(index)
    if not layout.has(part):
        return None
    return next((spec for spec in layout.part(part).tensors if spec.name == name), None)


def parameters(store: "Store", part: str) -> Iterator[TensorSpec]:
    """What lies in one part: every whole tensor that the blocks have there, in order of unit, by its first piece."""
    for unit in store.units:
        layout = store.layout(unit.index)
        if layout.has(part):
            yield from (spec for spec in layout.part(part).tensors if spec.row == 0)


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
