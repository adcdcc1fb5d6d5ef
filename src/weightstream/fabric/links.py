"""Messages between ranks: what trees of broadcasts and sums are made of.

Channels are independent of each other, so that weights on their way down do not wait for gradients on their way
up. Messages between two ranks are told apart by tags, so that any thread may send and receive. `local.py`
connects ranks of one process, `distributed.py` processes by `torch.distributed`.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError


class Handle(Protocol):
    """A message under way."""

    def wait(self) -> None:
        """Until the memory may be used again (sent), or holds the bytes (received).

        Raises:
            FabricError: the other rank is gone or silent.
        """


@dataclass(slots=True)
class Traffic:
    """Bytes by the rank that they went to or came from."""

    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)


class Channel(ABC):
    """One order of messages between the ranks of `members`."""

    def __init__(self, name: str, rank: int, members: range) -> None:
        self.name, self.rank, self.members = name, rank, members
        self.traffic = Traffic()
        self._counting = threading.Lock()

    def send(self, data: Tensor, to: int, tag: int, what: str) -> Handle:
        """Sends a contiguous CPU tensor, which must be left alone until `wait`.

        Args:
            tag: the receiver names the same one.
            what: for messages, such as "unit 7".
        """
        with self._counting:
            self.traffic.sent[to] += data.nbytes
        return self._send(data, to, tag, what)

    def receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle:
        """Fills a contiguous CPU tensor of the size that is sent."""
        with self._counting:
            self.traffic.received[source] += data.nbytes
        return self._receive(data, source, tag, what)

    @abstractmethod
    def _send(self, data: Tensor, to: int, tag: int, what: str) -> Handle: ...

    @abstractmethod
    def _receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle: ...

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every member, in order of rank. All members call it.

        Raises:
            FabricError: a rank is gone or silent.
        """

    @abstractmethod
    def stop(self, reason: str) -> None:
        """This rank goes no further: its waits here, and those of others for it, end at once and with this reason."""


class Links(ABC):
    """One rank's channels.

    `down` is for blocks, `up` for gradients, `control` for what ranks tell each other in the scheduler's thread, and
    `commits` for what memory ranks tell each other in their commit threads. `records` is for records of families; a model
    without any has no such channel.
    """

    rank: int
    size: int
    down: Channel
    up: Channel
    control: Channel
    commits: Channel
    records: Channel

    def divide(self, cluster: Cluster) -> None:
        """Connects the memory ranks of a cluster (`commits`). All ranks call it, once.

        Raises:
            ConfigError: there are more or fewer ranks than it needs.
        """
        if cluster.size != self.size:
            raise ConfigError(
                f"cluster.workers={cluster.workers} with cluster.memory={cluster.memory} is {cluster.size} ranks, there are "
                f"{self.size}; start as many as the cluster needs, or change it"
            )

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, in order of rank; every rank calls it."""
        return self.control.gather(value)

    def computing(self) -> AbstractContextManager[object]:
        """Entered while this rank computes; ranks that share a process take turns."""
        return nullcontext()

    def waiting(self) -> AbstractContextManager[object]:
        """Entered while this rank waits for others though it is `computing`: they have their turn meanwhile."""
        return nullcontext()

    def add_records(self) -> Channel:
        """The channel for records of families, made when it is first asked for. All ranks call it."""
        if not hasattr(self, "records"):
            self.records = self.channel("records", range(self.size))
        return self.records

    @abstractmethod
    def channel(self, name: str, members: range) -> Channel:
        """A new channel between these ranks. All ranks call it, in the same order."""

    def stop(self, reason: str) -> None:
        """This rank goes no further: all its waits, and those of others for it, end at once and with this reason."""
        for name in ("down", "up", "control", "commits", "records"):
            if (channel := getattr(self, name, None)) is not None:  # a rank may stop before it has all of them
                channel.stop(reason)

    @abstractmethod
    def close(self) -> None:
        """Lets the others go. After an error nobody is waited for."""
