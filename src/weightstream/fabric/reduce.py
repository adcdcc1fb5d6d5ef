"""Gradients on their way up: partial sums of ranks meet in the contract's tree, and the whole sum at its owner.

One thread carries out one rank's part, block by block in order of issue, unit by unit. A small head goes ahead of each
sum: which pieces of it there are at all, since a parameter without a gradient has none, never zeros. Sums are added
chunk by chunk in the memory of one of the two, so that a rank needs no more than a few chunks besides its own sums.

A parameter that several visits use is summed use by use, each through the whole tree (a *layer* for each use), and over
uses at the owner.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

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
AHEAD = 2  # chunks of a sibling's sum that are under way at once
BEGUN = UNITS // 2  # units that are begun before the one that is summed; fewer than tags tell apart
_HEAD_LAYER, _HEAD_CHUNK = 7, (1 << 14) - 1

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


class Reduction:
    """One rank's part in summing gradients over ranks."""

    def __init__(self, channel: Channel, cluster: Cluster, groups: int, log: Log = NO_LOG) -> None:
        self._channel, self._cluster, self._groups, self._log = channel, cluster, groups, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fabric-up")
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix="fabric-given")
        self._job = 0
        self._chunks: list[Tensor] = []  # memory for what comes, free at the moment

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
        job, self._job = self._job, self._job + 1
        out: Future[Total] = new_future()
        self._thread.submit(self._run, job, units, heads, sums, targets, out, block)
        return out

    def close(self) -> None:
        """Ends the threads once what was begun is done."""
        self._thread.shutdown(wait=True)
        self._leaving.shutdown(wait=True)

    def _run(
        self,
        job: int,
        units: Sequence[UnitGradient],
        heads: Mapping[Node, Mapping[int, Head]],
        sums: Sums,
        targets: Mapping[int, Tensor],
        out: "Future[Total]",
        block: int,
    ) -> None:
        began_s, moved = time.perf_counter(), _moved(self._channel)
        try:
            total = Total(any(head.found for by_unit in heads.values() for head in by_unit.values()))
            sends: list[Handle] = []
            works: deque[_UnitSum] = deque()
            for number, unit in enumerate(units):
                for ahead in range(number + len(works), min(number + BEGUN, len(units))):
                    coming = units[ahead]
                    own = {node: by_unit[coming.unit] for node, by_unit in heads.items()}
                    works.append(self._unit_sum((job, ahead), coming, own, sums, targets.get(coming.unit), sends))
                target = targets.get(unit.unit)
                head = works.popleft().run((0, self._groups))
                if target is not None:
                    total.found |= head.found
                    flags = [any(layer[i] for layer in head.layers.values()) for i in range(len(unit.pieces))]
                    total.present[unit.unit] = tuple(flags)
        except BaseException as error:
            self._fail(out, error)
        else:
            nbytes = max(now - before for now, before in zip(_moved(self._channel), moved, strict=True))
            note = partial(self._log.note, "reduce", block, "up", began_s, nbytes=nbytes)
            self._leaving.submit(self._left, sends, total, out, note)  # the next block's sums come meanwhile

    def _left(self, sends: Sequence[Handle], total: Total, out: "Future[Total]", note: Callable[[float], None]) -> None:
        try:
            all_left(sends)
            note(time.perf_counter())
        except BaseException as error:
            self._fail(out, error)
        else:
            out.set_result(total)

    def _fail(self, out: "Future[Total]", error: BaseException) -> None:
        self._channel.stop(str(error))  # others wait for what does not come from here
        out.set_exception(error)

    def _unit_sum(
        self,
        place: tuple[int, int],
        unit: UnitGradient,
        heads: dict[Node, Head],
        sums: Sums,
        target: Tensor | None,
        sends: list[Handle],
    ) -> "_UnitSum":
        steps = reduce_plan(self._cluster, self._groups, unit.owner, unit.unit).get(self._channel.rank, ())
        work = _UnitSum(self._channel, steps, place, unit, heads, sums, target, sends, self._chunks)
        work.begin()
        return work


