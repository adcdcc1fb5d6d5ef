"""A process that carries out one function of `training.py`, tells what happens meanwhile, and may be killed at any moment.

It is forked from a server that has imported all it needs, since that takes longer than some steps of training.
"""

import gc
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any

from weightstream.errors import WeightstreamError

_CONTEXT = mp.get_context("forkserver")
_TRAINING = "weightstream.demo_120t.training"
_PATIENCE_S = 60.0

Message = tuple[str, dict[str, Any]]
"""What it is about, and its facts. The last one is "done", with what the function returned."""


class Child:
    """The process. Leave it as a context manager, so that nothing of it stays."""

    def __init__(self, function: str, *arguments: Any, **settings: Any) -> None:
        _CONTEXT.set_forkserver_preload([_TRAINING])
        self._pipe, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, function, arguments, settings))
        self._process.start()
        theirs.close()

    def messages(self) -> Iterator[Message]:
        """All that it says from now on, until it ends.

        Raises:
            WeightstreamError: it failed.
        """
        while True:
            try:
                kind, facts = self._pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                return
            if kind == "error":
                raise WeightstreamError(f"a process of the demo failed: {facts['text']}")
            yield kind, facts

    def kill(self) -> None:
        """SIGKILL, if it has not ended."""
        self._process.kill()
        self._process.join()

    @property
    def code(self) -> int | None:
        """How it ended, negative for a signal; None if it has not."""
        return self._process.exitcode

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._process.join(_PATIENCE_S)
        self.kill()
        self._pipe.close()


def _serve(pipe: Connection, function: str, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    work = getattr(import_module(_TRAINING), function)
    gc.freeze()  # what was imported is never garbage: collections, of which each engine does one, need not look through it
    try:
        pipe.send(("done", work(lambda kind, facts: pipe.send((kind, facts)), *arguments, **settings)))
    except Exception as error:
        pipe.send(("error", {"text": str(error) if isinstance(error, WeightstreamError) else repr(error)}))
        if not isinstance(error, WeightstreamError):
            raise


def _end_with_parent() -> None:
    """A demonstration that is killed takes its processes along: its store is then free for who goes on."""
    parent = mp.parent_process()
    assert parent is not None, "it has one"
    wait([parent.sentinel])
    os._exit(1)
