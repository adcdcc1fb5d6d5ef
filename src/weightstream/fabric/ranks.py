"""All ranks of a run as one of them sees them: what each has to say, and refusals that end all of them alike."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from weightstream import errors
from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, WeightstreamError
from weightstream.fabric.agreement import meanwhile
from weightstream.fabric.links import Links

T = TypeVar("T")


class Ranks:
    """This rank among the others; without links it is alone.

    Raises:
        ConfigError: the links are not those of such a cluster.
    """

    def __init__(self, cluster: Cluster | None = None, links: Links | None = None) -> None:
        self.cluster, self.links = cluster or Cluster(), links
        self.rank = links.rank if links is not None else 0
        if links is not None:
            links.divide(self.cluster)
        elif self.cluster.size > 1:
            raise ConfigError(
                f"cluster of {self.cluster.workers} workers, memory {self.cluster.memory}: this process has no links to the "
                f"other {self.cluster.size - 1} ranks; give `links`, or run `weightstream fit`, which makes them"
            )

    @property
    def alone(self) -> bool:
        return self.links is None

    @property
    def owns(self) -> bool:
        """Whether this rank owns records."""
        return self.rank in self.cluster.memory_ranks

    @property
    def computes(self) -> bool:
        """Whether this rank computes micro-batches."""
        return self.rank in self.cluster.compute_ranks

    def computing(self) -> AbstractContextManager[object]:
        """Entered while this rank computes; ranks that share a process take turns."""
        return nullcontext() if self.links is None else self.links.computing()

    def waiting(self) -> AbstractContextManager[object]:
        """Entered while this rank waits for others though it is `computing`."""
        return nullcontext() if self.links is None else self.links.waiting()

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, in order of rank; every rank calls it."""
        return [value] if self.links is None else self.links.gather(value)

    def exchange(self, value: Any) -> list[Any]:
        """The same among memory ranks, in their commit threads and while the store is opened."""
        return [value] if self.links is None else self.links.commits.gather(value)

    def agreed(self, action: Callable[[], T]) -> T:
        """Does something that may be refused: where one rank refuses, all raise what it raised.

        Raises:
            WeightstreamError: the first refusal in order of rank.
        """
        try:
            value, refused = action(), None
        except WeightstreamError as error:
            if self.alone:
                raise
            refused = error
        found = self.gather(None if refused is None else [type(refused).__name__, str(refused)])
        first = next(((rank, *what) for rank, what in enumerate(found) if what is not None), None)
        if first is None:
            return value
        rank, kind, message = first
        if refused is not None and rank == self.rank:
            raise refused
        raise getattr(errors, kind, WeightstreamError)(message)

    def agreed_slowly(self, action: Callable[[], T]) -> T:
        """`agreed` for what may take longer than ranks wait for each other: meanwhile they say that they are there.

        Raises:
            WeightstreamError: the first refusal in order of rank.
        """
        return cast(T, self.agreed(meanwhile(self.gather, action)))
