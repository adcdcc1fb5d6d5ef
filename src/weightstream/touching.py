"""Records of families that a step touches: brought when they are asked for, their gradients summed, updated, written.

Nothing here grows with a family. A record is read once in a step, with its optimizer states, and lies in memory until it
is written; so what a step needs is bounded by what its micro-batches reach. Sums keep the contract's order: over
micro-batches as `fabric/reduction.py` has it, of squares per tensor. A record's version is the number of its own
optimizer steps.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from weightstream.cluster import owned
from weightstream.errors import PlanError
from weightstream.fabric.reduction import Squares, sum_of_squares
from weightstream.schedule.reduction import group_of, tree
from weightstream.store.families import NUMBER, Family
from weightstream.store.futures import done, gather
from weightstream.store.layout import ALIGN_PART, RecordLayout
from weightstream.store.optimizers import Optimizer
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.store.store import Store
from weightstream.units import align, format_bytes

T = TypeVar("T")
Wait = Callable[["Future[T]"], T]
Node = tuple[int, int]
"""A node of the contract's tree: its first reduction group, and the one behind its last."""


@dataclass(frozen=True, slots=True)
class TouchedFacts:
    """What one step reached of a family: records, of those the ones never written before, how often in all, and the one
    reached most often; how often another one, which does not exist and may not come to, was meant."""

    touched: int
    new: int
    assignments: int
    most: int
    redirected: int = 0


@dataclass(slots=True)
class Packed:
    """A tensor per template parameter, (records, *shape) in fp32, of the records of these numbers."""

    numbers: Tensor
    tensors: list[Tensor]

    def of(self, which: Tensor) -> "Packed":
        """Those for which this is true."""
        return Packed(self.numbers[which], [tensor[which] for tensor in self.tensors])

    def plus(self, other: "Packed") -> "Packed":
        """The sum of both, in the memory of this one where that is enough. A record that only one has is as it is there."""
        found, by_number = torch.sort(self.numbers)
        place = torch.searchsorted(found, other.numbers).clamp_(max=found.numel() - 1)
        both = found[place] == other.numbers
        rows, only = by_number[place[both]], ~both
        if not bool(both.all()):
            self.numbers = torch.cat([self.numbers, other.numbers[only]])
            self.tensors = [torch.cat([a, b[only]]) for a, b in zip(self.tensors, other.tensors, strict=True)]
        for mine, others in zip(self.tensors, other.tensors, strict=True):
            mine.index_add_(0, rows, others[both])
        return self


Sums = dict[int, dict[Node, Packed]]
"""Partial sums of gradients, by use and by node."""


class Gradients:
    """What a rank's micro-batches give of one family in a step, until it is summed."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._found: dict[int, dict[int, Packed]] = defaultdict(dict)  # by use and micro-batch

    def add(self, use: int, micro_batch: int, numbers: Tensor, gradients: Sequence[Tensor]) -> None:
        packed = Packed(numbers.cpu(), [gradient.to("cpu", torch.float32) for gradient in gradients])
        before = self._found[use].get(micro_batch)
        self._found[use][micro_batch] = packed if before is None else before.plus(packed)

    def partial_sums(self, micro_batches: int, share: range) -> Sums:
        """The sums of the largest subtrees that lie within a share of the reduction groups; what was given is gone."""
        found, self._found = self._found, defaultdict(dict)
        return {use: self._within(found[use], micro_batches, share) for use in sorted(found)}

    def _within(self, found: Mapping[int, Packed], micro_batches: int, share: range) -> dict[Node, Packed]:
        sums: dict[Node, Packed] = {}
        for micro_batch in sorted(found):
            group = group_of(micro_batch, micro_batches, self._groups)
            before = sums.get((group, group + 1))
            sums[group, group + 1] = found[micro_batch] if before is None else before.plus(found[micro_batch])
        _sum_up(sums, self._groups, share)
        return sums

    def clear(self) -> None:
        self._found.clear()


def over_groups(sums: dict[Node, Packed], groups: int) -> Packed:
    """The sum of partial sums that have no group in common, in the contract's order, whoever made them."""
    _sum_up(sums, groups, range(groups))
    (total,) = sums.values()
    return total


def _sum_up(sums: dict[Node, Packed], groups: int, share: range) -> None:
    """Puts the sums of the largest subtrees within the share in the place of those that they are made of."""
    for low, middle, high in tree(groups):
        if low < share.start or high > share.stop:
            continue
        left, right = sums.pop((low, middle), None), sums.pop((middle, high), None)
        if left is not None and right is not None:
            sums[low, high] = left.plus(right)
        elif left is not None or right is not None:
            sums[low, high] = left or right  # type: ignore[assignment]


