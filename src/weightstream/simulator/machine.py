"""The machine on its virtual clock: hosts with cores, memory and a disk, and what connects their ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import simpy

from weightstream.schedule.operations import Operation
from weightstream.simulator.hardware import Disk, Hardware
from weightstream.simulator.resources import Lanes, Process, Rates, Shared

URGENT, RECORDS, WRITES = 0, 1, 2
"""Lanes of a disk: streamed copies, staged gradients and activations do not queue behind records that are read ahead."""


@dataclass(slots=True, eq=False)
class Work:
    """An operation, or the part of one that keeps one resource busy; and whose end let it begin."""

    step: int
    rank: int
    operation: Operation | None
    resource: str
    issued_s: float
    begun_s: float
    cause: "Work | None"
    ended_s: float = 0.0
    nbytes: int = 0


def until(env: simpy.Environment, cause: Work | None, *events: simpy.Event) -> Process[Work | None]:
    """Waits for events; gives the work whose end was waited for last, or the cause if all were over already."""
    for event in events:
        before = env.now
        if event.callbacks is None:
            continue
        work = yield event
        if env.now > before and work is not None:
            cause = work
    return cause


def disk_rates(disk: Disk) -> Rates:
    """How fast each lane goes: a direction alone at its full rate, both together at a part of it."""
    both = min(1.0, disk.together / 2)

    def rates(busy: Sequence[bool]) -> Sequence[float]:
        reads = (1.0 if not busy[WRITES] else both) if busy[URGENT] or busy[RECORDS] else 0.0
        urgent = disk.urgent_share if busy[RECORDS] else 1.0
        writes = both if reads else 1.0
        return reads * urgent, reads * (1.0 - disk.urgent_share if busy[URGENT] else 1.0), writes

    return rates


class Host:
    """What the ranks of one host share."""

    def __init__(self, env: simpy.Environment, hardware: Hardware) -> None:
        self.env, self.hardware = env, hardware
        self.cores = Shared(env, hardware.cores_per_host)
        self.memory = Shared(env)
        self.disk = Lanes(env, disk_rates(hardware.disk), lanes=3) if hardware.disk else None

    def compute(self, seconds: float, work: Work) -> simpy.Event:
        """A rank's own work on its cores."""
        return self.cores.run(seconds, self.hardware.cores_per_rank, work)

    def copy(self, nbytes: float, work: Work) -> simpy.Event:
        """A copy within memory."""
        return self.memory.run(nbytes / self.hardware.memory_bytes_per_s, value=work)

    def transfer(self, nbytes: float, lane: int, work: Work) -> Process[Work]:
        """Moves bytes to or from the disk; the cores that this takes compete with what computes."""
        disk, hardware = self.hardware.disk, self.hardware
        assert disk is not None
        assert self.disk is not None
        seconds = nbytes / (disk.write_bytes_per_s if lane == WRITES else disk.read_bytes_per_s)
        checked: list[simpy.Event] = []

        def begun(before: object) -> None:
            work.begun_s = self.env.now
            if isinstance(before, Work):
                work.cause = before
            compute_s = nbytes * hardware.io_compute_s_per_byte
            if compute_s > 0:
                # spread over the transfer: as many cores as keep up with it
                demand = hardware.cores_per_rank * compute_s / seconds
                checked.append(self.cores.run(seconds, demand, work))

        yield self.disk.run(seconds, lane, work, begun)
        yield from until(self.env, None, *checked)
        if disk.latency_s:
            yield self.env.timeout(disk.latency_s)
        work.ended_s = self.env.now
        return work


@dataclass(slots=True)
class Meeting:
    """Something that all ranks do together, once all have come to it."""

    missing: int
    all_here: simpy.Event
    done: simpy.Event
    nbytes: int = 0
    rank: int = 0


@dataclass(slots=True)
class _Way:
    """Meetings of one kind, in order: nothing passes what was begun before it."""

    queue: Lanes
    resource: str
    meetings: dict[int, Meeting] = field(default_factory=dict)
    gone: dict[int, simpy.Event] = field(default_factory=dict)
    arrived_s: float = 0.0

    def turn(self, env: simpy.Environment, number: int) -> simpy.Event:
        """Triggered when a meeting has begun to move its bytes; ranks may come to a later one first."""
        return self.gone.setdefault(number, env.event())


