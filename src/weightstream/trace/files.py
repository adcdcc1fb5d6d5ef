"""Traces in a run's folder: `trace/rank-N.jsonl` has the spans of the traced steps, one JSON object a line.

`trace/totals-N.json` has what all steps of the rank came to, `trace/predicted.jsonl` the spans of one step as they were
predicted before it began.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightstream.errors import ConfigError
from weightstream.trace.recorder import Recorder
from weightstream.trace.spans import Span, Total, Totals

FOLDER = "trace"
PREDICTED = "predicted.jsonl"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the steps of one rank came to: sums over `steps` steps of `step_s` seconds each, on average."""

    steps: int
    step_s: float
    totals: Totals


@dataclass(frozen=True, slots=True)
class Trace:
    """What a run's folder has of it; every part may be missing."""

    spans: tuple[Span, ...]
    measured: dict[int, Measured]
    predicted: tuple[Span, ...]


def write_spans(path: Path, spans: Iterable[Span]) -> None:
    """Replace a file of spans; a reader finds the old one or the new one."""
    _replace(path, "".join(json.dumps(asdict(span)) + "\n" for span in spans))


def read_spans(path: Path) -> list[Span]:
    """The spans of a file, which may not be there; a last line that was cut short is left out.

    Raises:
        ConfigError: the file is none of spans.
    """
    if not path.is_file():
        return []
    found: list[Span] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Span(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}, line {number}: expected a span as JSON, found {line[:60]!r} ({error})"
            ) from None
    return found


def write_totals(folder: Path, recorder: Recorder) -> None:
    """What all steps of a rank came to."""
    rows = [
        {"kind": kind, "resource": resource, **asdict(total)} for (kind, resource), total in recorder.totals.items()
    ]
    found: dict[str, Any] = {"steps": recorder.steps, "step_s": recorder.step_s, "rows": rows}
    _replace(folder / FOLDER / f"totals-{recorder.rank}.json", json.dumps(found))


def read_trace(folder: Path) -> Trace:
    """What a run's folder has.

    Raises:
        ConfigError: there is no such folder, or a file in it is none of a trace.
    """
    if not folder.is_dir():
        raise ConfigError(f"no run at {folder}: expected the folder that `weightstream fit` left")
    spans: list[Span] = []
    measured: dict[int, Measured] = {}
    for path in sorted((folder / FOLDER).glob("rank-*.jsonl"), key=_number):
        spans += read_spans(path)
    for path in sorted((folder / FOLDER).glob("totals-*.json"), key=_number):
        measured[_number(path)] = _read_totals(path)
    predicted = read_spans(folder / FOLDER / PREDICTED)
    return Trace(tuple(spans), measured, tuple(last_step(predicted)))


def last_step(spans: Sequence[Span]) -> list[Span]:
    """The spans of the last step that there is."""
    last = max((span.step for span in spans), default=0)
    return [span for span in spans if span.step == last]


def span_file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.jsonl"


def remove_old(folder: Path) -> None:
    """What an earlier process left is of steps that may have been another plan's."""
    for path in (folder / FOLDER).glob("*.json*"):
        path.unlink(missing_ok=True)


def _read_totals(path: Path) -> Measured:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        totals = {
            (row["kind"], row["resource"]): Total(row["count"], row["seconds"], row["waited_s"], row["nbytes"])
            for row in found["rows"]
        }
        return Measured(found["steps"], found["step_s"], totals)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected totals of steps as JSON, found something else ({error})") from None


def _number(path: Path) -> int:
    text = path.stem.rpartition("-")[2]
    return int(text) if text.isdigit() else 0


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
