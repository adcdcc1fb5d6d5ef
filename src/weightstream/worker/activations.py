"""Boundary activations: what backward needs again, kept within a budget.

The inputs of a visit leave device memory (`spill`) for host memory or scratch on disk and come back (`restore`) ahead of
their next use. A tensor keeps its identity: its storage is emptied in place and filled again, so that tapes, autograd
graphs and the model's own variables never notice. Only storages that nobody else can touch meanwhile are spilled. On a
CPU, host memory is where they are already.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from weightstream.store.segments import AlignedBuffer
from weightstream.units import align
from weightstream.worker import pages

MIN_BYTES = 4096
Key = tuple[int, int]  # (visit, micro-batch)


class Scratch(Protocol):
    """The part of the store that spilled activations and staged gradients use."""

    def scratch_write(self, key: object, view: memoryview) -> "Future[None]": ...
    def scratch_read(self, key: object, view: memoryview) -> "Future[None]": ...
    def scratch_free(self, key: object) -> None: ...


@dataclass(slots=True)
class _Spilled:
    """One emptied storage and where its bytes are: a host buffer, or scratch under `key`."""

    tensor: Tensor
    nbytes: int
    key: object
    buffer: AlignedBuffer | None
    on_disk: bool
    writing: "Future[None] | None" = None
    reading: "Future[None] | None" = None
    empty: bool = True


def _storage_uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined,no-any-return]


_ALONE = _storage_uses(torch.empty(8))  # what a storage with a single tensor counts, our own handle included


def spillable(tensor: Tensor, known_references: int, known_aliases: int = 0) -> bool:
    """Whether nothing but the tape can reach a tensor's bytes.

    Args:
        known_references: how many Python references the caller knows of, its own variables included; any other is
            somebody else's. What this function and `sys.getrefcount` add themselves is allowed for.
        known_aliases: how many other tensors on the same bytes the caller knows of: leaves of graphs that saved nothing.
    """
    return (
        tensor.requires_grad
        and tensor.is_floating_point()
        and tensor.nbytes >= MIN_BYTES
        and tensor.untyped_storage().nbytes() >= MIN_BYTES
        and tensor._use_count() == 1  # type: ignore[attr-defined]  # no graph node saved it
        and _storage_uses(tensor) == _ALONE + known_aliases  # no other tensor shares its bytes
        and sys.getrefcount(tensor) <= known_references + 2
    )


class Activations:
    """Moves boundary activations of one worker. All bytes it holds on the host come from a pool of aligned buffers.

    Args:
        wait: waits for bytes, and may note for how long.
    """

    def __init__(
        self, scratch: Scratch, device: torch.device, wait: "Callable[[Future[None]], Any]" = Future.result
    ) -> None:
        self._scratch, self._device, self._wait = scratch, device, wait
        self._spilled: dict[Key, list[_Spilled]] = {}
        self._by_storage: dict[int, tuple[Key, _Spilled]] = {}
        self._pool: dict[int, list[AlignedBuffer]] = defaultdict(list)
        self._bounces: list[tuple[Future[None], AlignedBuffer]] = []
        self.shared: set[int] = set()  # ids of tensors that several visits use: never spilled again
        self.spilled_bytes = 0
        self.restored_bytes = 0

    def backs(self, key: Key, tensor: Tensor) -> bool:
        """Whether a visit's tensor has been spilled before, so that an entry refers to it."""
        return any(entry.tensor is tensor for entry in self._spilled.get(key, ()))

    def is_out(self, tensor: Tensor) -> bool:
        """Whether a tensor's bytes are elsewhere now."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        return found is not None and found[1].empty

    def spill(self, key: Key, tensors: Iterable[Tensor], *, to_disk: bool) -> None:
        """Empties the storages of a visit's inputs. Bytes that were written once are not written again."""
        entries = self._spilled.setdefault(key, [])
        backed = {id(entry.tensor): entry for entry in entries}
        for tensor in tensors:
            if id(tensor) in self.shared:
                continue
            if id(tensor) in backed:
                if not backed[id(tensor)].empty:
                    self._empty(key, backed[id(tensor)])
                continue
            if pages.has_pages(tensor) and not to_disk:
                continue  # it is in host memory already
            nbytes = tensor.untyped_storage().nbytes()
            buffer = self._take(nbytes)
            _bytes_tensor(buffer, nbytes).copy_(_raw(tensor))
            entry = _Spilled(tensor, nbytes, ("activation", key, len(entries)), buffer, to_disk)
            if to_disk:
                entry.writing = self._scratch.scratch_write(entry.key, buffer.view)
                self._bounces.append((entry.writing, buffer))
                entry.buffer = None
            entries.append(entry)
            self.spilled_bytes += nbytes
            self._empty(key, entry)

    def _empty(self, key: Key, entry: _Spilled) -> None:
        storage = entry.tensor.untyped_storage()
        self._by_storage[storage._cdata] = (key, entry)
        if pages.has_pages(entry.tensor):
            pages.empty(entry.tensor)
        else:
            storage.resize_(0)
        entry.empty = True

    def restore(self, key: Key) -> None:
        """Begins to bring a visit's inputs back; `wait` ends it."""
        for entry in self._spilled.get(key, ()):
            if entry.empty and entry.on_disk and entry.reading is None:
                if entry.writing is not None:
                    self._wait(entry.writing)
                entry.buffer = self._take(entry.nbytes)
                entry.reading = self._scratch.scratch_read(entry.key, entry.buffer.view)

    def wait(self, key: Key) -> None:
        """Blocks until a visit's inputs are in device memory."""
        self.restore(key)
        for entry in self._spilled.get(key, ()):
            if entry.empty:
                self._fill(entry)

    def ensure(self, tensors: Iterable[Tensor]) -> None:
        """Brings back whatever of `tensors` was spilled under another visit; such a tensor stays from then on."""
        for tensor in tensors:
            found = self._by_storage.get(tensor.untyped_storage()._cdata)
            if found is not None and found[1].empty:
                self.shared.add(id(found[1].tensor))
                self.restore(found[0])
                self._fill(found[1])

    def _fill(self, entry: _Spilled) -> None:
        if entry.reading is not None:
            self._wait(entry.reading)
        assert entry.buffer is not None
        storage = entry.tensor.untyped_storage()
        if not pages.has_pages(entry.tensor):
            storage.resize_(entry.nbytes)
        _raw(entry.tensor).copy_(_bytes_tensor(entry.buffer, entry.nbytes))
        self._by_storage.pop(storage._cdata, None)
        entry.empty = False
        self.restored_bytes += entry.nbytes
        self._finish(entry)

    def _finish(self, entry: _Spilled) -> None:
        if entry.on_disk and entry.buffer is not None:
            self._give(entry.buffer)
            entry.buffer, entry.reading = None, None

    def drop(self, key: Key) -> None:
        """Forgets a visit's inputs: their backward is done."""
        for entry in self._spilled.pop(key, ()):
            if entry.on_disk:
                for moving in (entry.writing, entry.reading):
                    if moving is not None:
                        moving.exception()  # the buffer is not free before its bytes rest, even if nobody wants them
                self._finish(entry)
                self._scratch.scratch_free(entry.key)
            elif entry.buffer is not None:
                self._give(entry.buffer)
            self._by_storage.pop(entry.tensor.untyped_storage()._cdata, None)

    def clear(self) -> None:
        """End of a step: nothing of it remains."""
        for key in list(self._spilled):
            self.drop(key)
        self.shared.clear()

    def close(self) -> None:
        """Gives the host memory back."""
        self.clear()
        for future, buffer in self._bounces:
            future.result()
            buffer.close()
        self._bounces.clear()
        for buffers in self._pool.values():
            for buffer in buffers:
                buffer.close()
        self._pool.clear()

    def _take(self, nbytes: int) -> AlignedBuffer:
        size = align(nbytes, 4096)
        waiting = []
        for future, buffer in self._bounces:
            if future.done():
                future.result()
                self._give(buffer)
            else:
                waiting.append((future, buffer))
        while not self._pool[size] and len(waiting) > 3:  # the disk sets the pace, not the memory
            future, buffer = waiting.pop(0)
            self._wait(future)
            self._give(buffer)
        self._bounces = waiting
        return self._pool[size].pop() if self._pool[size] else AlignedBuffer(size)

    def _give(self, buffer: AlignedBuffer) -> None:
        self._pool[buffer.nbytes].append(buffer)


def _raw(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload,no-any-return]


def _bytes_tensor(buffer: AlignedBuffer, nbytes: int) -> Tensor:
    return buffer.tensor(torch.uint8, 0, (nbytes,))
