"""The legality of a schedule, checked before either executor runs it.

Walks the operations once with a small abstract machine: what is in each slab and at which version, which records are in
buffers, which inputs are in device memory, how far each micro-batch has come. The first operation whose precondition
does not hold is named together with what it needed.
"""

from collections import Counter
from typing import assert_never

from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.operations import (
    Backward,
    Commit,
    Evict,
    Fetch,
    Forward,
    Load,
    Operation,
    Reduce,
    Restore,
    Schedule,
    Spill,
    Turn,
    Update,
    Write,
    describe,
)


class IllegalScheduleError(Exception):
    """A schedule that would compute something wrong or exceed its memory: a mistake of the planner."""


def verify(schedule: Schedule, facts: Facts, allotment: Allotment) -> int:
    """Checks versions, dependencies, write-after-read and memory at every point.

    Returns:
        The device bytes that slabs, sums and activations between blocks have, from the step's beginning to its end.

    Raises:
        IllegalScheduleError: names the operation and what it needed.
    """
    return _Machine(schedule, facts, allotment).run()


class _NeededError(Exception):
    """What an operation, or the end of a step, needed and did not find."""


class _Machine:
    def __init__(self, schedule: Schedule, facts: Facts, allotment: Allotment) -> None:
        self.schedule, self.facts, self.allotment = schedule, facts, allotment
        self.blocks = {block.index: block for block in facts.blocks}
        self.residents = [block.index for block in facts.blocks if block.resident]
        self.version = dict.fromkeys(self.blocks, 0)
        self.slabs: dict[int, tuple[int, int]] = {}  # slab -> (block, version)
        self.records = set(schedule.loaded)
        self.unwritten: set[int] = set()
        self.updated: set[int] = set()
        self.written: set[int] = set()
        self.committed = True
        self.reduced: set[int] = set()
        self.progress = dict.fromkeys(range(schedule.micro_batches), 0)
        self.returning: dict[int, int] = {}
        self.left_to_walk: Counter[int] = Counter(visit.block for visit in schedule.visits)
        self.spilled: set[tuple[int, int]] = set()
        self.walked: Counter[int] = Counter()  # micro-batches that are back through a visit
        self.commits = 0

    def run(self) -> int:
        held = self._device_bytes()
        if held > self.facts.device_memory:
            raise IllegalScheduleError(
                f"the schedule needs {held} bytes of device memory of {self.facts.device_memory}"
            )
        for number, operation in enumerate(self.schedule.operations):
            try:
                self.step(operation)
            except _NeededError as needed:
                raise IllegalScheduleError(f"operation {number}, {describe(operation)} needs {needed}") from None
        try:
            self._finish()
        except _NeededError as needed:
            raise IllegalScheduleError(f"the end of the step needs {needed}") from None
        return held

    def _device_bytes(self) -> int:
        return (
            self.allotment.slabs * (self.allotment.slab_bytes + self.allotment.beside_bytes)
            + self.allotment.resident_bytes
            + self.allotment.partial_sums * self.allotment.partial_bytes
            + self.allotment.tied_bytes
            + self.allotment.held_bytes
        )

    def need(self, holds: bool, needed: str) -> None:
        if not holds:
            raise _NeededError(needed)

    def in_slab(self, block: int) -> None:
        held = [version for held, version in self.slabs.values() if held == block]
        wanted = self.version[block]
        self.need(bool(held), f"Fetch({block}) at version {wanted}; the block is in no slab")
        self.need(held == [wanted], f"Fetch({block}) at version {wanted}; the slab holds version {held}")

    def residents_in_slabs(self) -> None:
        """Whatever computes may use a resident block's parameters: they are not any module's alone."""
        for block in self.residents:
            self.in_slab(block)

    def step(self, operation: Operation) -> None:
        match operation:
            case Load(block):
                self.need(block not in self.records, f"record {block} not to be loaded already")
                # one that is updated but not written yet has its buffer still: waiting for it here would be for ever
                sharing = [held for held in self.records if not self.facts.blocks[held].resident]
                room = self.facts.blocks[block].resident or len(sharing) < self.schedule.record_buffers
                self.need(room, "a record buffer")
                self.records.add(block)
            case Update(block):
                source = self.schedule.pending if self.facts.deferred else self.reduced
                self.need(block in source, f"a staged gradient of block {block}")
                self.need(block in self.records, f"Load({block})")
                self.need(block not in self.updated, f"block {block} not to be updated already in this step")
                in_slab = [held for held, _ in self.slabs.values() if held == block]
                if self.facts.deferred:
                    self.need(not in_slab, f"no slab to hold the version before (block {block} is in one)")
                self.updated.add(block)
                self.unwritten.add(block)
                self.version[block] += 1
                self.committed = False
            case Write(block):
                self.need(block in self.unwritten, f"Update({block})")
                self.unwritten.discard(block)
                self.records.discard(block)
                self.written.add(block)
            case Fetch(block, slab):
                self.need(slab not in self.slabs, f"slab {slab} to be free; it holds {self.slabs.get(slab)}")
                limit = self.schedule.slabs + len(self.residents)
                self.need(slab < limit, f"a slab below {limit}")
                self.slabs[slab] = (block, self.version[block])
            case Evict(block, slab):
                self.need(self.slabs.get(slab, (None,))[0] == block, f"block {block} in slab {slab}")
                del self.slabs[slab]
            case Forward(visit, block, micro_batch):
                self.need(self.schedule.visits[visit].block == block, f"visit {visit} to be of block {block}")
                self.need(self.progress[micro_batch] == visit, f"Forward of visit {self.progress[micro_batch]}")
                self.in_slab(block)
                self.residents_in_slabs()
                if self.facts.deferred:
                    late = block in self.schedule.pending and block not in self.updated
                    self.need(not late, f"Update({block}) of the step before")
                self.need((visit, micro_batch) not in self.spilled, f"Restore(visit={visit}, mb={micro_batch})")
                self.progress[micro_batch] += 1
            case Turn(micro_batch):
                self.need(self.progress[micro_batch] == len(self.schedule.visits), "the whole forward")
                turned = len(self.returning)
                self.need(micro_batch == turned, f"to be the turn of mb={turned}; losses come in order of micro-batch")
                self.returning[micro_batch] = len(self.schedule.visits) - 1
            case Backward(visit, block, micro_batch):
                self.need(micro_batch in self.returning, f"Turn(mb={micro_batch})")
                self.need(self.returning[micro_batch] == visit, f"Backward of visit {self.returning[micro_batch]}")
                self.in_slab(block)
                self.residents_in_slabs()
                self.need((visit, micro_batch) not in self.spilled, f"Restore(visit={visit}, mb={micro_batch})")
                walked = self.walked[visit]
                self.need(micro_batch == walked, f"mb={walked} first: gradients add up in order of micro-batch")
                self.walked[visit] += 1
                self.returning[micro_batch] -= 1
                if micro_batch == self.schedule.micro_batches - 1:
                    self.left_to_walk[block] -= 1
            case Reduce(block):
                resident = self.blocks[block].resident
                done = self._all_back() if resident else self.left_to_walk[block] == 0
                self.need(done, f"every Backward of block {block}")
                self.need(block not in self.reduced, f"block {block} not to be reduced already")
                self.reduced.add(block)
            case Spill(visit, micro_batch):
                self.need((visit, micro_batch) not in self.spilled, "the inputs to be in device memory")
                self.spilled.add((visit, micro_batch))
            case Restore(visit, micro_batch):
                self.need((visit, micro_batch) in self.spilled, f"Spill(visit={visit}, mb={micro_batch})")
                self.spilled.discard((visit, micro_batch))
            case Commit():
                self.need(not self.commits, "to be the only one of its step")
                self.need(not self.unwritten, f"Write of {sorted(self.unwritten)}")
                due = self._due()
                self.need(self.written == due, f"Update and Write of {sorted(due - self.written)} first")
                self.commits += 1
                self.committed = True
            case _:
                assert_never(operation)

    def _all_back(self) -> bool:
        back = list(self.returning.values())
        return len(back) == self.schedule.micro_batches and all(visit < 0 for visit in back)

    def _due(self) -> frozenset[int] | set[int]:
        """The blocks whose new versions one commit publishes together: a part of them would be half a step."""
        return self.schedule.pending if self.facts.deferred else self._to_reduce()

    def _to_reduce(self) -> set[int]:
        trained = {block.index for block in self.facts.blocks if block.trainable}
        return trained & (
            {visit.block for visit in self.schedule.visits} | {b.index for b in self.facts.blocks if b.resident}
        )

    def _finish(self) -> None:
        for micro_batch, visit in self.progress.items():
            self.need(visit == len(self.schedule.visits), f"the whole forward of micro-batch {micro_batch}")
            self.need(self.returning.get(micro_batch) == -1, f"the whole backward of micro-batch {micro_batch}")
        wanted, due = self._to_reduce(), self._due()
        self.need(self.reduced == wanted, f"Reduce of {sorted(wanted - self.reduced)}")
        self.need(self.written == due, f"Update and Write of {sorted(due - self.written)}")
        self.need(self.committed, "Commit() after the last Write")
        ahead = set(self.schedule.loads_next)
        self.need(
            self.records == ahead, f"Load of {sorted(ahead)} for the next step; {sorted(self.records)} are loaded"
        )
