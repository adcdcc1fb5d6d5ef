"""One unit's gradient on its way up through one rank: heads first, then chunk by chunk.

Sums are added in the memory of one of the two, so that a rank needs no more than a few chunks besides its own sums. A
parameter that several visits use is summed use by use, each through the whole tree (a *layer* for each use), and over uses
at the owner.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightstream.fabric.broadcast import tag
from weightstream.fabric.coming import Coming, Message
from weightstream.fabric.heads import Head, head_bytes
from weightstream.fabric.links import Channel, Handle
from weightstream.fabric.trees import Hand, Join, Merge, Node, Step, Take

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


class UnitSum:
    """One unit's way up through this rank.

    Args:
        steps: what this rank does for it.
        chunks: the ranges of elements that go up one after another.
        place: the number of its block, and its own within that.
        heads: by node, what there is of this rank's own sums.
        sums: its own, which are changed.
        target: where the finished sum goes, if it comes here.
        sends: takes in what is sent.
        root: the node of the whole sum.
    """

    def __init__(
        self,
        channel: Channel,
        steps: Sequence[Step],
        chunks: Sequence[Range],
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
        self.chunks = chunks
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

    def messages(self, index: int) -> Iterator[Message]:
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
                yield Message(step.source, self._tag(index, layer), stop - start, straight, self._what)
                straight = None

    def sum_chunk(self, index: int, coming: "Coming") -> None:
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
