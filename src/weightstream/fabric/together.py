"""Several ranks in one step: blocks go down trees into every slab, gradients come back up and are summed on the way."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.heads import Head, layer_of
from weightstream.fabric.links import Links
from weightstream.fabric.peers import Arrival, Reduced
from weightstream.fabric.reduce import CHUNK, Reduction, Total, chunks_ahead
from weightstream.fabric.reduction import BlockSum
from weightstream.fabric.staging import Staging
from weightstream.fabric.trees import Node
from weightstream.fabric.unit_sums import Sums, UnitGradient
from weightstream.schedule.reduction import subtrees
from weightstream.store.images import Image
from weightstream.store.owned import Holding
from weightstream.trace.recorder import NO_LOG, Log

SUMS_TRAVELLING = 2
"""Blocks whose gradient is on its way while the next one is summed."""

Uses = Callable[[int, str], Sequence[int]]
"""Block and parameter → the visits that use it, in order."""


def fabric_bytes(cluster: Cluster, unit_bytes: int) -> int:
    """Memory for chunks of sums on their way, at most: those of one unit's siblings.

    Args:
        unit_bytes: of the largest unit's gradient, which may be less than a chunk.
    """
    return chunks_ahead(cluster) * min(CHUNK * 4, unit_bytes)


class Together:
    """One rank of several; see `Peers`.

    Args:
        owner: the memory rank that owns each unit.
        sums: where this rank sums what it computes; whole blocks.
        staging: where the gradients of the units that it owns wait.
        uses: of parameters in blocks; others are used once.
        log: where it is noted what moved between ranks: of each block, in the direction in which more did.
    """

    def __init__(
        self,
        links: Links,
        cluster: Cluster,
        holding: Holding,
        owner: Sequence[int],
        *,
        sums: Staging,
        staging: Staging,
        groups: int,
        uses: Uses,
        log: Log = NO_LOG,
    ) -> None:
        self.cluster, self.rank = cluster, links.rank
        self._links, self._holding, self._groups = links, holding, groups
        self._sums, self._staging, self._uses = sums, staging, uses
        self._share = cluster.groups_of(links.rank, groups)
        self._subtrees: tuple[Node, ...] = subtrees(groups, self._share)
        self._down = Broadcast(links.down, cluster, log)
        self._up = Reduction(links.up, cluster, groups, log)
        self._owner = owner
        self._spans = [self._spans_of(block.index) for block in holding.blocks]
        self._units = {
            block.index: (image, self._units_of(block.index, image))
            for block, image in zip(holding.blocks, holding.gradients, strict=True)
        }
        """By block the units of its gradient, where they lay when this was last asked."""
        self._varying = frozenset(holding.sparse_blocks())

    def _spans_of(self, block: int) -> tuple[Span, ...]:
        """What of a block moves on the way down, and where it lands."""
        landing = self._holding.landing(block)
        return tuple(Span(unit, place.start, place.stop, self._owner[unit]) for unit, place in landing.items())

    def _units_of(self, block: int, image: Image) -> tuple[UnitGradient, ...]:
        """The units of its gradient on the way up."""
        gradients = []
        for unit, (start, stop) in zip(self._holding.store.units_of(block), image.spans, strict=True):
            pieces = tuple(
                (spec.offset // 4, (spec.offset + spec.nbytes) // 4)
                for spec in image.pieces
                if start <= spec.offset < stop
            )
            if pieces:
                span = (start // 4, stop // 4)
                gradients.append(UnitGradient(unit, self._owner[unit], span, pieces, image.nbytes // 4))
        return tuple(gradients)

    def _gradients(self, block: int) -> tuple[UnitGradient, ...]:
        image, units = self._units[block]
        if block in self._varying and (now := self._holding.gradients_now(block)) is not image:
            units = self._units_of(block, now)
            self._units[block] = now, units
        return units

    # down

    def fetch(self, block: int, view: memoryview, local: "Mapping[int, Future[Any]]") -> Arrival:
        spans = self._spans_of(block) if block in self._varying else self._spans[block]
        here, passed = self._down.start(view, spans, local, block)
        return Arrival(here, passed)

    # up

    def open(self, block: int, *, micro_batches: int, brief: bool) -> BlockSum:
        present = len(self.cluster.share(self.rank, micro_batches, self._groups))
        return self._sums.open(
            block, micro_batches=micro_batches, groups=self._groups, brief=brief, share=self._share, present=present
        )

    def sum_of(self, block: int) -> BlockSum | None:
        return self._sums.sum_of(block)

    def reduce(self, block: int) -> "Future[Total]":
        units = self._gradients(block)
        total = self._sums.sum_of(block)
        sums: Sums = {}
        heads = {node: {unit.unit: Head() for unit in units} for node in self._subtrees}
        if total is not None:
            self._lay_out(block, total, units, heads, sums)
        targets = self._targets(block, units)
        reducing = self._up.start(units, heads, sums, targets, block)
        if total is not None:
            self._sums.lend(block, reducing)
        return reducing

    def finish(self, block: int, total: Total) -> Reduced:
        owned = self._targets_of(block)
        if not owned:
            return Reduced({}, total.found)
        image = self._holding.staged_now(block)
        keys, first = [], 0
        for unit in owned:
            pieces = image.pieces[first : first + len(unit.pieces)]
            first += len(unit.pieces)
            flags = total.present[unit.unit]
            keys += [(spec.name, spec.row) for spec, flag in zip(pieces, flags, strict=True) if flag]
        return Reduced(self._staging.settle(block, keys), total.found)

    def _targets_of(self, block: int) -> list[UnitGradient]:
        return [unit for unit in self._gradients(block) if unit.owner == self.rank]

    def _targets(self, block: int, units: Sequence[UnitGradient]) -> dict[int, Tensor]:
        """Where the finished sums of this rank's units go: one after another in what is staged."""
        owned = self._targets_of(block)
        if not owned:
            return {}
        memory, found = self._staging.room(block), {}
        held, spans = self._holding.held(block), self._holding.staged_now(block).spans
        starts = dict(zip(held, spans, strict=True))
        for unit in owned:
            length = unit.span[1] - unit.span[0]
            found[unit.unit] = memory.tensor(torch.float32, starts[unit.unit][0], (length,))
        return found

    def _lay_out(
        self,
        block: int,
        total: BlockSum,
        units: Sequence[UnitGradient],
        heads: dict[Node, dict[int, Head]],
        sums: Sums,
    ) -> None:
        """Puts the partial sums into images of the whole block, and notes what there is.

        The first subtree's sum of a parameter that is used once lies in its place already; others are copied.
        """
        image, memory = self._holding.gradients_now(block), self._sums.buffer_of(block)
        first = self._subtrees[0]
        sums[0, first] = memory.tensor(torch.float32, 0, (image.nbytes // 4,))
        places = {spec.name: (spec.offset // 4, (spec.offset + spec.nbytes) // 4) for spec in image.tensors}
        pieces: dict[str, list[tuple[int, int]]] = {}
        names = iter(image.pieces)
        for unit in units:
            for index in range(len(unit.pieces)):
                pieces.setdefault(next(names).name, []).append((unit.unit, index))
        count = {unit.unit: len(unit.pieces) for unit in units}
        for name, by_use in total.close_partly().items():
            uses = self._uses(block, name) or sorted(by_use)
            parts = [
                (layer_of(uses, use, name), node, part) for use, nodes in by_use.items() for node, part in nodes.items()
            ]
            low, high = places[name]
            # what lies in the place of another goes first
            home = sums[0, first][low:high].data_ptr()
            parts.sort(key=lambda part: part[2].data_ptr() != home)
            for layer, node, part in parts:
                if (layer, node) not in sums:
                    sums[layer, node] = torch.empty(image.nbytes // 4)
                target = sums[layer, node][low:high]
                if target.data_ptr() != part.data_ptr():
                    target.copy_(part)
                for unit_index, piece in pieces[name]:
                    head = heads[node][unit_index]
                    head.found = True
                    head.layers.setdefault(layer, bytearray(count[unit_index]))[piece] = 1
        found = any(head.found for by_unit in heads.values() for head in by_unit.values())
        for by_unit in heads.values():
            for head in by_unit.values():
                head.found = found
                head.layers = dict(sorted(head.layers.items()))

    # all ranks

    def gather(self, value: Any) -> list[Any]:
        return self._links.control.gather(value)

    def abort(self) -> None:
        self._sums.abort()

    def close(self) -> None:
        self._down.close()
        self._up.close()
        self._sums.close_buffers()