class Fabric:
    """What connects ranks: blocks down, sums up, and agreements.

    Every rank takes part in everything, in one order. The link that is busiest sets the pace: of a block, that of a
    rank which receives all of it; of a sum, that of a rank which gives its part of all of it.

    Args:
        present: how many of the ranks are simulated; the others do the same at the same time.
        images: the most partial sums that one rank sends of a block.
    """

    def __init__(self, env: simpy.Environment, hardware: Hardware, present: int, images: int) -> None:
        self.env, self.link, self.cluster = env, hardware.link, hardware.cluster
        self.present, self.images = present, images
        self._down = _Way(Lanes(env), "down")
        self._up = _Way(Lanes(env), "up")
        self._agreed: dict[int, Meeting] = {}

    def used_s(self) -> dict[str, float]:
        """Seconds of full use of the busiest link, by direction."""
        return {way.resource: way.queue.used_s()[0] for way in (self._down, self._up)}

    def down(self, number: int, nbytes: int, cause: Work | None, work: Work) -> Process[Work]:
        """A rank is ready for a block: it has a slab, and what it owns of the block is in it."""
        return self._join(self._down, number, nbytes, 1, cause, work)

    def up(self, number: int, nbytes: int, cause: Work | None, work: Work) -> Process[Work]:
        """A rank has closed its part of a sum."""
        return self._join(self._up, number, nbytes, self.images, cause, work)

    def agree(self, number: int, cause: Work | None) -> Process[Work | None]:
        """Waits for all ranks."""
        meeting = self._agreed.get(number)
        if meeting is None:
            meeting = self._agreed[number] = Meeting(self.present, self.env.event(), self.env.event())
        self._arrive(meeting, cause)
        found = yield from until(self.env, cause, meeting.all_here)
        if self.link is not None and self.link.latency_s:
            yield self.env.timeout(2 * self.link.latency_s)
        return found

    def _arrive(self, meeting: Meeting, cause: Work | None) -> None:
        meeting.missing -= 1
        if not meeting.missing:
            meeting.all_here.succeed(cause)

    def _join(self, way: _Way, number: int, nbytes: int, images: int, cause: Work | None, work: Work) -> Process[Work]:
        meeting = way.meetings.get(number)
        if meeting is None:
            meeting = Meeting(self.present, self.env.event(), self.env.event(), nbytes, work.rank)
            way.meetings[number] = meeting
            self.env.process(self._carry(way, number, meeting, images, work))
        self._arrive(meeting, cause)
        shared: Work = yield meeting.done
        work.begun_s, work.cause, work.ended_s = shared.begun_s, shared.cause, self.env.now
        return work

    def _carry(self, way: _Way, number: int, meeting: Meeting, images: int, first: Work) -> Process[None]:
        if number and (before := way.turn(self.env, number - 1)).callbacks is not None:
            yield before
        way.gone.pop(number - 1, None)
        cause: Work | None
        event = meeting.all_here
        cause = event.value if event.callbacks is None else (yield event)
        work = Work(first.step, first.rank, first.operation, way.resource, first.issued_s, self.env.now, cause)
        work.nbytes = meeting.nbytes

        def begun(earlier: object) -> None:
            work.begun_s = self.env.now
            if isinstance(earlier, Work):
                work.cause = earlier

        moved = way.queue.run(self._seconds(meeting.nbytes, images), 0, work, begun)
        way.turn(self.env, number).succeed()
        yield moved
        # the first ones have all of it by now, the last ones soon, and none overtakes what went before
        way.arrived_s = max(way.arrived_s, self.env.now + self._fill_s(meeting.nbytes))
        if way.arrived_s > self.env.now:
            yield self.env.timeout(way.arrived_s - self.env.now)
        work.ended_s = self.env.now
        del way.meetings[number]
        meeting.done.succeed(work)

    def _seconds(self, nbytes: int, images: int) -> float:
        assert self.link is not None
        # a rank that owns a part of it neither gets nor gives that part
        foreign = 1.0 if self.cluster.memory != "colocated" else 1.0 - 1.0 / self.cluster.workers
        return nbytes * foreign * images / self.link.bytes_per_s

    def _fill_s(self, nbytes: int) -> float:
        assert self.link is not None
        receivers = self.cluster.workers - (1 if self.cluster.memory == "colocated" else 0)
        return self.link.fill_s(receivers, nbytes)
