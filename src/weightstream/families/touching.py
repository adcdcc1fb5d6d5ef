"""Records of families that a step touches: brought when they are asked for, their gradients summed, updated, written.

Nothing here grows with a family. A record is read once in a step, with its optimizer states, and lies in memory until it
is written; so what a step needs is bounded by what its micro-batches reach. Sums keep the contract's order: over
micro-batches as `fabric/reduction.py` has it, of squares per tensor. A record's version is the number of its own
optimizer steps.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from weightstream.cluster import owned
from weightstream.errors import PlanError
from weightstream.fabric.packed import Gradients, Packed, Sums, over_groups
from weightstream.fabric.reduction import Squares, sum_of_squares
from weightstream.families.tallying import Gate, Tally, TouchedFacts, Walking
from weightstream.store.arena import Arena
from weightstream.store.families import NUMBER, Family
from weightstream.store.futures import done, gather
from weightstream.store.optimizers import Optimizer
from weightstream.store.store import Store
from weightstream.units import format_bytes

T = TypeVar("T")
Wait = Callable[["Future[T]"], T]


@dataclass(slots=True)
class _Held:
    slot: int
    version: int = -1  # not read yet
    new: bool = False  # never written
    replayed: bool = False  # it has made up for steps


@dataclass(slots=True)
class _Reading:
    numbers: list[int]
    versions: "Future[list[int]]"


class Touched:
    """The records of one family in a step; what a layer asks its weights of (`nn.experts.Source`).

    Args:
        first: the store's index of the family's record 0.
        nbytes: memory for records: those of a step, and those of the step before that are still being written.
        member: which of how many ranks that own the records this is (`cluster.owner_of`).
        replayed: gradients of zeros are made up for, of the steps that a record was not reached in: for each optimizer
            step, counted from 1, the training step and the optimizer that it had. None where they are nothing.
        walking: what is computed now; None outside of steps.
    """

    def __init__(
        self,
        store: Store,
        first: int,
        family: Family,
        *,
        nbytes: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: int,
        wait: Wait,
        walking: Callable[[], Walking | None],
        member: tuple[int, int] = (0, 1),
        replayed: "Callable[[int], tuple[int, Optimizer]] | None" = None,
    ) -> None:
        self.family = family
        self._own = owned(family.count, *member)
        self._store, self._first, self._dtype, self._device = store, first, dtype, device
        self._wait, self._walking, self._replayed, self._groups = wait, walking, replayed, groups
        layout = store.layout(first + family.count - 1)
        self.record_bytes, self.loaded_bytes = layout.parts_nbytes, sum(part.nbytes for part in layout.states)
        self.slot_bytes = Arena.slot_bytes(layout)
        self._budget_bytes, fitting = nbytes, nbytes // self.slot_bytes
        if fitting < 1:
            raise PlanError(
                f"family {family.name!r}: one record takes {format_bytes(layout.image_nbytes)}, there is memory for "
                f"{format_bytes(nbytes)}; give more (experts_memory)"
            )
        self.capacity = min(2 * family.count, fitting)
        self._arena = Arena(layout, self.capacity)
        self._parts = {part.name: self._arena.tensors(part.name) for part in layout.parts}
        self._free = list(reversed(range(self.capacity)))  # the last one that was used first: others stay untouched
        self._held: dict[int, _Held] = {}
        self._reading: list[_Reading] = []
        self._writes: deque[tuple[Future[None], list[int]]] = deque()  # with the slots that are free afterwards
        self._gradients = Gradients(groups)
        self.reached = Tally()
        self._gate = Gate(self._found_for, self.capacity)
        self.first_written = 0
        """Records that this has written which did not exist before."""
        self.least_bytes = 0
        """What the step had to read and write for those that it has updated."""
        self._total: Packed | None = None
        self._count = 0  # optimizer steps that untouched records have had before this step, where they are replayed

    def begin(self, micro_batches: int, count: int) -> None:
        """A step of so many micro-batches begins; the store has had `count` optimizer steps."""
        self.drop()
        self._gradients.begin(micro_batches, range(self._groups))
        self._count, self.least_bytes = count, 0

    # which ones exist

    def written(self, numbers: Collection[int]) -> set[int]:
        """Those of these records that exist, that is, that an earlier step has written."""
        return {index - self._first for index in self._store.written([self._first + number for number in numbers])}

    def count_written(self) -> int:
        """How many there are; takes the longer the more there are."""
        return self._store.count_written(self._indices)

    def next_written(self, numbers: Sequence[int]) -> list[int | None]:
        """For each of these the next one that exists, by number, round the end; None if none does."""
        try:
            found = self._store.next_written(self._indices, [self._first + number for number in numbers])
        except LookupError:
            return [None] * len(numbers)
        return [found[self._first + number] - self._first for number in numbers]

    def gate(self, instead: Mapping[int, int] | None) -> None:
        """From now on only records that exist are reached: of these numbers, what they lead to; of others, which follow from
        no tokens, the next that does, looked up when it is wanted. None: all are."""
        self._gate.set(instead)

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """The records that are reached for these; it follows from what the steps before have written alone."""
        return self._gate.existing(numbers)

    @property
    def looked_up(self) -> int:
        """How many answers are kept of what is reached for a number; as many as there is memory for records at most."""
        return self._gate.kept

    def _found_for(self, numbers: Sequence[int]) -> dict[int, int]:
        here = self.written(numbers)
        others = [number for number in numbers if number not in here]
        following = zip(others, self.next_written(others), strict=True)
        return {number: number for number in here} | {n: found for n, found in following if found is not None}

    @property
    def _indices(self) -> range:
        return range(self._first, self._first + self.family.count)

    # for the layer

    def routed(self, numbers: Tensor) -> Tensor:
        """The records that these assignments of a micro-batch go to."""
        result = self._gate.routed(numbers)
        if result is not numbers:
            self.reached.sent_elsewhere(self._walking(), int((result != numbers).sum()))
        return result

    def expect(self, numbers: Sequence[int]) -> None:
        """Begins to read those of these records that are not here."""
        missing = [number for number in numbers if number not in self._held]
        if missing and len(self._free) < len(missing) and self._walking() is None:
            self.drop()  # outside of steps nothing but these is wanted
            missing = list(numbers)
        if not missing:
            return
        self._make_room(len(missing))
        records = []
        for number in missing:
            held = self._held[number] = _Held(self._free.pop())
            records.append((self._first + number, self._arena.buffer(held.slot)))
        self._reading.append(_Reading(missing, self._store.read_many(records)))

    def weights(self, numbers: Tensor, counts: Tensor) -> list[Tensor]:
        packed = self.packed(numbers.tolist())
        self.reached.called(self._walking(), numbers, counts)
        return [tensor.to(self._device) for tensor in packed]

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        walking = self._walking()
        assert walking is not None, "gradients are made in steps"
        self._gradients.add(walking.use, walking.micro_batch, numbers, gradients)

    def through(self, use: int, micro_batch: int) -> None:
        """A micro-batch is back through a use: it gives no more gradients there."""
        self._gradients.through(use, micro_batch)

    # for other ranks as well

    def packed(self, numbers: Sequence[int]) -> list[Tensor]:
        """The masters of these records in the dtype that computes, in host memory; read where they are not here."""
        self.expect(numbers)
        self._await_reads()
        slots = torch.tensor([self._held[number].slot for number in numbers], dtype=torch.int64)
        return [masters.index_select(0, slots).to(self._dtype) for masters in self._parts["param"]]

    def _make_room(self, records: int) -> None:
        """Waits for records that are being written where there is no room without.

        Raises:
            PlanError: a step reaches more than fit.
        """
        while self._writes and (len(self._free) < records or self._writes[0][0].done()):
            writing, slots = self._writes[0]
            try:
                self._wait(writing)
            finally:
                if writing.done():  # not where the wait was interrupted: they are still read from
                    self._writes.popleft()
                    self._free.extend(slots)  # also where it failed: what was to be written is undone
        if len(self._free) < records:
            raise PlanError(
                f"family {self.family.name!r}: a step reaches {len(self._held) + records:,} records or more, there is memory "
                f"for {self.capacity:,} in {format_bytes(self._budget_bytes)}; give more (experts_memory), or fewer tokens "
                f"to a step"
            )

    def _await_reads(self) -> None:
        while self._reading:  # those that are not waited for to the end stay there, so that `drop` does so
            each = self._reading[0]
            versions = self._wait(each.versions)
            del self._reading[0]
            for number, version in zip(each.numbers, versions, strict=True):
                held = self._held[number]
                held.version, held.new = version, version == 0
                if self._replayed is not None:
                    self._replay(number, held)

    # at the store

    def close_sums(self, sums: Sums | None = None) -> Squares:
        """Sums the step's gradients; gives the fp64 sum of squares of each tensor's.

        Args:
            sums: of all ranks, where there are several; by default what the layer gave here.
        """
        if sums is None:
            sums = self._gradients.partial_sums()
        total: Packed | None = None
        for use in sorted(sums):
            summed = over_groups(sums[use], self._groups)
            total = summed if total is None else total.plus(summed)
        self._total = total
        if total is None:
            return {}
        numbers = total.numbers.tolist()
        return {
            (parameter.name.replace(NUMBER, str(number)), 0): sum_of_squares(row)
            for parameter, rows in zip(self.family.parameters, total.tensors, strict=True)
            for number, row in zip(numbers, rows.unbind(), strict=True)
        }

    @property
    def added(self) -> int:
        """How many records the update will write for the first time."""
        return 0 if self._total is None else sum(self._held[number].new for number in self._total.numbers.tolist())

    def update(self, step: int, coefficient: float) -> "Future[None]":
        """The optimizer step on what got a gradient, and its writing; done when written. All other records go."""
        total, self._total = self._total, None
        if total is None:
            self.drop()
            return done(None)
        if coefficient < 1.0:
            for gradients in total.tensors:
                gradients.mul_(coefficient)
        numbers = total.numbers.tolist()
        self._optimize(numbers, total.tensors, step)
        writing = self._write(numbers)
        self.drop()
        return writing

    def _write(self, numbers: Sequence[int]) -> "Future[None]":
        """Makes these records the newest versions, and lets them go when they are written."""
        held = [self._held[number] for number in numbers]
        for place, copies in enumerate(self._parts.get("copy", ())):
            slots = torch.tensor([each.slot for each in held], dtype=torch.int64)
            copies[slots] = self._parts["param"][place][slots].to(copies.dtype)
        writing = self._store.write_many(
            [
                (self._first + number, self._arena.buffer(each.slot), each.version, each.version)
                for number, each in zip(numbers, held, strict=True)
            ]
        )
        for number in numbers:  # where that was refused they are still held, and dropped with the step
            del self._held[number]
        self._writes.append((writing, [each.slot for each in held]))
        new = sum(each.new for each in held)
        self.first_written += new
        self.least_bytes += len(held) * self.record_bytes + (len(held) - new) * self.loaded_bytes
        return writing

    def _optimize(self, numbers: Sequence[int], gradients: Sequence[Tensor], step: int) -> None:
        held = [self._held[number] for number in numbers]
        for each in held:
            each.version += 1
        for place, parameter in enumerate(self.family.parameters):
            self._store.optimizer.update_many(
                [self._parts["param"][place][each.slot] for each in held], gradients[place].unbind(),
                [self._states(place, each.slot) for each in held],
                names=[parameter.name.replace(NUMBER, str(number)) for number in numbers], step=step,
                counts=[each.version for each in held],
            )  # fmt: skip

    def _states(self, place: int, slot: int) -> dict[str, Tensor]:
        return {part: found[place][slot] for part, found in self._parts.items() if part not in ("copy", "param")}

    def _replay(self, number: int, held: _Held) -> None:
        """The optimizer steps that a record was not reached in."""
        assert self._replayed is not None
        zeros = [torch.zeros(parameter.shape) for parameter in self.family.parameters]
        for count in range(held.version + 1, self._count + 1):
            step, optimizer = self._replayed(count)
            for place, parameter in enumerate(self.family.parameters):
                optimizer.update(
                    self._parts["param"][place][held.slot], zeros[place], self._states(place, held.slot),
                    name=parameter.name.replace(NUMBER, str(number)), step=step, count=count,
                )  # fmt: skip
        held.replayed = held.version < self._count
        held.version = max(held.version, self._count)

    def make_up(self) -> "list[Future[None]]":
        """Brings every record that is this rank's to the present step, outside of steps; to be published by the next
        commit."""
        writing, at_once = [], max(1, self.capacity // 2)
        for first in range(0, len(self._own) if self._replayed is not None else 0, at_once):
            numbers = self._own[first : first + at_once]
            self.expect(numbers)
            self._await_reads()
            writing.append(self._write([number for number in numbers if self._held[number].replayed]))
            self.drop()
        return writing

    def undone(self) -> None:
        """What was made up is not to be published: nobody need be told any more what of it could not be written."""
        self.drop()
        for writing, slots in self._writes:
            writing.exception()
            self._free.extend(slots)
        self._writes.clear()

    def drop(self) -> None:
        """Lets go of all records and sums that are not being written."""
        for each in self._reading:
            each.versions.exception()
        self._reading.clear()
        self._gradients.clear()
        self.reached.clear()
        self._gate.forget()
        self._total = None
        self._free.extend(held.slot for held in self._held.values())
        self._held.clear()

    @property
    def facts(self) -> TouchedFacts | None:
        """What the step has reached so far; None if nothing."""
        numbers, counts = self.reached.numbers, self.reached.counts
        if not numbers.numel():
            return None
        new = sum(self._held[number].new for number in numbers.tolist())
        calls, redirected = self.reached.calls, self.reached.redirected
        return TouchedFacts(numbers.numel(), new, int(counts.sum()), int(counts.max()), redirected, calls)

    @property
    def gradient_bytes(self) -> int:
        """What is held of gradients until their sums are closed."""
        return self._gradients.nbytes

    def close(self) -> None:
        """Waits for writes and gives the memory back."""
        self.drop()
        for writing, _ in self._writes:
            writing.exception()
        self._writes.clear()
        self._parts.clear()
        self._arena.close()


class Door(Protocol):
    """Through which a layer reaches its experts."""

    def gate(self, instead: Mapping[int, int] | None) -> None:
        """From now on only those that exist are reached, and of these numbers those that they lead to; None: all are."""

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """Those that are reached for these."""


class Lending(Protocol):
    """What several ranks do together with the records of families; see `lending.py`."""

    @property
    def families(self) -> Mapping[str, Door]:
        """By the name of their layer."""

    def begin(self, micro_batches: int, expected: Mapping[str, Sequence[int]]) -> None:
        """A step begins: asks the owners for what is expected here, and reads what others expect of this rank."""

    blocks: frozenset[int]
    """Those that layers with families lie in."""

    def enter(self, block: int) -> None:
        """Micro-batches are about to go through a block; `leave` follows."""

    def leave(self, block: int) -> None:
        """This rank's micro-batches are through a visit of a block: serves the others until theirs are."""

    def through(self, use: int, micro_batch: int) -> None:
        """One of this rank's micro-batches is back through a visit."""

    def collect(self) -> tuple[dict[str, Sums], dict[str, TouchedFacts]]:
        """At the end of backward: what this rank is to sum up, and what all have reached."""

    def drop(self) -> None:
        """Lets go of what was borrowed and of all gradients."""

    def close(self) -> None:
        """Gives the memory back."""


