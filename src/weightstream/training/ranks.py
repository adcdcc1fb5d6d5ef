"""What the ranks of a run tell each other after each step: whether somebody asked to stop, and what the step cost each."""

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weightstream.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from weightstream.engine import Engine, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank's step: seconds in all, those in which it waited for bytes, and bytes that it sent each way."""

    seconds: float
    stalled_s: float
    down_bytes: int
    up_bytes: int
    rss_bytes: int


class RankTalk:
    """After each step every rank knows the facts of all, and all stop after the same step.

    Args:
        stop_asked: by which signal a person asked this rank, or the launcher, to stop.
    """

    def __init__(self, engine: "Engine", stop_asked: Callable[[], signal.Signals | None]) -> None:
        self._engine, self._stop_asked = engine, stop_asked
        self._sent = (0, 0)
        self._agreed: signal.Signals | None = None

    @property
    def stop(self) -> signal.Signals | None:
        """The signal by which a person asked for a stop: all ranks have the same answer.

        One rank alone looks again each time, since a signal may have come after its step.
        """
        return self._stop_asked() if self._engine.cluster.size == 1 else self._agreed

    def before_steps(self) -> None:
        """A stop may have been asked for before the first step."""
        self._agree(self._engine.gather(self._stop_asked()))

    def after_step(self, result: "StepResult", seconds: float, rss_bytes: int) -> list[RankFacts]:
        """The facts of every rank, in order; of one alone none."""
        if self._engine.cluster.size == 1:
            return []
        down, up = self._engine.sent_bytes()
        before, self._sent = self._sent, (down, up)
        own = RankFacts(
            seconds=seconds, stalled_s=result.stalled_s, down_bytes=down - before[0], up_bytes=up - before[1],
            rss_bytes=rss_bytes,
        )  # fmt: skip
        told: list[Any] = self._engine.gather([self._stop_asked(), asdict(own)])
        self._agree([number for number, _ in told])
        return [RankFacts(**facts) for _, facts in told]

    def _agree(self, asked: list[int | None]) -> None:
        number = next((number for number in asked if number is not None), None)
        self._agreed = None if number is None else signal.Signals(number)


def describe(ranks: list[RankFacts], first_computing: int) -> str:
    """One line: ranks present, bytes between them, and who waited least, which is whom the others waited for."""
    if not ranks:
        return ""
    computing = ranks[first_computing:]
    slowest = min(range(len(computing)), key=lambda index: computing[index].stalled_s)
    lost = sum(facts.stalled_s for facts in computing) / len(computing)
    return (
        f"{len(ranks)} ranks  down {format_bytes(sum(facts.down_bytes for facts in ranks))}  up "
        f"{format_bytes(sum(facts.up_bytes for facts in ranks))}  slowest rank {first_computing + slowest}  waited "
        f"{format_seconds(lost)} each"
    )
