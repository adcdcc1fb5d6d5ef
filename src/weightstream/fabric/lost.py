"""Which rank is lost, where each one only knows for whom it waited in vain.

A rank that stops makes others wait, and those others again. Whoever gives up says where all ranks met for whom it waited;
the one at the end of such a chain, who says nothing itself or has stopped for a reason of its own, is the cause.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

GRACE_S = 5.0
"""How long a rank that hangs may take to say that it, too, only waits; one whose connection is closed has said so before."""


class Board(Protocol):
    """What of `torch.distributed.Store` is used."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Lost:
    """The rank that is lost, and why, if it could say so."""

    rank: int
    reason: str | None = None


class Blame:
    """One rank's view of who is lost; safe for threads."""

    def __init__(self, board: Board, rank: int, timeout_s: float) -> None:
        self._board, self._rank = board, rank
        self._grace_s = min(GRACE_S, timeout_s / 4)
        self._lock = threading.Lock()
        self._lost: Lost | None = None

    def stop(self, reason: str) -> None:
        """This rank goes no further, for a reason of its own."""
        with self._lock:
            if self._lost is None:
                self._lost = Lost(self._rank, reason)
                self._within(1.0, lambda: self._board.set(f"stopped/{self._rank}", reason))

    def on(self, other: int, *, closed: bool) -> Lost:
        """Who is lost, when `other` was waited for in vain: this rank says so, and follows the chain from there.

        Args:
            closed: the connection is, so that `other` has ended, or has given up itself.
        """
        with self._lock:
            if self._lost is None:
                grace_s = min(self._grace_s, 1.0) if closed else self._grace_s
                found = self._within(2 * grace_s + 1.0, lambda: self._end_of_chain(other, grace_s))
                self._lost = found or Lost(other)
            return self._lost

    def _end_of_chain(self, other: int, grace_s: float) -> Lost:
        board = self._board
        board.set(f"waits/{self._rank}", f"{other}")
        seen, until = {self._rank}, time.monotonic() + grace_s
        last = other
        while last not in seen and time.monotonic() < until:
            if board.check([f"stopped/{last}"]):
                return Lost(last, board.get(f"stopped/{last}").decode())
            if board.check([f"waits/{last}"]):
                seen.add(last)
                last = int(board.get(f"waits/{last}"))
            else:
                time.sleep(0.02)
        return Lost(other if last in seen else last)  # in a circle ranks wait for each other

    def _within(self, limit_s: float, ask: Callable[[], T]) -> T | None:
        """The board may be gone or silent as well, and a call to it cannot be stopped."""
        found: list[T] = []

        def work() -> None:
            try:
                found.append(ask())
            except RuntimeError:
                pass

        thread = threading.Thread(target=work, name="fabric-blame", daemon=True)
        thread.start()
        thread.join(limit_s)
        return found[0] if found else None
