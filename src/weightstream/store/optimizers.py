"""The optimizers: AdamW, SGD, Lion, Adafactor, and any class of `torch.optim` that treats tensors one by one.

All work in place on fp32, fused where PyTorch has it, and whatever `torch.optim` has too gives its bits. Unless a
group says otherwise, weight decay leaves out parameters with fewer than two dimensions (norms, biases), as has been the
custom since GPT-2.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import _adafactor

from weightstream.errors import ConfigError
from weightstream.store.optimizer import Group, Optimizer, Shape, States, is_finite
from weightstream.store.schedules import Schedule
from weightstream.store.torch_optimizer import Torch

__all__ = ["SGD", "Adafactor", "AdamW", "Group", "Lion", "Optimizer", "Torch"]

# Lion works through a tensor in pieces of this many elements, so that its two temporaries stay in the cache.
_PIECE_ELEMENTS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay; bit for bit `torch.optim.AdamW(fused=True)`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; Kingma and Ba,
    "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """

    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_betas(self.betas)
        self._check("eps", self.eps, 0.0)

    def states(self, shape: Shape) -> States:
        return {"exp_avg": (torch.float32, shape), "exp_avg_sq": (torch.float32, shape)}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        self.update_many([param], [grad], [state], names=[name], step=step, counts=[count])

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
        # One pass over the five tensors of each parameter, one after another; work is cut among threads at cache lines, so
        # bits do not depend on them.
        alike: dict[tuple[float, float], list[int]] = defaultdict(list)
        for place, (name, param) in enumerate(zip(names, params, strict=True)):
            alike[self.lr_at(step, name), self.weight_decay_of(name, param.dim())].append(place)
        steps = {count: torch.tensor(float(count)) for count in set(counts)}
        for (lr, weight_decay), places in alike.items():
            torch._fused_adamw_(
                [params[p] for p in places], [grads[p] for p in places], [states[p]["exp_avg"] for p in places],
                [states[p]["exp_avg_sq"] for p in places], [], [steps[counts[p]] for p in places],
                lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=weight_decay, eps=self.eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum; bit for bit `torch.optim.SGD(fused=True)`.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the
    form of PyTorch: the first step sets the buffer to the gradient, undampened; weight decay is added to the gradient.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("momentum", self.momentum, 0.0)
        self._check("dampening", self.dampening, -math.inf)
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ConfigError(
                f"SGD: nesterov needs momentum above 0 and dampening 0, found momentum {self.momentum} and dampening "
                f"{self.dampening}"
            )

    def states(self, shape: Shape) -> States:
        return {"momentum_buffer": (torch.float32, shape)} if self.momentum else {}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        torch._fused_sgd_(
            [param], [grad], [state["momentum_buffer"]] if self.momentum else [],
            weight_decay=self.weight_decay_of(name, param.dim()), momentum=self.momentum, lr=self.lr_at(step, name),
            dampening=self.dampening, nesterov=self.nesterov, maximize=False,
            is_first_step=self.momentum != 0 and count == 1,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum, with decoupled weight decay; one state per parameter.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2. The paper advises a
    learning rate 3 to 10 times below AdamW's and a weight decay as many times above it.
    """

    lr: float | Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_betas(self.betas)

    def states(self, shape: Shape) -> States:
        return {"exp_avg": (torch.float32, shape)}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        lr, (beta1, beta2) = self.lr_at(step, name), self.betas
        keep = 1.0 - lr * self.weight_decay_of(name, param.dim())
        params, grads, moments = param.view(-1), grad.reshape(-1), state["exp_avg"].view(-1)
        ahead, part = torch.empty(2, min(_PIECE_ELEMENTS, param.numel()))
        for start in range(0, param.numel(), _PIECE_ELEMENTS):
            piece = slice(start, min(start + _PIECE_ELEMENTS, param.numel()))
            p, g, m = params[piece], grads[piece], moments[piece]
            c, t = ahead[: p.numel()], part[: p.numel()]
            # Each line is one rounding per element: a fused multiply-add would round differently in vector loops
            # and in their remainders, and where a loop ends depends on the number of threads.
            torch.mul(m, beta1, out=c)
            torch.mul(g, 1.0 - beta1, out=t)
            c.add_(t).sign_()
            if keep != 1.0:
                p.mul_(keep)
            p.sub_(c.mul_(lr))
            torch.mul(g, 1.0 - beta2, out=t)
            m.mul_(beta2).add_(t)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Factored second moments: a row and a column instead of a matrix; bit for bit `torch.optim.Adafactor`.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, algorithms 4
    and 5 with PyTorch's changes. Norms over the whole tensor make it depend on all of it, and their order of sums on
    the number of threads.
    """

    lr: float | Schedule = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.eps, tuple | list) or len(self.eps) != 2:
            raise ConfigError(f"Adafactor: eps must be two numbers, the first of which may be None, found {self.eps!r}")
        object.__setattr__(self, "eps", tuple(self.eps))
        if self.eps[0] is not None:
            self._check("eps[0]", self.eps[0], 0.0)
        self._check("eps[1]", self.eps[1], 0.0)
        self._check("d", self.d, 1.0)
        if not (is_finite(self.beta2_decay) and self.beta2_decay <= 0):
            raise ConfigError(f"Adafactor: beta2_decay must be a number at most 0, found {self.beta2_decay!r}")

    def states(self, shape: Shape) -> States:
        if len(shape) < 2:
            return {"variance": (torch.float32, shape)}
        return {"row_var": (torch.float32, (*shape[:-1], 1)), "col_var": (torch.float32, (*shape[:-2], 1, shape[-1]))}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, name: str, step: int, count: int
    ) -> None:
        _adafactor._single_tensor_adafactor(
            [param], [grad], [state.get("row_var")], [state.get("col_var")], [state.get("variance")],
            [torch.tensor(float(count - 1))], None, None,
            d=self.d, lr=self.lr_at(step, name), beta2_decay=self.beta2_decay,
            weight_decay=self.weight_decay_of(name, param.dim()), eps1=self.eps[0], eps2=self.eps[1],
            maximize=False, has_complex=False,
        )  # fmt: skip
