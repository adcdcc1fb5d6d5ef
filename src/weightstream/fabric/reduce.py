"""Gradients on their way up: partial sums of ranks meet in the contract's tree, and the whole sum at its owner.

One thread carries out one rank's part, block by block in order of issue, unit by unit. A small head goes ahead of each
sum: which pieces of it there are at all, since a parameter without a gradient has none, never zeros. Sums are added
chunk by chunk in the memory of one of the two, so that a rank needs no more than a few chunks besides its own sums.

A parameter that several visits use is summed use by use, each through the whole tree (a *layer* for each use), and over
uses at the owner.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil, log2

import torch
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import UNITS, all_left, tag
from weightstream.fabric.heads import Head, head_bytes
from weightstream.fabric.links import Channel, Handle
from weightstream.fabric.trees import Hand, Join, Merge, Node, Step, Take, reduce_plan
from weightstream.store.futures import new_future
from weightstream.trace.recorder import NO_LOG, Log

CHUNK = 1 << 19  # elements
AHEAD_ELEMENTS = 2 * CHUNK  # of a sibling's sum, that are under way at once
BEGUN = UNITS // 2  # units that are begun together; fewer than tags tell apart
POSTED = 64  # receives that are posted before their bytes come
_HEAD_LAYER, _HEAD_CHUNK = 7, (1 << 14) - 1


def chunks_ahead(cluster: Cluster) -> int:
    """Chunks of sums under way, or just being added, at most: of as many siblings as the tree is high."""
    return ceil(log2(max(cluster.workers, 2)) + 1) * max(2, AHEAD_ELEMENTS // CHUNK)


Range = tuple[int, int]
Sums = dict[tuple[int, Node], Tensor]
"""Layer and node → flat fp32 sum over a block's gradient image."""


@dataclass(frozen=True, slots=True)
class UnitGradient:
    """One unit in a block's gradient image, in elements: its span, its pieces (a tensor or a panel
    each), and the length of the whole image."""

    unit: int
    owner: int
    span: Range
    pieces: tuple[Range, ...]
    image: int


