"""Any number of ranks in one process, each in a thread of its own: the same schedule, store and sums without a network.

A message is copied from the sender's memory into the receiver's when both are there. Computing is taken in turns, since
the ranks share one random state and one set of cores.
"""

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.errors import FabricError
from weightstream.fabric.links import Channel, Handle, Links

T = TypeVar("T")
TIMEOUT_S = 120.0
Key = tuple[str, int, int, int]
"""Channel, sender, receiver, tag."""


@dataclass(slots=True)
class _Message:
    hub: "Hub"
    data: Tensor
    what: str
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.hub.wait(self.over, self.what)


class Hub:
    """Where the messages of all ranks of a process meet."""

    def __init__(self, cluster: Cluster, timeout_s: float = TIMEOUT_S) -> None:
        self.cluster, self.timeout_s = cluster, timeout_s
        self.computing = threading.RLock()
        self._lock = threading.Lock()
        self._sent: dict[Key, deque[_Message]] = defaultdict(deque)
        self._wanted: dict[Key, deque[_Message]] = defaultdict(deque)
        self._gathered: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        self._complete: dict[tuple[str, int], threading.Event] = defaultdict(threading.Event)
        self._failure: str | None = None

    def links(self, rank: int) -> "LocalLinks":
        """The channels of one rank."""
        return LocalLinks(self, rank)

    def fail(self, reason: str) -> None:
        """Nobody waits any longer: every wait ends with this reason."""
        self._failure = self._failure or reason

    def wait(self, over: threading.Event, what: str) -> None:
        until = time.monotonic() + self.timeout_s
        while not over.wait(0.2 if self._failure is None else 0):
            if self._failure is not None:
                raise FabricError(f"{what}: {self._failure}")
            if time.monotonic() > until:
                raise FabricError(f"{what} did not come within {self.timeout_s:g} s")

    def post(self, key: Key, message: _Message, *, sends: bool) -> None:
        own, others = (self._sent, self._wanted) if sends else (self._wanted, self._sent)
        with self._lock:
            if not others[key]:
                own[key].append(message)
                return
            other = others[key].popleft()
        source, target = (message, other) if sends else (other, message)
        if source.data.nbytes != target.data.nbytes:
            raise AssertionError(f"{message.what}: {source.data.nbytes} bytes sent, {target.data.nbytes} expected")
        target.data.copy_(source.data)
        source.over.set()
        target.over.set()

    def gather(self, channel: str, turn: int, rank: int, value: Any, members: range) -> list[Any]:
        with self._lock:
            found = self._gathered[channel, turn]
            found[rank] = json.dumps(value)
            complete = self._complete[channel, turn]
            if len(found) == len(members):
                complete.set()
                for table in (self._gathered, self._complete):
                    table.pop((channel, turn - 1), None)  # type: ignore[attr-defined]
        self.wait(complete, f"what all ranks tell each other in turn {turn} of channel {channel!r}")
        return [json.loads(found[member]) for member in members]


class _LocalChannel(Channel):
    def __init__(self, hub: Hub, name: str, rank: int, members: range) -> None:
        super().__init__(name, rank, members)
        self._hub, self._turn = hub, 0

    def _send(self, data: Tensor, to: int, tag: int, what: str) -> Handle:
        message = _Message(self._hub, data, f"{what} from rank {self.rank} to rank {to}")
        self._hub.post((self.name, self.rank, to, tag), message, sends=True)
        return message

    def _receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle:
        message = _Message(self._hub, data, f"{what} from rank {source} to rank {self.rank}")
        self._hub.post((self.name, source, self.rank, tag), message, sends=False)
        return message

    def gather(self, value: Any) -> list[Any]:
        self._turn += 1
        return self._hub.gather(self.name, self._turn, self.rank, value, self.members)

    def stop(self, reason: str) -> None:
        self._hub.fail(f"rank {self.rank} stopped: {reason}")


class LocalLinks(Links):
    """The channels of one rank of a `Hub`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size = hub, rank, hub.cluster.size
        every = range(self.size)
        self.down, self.up, self.control = (self.channel(name, every) for name in ("down", "up", "control"))
        self.commits = self.channel("commits", hub.cluster.memory_ranks)

    def channel(self, name: str, members: range) -> Channel:
        return _LocalChannel(self.hub, name, self.rank, members)

    def computing(self) -> AbstractContextManager[object]:
        return self.hub.computing

    @contextmanager
    def waiting(self) -> Iterator[None]:
        try:
            self.hub.computing.release()
        except RuntimeError:  # it is not this rank's turn
            yield
            return
        try:
            yield
        finally:
            self.hub.computing.acquire()

    def close(self) -> None:
        pass


def run_ranks(cluster: Cluster, work: Callable[[Links], T], *, timeout_s: float = TIMEOUT_S) -> list[T]:
    """Does `work` as every rank at once, in threads; the results in order of rank.

    Raises:
        BaseException: whatever the first rank that failed raised; the others are told and stop.
    """
    hub = Hub(cluster, timeout_s)
    errors: list[BaseException] = []

    def one(rank: int) -> T | None:
        links = hub.links(rank)
        try:
            return work(links)
        except BaseException as error:
            errors.append(error)
            links.stop(str(error))
            return None

    with ThreadPoolExecutor(cluster.size, thread_name_prefix="rank") as pool:
        results = list(pool.map(one, range(cluster.size)))
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
