"""What an optimizer at the store is: a frozen description of a function of one tensor.

It owns no tensors: `states` says what a record must hold for a parameter of a given shape, and `update` changes the
parameter and these states in place. So an update may run on any thread, in any order of parameters, and the store alone
decides where numbers live. `optimizers.py` has the ones to use.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.store.schedules import Schedule, schedule_from_json

Shape = tuple[int, ...]
States = dict[str, tuple[torch.dtype, Shape]]

_OPTIMIZERS: dict[str, "type[Optimizer]"] = {}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of the parameters whose name matches `pattern` (shell style: `*.experts.*`); the first match counts.

    `weight_decay=None` keeps the optimizer's own rule.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("optimizer group: pattern must be a parameter name pattern such as '*.bias', found ''")
        check_number(f"group {self.pattern!r}", "lr_scale", self.lr_scale, 0.0)
        if self.weight_decay is not None:
            check_number(f"group {self.pattern!r}", "weight_decay", self.weight_decay, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON."""
        return {"pattern": self.pattern, "lr_scale": self.lr_scale, "weight_decay": self.weight_decay}


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """What the store asks of an optimizer.

    `lr` is a number or a schedule, `weight_decay` that of parameters with two dimensions or more; the first of `groups`
    whose pattern matches a parameter changes either. Settings that cannot be are a `ConfigError`.

    `elementwise` says that an element's new value depends on nothing but that element's own numbers, so that a tensor
    may be updated in panels; panels must begin at multiples of 16 elements.
    """

    lr: float | Schedule = 1e-3
    weight_decay: float = 0.0
    groups: tuple[Group, ...] = ()

    elementwise: ClassVar[bool]
    # Fields that may change when a run resumes; every other one is part of `fixed()`.
    may_change: ClassVar[frozenset[str]] = frozenset({"lr", "weight_decay", "groups"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _OPTIMIZERS[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.lr, Schedule):
            self._check("lr", self.lr, 0.0)
        self._check("weight_decay", self.weight_decay, 0.0)
        groups = tuple(self.groups)
        for group in groups:
            if not isinstance(group, Group):
                raise ConfigError(f"{self._name}: groups must hold weightstream.Group objects, found {group!r}")
        object.__setattr__(self, "groups", groups)

    @abstractmethod
    def states(self, shape: Shape) -> States:
        """Name, dtype and shape of each tensor kept for a parameter of `shape`; all are zero at first."""

    @abstractmethod
    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        """One optimizer step on one parameter, in place.

        Args:
            param: fp32, contiguous.
            grad: fp32, of the shape of `param`; left as it is.
            state: the tensors that `states(param.shape)` names.
            name: the parameter's name, for its group.
            step: the training step from 1, for the learning rate.
            count: this record's own optimizer step from 1; differs from `step` where steps were skipped.
        """

    def update_many(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        *,
        names: Sequence[str],
        step: int,
        counts: Sequence[int],
    ) -> None:
        """`update` of many parameters, each by itself; in the same training step, each with its own count."""
        for param, grad, state, name, count in zip(params, grads, states, names, counts, strict=True):
            self.update(param, grad, state, name=name, step=step, count=count)

    def lr_at(self, step: int, name: str | None = None) -> float:
        """The learning rate of training step `step`, of parameter `name` if one is given."""
        lr = self.lr(step) if isinstance(self.lr, Schedule) else float(self.lr)
        group = self.group_of(name) if name is not None else None
        return lr * group.lr_scale if group is not None else lr

    def weight_decay_of(self, name: str, dimensions: int) -> float:
        """The weight decay of parameter `name`, which has so many dimensions."""
        group = self.group_of(name)
        if group is not None and group.weight_decay is not None:
            return float(group.weight_decay)
        return float(self.weight_decay) if dimensions > 1 else 0.0

    def group_of(self, name: str) -> Group | None:
        """The first group whose pattern matches parameter `name`."""
        return next((group for group in self.groups if fnmatchcase(name, group.pattern)), None)

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must not change, as JSON: class and hyper-parameters that moments depend on."""
        return {key: value for key, value in self.to_json().items() if key not in self.may_change}

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON; `Optimizer.from_json` reads it."""
        lr = self.lr.to_json() if isinstance(self.lr, Schedule) else float(self.lr)
        own = {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in ("lr", "groups")
        }
        return {"class": self._name, "lr": lr, "groups": [group.to_json() for group in self.groups], **own}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Optimizer":
        """The optimizer that `to_json` wrote.

        Raises:
            ConfigError: an unknown class, or fields that it does not have or may not hold.
        """
        name = data.get("class")
        if name not in _OPTIMIZERS:
            raise ConfigError(f"optimizer: expected one of {', '.join(sorted(_OPTIMIZERS))}, found {name!r}")
        arguments = {key: value for key, value in data.items() if key != "class"}
        if "lr" in arguments:
            arguments["lr"] = schedule_from_json(arguments["lr"])
        try:
            arguments["groups"] = tuple(Group(**group) for group in arguments.get("groups", ()))
            return _OPTIMIZERS[name]._from_fields(arguments)
        except TypeError as error:
            raise ConfigError(f"optimizer {name}: {error}; its settings are those of weightstream.{name}") from None

    @classmethod
    def _from_fields(cls, arguments: dict[str, Any]) -> Self:
        tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
        }
        return cls(**tuples)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, field: str, value: object, low: float, high: float = math.inf) -> None:
        check_number(self._name, field, value, low, high)

    def _check_betas(self, betas: object) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigError(f"{self._name}: betas must be two numbers from 0 to below 1, found {betas!r}")
        for index, beta in enumerate(betas):
            self._check(f"betas[{index}]", beta, 0.0, 1.0)
        object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(owner: str, field: str, value: object, low: float, high: float = math.inf) -> None:
    """Insist on `low <= value < high`."""
    if not (isinstance(value, int | float) and is_finite(value) and low <= value < high):
        above = f"at least {low:g}" if low > -math.inf else "that is finite"
        below = f" and below {high:g}" if high < math.inf else ""
        raise ConfigError(f"{owner}: {field} must be a number {above}{below}, found {value!r}")


def _plain(value: Any) -> Any:
    """JSON has lists only."""
    return list(value) if isinstance(value, tuple) else value