@dataclass(slots=True)
class Touching:
    """All families that a model's steps touch, by the name of their layer; those whose records this rank owns.

    With several ranks all call the same methods in the same order.
    """

    families: dict[str, Touched] = field(default_factory=dict)
    lending: Lending | None = None
    """Where there are several ranks."""
    facts: dict[str, TouchedFacts] = field(default_factory=dict)
    """Of the last step."""
    added: dict[str, int] = field(default_factory=dict)
    """Records that the step writes for the first time, if it counts."""
    agree: Callable[[Mapping[str, int]], dict[str, int]] = dict
    """What all ranks come to together; refuses a step that writes too many for the first time."""
    _sums: dict[str, Sums] | None = None

    def begin(self, micro_batches: int, count: int, expected: Mapping[str, Sequence[int]]) -> None:
        """A step of so many micro-batches begins; the store has had `count` optimizer steps. Reads what is expected."""
        self.facts, self.added = {}, {}
        for name, family in self.families.items():
            family.begin(micro_batches, count)
            if self.lending is None:
                family.expect(expected.get(name, ()))
        if self.lending is not None:
            self.lending.begin(micro_batches, expected)

    @property
    def least_bytes(self) -> int:
        """What the step had to read and write, of the records that this rank owns."""
        return sum(family.least_bytes for family in self.families.values())

    def lends(self, block: int) -> bool:
        """Whether ranks lend each other records when micro-batches go through a block."""
        return self.lending is not None and block in self.lending.blocks

    def enter(self, block: int) -> None:
        """Micro-batches are about to go through a block, in one visit."""
        if self.lending is not None:
            self.lending.enter(block)

    def leave(self, block: int) -> None:
        """They are through, as far as they are this rank's."""
        if self.lending is not None:
            self.lending.leave(block)

    def through(self, use: int, micro_batch: int) -> None:
        """One of this rank's micro-batches is back through a visit: what it gave there may be summed."""
        if self.lending is not None:
            self.lending.through(use, micro_batch)
        else:
            for family in self.families.values():
                family.through(use, micro_batch)

    def collect(self) -> None:
        """Before sums are closed: they come to the owners. Notes what the step has reached."""
        if self.lending is not None:
            self._sums, facts = self.lending.collect()
        else:
            facts = {n: found for n, family in self.families.items() if (found := family.facts) is not None}
        self.facts |= facts  # of a rehearsal sums are closed twice

    def close_sums(self) -> Squares:
        """Sums all gradients of the step; gives their squares."""
        sums, self._sums = self._sums, None
        squares: Squares = {}
        for name, family in self.families.items():
            squares |= family.close_sums(None if sums is None else sums[name])
        return squares

    def settle(self) -> None:
        """After sums are closed: finds out what the step adds, on all ranks, and refuses what it may not."""
        self.added = self.agree({name: family.added for name, family in self.families.items()})

    def update(self, step: int, coefficient: float) -> "Future[list[None]]":
        """Updates and writes what got gradients, to be published by the next commit."""
        if self.lending is not None:
            self.lending.drop()
        return gather([family.update(step, coefficient) for family in self.families.values()])

    def make_up(self) -> "list[Future[None]]":
        """See `Touched.make_up`."""
        return [writing for family in self.families.values() for writing in family.make_up()]

    def undone(self) -> None:
        """See `Touched.undone`."""
        for family in self.families.values():
            family.undone()

    def drop(self) -> None:
        if self.lending is not None:
            self.lending.drop()
        for family in self.families.values():
            family.drop()

    def close(self) -> None:
        if self.lending is not None:
            self.lending.close()
        for family in self.families.values():
            family.close()
