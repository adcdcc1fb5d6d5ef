"""One rank of the simulator: it loops over its operations as the runtime does, and waits for what the runtime waits for.

Operations that move bytes are begun and go on by themselves, those that compute take their turn here. What the store does
with one rank's records is in `records.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import assert_never

import simpy

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
)
from weightstream.simulator.durations import Durations, ExpertWork
from weightstream.simulator.hardware import Hardware
from weightstream.simulator.machine import RECORDS, URGENT, WRITES, Fabric, Host, Work, until
from weightstream.simulator.memory import Memory
from weightstream.simulator.records import Records
from weightstream.simulator.resources import Process

BOUNCES = 3
"""Spilled activations that may be on their way to the disk before the next one waits."""


@dataclass(slots=True)
class Log:
    """What one rank did in one step; `began` has when, and in which order, each operation began."""

    step: int
    begin_s: float = 0.0
    end_s: float = 0.0
    waited_s: float = 0.0
    works: list[Work] = field(default_factory=list)
    began: list[tuple[float, int, Operation]] = field(default_factory=list)
    last: Work | None = None
    read_bytes: float = 0.0
    written_bytes: float = 0.0


class Rank:
    """One rank's loop over its operations.

    Args:
        share: its micro-batches.
        counter: numbers all that begins on all ranks, in order.
    """

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        facts: Facts,
        allotment: Allotment,
        durations: Durations,
        hardware: Hardware,
        host: Host,
        fabric: Fabric,
        share: range,
        counter: Iterator[int],
    ) -> None:
        self.env, self.number, self.facts, self.allotment = env, number, facts, allotment
        self.durations, self.hardware, self.host, self.fabric = durations, hardware, host, fabric
        cluster = hardware.cluster
        self.share, self.alone, self._counter = share, cluster.size == 1, counter
        self.slow = hardware.slowdown.get(number, 1.0)
        self.logs: list[Log] = []
        self.records = Records(self, len(cluster.memory_ranks)) if number in cluster.memory_ranks else None
        self.memory = Memory(facts, allotment, len(share))
        self.cause: Work | None = None
        self.residents = [block.index for block in facts.blocks if block.resident]
        self._trained = {block.index for block in facts.blocks if block.trainable}
        self._arrivals: dict[int, simpy.Event] = {}
        self._reducing: dict[int, simpy.Event] = {}  # in order of issue
        self._spills: dict[tuple[int, int], simpy.Event] = {}
        self._bounces: list[simpy.Event] = []
        self._restores: dict[tuple[int, int], simpy.Event | None] = {}
        self._meetings = {"down": 0, "up": 0, "agree": 0}
        self._experts: list[tuple[ExpertWork, simpy.Event | None]] = []  # that are not needed yet, and their reads

    # what everything here is made of

    @property
    def log(self) -> Log:
        return self.logs[-1]

    def work(
        self,
        operation: Operation | None,
        resource: str,
        nbytes: float = 0,
        *,
        log: Log | None = None,
        cause: Work | None = None,
    ) -> Work:
        """The beginning of something that keeps a resource busy, of the present step unless it is said of which."""
        cause = self.cause if log is None else cause
        log, now = log or self.log, self.env.now
        work = Work(log.step, self.number, operation, resource, now, now, cause, now, round(nbytes))
        log.works.append(work)
        return work

    def began(self, operation: Operation, log: Log, when_s: float | None = None) -> None:
        """Notes that an operation has begun to do something."""
        log.began.append((self.env.now if when_s is None else when_s, next(self._counter), operation))

    def wait(self, *events: simpy.Event) -> Process[None]:
        """Waits for bytes, and notes for how long."""
        before = self.env.now
        self.cause = yield from until(self.env, self.cause, *events)
        self.log.waited_s += self.env.now - before

    def compute(self, operation: Operation | None, seconds: float, *, issued_s: float | None = None) -> Process[None]:
        """Work on this rank's own cores, now."""
        work = self.work(operation, "compute")
        if issued_s is not None:
            work.issued_s = issued_s
        if seconds > 0:
            yield self.host.compute(seconds * self.slow, work)
        work.ended_s = self.env.now
        self.cause = work

    def copy(self, operation: Operation, nbytes: float) -> Process[None]:
        """A copy within memory, now."""
        work = self.work(operation, "memory", nbytes)
        yield self.host.copy(nbytes, work)
        work.ended_s = self.env.now
        self.cause = work

    def overhead_s(self, operation: Operation) -> float:
        return self.durations.overhead.get(type(operation).__name__.lower(), 0.0)

    @property
    def peak_host_bytes(self) -> int:
        """The most that this rank had in host memory."""
        return self.memory.peak_host_bytes + (self.records.grown_bytes if self.records else 0)

    # the loop

    def run(self, schedule: Schedule, program: Iterable[Operation]) -> Process[None]:
        """One step."""
        log = Log(len(self.logs) + 1, begin_s=self.env.now)
        self.logs.append(log)
        if self.durations.between_steps:
            yield from self.compute(None, self.durations.between_steps)
        if self.records:
            self.records.begin(schedule)
        self._expect_experts()
        for operation in program:
            yield from self._run(operation)
        if self.facts.deferred:
            yield from self._agree()
        yield from self.wait(*self._arrivals.values())
        self._arrivals.clear()
        self.memory.leave_slabs()
        log.end_s, log.last = self.env.now, self.cause

    def _run(self, operation: Operation) -> Process[None]:
        issued_s = self.env.now
        match operation:
            case Forward(visit, block, micro_batch):
                yield from self.wait(*(self._arrivals[index] for index in self.residents), self._arrivals[block])
                yield from self._borrow_experts(block)
                self.began(operation, self.log)
                self.memory.forward(visit, micro_batch)
                seconds = self.durations.forward[visit] + self.overhead_s(operation)
                yield from self.compute(operation, seconds, issued_s=issued_s)
            case Turn():
                yield from self._make_room_for_sums()
                self.began(operation, self.log)
                yield from self.compute(operation, self.durations.turn + self.overhead_s(operation), issued_s=issued_s)
            case Backward(visit, block, micro_batch):
                yield from self._backward(operation, visit, block, micro_batch)
            case Spill(visit, micro_batch):
                yield from self._spill(operation, visit, micro_batch)
            case Restore(visit, micro_batch):
                yield from self._restore(operation, visit, micro_batch)
            case Fetch(block, _):
                yield from self._fetch(operation, block)
            case Evict(block, _):
                yield from self.wait(*([self._arrivals.pop(block)] if block in self._arrivals else []))
                self.began(operation, self.log)
                self.memory.evict(block)
                yield from self._issue(operation)
            case Reduce(block):
                yield from self._reduce(operation, block)
            case Update(block):
                yield from self._update(operation, block)
            case Load(block):
                yield from self._issue(operation)
                if self.records:
                    self.records.load(operation, block)
            case Write(block):
                yield from self._issue(operation)
                if self.records:
                    self.records.write(operation, block)
            case Commit():
                if not self.facts.deferred:
                    yield from self._agree()
                if self.records:
                    yield from self.records.commit(operation)
                yield from self._issue(operation)
            case _:
                assert_never(operation)

    def _issue(self, operation: Operation) -> Process[None]:
        """What the loop itself takes for an operation that does not compute."""
        seconds = self.overhead_s(operation)
        if seconds:
            yield from self.compute(operation, seconds)

    # blocks come

    def _fetch(self, operation: Fetch, block: int) -> Process[None]:
        self.memory.fetch(block)
        yield from self._issue(operation)
        local: simpy.Event | None = None
        if self.records:
            local = yield from self.records.serve(operation, block)
        if self.alone:
            assert local is not None
            self._arrivals[block] = self._expanded(operation, block, local)
            return
        number, self._meetings["down"] = self._meetings["down"], self._meetings["down"] + 1
        arrival = self.env.process(self._broadcast(operation, block, number, local, self.cause, self.log))
        self._arrivals[block] = self._expanded(operation, block, arrival) if self.share else arrival

    def _expanded(self, operation: Fetch, block: int, arrival: simpy.Event) -> simpy.Event:
        """When a block is in its slab: as it arrives, or once one thread has expanded what is sparse of it."""
        seconds = self.durations.expand[block] if self.durations.expand else 0.0
        if not seconds:
            return arrival
        return self.env.process(self._expand(operation, seconds, arrival, self.cause, self.log))

    def _expand(
        self, operation: Fetch, seconds: float, arrival: simpy.Event, cause: Work | None, log: Log
    ) -> Process[Work]:
        work = self.work(operation, "expand", log=log)
        work.cause = yield from until(self.env, cause, arrival)
        work.begun_s = self.env.now
        yield self.host.cores.run(seconds * self.slow, min(1.0, self.hardware.cores_per_rank), work)
        work.ended_s = self.env.now
        return work

    def _broadcast(
        self, operation: Fetch, block: int, number: int, local: simpy.Event | None, cause: Work | None, log: Log
    ) -> Process[Work]:
        work = self.work(operation, "down", self.facts.blocks[block].fetched_bytes, log=log)
        cause = yield from until(self.env, cause, *([] if local is None else [local]))
        yield from self.fabric.down(number, work.nbytes, cause, work)
        if self.records is None:
            self.began(operation, log, work.begun_s)
        return work

    # gradients go

    def _backward(self, operation: Backward, visit: int, block: int, micro_batch: int) -> Process[None]:
        issued_s = self.env.now
        yield from self.wait(self._arrivals[block])
        yield from self._make_room_for_sums()
        yield from self._restored(operation, visit, micro_batch)
        if self.alone and self.records and block in self._trained:
            yield from self.records.open_sum(block)
        self.began(operation, self.log)
        recomputed = visit not in self.allotment.keep and visit != len(self.facts.visits) - 1
        seconds = self.durations.backward[visit] + (self.durations.recompute[visit] if recomputed else 0.0)
        self.memory.backward(visit, micro_batch)
        yield from self.compute(operation, seconds + self.overhead_s(operation), issued_s=issued_s)
        self.memory.backward_ends(visit, micro_batch)

    def _reduce(self, operation: Reduce, block: int) -> Process[None]:
        yield from self._make_room_for_sums()
        self.began(operation, self.log)
        seconds = self.durations.reduce[block] if self.share else 0.0
        yield from self.compute(operation, seconds + self.overhead_s(operation))
        if self.records:
            yield from self.records.open_sum(block)
        if self.alone:
            assert self.records
            self.records.stage(operation, block)
            return
        number, self._meetings["up"] = self._meetings["up"], self._meetings["up"] + 1
        work = self.work(operation, "up", self.facts.blocks[block].gradient_bytes)
        self._reducing[block] = self.env.process(self.fabric.up(number, work.nbytes, self.cause, work))
        for earlier in list(self._reducing):
            if self._reducing[earlier].callbacks is not None:
                break
            yield from self._settle(earlier)

    def _make_room_for_sums(self) -> Process[None]:
        while len(self._reducing) >= self.hardware.sums_travelling:
            yield from self._settle(next(iter(self._reducing)))

    def _settle(self, block: int) -> Process[None]:
        """Takes in what a block's sum came to, once it is complete."""
        reducing = self._reducing.pop(block, None)
        if reducing is None:
            return
        yield from self.wait(reducing)
        if self.records:
            self.records.stage(Reduce(block), block)

    def _agree(self) -> Process[None]:
        """All ranks learn what the others found; sums that are still on their way come first."""
        for block in list(self._reducing):
            yield from self._settle(block)
        for experts in self.durations.experts:
            yield from self._hand(Reduce(experts.block), "up", experts.up_bytes)
        if not self.alone:
            number, self._meetings["agree"] = self._meetings["agree"], self._meetings["agree"] + 1
            self.cause = yield from self.fabric.agree(number, self.cause)
        yield from self._update_experts()

    # experts

    def _expect_experts(self) -> None:
        """Begins to read the experts that the step will reach."""
        for experts in self.durations.experts:
            reading: simpy.Event | None = None
            if self.records and experts.read_bytes:
                operation = Load(experts.block)
                reading = self.env.process(self.transfer(operation, experts.read_bytes, RECORDS, self.cause, self.log))
            self._experts.append((experts, reading))

    def _borrow_experts(self, block: int) -> Process[None]:
        """Before a block's first micro-batch its experts are here, and this rank has the values that others own."""
        needed = [each for each in self._experts if each[0].block == block]
        for experts, reading in needed:
            self._experts.remove((experts, reading))
            yield from self.wait(*([] if reading is None else [reading]))
            yield from self._hand(Fetch(block, 0), "down", experts.down_bytes)

    def _hand(self, operation: Operation, way: str, nbytes: int) -> Process[None]:
        """All ranks hand each other records of experts, and stand still meanwhile."""
        if not nbytes or not self.share or self.hardware.link is None:
            return
        work = self.work(operation, way, nbytes)
        yield self.env.timeout(nbytes / self.hardware.link.bytes_per_s + self.hardware.link.latency_s)
        work.ended_s, self.cause = self.env.now, work

    def _update_experts(self) -> Process[None]:
        """The norm is known: the experts that were reached are updated here and now, and written meanwhile."""
        self._experts.clear()
        for experts in self.durations.experts if self.records else ():
            assert self.records
            yield from self.compute(None, experts.update)
            if experts.written_bytes:
                operation = Write(experts.block)
                self.records.writes(
                    self.env.process(self.transfer(operation, experts.written_bytes, WRITES, self.cause, self.log))
                )

    def _update(self, operation: Update, block: int) -> Process[None]:
        issued_s = self.env.now
        if self.records and self.hardware.updates_beside:
            yield from self._issue(operation)
            self.records.update_beside(operation, block, self._reducing.pop(block, None))
            return
        yield from self._settle(block)
        if not self.records:
            yield from self._issue(operation)
            return
        yield from self.records.ready_for_update(block)
        self.began(operation, self.log)
        yield from self.compute(operation, self.records.update_s(block) + self.overhead_s(operation), issued_s=issued_s)
        self.records.updated(block)

    # activations go and come

    def _spill(self, operation: Spill, visit: int, micro_batch: int) -> Process[None]:
        self.began(operation, self.log)
        yield from self._issue(operation)
        nbytes, on_disk = self._boundary(visit), self.allotment.boundaries[visit] == "disk"
        if nbytes and (on_disk or not self.facts.host_is_device):
            yield from self.copy(operation, nbytes)
        if nbytes and on_disk:
            self._bounces = [event for event in self._bounces if event.callbacks is not None]
            while len(self._bounces) > BOUNCES:  # the disk sets the pace, not the memory
                yield from self.wait(self._bounces.pop(0))
            writing = self.env.process(self.transfer(operation, nbytes, WRITES, self.cause, self.log))
            self._bounces.append(writing)
            self._spills[visit, micro_batch] = writing
        self.memory.spill(visit, micro_batch)

    def _boundary(self, visit: int) -> int:
        return self.facts.boundary_bytes[visit] if self.facts.boundary_bytes else 0

    def _restore(self, operation: Restore, visit: int, micro_batch: int) -> Process[None]:
        yield from self._issue(operation)
        writing = self._spills.pop((visit, micro_batch), None)
        reading: simpy.Event | None = None
        if writing is not None:
            yield from self.wait(writing)
            reading = self.env.process(self.transfer(operation, self._boundary(visit), URGENT, self.cause, self.log))
        self.began(operation, self.log)
        self._restores[visit, micro_batch] = reading
        self.memory.restore(visit, micro_batch)

    def _restored(self, operation: Backward, visit: int, micro_batch: int) -> Process[None]:
        """Waits for a visit's inputs and fills their place in device memory."""
        if (visit, micro_batch) not in self._restores:
            return
        reading = self._restores.pop((visit, micro_batch))
        if reading is not None:
            yield from self.wait(reading)
        nbytes = self._boundary(visit)
        if nbytes and (reading is not None or not self.facts.host_is_device):
            yield from self.copy(operation, nbytes)

    def transfer(
        self, operation: Operation, nbytes: float, lane: int, cause: Work | None, log: Log
    ) -> Process[Work | None]:
        """Moves bytes to or from the disk; where there is none, memory takes its place."""
        on_disk = self.host.disk is not None
        work = self.work(
            operation, ("write" if lane == WRITES else "read") if on_disk else "memory", nbytes, log=log, cause=cause
        )
        if not on_disk:
            yield self.host.copy(nbytes, work)
            work.ended_s = self.env.now
            return work
        if lane == WRITES:
            log.written_bytes += nbytes
        else:
            log.read_bytes += nbytes
        yield from self.host.transfer(nbytes, lane, work)
        return work
