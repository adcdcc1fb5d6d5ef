"""Published figures against what the simulator predicts: one row calibrates, the others are held to it as they come."""

from dataclasses import dataclass, replace
from functools import cache

from weightstream.simulator.clusters import cluster_named
from weightstream.simulator.jobs import Job
from weightstream.simulator.models import model_named
from weightstream.simulator.outcomes import Outcome, run
from weightstream.simulator.published import FIGURES, GPT_J_ONE, Figure

SETTLED = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure as published and as predicted."""

    figure: Figure
    predicted: float

    @property
    def off(self) -> float:
        """How far, relative to what was published."""
        return self.predicted / self.figure.published - 1

    @property
    def passes(self) -> bool:
        return abs(self.off) <= self.figure.tolerance

    @property
    def reason(self) -> str:
        """Why a row fails; empty where it does not."""
        if self.passes:
            return ""
        return f"{self.off:+.1%} against a tolerance of {self.figure.tolerance:.0%}: " + (
            self.figure.otherwise or "unexplained"
        )

    def to_json(self) -> dict[str, object]:
        """The row with all that it rests on."""
        figure = self.figure
        return {
            "name": figure.name, "quantity": figure.quantity, "published": figure.published, "predicted": self.predicted,
            "tolerance": figure.tolerance, "pass": self.passes, "reason": self.reason, "calibrates": figure.calibrates,
            "assumes": figure.assumes, "source": figure.source,
        }  # fmt: skip


def calibrate_efficiency() -> float:
    """The share of a CS-2's peak inside a layer at which its one calibrating row is met; nothing else is looked at."""
    job = _job(GPT_J_ONE, 1)
    efficiency = job.cluster.efficiency
    for _ in range(20):
        reached = run(replace(job, efficiency=efficiency)).samples_per_s
        if abs(reached / GPT_J_ONE.published - 1) < SETTLED:
            break
        efficiency *= GPT_J_ONE.published / reached
    return efficiency


@cache
def validate() -> tuple[Row, ...]:
    """All rows, in the order in which they are kept; of nothing but presets, so that a process computes them once."""
    return tuple(Row(figure=figure, predicted=_predict(figure)) for figure in FIGURES)


def _predict(figure: Figure) -> float:
    found = run(_job(figure, figure.workers))
    match figure.quantity:
        case "samples per second":
            return found.samples_per_s
        case "scaling efficiency":
            return _each(found) / _each(run(_job(figure, figure.base)))
        case "I/O seconds per direction and step":
            link = found.job.cluster.link
            assert link is not None
            return found.down_bytes / link.bytes_per_s


def _each(found: Outcome) -> float:
    return found.tokens_per_s / found.job.workers


def _job(figure: Figure, workers: int) -> Job:
    return Job(
        model=model_named(figure.model), cluster=cluster_named(figure.cluster), workers=workers,
        batch=figure.each * workers, sequence=figure.sequence,
    )  # fmt: skip
