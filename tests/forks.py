"""Processes that are forked from one that has imported everything, where new interpreters would do the same later.

A new interpreter needs seconds of a core for torch and transformers, more than most of what tests of processes do. A
`Command` runs what is given to `python` in a fork of a server that has them, and so does whatever it starts itself with
`sys.executable`, as the launcher its agent and the agent its ranks: each a process of its own, with the parent, the
session, the environment, the signals and the files that a new one would have. Not all is forked: that a command starts
by itself is for tests with `subprocess`.
"""

import atexit
import gc
import inspect
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.launcher.api", "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama", "weightstream.cli", "weightstream.commands.fit",
        "weightstream.commands.run", "weightstream.fabric.distributed", "weightstream.config.presets",
        "tests.distributed.processes", __name__,
    ]
)  # fmt: skip
_STARTED: list["Command"] = []


class Command:
    """What `subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)` is for a command that begins with `python`.

    Args:
        command: the interpreter, and what it is told: `-m` and a module, `-c` and a program, or a file; and arguments.
        folder: where its output is kept.
    """

    def __init__(self, command: Iterable[object], folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._outputs = []
        for name in (".stdout-", ".stderr-"):
            handle, path = tempfile.mkstemp(prefix=name, dir=folder)
            os.close(handle)
            self._outputs.append(Path(path))
        told = ([str(part) for part in command], dict(environment), Path.cwd(), self._outputs)
        self._process = CONTEXT.Process(target=_first, args=told)
        self._process.start()
        _STARTED.append(self)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout, *(path.read_bytes() for path in self._outputs))
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@atexit.register
def _end_all() -> None:
    """A failed test leaves processes behind, for which this one would wait."""
    for command in _STARTED:
        command.kill()


def _first(command: list[str], environment: dict[str, str], folder: Path, outputs: list[Path]) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.chdir(folder)
    for handle, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), handle)
    gc.freeze()  # what was imported is never garbage: collections need not look through it
    subprocess.Popen = subprocess_handler.Popen = _Forked  # type: ignore[misc]
    _become(command, environment)


_EXECUTE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A child that is forked where a new interpreter was asked for."""

    def _execute_child(self, *arguments: Any) -> None:
        told = _EXECUTE.bind(self, *arguments).arguments
        command = [] if isinstance(told["args"], str | bytes) else [os.fspath(part) for part in told["args"]]
        if command[:1] != [sys.executable] or (command[1][0] == "-" and command[1] not in ("-m", "-c")):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        environment = dict(os.environ if told["env"] is None else told["env"])
        streams = [told[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        ready, say_ready = os.pipe()
        sys.stdout.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # none is for the parent's handlers
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if told["start_new_session"]:
                    os.setsid()
                if told["cwd"] is not None:
                    os.chdir(told["cwd"])
                _let_go(streams)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            _become(command, environment)
        self._child_created = True
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(say_ready)
        os.read(ready, 1)  # ends when the child has let go of its end
        os.close(ready)
        self._close_pipe_fds(*(told[name] for name in _PIPES))  # type: ignore[attr-defined]


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _let_go(streams: list[int]) -> None:
    """What a new interpreter would not have: the parent's handlers, and all its files but these three.

    Their numbers stay taken, as objects that nobody uses any more may close them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    for handle, given in enumerate(streams):
        if given not in (-1, handle):
            os.dup2(given, handle)
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if handle > 2:
            os.dup2(nothing, handle)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Do what the interpreter would do with the rest of the command, to its end."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # what it was may have been replaced
        code = _run(command[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(told: list[str]) -> int:
    try:
        if told[0] == "-m":
            sys.argv = told[1:]
            runpy.run_module(told[1], run_name="__main__", alter_sys=True)
        elif told[0] == "-c":
            sys.argv = ["-c", *told[2:]]
            exec(compile(told[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            sys.argv = told
            sys.path.insert(0, str(Path(told[0]).parent))
            runpy.run_path(told[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
