"""What a runtime does and when, noted while it trains at next to no cost.

Whoever moves bytes or computes appends a tuple, from any thread, without a lock (`Log.note`); nothing else is done while a
step runs. Tuples become spans only where somebody asks for them. Only the last step is kept, and the one before it.
"""

import time
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from weightstream.schedule.operations import Commit, Operation, describe
from weightstream.trace.spans import Span, Totals, totals

WARM_UP_STEPS = 2
"""Steps of a process that totals leave out: the first ones measure, allocate and generate."""
SHARE = 0.002
"""At most this part of the time goes into totals; where it would be more, some steps are left out of them."""

Key = tuple[str, Hashable]
"""A kind of operation, and the block (or visit and micro-batch) that it is for."""


class Log:
    """Notes of any thread, until they are taken."""

    __slots__ = ("_notes", "on")

    def __init__(self, *, on: bool = True) -> None:
        self.on = on
        self._notes: deque[tuple[Any, ...]] = deque()

    def note(self, kind: str, what: Hashable, resource: str, began_s: float, ended_s: float, nbytes: int) -> None:
        """Bytes were moved, from one time of `time.perf_counter` to another.

        Args:
            kind: in the words of whoever moves them.
            what: for which unit, block or key.
        """
        if self.on:
            self._notes.append((kind, what, resource, began_s, ended_s, nbytes))

    def take(self) -> list[tuple[Any, ...]]:
        """All notes so far; each is taken once."""
        return [self._notes.popleft() for _ in range(len(self._notes))]


NO_LOG = Log(on=False)
_OPERATIONS = {"copy": "fetch", "states": "load", "segment": "write"}
"""The operation of the schedule that moves bytes of each kind."""


@dataclass(slots=True)
class _Step:
    """One step as it was noted; `ran` are the operations of the scheduler's thread."""

    number: int
    began_s: float
    ran: list[tuple[Operation, float, float, float]] = field(default_factory=list)
    moved: list[tuple[Any, ...]] = field(default_factory=list)
    ended_s: float = 0.0


@dataclass(slots=True)
class _Move:
    """What one operation moved on one resource."""

    began_s: float
    ended_s: float
    nbytes: int


