"""A step whose calls are not known beforehand: blocks are served as the model asks for them, nothing ahead.

So goes the first step of a process with several ranks, and the rest of any step in which the model calls another block
than the schedule has. All ranks choose the same block, since each round begins with what every micro-batch wants.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.schedule.operations import Backward, Commit, Evict, Fetch, Forward, Reduce, Spill, Turn, Visit

if TYPE_CHECKING:
    from weightstream.runtime.runtime import Runtime


class DivergedError(Exception):
    """The model called another block than the schedule has."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """A micro-batch of any rank: the module that it waits for, and the visit of its last call."""

    micro_batch: int
    module: str
    last_visit: int


def improvise(runtime: "Runtime") -> None:
    """Carries out a step, or the rest of one."""
    _Improvisation(runtime).run()


class _Improvisation:
    def __init__(self, runtime: "Runtime") -> None:
        self.runtime, self.worker, self.keeper = runtime, runtime.worker, runtime.keeper

    def run(self) -> None:
        runtime = self.runtime
        self.keeper.staging.recall()
        for position, block in enumerate(runtime.residents):
            if runtime.slabs.slab_of(block) is None:
                self._bring(block, runtime.allotment.slabs + position)
        turned = set(runtime.outcome.losses)
        while wishes := self._wishes():
            first = min(map(self._turn_of, wishes))
            together = [wish for wish in wishes if self._turn_of(wish) == first]
            module = together[0].module
            self._serve(self.worker.block_of_module[module])
            turned |= self._pass(self._visit_for(module, together), together)
        for micro_batch in sorted(set(runtime.own) - turned):
            runtime.run(Turn(micro_batch))
        for block in sorted(self.keeper.pending & self.keeper.due):
            self._renew(block)
        if runtime.facts.deferred and self.keeper.pending:
            runtime.run(Commit())
        self._backward()
        if not runtime.facts.deferred:
            runtime.run(Commit())
        self.keeper.drop_loaded()
        runtime.outcome.visits = tuple(runtime.visits)
        runtime.outcome.uniform = all(len(members) == runtime.micro_batches for members in runtime.members)

    def _wishes(self) -> list[_Wish]:
        """Of all micro-batches that have not come to their loss, in order."""
        own = []
        for micro_batch in self.runtime.own:
            module, top = self.worker.wants(micro_batch), self.worker.top(micro_batch)
            if module is not None:
                own.append((micro_batch, module, -1 if top is None else top[0]))
        return sorted(
            (_Wish(*wish) for found in self.runtime.peers.gather(own) for wish in found), key=lambda w: w.micro_batch
        )

    def _turn_of(self, wish: _Wish) -> tuple[int, int]:
        """How often a micro-batch has been where it wants to go, and that module's place in the model."""
        times = sum(
            visit.module == wish.module and wish.micro_batch in members
            for visit, members in zip(self.runtime.visits, self.runtime.members, strict=True)
        )
        return times, self.worker.position(wish.module)

    def _visit_for(self, module: str, wishes: Sequence[_Wish]) -> int:
        """The visit that these micro-batches join: one that others made before them, or a new one."""
        runtime = self.runtime
        for number in reversed(range(len(runtime.visits))):
            if runtime.visits[number].module == module:
                apart = not runtime.members[number] & {wish.micro_batch for wish in wishes}
                if apart and all(wish.last_visit < number for wish in wishes):
                    return number
                break
        return len(runtime.visits)

    def _pass(self, visit: int, wishes: Sequence[_Wish]) -> set[int]:
        """Micro-batches through one visit; those that come to their loss turn at once."""
        runtime, turned = self.runtime, set[int]()
        block = self.worker.block_of_module[wishes[0].module]
        self.keeper.touching.enter(block)
        for wish in wishes:
            runtime.make_visit(visit, Visit(block, wish.module), wish.micro_batch)
            began_s, stalled_s = time.perf_counter(), runtime.outcome.stalled_s
            runtime.pass_through(visit, block, wish.micro_batch, last=False)
            runtime.ran(Forward(visit, block, wish.micro_batch), began_s, stalled_s)
            if wish.micro_batch in runtime.own:
                runtime.run(Spill(visit, wish.micro_batch))
                if self.worker.wants(wish.micro_batch) is None:
                    runtime.run(Turn(wish.micro_batch))
                    turned.add(wish.micro_batch)
        self.keeper.touching.leave(block)
        return turned

    def _backward(self) -> None:
        runtime = self.runtime
        left = Counter(visit.block for visit in runtime.visits)
        for visit in reversed(range(len(runtime.visits))):
            block = runtime.visits[visit].block
            self._serve(block)
            for micro_batch in runtime.own:
                if self.worker.top(micro_batch) == (visit, block):
                    runtime.run(Backward(visit, block, micro_batch))
            left[block] -= 1
            if not left[block]:
                self._close(block)
        for block in runtime.residents:
            self._close(block)

    def _serve(self, block: int) -> None:
        """Brings a block into a slab, updated if it is due."""
        runtime = self.runtime
        if runtime.slabs.slab_of(block) is not None:
            return
        held = [b for b in range(len(runtime.blocks)) if runtime.slabs.slab_of(b) is not None]
        used = {runtime.slabs.slab_of(b) for b in held}
        free = [slab for slab in range(runtime.allotment.slabs) if slab not in used]
        if not free:
            victim = next(b for b in held if b not in runtime.residents)
            slab = runtime.slabs.slab_of(victim)
            assert slab is not None
            runtime.run(Evict(victim, slab))
            free = [slab]
        self._bring(block, free[0])

    def _bring(self, block: int, slab: int) -> None:
        runtime = self.runtime
        if block not in self.keeper.pending or block not in self.keeper.due:
            runtime.run(Fetch(block, slab))
            return
        load, update, write = self.keeper.renewal(block)
        for operation in (load, update, Fetch(block, slab), write):
            runtime.run(operation)

    def _renew(self, block: int) -> None:
        for operation in self.keeper.renewal(block):
            self.runtime.run(operation)

    def _close(self, block: int) -> None:
        if self.runtime.blocks[block].trainable:
            self.runtime.run(Reduce(block))
            if not self.runtime.facts.deferred:
                self.runtime.settle(block)
                if block in self.keeper.due:
                    self._renew(block)
