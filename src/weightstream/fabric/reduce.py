"""Gradients on their way up: partial sums of ranks meet in the contract's tree, and the whole sum at its owner.

One thread carries out one rank's part, block by block in order of issue, unit by unit (`unit_sums.py`). A small head goes
ahead of each sum: which pieces of it there are at all, since a parameter without a gradient has none, never zeros.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil, log2

from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.broadcast import UNITS, all_left
from weightstream.fabric.coming import Coming
from weightstream.fabric.heads import Head
from weightstream.fabric.links import Channel, Handle
from weightstream.fabric.trees import Node, reduce_plan
from weightstream.fabric.unit_sums import Sums, UnitGradient, UnitSum
from weightstream.store.futures import new_future
from weightstream.trace.recorder import NO_LOG, Log

CHUNK = 1 << 19  # elements
AHEAD_ELEMENTS = 2 * CHUNK  # of a sibling's sum, that are under way at once
BEGUN = UNITS // 2  # units that are begun together; fewer than tags tell apart


def chunks_ahead(cluster: Cluster) -> int:
    """Chunks of sums under way, or just being added, at most: of as many siblings as the tree is high."""
    return ceil(log2(max(cluster.workers, 2)) + 1) * max(2, AHEAD_ELEMENTS // CHUNK)


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
        self._coming = Coming(channel, chunks_ahead(cluster), CHUNK)

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

    def _works(self, job: _Job, first: int) -> "list[UnitSum]":
        """The units from `first` on that are begun together, with heads exchanged."""
        works = []
        for number, unit in enumerate(job.units[first : first + BEGUN], first):
            heads = {node: by_unit[unit.unit] for node, by_unit in job.heads.items()}
            steps = reduce_plan(self._cluster, self._groups, unit.owner, unit.unit).get(self._channel.rank, ())
            target = job.targets.get(unit.unit)
            start, stop = unit.span
            chunks = [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
            place, root = (job.number, number), (0, self._groups)
            work = UnitSum(self._channel, steps, chunks, place, unit, heads, job.sums, target, job.sends, root)
            work.begin()
            works.append(work)
        for work in works:
            work.exchange_heads()
        return works

    def _order(self, works: "Sequence[UnitSum]") -> "list[tuple[UnitSum, int]]":
        """Chunk by chunk, units that take different ways in turns: so that all links are busy all the time."""
        order: list[tuple[int, UnitSum, int]] = []
        before: Counter[tuple[int, int]] = Counter()  # chunks so far of units that take the same way
        for work in works:
            way = work.unit.owner, work.unit.unit % self._cluster.workers
            order += [(before[way] + index, work, index) for index in range(len(work.chunks))]
            before[way] += len(work.chunks)
        return [(work, index) for _, work, index in sorted(order, key=lambda item: item[0])]

    def _sum(
        self, job: _Job, works: "Sequence[UnitSum]", order: "Sequence[tuple[UnitSum, int]]", *, last: bool
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
