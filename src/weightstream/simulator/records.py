"""The store's side of one rank: records are loaded, updated, written and committed, and gradients wait for it.

All of this goes on beside what the rank computes, as fast as buffers, disk and memory let it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import simpy

from weightstream.schedule.operations import Commit, Fetch, Load, Operation, Schedule, Update, Write
from weightstream.simulator.machine import RECORDS, URGENT, WRITES, Work, until
from weightstream.simulator.resources import Lanes, Pool, Process

if TYPE_CHECKING:
    from weightstream.simulator.rank import Log, Rank

Part = Literal["copy", "states"]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a part of a record is: in memory (`pinned`) or on disk, since `ready`."""

    ready: simpy.Event | None
    pinned: bool = False
    filled: simpy.Event | None = None


@dataclass(slots=True)
class _Staged:
    """One block's gradient from its first micro-batch until its update: when it is in memory, and in scratch."""

    ready: simpy.Event | None = None
    written: simpy.Event | None = None


class Records:
    """What one memory rank owns: as much of every block as any other, of `owners` ranks."""

    def __init__(self, rank: "Rank", owners: int) -> None:
        self._rank, self._env, self._owners = rank, rank.env, owners
        allotment, self._facts = rank.allotment, rank.facts
        self._shared: Pool = Pool(rank.env, allotment.record_buffers)
        self._own = {b.index: Pool(rank.env, 1) for b in self._facts.blocks if b.resident and b.trainable}
        self._ring = Pool(rank.env, allotment.gradient_buffers)
        self._in_ram = allotment.staged_in_ram
        self._pinned: set[tuple[Part, int]] = {("copy", index) for index in allotment.pinned_copies}
        self._pinned |= {("states", index) for index in allotment.pinned_states}
        self._pins: dict[tuple[Part, int], simpy.Event] = {}  # what is in memory, and since when
        self._newest: dict[int, simpy.Event] = {}  # the last write of each record
        self._loaded: dict[int, simpy.Event] = {}
        self._updated: dict[int, simpy.Event] = {}  # updated, and not being written yet
        self._staged: dict[int, _Staged] = {}
        self._writes: list[simpy.Event] = []
        self._committing: simpy.Event | None = None
        self._pending: frozenset[int] = frozenset()
        self._last_update: simpy.Event | None = None
        self._updating: dict[int, simpy.Event] = {}  # the last update of each block on a processor beside
        self.optimizer = Lanes(rank.env)

    def begin(self, schedule: Schedule) -> None:
        """A step begins; records that it finds loaded get their gradients."""
        self._pending = schedule.pending
        for block in schedule.loaded:
            self._prefetch(Load(block), block)

    @property
    def grown_bytes(self) -> int:
        """Gradient buffers beyond those that were planned."""
        return self._ring.grown * max((b.staged_bytes for b in self._facts.blocks if b.trainable), default=0)

    # bytes between the store and memory

    def _source(self, part: Part, block: int) -> _Source:
        """Where the newest version of a part of a record is at present; memory that is to hold it is filled by this read."""
        key = (part, block)
        if key in self._pins:
            return _Source(self._pins[key], pinned=True)
        filled = self._env.event() if key in self._pinned else None
        if filled is not None:
            self._pins[key] = filled
        return _Source(self._newest.get(block), filled=filled)

    def _read(
        self, operation: Operation, source: _Source, lane: int, nbytes: float, cause: Work | None, log: "Log"
    ) -> Process[Work | None]:
        cause = yield from until(self._env, cause, *self._some(source.ready))
        self._rank.began(operation, log)
        if source.pinned:
            return (yield from self._copy(operation, nbytes, cause, log))
        found = yield from self._rank.transfer(operation, nbytes, lane, cause, log)
        if source.filled is not None:
            found = yield from self._copy(operation, nbytes, found, log)
            source.filled.succeed(found)
        return found

    def _copy(self, operation: Operation, nbytes: float, cause: Work | None, log: "Log") -> Process[Work | None]:
        work = self._rank.work(operation, "memory", nbytes, log=log, cause=cause)
        yield self._rank.host.copy(nbytes, work)
        work.ended_s = self._env.now
        return work

    @staticmethod
    def _some(*events: simpy.Event | None) -> Iterable[simpy.Event]:
        return [event for event in events if event is not None]

    # records

    def load(self, operation: Load, block: int) -> None:
        """Begins to bring a record, and its gradient if that lies on disk."""
        if block in self._loaded:
            return
        buffer = self._records_of(block).take()
        rank = self._rank
        source = self._source("states", block)
        self._loaded[block] = self._env.process(self._load(operation, block, source, buffer, rank.cause, rank.log))
        if block in self._pending:
            self._prefetch(operation, block)

    def _records_of(self, block: int) -> Pool:
        return self._own.get(block, self._shared)

    def _load(
        self,
        operation: Load,
        block: int,
        source: _Source,
        buffer: simpy.Event,
        cause: Work | None,
        log: "Log",
    ) -> Process[Work | None]:
        cause = yield from until(self._env, cause, buffer)
        nbytes = self._facts.blocks[block].load_bytes
        return (yield from self._read(operation, source, RECORDS, nbytes, cause, log))

    def update_s(self, block: int) -> float:
        """How long the optimizer step on this rank's part of a block takes."""
        return self._rank.durations.update[block] / self._owners

    def ready_for_update(self, block: int) -> Process[None]:
        """Waits until a record and its gradient are in memory, and nothing of the last commit is under way."""
        yield from self._rank.wait(*self._some(self._committing, self._loaded[block]))
        yield from self._rank.wait(*self._some(self._ready(Update(block), block)))

    def updated(self, block: int) -> None:
        """The optimizer step is done, on the cores that compute."""
        self._updated[block] = self._env.event().succeed(self._rank.cause)
        self._release(block)

    def update_beside(self, operation: Update, block: int, reducing: simpy.Event | None) -> None:
        """Begins the optimizer step on a processor of its own, once all that it needs is there."""
        rank = self._rank
        needed = self._some(self._last_update, self._committing, self._loaded[block], reducing)
        self._last_update = self._env.process(
            self._update(operation, block, needed, reducing is not None, rank.cause, rank.log)
        )
        self._updated[block] = self._updating[block] = self._last_update
        if block not in self._in_ram:  # whoever needs room meanwhile waits for it
            self._ring.give(self._last_update)

    def _update(
        self,
        operation: Update,
        block: int,
        needed: Iterable[simpy.Event],
        reduced: bool,
        cause: Work | None,
        log: "Log",
    ) -> Process[Work]:
        rank = self._rank
        work = rank.work(operation, "optimizer", log=log)
        cause = yield from until(self._env, cause, *needed)
        if reduced:
            self.stage(operation, block)
        cause = yield from until(self._env, cause, *self._some(self._ready(operation, block)))
        rank.began(operation, log)
        work.begun_s, work.cause = self._env.now, cause
        yield self.optimizer.run(self.update_s(block), 0, work)
        work.ended_s = self._env.now
        del self._staged[block]
        return work

    def write(self, operation: Write, block: int) -> None:
        """Begins to write what was updated; its buffer is free when it is on disk, and in memory where it stays there."""
        del self._loaded[block]
        rank, updated = self._rank, self._updated.pop(block)
        written = self._env.process(self._write(operation, block, updated, rank.cause, rank.log))
        for part in ("copy", "states"):
            if (part, block) in self._pinned:
                self._pins[part, block] = written
        self._newest[block] = written
        self._writes.append(written)
        self._records_of(block).give(written)

    def _write(
        self, operation: Write, block: int, updated: simpy.Event, cause: Work | None, log: "Log"
    ) -> Process[Work | None]:
        cause = yield from until(self._env, cause, updated)
        self._rank.began(operation, log)
        facts = self._facts.blocks[block]
        pinned = {"copy": facts.fetched_bytes / self._owners, "states": facts.load_bytes}
        copies = [
            self._env.process(self._copy(operation, nbytes, cause, log))
            for part, nbytes in pinned.items()
            if (part, block) in self._pinned
        ]
        written = yield from self._rank.transfer(operation, facts.record_bytes, WRITES, cause, log)
        return (yield from until(self._env, written, *copies))

    def writes(self, written: simpy.Event) -> None:
        """Something else is being written that the next commit publishes."""
        self._writes.append(written)

    def commit(self, operation: Commit) -> Process[None]:
        """Publishes what was written, in the background, as soon as it is on disk and the commit before is done."""
        rank = self._rank
        yield from rank.wait(*self._some(self._committing))
        self._committing = self._env.process(self._commit(operation, tuple(self._writes), rank.log))
        self._writes.clear()
        self._pending = frozenset()

    def _commit(self, operation: Commit, writes: tuple[simpy.Event, ...], log: "Log") -> Process[Work]:
        work = self._rank.work(operation, "manifest", log=log)
        work.cause = yield from until(self._env, work.cause, *writes)
        self._rank.began(operation, log)
        work.begun_s = work.ended_s = self._env.now
        return work

    # what is streamed

    def serve(self, operation: Fetch, block: int) -> Process[simpy.Event]:
        """Brings this rank's part of a block to a slab; from its working buffer, here and now, if it was just updated."""
        rank, nbytes = self._rank, self._facts.blocks[block].fetched_bytes / self._owners
        updated = self._updated.get(block)
        if updated is None:
            source = self._source("copy", block)
            return self._env.process(self._read(operation, source, URGENT, nbytes, rank.cause, rank.log))
        if rank.hardware.updates_beside:
            return self._env.process(self._serve_later(operation, updated, nbytes, rank.cause, rank.log))
        rank.began(operation, rank.log)
        yield from rank.copy(operation, nbytes)
        return self._env.event().succeed(rank.cause)

    def _serve_later(
        self, operation: Fetch, updated: simpy.Event, nbytes: float, cause: Work | None, log: "Log"
    ) -> Process[Work | None]:
        cause = yield from until(self._env, cause, updated)
        self._rank.began(operation, log)
        return (yield from self._copy(operation, nbytes, cause, log))

    # gradients

    def open_sum(self, block: int) -> Process[None]:
        """Room for a block's gradient, once; waits for a buffer that is on its way back, and for the update that still
        uses the gradient before."""
        yield from self._rank.wait(*self._some(self._updating.pop(block, None)))
        if block not in self._staged:
            self._staged[block] = _Staged()
            if block not in self._in_ram:
                yield from self._rank.wait(self._ring.take_or_grow())

    def stage(self, operation: Operation, block: int) -> None:
        """A sum is complete: it waits in memory, or goes to scratch."""
        staged, rank = self._staged[block], self._rank
        if block in self._in_ram or not self._facts.deferred:
            staged.ready = self._env.event().succeed(rank.cause)
            return
        nbytes = self._facts.blocks[block].staged_bytes
        staged.written = self._env.process(rank.transfer(operation, nbytes, WRITES, rank.cause, rank.log))
        self._ring.give(staged.written)

    def _prefetch(self, operation: Operation, block: int) -> None:
        staged = self._staged.get(block)
        if staged is not None and staged.ready is None:
            self._bring_back(operation, block, staged, self._ring.take())

    def _bring_back(self, operation: Operation, block: int, staged: _Staged, buffer: simpy.Event) -> None:
        staged.ready = self._env.process(
            self._read_back(operation, block, staged, buffer, self._rank.cause, self._rank.log)
        )

    def _read_back(
        self, operation: Operation, block: int, staged: _Staged, buffer: simpy.Event, cause: Work | None, log: "Log"
    ) -> Process[Work | None]:
        cause = yield from until(self._env, cause, buffer, *self._some(staged.written))
        nbytes = self._facts.blocks[block].staged_bytes
        return (yield from self._rank.transfer(operation, nbytes, URGENT, cause, log))

    def _ready(self, operation: Operation, block: int) -> simpy.Event | None:
        staged = self._staged[block]
        if staged.ready is None:
            patient = not self._rank.hardware.updates_beside  # else it could wait for its own
            self._bring_back(operation, block, staged, self._ring.take_or_grow(patient=patient))
        return staged.ready

    def _release(self, block: int) -> None:
        """The gradient was used."""
        staged = self._staged.pop(block)
        if block not in self._in_ram:
            assert staged.ready is not None
            self._ring.give(staged.ready)
