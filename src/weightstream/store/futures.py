"""Futures that wait for one another without occupying a thread.

Everything asynchronous in the store is a `concurrent.futures.Future` that nobody can cancel: once issued, an operation
on a buffer runs to its end, and a future is done only when nothing touches that buffer any more.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class _Forgetful(Future[T]):
    """A future that keeps nothing of its callbacks once they were called: they hold the buffers of what they did."""

    def add_done_callback(self, fn: "Callable[[Future[T]], object]") -> None:
        waiting = [fn]
        super().add_done_callback(lambda finished: waiting.pop()(finished))


def new_future() -> "Future[Any]":
    """A future that is already running, so that it cannot be cancelled under an operation."""
    future: Future[Any] = _Forgetful()
    future.set_running_or_notify_cancel()
    return future


def done(value: T) -> "Future[T]":
    """A future that holds its result."""
    future: Future[T] = new_future()
    future.set_result(value)
    return future


NOW: "Future[None]" = done(None)
"""Done already: for all who wait for nothing."""


def settle(future: "Future[T]", action: Callable[[], T]) -> None:
    """Give the future what `action` returns or raises."""
    try:
        value = action()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)


def when_settled(futures: Iterable["Future[Any]"], action: Callable[[], None]) -> None:
    """Call `action` once all are done, well or not: here and now, or in the thread that ends the last one."""
    waiting = [future for future in futures if not future.done()]
    if not waiting:
        action()
        return
    lock = threading.Lock()
    remaining = len(waiting)

    def one_settled(_: "Future[Any]") -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            last = remaining == 0
        if last:
            action()

    for future in waiting:
        future.add_done_callback(one_settled)


def forward(source: "Future[T]", target: "Future[T]") -> None:
    """When `source` is done, `target` is done the same way."""
    source.add_done_callback(lambda finished: settle(target, finished.result))


def chain(
    waits: Iterable["Future[Any]"], start: Callable[[], "Future[T]"], out: "Future[T] | None" = None
) -> "Future[T]":
    """Start an operation once all of `waits` are settled, whatever became of them; done when the operation is."""
    target: Future[T] = new_future() if out is None else out

    def run() -> None:
        try:
            started = start()
        except BaseException as error:
            target.set_exception(error)
        else:
            forward(started, target)

    when_settled(waits, run)
    return target


def gather(futures: Iterable["Future[T]"]) -> "Future[list[T]]":
    """All results in order, or the first failure in order; done only when every one of them is settled."""
    sources = list(futures)
    target: Future[list[T]] = new_future()
    when_settled(sources, lambda: settle(target, lambda: [source.result() for source in sources]))
    return target
