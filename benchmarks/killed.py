"""The process that `kills.py` kills: `weightstream.commands.run.fit`, in a fork of a process that has imported all it needs.

Importing PyTorch takes seconds, a small model's step a tenth of one, so that a kill in a process that must first import
would hit an import. A fork has what its parent has imported, and the parent has computed nothing: no other thread, no OpenMP
pool, no file of the run. From there on it does what the command does, and the kernel ends both alike: memory, locks and
threads go, direct I/O in the queue is finished or not.

What it is doing is noted in memory that outlives it (`Seen`), by wrappers around the functions that do it.
"""

import ctypes
import functools
import mmap
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

# What a run imports late, a fork would import at every start.
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from rich.console import Console

from weightstream.commands import run
from weightstream.config.config import RunConfig
from weightstream.engine.engine import Engine
from weightstream.runtime.runtime import Runtime
from weightstream.schedule.operations import Operation
from weightstream.store.device import Device
from weightstream.store.manifest import Manifest
from weightstream.store.store import Store
from weightstream.training.loop import Trainer

_OPERATIONS = tuple(kind.__name__.lower() for kind in get_args(Operation))
PHASES = (
    "starting", "opening", "between operations", *_OPERATIONS, "draining", "evaluating", "snapshot", "closing", "ended",
)  # fmt: skip
BACKGROUND = ("reading", "writing", "syncing", "publishing")
_PR_SET_PDEATHSIG = 1


class Seen(ctypes.Structure):
    """What a process said of itself: phase of its main thread, step at which it opened the store, last step that it
    finished (-1: none yet), and how many operations of each kind its other threads had under way."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("phase", "opened", "finished", *BACKGROUND))

    @property
    def during(self) -> tuple[str, ...]:
        return tuple(name for name in BACKGROUND if getattr(self, name) > 0)


class Fork:
    """A process that runs `work(seen)` and ends with the code that it returns; its output goes to `log`."""

    def __init__(self, work: Callable[[Seen], int], log: Path) -> None:
        self.seen = Seen.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))  # shared
        self.seen.opened = self.seen.finished = -1
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _child(work, self.seen, log)
        self._handle = os.pidfd_open(self._pid)

    def end(self, kill_after_s: float | None = None) -> int:
        """Wait for its end, which is SIGKILL after so many seconds; the code as `subprocess` gives it."""
        try:
            ended, _, _ = select.select([self._handle], [], [], kill_after_s)
        except BaseException:
            ended = []
            raise
        finally:
            if not ended:
                os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
            os.close(self._handle)
        return os.waitstatus_to_exitcode(status)


def fit(config: RunConfig, seen: Seen) -> int:
    """What the command `weightstream fit` does once it has its configuration."""
    _watch(seen)
    run.fit(config, Console(stderr=True, highlight=False, soft_wrap=True))
    seen.phase = PHASES.index("ended")
    return 0


def verify(store: Path) -> int:
    """What `weightstream store verify` does: 1 if anything is damaged."""
    with Store.open(store, writable=False) as opened:
        damage = opened.verify()
    print("\n".join(damage), flush=True)
    return int(bool(damage))


def check_alone(log: Path) -> None:
    """Make sure that a fork leaves no thread of this process behind.

    NumPy's OpenBLAS starts threads when it is imported. It knows of forks: it ends them before, and starts them again
    where they are needed. So a first fork tells them from threads that a fork would lose.

    Raises:
        SystemExit: there is a thread of the other kind.
    """
    Fork(lambda _: 0, log).end()
    if (found := len(list(Path("/proc/self/task").iterdir()))) > 1:
        raise SystemExit(f"a fork takes one thread along, this process has {found}; import less in killed.py")


def _child(work: Callable[[Seen], int], seen: Seen, log: Path) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = work(seen)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(seen: Seen) -> None:
    """Note what the engine and the store do; what they do stays the same."""
    _phase(seen, Engine, "__init__", "opening")
    _phase(seen, Engine, "close", "closing")
    _phase(seen, Runtime, "drain", "draining")
    _phase(seen, Trainer, "train", "between operations")
    _phase(seen, Trainer, "_validate", "evaluating")
    _phase(seen, Trainer, "_snapshot", "snapshot")
    _phase(seen, Runtime, "run", lambda runtime, operation: type(operation).__name__.lower())
    lock = threading.Lock()
    for name, owner, call in zip(
        BACKGROUND, (Device, Device, Device, Manifest), ("read", "write", "sync", "publish"), strict=True
    ):
        _count(seen, owner, call, name, lock)
    make, step = Trainer.__init__, Engine.step

    def made(trainer: Trainer, engine: Engine, *arguments: Any, **settings: Any) -> None:
        make(trainer, engine, *arguments, **settings)
        seen.opened = engine.step_count

    def stepped(engine: Engine, *arguments: Any, **settings: Any) -> Any:
        result = step(engine, *arguments, **settings)
        seen.finished = result.step  # before anybody else is told of it
        return result

    Trainer.__init__, Engine.step = made, stepped


def _phase(seen: Seen, owner: type, name: str, phase: str | Callable[..., str]) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def noted(*arguments: Any, **settings: Any) -> Any:
        before = seen.phase
        seen.phase = PHASES.index(phase if isinstance(phase, str) else phase(*arguments))
        try:
            return inner(*arguments, **settings)
        finally:
            seen.phase = before

    setattr(owner, name, noted)


def _count(seen: Seen, owner: type, name: str, field: str, lock: threading.Lock) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def counted(*arguments: Any, **settings: Any) -> Any:
        with lock:
            setattr(seen, field, getattr(seen, field) + 1)
        try:
            return inner(*arguments, **settings)
        finally:
            with lock:
                setattr(seen, field, getattr(seen, field) - 1)

    setattr(owner, name, counted)
