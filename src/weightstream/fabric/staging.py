"""Staged gradients: reduced, and waiting at the store for their update.

With clipping a block's gradient waits until the global norm is known; without, it waits for nothing. It lies in host
memory if the plan has room for it there, else in scratch on disk, through a ring of buffers.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from weightstream.fabric.reduction import BlockSum, Squares, squares_of, sum_of_squares
from weightstream.store.futures import chain, done, new_future
from weightstream.store.images import Image
from weightstream.store.layout import TensorSpec
from weightstream.store.segments import AlignedBuffer

T = TypeVar("T")
Key = tuple[str, int]
"""A whole tensor (row 0) or a panel of one: parameter name and first row."""


class Pool(Generic[T]):
    """Buffers that are taken in order of asking, each as soon as its last user is done. Nobody blocks.

    Buffers come back from the threads that moved their bytes, so that all of it happens under one lock.
    """

    def __init__(self, buffers: Iterable[T]) -> None:
        self.buffers = list(buffers)
        self._lock = threading.Lock()
        self._free = deque(self.buffers)
        self._waiting: deque[Future[T]] = deque()
        self._returning = 0

    def take(self) -> "Future[T]":
        """A future that is done when a buffer is free; it is the taker's until `give`."""
        with self._lock:
            if self._free:
                return done(self._free.popleft())
            future: Future[T] = new_future()
            self._waiting.append(future)
            return future

    def give(self, buffer: T, after: "Future[Any] | None" = None) -> None:
        """Returns a buffer, at once or when `after` is settled."""
        if after is not None:
            with self._lock:
                self._returning += 1
            after.add_done_callback(lambda _: self._hand_on(buffer, returning=1))
        else:
            self._hand_on(buffer, returning=0)

    def _hand_on(self, buffer: T, *, returning: int) -> None:
        with self._lock:
            self._returning -= returning
            if not self._waiting:
                self._free.append(buffer)
                return
            waiting = self._waiting.popleft()
        waiting.set_result(buffer)  # not under the lock: what waits for it begins here

    def take_or(
        self, make: Callable[[], T], *, patient: bool = True, wait: "Callable[[Future[T]], T]" = Future.result
    ) -> T:
        """A buffer at once: waits only for one that is on its way back, and if not `patient` not even for that; where
        none is, the pool grows by a new one."""
        with self._lock:
            grows = not self._free and (not patient or self._returning <= len(self._waiting))
            if grows:
                self.buffers.append(make())
                return self.buffers[-1]
        return wait(self.take())


class Scratch(Protocol):
    def scratch_write(self, key: object, view: memoryview) -> "Future[None]": ...
    def scratch_read(self, key: object, view: memoryview) -> "Future[None]": ...
    def scratch_free(self, key: object) -> None: ...


@dataclass(slots=True)
class _Staged:
    """One block's gradient, from its first micro-batch until its update."""

    buffer: "Future[AlignedBuffer]"
    image: Image
    targets: dict[str, Tensor] = field(default_factory=dict)
    total: BlockSum | None = None
    keys: tuple[Key, ...] = ()
    open: bool = True
    ready: "Future[Any] | None" = None


