"""Predicted against measured, by kind of operation and resource: what one rank does in one step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightstream.trace.files import Measured, Trace, last_step
from weightstream.trace.spans import RESOURCES, Span, Total, Totals, extent, totals
from weightstream.units import format_bytes

NOT_PREDICTED = "no prediction was made for this run: it needs a profile of this machine (weightstream calibrate)"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind on one resource, per step and rank; None where there is no prediction at all."""

    kind: str
    resource: str
    measured: Total
    predicted: Total | None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured seconds."""
        if self.predicted is None or not self.measured.seconds:
            return None
        return self.predicted.seconds / self.measured.seconds

    def to_json(self) -> dict[str, object]:
        found: dict[str, object] = {"kind": self.kind, "resource": self.resource}
        for name, total in (("measured", self.measured), ("predicted", self.predicted)):
            found[name] = total and {
                "count": total.count, "seconds": total.seconds, "waited_s": total.waited_s, "bytes": total.nbytes,
            }  # fmt: skip
        return found | {"ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows, longest first on each resource, and the whole step; `steps` were measured."""

    steps: int
    step_s: float
    predicted_s: float | None
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "step_s": self.step_s,
            "predicted_s": self.predicted_s,
            "ratio": self.predicted_s / self.step_s if self.predicted_s and self.step_s else None,
            "rows": [row.to_json() for row in self.rows],
            "note": None if self.predicted_s is not None else NOT_PREDICTED,
        }


def compare(predicted: Iterable[Span], measured: Iterable[Span]) -> list[Row]:
    """Rows per kind and resource of spans, each side per step and rank."""
    return rows_of(per_step(predicted), per_step(measured))


def per_step(spans: Iterable[Span]) -> Totals | None:
    """What one rank does in one step, on average; None of nothing."""
    found = list(spans)
    count = len({(span.step, span.rank) for span in found})
    return _scaled(totals(found), 1 / count) if count else None


def compared(trace: Trace) -> Comparison | None:
    """What a run's folder allows to compare: the ranks that were predicted, in all steps that were measured; None if nothing
    was measured."""
    ranks = {span.rank for span in trace.predicted}
    counted = [each for rank, each in trace.measured.items() if each.steps and (not ranks or rank in ranks)]
    if counted:
        return _compared([_scaled(each.totals, 1 / each.steps) for each in counted], counted, trace.predicted)
    spans = [span for span in trace.spans if not ranks or span.rank in ranks]
    own = per_step(spans)
    if own is None:
        return None
    steps = {span.step for span in spans}
    seconds = sum(extent(span for span in spans if span.step == step)[1] for step in steps) / len(steps)
    return _compared([own], [Measured(len(steps), seconds, own)], trace.predicted)


def _compared(each: Sequence[Totals], counted: Sequence[Measured], predicted: Sequence[Span]) -> Comparison:
    mean: Totals = {}
    for found in each:
        for key, total in found.items():
            mean.setdefault(key, Total()).add(total, 1 / len(each))
    last = last_step(predicted)
    return Comparison(
        steps=max(measured.steps for measured in counted),
        step_s=max(measured.step_s for measured in counted),
        predicted_s=extent(last)[1] if last else None,
        rows=tuple(rows_of(per_step(last), mean)),
    )


def rows_of(predicted: Totals | None, measured: Totals | None) -> list[Row]:
    """Rows of what one step comes to, in order of resource and time."""
    keys = {**(measured or {}), **(predicted or {})}
    rows = [
        Row(*key, (measured or {}).get(key, Total()), None if predicted is None else predicted.get(key, Total()))
        for key in keys
    ]
    order = {resource: number for number, resource in enumerate(RESOURCES)}
    return sorted(rows, key=lambda row: (order.get(row.resource, len(order)), -row.measured.seconds, row.kind))


def text_of(found: Comparison, *, least: float = 0.0) -> str:
    """The comparison as a table.

    Args:
        least: rows of less than this part of a step on both sides are left out.
    """
    lines = [("operation", "resource", "measured s", "predicted s", "ratio", "count", "bytes")]
    for row in found.rows:
        seconds = max(row.measured.seconds, row.predicted.seconds if row.predicted else 0.0)
        if seconds < least * found.step_s:
            continue
        nbytes = format_bytes(round(row.measured.nbytes)) if row.measured.nbytes else ""
        lines.append((
            row.kind, row.resource, _seconds(row.measured.seconds),
            "" if row.predicted is None else _seconds(row.predicted.seconds), _ratio(row.ratio),
            f"{row.measured.count:.0f}", nbytes,
        ))  # fmt: skip
    whole = found.predicted_s / found.step_s if found.predicted_s is not None and found.step_s else None
    predicted_s = "" if found.predicted_s is None else _seconds(found.predicted_s)
    lines.append(("step", "", _seconds(found.step_s), predicted_s, _ratio(whole), "", ""))
    if found.predicted_s is None:
        lines = [(*line[:3], *line[5:]) for line in lines]  # type: ignore[misc]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(w) if column < 2 else cell.rjust(w) for column, (cell, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    head = f"per step, on average of {found.steps} step{'s' if found.steps != 1 else ''}"
    return "\n".join([head, *table, *([NOT_PREDICTED] if found.predicted_s is None else [])])


def _scaled(found: Totals, times: float) -> Totals:
    scaled: Totals = {}
    for key, total in found.items():
        scaled[key] = Total()
        scaled[key].add(total, times)
    return scaled


def _seconds(seconds: float) -> str:
    return f"{seconds:.4f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
