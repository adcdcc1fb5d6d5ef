"""A transaction: records changed in memory and published together, for programs that use the store by itself."""

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from weightstream.store.layout import MASK
from weightstream.store.segments import RecordBuffer

if TYPE_CHECKING:
    from weightstream.store.store import Store

Tensors = dict[str, dict[str, Tensor]]
"""Parameter name → part (`param`, `exp_avg`, …) → tensor."""


def tensors_of(buffer: RecordBuffer) -> Tensors:
    """The masters and states in a buffer, as views of it; of sparse tensors their non-zeros, and the mask as it is kept."""
    found: Tensors = {}
    for part in buffer.layout.states:
        for name, tensor in buffer.tensors(part.name).items():
            found.setdefault(name, {})[part.name] = tensor
    return found


class Transaction:
    """Records are loaded when first asked for and held in memory to the end; then all of them become new versions in one
    commit. After an exception nothing has happened.

    Made by `Store.transaction`.
    """

    def __init__(self, store: "Store", step: int, progress: Mapping[str, Any]) -> None:
        self._store, self._step, self._progress = store, step, progress
        self._buffers: dict[int, RecordBuffer] = {}
        self._counts: dict[int, int] = {}

    def __getitem__(self, index: int) -> Tensors:
        """A record's tensors, to be changed in place; frozen parameters have `param` only.

        Raises:
            IndexError: there is no such record.
            DamagedRecordError: its bytes are not those that were written.
        """
        if index not in self._buffers:
            buffer = RecordBuffer(self._store.layout(index))
            self._store.load(index, buffer).result()
            self._buffers[index], self._counts[index] = buffer, self._store.optimizer_steps(index)
        return tensors_of(self._buffers[index])

    def update(self, index: int, gradients: Mapping[str, Tensor]) -> None:
        """One step of the store's optimizer on a record.

        Args:
            gradients: parameter name → fp32 gradient of its shape (of a sparse one, of its non-zeros); parameters that are
                left out stay as they are.

        Raises:
            KeyError: the record has no such trained parameter.
            ValueError: a gradient of another shape.
        """
        tensors, count = self[index], self._counts[index] + 1
        for name, gradient in gradients.items():
            states = {part: tensor for part, tensor in tensors[name].items() if part not in ("param", MASK)}
            master = tensors[name]["param"]
            if gradient.shape != master.shape:
                raise ValueError(
                    f"gradient of {name!r}: expected shape {tuple(master.shape)}, found {tuple(gradient.shape)}"
                )
            self._store.optimizer.update(
                master, gradient.float().contiguous(), states, name=name, step=self._step, count=count
            )
        self._counts[index] = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            for buffer in self._buffers.values():
                buffer.close()
            self._buffers.clear()

    def _publish(self) -> None:
        store, records = self._store, []
        for index, buffer in self._buffers.items():
            if buffer.layout.has("copy"):
                for name, copy in buffer.tensors("copy").items():
                    copy.copy_(buffer.tensors("param")[name].to(torch.bfloat16))
            records.append((index, buffer, store.version(index) + 1, self._counts[index]))
        written = None
        try:
            written = store.write_many(records)
            store.commit(self._step, self._progress).result()
        except BaseException:
            if written is not None:
                written.exception()  # nothing may touch the buffers any more
            store.discard()
            raise
