"""`fit` with several ranks on one host: starts them, starts them anew when one is lost, and leaves none behind.

    launcher (this process)  →  agent (torchrun's launcher)  →  ranks

A stop is asked for on the board (see `board.py`), not by signals, which would have to find every rank ready for them.
Each child is killed by the kernel when its parent ends, so none outlives the launcher, however that ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from weightstream.cluster import LASTING_VARIABLE
from weightstream.launch.board import Board, Ending
from weightstream.system.folders import memory_folder, temporary_folder
from weightstream.system.processes import Process, children

Say = Callable[[str], None]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_EVERY_S = 0.1
_GRACE_S = 3.0  # for the others, after one rank was lost; they are killed, which a store survives
_FAREWELL_S = 30.0  # for a rank whose work is done, and for an agent without ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start: `python COMMAND… --launched BOARD ARGUMENTS…`, so many times."""

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    ranks: int
    address: str
    port: int
    threads: int
    """What OMP_NUM_THREADS is for each rank; torchrun would make it 1."""
    store: Path
    """For which memory is kept from one start of the ranks to the next."""
    restarts: int
    """How many losses in a row, without progress in between, are answered by starting anew."""


class Launcher:
    """Runs a `Launch` to its end; one object per command."""

    def __init__(self, launch: Launch, say: Say, progress: Callable[[], int]) -> None:
        """`progress` tells how far the store's last commit is; it is asked when a rank was lost."""
        self.launch, self._say, self._progress = launch, say, progress
        self._stop: signal.Signals | None = None
        self._at_once = False
        self._agent: subprocess.Popen[bytes] | None = None
        self._ranks: set[Process] = set()
        self._killed: set[int] = set()

    def run(self) -> int:
        """The exit code of the command: 0, 1 if ranks were lost again and again, 2, or 128 and a signal's number."""
        with (
            temporary_folder("weightstream-ranks-") as folder,
            memory_folder(self.launch.store) as memory,
            self._listening(),
        ):
            self._board, self._memory = Board(folder), memory
            last, losses = self._progress(), 0
            while True:
                self._start_and_watch()
                endings = self._board.endings()
                if said := _refusal(endings, self.launch.ranks):
                    self._say(f"weightstream: {said}")
                    return 2
                ended_well = sum(ending.code != 1 for ending in endings.values()) == self.launch.ranks
                if self._stop is not None and not (ended_well and endings[0].code == 0):
                    return self._stopped(ended_well)
                if ended_well:
                    return endings[0].code
                cause = self._cause(endings)
                now = self._progress()
                last, losses = now, 1 if now > last else losses + 1
                if losses > self.launch.restarts:
                    self._say(
                        f"weightstream: {cause}; given up after {losses - 1} restarts without progress (cluster.restarts="
                        f"{self.launch.restarts}); the store holds the last commit, and the same command goes on from it"
                    )
                    return 1
                self._say(
                    f"{cause}; starting all {self.launch.ranks} ranks anew from the last commit (restart {losses} of at "
                    f"most {self.launch.restarts} without progress)"
                )
                self._board.say_lost(cause)

    # one start

    def _start_and_watch(self) -> None:
        launch, board = self.launch, self._board
        board.begin()
        self._ranks.clear()
        self._killed.clear()
        command = [
            sys.executable, "-m", "weightstream.launch.agent", "--launcher", str(os.getpid()), "--board", str(board.folder),
            "--ranks", str(launch.ranks), "--address", launch.address, "--port", str(launch.port), "--",
            *launch.command, "--launched", str(board.folder), *launch.arguments,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(launch.threads)}
        if self._memory is not None:
            environment[LASTING_VARIABLE] = str(self._memory)
        self._agent = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the launcher alone
        )
        try:
            self._watch(self._agent)
        finally:
            self._kill_all()
            self._agent.wait()

    def _watch(self, agent: "subprocess.Popen[bytes]") -> None:
        """Return when the agent has ended; see to it that it does, once a rank has."""
        first_end_s: float | None = None
        while agent.poll() is None:
            alive = children(agent.pid)
            self._ranks.update(alive)
            if self._at_once or (self._stop is not None and not self._board.is_training()):
                return
            if first_end_s is None and len(alive) < len(self._ranks):
                first_end_s = time.monotonic()
            if first_end_s is not None and time.monotonic() - first_end_s > self._patience_s(alive):
                for rank in alive:
                    rank.kill()
                    self._killed.add(rank.pid)
                if not alive:
                    return
            try:
                agent.wait(_LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                pass

    def _patience_s(self, alive: list[Process]) -> float:
        """How long ranks may stay after the first one ended: all end together, unless one was lost."""
        ended = len(self._ranks) - len(alive)
        well = sum(ending.code != 1 for ending in self._board.endings().values())
        return _FAREWELL_S if well >= ended else _GRACE_S

    def _kill_all(self) -> None:
        agent = self._agent
        assert agent is not None
        ranks = self._ranks.union(children(agent.pid))
        if agent.poll() is None:
            agent.kill()  # first: it would take the end of its ranks for a loss of its own
        for rank in ranks:
            rank.kill()

    # a stop

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:
            self._at_once = True
            return
        self._stop = signal.Signals(number)
        self._board.ask_to_stop(number)

    def _stopped(self, ended_well: bool) -> int:
        assert self._stop is not None
        if not ended_well:
            self._say(f"{self._stop.name}: stopped at once; the store holds the last commit")
        return 128 + self._stop.value

    # a loss

    def _cause(self, endings: dict[int, Ending]) -> str:
        """Which rank was lost, and how, as far as anybody could tell."""
        failures = self._board.failures()
        killed = {
            rank: signal.Signals(-failure.exit_code)
            for rank, failure in sorted(failures.items())
            # The agent sends SIGTERM to those that remain, and the launcher ends those that do not follow.
            if failure.exit_code < 0 and -failure.exit_code != signal.SIGTERM and failure.pid not in self._killed
        }
        for rank, number in killed.items():
            hint = " (by a person, or by the system for want of memory)" if number is signal.SIGKILL else ""
            return f"rank {rank} was killed by {number.name}{hint}"
        for rank, ending in endings.items():
            if ending.code == 1:
                return f"rank {rank} ended: {ending.message}"
        for rank, failure in sorted(failures.items()):
            if failure.exit_code > 0:
                return f"rank {rank} ended with exit code {failure.exit_code}"
        return "the ranks' launcher ended before them"


def _refusal(endings: dict[int, Ending], ranks: int) -> str | None:
    """What a person must put right, in the words of the rank that met it."""
    refused = {rank: ending for rank, ending in endings.items() if ending.code == 2}
    if not refused:
        return None
    for ending in refused.values():
        if ending.everywhere:
            return ending.message
    rank, ending = min(refused.items())
    same = sum(other.message == ending.message for other in refused.values())
    return ending.message if same == ranks else f"rank {rank}: {ending.message}"
