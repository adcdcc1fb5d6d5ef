"""Stopping between steps: somebody asks for it, the loop looks.

Ctrl-C and SIGTERM ask a process that was started by itself or by another launcher; our own launcher asks on its board.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

_HEARD = "finishing this step, then committing; once more stops at once and loses the step"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(Protocol):
    """Whether a stop was asked for."""

    @property
    def signal(self) -> signal.Signals | None:
        """The signal by which a person asked, as soon as one did."""

    def listening(self) -> Any:
        """A context in which requests are heard."""


class StopRequest:
    """Remembers the first signal; the second of them does what it always did, which loses the step in flight."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listen within the block; must be entered in the main thread, as Python's signals go."""
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        self._tell(f"{self.signal.name}: {_HEARD}")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class StopElsewhere:
    """A stop that somebody else hears and passes on: `asked` tells whether, `ready` tells them that it is looked at."""

    def __init__(
        self, asked: Callable[[], signal.Signals | None], ready: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._asked, self._ready, self._tell = asked, ready, tell
        self._heard: signal.Signals | None = None

    @property
    def signal(self) -> signal.Signals | None:
        if self._heard is None and (asked := self._asked()) is not None:
            self._heard = asked
            self._tell(f"{asked.name}: {_HEARD}")
        return self._heard

    @contextmanager
    def listening(self) -> Iterator["StopElsewhere"]:
        self._ready()
        yield self
