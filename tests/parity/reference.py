"""Training resident in memory, in plain PyTorch: what a streamed run has to equal.

Nothing of weightstream is imported. `ContractTrainer` follows the numerical contract of the design page line by line:
micro-batch after micro-batch, no checkpointing, ordinary autograd. `OrdinaryTrainer` is the loop of any tutorial; it
differs from the contract in the operations named at its class, and so by rounding only.

Both start from given values, a dictionary of fp32 tensors by first parameter name.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

NORM_PIECE = 65_536  # elements whose squares are summed by one fp64 dot product
PANEL_MULTIPLE = 2048  # elements
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What a `torch.optim` class needs for one tensor; matrices decay, norms and biases do not."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    lr: float | Callable[[int], float] = 1e-3  # or a function of the training step, counted from 1
    weight_decay: float = 0.1
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.95), "eps": 1e-8})

    def rate(self, step: int) -> float:
        return self.lr(step) if callable(self.lr) else self.lr

    def decay(self, parameter: Tensor) -> float:
        return self.weight_decay if parameter.ndim > 1 else 0.0


def seed_everything(seed: int, step: int, index: int) -> None:
    """Every generator, before micro-batch `index` (from 0) of step `step` (from 1)."""
    digest = hashlib.sha256(f"{seed},{step},{index}".encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value % 2**32)


def square_sum(gradient: Tensor) -> float:
    """Sum of squares of one fp32 gradient: fp64 within pieces, pieces in order."""
    flat, total = gradient.flatten(), 0.0
    for start in range(0, flat.numel(), NORM_PIECE):
        piece = flat[start : start + NORM_PIECE].to(torch.float64)
        total += float(torch.dot(piece, piece))
    return total


def row_panels(tensor: Tensor, panel_elements: int | None) -> list[Tensor]:
    """What the norm sums apart: of a tensor above `panel_elements`, fixed panels of rows, else the whole tensor."""
    if panel_elements is None or tensor.ndim < 2 or tensor.numel() <= panel_elements:
        return [tensor]
    rows, width = tensor.shape[0], tensor[0].numel()
    without_gap = [height for height in range(1, rows + 1) if height * width % PANEL_MULTIPLE == 0]
    fitting = [height for height in without_gap if height * width <= panel_elements]
    return list(tensor.split(max(fitting, default=min(without_gap, default=rows))))


def tree_sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One binary tree over all places, whether they hold something or not."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    left, right = tree_sum(parts[:middle]), tree_sum(parts[middle:])
    if left is None or right is None:
        return right if left is None else left
    return left + right


class Untied:
    """Gives every call of certain modules its own Parameter objects, so that autograd keeps the uses apart.

    The objects share their storage with the parameter they stand for: an update reaches all of them. The k-th call in a
    micro-batch that reaches a parameter is its use number k.
    """

    def __init__(self, model: nn.Module, calls: Sequence[str]) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._aliases: dict[str, list[nn.Parameter]] = {}
        self._uses: dict[str, int] = {}
        for call in calls:
            module = model.get_submodule(call)
            module.register_forward_pre_hook(self._swap)
            module.register_forward_hook(self._restore)

    def _swap(self, module: nn.Module, _inputs: object) -> None:
        owned: dict[str, nn.Parameter] = {}
        module.__dict__["_resident_parameters"] = saved = []
        for child in module.modules():
            for attribute, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = self._names[id(parameter)]
                if name not in owned:
                    owned[name] = self._alias(name, parameter)
                saved.append((child, attribute, parameter))
                child._parameters[attribute] = owned[name]

    @staticmethod
    def _restore(module: nn.Module, _inputs: object, _output: object) -> None:
        for child, attribute, parameter in module.__dict__.pop("_resident_parameters"):
            child._parameters[attribute] = parameter

    def _alias(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        use = self._uses.get(name, 0)
        self._uses[name] = use + 1
        aliases = self._aliases.setdefault(name, [])
        if use == len(aliases):
            aliases.append(nn.Parameter(parameter.data, requires_grad=parameter.requires_grad))
        return aliases[use]

    def take_gradients(self) -> dict[tuple[str, int], Tensor]:
        """Gradients of the micro-batch just done by (name, use); starts the next one."""
        taken = {}
        for name, aliases in self._aliases.items():
            for use, alias in enumerate(aliases):
                if alias.grad is not None:
                    taken[name, use], alias.grad = alias.grad, None
        self._uses.clear()
        return taken


def without_cache(model: nn.Module) -> nn.Module:
    """Turns `use_cache` off in every configuration of a model, as `transformers.Trainer` does.

    A cache returns keys and values as contiguous copies, and a product's rounding can depend on its operands' layout.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def load_initial(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == initial.keys(), sorted(parameters.keys() ^ initial.keys())
    for name, parameter in parameters.items():
        parameter.data.copy_(initial[name])


@dataclass(frozen=True)
class Outcome:
    """What one step says of itself."""

    loss: float
    grad_norm: float
    skipped: bool


class ContractTrainer:
    """The numerical contract, resident.

    `calls` names the modules each of whose calls is one use of the parameters below it; it matters only for parameters
    that are used more than once in a micro-batch. On a `device` other than the host, model and sums of gradients are
    there, and masters, norm and optimizer on the host. `panel_elements` says which tensors are cut into panels; only the
    norm knows it.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        initial: Mapping[str, Tensor],
        settings: OptimizerSettings,
        *,
        precision: str = "fp32",
        clip_norm: float | None = None,
        seed: int = 0,
        reduction_groups: int = 8,
        calls: Sequence[str] = (),
        device: str = "cpu",
        panel_elements: int | None = None,
    ) -> None:
        self.panel_elements = panel_elements
        self.model, self.device = without_cache(build().train()), device
        load_initial(self.model, initial)
        self.settings, self.clip_norm, self.seed, self.groups = settings, clip_norm, seed, reduction_groups
        self.step_count = 0
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: parameter.data for name, parameter in self.parameters.items()}  # in fp32 the same storage
        self.model.to(device)
        if precision == "bf16":
            for parameter in self.parameters.values():  # buffers stay as the model made them
                parameter.data = parameter.data.to(torch.bfloat16)
        self.untied = Untied(self.model, calls)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                master = nn.Parameter(self.masters[name])
                self.optimizers[name] = settings.optimizer(
                    [master], lr=0.0, weight_decay=settings.decay(master), fused=True, **settings.arguments
                )

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn, weights: Sequence[float]) -> Outcome:
        self.step_count += 1
        micro_batches = tree_map_only(Tensor, lambda x: x.to(self.device), list(micro_batches))
        losses, gradients = self._gradients(micro_batches, loss_fn, weights)
        panels = (panel for name in sorted(gradients) for panel in row_panels(gradients[name], self.panel_elements))
        norm = math.sqrt(sum(map(square_sum, panels), start=0.0))
        loss = sum(weight * value for weight, value in zip(weights, losses, strict=True))
        if not math.isfinite(norm):
            return Outcome(loss, norm, skipped=True)
        if self.clip_norm is not None and (coefficient := self.clip_norm / (norm + 1e-6)) < 1:
            for gradient in gradients.values():
                gradient.mul_(coefficient)
        for name, gradient in gradients.items():
            self._update(name, gradient)
        return Outcome(loss, norm, skipped=False)

    def _gradients(
        self, micro_batches: Sequence[Any], loss_fn: LossFn, weights: Sequence[float]
    ) -> tuple[list[float], dict[str, Tensor]]:
        count, losses = len(micro_batches), []
        sums: list[dict[tuple[str, int], Tensor]] = []
        for group in range(self.groups):
            sums.append(group_sum := {})
            for index in range(group * count // self.groups, (group + 1) * count // self.groups):
                seed_everything(self.seed, self.step_count, index)
                loss = loss_fn(self.model, micro_batches[index])
                losses.append(float(loss.detach()))
                (loss * weights[index]).backward()
                for use, gradient in self._take_gradients().items():
                    if use in group_sum:
                        group_sum[use].add_(gradient)
                    else:
                        group_sum[use] = gradient.to(torch.float32, copy=True)
        gradients: dict[str, Tensor] = {}
        for name, use in sorted({use for group_sum in sums for use in group_sum}):  # uses of a parameter in order
            total = tree_sum([group_sum.get((name, use)) for group_sum in sums])
            gradients[name] = gradients[name] + total if name in gradients else total
        return losses, {name: gradient.cpu() for name, gradient in gradients.items()}

    def _take_gradients(self) -> dict[tuple[str, int], Tensor]:
        taken = self.untied.take_gradients()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                assert (name, 0) not in taken, f"{name} is used both inside and outside the calls given"
                taken[name, 0], parameter.grad = parameter.grad, None
        return taken

    def _update(self, name: str, gradient: Tensor) -> None:
        optimizer = self.optimizers[name]
        (group,) = optimizer.param_groups
        group["lr"] = self.settings.rate(self.step_count)
        (master,) = group["params"]
        master.grad = gradient
        optimizer.step()
        master.grad = None
        self.parameters[name].data.copy_(master.data)  # to the compute dtype; in fp32 onto itself

    def items(self) -> dict[str, dict[str, Tensor]]:
        """`{"param": …, "exp_avg": …}` by parameter name, without the step counts."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, master in self.masters.items():
            found[name] = {"param": master}
            if name in self.optimizers:
                (state,) = self.optimizers[name].state.values() or ({},)
                found[name] |= {key: value for key, value in state.items() if torch.is_tensor(value) and key != "step"}
        return found


class OrdinaryTrainer:
    """`loss.backward()`, `clip_grad_norm_`, `torch.optim.AdamW`, as in any tutorial, in fp32.

    Where it differs from the contract, each time in rounding only:
    - gradients add up over all micro-batches in order, not in reduction groups and a tree, and the uses of a tied
      parameter within each micro-batch, not over the step;
    - `clip_grad_norm_` takes the fp32 norm of fp32 norms, not an fp64 sum of squares;
    - `torch.optim.AdamW` on the CPU runs one elementwise operation after another, each rounded to memory, where the
      fused kernel keeps intermediate values in registers and contracts products and sums.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        initial: Mapping[str, Tensor],
        settings: OptimizerSettings,
        *,
        clip_norm: float | None = None,
        seed: int = 0,
        fused: bool | None = None,
    ) -> None:
        self.model = without_cache(build().train())
        load_initial(self.model, initial)
        self.clip_norm, self.seed, self.settings, self.step_count = clip_norm, seed, settings, 0
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decays = sorted({settings.decay(parameter) for parameter in trained})
        groups = [
            {"params": [p for p in trained if settings.decay(p) == decay], "weight_decay": decay} for decay in decays
        ]
        self.optimizer = settings.optimizer(groups, lr=settings.rate(1), fused=fused, **settings.arguments)

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn, weights: Sequence[float]) -> Outcome:
        self.step_count += 1
        total = 0.0
        for index, (micro_batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            seed_everything(self.seed, self.step_count, index)
            loss = loss_fn(self.model, micro_batch) * weight
            loss.backward()
            total += float(loss.detach())
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step_count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(total, float(norm), skipped=False)

    def items(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and key != "step"}
            found[name] = {"param": parameter.data, **tensors}
        return found
