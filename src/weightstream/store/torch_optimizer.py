"""Any class of `torch.optim`, or one like it, at the store: `Torch(torch.optim.RAdam, lr=1e-3, betas=(0.9, 0.99))`.

The class is used as it is: for each update it is built on one parameter, given that parameter's state, stepped, and
thrown away. That is the same as a long-lived optimizer exactly if the class keeps all it knows per tensor. This is
tried at construction, on two small tensors and three steps, bit for bit; what does not hold is refused with the reason.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.store.optimizer import Group, Optimizer, Shape, States
from weightstream.store.schedules import Schedule

# State that is a plain number is kept as a tensor of shape () and given back as the number it was.
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


@dataclass(frozen=True, init=False)
class Torch(Optimizer):
    """A class of `torch.optim` that treats tensors one by one; bit for bit that class with `foreach=False`.

    `lr` may be a schedule. `weight_decay`, if the class has it, follows the rule for groups and for parameters with
    fewer than two dimensions; it defaults to the class's own. All other arguments go to the class and may not change
    on resume.

    Raises:
        ConfigError: the class mixes tensors, needs a closure or sparse gradients, keeps state per group, or does not
            take these arguments.
    """

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    arguments: tuple[tuple[str, Any], ...] = ()

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        lr: float | Schedule | None = None,
        weight_decay: float | None = None,
        groups: tuple[Group, ...] = (),
        **arguments: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ConfigError(f"Torch: expected a subclass of torch.optim.Optimizer, found {optimizer_class!r}")
        known = inspect.signature(optimizer_class).parameters
        label = f"Torch({optimizer_class.__name__})"
        for name in arguments:
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise ConfigError(f"{label}: the class has no argument {name!r}; it has {', '.join(list(known)[1:])}")
        if weight_decay is not None and "weight_decay" not in known:
            raise ConfigError(f"{label}: the class has no weight_decay; leave it out")
        if lr is None:
            lr = known["lr"].default if "lr" in known else None
        if not isinstance(lr, int | float | Schedule):
            raise ConfigError(f"{label}: expected lr, a number or a schedule, found {lr!r}")
        if weight_decay is None:
            weight_decay = known["weight_decay"].default if "weight_decay" in known else 0.0
        object.__setattr__(self, "lr", lr)
        object.__setattr__(self, "weight_decay", weight_decay)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "optimizer_class", optimizer_class)
        object.__setattr__(self, "arguments", tuple(sorted((key, _frozen(value)) for key, value in arguments.items())))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = _probe(self.optimizer_class, self.arguments)  # type: ignore[arg-type]
        if problem is not None:
            raise ConfigError(
                f"{self._name}({self.optimizer_class.__name__}) cannot run at the store: {problem}; give AdamW, SGD, "
                "Lion, Adafactor, or a class that treats tensors one by one"
            )

    def states(self, shape: Shape) -> States:
        found = _states(self.optimizer_class, self.arguments, tuple(shape))  # type: ignore[arg-type]
        if isinstance(found, str):
            raise ConfigError(
                f"Torch({self.optimizer_class.__name__}) refuses a parameter of shape {tuple(shape)}: {found}; give "
                "another optimizer"
            )
        return {name: (dtype, dims) for name, (dtype, dims, _) in found.items()}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        found = _states(self.optimizer_class, self.arguments, tuple(param.shape))  # type: ignore[arg-type]
        if isinstance(found, str):
            raise ConfigError(f"Torch({self.optimizer_class.__name__}) refuses parameter {name!r}: {found}")
        options: dict[str, Any] = {"lr": self.lr_at(step, name)}
        if "weight_decay" in inspect.signature(self.optimizer_class).parameters:
            options["weight_decay"] = self.weight_decay_of(name, param.dim())
        kinds = {key: kind for key, (_, _, kind) in found.items()}
        _step(self.optimizer_class, self.arguments, options, param, grad, state, kinds, count)

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        data["optimizer_class"] = f"{self.optimizer_class.__module__}:{self.optimizer_class.__qualname__}"
        data["arguments"] = {key: _plain(value) for key, value in self.arguments}
        return data

    @classmethod
    def _from_fields(cls, arguments: dict[str, Any]) -> Self:
        fields = dict(arguments)
        optimizer_class = _class_named(fields.pop("optimizer_class"))
        if "weight_decay" not in inspect.signature(optimizer_class).parameters:
            fields.pop("weight_decay", None)  # written as 0 for a class that has none
        return cls(optimizer_class, **fields.pop("arguments"), **fields)


Arguments = tuple[tuple[str, Any], ...]
# Per state: dtype, shape, and the Python type of a state that is a plain number.
Found = dict[str, tuple[torch.dtype, Shape, type | None]]


def _build(
    cls: type[torch.optim.Optimizer], arguments: Arguments, options: Mapping[str, Any], params: list[Tensor]
) -> torch.optim.Optimizer:
    keywords = dict(arguments) | dict(options)
    # One tensor has nothing to gain from the for-each implementation, which makes copies of the size of the tensor.
    if "foreach" in inspect.signature(cls).parameters and not keywords.get("fused"):
        keywords.setdefault("foreach", False)
    return cls(params, **keywords)


def _step(
    cls: type[torch.optim.Optimizer],
    arguments: Arguments,
    options: Mapping[str, Any],
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    kinds: Mapping[str, type | None],
    count: int,
) -> None:
    """One step of `cls` on one tensor whose state lives in `state`."""
    leaf = torch.nn.Parameter(param.detach(), requires_grad=True)
    leaf.grad = grad
    optimizer = _build(cls, arguments, options, [leaf])
    if count > 1:
        # At the first step the class makes its own state, which need not begin at zero (Rprop, NAdam, ASGD).
        optimizer.state[leaf] = {
            key: kind(state[key].item()) if kind is not None else state[key] for key, kind in kinds.items()
        }
    optimizer.step()
    for key, value in optimizer.state[leaf].items():
        kept = state.get(key)
        if kept is not None and value is not kept:
            kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)


@lru_cache(maxsize=4096)
def _states(cls: type[torch.optim.Optimizer], arguments: Arguments, shape: Shape) -> Found | str:
    """The state that `cls` keeps for a tensor of `shape`, or why it refuses one."""
    try:
        return _states_on("meta", cls, arguments, shape)
    except Exception:  # a class may read a number in its first step, which meta tensors do not have
        pass
    try:
        return _states_on("cpu", cls, arguments, shape)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _states_on(device: str, cls: type[torch.optim.Optimizer], arguments: Arguments, shape: Shape) -> Found:
    leaf = torch.nn.Parameter(torch.zeros(shape, device=device))
    leaf.grad = torch.zeros(shape, device=device)
    optimizer = _build(cls, arguments, {"lr": 1e-3}, [leaf])
    optimizer.step()
    found: Found = {}
    for key, value in optimizer.state[leaf].items():
        if isinstance(value, Tensor):
            found[key] = (value.dtype, tuple(value.shape), None)
        elif type(value) in _NUMBERS:
            found[key] = (_NUMBERS[type(value)], (), type(value))
        elif value is not None:
            raise ConfigError(f"its state {key!r} is a {type(value).__name__}, not a tensor or a number")
    return found


@lru_cache(maxsize=256)
def _probe(cls: type[torch.optim.Optimizer], arguments: Arguments) -> str | None:
    """Why `cls` cannot be stepped tensor by tensor with fresh instances; None if it can."""
    problem = "it takes neither matrices nor vectors"
    for shape in ((6, 5), (7,)):
        try:
            problem = _differs(cls, arguments, shape)  # type: ignore[assignment]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, TypeError) and "closure" in str(error):
                problem = "its step needs a closure that computes the loss again"
            continue
        return problem
    return problem


def _differs(cls: type[torch.optim.Optimizer], arguments: Arguments, shape: Shape) -> str | None:
    """Compare the class on two tensors for three steps with what `_step` does to each of them alone."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for _ in range(2)]
    grads = [[scale * torch.randn(shape, generator=generator) for scale in (1.0, 0.01)] for _ in range(3)]
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = _build(cls, arguments, {"lr": 1e-2}, list(together))
    settings = _settings(optimizer)
    for step in range(3):
        for parameter, grad in zip(together, grads[step], strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    if _settings(optimizer) != settings:
        return "it keeps state per parameter group, which the store does not hold"
    found = _states_on("cpu", cls, arguments, shape)
    kinds = {key: kind for key, (_, _, kind) in found.items()}
    for index, start in enumerate(starts):
        alone = start.clone()
        state = {key: torch.zeros(dims, dtype=dtype) for key, (dtype, dims, _) in found.items()}
        for step in range(3):
            _step(cls, arguments, {"lr": 1e-2}, alone, grads[step][index], state, kinds, step + 1)
        if not torch.equal(alone, together[index].detach()):
            return "it gives other numbers tensor by tensor than with all of them at once, so it mixes tensors"
    return None


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    return [{key: repr(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _class_named(path: str) -> type[torch.optim.Optimizer]:
    """The class of `"module:name"`. A stored name is not trusted to import what the caller's program did not."""
    module_name, _, qualname = path.partition(":")
    if module_name.startswith("torch.optim"):
        module = importlib.import_module(module_name)
    elif module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        raise ConfigError(f"optimizer class {path!r}: import module {module_name} first, then open the store")
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer class {path!r}: expected a subclass of torch.optim.Optimizer, found {found!r}")
    return found


def _frozen(value: Any) -> Any:
    """Hashable, so that probes are remembered; JSON turns tuples into lists and back."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"Torch: arguments must be numbers, strings, None or tuples of them, found {value!r}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