def redirected(numbers: Tensor, existing: Callable[[Sequence[int]], list[int]]) -> Tensor:
    """What assignments go to, each different one asked for once."""
    asked, place = torch.unique(numbers.cpu(), return_inverse=True)
    return torch.tensor(existing(asked.tolist()), dtype=torch.int64)[place].to(numbers.device)


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
        walking: the use (visit) and micro-batch that is computed now; None outside of steps.
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
        walking: Callable[[], tuple[int, int] | None],
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
        self._reached: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._instead: dict[int, int] | None = None  # what is reached for each number, where not all may come to exist
        self.first_written = 0
        """Records that this has written which did not exist before."""
        self.least_bytes = 0
        """What the step had to read and write for those that it has updated."""
        self._redirected: dict[tuple[int, int], int] = {}
        self._total: Packed | None = None
        self._micro_batches = 0
        self._count = 0  # optimizer steps that untouched records have had before this step, where they are replayed

    def begin(self, micro_batches: int, count: int) -> None:
        """A step of so many micro-batches begins; the store has had `count` optimizer steps."""
        self.drop()
        self._micro_batches, self._count, self.least_bytes = micro_batches, count, 0

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
        self._instead = None if instead is None else dict(instead)

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """The records that are reached for these; it follows from what the steps before have written alone."""
        instead = self._instead
        if instead is None:
            return list(numbers)
        asked = [number for number in numbers if number not in instead]
        if asked:
            here = self.written(asked)
            others = [number for number in asked if number not in here]
            instead |= {number: number for number in here}
            instead |= {
                n: found for n, found in zip(others, self.next_written(others), strict=True) if found is not None
            }
        return [instead[number] for number in numbers]

    @property
    def _indices(self) -> range:
        return range(self._first, self._first + self.family.count)

    # for the layer

    def routed(self, numbers: Tensor) -> Tensor:
        """The records that these assignments of a micro-batch go to."""
        if self._instead is None:
            return numbers
        result = redirected(numbers, self.existing)
        if (walking := self._walking()) is not None:
            self._redirected[walking] = int((result != numbers).sum())
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
        walking = self._walking()
        if walking is not None:
            self.reached(walking, numbers, counts)
        return [tensor.to(self._device) for tensor in packed]

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        walking = self._walking()
        assert walking is not None, "gradients are made in steps"
        self._gradients.add(*walking, numbers, gradients)

    # for other ranks as well

    def packed(self, numbers: Sequence[int]) -> list[Tensor]:
        """The masters of these records in the dtype that computes, in host memory; read where they are not here."""
        self.expect(numbers)
        self._await_reads()
        slots = torch.tensor([self._held[number].slot for number in numbers], dtype=torch.int64)
        return [masters.index_select(0, slots).to(self._dtype) for masters in self._parts["param"]]

    def reached(self, place: tuple[int, int], numbers: Tensor, counts: Tensor) -> None:
        """These records, which are here, are reached so often, in a place that is said once."""
        self._reached[place] = numbers, counts

    def _make_room(self, records: int) -> None:
        """Waits for records that are being written where there is no room without.

        Raises:
            PlanError: a step reaches more than fit.
        """
        while self._writes and (len(self._free) < records or self._writes[0][0].done()):
            writing, slots = self._writes.popleft()
            try:
                self._wait(writing)
            finally:
                self._free.extend(slots)  # also where it failed: what was to be written is undone
        if len(self._free) < records:
            raise PlanError(
                f"family {self.family.name!r}: a step reaches {len(self._held) + records:,} records or more, there is memory "
                f"for {self.capacity:,} in {format_bytes(self._budget_bytes)}; give more (experts_memory), or fewer tokens "
                f"to a step"
            )

    def _await_reads(self) -> None:
        reading, self._reading = self._reading, []
        for each in reading:
            versions = self._wait(each.versions)
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
            sums = self._gradients.partial_sums(self._micro_batches, range(self._groups))
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
        held = [self._held.pop(number) for number in numbers]
        new = sum(each.new for each in held)
        self.first_written += new
        self.least_bytes += len(held) * self.record_bytes + (len(held) - new) * self.loaded_bytes
        for place, copies in enumerate(self._parts.get("copy", ())):
            slots = torch.tensor([each.slot for each in held], dtype=torch.int64)
            copies[slots] = self._parts["param"][place][slots].to(copies.dtype)
        writing = self._store.write_many(
            [
                (self._first + number, self._arena.buffer(each.slot), each.version, each.version)
                for number, each in zip(numbers, held, strict=True)
            ]
        )
        self._writes.append((writing, [each.slot for each in held]))
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

    def drop(self) -> None:
        """Lets go of all records and sums that are not being written."""
        for each in self._reading:
            each.versions.exception()
        self._reading.clear()
        self._gradients.clear()
        self._reached.clear()
        self._redirected.clear()
        self._total = None
        self._free.extend(held.slot for held in self._held.values())
        self._held.clear()

    @property
    def facts(self) -> TouchedFacts | None:
        """What the step has reached so far; None if nothing."""
        if not self._reached:
            return None
        numbers = torch.cat([numbers for numbers, _ in self._reached.values()]).cpu()
        counts = torch.cat([counts for _, counts in self._reached.values()]).cpu()
        found, place = torch.unique(numbers, return_inverse=True)
        reached = torch.zeros(found.numel(), dtype=torch.int64).index_add_(0, place, counts)
        new = sum(self._held[number].new for number in found.tolist())
        redirected = sum(self._redirected.values())
        return TouchedFacts(found.numel(), new, int(reached.sum()), int(reached.max()), redirected)

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

    def collect(self) -> tuple[dict[str, Sums], dict[str, TouchedFacts]]:
        """At the end of backward: what this rank is to sum up, and what all have reached."""

    def drop(self) -> None:
        """Lets go of what was borrowed and of all gradients."""


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

    def drop(self) -> None:
        if self.lending is not None:
            self.lending.drop()
        for family in self.families.values():
            family.drop()

    def close(self) -> None:
        for family in self.families.values():
            family.close()
