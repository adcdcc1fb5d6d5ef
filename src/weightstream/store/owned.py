"""What one memory rank holds: the units that it owns, by block, as whoever runs a schedule needs them.

A schedule speaks of blocks, the store keeps units. Here an operation on a block becomes operations on those of its units
that this rank owns; of some blocks that may be none. A rank that owns everything holds whole blocks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightstream.blocks import Block, Unit, cut
from weightstream.store.futures import done, gather
from weightstream.store.images import Image, gradient_bytes, gradient_image, slab_image
from weightstream.store.layout import Precision, RecordLayout, record_layout
from weightstream.store.optimizers import Optimizer
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.store.store import Store

Checksums = Mapping[int, Mapping[str, int]]
"""Unit → part → checksum."""


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of a block. `streamed` is all of it, as it lies in a slab; the others are of the units that are owned.

    `loaded` and `written` are what an update reads and writes, `gradients` what it is given: only units with trained
    parameters have updates. `stored` are the images of all.
    """

    streamed: int
    loaded: int
    written: int
    gradients: int
    stored: int


def block_bytes(
    units: Sequence[Unit], layouts: Sequence[RecordLayout], owned: Collection[int] | None = None
) -> BlockBytes:
    """Of a block that has these units, with a layout each; of a frozen one, as if it were updated as a whole.

    Args:
        owned: indices of units; all by default.
    """
    trainable = any(unit.trainable for unit in units)
    held = [(unit, layout) for unit, layout in zip(units, layouts, strict=True) if owned is None or unit.index in owned]
    updated = [layout for unit, layout in held if unit.trainable or not trainable]
    return BlockBytes(
        streamed=sum(layout.streamed.nbytes for layout in layouts),
        loaded=sum(part.nbytes for layout in updated for part in layout.states),
        written=sum(layout.image_nbytes for layout in updated),
        gradients=sum(gradient_bytes(unit) for unit, _ in held),
        stored=sum(layout.image_nbytes for _, layout in held),
    )


def bytes_of_blocks(
    blocks: Sequence[Block], *, precision: Precision, optimizer: Optimizer, panel_elements: int
) -> list[BlockBytes]:
    """Bytes of each block in a store that is not there yet."""
    units: list[list[Unit]] = [[] for _ in blocks]
    for unit in cut(blocks, panel_elements=panel_elements, panels=optimizer.elementwise):
        units[unit.block].append(unit)
    return [block_bytes(own, [record_layout(unit, precision, optimizer) for unit in own]) for own in units]


class WorkingBuffer:
    """Memory in which the records of a block are updated, one after another; bound to one block at a time."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._memory = AlignedBuffer(capacity_bytes)
        self._layouts: tuple[RecordLayout, ...] = ()
        self.records: tuple[RecordBuffer, ...] = ()

    def bind(self, layouts: Sequence[RecordLayout]) -> None:
        """Take the places of these records; see `RecordBuffer.bind`."""
        wanted = tuple(layouts)
        if len(wanted) == len(self._layouts) and all(a is b for a, b in zip(wanted, self._layouts, strict=True)):
            return
        needed = sum(layout.image_nbytes for layout in wanted)
        if needed > self.capacity_bytes:
            raise ValueError(
                f"the records from {wanted[0].block!r} on need {needed} bytes, this buffer has {self.capacity_bytes}; "
                "make the buffer as large as the records of the largest block"
            )
        self._layouts, records, start = wanted, [], 0
        for layout in wanted:
            records.append(RecordBuffer(layout, within=(self._memory, start)))
            start += layout.image_nbytes
        self.records = tuple(records)

    def close(self) -> None:
        """Give the memory back once the last tensor on it is gone."""
        for record in self.records:
            record.close()
        self._layouts = self.records = ()
        self._memory.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or the panel of one, in a working buffer: the rows from `row` on of parameter `name`.

    `count` is the number of the optimizer step that is due. The streamed `copy` is None where the master itself streams.
    """

    unit: int
    name: str
    row: int
    whole: bool
    trainable: bool
    count: int
    master: Tensor
    states: Mapping[str, Tensor]
    copy: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the whole parameter's shape."""
        return tensor if self.whole else tensor[self.row : self.row + self.master.shape[0]]


