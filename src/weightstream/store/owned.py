"""What one memory rank holds: the units that it owns, by block, as whoever runs a schedule needs them.

A schedule speaks of blocks, the store keeps units. Here an operation on a block becomes operations on those of its units
that this rank owns; of some blocks that may be none. A rank that owns everything holds whole blocks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightstream.blocks import Unit
from weightstream.store.block_bytes import BlockBytes, Largest, block_bytes, only
from weightstream.store.futures import done, gather
from weightstream.store.images import Image, gradient_image, owned_gradients, slab_image
from weightstream.store.layout import MASK, RecordLayout, TensorSpec
from weightstream.store.optimizers import Optimizer
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.store.sparsity import DENSE, Sparsity
from weightstream.store.store import Store

_IMAGES_KEPT = 3

Checksums = Mapping[int, Mapping[str, int]]
"""Unit → part → checksum."""


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
    Of a sparse one `master`, `states` and `copy` are its non-zeros, and `mask`, as it is kept, says where these lie; `spec`
    describes it.
    """

    unit: int
    name: str
    row: int
    trainable: bool
    count: int
    master: Tensor
    states: Mapping[str, Tensor]
    copy: Tensor | None
    mask: Tensor | None = None
    spec: TensorSpec | None = None

    def optimize(self, optimizer: Optimizer, grad: Tensor | None, step: int) -> None:
        """The optimizer step that is due; a parameter without a gradient has none.

        Args:
            grad: fp32, of the shape of `master`; left as it is.
            step: of the training, whose learning rate it is.
        """
        if grad is not None:
            optimizer.update(self.master, grad, self.states, name=self.name, step=step, count=self.count)

    def renew_copy(self) -> None:
        """What streams is made of the master as it is now."""
        if self.copy is not None:
            self.copy.copy_(self.master)


