"""What the ranks of a run tell each other after each step: whether somebody asked to stop, and what the step cost each."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightstream.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from weightstream.engine.engine import Engine
    from weightstream.engine.steps import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank's step: seconds in all, those in which it waited for bytes, and what it sent by the rank that it went to:
    bytes of weights, of gradients."""

    seconds: float
    stalled_s: float
    sent: dict[int, tuple[int, int]]
    rss_bytes: int

    @property
    def down_bytes(self) -> int:
        """Of weights, to all."""
        return sum(down for down, _ in self.sent.values())

    @property
    def up_bytes(self) -> int:
        """Of gradients, to all."""
        return sum(up for _, up in self.sent.values())

    def sent_figures(self) -> dict[str, int]:
        """For metrics: in all each way, and by link."""
        by_link = {f"sent_to_{rank}_bytes": down + up for rank, (down, up) in self.sent.items()}
        return {"down_bytes": self.down_bytes, "up_bytes": self.up_bytes, **by_link}


class RankTalk:
    """After each step every rank knows the facts of all, and all stop after the same step.

    Args:
        stop_asked: by which signal a person asked this rank, or the launcher, to stop.
    """

    def __init__(self, engine: "Engine", stop_asked: Callable[[], signal.Signals | None]) -> None:
        self._engine, self._stop_asked = engine, stop_asked
        self._sent: dict[int, tuple[int, int]] = {}
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
        before, self._sent = self._sent, self._engine.sent_bytes()
        sent = [
            [rank, *(now - then for now, then in zip(both, before.get(rank, (0, 0)), strict=True))]
            for rank, both in self._sent.items()
        ]
        told: list[Any] = self._engine.gather([self._stop_asked(), seconds, result.stalled_s, sent, rss_bytes])
        self._agree([number for number, *_ in told])
        return [
            RankFacts(
                seconds=seconds, stalled_s=stalled_s, sent={rank: (down, up) for rank, down, up in links},
                rss_bytes=rss_bytes,
            )
            for _, seconds, stalled_s, links, rss_bytes in told
        ]  # fmt: skip

    def _agree(self, asked: list[int | None]) -> None:
        number = next((number for number in asked if number is not None), None)
        self._agreed = None if number is None else signal.Signals(number)


def describe(ranks: list[RankFacts], first_computing: int) -> str:
    """One line: ranks present, bytes between them, the link with the most, and who waited least, which is whom the others
    waited for."""
    if not ranks:
        return ""
    computing = ranks[first_computing:]
    slowest = min(range(len(computing)), key=lambda index: computing[index].stalled_s)
    lost = sum(facts.stalled_s for facts in computing) / len(computing)
    links = {(sum(both), rank, to) for rank, facts in enumerate(ranks) for to, both in facts.sent.items()}
    most, source, target = max(links, default=(0, 0, 0))
    return (
        f"{len(ranks)} ranks  down {format_bytes(sum(facts.down_bytes for facts in ranks))}  up "
        f"{format_bytes(sum(facts.up_bytes for facts in ranks))}  {source}\u2192{target} {format_bytes(most)}  slowest "
        f"{first_computing + slowest}  waited {format_seconds(lost)}"
    )
