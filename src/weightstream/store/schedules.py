"""Learning-rate schedules: pure functions of the training step, which counts from 1.

A schedule has no state, so a resumed run asks for the same values as one that was never interrupted. During warm-up
step n gets n / warmup of the peak; whatever decays reaches `end` at its last step and stays there.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weightstream.errors import ConfigError


@dataclass(frozen=True)
class Schedule(ABC):
    """Learning rate by training step: `schedule(step)`, step from 1."""

    lr: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _require(_is_number(self.lr) and self.lr >= 0, self, "lr", self.lr, "a finite number that is not negative")
        _require(_is_count(self.warmup), self, "warmup", self.warmup, "a number of steps, 0 or more")

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step` (from 1)."""
        if step < 1:
            raise ConfigError(f"{type(self).__name__}: training steps count from 1, found step {step}")
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The learning rate of `step`, where `step` is not below `warmup`."""

    def to_json(self) -> dict[str, Any]:
        """`{"schedule": "cosine", "lr": 3e-4, …}`."""
        return {"schedule": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """Linear warm-up, then the peak for ever."""

    def after_warmup(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class _Decaying(Schedule):
    """What the schedules that end have in common: a last step and the value reached there."""

    steps: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            _is_count(self.steps) and self.steps > self.warmup,
            self, "steps", self.steps, f"a whole number above warmup ({self.warmup})",
        )  # fmt: skip
        _require(_is_number(self.end) and self.end >= 0, self, "end", self.end, "a finite number that is not negative")

    def _progress(self, step: int, start: int) -> float:
        """0 at step `start`, 1 at the last step and beyond."""
        return min(max(step - start, 0) / (self.steps - start), 1.0)


@dataclass(frozen=True)
class Linear(_Decaying):
    """Warm-up, then a straight line to `end` at step `steps`."""

    def after_warmup(self, step: int) -> float:
        progress = self._progress(step, self.warmup)
        return self.lr * (1.0 - progress) + self.end * progress


@dataclass(frozen=True)
class Cosine(_Decaying):
    """Warm-up, then half a cosine to `end` at step `steps`.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5,
    without restarts.
    """

    def after_warmup(self, step: int) -> float:
        progress = self._progress(step, self.warmup)
        return self.end + (self.lr - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Wsd(_Decaying):
    """Warm-up, stable, decay: the peak until `decay` steps before the end, then a straight line to `end`.

    Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    2024, section 4; the linear decay is that of Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations", 2024.
    """

    decay: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.steps - self.warmup
        _require(
            _is_count(self.decay) and 1 <= self.decay <= longest,
            self, "decay", self.decay, f"a number of steps from 1 to steps - warmup ({longest})",
        )  # fmt: skip

    def after_warmup(self, step: int) -> float:
        progress = self._progress(step, self.steps - self.decay)
        return self.lr * (1.0 - progress) + self.end * progress


def constant(lr: float, *, warmup: int = 0) -> Constant:
    """The peak `lr` after `warmup` steps of linear warm-up.

    Raises:
        ConfigError: a rate below 0, or steps that are no whole number; so with every schedule.
    """
    return Constant(lr, warmup)


def linear(lr: float, *, warmup: int = 0, steps: int, end: float = 0.0) -> Linear:
    """Warm-up to `lr`, then linearly to `end` at step `steps`."""
    return Linear(lr, warmup, steps, end)


def cosine(lr: float, *, warmup: int = 0, steps: int, end: float = 0.0) -> Cosine:
    """Warm-up to `lr`, then along half a cosine to `end` at step `steps` (source: `Cosine`)."""
    return Cosine(lr, warmup, steps, end)


def wsd(lr: float, *, warmup: int = 0, steps: int, decay: int, end: float = 0.0) -> Wsd:
    """Warm-up to `lr`, stable, then linearly to `end` over the last `decay` of `steps` steps (source: `Wsd`)."""
    return Wsd(lr, warmup, steps, end, decay)


_SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "linear": Linear, "cosine": Cosine, "wsd": Wsd}


def schedule_from_json(value: float | Mapping[str, Any]) -> float | Schedule:
    """The learning rate that `to_json` wrote: a plain number, or a schedule by name.

    Raises:
        ConfigError: an unknown schedule, or fields that it does not have or may not hold.
    """
    if not isinstance(value, Mapping):
        return float(value)
    fields = dict(value)
    name = fields.pop("schedule", None)
    if name not in _SCHEDULES:
        raise ConfigError(f"learning-rate schedule: expected one of {', '.join(_SCHEDULES)}, found {name!r}")
    try:
        return _SCHEDULES[name](**fields)
    except TypeError as error:
        raise ConfigError(
            f"learning-rate schedule {name}: {error}; its fields are those of weightstream.{name}"
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: bool, schedule: Schedule, field: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{type(schedule).__name__.lower()} schedule: {field} must be {expected}, found {found!r}")
