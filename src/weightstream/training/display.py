"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

import math
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from weightstream.units import format_bytes, format_count, format_seconds

_PLAIN_LINE_EVERY_S = 10.0
_WINDOW = 20  # steps over which the time left is guessed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """One finished step in numbers."""

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    seconds: float
    tokens: int
    stalled_s: float
    read_bytes: int
    written_bytes: int
    bound_bytes: int
    rss_bytes: int
    skipped: bool

    def describe(self) -> str:
        norm = "" if self.grad_norm is None else f"  |grad| {self.grad_norm:.3g}"
        moved = self.read_bytes + self.written_bytes
        against = f"{moved / self.bound_bytes:.2f}x bound" if self.bound_bytes else "no bound"
        return (
            f"loss {self.loss:.4f}{norm}  lr {self.lr:.3g}  {format_count(self.tokens / self.seconds)} tokens/s"
            f"  memory {format_bytes(self.rss_bytes)}  moved {format_bytes(moved)} ({against})"
            f"  stalled {self.stalled_s / self.seconds:.0%}{'  SKIPPED: gradients not finite' if self.skipped else ''}"
        )


class Display:
    """Shows steps as they finish. Use it as a context manager, so that the bar leaves the terminal as it was."""

    def __init__(self, *, first_step: int, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._steps = steps
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._last_line_s = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[left]} left  {task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._task = self._bar.add_task("train", total=steps, completed=first_step, left="?", facts="")

    def note(self, text: str) -> None:
        """A line that stays."""
        # markup off: file names and prompts may hold square brackets.
        self.console.print(text, markup=False)

    def step(self, facts: StepFacts) -> None:
        self._recent.append(facts.seconds)
        left = format_seconds(sum(self._recent) / len(self._recent) * (self._steps - facts.step))
        if self._bar is not None:
            self._bar.update(self._task, completed=facts.step, left=left, facts=facts.describe(), refresh=True)
            return
        now = time.monotonic()
        if facts.skipped or facts.step in (1, self._steps) or now - self._last_line_s >= _PLAIN_LINE_EVERY_S:
            self._last_line_s = now
            self.note(f"step {facts.step}/{self._steps}  {facts.describe()}  {left} left")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