class Holding:
    """The units of a store that one memory rank owns (all by default), by block.

    How sparse the newest versions of all units are is known here (`sparsity`), owned or not; whoever updates a block says
    what becomes of it (`become`), also where only others own it.

    Args:
        largest: of units that may be sparse, how sparse their versions may be: `bytes`, `gradients` and `staged` have room
            for each of these. By default they stay as they are.
        sparsity: of units that may be sparse, how sparse they are now; by default as the store says.
        driven: parameters that are not expanded in slabs.
    """

    def __init__(
        self,
        store: Store,
        owned: Collection[int] | None = None,
        largest: Largest | None = None,
        sparsity: Mapping[int, Sparsity] | None = None,
        driven: Collection[str] = (),
    ) -> None:
        self.store = store
        self.blocks = store.blocks
        every = range(len(store.units))
        self.owned = frozenset(every if owned is None else owned)
        assert self.owned <= frozenset(every), "only units are owned, not records of families"
        members = [[store.units[index] for index in store.units_of(block.index)] for block in store.blocks]
        varying = [unit.index for unit in store.units if any(p.name in store.masks for p in unit.parameters)]
        self.sparsity: dict[int, Sparsity] = dict(sparsity or {unit: store.sparsity(unit) for unit in varying})
        """Of the units that may be sparse: how sparse the newest version is, updates that are not written yet included."""
        self._accepted = dict(self.sparsity)
        self.whole: frozenset[tuple[str, int]] = frozenset()
        """Sparse pieces, by name and first row, whose gradients are dense at present."""
        now = Largest({unit: (found,) for unit, found in self.sparsity.items()}, self.sparsity)
        self.largest = replace(largest, records={**now.records, **largest.records}) if largest else now
        self.slabs: tuple[Image, ...] = tuple(
            slab_image([self._layout_of(u, only(self.sparsity.get(u.index, DENSE), driven)) for u in units])
            for units in members
        )
        """Where each block's tensors lie in a slab: dense, whatever is stored of them, but for what is not expanded."""
        self.bytes: tuple[BlockBytes, ...] = tuple(
            block_bytes(units, self._layout_of, self.owned, self.largest, driven) for units in members
        )
        """With room for the largest versions."""
        self._members = members
        self._images: dict[tuple[int, bool, tuple[Sparsity, ...]], Image] = {}
        numbers = range(len(members))
        self.gradients: tuple[Image, ...] = tuple(self._gradients(b, self.largest.gradients) for b in numbers)
        """Where each block's gradients lie when they are summed, at most; now: `gradients_now`."""
        self.staged: tuple[Image, ...] = tuple(self._staged(b, self.largest.gradients) for b in numbers)
        """Where the owned part of them lies when it is staged, unit after unit; now: `staged_now`."""
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

    def _layout_of(self, unit: Unit, sparsity: Sparsity) -> RecordLayout:
        return self.store.layout_of(unit.index, sparsity)

    # how sparse

    def layout(self, unit: int) -> RecordLayout:
        """Where the numbers of a unit's newest version lie, whoever owns it."""
        return self.store.layout_of(unit, self.sparsity.get(unit, DENSE))

    def become(self, sparsities: Mapping[int, Sparsity]) -> None:
        """An update made these units so sparse."""
        self.sparsity.update(sparsities)

    def accept(self) -> None:
        """From now on `undo` goes back to what is so now."""
        self._accepted = dict(self.sparsity)

    def undo(self) -> None:
        """The versions since `accept` are gone."""
        self.sparsity = dict(self._accepted)

    def sparse_blocks(self) -> list[int]:
        """The blocks of which some version may be sparse."""
        return sorted({self.store.units[unit].block for unit in self.sparsity})

    def _forming(self, block: int) -> dict[int, Sparsity]:
        """Which gradients of a block are at non-zeros only."""
        rows = self._rows(block)
        return {
            unit: tuple(p for p in self.sparsity[unit] if (p.name, rows[unit, p.name]) not in self.whole)
            for unit in self.store.units_of(block)
            if unit in self.sparsity
        }

    def _rows(self, block: int) -> dict[tuple[int, str], int]:
        return {(unit.index, p.name): p.row for unit in self._members[block] for p in unit.parameters}

    def gradients_now(self, block: int) -> Image:
        """Where the gradients of a block lie that are formed at present."""
        return self._gradients(block, self._forming(block))

    def staged_now(self, block: int) -> Image:
        """The same of the owned part."""
        return self._staged(block, self._forming(block))

    def _gradients(self, block: int, sparsity: Mapping[int, Sparsity]) -> Image:
        return self._image_of(block, self._members[block], sparsity, put_together=True)

    def _staged(self, block: int, sparsity: Mapping[int, Sparsity]) -> Image:
        units = [unit for unit in self._members[block] if unit.index in self.owned]
        whole = len(units) == len(self._members[block])
        return self._image_of(block, units, sparsity, put_together=whole)

    def _image_of(
        self, block: int, units: Sequence[Unit], sparsity: Mapping[int, Sparsity], *, put_together: bool
    ) -> Image:
        key = block, put_together, tuple(sparsity.get(unit.index, DENSE) for unit in self._members[block])
        if key not in self._images:
            for old in [old for old in self._images if old[:2] == key[:2]][:-_IMAGES_KEPT]:
                del self._images[old]
            self._images[key] = (gradient_image if put_together else owned_gradients)(units, sparsity)
        return self._images[key]

    def is_sparse(self, block: int) -> bool:
        """Whether the newest version of any of its units is sparse: then it is fetched to a landing area, else to a slab."""
        return any(self.sparsity.get(unit) for unit in self.store.units_of(block))

    def landing(self, block: int) -> dict[int, slice]:
        """Where the units of a block lie in a landing area, unit after unit, as their newest versions are; of one that is not
        sparse these are the places in a slab. Changes with the sparsity."""
        found, start = {}, 0
        for unit in self.store.units_of(block):
            nbytes = self.layout(unit).fetched_nbytes
            found[unit] = slice(start, start + nbytes)
            start += nbytes
        return found

    # bytes

    def fetch(self, block: int, view: memoryview) -> "dict[int, Future[Any]]":
        """Read what is streamed of the owned units to their places in a slab, or in a landing area with the masks if any is
        sparse (`landing`); unit by unit, see `Store.fetch`."""
        return self._fetch(block, self._held[block], view)

    def serve(self, block: int, buffer: WorkingBuffer, view: memoryview) -> "dict[int, Future[Any]]":
        """The same, with the units that have just been updated taken from their working buffer, here and now."""
        places, served = self.landing(block), dict[int, Future[Any]]()
        for unit, record in zip(self._updated[block], buffer.records, strict=True):
            start = places[unit].start
            for part in record.layout.fetched:
                _copy(record.view(part.name), view[start : start + part.nbytes])
                start += part.nbytes
            assert start == places[unit].stop, "it is served as it was updated"
            served[unit] = done(None)
        return served | self._fetch(block, [unit for unit in self._held[block] if unit not in served], view)

    def _fetch(self, block: int, units: Sequence[int], view: memoryview) -> "dict[int, Future[Any]]":
        places, view = self.landing(block), view.cast("B")
        return {unit: self.store.fetch(unit, view[places[unit]]) for unit in units}

    def load(self, block: int, buffer: WorkingBuffer, *, check: bool = True) -> "Future[Any]":
        """Bind a buffer to a block and fill it with masters and states; see `Store.load`."""
        units = self._updated[block]
        buffer.bind([self.layout(unit) for unit in units])
        return _together(
            [self.store.load(unit, record, check=check) for unit, record in zip(units, buffer.records, strict=True)]
        )

    def rebind(self, block: int, buffer: WorkingBuffer, sparsities: Mapping[int, Sparsity]) -> None:
        """Bind a buffer to versions of another sparsity, by unit; the others stay as they are. What was in it is lost, and all
        that is to be written must be put there."""
        units = self._updated[block]
        now = self.sparsity
        buffer.bind([self.store.layout_of(u, sparsities.get(u, now.get(u, DENSE))) for u in units])

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
            states = {
                part.name: record.tensors(part.name)
                for part in record.layout.states
                if part.name not in ("param", MASK)
            }
            masks = record.tensors(MASK) if record.layout.has(MASK) else {}
            for parameter in self.store.units[unit].parameters:
                name = parameter.name
                own = {part: tensors[name] for part, tensors in states.items() if name in tensors}
                yield Piece(
                    unit, name, parameter.row, parameter.trainable, count,
                    masters[name], own, copies.get(name), masks.get(name), record.layout.spec(MASK, name),
                )  # fmt: skip

    # what stays in RAM

    def pin_copies(self, block: int) -> None:
        """Keep what is streamed of the owned units in memory; see `Store.pin`."""
        for unit in self._held[block]:
            self.store.pin(unit, [self.store.layout(unit).streamed.name, MASK])

    def pin_states(self, block: int) -> None:
        """Keep what updates of the owned units read in memory."""
        for unit in self._updated[block]:
            self.store.pin(unit, [*(part.name for part in self.store.layout(unit).states), MASK])

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
