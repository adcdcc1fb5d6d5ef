"""What comes of sums from other ranks, in the order of its use: some of it is under way all the time."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weightstream.fabric.links import Channel, Handle

POSTED = 64  # receives that are posted before their bytes come


@dataclass(frozen=True, slots=True)
class Message:
    """A chunk of one layer of a sum that comes from another rank; `straight` is where it is to be, if it need not be added."""

    source: int
    tag: int
    elements: int
    straight: Tensor | None
    what: str


class Coming:
    """What comes of sums, in the order of its use; some of it is under way all the time, of the next block as well.

    Args:
        ahead: chunks that are under way or in use and need memory of their own.
        elements: of a chunk, at most.
    """

    def __init__(self, channel: Channel, ahead: int, elements: int) -> None:
        self._channel, self._ahead, self._elements = channel, ahead, elements
        self._lock = threading.Lock()  # messages are added by another thread
        self._messages: deque[Iterator[Message]] = deque()
        self._following: Message | None = None
        self._posted: deque[tuple[Tensor, Tensor | None, Handle]] = deque()
        self._free: list[Tensor] = []
        self._borrowed = 0
        self._in_use: Tensor | None = None

    def extend(self, messages: Iterable[Message]) -> None:
        """These come after all others."""
        with self._lock:
            self._messages.append(iter(messages))
            self._post()

    def next(self) -> Tensor:
        """The next one, once it is here; what was given out before is overwritten."""
        with self._lock:
            self._release()
            self._post()
            data, self._in_use, handle = self._posted.popleft()
        handle.wait()
        return data

    def give_back(self) -> None:
        """What was given out last is no longer needed."""
        with self._lock:
            self._release()
            self._post()

    def _release(self) -> None:
        if self._in_use is not None:
            self._free.append(self._in_use)
            self._in_use = None
            self._borrowed -= 1

    def _post(self) -> None:
        while len(self._posted) < POSTED and (message := self._peek()) is not None:
            data, buffer = message.straight, None
            if data is None:
                if self._borrowed == self._ahead:
                    return
                buffer = (
                    self._free.pop() if self._free else torch.empty(self._elements)
                )  # untouched beyond a smaller unit
                data = buffer[: message.elements]
                self._borrowed += 1
            handle = self._channel.receive(data, message.source, message.tag, message.what)
            self._posted.append((data, buffer, handle))
            self._following = None

    def _peek(self) -> Message | None:
        while self._following is None and self._messages:
            self._following = next(self._messages[0], None)
            if self._following is None:
                self._messages.popleft()
        return self._following