class Holding:
    """The units of a store that one memory rank owns (all by default), by block."""

    def __init__(self, store: Store, owned: Collection[int] | None = None) -> None:
        self.store = store
        self.blocks = store.blocks
        every = range(len(store.units))
        self.owned = frozenset(every if owned is None else owned)
        assert self.owned <= frozenset(every), "only units are owned, not records of families"
        members = [[store.units[index] for index in store.units_of(block.index)] for block in store.blocks]
        layouts = [[store.layout(unit.index) for unit in units] for units in members]
        self.slabs: tuple[Image, ...] = tuple(slab_image(found) for found in layouts)
        """Where each block's tensors lie in a slab."""
        self.gradients: tuple[Image, ...] = tuple(gradient_image(units) for units in members)
        """Where each block's gradients lie when they are summed and staged."""
        self.bytes: tuple[BlockBytes, ...] = tuple(
            block_bytes(units, found, self.owned) for units, found in zip(members, layouts, strict=True)
        )
        self._held = [tuple(unit.index for unit in units if unit.index in self.owned) for units in members]
        self._updated = [tuple(index for index in held if store.units[index].trainable) for held in self._held]

    def held(self, block: int) -> tuple[int, ...]:
        """The units of a block that are owned here."""
        return self._held[block]

    def updated(self, block: int) -> tuple[int, ...]:
        """Those of them that updates change, in order: they are what a working buffer has."""
        return self._updated[block]

    def span(self, image: Image, unit: int) -> slice:
        """The bytes of a unit in an image of its block."""
        start, stop = image.spans[unit - self.store.units_of(self.store.units[unit].block).start]
        return slice(start, stop)

    # bytes

    def fetch(self, block: int, view: memoryview) -> "Future[Any]":
        """Read what is streamed of the owned units to their places in a slab; see `Store.fetch`."""
        return self._fetch(block, self._held[block], view)

    def serve(self, block: int, buffer: WorkingBuffer, view: memoryview) -> "Future[Any]":
        """The same, with the units that have just been updated taken from their working buffer, here and now."""
        image = self.slabs[block]
        for unit, record in zip(self._updated[block], buffer.records, strict=True):
            _copy(record.view(record.layout.streamed.name), view[self.span(image, unit)])
        return self._fetch(block, [unit for unit in self._held[block] if unit not in self._updated[block]], view)

    def _fetch(self, block: int, units: Sequence[int], view: memoryview) -> "Future[Any]":
        image, view = self.slabs[block], view.cast("B")
        fetches = [self.store.fetch(unit, view[self.span(image, unit)]) for unit in units]
        return _together(fetches)

    def load(self, block: int, buffer: WorkingBuffer, *, check: bool = True) -> "Future[Any]":
        """Bind a buffer to a block and fill it with masters and states; see `Store.load`."""
        units = self._updated[block]
        buffer.bind([self.store.layout(unit) for unit in units])
        return _together(
            [self.store.load(unit, record, check=check) for unit, record in zip(units, buffer.records, strict=True)]
        )

    def check(self, block: int, buffer: WorkingBuffer) -> None:
        """Compare what `load(check=False)` read; see `Store.check`.

        Raises:
            DamagedRecordError: the bytes are not those that were written.
        """
        for unit, record in zip(self._updated[block], buffer.records, strict=True):
            self.store.check(unit, record)

    def checksums(self, block: int, buffer: WorkingBuffer) -> Checksums:
        """The checksums of what is about to be written."""
        records = zip(self._updated[block], buffer.records, strict=True)
        return {unit: self.store.checksums(unit, record) for unit, record in records}

    def write(self, block: int, buffer: WorkingBuffer, checksums: Checksums) -> "Future[Any]":
        """Write what is in a buffer as the next version and optimizer step of its units; see `Store.write`."""
        store = self.store
        return _together([
            store.write(unit, record, store.version(unit) + 1, store.optimizer_steps(unit) + 1, checksums.get(unit))
            for unit, record in zip(self._updated[block], buffer.records, strict=True)
        ])  # fmt: skip

    def pieces(self, block: int, buffer: WorkingBuffer) -> Iterator[Piece]:
        """Every tensor and panel in a working buffer, unit by unit."""
        for unit, record in zip(self._updated[block], buffer.records, strict=True):
            count = self.store.optimizer_steps(unit) + 1
            masters = record.tensors("param")
            copies = record.tensors("copy") if record.layout.has("copy") else {}
            states = {part.name: record.tensors(part.name) for part in record.layout.states if part.name != "param"}
            for parameter in self.store.units[unit].parameters:
                name = parameter.name
                own = {part: tensors[name] for part, tensors in states.items() if name in tensors}
                yield Piece(
                    unit, name, parameter.row, parameter.rows is None, parameter.trainable, count,
                    masters[name], own, copies.get(name),
                )  # fmt: skip

    # what stays in RAM

    def pin_copies(self, block: int) -> None:
        """Keep what is streamed of the owned units in memory; see `Store.pin`."""
        for unit in self._held[block]:
            self.store.pin(unit, [self.store.layout(unit).streamed.name])

    def pin_states(self, block: int) -> None:
        """Keep what updates of the owned units read in memory."""
        for unit in self._updated[block]:
            self.store.pin(unit, [part.name for part in self.store.layout(unit).states])

    def unpin(self, block: int) -> None:
        """Let go of all that is kept of a block."""
        for unit in self._held[block]:
            self.store.unpin(unit)


def _copy(source: memoryview, target: memoryview) -> None:
    torch.frombuffer(target, dtype=torch.uint8).copy_(torch.frombuffer(source, dtype=torch.uint8))


def _together(futures: Sequence["Future[Any]"]) -> "Future[Any]":
    """Done when all are; a block of one unit has but one."""
    if not futures:
        return done(None)
    return futures[0] if len(futures) == 1 else gather(futures)