class Recorder:
    """The last step of one rank, and what all steps came to.

    Args:
        block_of: the block of each unit of the store.
    """

    def __init__(self, rank: int = 0, block_of: Sequence[int] = ()) -> None:
        self.rank, self.log = rank, Log()
        self._block_of = block_of
        self._steps: deque[_Step] = deque(maxlen=2)  # what was issued in the one before may end in the last
        self._now = _Step(0, 0.0)
        self._first_s = time.perf_counter()
        self._spent_s = 0.0
        self._ended = 0
        self.steps = 0
        """How many steps the totals are of."""
        self.totals: Totals = {}
        self._step_s = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of one of these steps, on average."""
        return self._step_s / self.steps if self.steps else 0.0

    # while a step runs

    def begin(self, step: int) -> None:
        """A step begins; what is noted between steps belongs to the next one."""
        self._now.number, self._now.began_s = step, time.perf_counter()

    def ran(self, operation: Operation, began_s: float, ended_s: float, waited_s: float) -> None:
        """The scheduler's thread carried out an operation, or issued it."""
        self._now.ran.append((operation, began_s, ended_s, waited_s))

    def end(self) -> tuple[int, int]:
        """A step ends.

        Returns:
            Bytes that were read from disk, and written to it, since the step before ended.
        """
        began_s, step = time.perf_counter(), self._now
        step.moved, step.ended_s = self.log.take(), began_s
        self._steps.append(step)
        self._now = _Step(step.number, began_s)
        self._ended += 1
        if self._ended > WARM_UP_STEPS and self._spent_s <= SHARE * (began_s - self._first_s):
            self.steps += 1
            self._step_s += step.ended_s - step.began_s
            for key, total in totals(self.spans()).items():
                if key in self.totals:
                    self.totals[key].add(total)
                else:
                    self.totals[key] = total
            self._spent_s += time.perf_counter() - began_s
        read = sum(note[5] for note in step.moved if note[2] == "read")
        return read, sum(note[5] for note in step.moved if note[2] == "write")

    def moved(self, kind: str) -> int:
        """Bytes of one kind that the last step read from disk and wrote to it."""
        found = self._steps[-1].moved if self._steps else ()
        return sum(note[5] for note in found if note[0] == kind and note[2] in ("read", "write"))

    def forget(self) -> None:
        """What was noted since the last step ended belongs to none."""
        self.log.take()
        self._now = _Step(self._now.number, time.perf_counter())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is noted meanwhile, and nothing that was since the last step belongs to the next one."""
        self.log.on = False
        try:
            yield
        finally:
            self.forget()
            self.log.on = True

    # afterwards

    def spans(self) -> list[Span]:
        """The last step: first what the scheduler's thread did, in order, then what was moved meanwhile."""
        if not self._steps:
            return []
        return [*self._own_spans(self._steps[-1]), *self._moved_spans(self._steps[-1])]

    def _own_spans(self, step: _Step) -> Iterator[Span]:
        """What lies before the first operation and behind the last one is `between` them: what the model does outside of its
        blocks, and what ranks tell each other."""
        origin = step.began_s
        first = next((ran[1] for ran in step.ran if ran[1] >= origin), step.ended_s)
        last = max((ran[2] for ran in step.ran), default=first)
        for begin_s, end_s in ((origin, first), (max(first, last), step.ended_s)):
            yield Span(step.number, self.rank, "between", "compute", "between steps", begin_s - origin, end_s - origin)
        for operation, began_s, ended_s, waited_s in step.ran:
            kind = type(operation).__name__.lower()
            yield Span(
                step.number, self.rank, kind, "compute", describe(operation),
                began_s - origin, ended_s - origin, 0, waited_s,
            )  # fmt: skip

    def _moved_spans(self, step: _Step) -> Iterator[Span]:
        """One span per operation, resource and kind of bytes (a record's, its gradient's), from its issue on; what an earlier
        step issued and began is no wait."""
        issued = self._issued()
        found: dict[tuple[Key, float, str, str], _Move] = {}
        names: dict[tuple[Key, float], str] = {}
        for note in step.moved:
            kind, _, resource, began_s, ended_s, nbytes = note
            key = self._key(note)
            issue_s, name = _latest(issued.get(key, ()), began_s)
            names[key, issue_s] = name or f"{key[0]} {key[1]}".strip()
            move = found.get((key, issue_s, resource, kind))
            if move is None:
                found[key, issue_s, resource, kind] = _Move(began_s, ended_s, nbytes)
            else:
                move.began_s, move.ended_s = min(move.began_s, began_s), max(move.ended_s, ended_s)
                move.nbytes += nbytes
        for (key, issue_s, resource, _), move in sorted(found.items(), key=lambda item: item[1].began_s):
            earlier = issue_s < self._since(step)
            begin_s = move.began_s if earlier else issue_s
            yield Span(
                step.number, self.rank, key[0], resource, names[key, issue_s],
                begin_s - step.began_s, move.ended_s - step.began_s, move.nbytes, move.began_s - begin_s,
            )  # fmt: skip

    def _since(self, step: _Step) -> float:
        """When the first operation of a step was noted."""
        return min(step.began_s, step.ran[0][1]) if step.ran else step.began_s

    def _issued(self) -> dict[Key, list[tuple[float, str]]]:
        """When the operations of the kept steps were issued."""
        found: dict[Key, list[tuple[float, str]]] = defaultdict(list)
        for step in self._steps:
            for operation, began_s, *_ in step.ran:
                kind = type(operation).__name__.lower()
                found[kind, _subject(operation)].append((began_s, describe(operation)))
        return found

    def _key(self, note: tuple[Any, ...]) -> Key:
        """Whose bytes they are, in the words of the schedule."""
        kind, what, resource = note[:3]
        match kind, what:
            case (("copy" | "states" | "segment"), (None | int())):
                if what is None or what >= len(self._block_of):  # records of families, of no block
                    return _OPERATIONS[kind], ""
                return _OPERATIONS[kind], self._block_of[what]
            case "scratch", ("gradient", block):
                return ("reduce" if resource == "write" else "load"), block
            case "scratch", ("activation", place, _):
                return ("spill" if resource == "write" else "restore"), place
            case "commit", _:
                return "commit", _subject(Commit())
            case _:
                return kind, "" if what is None else what


def _subject(operation: Operation) -> Hashable:
    block = getattr(operation, "block", None)
    if block is not None:
        return int(block)
    return getattr(operation, "visit", ""), getattr(operation, "micro_batch", "")


def _latest(issued: Sequence[tuple[float, str]], began_s: float) -> tuple[float, str]:
    """The last issue before a time; that time itself if there was none."""
    for issue_s, name in reversed(issued):
        if issue_s <= began_s:
            return issue_s, name
    return began_s, ""
