"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

import math
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

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
    ranks: str = ""

    def describe(self) -> str:
        return "  ".join(text for text in (self.describe_learning(), self.describe_machine(), self.ranks) if text)

    def describe_learning(self) -> str:
        norm = "" if self.grad_norm is None else f"  |grad| {self.grad_norm:.3g}"
        skipped = "  SKIPPED: gradients not finite" if self.skipped else ""
        return f"loss {self.loss:.4f}{norm}  lr {self.lr:.3g}{skipped}"

    def describe_machine(self) -> str:
        moved = self.read_bytes + self.written_bytes
        against = f"{moved / self.bound_bytes:.2f}x bound" if self.bound_bytes else "no bound"
        return (
            f"{format_count(self.tokens / self.seconds)} tokens/s  memory {format_bytes(self.rss_bytes)}"
            f"  moved {format_bytes(moved)} ({against})  stalled {self.stalled_s / self.seconds:.0%}"
        )


class Display:
    """Shows steps as they finish. Use it as a context manager, so that the bar leaves the terminal as it was."""

    def __init__(self, *, first_step: int, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._steps = steps
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._last_line_s = -math.inf
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self._drawn(first_step, "?", None), console=self.console, auto_refresh=False)

    def note(self, text: str) -> None:
        """A line that stays."""
        # markup off: file names and prompts may hold square brackets.
        self.console.print(text, markup=False)

    def step(self, facts: StepFacts) -> None:
        self._recent.append(facts.seconds)
        left = format_seconds(sum(self._recent) / len(self._recent) * (self._steps - facts.step))
        if self._live is not None:
            self._live.update(self._drawn(facts.step, left, facts), refresh=True)
            return
        now = time.monotonic()
        if facts.skipped or facts.step in (1, self._steps) or now - self._last_line_s >= _PLAIN_LINE_EVERY_S:
            self._last_line_s = now
            self.note(f"step {facts.step}/{self._steps}  {facts.describe()}  {left} left")

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _drawn(self, step: int, left: str, facts: StepFacts | None) -> Group:
        """Three short lines: a terminal of 80 columns shows them whole."""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(f"step {step}/{self._steps}", ProgressBar(self._steps, step, width=40), f"{left} left")
        lines = [facts.describe_learning(), facts.describe_machine(), facts.ranks] if facts else []
        return Group(bar, *(Text(line) for line in lines if line))
