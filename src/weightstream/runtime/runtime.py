"""The runtime: executes a schedule on real bytes.

One loop over the operations, of which this rank does its own part. Those that move bytes are issued and go on in the
background; those that compute run here, in order, on all threads of the device. Where a model's calls differ from the
schedule, the rest of the step is improvised from the calls themselves (`improvising.py`), with the same operations.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, assert_never

from weightstream.errors import AuditError
from weightstream.fabric.peers import Peers
from weightstream.fabric.reduction import Squares
from weightstream.fabric.together import SUMS_TRAVELLING
from weightstream.runtime.arriving import Arrivals
from weightstream.runtime.improvising import DivergedError, improvise
from weightstream.runtime.keeping import Keeper
from weightstream.schedule.allotment import Allotment, Facts
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
from weightstream.trace.recorder import Recorder
from weightstream.worker.activations import Activations, Scratch
from weightstream.worker.allocator import Ceiling
from weightstream.worker.expanding import Driven, Expansion
from weightstream.worker.places import KeptPlaces
from weightstream.worker.slabs import Parameters, Slabs
from weightstream.worker.worker import LossFunction, Worker

T = TypeVar("T")


@dataclass(slots=True)
class StepOutcome:
    """What a step came to, on all ranks; `stalled_s`, `seconds` and `counts` are this rank's own."""

    losses: dict[int, float] = field(default_factory=dict)
    squares: Squares = field(default_factory=dict)
    first_bad: str | None = None
    visits: tuple[Visit, ...] = ()
    uniform: bool = True
    stalled_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    grown: Counter[str] = field(default_factory=Counter)
    """By parameter whose mask was changed during the step: how many of its elements came to exist."""

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
    """Executes steps. Owns the slabs and activations that an allotment gives it; keeper, worker and peers are given.

    Args:
        peers: this rank's part in what all ranks do together.
        computing: entered while this rank computes; ranks that share a process take turns.
        recorder: told of each operation.
        driven: by name the parameters that are multiplied by kernels.
    """

    def __init__(
        self,
        keeper: Keeper,
        worker: Worker,
        parameters: Parameters,
        facts: Facts,
        allotment: Allotment,
        ceiling: Ceiling,
        scratch: Scratch,
        peers: Peers,
        computing: Callable[[], AbstractContextManager[object]] = nullcontext,
        recorder: Recorder | None = None,
        driven: Mapping[str, Driven] | None = None,
    ) -> None:
        self.keeper, self.holding, self.worker = keeper, keeper.holding, worker
        self.facts, self.allotment, self.peers = facts, allotment, peers
        self.blocks: tuple[BlockFacts, ...] = facts.blocks
        self.residents = tuple(block.index for block in facts.blocks if block.resident)
        self.slabs = Slabs(
            worker.device,
            (allotment.slabs, allotment.slab_bytes),
            [facts.blocks[index].streamed_bytes for index in self.residents],
            (allotment.compressed_bytes, [facts.blocks[index].compressed_bytes for index in self.residents]),
        )
        self.places = KeptPlaces(allotment.kept_places)
        self.expansion = Expansion(keeper.holding, driven, worker.device, self.places)
        self.arrivals = Arrivals(keeper.holding, peers, parameters, self.slabs, self.expansion, self.wait)
        self.activations = Activations(scratch, worker.device, self.wait)
        worker.slabs, worker.activations = self.slabs, self.activations
        self.outcome = StepOutcome()
        self.visits: list[Visit] = []  # as they are made
        self.members: list[set[int]] = []  # the micro-batches of all ranks that made each of them
        self.micro_batches = 0
        self.own: tuple[int, ...] = ()
        self._recorded: frozenset[int | None] = frozenset((None,))  # micro-batches, or none, of what happens here
        self._ceiling, self._computing = ceiling, computing
        self.recorder = recorder or Recorder(peers.rank)
        self._reducing: dict[int, Future[Any]] = {}  # in order of issue
        self._rehearsal = False
        self._step = 0
        self._progress: Callable[[bool], dict[str, Any]] = lambda finite: {}

    # one step

    def step(
        self,
        schedule: Schedule | None,
        micro_batches: Mapping[int, Any],
        weights: Mapping[int, float],
        loss_fn: LossFunction,
        *,
        count: int,
        seed: int,
        step: int,
        progress: Callable[[bool], dict[str, Any]],
        rehearsal: bool = False,
    ) -> StepOutcome:
        """Runs one step; on an error everything since the last whole step is undone.

        Args:
            schedule: without one, the whole step is improvised.
            micro_batches: those that this rank computes, by index; `count` is how many there are on all ranks.
            rehearsal: compute everything, but update and commit nothing.

        Raises:
            AuditError: the model would train wrong.
            AuditError: with several ranks, the model made other calls than planned.
        """
        self.outcome = StepOutcome()
        self.own, self.micro_batches = tuple(micro_batches), count
        self._recorded = frozenset((None, *self.own))
        self._step, self._rehearsal = step, rehearsal
        self.holding.whole = self.keeper.whole(step)
        self.keeper.step, self.keeper.poisoned = step, rehearsal
        self.visits, self.members, self._progress = [], [], progress
        for index in schedule.loaded if schedule else ():
            self.keeper.staging.prefetch(index)
        try:
            if not self.facts.deferred and not rehearsal:
                self.keeper.apportion(step, self.peers.gather)
            start = time.perf_counter()
            with self._computing():
                self.worker.begin(micro_batches, weights, loss_fn, seed=seed, step=step)
            self.outcome.seconds["glue"] += time.perf_counter() - start
            self._carry_out(schedule)
            self._finish()
            return self.outcome
        except BaseException:
            self.worker.end()
            self.abort()
            raise
        finally:
            self.worker.end()
            self.arrivals.evict_all()

    def _carry_out(self, schedule: Schedule | None) -> None:
        if schedule is None:
            improvise(self)
            return
        try:
            for operation in schedule.operations:
                self.run(operation)
            self.outcome.visits = schedule.visits
        except DivergedError as error:
            if self.peers.cluster.size > 1:
                raise AuditError(
                    f"rank {self.peers.rank}: {error}; with several ranks a model must make the same calls in every step: "
                    f"run it on one rank, or remove what makes its calls depend on data"
                ) from None
            improvise(self)

    def _finish(self) -> None:
        """With clipping: the norm is known now, and with it whether the step counts; its updates come later."""
        if self._rehearsal:
            self._settle_all()
            self.keeper.forget_gradients()
            self._agree()
            return
        if not self.facts.deferred:
            return
        self._agree()
        outcome = self.outcome
        if outcome.finite and not math.isfinite(outcome.norm):
            outcome.first_bad = "the global norm, which overflows"
        if outcome.finite:
            self.keeper.apportion(self._step, self.peers.gather)
        else:
            self.keeper.forget_gradients()
        self.keeper.accept_gradients(self._step, self._progress(outcome.finite), outcome.norm)

    def _agree(self) -> None:
        """Every rank learns what the others found: losses, squares, what is due, and whether anything is not finite."""
        self._settle_all()
        own = self.outcome
        squares = [(name, row, value) for (name, row), value in own.squares.items()]
        due, elapsed = sorted(self.keeper.due), self.keeper.interval.elapsed()
        grown = [] if self._rehearsal else list(self.keeper.take_grown().items())
        found = self.peers.gather([list(own.losses.items()), squares, own.first_bad, grown, due, elapsed])
        own.losses = dict(sorted((index, loss) for losses, *_ in found for index, loss in losses))
        own.squares = {(name, row): value for _, squares, *_ in found for name, row, value in squares}
        own.first_bad = next((bad for _, _, bad, *_ in found if bad is not None), None)
        for _, _, _, grown, *_ in found:
            for name, elements in grown:
                own.grown[name] += elements
        self.keeper.due = {block for *_, due, _ in found for block in due}
        self.keeper.interval.agreed = found[0][-1]
        self.keeper.poisoned |= not own.finite and not self.facts.deferred

    def run(self, operation: Operation) -> None:
        """Executes this rank's part of one operation, or issues it."""
        start = time.perf_counter()
        stalled = self.outcome.stalled_s
        match operation:
            case Load(block):
                self.keeper.load(block)
            case Update(block):
                self.settle(block)
                with self._computing():
                    self.keeper.update(block)
            case Write(block):
                self.keeper.write(block)
            case Fetch(block, slab):
                self.arrivals.fetch(block, slab, self.keeper.updated(block))
            case Evict(block, _):
                self.arrivals.evict(block)
            case Commit():
                self._publish()
            case Reduce(block):
                self._reduce(block)
            case Forward(visit, block, micro_batch):
                self._forward(visit, block, micro_batch)
            case Turn(micro_batch) | Backward(_, _, micro_batch) | Spill(_, micro_batch) | Restore(_, micro_batch):
                if micro_batch in self.own:
                    self._compute(operation)
            case _:
                assert_never(operation)
        self._ceiling.check()
        self.ran(operation, start, stalled)

    def ran(self, operation: Operation, start: float, stalled: float) -> None:
        """An operation was carried out; notes its time.

        Args:
            start: when it began.
            stalled: the outcome's `stalled_s` at that time.
        """
        ended, waited = time.perf_counter(), self.outcome.stalled_s - stalled
        name = type(operation).__name__.lower()
        self.outcome.counts[name] += 1
        self.outcome.seconds[name] += ended - start - waited
        if getattr(operation, "micro_batch", None) in self._recorded:
            self.recorder.ran(operation, start, ended, waited)

    def _compute(self, operation: Turn | Backward | Spill | Restore) -> None:
        match operation:
            case Turn(micro_batch):
                self._make_room_for_sums()
                with self._computing():
                    self.outcome.losses[micro_batch] = self.worker.turn(micro_batch)
            case Backward(visit, block, micro_batch):
                self.arrivals.need(block)
                self._make_room_for_sums()
                with self._computing():
                    self.worker.backward(visit, micro_batch)
                    self.keeper.touching.through(visit, micro_batch)
            case Spill(visit, micro_batch):
                self.worker.spill(visit, micro_batch, to_disk=self._tier(visit) == "disk")
            case Restore(visit, micro_batch):
                self.worker.restore(visit, micro_batch)
            case _:
                assert_never(operation)

    def _tier(self, visit: int) -> str:
        return self.allotment.boundaries[visit] if visit < len(self.allotment.boundaries) else "disk"

    def wait(self, future: "Future[T]") -> T:
        """Waits for bytes; the time that compute spends here is a stall."""
        if not future.done():
            start = time.perf_counter()
            try:
                return future.result()
            finally:
                self.outcome.stalled_s += time.perf_counter() - start
        return future.result()

    def _publish(self) -> None:
        """Commits the step that the written versions belong to; undoes them if its gradient was not finite."""
        if self.facts.deferred:
            self.keeper.publish_pending()
            return
        if self._rehearsal:
            self.keeper.drop_loaded()
            return
        self._agree()
        if self.keeper.poisoned:
            self.keeper.undo_writes()
            self.outcome.grown.clear()
            self.keeper.touching.drop()
        else:
            self.keeper.update_touched(self._step)
        self.keeper.due.clear()
        self.keeper.commit(self._step, self._progress(self.outcome.finite))

    # the worker's side

    def _forward(self, visit: int, block: int, micro_batch: int) -> None:
        planned = self.facts.visits[visit] if visit < len(self.facts.visits) else None
        if micro_batch in self.own:
            wanted = self.worker.wants(micro_batch)
            if planned is None or wanted != planned.module:
                raise DivergedError(
                    f"micro-batch {micro_batch} called {wanted or 'nothing more'}, planned was {planned and planned.module}"
                )
        last = visit == len(self.facts.visits) - 1
        assert planned is not None
        self.make_visit(visit, planned, micro_batch)
        if micro_batch == 0:
            self.keeper.touching.enter(block)
        self.pass_through(visit, block, micro_batch, last=last)
        if micro_batch == self.micro_batches - 1:
            self.keeper.touching.leave(block)
        if last and micro_batch in self.own and self.worker.wants(micro_batch) is not None:
            raise DivergedError(
                f"micro-batch {micro_batch} called {self.worker.wants(micro_batch)} after the last visit"
            )

    def make_visit(self, visit: int, planned: Visit, micro_batch: int) -> None:
        """Notes that a micro-batch of some rank takes part in a visit, which may be a new one."""
        if visit == len(self.visits):
            self.visits.append(planned)
            self.members.append(set())
        self.members[visit].add(micro_batch)

    def pass_through(self, visit: int, block: int, micro_batch: int, *, last: bool) -> None:
        """One of this rank's micro-batches through the block that it waits for."""
        if micro_batch not in self.own:
            return
        for resident in self.residents:
            self.arrivals.need(resident)
        self.arrivals.need(block)
        with self._computing():
            self.worker.forward(visit, micro_batch, keep=last or visit in self.allotment.keep)

    def gradient(self, block: int, name: str, use: int, micro_batch: int, grad: Any) -> None:
        """The worker's sink: one micro-batch's gradient of one parameter; of a sparse one its non-zeros are summed."""
        self._sum(block).add(name, use, micro_batch, self.expansion.gathered(block, name, grad))

    def _sum(self, block: int) -> Any:
        total = self.peers.sum_of(block)
        if total is None:
            total = self.peers.open(block, micro_batches=self.micro_batches, brief=self._brief(block))
        return total

    def _brief(self, block: int) -> bool:
        """Whether a block is visited once, so that no other block's gradient arrives between its first and last."""
        return block not in self.residents and sum(visit.block == block for visit in self.visits) == 1

    def _reduce(self, block: int) -> None:
        self._make_room_for_sums()  # a rank without micro-batches would be ahead by as many blocks as it serves
        with self._computing():
            self._reducing[block] = self.peers.reduce(block)
        for earlier in list(self._reducing):
            if not self._reducing[earlier].done():
                break
            self.settle(earlier)

    def _make_room_for_sums(self) -> None:
        """Before gradients come that need memory: waits for sums that are on their way between ranks."""
        while len(self._reducing) >= SUMS_TRAVELLING:
            self.settle(next(iter(self._reducing)))

    def settle(self, block: int) -> None:
        """Takes in what a block's sum came to, once it is complete."""
        future = self._reducing.pop(block, None)
        if future is None:
            return
        total = self.wait(future)
        with self._computing():
            reduced = self.peers.finish(block, total)
        self._note_squares(reduced.squares, f" of block '{self.blocks[block].name}'")
        if self.keeper.poisoned:
            self.keeper.staging.release(block)
        elif reduced.found:
            self.keeper.due.add(block)

    def _note_squares(self, squares: Squares, of_block: str) -> None:
        self.outcome.squares.update(squares)
        for (name, _), value in squares.items():
            if not math.isfinite(value) and self.outcome.first_bad is None:
                self.outcome.first_bad = f"parameter '{name}'{of_block}"
                self.keeper.poisoned |= not self.facts.deferred

    def _settle_all(self) -> None:
        for block in list(self._reducing):
            self.settle(block)
        self.keeper.touching.collect()
        with self._computing():
            squares = self.keeper.touching.close_sums()
        self.keeper.touching.settle()
        self._note_squares(squares, "")

    # between steps

    def drain(self) -> None:
        """Applies what waits for its update and commits it; see `Keeper.drain`."""
        self.keeper.drain(self.run)

    def abort(self) -> None:
        """Forgets a step that failed in the middle; see `Keeper.abort`."""
        self._reducing.clear()
        self.peers.abort()
        self.keeper.abort()

    def close(self) -> None:
        """Drains, and gives all buffers back. What an interrupted update left is not committed."""
        self.keeper.close(self.run)
        self.peers.close()
        self.expansion.close()
        self.activations.close()
        self.slabs.close()
