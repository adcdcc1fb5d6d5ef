"""Links on which every message leaves a little later, as on a longer wire: messages under way do not hold each other up."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.links import Channel, Handle, Links


@dataclass(slots=True)
class _Late:
    """A message that has left when the future is done."""

    left: "Future[Handle]"

    def wait(self) -> None:
        self.left.result().wait()


class LateChannel(Channel):
    """A channel whose sends leave `latency_s` after they were asked for, in order."""

    def __init__(self, channel: Channel, latency_s: float) -> None:
        super().__init__(channel.name, channel.rank, channel.members)
        self._channel, self._latency_s = channel, latency_s
        self._queue: deque[tuple[float, Future[Handle], tuple[Tensor, int, int, str]]] = deque()
        self._asked = threading.Semaphore(0)
        threading.Thread(target=self._leave, daemon=True, name=f"late-{channel.name}").start()

    def _leave(self) -> None:
        while True:
            self._asked.acquire()
            due, left, message = self._queue.popleft()
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                left.set_result(self._channel.send(*message))
            except BaseException as error:
                left.set_exception(error)

    def _send(self, data: Tensor, to: int, tag: int, what: str) -> Handle:
        left: Future[Handle] = Future()
        self._queue.append((time.perf_counter() + self._latency_s, left, (data, to, tag, what)))
        self._asked.release()
        return _Late(left)

    def _receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle:
        return self._channel.receive(data, source, tag, what)

    def gather(self, value: Any) -> list[Any]:
        time.sleep(self._latency_s)
        return self._channel.gather(value)

    def stop(self, reason: str) -> None:
        """What the channel itself does where it can say that a rank stops."""
        self._channel.stop(reason)


class LateLinks(Links):
    """All channels of a rank, late."""

    def __init__(self, links: Links, latency_s: float) -> None:
        self._links, self._latency_s, self.rank, self.size = links, latency_s, links.rank, links.size
        self.down, self.up, self.control = (
            LateChannel(channel, latency_s) for channel in (links.down, links.up, links.control)
        )

    def divide(self, cluster: Cluster) -> None:
        self._links.divide(cluster)
        self.commits = LateChannel(self._links.commits, self._latency_s)

    def channel(self, name: str, members: range) -> Channel:
        return LateChannel(self._links.channel(name, members), self._latency_s)

    def close(self) -> None:
        self._links.close()
