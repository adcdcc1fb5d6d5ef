"""Who does what: ranks, the micro-batches that each computes, and the records that each owns.

All of it is arithmetic on a few numbers, the same on every rank, so that nobody has to be told.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from weightstream.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", int, "Tensor")
LASTING_VARIABLE = "WEIGHTSTREAM_LASTING"
"""In the environment of ranks, the folder where their pinned parts outlive them (`store/lasting.py`)."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`workers` compute; `memory` ranks own the records, or `"colocated"`: every worker owns its part of them.

    Apart, ranks 0 to `memory` - 1 own records and the ranks behind them compute. Rank 0 always owns records.
    """

    workers: int = 1
    memory: int | Literal["colocated"] = "colocated"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise PlanError(f"cluster.workers={self.workers}: expected at least 1")
        if self.memory != "colocated" and self.memory < 1:
            raise PlanError(f"cluster.memory={self.memory}: expected 'colocated', or at least 1 memory rank")

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.workers if self.memory == "colocated" else self.memory + self.workers

    @property
    def memory_ranks(self) -> range:
        """The ranks that own records."""
        return range(self.workers if self.memory == "colocated" else self.memory)

    @property
    def compute_ranks(self) -> range:
        """The ranks that compute, in order of the micro-batches that they take."""
        return range(self.size - self.workers, self.size)

    def groups_of(self, rank: int, groups: int) -> range:
        """The reduction groups whose micro-batches a rank computes; empty for one that only owns records."""
        worker = rank - self.compute_ranks.start
        if worker < 0:
            return range(0)
        return range(worker * groups // self.workers, (worker + 1) * groups // self.workers)

    def share(self, rank: int, micro_batches: int, groups: int) -> range:
        """The micro-batches that a rank computes: those of its groups (group g has `[g*M//G, (g+1)*M//G)`)."""
        own = self.groups_of(rank, groups)
        return range(own.start * micro_batches // groups, own.stop * micro_batches // groups) if own else range(0)

    def largest_share(self, micro_batches: int, groups: int) -> int:
        """The most micro-batches that one rank computes."""
        return max(len(self.share(rank, micro_batches, groups)) for rank in self.compute_ranks)

    def check(self, micro_batches: int, groups: int) -> None:
        """Refuse a division of work that leaves a worker without any.

        Raises:
            PlanError: naming the smallest change that works.
        """
        if self.workers > groups:
            raise PlanError(
                f"cluster.workers={self.workers}: expected at most engine.reduction_groups={groups}, which is fixed when "
                f"the store is made; take fewer workers, or make a new store with reduction_groups={self.workers}"
            )
        idle = [rank for rank in self.compute_ranks if not self.share(rank, micro_batches, groups)]
        if idle:
            enough = next(m for m in range(self.workers, groups + 1) if self._all_busy(m, groups))
            raise PlanError(
                f"{micro_batches} micro-batches in {groups} reduction groups leave {len(idle)} of {self.workers} workers "
                f"without any; give training.micro_batches={enough} or fewer workers"
            )

    def _all_busy(self, micro_batches: int, groups: int) -> bool:
        return all(self.share(rank, micro_batches, groups) for rank in self.compute_ranks)


def owners(record_bytes: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The memory rank that owns each record: largest first, each to the rank with the fewest bytes so far (LPT).

    Raises:
        PlanError: there are more ranks than records.
    """
    if ranks > max(len(record_bytes), 1):
        raise PlanError(
            f"{ranks} memory ranks, but only {len(record_bytes)} records to own; take at most {len(record_bytes)} memory ranks"
        )
    loads = [(0, rank) for rank in range(ranks)]
    owner = [0] * len(record_bytes)
    for record in sorted(range(len(record_bytes)), key=lambda record: (-record_bytes[record], record)):
        nbytes, rank = heapq.heappop(loads)
        owner[record] = rank
        heapq.heappush(loads, (nbytes + record_bytes[record], rank))
    return tuple(owner)


def owner_of(number: Number, ranks: int) -> Number:
    """The memory rank that owns a family's record of that number, or of each of these: numbers are dealt out in turn."""
    return number % ranks


def owned(count: int, rank: int, ranks: int) -> range:
    """The numbers of a family of `count` records that a memory rank owns (`owner_of`)."""
    return range(rank, count, ranks)
