"""Memory for many records of one family, slot by slot, and what lies in it as few large tensors."""

import torch
from torch import Tensor

from weightstream.store.layout import ALIGN_PART, RecordLayout
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.units import align


class Arena:
    """Memory for so many records of one family. Nothing is resident until it is used."""

    def __init__(self, layout: RecordLayout, records: int) -> None:
        self._layout, self._stride = layout, self.slot_bytes(layout)
        self._memory = AlignedBuffer(records * self._stride)
        self._buffers: dict[int, RecordBuffer] = {}
        self._records = records

    @staticmethod
    def slot_bytes(layout: RecordLayout) -> int:
        """What one record takes."""
        return align(layout.image_nbytes, ALIGN_PART)

    def buffer(self, slot: int) -> RecordBuffer:
        found = self._buffers.get(slot)
        if found is None:
            found = RecordBuffer(self._layout.image_nbytes, within=(self._memory, slot * self._stride))
            self._buffers[slot] = found
        return found

    def tensors(self, part: str) -> list[Tensor]:
        """The tensors of a part of all records, (records, *shape) each, as views."""
        place, found = self._layout.part(part), []
        for spec in place.tensors:
            itemsize = spec.dtype.itemsize
            whole = torch.frombuffer(self._memory.view, dtype=spec.dtype)
            inner = torch.empty(spec.shape, device="meta").stride()
            at = (place.offset + spec.offset) // itemsize
            found.append(whole.as_strided((self._records, *spec.shape), (self._stride // itemsize, *inner), at))
        return found

    @property
    def nbytes(self) -> int:
        return self._records * self._stride

    def close(self) -> None:
        self._buffers.clear()
        self._memory.close()
