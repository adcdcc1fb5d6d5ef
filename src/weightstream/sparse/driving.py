"""Unmodified models whose `nn.Linear` modules multiply by non-zeros only.

What is exchanged is the `forward` of each module that was chosen: its `weight` is then the (nnz, 1) vector of its
non-zeros, and the model's own code calls the module as before, hooks included. A `__torch_function__` mode on
`F.linear` would also see products that bypass the module, but it takes Python's time at every operation of the model and
has to be entered on every thread that computes or recomputes; a tensor subclass would have to stand in for the
parameter in everything that binds, sums and updates it.

Products that bypass the module are refused instead: a weight of (nnz, 1) fits into no matrix product, and `Watch`, once
around a first pass, finds what would go wrong silently. GPT-2's `Conv1D`, embeddings, tied weights and subclasses of
`nn.Linear` with a forward of their own are not drivable: they are multiplied densely.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from weightstream.errors import AuditError, ConfigError
from weightstream.sparse.kernels import Kernel, multiply
from weightstream.sparse.structure import Structure

_LOOKS = frozenset(
    [getattr(Tensor, name).__get__ for name in ("dtype", "device", "requires_grad", "is_leaf", "is_cuda", "layout")]
)
"""What may be asked of a weight without a product: the same for non-zeros as for the dense matrix."""


def drivable(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules whose product a kernel can take over, by the name of their weight."""
    shared = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and isinstance(module.weight, nn.Parameter)
        and shared[id(module.weight)] == 1
    }


def drive(module: nn.Linear, structure: Structure, kernel: Kernel) -> Callable[[], None]:
    """From now on `module` multiplies by the non-zeros that its `weight` holds, (nnz, 1); returned is what undoes it.

    The weight is looked up at each call: it may be bound to other memory between calls.

    Raises:
        ConfigError: the structure is of another shape than the module.
    """
    if structure.shape != (module.out_features, module.in_features):
        raise ConfigError(
            f"linear layer of {module.out_features}×{module.in_features}: the mask is one of {structure}; give the mask of "
            f"this layer's weight"
        )

    def forward(input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # this use of the weight is the right one, also for `Watch`
            return multiply(input, module.weight, module.bias, structure, kernel)

    def undo() -> None:
        if vars(module).get("forward") is forward:
            del module.forward

    module.forward = forward  # type: ignore[method-assign]
    return undo


class Watch(TorchFunctionMode):
    """Refuses whatever uses one of these weights (by name) other than through its driven module; for a first pass.

    Raises:
        AuditError: such a use.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _LOOKS:
            for leaf in _pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self._names:
                    raise AuditError(
                        f"parameter '{self._names[id(leaf)]}' is sparse and multiplied by a kernel, and the model uses it in "
                        f"'{getattr(func, '__name__', func)}' outside its linear layer: have it multiplied densely"
                    )
        return func(*args, **kwargs)


__all__ = ["Watch", "drivable", "drive"]
