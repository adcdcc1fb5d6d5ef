"""The trace that every run leaves: its third step and its last one, what all of them came to, and what was predicted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weightstream.trace.compare import Comparison, compared
from weightstream.trace.files import (
    FOLDER,
    PREDICTED,
    Measured,
    Trace,
    last_step,
    remove_old,
    span_file,
    write_spans,
    write_totals,
)
from weightstream.trace.recorder import Recorder
from weightstream.trace.spans import Span

TRACED_STEP = 3
"""The first step of a process that is like all later ones: the one before it still measures and plans anew."""


class Tracing:
    """Writes the spans of one rank to a run's folder. Used as a context manager around the steps.

    Args:
        predict: gives the spans of steps as they are predicted, once the first step has shown what a step is, on the rank
            that speaks; None where nothing can be.
    """

    def __init__(
        self, folder: Path, recorder: Recorder, *, speaks: bool, predict: Callable[[], Sequence[Span] | None] | None
    ) -> None:
        self._folder, self._recorder = folder, recorder
        self._first: list[Span] = []
        self._steps = 0
        self._speaks, self._predict = speaks, predict
        self._predicted: tuple[Span, ...] = ()

    def stepped(self) -> None:
        """A step is over."""
        self._steps += 1
        if self._steps == 1 and self._speaks:  # a process that has no step to make leaves the trace as it is
            remove_old(self._folder)
            spans = self._predict() if self._predict is not None else None
            self._predicted = tuple(span for span in last_step(spans or ()) if span.rank == self._recorder.rank)
            if self._predicted:
                write_spans(self._folder / FOLDER / PREDICTED, self._predicted)
        if self._steps == TRACED_STEP:
            self._first = self._recorder.spans()
            write_spans(span_file(self._folder, self._recorder.rank), self._first)

    def comparison(self) -> Comparison | None:
        """Predicted against measured, of this rank; None if there was no step."""
        recorder = self._recorder
        measured = {recorder.rank: Measured(recorder.steps, recorder.step_s, recorder.totals)}
        return compared(Trace(tuple(self._recorder.spans() if self._steps else ()), measured, self._predicted))

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._steps:
            return
        last = self._recorder.spans() if self._steps != TRACED_STEP else []
        write_spans(span_file(self._folder, self._recorder.rank), [*self._first, *last])
        write_totals(self._folder, self._recorder)
