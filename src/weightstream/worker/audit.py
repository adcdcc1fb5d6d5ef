"""Refusals: models that would train silently wrong if they were streamed, named at the first use of a block.

Each check says which module or parameter, what was found, and what to do. Static checks run when the model is built;
the others watch the first pass of every visit.
"""

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weightstream.errors import AuditError
from weightstream.sparse.driving import Watch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, type)


def check_model(model: nn.Module) -> None:
    """Refuses what can be seen before any step: batch statistics in training.

    Raises:
        AuditError: names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise AuditError(
                f"module '{name}' is {type(module).__name__} in training mode: its statistics depend on which "
                f"micro-batches pass through it and in which order, which streaming changes; use LayerNorm or GroupNorm"
            )


def _holds_tensors(value: Any) -> bool:
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return False
    for attribute in attributes.values():
        items = attribute if isinstance(attribute, (list, tuple)) else (attribute,)
        if any(isinstance(item, Tensor) or _is_cache_layer(item) for item in items):
            return True
    return False


def _is_cache_layer(value: Any) -> bool:
    return hasattr(value, "keys") and hasattr(value, "values") and isinstance(getattr(value, "keys", None), Tensor)


def check_inputs(module: str, leaves: Iterable[Any]) -> None:
    """Refuses inputs that carry state from block to block outside of tensors."""
    for value in leaves:
        if isinstance(value, (Tensor, *_PLAIN)):
            continue
        if (hasattr(value, "update") and hasattr(value, "get_seq_length")) or _holds_tensors(value):
            raise AuditError(
                f"block '{module}' is given a {type(value).__name__}, a mutable cache or an object that holds tensors: "
                f"what blocks write to it would be lost in recomputation and lead gradients astray; turn it off in "
                f"training (use_cache=False), or pass its tensors as arguments"
            )


def check_outputs(module: str, leaves: Iterable[Any]) -> None:
    """Refuses outputs whose tensors cannot be seen."""
    for value in leaves:
        if not isinstance(value, (Tensor, *_PLAIN)) and _holds_tensors(value):
            raise AuditError(
                f"block '{module}' returns a {type(value).__name__} that holds tensors which cannot be cut from the graph; "
                f"return tensors, tuples or dicts, or register the class with torch.utils._pytree"
            )


def check_versions(module: str, tensors: Sequence[Tensor], before: Sequence[int], when: str) -> None:
    """Refuses an input that was changed in place: recomputation would start from the changed one."""
    for position, (tensor, version) in enumerate(zip(tensors, before, strict=True)):
        if tensor._version != version:
            raise AuditError(
                f"tensor input {position} of block '{module}', shape {tuple(tensor.shape)}, was changed in place {when}: "
                f"a recomputation would start from the changed values; use the out-of-place operation (x = x + y)"
            )


def changed_by_block(module: str, error: RuntimeError) -> AuditError:
    """What autograd refuses because a block's inputs are leaves: an input changed in place."""
    return AuditError(
        f"an input of block '{module}' is changed in place by the block ({error}): a recomputation would start from the "
        f"changed values; use the out-of-place operation (x = x + y)"
    )


class FirstPass:
    """Watches the first pass of a module: buffers that change, tensors that escape, foreign parameters."""

    def __init__(
        self, name: str, module: nn.Module, foreign: "ForeignParameters", weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """`weights` are the parameters that kernels multiply by, by name: nothing else may use them."""
        self._name, self._module = name, module
        self._driven = Watch(weights) if weights else nullcontext()
        self._watch = _Watch(foreign)
        self._buffers: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "FirstPass":
        self._buffers = self._state()
        self._watch.__enter__()
        self._driven.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._driven.__exit__(*exception)
        self._watch.__exit__(*exception)

    def _state(self) -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in self._module.named_buffers()}

    def check(self, known: Sequence[Any]) -> None:
        """Call when the outputs are all that is left of the pass; `known` holds them and the inputs."""
        after = self._state()
        for name, state in after.items():
            if self._buffers.get(name) != state:
                raise AuditError(
                    f"block '{self._name}' changes its buffer '{name}' in training: every micro-batch and every "
                    f"recomputation would change it again; make it an input and an output, or stop updating it in training"
                )
        storages = {value.untyped_storage()._cdata for value in known if isinstance(value, Tensor)}

        def escaped(tensor: Tensor | None) -> bool:
            return tensor is not None and tensor.untyped_storage()._cdata not in storages

        survivors = [reference for reference in self._watch.made if escaped(reference())]
        if survivors:
            gc.collect()
        for reference in survivors:
            tensor = reference()
            if tensor is not None and escaped(tensor):
                raise AuditError(
                    f"block '{self._name}' makes a tensor of shape {tuple(tensor.shape)} that outlives it without being an "
                    f"output (stored on a module or in a list): its gradient would be lost; return it from the block's forward"
                )
        self._watch.made.clear()


class ForeignParameters:
    """Knows which parameters may be touched now."""

    def __init__(self, block_of: dict[int, int], name: Any, present: Any) -> None:
        self._block_of, self._name, self._present = block_of, name, present

    def check(self, parameter: nn.Parameter, where: str) -> None:
        block = self._block_of.get(id(parameter))
        if block is not None and not self._present(block):
            raise AuditError(
                f"parameter '{self._name(parameter)}' is used {where}, where its block is not present; call the module "
                f"that owns it instead of reading its parameter, or put both into one block with a block rule "
                f"(block_rules={{'<parent module>': 'block'}})"
            )


class _Watch(TorchFunctionMode):
    def __init__(self, foreign: ForeignParameters) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self._foreign = foreign

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, nn.Parameter):
                self._foreign.check(value, "inside another block")
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
                self.made.append(weakref.ref(value))
        return result
