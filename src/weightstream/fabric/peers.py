"""What one rank does together with the others in a step: blocks arrive, gradients are summed, figures are compared.

A runtime knows nothing else of the fabric. `Alone` is what one rank is to itself; `together.py` has the real thing.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from weightstream.cluster import Cluster
from weightstream.fabric.reduction import BlockSum, Squares
from weightstream.fabric.staging import Staging
from weightstream.store.futures import done, gather


@dataclass(frozen=True, slots=True)
class Arrival:
    """A block on its way to a slab: it may be used when it is `here`, the slab used again when it is `passed` on."""

    here: "Future[Any]"
    passed: "Future[Any]"


@dataclass(frozen=True, slots=True)
class Reduced:
    """A block's gradient after its sum: the squares of what this rank owns, and whether any rank had any of it."""

    squares: Squares
    found: bool


class Peers(Protocol):
    """One rank's part in moving bytes between ranks. Every rank calls the same methods in the same order."""

    cluster: Cluster
    rank: int

    def fetch(self, block: int, view: memoryview, local: "Mapping[int, Future[Any]]") -> Arrival:
        """Brings a block to a slab.

        Args:
            local: by unit of this rank, when its bytes are in the slab.
        """

    def open(self, block: int, *, micro_batches: int, brief: bool) -> BlockSum:
        """Makes room for the sum of a block's gradients; see `Staging.open`."""

    def sum_of(self, block: int) -> BlockSum | None:
        """The sum of a block, if it is open."""

    def reduce(self, block: int) -> "Future[Any]":
        """Closes a block's sum and begins to add those of all ranks."""

    def finish(self, block: int, total: Any) -> Reduced:
        """Stages what this rank owns of the whole sum, which `reduce` gave."""

    def gather(self, value: Any) -> list[Any]:
        """A small value of every rank, in order of rank."""

    def abort(self) -> None:
        """Forgets the sums that are open."""

    def close(self) -> None:
        """Gives the memory back."""


class Alone:
    """One rank: what it reads is there, what it sums is the sum."""

    def __init__(self, staging: Staging, groups: int) -> None:
        self.cluster, self.rank = Cluster(), 0
        self._staging, self._groups = staging, groups

    def fetch(self, block: int, view: memoryview, local: "Mapping[int, Future[Any]]") -> Arrival:
        futures = list(local.values())
        here = futures[0] if len(futures) == 1 else gather(futures)
        return Arrival(here, here)

    def open(self, block: int, *, micro_batches: int, brief: bool) -> BlockSum:
        return self._staging.open(block, micro_batches=micro_batches, groups=self._groups, brief=brief)

    def sum_of(self, block: int) -> BlockSum | None:
        return self._staging.sum_of(block)

    def reduce(self, block: int) -> "Future[Reduced]":
        squares = self._staging.close(block)
        return done(Reduced(squares, block in self._staging.staged()))

    def finish(self, block: int, total: Reduced) -> Reduced:
        return total

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def abort(self) -> None:
        self._staging.abort()

    def close(self) -> None:
        pass