@dataclass(slots=True)
class Total:
    """What came of a block: by unit of this rank, which of its pieces are gradients; and whether any rank had any."""

    found: bool
    present: dict[int, tuple[bool, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    """A block's gradient on its way through this rank."""

    number: int
    block: int
    units: Sequence[UnitGradient]
    heads: Mapping[Node, Mapping[int, Head]]
    sums: Sums
    targets: Mapping[int, Tensor]
    began_s: float = 0.0
    nbytes: tuple[int, int] = (0, 0)  # sent and received
    total: Total = field(default_factory=lambda: Total(found=False))
    sends: list[Handle] = field(default_factory=list)
    out: "Future[Total]" = field(default_factory=new_future)


class Reduction:
    """One rank's part in summing gradients over ranks."""

    def __init__(self, channel: Channel, cluster: Cluster, groups: int, log: Log = NO_LOG) -> None:
        self._channel, self._cluster, self._groups, self._log = channel, cluster, groups, log
        self._beginning = ThreadPoolExecutor(1, thread_name_prefix="fabric-heads")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fabric-up")
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix="fabric-given")
        self._count = 0
        self._coming = _Coming(channel, chunks_ahead(cluster))

    def start(
        self,
        units: Sequence[UnitGradient],
        heads: Mapping[Node, Mapping[int, Head]],
        sums: Sums,
        targets: Mapping[int, Tensor],
        block: int = 0,
    ) -> "Future[Total]":
        """Begins with the next block; `sums` are changed, and free when the future is done.

        Args:
            heads: by node of this rank, and by unit, what there is of it.
            sums: this rank's own, of the largest subtrees within its share.
            targets: by unit of this rank, where the finished sum goes: flat, as long as the unit's span.
            block: whose gradient it is, in notes.
        """
        job = _Job(self._count, block, units, heads, sums, targets)
        self._count += 1
        self._beginning.submit(self._begin, job)
        return job.out

    def close(self) -> None:
        """Ends the threads once what was begun is done."""
        for thread in (self._beginning, self._thread, self._leaving):
            thread.shutdown(wait=True)

    def _begin(self, job: _Job) -> None:
        """Heads go, and what needs no sum leaves, while sums of the block before are still on their way: a link would else
        rest between two blocks for as long as messages take to all ranks and back."""
        job.began_s = time.perf_counter()
        job.total.found = any(head.found for by_unit in job.heads.values() for head in by_unit.values())
        try:
            summed: list[Future[object]] = []
            for first in range(0, max(len(job.units), 1), BEGUN):
                if len(summed) > 1:
                    summed[-2].result()  # so that tags tell all units apart that are under way
                works = self._works(job, first)
                order = self._order(works)
                self._coming.extend(message for work, index in order for message in work.messages(index))
                last = first + BEGUN >= len(job.units)
                summed.append(self._thread.submit(self._sum, job, works, order, last=last))
        except BaseException as error:
            self._fail(job.out, error)

    def _works(self, job: _Job, first: int) -> "list[_UnitSum]":
        """The units from `first` on that are begun together, with heads exchanged."""
        works = []
        for number, unit in enumerate(job.units[first : first + BEGUN], first):
            heads = {node: by_unit[unit.unit] for node, by_unit in job.heads.items()}
            steps = reduce_plan(self._cluster, self._groups, unit.owner, unit.unit).get(self._channel.rank, ())
            target = job.targets.get(unit.unit)
            place, root = (job.number, number), (0, self._groups)
            work = _UnitSum(self._channel, steps, place, unit, heads, job.sums, target, job.sends, root)
            work.begin()
            works.append(work)
        for work in works:
            work.exchange_heads()
        return works

    def _order(self, works: "Sequence[_UnitSum]") -> "list[tuple[_UnitSum, int]]":
        """Chunk by chunk, units that take different ways in turns: so that all links are busy all the time."""
        order: list[tuple[int, _UnitSum, int]] = []
        before: Counter[tuple[int, int]] = Counter()  # chunks so far of units that take the same way
        for work in works:
            way = work.unit.owner, work.unit.unit % self._cluster.workers
            order += [(before[way] + index, work, index) for index in range(len(work.chunks))]
            before[way] += len(work.chunks)
        return [(work, index) for _, work, index in sorted(order, key=lambda item: item[0])]

    def _sum(
        self, job: _Job, works: "Sequence[_UnitSum]", order: "Sequence[tuple[_UnitSum, int]]", *, last: bool
    ) -> None:
        if job.out.done():  # it failed
            return
        try:
            for work, index in order:
                work.sum_chunk(index, self._coming)
            self._coming.give_back()
            for work in works:
                job.nbytes = job.nbytes[0] + work.sent, job.nbytes[1] + work.received
                if work.unit.unit in job.targets:
                    job.total.found |= work.head.found
                    job.total.present[work.unit.unit] = work.present()
        except BaseException as error:
            self._fail(job.out, error)
        else:
            if last:  # the next block's sums come while the rest of this one leaves
                self._leaving.submit(self._left, job)

    def _left(self, job: _Job) -> None:
        try:
            all_left(job.sends)
            self._log.note("reduce", job.block, "up", job.began_s, time.perf_counter(), max(job.nbytes))
        except BaseException as error:
            self._fail(job.out, error)
        else:
            job.out.set_result(job.total)

    def _fail(self, out: "Future[Total]", error: BaseException) -> None:
        self._channel.stop(str(error))  # others wait for what does not come from here
        if not out.done():
            out.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Message:
    """A chunk of one layer of a sum that comes from another rank; `straight` is where it is to be, if it need not be added."""

    source: int
    tag: int
    elements: int
    straight: Tensor | None
    what: str


class _UnitSum:
    """One unit's way up through this rank."""

    def __init__(
        self,
        channel: Channel,
        steps: Sequence[Step],
        place: tuple[int, int],
        unit: UnitGradient,
        heads: dict[Node, Head],
        sums: Sums,
        target: Tensor | None,
        sends: list[Handle],
        root: Node,
    ) -> None:
        self.unit = unit
        self.sent = self.received = 0  # bytes
        start, stop = unit.span
        self.chunks: list[Range] = [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
        self._channel, self._target, self._sends, self._root = channel, target, sends, root
        self._job, self._number = place
        self._steps, self._heads = steps, heads
        self._coming_heads: dict[int, tuple[Tensor, Handle]] = {}  # by step
        self._given: set[int] = set()  # the steps that were done at the beginning
        self._others: dict[int, Head] = {}  # by step: of the sum that comes
        self._memory_of = {node: node for node in heads}  # a sum is made in the memory of one of those it is made of
        self._sums = sums
        self._what = f"gradient of unit {unit.unit}"

    @property
    def head(self) -> Head:
        """What there is of the whole sum, where this rank is its owner."""
        return self._heads.get(self._root) or Head()

    def present(self) -> tuple[bool, ...]:
        """Which pieces of the whole sum are gradients."""
        layers = self.head.layers.values()
        return tuple(any(layer[piece] for layer in layers) for piece in range(len(self.unit.pieces)))

    def begin(self) -> None:
        """Asks for the heads that come, and sends what needs no sum: so nobody waits for it while this rank sums others."""
        for number, step in enumerate(self._steps):
            if isinstance(step, Merge | Take):
                data = torch.empty(head_bytes(len(self.unit.pieces)), dtype=torch.uint8)
                handle = self._channel.receive(data, step.source, self._tag(_HEAD_CHUNK, _HEAD_LAYER), self._what)
                self.received += data.nbytes
                self._coming_heads[number] = data, handle
        for number, step in enumerate(self._steps):
            if isinstance(step, Hand) and step.node in self._heads:
                self._given.add(number)
                self._hand_head(step)
                for index, chunk in enumerate(self.chunks):
                    self._hand(step, index, chunk)

    def messages(self, index: int) -> Iterator[_Message]:
        """What comes for a chunk, in the order of its use. The first layer of a finished sum comes straight to its place."""
        start, stop = self.chunks[index]
        for number, step in enumerate(self._steps):
            if not isinstance(step, Merge | Take):
                continue
            straight = None
            if isinstance(step, Take) and self._target is not None:
                straight = self._target[start - self.unit.span[0] : stop - self.unit.span[0]]
            for layer in self._others[number].layers:
                self.received += 4 * (stop - start)
                yield _Message(step.source, self._tag(index, layer), stop - start, straight, self._what)
                straight = None

    def sum_chunk(self, index: int, coming: "_Coming") -> None:
        """Carries out the steps that were not done at the beginning, on one chunk."""
        chunk = self.chunks[index]
        for number, step in enumerate(self._steps):
            match step:
                case Merge(own, _, _, _):
                    for layer, flags in self._others[number].layers.items():
                        self._add(layer, own, flags, coming.next(), chunk)
                case Join(own, other, _):
                    for layer, flags in self._heads[other].layers.items():
                        data = self._sums[layer, self._memory_of[other]][chunk[0] : chunk[1]]
                        self._add(layer, own, flags, data, chunk)
                case Hand():
                    if number not in self._given:
                        self._hand(step, index, chunk)
                case Take(node, _):
                    self._deliver(node, ((layer, coming.next()) for layer in self._others[number].layers), chunk)
        if self._target is not None and self._root in self._memory_of:
            memory = self._memory_of[self._root]
            layers = self._heads[self._root].layers
            whole = ((layer, self._sums[layer, memory][chunk[0] : chunk[1]]) for layer in layers)
            self._deliver(self._root, whole, chunk)

    def _tag(self, chunk: int, layer: int) -> int:
        return tag(self._job, self._number, chunk, layer)

    def exchange_heads(self) -> None:
        """Every rank learns what there is of each sum before the sums themselves come."""
        pieces = len(self.unit.pieces)
        for number, step in enumerate(self._steps):
            match step:
                case Hand():
                    if number not in self._given:
                        self._hand_head(step)
                case Join(own, other, parent):
                    self._become(own, parent, self._heads[other])
                case Merge(own, _, _, parent):
                    data, handle = self._coming_heads[number]
                    handle.wait()
                    self._others[number] = Head.unpacked(data, pieces)
                    self._become(own, parent, self._others[number])
                case Take(node, _):
                    data, handle = self._coming_heads[number]
                    handle.wait()
                    self._others[number] = self._heads[node] = Head.unpacked(data, pieces)

    def _hand_head(self, step: Hand) -> None:
        data = self._heads[step.node].packed(len(self.unit.pieces))
        self.sent += data.nbytes
        where = self._tag(_HEAD_CHUNK, _HEAD_LAYER)
        self._sends.append(self._channel.send(data, step.to, where, self._what))

    def _hand(self, step: Hand, index: int, chunk: Range) -> None:
        memory = self._memory_of[step.node]
        for layer in self._heads[step.node].layers:
            data = self._sums[layer, memory][chunk[0] : chunk[1]]
            self.sent += data.nbytes
            self._sends.append(self._channel.send(data, step.to, self._tag(index, layer), self._what))

    def _become(self, own: Node, parent: Node, other: Head) -> None:
        """The parent's sum is made in the memory of `own`."""
        self._heads[parent] = self._heads[own].merged(other)
        self._memory_of[parent] = self._memory_of[own]
        for layer in other.layers:
            if layer not in self._heads[own].layers:
                key = layer, self._memory_of[own]
                if key not in self._sums:
                    self._sums[key] = torch.empty(self.unit.image)

    def _add(self, layer: int, own: Node, other: bytearray, data: Tensor, chunk: Range) -> None:
        """`own + other` for pieces of both, what there is for pieces of one, on one chunk."""
        target = self._sums[layer, self._memory_of[own]]
        flags = self._heads[own].layers.get(layer)
        if flags is not None and all(flags) and all(other):
            target[chunk[0] : chunk[1]].add_(data)
            return
        for index, low, high in self._pieces_in(chunk):
            if not other[index]:
                continue
            piece = data[low - chunk[0] : high - chunk[0]]
            if flags is not None and flags[index]:
                target[low:high].add_(piece)
            else:
                target[low:high].copy_(piece)

    def _pieces_in(self, chunk: Range) -> Iterator[tuple[int, int, int]]:
        """The pieces that reach into a chunk: which, from where, to where."""
        for index, (start, stop) in enumerate(self.unit.pieces):
            low, high = max(start, chunk[0]), min(stop, chunk[1])
            if low < high:
                yield index, low, high

    def _deliver(self, root: Node, layers: Iterable[tuple[int, Tensor]], chunk: Range) -> None:
        """Over uses, in order: what there is of each piece goes to the target, or is added to it."""
        assert self._target is not None
        start = self.unit.span[0]
        begun: bytearray | None = None
        for layer, data in layers:
            target = self._target[chunk[0] - start : chunk[1] - start]
            flags = self._heads[root].layers[layer]
            if begun is None:
                if data.data_ptr() != target.data_ptr():  # else it came straight here
                    target.copy_(data)
                begun = bytearray(flags)  # what else was copied is no gradient, and nobody reads it
                continue
            for index, low, high in self._pieces_in(chunk):
                if flags[index]:
                    place, piece = target[low - chunk[0] : high - chunk[0]], data[low - chunk[0] : high - chunk[0]]
                    place.add_(piece) if begun[index] else place.copy_(piece)
                    begun[index] = 1


class _Coming:
    """What comes of sums, in the order of its use; some of it is under way all the time, of the next block as well.

    Args:
        ahead: chunks that are under way or in use and need memory of their own.
    """

    def __init__(self, channel: Channel, ahead: int) -> None:
        self._channel, self._ahead = channel, ahead
        self._lock = threading.Lock()  # messages are added by another thread
        self._messages: deque[Iterator[_Message]] = deque()
        self._following: _Message | None = None
        self._posted: deque[tuple[Tensor, Tensor | None, Handle]] = deque()
        self._free: list[Tensor] = []
        self._borrowed = 0
        self._in_use: Tensor | None = None

    def extend(self, messages: Iterable[_Message]) -> None:
        """These come after all others."""
        with self._lock:
            self._messages.append(iter(messages))
            self._post()

    def next(self) -> Tensor:
        """The next one, once it is here; what was given out before is overwritten."""
        with self._lock:
            self._release()
            self._post()
            data, self._in_use, handle = self._posted.popleft()
        handle.wait()
        return data

    def give_back(self) -> None:
        """What was given out last is no longer needed."""
        with self._lock:
            self._release()
            self._post()

    def _release(self) -> None:
        if self._in_use is not None:
            self._free.append(self._in_use)
            self._in_use = None
            self._borrowed -= 1

    def _post(self) -> None:
        while len(self._posted) < POSTED and (message := self._peek()) is not None:
            data, buffer = message.straight, None
            if data is None:
                if self._borrowed == self._ahead:
                    return
                buffer = self._free.pop() if self._free else torch.empty(CHUNK)  # untouched beyond a smaller unit
                data = buffer[: message.elements]
                self._borrowed += 1
            handle = self._channel.receive(data, message.source, message.tag, message.what)
            self._posted.append((data, buffer, handle))
            self._following = None

    def _peek(self) -> _Message | None:
        while self._following is None and self._messages:
            self._following = next(self._messages[0], None)
            if self._following is None:
                self._messages.popleft()
        return self._following