class Staging:
    """Sums gradients as they come and holds them until they are used.

    Args:
        images: how each block's gradient lies in memory, by block: at most, where `image_now` says how it does at present.
        in_ram: blocks whose gradient has host memory of its own; the others pass through `ring` buffers to scratch.
        partial_sums: how many partial sums may be alive beside the leftmost; each gets a buffer on the device.
        held_gradients: how many gradients of a parameter may be kept until they are added together.
        immediate: every gradient is used as soon as it is complete, so that none goes to scratch.
        wait: waits for a buffer, and may note for how long.
    """

    def __init__(
        self,
        scratch: Scratch,
        images: Sequence[Image],
        *,
        in_ram: frozenset[int],
        ring: int,
        partial_sums: int,
        held_gradients: int,
        device: torch.device,
        immediate: bool,
        image_now: Callable[[int], Image] | None = None,
        wait: "Callable[[Future[Any]], Any]" = Future.result,
    ) -> None:
        self._scratch, self._in_ram, self._immediate, self._wait = scratch, in_ram, immediate, wait
        self._image_now = image_now or images.__getitem__
        self._held = held_gradients
        self._device = device
        self._own = {index: AlignedBuffer(images[index].nbytes) for index in in_ram}
        largest = self._largest = max((image.nbytes for image in images), default=0)
        self._ring = Pool([AlignedBuffer(largest) for _ in range(ring)])
        self._partials = [AlignedBuffer(largest) for _ in range(partial_sums if device.type == "cpu" else 0)]
        self._staged: dict[int, _Staged] = {}

    def open(
        self,
        block: int,
        *,
        micro_batches: int,
        groups: int,
        brief: bool,
        share: range | None = None,
        present: int | None = None,
    ) -> BlockSum:
        """Makes room for a block's sum; waits for a buffer of the ring if it has none of its own.

        Args:
            share, present: with several ranks, what is added here; see `BlockSum`.
            brief: the sum is closed before that of another block is opened, so that it may use the shared partial sums
                and hold gradients.
        """
        # more sums than planned are open at once only in a first step that finds other calls than were guessed
        memory = self._own.get(block)
        patient = share is None  # with several ranks the runtime waits, outside of what it computes
        make = partial(AlignedBuffer, self._largest)
        image = self._image_now(block)
        if memory is None:
            memory = self._ring.take_or(make, patient=patient, wait=self._wait)
        staged = _Staged(done(memory), image)
        buffer = staged.buffer
        if self._device.type == "cpu":
            staged.targets = _tensors(image, buffer.result())
        else:  # sums are made where the gradients are, and leave the device once
            staged.targets = {spec.name: torch.empty(spec.shape, device=self._device) for spec in image.tensors}
        places = {spec.name: spec for spec in image.tensors}
        staged.total = BlockSum(
            staged.targets, lambda slot, name: self._partial(places[name], slot, brief),
            micro_batches=micro_batches, groups=groups, held=self._held if brief else 1,
            panels=image.panels, share=share, present=present,
        )  # fmt: skip
        self._staged[block] = staged
        return staged.total

    def _partial(self, spec: TensorSpec, slot: int, brief: bool) -> Tensor:
        if not brief or self._device.type != "cpu" or slot >= len(self._partials):
            # on a device the allocator keeps them; on the host, gradients that are absent can leave more sums open than planned
            return torch.empty(spec.shape, device=self._device)
        return self._partials[slot].tensor(spec.dtype, spec.offset, spec.shape)

    def sum_of(self, block: int) -> BlockSum | None:
        staged = self._staged.get(block)
        return None if staged is None else staged.total

    def close(self, block: int) -> Squares:
        """Closes a block's sum and stages it.

        Returns:
            The fp64 sums of squares of each parameter's gradient; empty if the block got none.
        """
        staged = self._staged.get(block)
        if staged is None or staged.total is None:
            return {}
        sums, squares = staged.total.close(), staged.total.squares
        if self._device.type != "cpu":
            landing = _tensors(staged.image, staged.buffer.result())
            sums = {name: landing[name].copy_(total) for name, total in sums.items()}
            staged.targets = landing
            squares = {}
            for name, total in sums.items():
                squares |= squares_of(name, total, staged.image.panels.get(name, ()))
        staged.total = None
        self._settle(block, staged, [(spec.name, spec.row) for spec in staged.image.pieces if spec.name in sums])
        return squares

    def buffer_of(self, block: int) -> AlignedBuffer:
        """The memory of a sum that is open."""
        return self._staged[block].buffer.result()

    def lend(self, block: int, until: "Future[Any]") -> None:
        """The sum was closed partly and is used elsewhere; its memory comes back when that is over."""
        staged = self._staged.pop(block)
        if block not in self._own:
            self._ring.give(staged.buffer.result(), after=until)

    def room(self, block: int) -> AlignedBuffer:
        """Memory for a block's gradient that is summed elsewhere; `settle` stages it."""
        buffer = self._own.get(block)
        if buffer is None:
            buffer = self._ring.take_or(lambda: AlignedBuffer(self._largest), wait=self._wait)
        self._staged[block] = _Staged(done(buffer), self._image_now(block))
        return buffer

    def settle(self, block: int, keys: Sequence[Key]) -> Squares:
        """What was asked for by `room` is complete: these pieces of it are gradients.

        Returns:
            The fp64 sum of squares of each.
        """
        staged = self._staged[block]
        buffer, wanted = staged.buffer.result(), set(keys)
        squares: Squares = {}
        for spec in staged.image.pieces:
            if (spec.name, spec.row) in wanted:
                grad = buffer.tensor(spec.dtype, spec.offset, spec.shape)
                squares[spec.name, spec.row] = sum_of_squares(grad)
        self._settle(block, staged, keys)
        return squares

    def _settle(self, block: int, staged: _Staged, keys: Sequence[Key]) -> None:
        staged.open, staged.keys, staged.targets = False, tuple(keys), {}
        if not keys:
            self.release(block)
        elif block not in self._in_ram and not self._immediate:
            buffer = staged.buffer.result()
            written = self._scratch.scratch_write(("gradient", block), buffer.view[: staged.image.nbytes])
            self._ring.give(buffer, after=written)
        else:
            staged.ready = done(None)

    def prefetch(self, block: int) -> None:
        """Begins to bring a staged gradient back from scratch; does nothing if it is in memory or there is none."""
        staged = self._staged.get(block)
        if staged is not None and staged.ready is None:
            self._bring_back(block, staged, self._ring.take())

    def _bring_back(self, block: int, staged: _Staged, buffer: "Future[AlignedBuffer]") -> None:
        nbytes = staged.image.nbytes
        staged.buffer = buffer
        staged.ready = chain(
            [buffer], lambda: self._scratch.scratch_read(("gradient", block), buffer.result().view[:nbytes])
        )

    def ready(self, block: int) -> "Future[Any]":
        """Done when `gradients(block)` may be called. Does not wait for buffers of gradients that were loaded ahead."""
        staged = self._staged.get(block)
        if staged is None:  # none of what this rank owns of it got a gradient
            return done(None)
        if staged.ready is None:
            buffer = self._ring.take_or(lambda: AlignedBuffer(self._largest), wait=self._wait)
            self._bring_back(block, staged, done(buffer))
        ready = staged.ready
        assert ready is not None
        return ready

    def gradients(self, block: int) -> dict[Key, Tensor]:
        """The fp32 gradients of the tensors and panels that got one; may be changed in place."""
        staged = self._staged.get(block)
        if staged is None:
            return {}
        buffer, keys = staged.buffer.result(), set(staged.keys)
        return {
            (spec.name, spec.row): buffer.tensor(spec.dtype, spec.offset, spec.shape)
            for spec in staged.image.pieces
            if (spec.name, spec.row) in keys
        }

    def recall(self) -> None:
        """Gives back the buffers of gradients that were brought back ahead, in an order that no longer holds."""
        for block, staged in self._staged.items():
            if self._passes_through_ring(block, staged) and staged.ready is not None:
                self._give_after(staged)
                staged.ready = None

    def _passes_through_ring(self, block: int, staged: _Staged) -> bool:
        """Whether a gradient is in scratch, or on its way back from there."""
        return block not in self._in_ram and not self._immediate and not staged.open and bool(staged.keys)

    def _give_after(self, staged: _Staged) -> None:
        """Returns a ring buffer once nothing moves in it; it may not even have been given yet."""
        buffer, ready = staged.buffer, staged.ready
        assert ready is not None
        ready.add_done_callback(lambda _: self._ring.give(buffer.result()))

    def release(self, block: int) -> None:
        """The gradient was used, or is not wanted."""
        staged = self._staged.pop(block, None)
        if staged is None or block in self._in_ram:
            return
        if self._passes_through_ring(block, staged):
            if staged.ready is not None:
                self._give_after(staged)
            self._scratch.scratch_free(("gradient", block))
        else:
            self._ring.give(staged.buffer.result())

    def staged(self) -> frozenset[int]:
        """Blocks that have a gradient waiting."""
        return frozenset(block for block, staged in self._staged.items() if staged.keys)

    def abort(self) -> None:
        """Drops the sums that were never closed."""
        for block, staged in list(self._staged.items()):
            if staged.open:
                self.release(block)

    def clear(self) -> None:
        """Drops every gradient that waits."""
        for block in list(self._staged):
            self.release(block)

    def close_buffers(self) -> None:
        """Gives the memory back."""
        self.clear()
        for _ in range(len(self._ring.buffers)):
            self._ring.take().result().close()
        for buffer in (*self._own.values(), *self._partials):
            buffer.close()


def _tensors(image: Image, buffer: AlignedBuffer) -> dict[str, Tensor]:
    return {spec.name: buffer.tensor(spec.dtype, spec.offset, spec.shape) for spec in image.tensors}
