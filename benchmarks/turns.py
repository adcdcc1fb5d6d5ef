"""Comparing ways of training in turn: each side is a process of its own, and only one of them runs at any time.

A side that is not in turn is stopped (SIGSTOP), so that work it left behind (an update that overlaps the next step, a
write still queued) goes on in its own time and not in its opponent's. Sides speak JSON lines over standard input and
a private copy of standard output; whatever a library prints goes to standard error.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rss import PeakRss, disk_bytes

_PR_SET_PDEATHSIG = 1


class Steps(Protocol):
    """What a side's process offers: one training step, and a close that flushes; both return facts as JSON."""

    def step(self) -> dict[str, Any]: ...

    def close(self) -> dict[str, Any]: ...


def serve(start: Callable[[], Steps]) -> None:
    """The loop of a side's process: `start()`, then steps on command until told to close."""
    if sys.platform == "linux":  # a side may be stopped when its parent is killed: it must not stay behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(fact: dict[str, Any]) -> None:
        replies.write(json.dumps(fact) + "\n")

    side = start()
    reply({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "close":
            reply(side.close())
            return
        seconds, facts = [], []
        for _ in range(command["count"]):
            started = time.perf_counter()
            facts.append(side.step())
            seconds.append(time.perf_counter() - started)
        reply({"seconds": seconds, "facts": facts})


class SideEndedError(RuntimeError):
    """A side's process ended by itself; `code` as `subprocess` gives it, negative for a signal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Side:
    """One contestant: its name, the command that starts its process, and what was measured of it so far.

    `enter` runs in the child before its program does (a memory limit must hold before the first allocation).

    Raises:
        SideEndedError: the process ended before it was told to, or did not answer in `time_limit_s`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        enter: Callable[[], None] | None = None,
        time_limit_s: float = 1800.0,
    ) -> None:
        self.name, self.command = name, [str(part) for part in command]
        self.time_limit_s = time_limit_s
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.turns: list[float] = []  # seconds per step, one figure per counted turn
        self.last_steps: list[float] = []  # seconds of the last step of each of them, by the side's own clock
        self.facts: list[dict[str, Any]] = []  # of every counted step
        self._disk: list[tuple[int, int, int]] = []  # bytes read, bytes written, steps of every counted turn
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True, preexec_fn=enter,
            )  # fmt: skip
        self.peak = PeakRss(self.process.pid)
        self._receive()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def _receive(self) -> dict[str, Any]:
        # A side answers with one whole line, so nothing waits in the buffer where the pipe is empty.
        answered, _, _ = select.select([self.process.stdout], [], [], self.time_limit_s)
        if not answered:
            self.abandon()
            raise SideEndedError(f"side {self.name!r} gave no answer within {self.time_limit_s:.0f} s", -signal.SIGKILL)
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SideEndedError(f"side {self.name!r} ended with code {code}; log {self.log} ends with:\n{tail}", code)
        self.peak.look()
        return json.loads(line)

    def _ask(self, **command: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def turn(self, steps: int, *, counted: bool) -> float:
        """Run `steps` steps, then stop the process; seconds per step, by this process's clock."""
        before = disk_bytes(self.process.pid)
        started = time.perf_counter()
        reply = self._ask(do="steps", count=steps)
        seconds = (time.perf_counter() - started) / steps
        self._signal(signal.SIGSTOP)
        if counted:
            self.turns.append(seconds)
            self.last_steps.append(reply["seconds"][-1])
            after = disk_bytes(self.process.pid)
            self._disk.append((after[0] - before[0], after[1] - before[1], steps))
            self.facts.extend(reply["facts"])
        return seconds

    def take_back(self) -> None:
        """The last counted turn does not count after all."""
        _, _, steps = self._disk.pop()
        del self.turns[-1:], self.last_steps[-1:], self.facts[-steps:]

    @property
    def disk_read_bytes_per_step(self) -> float:
        """As the kernel counts them for the process (buffered reads served from memory are not among them)."""
        return sum(read for read, _, _ in self._disk) / max(sum(steps for *_, steps in self._disk), 1)

    @property
    def disk_written_bytes_per_step(self) -> float:
        return sum(written for _, written, _ in self._disk) / max(sum(steps for *_, steps in self._disk), 1)

    def close(self) -> dict[str, Any]:
        """Let it flush and end; its final facts."""
        facts = self._ask(do="close")
        self.process.wait()
        return facts

    def abandon(self) -> None:
        """End the process, whatever it is doing."""
        if self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()


def in_turn(
    sides: Sequence[Side], *, turns: int, steps: int, warm_up: int, between: Callable[[int], None] | None = None
) -> None:
    """A B A B …: `turns` counted turns of `steps` steps for each side, after `warm_up` steps of each that do not count.

    `between(turn)` runs after each round, with every side stopped.
    """
    for side in sides:
        side.turn(warm_up, counted=False)
    for number in range(turns):
        for side in sides:
            seconds = side.turn(steps, counted=True)
            print(f"turn {number + 1}/{turns}  {side.name:<10} {seconds:.3f} s per step", file=sys.stderr)
        if between is not None:
            between(number)
