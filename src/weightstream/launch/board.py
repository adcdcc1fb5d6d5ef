"""What the launcher and the ranks that it started tell each other: small files in a folder that only they know.

The launcher asks for a stop; rank 0 says when it trains, and when it trains again after a loss; every rank says how it
ended, if it still can. No signal has to arrive at the right moment, and what was said stays until it is read.
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

AGENT = -1  # the agent's place among the endings of ranks


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank ended: the exit code of the command, and why, if it is not 0.

    `everywhere` is whether all ranks end for this reason; else it is the one rank's own.
    """

    code: int
    message: str = ""
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank that ended with an exit code other than 0; below 0 it is the signal that killed it."""

    exit_code: int
    pid: int


@dataclass(frozen=True, slots=True)
class Loss:
    """Ranks were lost and started anew: why, and how long it took from then to the end of the first step."""

    cause: str
    step: int
    seconds: float


class Board:
    """The folder. Every file in it appears whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        """Forget the last start's ranks."""
        for path in (
            *self.folder.glob("ended-*.json"),
            *(self.folder / name for name in ("training", "failures.json")),
        ):
            path.unlink(missing_ok=True)

    # a stop

    def ask_to_stop(self, number: int) -> None:
        self._write("stop.json", number)

    def stop_asked(self) -> signal.Signals | None:
        """The signal by which a person asked for a stop, as soon as one did."""
        number = self._read("stop.json")
        return None if number is None else signal.Signals(number)

    def say_training(self) -> None:
        """From now on a stop is looked for after each step."""
        self._write("training", True)

    def is_training(self) -> bool:
        return (self.folder / "training").exists()

    # the agent, and ends

    def say_agent(self) -> None:
        self._write("agent.json", os.getpid())

    def agent(self) -> int:
        """The process of which the ranks are children."""
        return int(self._read("agent.json"))

    def say_failures(self, failures: Mapping[int, Failure]) -> None:
        """What the agent saw, by rank."""
        self._write("failures.json", {str(rank): asdict(failure) for rank, failure in failures.items()})

    def failures(self) -> dict[int, Failure]:
        return {int(rank): Failure(**found) for rank, found in (self._read("failures.json") or {}).items()}

    def say_ended(self, rank: int, ending: Ending) -> None:
        self._write(f"ended-{rank}.json", asdict(ending))

    def endings(self) -> dict[int, Ending]:
        """By rank, those that could still say it."""
        found = {int(path.stem.removeprefix("ended-")): path.name for path in self.folder.glob("ended-*.json")}
        return {rank: Ending(**self._read(found[rank])) for rank in sorted(found)}

    # losses

    def say_lost(self, cause: str) -> None:
        """Ranks are started anew, because of this, unless they already are because of an earlier loss."""
        if (self.folder / "lost.json").exists():
            return
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        self._write("lost.json", {"cause": cause, "at_s": time.monotonic()})

    def say_trains_again(self, step: int) -> Loss | None:
        """The first step after a loss is done: keep and return what it cost; None if there was no loss."""
        lost = self._read("lost.json")
        if lost is None:
            return None
        loss = Loss(lost["cause"], step, time.monotonic() - lost["at_s"])
        self._write("losses.json", [*map(asdict, self.losses()), asdict(loss)])
        (self.folder / "lost.json").unlink()
        return loss

    def losses(self) -> list[Loss]:
        """All losses that training went on after."""
        return [Loss(**loss) for loss in self._read("losses.json") or []]

    def _write(self, name: str, value: Any) -> None:
        unfinished = self.folder / f"{name}.{os.getpid()}"
        unfinished.write_text(json.dumps(value), encoding="utf-8")
        unfinished.replace(self.folder / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
