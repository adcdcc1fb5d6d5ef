"""Metrics on disk: one JSON object per line, and the same numbers as TensorBoard events."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/` in a run's folder.

    What a killed run had written about steps that were never committed is taken out when the run goes on, so that each
    step stands there once.
    """

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool, name: str = "metrics.jsonl") -> None:
        self.path = folder / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(self.path, resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, **values: float | int | bool) -> None:
        """One line `{"kind": kind, "step": step, "time": seconds since 1970, …}`; on disk as soon as this returns, as far as
        the system goes."""
        self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _drop_later_lines(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    shorter = path.with_suffix(".unfinished")
    shorter.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    shorter.replace(path)
