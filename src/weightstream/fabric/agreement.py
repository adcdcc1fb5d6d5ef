"""Ranks agree: what one of them refuses all refuse with the same message, at the next place where they meet.

A rank that refuses brings that to the next `gather` instead of its value, whatever the others meet for. So nobody waits
for it, and nobody goes on.
"""

import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from weightstream.errors import RefusedError, WeightstreamError

T = TypeVar("T")
_REFUSED = "(refused)"
_HEARTBEAT_S = 0.2


class Gathering(Protocol):
    """The part of `Links` that is needed here."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, value: Any) -> list[Any]:
        """Every rank's small JSON value, in order of rank."""


def gather(links: Gathering, value: Any) -> list[Any]:
    """Every rank's small JSON value, in order of rank: a collective.

    Raises:
        RefusedError: a rank has refused meanwhile.
    """
    return _checked(links.gather(value))


def together(links: Gathering, work: Callable[[], T]) -> T:
    """Do something on every rank, and go on if nobody refuses: a collective.

    `work` may itself gather. What it raises as a `WeightstreamError` or an `OSError` counts as refused; that a rank was
    lost, which nobody can be told then, and mistakes of ours go their way.

    Raises:
        RefusedError: a rank refused; on all ranks, naming it if not all of them did so.
    """
    try:
        result = work()
    except (RefusedError, ConnectionError, TimeoutError):
        raise  # the others have it already, or nobody can be told
    except (WeightstreamError, OSError) as error:
        _checked(links.gather({_REFUSED: str(error), "host": socket.gethostname()}))
        raise AssertionError("a refusal was gathered, and not found") from error
    _checked(links.gather(None))
    return result


def _checked(values: list[Any]) -> list[Any]:
    refused = {rank: value for rank, value in enumerate(values) if isinstance(value, dict) and _REFUSED in value}
    if not refused:
        return values
    first, told = next(iter(refused.items()))
    message = told[_REFUSED]
    same = [rank for rank, value in refused.items() if value[_REFUSED] == message]
    if len(same) < len(values):
        others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        message = f"rank {first} on {told['host']}{others}: {message}"
    raise RefusedError(message)


def meanwhile(gather: Callable[[bool], list[bool]], work: Callable[[], T] | None) -> Callable[[], T | None]:
    """Do something in a thread, however long it takes, while the ranks assure each other that they are there; a rank
    without work waits for the others. Gives what the work returned or raised as a function that does it again."""
    done: list[Callable[[], T | None]] = []
    helper = threading.Thread(target=lambda: done.append(_outcome_of(work)) if work else None, name="slow", daemon=True)
    helper.start()
    while any(gather(helper.is_alive())):
        helper.join(_HEARTBEAT_S)
    return done[0] if done else lambda: None


def _outcome_of(work: Callable[[], T]) -> Callable[[], T]:
    """Does the work; gives what it returned or raised as a function that does it again."""
    try:
        result = work()
    except BaseException as error:
        raised = error

        def again() -> T:
            raise raised

        return again
    return lambda: result
