"""Whether what an executor did was legal: one checker for what the simulator predicts and for what the runtime has done.

`check_order` has each rank's operations, in the order in which they began, pass the checker that every plan passes.
`check_times` holds begins and ends against each other: what one operation makes, another takes no earlier than it is
whole, and no slab and no buffer is used twice at a time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf

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
from weightstream.schedule.verify import verify

OF_ONE_MICRO_BATCH = (Forward, Backward, Turn, Spill, Restore)
COMPUTING = (Forward, Backward, Turn, Update, Reduce)
ROUNDING_S = 1e-9
"""Times are kept as seconds since a step began."""

Key = tuple[int, int]
"""A step, and the place of an operation in its schedule: a block may be fetched into the same slab twice."""
Times = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Act:
    """The part of an operation that kept a resource busy, from when it began to work, on a clock that all ranks share.

    Of operations that move bytes `compute` is the time in which they were issued.
    """

    rank: int
    step: int
    place: int
    operation: Operation
    resource: str
    begin_s: float
    end_s: float


class IllegalTimesError(AssertionError):
    """Something was used before it was there, or by two at once."""


@dataclass(slots=True)
class _Done:
    """One operation of one rank: when its work was done, or it was issued, and what was moved for it, by resource."""

    work: Times | None = None
    moved: dict[str, Times] = field(default_factory=dict)

    @property
    def moving(self) -> Times | None:
        return _hull(self.moved.values())

    def on(self, *resources: str) -> Times | None:
        return _hull(times for resource, times in self.moved.items() if resource in resources)


def _hull(times: Iterable[Times]) -> Times | None:
    found = list(times)
    return (min(begin for begin, _ in found), max(end for _, end in found)) if found else None


def done_by_rank(acts: Iterable[Act]) -> dict[int, dict[Key, _Done]]:
    found: dict[int, dict[Key, _Done]] = defaultdict(lambda: defaultdict(_Done))
    for act in acts:
        done, times = found[act.rank][act.step, act.place], (act.begin_s, act.end_s)
        if act.resource == "optimizer":
            done.work = times  # the processor's own time; what issued it does not count
        elif act.resource != "compute":
            done.moved[act.resource] = _hull([times, done.moved.get(act.resource, times)]) or times
        elif done.work is None:
            done.work = times
    return found


# order


def as_alone(order: Sequence[Operation], schedule: Schedule) -> Schedule:
    """What one rank did as a schedule of its own: its micro-batches are numbered from 0."""
    own = sorted({op.micro_batch for op in order if isinstance(op, OF_ONE_MICRO_BATCH)})
    numbers = {micro_batch: position for position, micro_batch in enumerate(own)}

    def renumbered(operation: Operation) -> Operation:
        if isinstance(operation, OF_ONE_MICRO_BATCH):
            return replace(operation, micro_batch=numbers[operation.micro_batch])
        return operation

    return replace(schedule, operations=tuple(map(renumbered, order)), micro_batches=len(own))


def check_order(
    order: Sequence[Operation], schedule: Schedule, facts: Facts, allotment: Allotment, *, buffers: int | None = None
) -> None:
    """What began on one rank that computes, in order of beginning, is a legal schedule, of all that it had to do.

    Args:
        buffers: for records, where the order has what several ranks did with buffers of their own.
    """
    own = as_alone(order, schedule)
    verify(replace(own, record_buffers=buffers or own.record_buffers), facts, allotment)
    mine = {op.micro_batch for op in order if isinstance(op, OF_ONE_MICRO_BATCH)}
    planned = [op for op in schedule.operations if not isinstance(op, OF_ONE_MICRO_BATCH) or op.micro_batch in mine]
    assert sorted(map(repr, order)) == sorted(map(repr, planned)), "nothing is missing, and nothing done twice"


def order_of(
    acts: Iterable[Act], schedule: Schedule, step: int, rank: int, scratch: Collection[int] = ()
) -> list[Operation]:
    """The operations of one rank that computes, in the order in which they began; what it owns nothing of as whoever does.

    What moves bytes begins with the first of them, or is over when it is issued.

    Args:
        scratch: blocks whose gradient comes back from there for `Load`, maybe before there is a buffer for their record: of
            these it is only known when all was there.
    """
    done = done_by_rank(acts)
    began: list[tuple[float, int, Operation]] = []
    for place, operation in enumerate(schedule.operations):
        own = done[rank].get((step, place))
        if own is None:
            assert isinstance(operation, OF_ONE_MICRO_BATCH), f"{describe(operation)} was not done"
            continue  # another rank's
        owning = [
            done[one][step, place]
            for one in sorted(done, key=lambda one: (one != rank, one))
            if _owns(done[one], schedule, step, place)
        ]
        assert own.work is not None
        at = _began(owning[0] if owning else own, operation, whole=getattr(operation, "block", None) in scratch)
        if isinstance(operation, Fetch):  # not before there is a slab here
            at = max(at, own.work[0])
        if isinstance(operation, Commit):  # a step is committed when all have it; where none is due yet, nothing is
            at = max((_began(each, operation, whole=False) for each in owning), default=inf)
        began.append((at, place, operation))
    return [operation for _, _, operation in sorted(began, key=lambda each: each[:2])]


def through_scratch(facts: Facts, allotment: Allotment) -> frozenset[int]:
    """The blocks whose gradient waits there for its update."""
    if not facts.deferred:
        return frozenset()
    return frozenset(block.index for block in facts.blocks) - allotment.staged_in_ram


def _owns(done: Mapping[Key, _Done], schedule: Schedule, step: int, place: int) -> bool:
    """Whether a rank moved something for an operation that is of records, or writes the block that it is of."""
    operation = schedule.operations[place]
    if not isinstance(operation, Load | Update | Write | Commit | Fetch) or (step, place) not in done:
        return False
    moved = done[step, place].on("read", "write", "memory", "manifest") is not None
    if not isinstance(operation, Update | Fetch) or moved:
        return moved
    write = Write(operation.block)
    written = done.get((step, schedule.operations.index(write))) if write in schedule.operations else None
    return written is not None and bool(written.moved)


def _began(one: _Done, operation: Operation, *, whole: bool) -> float:
    moving = one.moving if not isinstance(operation, Fetch) else one.on("read", "memory")
    if isinstance(operation, (*COMPUTING, Evict, Spill)) or moving is None:
        assert one.work is not None
        return one.work[0]
    return moving[whole and isinstance(operation, Load)]


# times


def check_times(
    acts: Sequence[Act],
    schedules: Mapping[int, Schedule],
    facts: Facts,
    allotment: Allotment,
    cut: frozenset[int] = frozenset(),
) -> int:
    """Of consecutive steps, on every rank and between ranks.

    Args:
        cut: blocks whose records are in several units, each of which is read as soon as it is written.

    Returns:
        How many pairs of times were compared.
    """
    done = done_by_rank(act for act in acts if act.step in schedules)
    scratch = through_scratch(facts, allotment)
    checks = [_Rank(rank, own, schedules, facts, allotment, scratch, cut) for rank, own in done.items()]
    compared = sum(check.run() for check in checks)
    for step, schedule in schedules.items():
        for operation in schedule.operations:
            if isinstance(operation, Update):
                compared += _check_between(done, step, operation, schedules, facts)
    _check_one_at_a_time(acts)
    return compared


def _check_one_at_a_time(acts: Sequence[Act]) -> None:
    """A rank computes one thing at a time."""
    by_rank: dict[int, list[Act]] = defaultdict(list)
    for act in acts:
        if act.resource == "compute":
            by_rank[act.rank].append(act)
    for own in by_rank.values():
        for one, other in pairwise(sorted(own, key=lambda act: (act.begin_s, act.end_s))):
            _need(one.end_s, other.begin_s, f"{describe(other.operation)} after {describe(one.operation)}")


def _check_between(
    done: Mapping[int, Mapping[Key, _Done]], step: int, update: Update, schedules: Mapping[int, Schedule], facts: Facts
) -> int:
    """An update comes after the last gradient of any rank, and before any rank has what it makes."""
    block, compared, operations = update.block, 0, schedules[step].operations
    of = step - 1 if facts.deferred else step
    for rank, own in done.items():
        written, updated = (own.get((step, operations.index(each))) for each in (Write(block), update))
        if written is None or not written.moved or updated is None or updated.work is None:
            continue  # it owns nothing of the block
        for other, each in done.items():
            for (at, place), found in each.items():
                operation = schedules[at].operations[place]
                if found.work is None or getattr(operation, "block", None) != block:
                    continue
                what = f"rank {rank}: Update({block}) of step {step}, rank {other}: {describe(operation)} of step {at}"
                if at == of and isinstance(operation, Backward):
                    compared += _need(found.work[1], updated.work[0], what)
                if at == of + 1 and isinstance(operation, Forward):
                    compared += _need(updated.work[1], found.work[0], what)
    return compared


def _need(earlier_s: float, later_s: float, what: str) -> int:
    if earlier_s > later_s + ROUNDING_S:
        raise IllegalTimesError(f"{what}: by {earlier_s - later_s:.9f} s too early")
    return 1


@dataclass(slots=True)
class _Rank:
    """One rank through the steps: what is in its slabs and buffers, and since when."""

    number: int
    done: Mapping[Key, _Done]
    schedules: Mapping[int, Schedule]
    facts: Facts
    allotment: Allotment
    scratch: frozenset[int]
    cut: frozenset[int]
    compared: int = 0
    fetched: dict[int, Key] = field(default_factory=dict)  # by block
    in_slab: dict[int, Key] = field(default_factory=dict)  # the last fetch into each slab
    used: dict[int, float] = field(default_factory=dict)  # until when each slab was computed with
    latest: dict[tuple[type[Operation], int], Key] = field(default_factory=dict)
    written: list[Key] = field(default_factory=list)  # since the last commit
    buffers: list[tuple[float, float, int]] = field(default_factory=list)

    def run(self) -> int:
        for step, schedule in sorted(self.schedules.items()):
            for place, operation in enumerate(schedule.operations):
                if (step, place) in self.done:
                    self.see(step, place, operation)
            self.fetched.clear()  # a step ends with its slabs empty
        self.check_buffers()
        return self.compared

    def after(self, key: Key, begin_s: float | None, before: Key | None, ends: Times | None) -> None:
        """What `key` begins at a time must not be before what `before` did was over; where one of them did nothing, nothing."""
        if begin_s is not None and before is not None and ends is not None:
            what = f"rank {self.number}: {self.named(key)} needs {self.named(before)}"
            self.compared += _need(ends[1], begin_s, what)

    def operation(self, key: Key) -> Operation:
        return self.schedules[key[0]].operations[key[1]]

    def named(self, key: Key) -> str:
        return f"{describe(self.operation(key))} of step {key[0]}"

    def key(self, step: int, operation: Operation) -> Key | None:
        """Of an operation that is done once in a step, if it is done."""
        operations = self.schedules[step].operations
        return (step, operations.index(operation)) if operation in operations else None

    def see(self, step: int, place: int, operation: Operation) -> None:
        key, own = (step, place), self.done[step, place]
        works = own.work and own.work[0]
        moves = own.moving and own.moving[0]
        match operation:
            case Fetch(block, slab):
                self.fetch(key, own, block, slab)
            case Forward(visit, block, micro_batch) | Backward(visit, block, micro_batch):
                self.compute(key, own, block)
                if isinstance(operation, Backward):
                    restore = self.key(step, Restore(visit, micro_batch))
                    self.after(key, works, restore, self.moved(restore))
            case Spill(visit, micro_batch):
                forward = self.key(step, Forward(visit, self.facts.visits[visit].block, micro_batch))
                self.after(key, moves, forward, self.work(forward))
            case Restore(visit, micro_batch):
                spill = self.key(step, Spill(visit, micro_batch))
                self.after(key, moves, spill, self.moved(spill))
            case Load(block):
                if block not in self.scratch:  # else it is not told apart from the gradient's
                    self.from_newest(key, own, block)
            case Update(block):
                self.update(key, own, block)
            case Write(block):
                update = self.key(step, Update(block))
                self.after(key, moves, update, self.work(update))
                if own.moved:
                    self.hold_buffer(own, step, block)
                    self.written.append(key)
            case Commit():
                if own.on("manifest") is not None:
                    for written in self.written:
                        self.after(key, moves, written, self.moved(written))
                    self.written.clear()
            case Reduce() | Turn() | Evict():
                pass  # their order is all that there is of them
        if (block := getattr(operation, "block", None)) is not None:
            self.latest[type(operation), block] = key

    def work(self, key: Key | None) -> Times | None:
        return self.done[key].work if key in self.done else None

    def moved(self, key: Key | None, *resources: str) -> Times | None:
        if key not in self.done:
            return None
        return self.done[key].on(*resources) if resources else self.done[key].moving

    # weights

    def fetch(self, key: Key, own: _Done, block: int, slab: int) -> None:
        """Into a slab that nobody computes with any more, and to which nothing is on its way; of the newest version."""
        begin_s = own.moving and own.moving[0]
        if begin_s is not None and slab in self.used:
            what = f"rank {self.number}: {self.named(key)} needs slab {slab}"
            self.compared += _need(self.used[slab], begin_s, what)
        before = self.in_slab.get(slab)
        self.after(key, begin_s, before, self.moved(before))
        self.in_slab[slab], self.fetched[block] = key, key
        update = self.latest.get((Update, block))
        if update is not None and update[0] == key[0] and self.owns(key[0], block):
            self.after(key, begin_s, update, self.work(update))
        else:
            self.from_newest(key, own, block)

    def owns(self, step: int, block: int) -> bool:
        return self.moved(self.key(step, Write(block))) is not None

    def from_newest(self, key: Key, own: _Done, block: int) -> None:
        """What is read was written before, where it is read; of a block in several units that holds unit by unit."""
        written = self.latest.get((Write, block))
        if block in self.cut:
            return
        for resource, source in (("read", "write"), ("memory", "memory")):
            found = own.on(resource)
            if found is not None:
                self.after(key, found[0], written, self.moved(written, source))

    def compute(self, key: Key, own: _Done, block: int) -> None:
        assert own.work is not None
        residents = [each.index for each in self.facts.blocks if each.resident]
        for index in {block, *residents}:
            fetch = self.fetched[index]
            # what a rank receives is here before all is gone that it passes on
            self.after(key, own.work[0], fetch, self.moved(fetch, "read", "memory", "expand"))
            fetched = self.operation(fetch)
            assert isinstance(fetched, Fetch)
            self.used[fetched.slab] = own.work[1]

    # records

    def update(self, key: Key, own: _Done, block: int) -> None:
        step, begin_s = key[0], own.work and own.work[0]
        if not self.owns(step, block):
            return
        loaded, reduced = self.latest.get((Load, block)), self.latest.get((Reduce, block))
        self.after(key, begin_s, loaded, self.moved(loaded))
        self.after(key, begin_s, reduced, self.moved(reduced))
        self.after(key, begin_s, reduced, self.work(reduced))
        self.after(key, begin_s, key, own.moving)  # a gradient that was brought back only now

    def hold_buffer(self, own: _Done, step: int, block: int) -> None:
        """From the first byte of a record until it is written."""
        loaded, updated, ends = (
            self.moved(self.latest.get((Load, block))),
            self.work(self.key(step, Update(block))),
            own.moving,
        )
        begins = updated if block in self.scratch else loaded
        if begins is not None and ends is not None:
            self.buffers.append((begins[0], ends[1] - ROUNDING_S, block))

    def check_buffers(self) -> None:
        by_block: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
        for held in sorted(self.buffers):
            by_block[held[2]].append(held)
        for block, own in by_block.items():
            for one, other in pairwise(own):
                self.compared += _need(one[1], other[0], f"rank {self.number}: the buffer of record {block}")
        edges = [
            (at, change, block)
            for begin, end, block in self.buffers
            if not self.facts.blocks[block].resident
            for at, change in ((begin, 1), (max(begin, end), -1))
        ]
        held = 0
        for _, change, block in sorted(edges, key=lambda edge: edge[:2]):
            held += change
            if held > self.allotment.record_buffers:
                raise IllegalTimesError(
                    f"rank {self.number}: record {block} is in memory beside {held - 1} others, there are "
                    f"{self.allotment.record_buffers} buffers"
                )