def _moved(channel: Channel) -> tuple[int, int]:
    """Bytes sent and received so far."""
    return channel.traffic.sent.total(), channel.traffic.received.total()


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
        free: list[Tensor],
    ) -> None:
        self._channel, self._unit, self._target, self._sends, self._free = channel, unit, target, sends, free
        self._job, self._number = place
        self._steps, self._heads = steps, heads
        self._coming_heads: dict[int, tuple[Tensor, Handle]] = {}  # by step
        self._given: set[int] = set()  # the steps that were done at the beginning
        self._others: dict[int, Head] = {}  # by step: of the sum that comes
        self._memory_of = {node: node for node in heads}  # a sum is made in the memory of one of those it is made of
        self._sums = sums
        self._what = f"gradient of unit {unit.unit}"

    def begin(self) -> None:
        """Asks for the heads that come, and sends what needs no sum: so nobody waits for it while this rank sums others."""
        for number, step in enumerate(self._steps):
            if isinstance(step, Merge | Take):
                data = torch.empty(head_bytes(len(self._unit.pieces)), dtype=torch.uint8)
                handle = self._channel.receive(data, step.source, self._tag(_HEAD_CHUNK, _HEAD_LAYER), self._what)
                self._coming_heads[number] = data, handle
        for number, step in enumerate(self._steps):
            if isinstance(step, Hand) and step.node in self._heads:
                self._given.add(number)
                self._hand_head(step)
                for index, chunk in enumerate(self._chunks()):
                    self._hand(step, index, chunk)

    def _chunks(self) -> list[Range]:
        start, stop = self._unit.span
        return [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]

    def run(self, root: Node) -> Head:
        """Carries out all other steps; what there is of the whole sum, where this rank is its owner."""
        self._exchange_heads()
        chunks = self._chunks()
        coming = {
            number: self._incoming(number, step, chunks)
            for number, step in enumerate(self._steps)
            if isinstance(step, Merge | Take)
        }
        for index, chunk in enumerate(chunks):
            for number, step in enumerate(self._steps):
                match step:
                    case Merge(own, _, _, _):
                        for layer, data in coming[number].next():
                            self._add(layer, own, self._others[number].layers[layer], data, chunk)
                    case Join(own, other, _):
                        for layer, flags in self._heads[other].layers.items():
                            data = self._sums[layer, self._memory_of[other]][chunk[0] : chunk[1]]
                            self._add(layer, own, flags, data, chunk)
                    case Hand():
                        if number not in self._given:
                            self._hand(step, index, chunk)
                    case Take(node, _):
                        self._deliver(node, coming[number].next(), chunk)
            if self._target is not None and root in self._memory_of:
                memory = self._memory_of[root]
                whole = [(layer, self._sums[layer, memory][chunk[0] : chunk[1]]) for layer in self._heads[root].layers]
                self._deliver(root, whole, chunk)
        for incoming in coming.values():
            incoming.close()
        return self._heads.get(root) or Head()

    def _tag(self, chunk: int, layer: int) -> int:
        return tag(self._job, self._number, chunk, layer)

    def _exchange_heads(self) -> None:
        """Every rank learns what there is of each sum before the sums themselves come."""
        pieces = len(self._unit.pieces)
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
        data = self._heads[step.node].packed(len(self._unit.pieces))
        where = self._tag(_HEAD_CHUNK, _HEAD_LAYER)
        self._sends.append(self._channel.send(data, step.to, where, self._what))

    def _hand(self, step: Hand, index: int, chunk: Range) -> None:
        memory = self._memory_of[step.node]
        for layer in self._heads[step.node].layers:
            data = self._sums[layer, memory][chunk[0] : chunk[1]]
            self._sends.append(self._channel.send(data, step.to, self._tag(index, layer), self._what))

    def _become(self, own: Node, parent: Node, other: Head) -> None:
        """The parent's sum is made in the memory of `own`."""
        self._heads[parent] = self._heads[own].merged(other)
        self._memory_of[parent] = self._memory_of[own]
        for layer in other.layers:
            if layer not in self._heads[own].layers:
                key = layer, self._memory_of[own]
                if key not in self._sums:
                    self._sums[key] = torch.empty(self._unit.image)

    def _incoming(self, number: int, step: Merge | Take, chunks: Sequence[Range]) -> "_Incoming":
        """What comes in a step; the first layer of a finished sum comes straight to where it is to be."""
        straight = self._target if isinstance(step, Take) else None
        layers = list(self._others[number].layers)
        messages = [[(layer, step.source, self._tag(index, layer)) for layer in layers] for index in range(len(chunks))]
        return _Incoming(self._channel, messages, chunks, self._what, straight, self._free)

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
        for index, (start, stop) in enumerate(self._unit.pieces):
            low, high = max(start, chunk[0]), min(stop, chunk[1])
            if low < high:
                yield index, low, high

    def _deliver(self, root: Node, layers: Sequence[tuple[int, Tensor]], chunk: Range) -> None:
        """Over uses, in order: what there is of each piece goes to the target, or is added to it."""
        assert self._target is not None
        start = self._unit.span[0]
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


class _Incoming:
    """Chunk by chunk what comes of every layer of a sum; a few chunks are under way at once.

    Args:
        messages: of each chunk, the layers with sender and tag.
        straight: where the first layer goes, from the first chunk on; other layers, or all, go to memory from `free`.
    """

    def __init__(
        self,
        channel: Channel,
        messages: Sequence[Sequence[tuple[int, int, int]]],
        chunks: Sequence[Range],
        what: str,
        straight: Tensor | None,
        free: list[Tensor],
    ) -> None:
        self._channel, self._messages, self._chunks, self._what = channel, messages, chunks, what
        self._straight, self._free = straight, free
        self._posted: deque[list[tuple[int, Tensor, Handle]]] = deque()
        self._buffers: deque[list[Tensor]] = deque()  # of the chunk that is in use, if any, and of those posted
        self._next = 0
        self._in_use = False
        for _ in range(min(AHEAD, len(chunks))):
            self._post()

    def _post(self) -> None:
        start, stop = self._chunks[self._next]
        posted, buffers = [], []
        for place, (layer, source, where) in enumerate(self._messages[self._next]):
            if self._straight is not None and not place:
                first = self._chunks[0][0]
                data = self._straight[start - first : stop - first]
            else:
                buffers.append(
                    self._free.pop() if self._free else torch.empty(CHUNK)
                )  # untouched beyond a smaller unit
                data = buffers[-1][: stop - start]
            posted.append((layer, data, self._channel.receive(data, source, where, self._what)))
        self._posted.append(posted)
        self._buffers.append(buffers)
        self._next += 1

    def next(self) -> list[tuple[int, Tensor]]:
        """Every layer of the next chunk, once it is here; what was given out before is overwritten."""
        if self._in_use:
            self.close()
            if self._next < len(self._chunks):
                self._post()
        self._in_use = True
        arrived = self._posted.popleft()
        for _, _, handle in arrived:
            handle.wait()
        return [(layer, data) for layer, data, _ in arrived]

    def close(self) -> None:
        """What was given out last is no longer needed."""
        if self._in_use:
            self._free += self._buffers.popleft()
            self._in_use = False
