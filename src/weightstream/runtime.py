"""The runtime: executes a schedule on real bytes.

One loop over the operations. Those that move bytes are issued and go on in the background; those that compute run here,
in order, on all threads of the device. Where a model's calls differ from the schedule, the rest of the step is
improvised from the calls themselves, with the same operations.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, assert_never

from weightstream.errors import StoreError
from weightstream.fabric.reduction import Squares
from weightstream.fabric.staging import Pool, Staging
from weightstream.schedule.cost import BlockFacts
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
    Visit,
    Write,
)
from weightstream.schedule.planner import Allotment, Facts
from weightstream.store.futures import chain, done
from weightstream.store.interval import Interval
from weightstream.store.owned import Checksums, Holding, WorkingBuffer
from weightstream.worker.activations import Activations
from weightstream.worker.allocator import Ceiling
from weightstream.worker.slabs import Parameters, Slab, Slabs
from weightstream.worker.worker import LossFunction, Worker

T = TypeVar("T")


class DivergedError(Exception):
    """The model called another block than the schedule has."""


@dataclass(slots=True)
class _Loaded:
    buffer: "Future[WorkingBuffer]"
    done: "Future[Any]"
    checksums: Checksums = field(default_factory=dict)
    updated: bool = False


@dataclass(slots=True)
class StepOutcome:
    """What a step came to."""

    losses: list[float] = field(default_factory=list)
    squares: Squares = field(default_factory=dict)
    first_bad: str | None = None
    visits: tuple[Visit, ...] = ()
    uniform: bool = True
    stalled_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def norm(self) -> float:
        """The global norm: fp64 sums per parameter, or per panel of one that is cut, added in order of name and row."""
        total = 0.0
        for place in sorted(self.squares):
            total += self.squares[place]
        return math.sqrt(total) if total >= 0 else math.nan

    @property
    def finite(self) -> bool:
        return self.first_bad is None


class Runtime:
    """Executes steps. Owns the buffers that an allotment gives it; the holding and the worker are given.

    `pending` blocks have a staged gradient of step `pending_step`, whose update waits until they are next served.
    """

    def __init__(
        self,
        holding: Holding,
        worker: Worker,
        parameters: Parameters,
        facts: Facts,
        allotment: Allotment,
        ceiling: Ceiling,
        interval: Interval,
    ) -> None:
        self.holding, self.store, self.worker, self.parameters = holding, holding.store, worker, parameters
        self.facts, self.allotment, self.ceiling = facts, allotment, ceiling
        self.blocks: tuple[BlockFacts, ...] = facts.blocks
        residents = [block for block in facts.blocks if block.resident]
        self._resident_slab = {block.index: allotment.slabs + i for i, block in enumerate(residents)}
        self.slabs = Slabs(
            worker.device, (allotment.slabs, allotment.slab_bytes), [block.streamed_bytes for block in residents]
        )
        self.records = Pool([WorkingBuffer(allotment.record_bytes) for _ in range(allotment.record_buffers)])
        self._resident_records = {b.index: Pool([WorkingBuffer(b.record_bytes)]) for b in residents if b.trainable}
        self.staging = Staging(
            self.store, holding.gradients, in_ram=allotment.staged_in_ram, ring=allotment.gradient_buffers,
            partial_sums=allotment.partial_sums, held_gradients=allotment.held_gradients, device=worker.device,
            immediate=not facts.deferred,
        )  # fmt: skip
        self.activations = Activations(self.store, worker.device)
        worker.slabs, worker.activations = self.slabs, self.activations
        for index in allotment.pinned_copies:
            holding.pin_copies(index)
        for index in allotment.pinned_states:
            holding.pin_states(index)
        self.pending: frozenset[int] = frozenset()
        self.coefficient = 1.0
        self.pending_step = 0
        self.pending_progress: dict[str, Any] = {}
        self.interval = interval
        self.committing: Future[None] | None = None
        self.accepted: tuple[int, dict[str, Any]] | None = None  # a step whose commit is not due yet, and its progress
        self.outcome = StepOutcome()
        self._loaded: dict[int, _Loaded] = {}
        self._fetches: dict[int, Future[Any]] = {}
        self._writes: list[Future[Any]] = []
        self._poisoned = self._rehearsal = self.broken = False
        self._updating: int | None = None  # the block between Update and Write
        self._step = 0
        self._visits: list[Visit] = []
        self._micro_batches = 0
        self._members: list[set[int]] = []
        self._progress: Callable[[bool], dict[str, Any]] = lambda finite: {}

    # one step

    def step(
        self,
        schedule: Schedule,
        micro_batches: Sequence[Any],
        weights: Sequence[float],
        loss_fn: LossFunction,
        *,
        seed: int,
        step: int,
        progress: Callable[[bool], dict[str, Any]],
        rehearsal: bool = False,
    ) -> StepOutcome:
        """Runs one step; on an error everything since the last whole step is undone.

        Args:
            rehearsal: compute everything, but update and commit nothing.

        Raises:
            AuditError: the model would train wrong.
        """
        self.outcome = StepOutcome()
        self._step, self._poisoned, self._micro_batches = step, rehearsal, len(micro_batches)
        self._rehearsal = rehearsal
        self._visits, self._members, self._progress = [], [], progress
        for index in schedule.loaded:
            self.staging.prefetch(index)
        try:
            start = time.perf_counter()
            self.worker.begin(dict(enumerate(micro_batches)), dict(enumerate(weights)), loss_fn, seed=seed, step=step)
            self.outcome.seconds["glue"] += time.perf_counter() - start
            try:
                for operation in schedule.operations:
                    self.run(operation)
                self.outcome.visits = schedule.visits
            except DivergedError:
                self._improvise()
            self._finish()
            return self.outcome
        except BaseException:
            self.worker.end()
            self.abort()
            raise
        finally:
            self.worker.end()
            self._leave_slabs()

    def _finish(self) -> None:
        """With clipping: the norm is known now, and with it whether the step counts; its updates come later."""
        if not self.facts.deferred:
            return
        outcome = self.outcome
        if self._rehearsal:
            self.staging.clear()
            self._drop_loaded()
            return
        if outcome.finite and not math.isfinite(outcome.norm):
            outcome.first_bad = "the global norm, which overflows"
        if not outcome.finite:
            self.staging.clear()
            self._drop_loaded()
        self.pending, self.pending_step = self.staging.staged(), self._step
        self.pending_progress = self._progress(outcome.finite)
        if not self.pending:
            self._commit(self._step, self.pending_progress)

    def _brief(self, block: int) -> bool:
        """Whether a block is visited once, so that no other block's gradient arrives between its first and last."""
        return block not in self._resident_slab and sum(visit.block == block for visit in self._visits) == 1

    def run(self, operation: Operation) -> None:
        """Executes one operation, or issues it."""
        start = time.perf_counter()
        stalled = self.outcome.stalled_s
        match operation:
            case Load(block):
                self._load(block)
            case Update(block):
                self._update(block)
            case Write(block):
                self._write(block)
            case Fetch(block, slab):
                self._fetch(block, slab)
            case Evict(block, _):
                self._evict(block)
            case Forward(visit, block, micro_batch):
                self._forward(visit, block, micro_batch)
            case Turn(micro_batch):
                self.outcome.losses.append(self.worker.turn(micro_batch))
            case Backward(visit, block, micro_batch):
                self._need(block)
                self.worker.backward(visit, micro_batch)
            case Reduce(block):
                self._reduce(block)
            case Spill(visit, micro_batch):
                self.worker.spill(visit, micro_batch, to_disk=self._tier(visit) == "disk")
            case Restore(visit, micro_batch):
                self.worker.restore(visit, micro_batch)
            case Commit():
                self._publish()
            case _:
                assert_never(operation)
        self.ceiling.check()
        name = type(operation).__name__.lower()
        self.outcome.counts[name] += 1
        self.outcome.seconds[name] += time.perf_counter() - start - (self.outcome.stalled_s - stalled)

    def _tier(self, visit: int) -> str:
        return self.allotment.boundaries[visit] if visit < len(self.allotment.boundaries) else "disk"

    def _wait(self, future: "Future[T]") -> T:
        """Waits for bytes; the time that compute spends here is a stall."""
        if not future.done():
            start = time.perf_counter()
            try:
                return future.result()
            finally:
                self.outcome.stalled_s += time.perf_counter() - start
        return future.result()

    # the store's side

    def _load(self, block: int) -> None:
        if block in self._loaded or not self.holding.updated(block):
            return
        buffer = self._records_of(block).take()
        loading = chain([buffer], lambda: self.holding.load(block, buffer.result(), check=False))
        self._loaded[block] = _Loaded(buffer, loading)
        if block in self.pending:
            self.staging.prefetch(block)

    def _update(self, block: int) -> None:
        """The optimizer step on the records of one block, per tensor or panel, in their working buffer."""
        if self._poisoned or block not in self.staging.staged() or not self.holding.updated(block):
            return
        self._await_commit()
        loaded = self._loaded[block]
        self._wait(loaded.done)
        self._wait(self.staging.ready(block))
        buffer = loaded.buffer.result()
        self.holding.check(block, buffer)
        self._updating = block
        step = self.pending_step if self.facts.deferred else self._step
        gradients = self.staging.gradients(block)
        for piece in self.holding.pieces(block, buffer):
            grad = gradients.get((piece.name, piece.row))
            if grad is not None:
                if self.coefficient < 1.0:
                    grad.mul_(self.coefficient)
                self.store.optimizer.update(
                    piece.master, grad, piece.states, name=piece.name, step=step, count=piece.count
                )
            if piece.copy is not None:
                piece.copy.copy_(piece.master)
        self.staging.release(block)
        loaded.checksums = self.holding.checksums(block, buffer)
        loaded.updated = True

    def _write(self, block: int) -> None:
        loaded = self._loaded.get(block)
        if loaded is None or not loaded.updated:
            if loaded is not None:  # nothing was updated: the buffer goes back as it came
                self._release(block)
            self.staging.release(block)
            return
        del self._loaded[block]
        buffer = loaded.buffer.result()
        written = self.holding.write(block, buffer, loaded.checksums)
        self._updating = None
        self._writes.append(written)
        self._records_of(block).give(buffer, after=written)

    def _release(self, block: int) -> None:
        loaded = self._loaded.pop(block)
        loaded.done.add_done_callback(lambda _: self._records_of(block).give(loaded.buffer.result()))

    def _records_of(self, block: int) -> Pool[WorkingBuffer]:
        """Where a block's working buffer comes from: a resident block's is its own."""
        return self._resident_records.get(block, self.records)

    def _drop_loaded(self) -> None:
        for block in list(self._loaded):
            self._release(block)

    def _publish(self) -> None:
        """Commits the step that the written versions belong to; undoes them if its gradient was not finite."""
        if self.facts.deferred:
            self._commit(self.pending_step, self.pending_progress)
            self.pending = frozenset()
            return
        if self._rehearsal:
            self._drop_loaded()
            return
        if self._poisoned:
            self._settle_writes()
            self.store.discard()
        self._commit(self._step, self._progress(self.outcome.finite))

    def _commit(self, step: int, progress: dict[str, Any]) -> None:
        """The step counts: it is committed, or accepted until a commit is due."""
        self._await_commit()
        self._writes.clear()
        self.accepted = (step, progress)
        if self.interval.passed():
            self._commit_accepted()
        else:
            self.store.accept()

    def _commit_accepted(self) -> None:
        if self.accepted is not None:
            self.committing = self.store.commit(*self.accepted)
            self.accepted = None
            self.interval.restart()

    def _await_commit(self) -> None:
        if self.committing is None:
            return
        try:
            self._wait(self.committing)
        except StoreError:
            self.accepted = None  # what was accepted since goes with the commit that failed
            raise
        self.committing = None

    def _settle_writes(self) -> None:
        for future in self._writes:
            future.exception()
        self._writes.clear()

    def _fetch(self, block: int, slab: int) -> None:
        target = self.slabs[slab]
        self.slabs.hold(block, slab)
        loaded = self._loaded.get(block)
        if loaded is not None and loaded.updated:
            fetch = self.holding.serve(block, loaded.buffer.result(), target.landing)
            if fetch.done():
                fetch.result()
                target.upload()
                return
        else:
            fetch = self.holding.fetch(block, target.landing)
        self._fetches[block] = (
            fetch if target.device.type == "cpu" else chain([fetch], lambda: _uploaded(fetch, target))
        )

    def _evict(self, block: int) -> None:
        fetch = self._fetches.pop(block, None)
        if fetch is not None:
            self._wait(fetch)
        self.parameters.unbind(block)
        self.slabs.release(block)

    def _need(self, block: int) -> None:
        """Makes sure that a block is present: waits for its bytes and binds its parameters to them."""
        fetch = self._fetches.pop(block, None)
        if fetch is not None:
            self._wait(fetch)
        if not self.parameters.present(block):
            slab = self.slabs.slab_of(block)
            assert slab is not None, f"block {block} is in no slab"
            self.parameters.bind(block, self.slabs[slab], self.holding.slabs[block])

    def _need_residents(self) -> None:
        for block in self._resident_slab:
            self._need(block)

    # the worker's side

    def _forward(self, visit: int, block: int, micro_batch: int) -> None:
        wanted = self.worker.wants(micro_batch)
        planned = self.facts.visits[visit] if visit < len(self.facts.visits) else None
        if planned is None or wanted != planned.module:
            raise DivergedError
        self._pass(visit, block, micro_batch, last=visit == len(self.facts.visits) - 1)

    def _pass(self, visit: int, block: int, micro_batch: int, *, last: bool) -> None:
        if visit == len(self._visits):
            module = self.worker.wants(micro_batch)
            assert module is not None
            self._visits.append(Visit(block, module))
            self._members.append(set())
        self._members[visit].add(micro_batch)
        self._need_residents()
        self._need(block)
        self.worker.forward(visit, micro_batch, keep=last or visit in self.allotment.keep)
        if last and self.worker.wants(micro_batch) is not None:
            raise DivergedError

    def gradient(self, block: int, name: str, use: int, micro_batch: int, grad: Any) -> None:
        """The worker's sink: one micro-batch's gradient of one parameter."""
        total = self.staging.sum_of(block)
        if total is None:
            total = self.staging.open(
                block, micro_batches=self._micro_batches, groups=self.facts.reduction_groups, brief=self._brief(block)
            )
        total.add(name, use, micro_batch, grad)

    def _reduce(self, block: int) -> None:
        squares = self.staging.close(block)
        self.outcome.squares.update(squares)
        for (name, _), value in squares.items():
            if not math.isfinite(value) and self.outcome.first_bad is None:
                self.outcome.first_bad = f"parameter '{name}' of block '{self.store.blocks[block].name}'"
                self._poisoned = not self.facts.deferred
        if self._poisoned:
            self.staging.release(block)

    # a step whose calls are not known

    def _improvise(self) -> None:
        """The rest of a step, from the calls that the model makes: fetch on demand, nothing ahead."""
        count = self._micro_batches
        self.staging.recall()
        turned = set(range(len(self.outcome.losses)))
        while waiting := [m for m in range(count) if self.worker.wants(m) is not None]:
            chosen = min(waiting, key=self._occurrence)
            together = [m for m in waiting if self._occurrence(m) == self._occurrence(chosen)]
            module = self.worker.wants(chosen)
            assert module is not None
            block = self.worker.block_of_module[module]
            self._serve(block)
            visit = self._visit_for(module, block, together)
            for micro_batch in together:
                self._pass(visit, block, micro_batch, last=False)
                self.run(Spill(visit, micro_batch))
                if self.worker.wants(micro_batch) is None:
                    self.run(Turn(micro_batch))
                    turned.add(micro_batch)
        for micro_batch in sorted(set(range(count)) - turned):
            self.run(Turn(micro_batch))
        for block in sorted(self.pending & self.staging.staged()):
            self._renew(block)
        if self.facts.deferred and self.pending:
            self.run(Commit())
        left = Counter(visit.block for visit in self._visits)
        for visit in reversed(range(len(self._visits))):
            block = self._visits[visit].block
            self._serve(block)
            for micro_batch in range(count):
                if self.worker.top(micro_batch) == (visit, block):
                    self.run(Backward(visit, block, micro_batch))
            left[block] -= 1
            if not left[block]:
                self._close(block)
        for block in self._resident_slab:
            self._close(block)
        if not self.facts.deferred:
            self.run(Commit())
        self._drop_loaded()
        self.outcome.visits = tuple(self._visits)
        self.outcome.uniform = all(len(members) == count for members in self._members)

    def _occurrence(self, micro_batch: int) -> tuple[int, int]:
        """How often a micro-batch has been where it wants to go, and that module's place in the model."""
        module = self.worker.wants(micro_batch)
        assert module is not None
        times = sum(
            visit.module == module and micro_batch in members
            for visit, members in zip(self._visits, self._members, strict=True)
        )
        return times, self.worker.position(module)

    def _visit_for(self, module: str, block: int, micro_batches: Sequence[int]) -> int:
        """The visit that these micro-batches join: one that others made before them, or a new one."""
        for number in reversed(range(len(self._visits))):
            if self._visits[number].module == module:
                tops = [self.worker.top(m) for m in micro_batches]
                apart = not self._members[number] & set(micro_batches)
                if apart and all(top is None or top[0] < number for top in tops):
                    return number
                break
        self._visits.append(Visit(block, module))
        self._members.append(set())
        return len(self._visits) - 1

    def _serve(self, block: int) -> None:
        """Brings a block into a slab, updated if it is due."""
        if self.slabs.slab_of(block) is not None:
            return
        used = {self.slabs.slab_of(b) for b in range(len(self.blocks))}
        free = [slab for slab in range(self.allotment.slabs) if slab not in used]
        if not free:
            held = [b for b in range(len(self.blocks)) if self.slabs.slab_of(b) is not None]
            victim = next(b for b in held if b not in self._resident_slab)
            slab = self.slabs.slab_of(victim)
            assert slab is not None
            self.run(Evict(victim, slab))
            free = [slab]
        if block in self.pending and block in self.staging.staged():
            self._make_room(block)
            self.run(Load(block))
            self.run(Update(block))
            self.run(Fetch(block, free[0]))
            self.run(Write(block))
        else:
            self.run(Fetch(block, free[0]))

    def _renew(self, block: int) -> None:
        self._make_room(block)
        for operation in (Load(block), Update(block), Write(block)):
            self.run(operation)

    def _close(self, block: int) -> None:
        if self.blocks[block].trainable:
            self.run(Reduce(block))
            if not self.facts.deferred and block in self.staging.staged():
                self._renew(block)

    def _make_room(self, block: int) -> None:
        """A record that was loaded ahead for nothing must not keep the last buffer."""
        sharing = [held for held in self._loaded if held not in self._resident_records]
        if block not in {*self._loaded, *self._resident_records} and len(sharing) >= self.allotment.record_buffers:
            self._release(sharing[0])

    # between steps

    def is_loaded(self, block: int) -> bool:
        return block in self._loaded

    def keep_loaded(self, blocks: Sequence[int]) -> None:
        """Gives back the buffers of records that were loaded ahead for nothing."""
        for block in [b for b in self._loaded if b not in blocks]:
            self._release(block)

    def drain(self) -> None:
        """Applies what waits for its update and commits it; afterwards the store is at the last step.

        Raises:
            StoreError: a step was interrupted in the middle of an update.
        """
        if self.broken:
            raise StoreError(
                f"store '{self.store.path}': a step was interrupted while it updated a record, so that what was not "
                f"committed is not whole; close the engine and open it again at step {self.store.step}"
            )
        self.staging.recall()
        # what is loaded first: it has the buffers that the others wait for
        due = sorted(self.pending & self.staging.staged(), key=lambda block: (block not in self._loaded, block))
        for block in [b for b in self._loaded if b not in due]:
            self._release(block)
        for position, block in enumerate(due):
            for ahead in due[position : position + max(1, self.allotment.record_buffers)]:
                self.run(Load(ahead))
            self.run(Update(block))
            self.run(Write(block))
        if self.pending:
            self.run(Commit())
        self._await_commit()
        self._commit_accepted()
        self._await_commit()

    def abort(self) -> None:
        """Forgets a step that failed in the middle; what the step before left to do is still there.

        A record that was being updated is neither old nor new: then only the last commit is whole.
        """
        self.broken |= self._updating is not None
        self.staging.abort()
        if not self.pending:
            self.staging.clear()
        if not self.facts.deferred:
            self._settle_writes()
            self.store.discard()
        self._drop_loaded()

    def _leave_slabs(self) -> None:
        for block in range(len(self.blocks)):
            if self.slabs.slab_of(block) is not None:
                self._evict(block)

    def close(self) -> None:
        """Drains, and gives all buffers back. What an interrupted update left is not committed."""
        if self.broken:
            self._settle_writes()
            self.store.discard()
            self.staging.clear()
            self._commit_accepted()
            self._await_commit()
        else:
            self.drain()
        self._drop_loaded()
        for block in self.blocks:
            self.holding.unpin(block.index)
        for pool in (self.records, *self._resident_records.values()):
            for _ in range(len(pool.buffers)):
                pool.take().result().close()
        self.staging.close_buffers()
        self.activations.close()
        self.slabs.close()


def _uploaded(fetch: "Future[Any]", slab: Slab) -> "Future[None]":
    fetch.result()
    slab.upload()
    return done(None)
