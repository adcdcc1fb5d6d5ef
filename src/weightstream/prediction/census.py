"""The kernels of one micro-batch, counted before anything runs: by visit, forward, recomputed and backward.

Blocks run on tensors without bytes, which claim to be on the CPU, so that those kernels are chosen that will be; a model's
graph is cut at its blocks as the worker cuts it (`worker/tape.py`). What lies between blocks is small and runs for real,
on zeros, so that a model's code takes the ways that it takes in training. A block whose kernels depend on values (routed
experts) runs for real once, on random numbers. Blocks that are alike are counted once.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from weightstream.errors import PlanError

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"})
_BY_OUTPUT = frozenset({"embedding", "embedding_dense_backward", "slice_backward", "select_backward", "index"})
"""Kernels that touch only a part of their largest input."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One call into aten.

    `product` is (batch, m, n, k) of a matrix product and of attention (batch and heads, queries, keys, width of a head);
    `layout` says of a product which operands are transposed (`nn`, `nt`, `tn`), of attention whether it is causal.
    `elements` is the size of what it works through, `nbytes` what it reads and writes. A view moves nothing.
    """

    name: str
    dtype: str
    elements: int
    nbytes: int
    product: tuple[int, int, int, int] | None = None
    layout: str = ""
    view: bool = False

    @property
    def flops(self) -> int:
        """Of a matrix product: two for each of its multiplications."""
        return 2 * prod(self.product) if self.product is not None and self.name in _PRODUCTS else 0


Kernels = Counter[Kernel]


@dataclass(slots=True)
class VisitCensus:
    """What one micro-batch runs in one visit. `gradients` are the elements of its parameters' gradients, by dtype."""

    forward: Kernels = field(default_factory=Counter)
    recompute: Kernels = field(default_factory=Counter)
    backward: Kernels = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    parameters: int = 0

    def copy(self) -> "VisitCensus":
        """Counts of its own, for another visit that is alike."""
        forward, recompute, backward = (Counter(kernels) for kernels in (self.forward, self.recompute, self.backward))
        return VisitCensus(forward, recompute, backward, Counter(self.gradients), self.parameters)


@dataclass(slots=True)
class Census:
    """One micro-batch's way through a model: `begin` runs before its first block, `turn` from the loss to the outputs of
    its last block; what lies between blocks is counted with the block before it, and on the way back with the one after."""

    visits: list[VisitCensus]
    begin: Kernels = field(default_factory=Counter)
    turn: Kernels = field(default_factory=Counter)


def flops(kernels: Kernels) -> int:
    """Operations of all matrix products."""
    return sum(kernel.flops * count for kernel, count in kernels.items())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.into: Kernels = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.paused and func.namespace == "aten":
            kernel = _kernel(func, args, kwargs, result)
            if kernel is not None:
                self.into[kernel] += 1
        return result


def _kernel(func: Any, args: Any, kwargs: Any, result: Any) -> Kernel | None:
    name = func._schema.name.removeprefix("aten::")
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
    if not outputs or name == "detach":
        return None
    if _is_view(func):
        return Kernel("view", "", 0, 0, view=True)
    dtype = str(outputs[0].dtype).removeprefix("torch.")
    if name == "_to_copy" and inputs:
        dtype = f"{str(inputs[0].dtype).removeprefix('torch.')}>{dtype}"
    counted = outputs if name in _BY_OUTPUT else [*inputs, *outputs]
    elements = max(x.numel() for x in counted)
    nbytes = sum(x.numel() * x.itemsize for x in {id(x): x for x in counted}.values())
    if name in _PRODUCTS:
        return _product(name, dtype, inputs, elements, nbytes)
    if "scaled_dot_product" in name:
        return _attention(name, dtype, args, kwargs, elements, nbytes)
    return Kernel(name, dtype, elements, nbytes)


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    return (alias is not None and not alias.is_write) or func._schema.name == "aten::_unsafe_view"


def _product(name: str, dtype: str, inputs: Sequence[Tensor], elements: int, nbytes: int) -> Kernel:
    first = 1 if name in ("addmm", "baddbmm") else 0  # what is added comes before what is multiplied
    one, other = inputs[first], inputs[first + 1]
    batch = one.shape[0] if one.dim() == other.dim() == 3 else 1
    m, k, n = one.shape[-2], one.shape[-1], other.shape[-1]
    layout = "".join("t" if x.stride(-1) != 1 and x.stride(-2) == 1 else "n" for x in (one, other))
    return Kernel(name, dtype, elements, nbytes, (batch, m, n, k), "nt" if layout == "tt" else layout)


def _attention(name: str, dtype: str, args: Any, kwargs: Any, elements: int, nbytes: int) -> Kernel:
    back = "backward" in name
    query, key = (args[1], args[2]) if back else (args[0], args[1])
    causal = any(value is True for value in (*args, *kwargs.values()))
    shape = (prod(query.shape[:-2]), query.shape[-2], key.shape[-2], query.shape[-1])
    return Kernel(
        "attention_backward" if back else "attention", dtype, elements, nbytes, shape, "causal" if causal else "full"
    )


def take(
    model: nn.Module,
    visits: Sequence[str],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    micro_batch: Any,
    *,
    dtype: torch.dtype,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    share_like: bool = True,
    by_values: Collection[str] = (),
) -> Census:
    """Counts what one micro-batch runs.

    Args:
        model: on any device, meta among them; its parameters are put aside meanwhile and come back as they were.
        visits: the modules that are called as blocks, in order, one for each call.
        dtype: what parameters stream in.
        forwards: the modules' own forward, where the model's was replaced.
        shapes: of parameters, by name, that have another one than the model's code expects.
        share_like: count blocks that are alike once.
        by_values: modules whose kernels are known to depend on values.

    Raises:
        PlanError: the model makes other calls.
    """
    return _Taking(model, visits, dtype, forwards or {}, shapes or {}, share_like, by_values).take(loss_fn, micro_batch)


@dataclass(slots=True)
class _Call:
    """A visit that was made: its inputs and outputs as the model sees them, and as the block itself does (`inner`)."""

    module: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    inner: list[Any]
    spec: TreeSpec
    fake: bool


class _Taking:
    def __init__(
        self,
        model: nn.Module,
        visits: Sequence[str],
        dtype: torch.dtype,
        forwards: Mapping[str, Callable[..., Any]],
        shapes: Mapping[str, Sequence[int]],
        share_like: bool,
        by_values: Collection[str],
    ) -> None:
        self.model, self.names, self.dtype = model, list(visits), dtype
        self.modules = {name: model.get_submodule(name) for name in dict.fromkeys(visits)}
        self.forwards = {name: forwards.get(name, module.forward) for name, module in self.modules.items()}
        self.share_like, self.by_values = share_like, frozenset(by_values)
        self.shapes = {id(model.get_parameter(name)): tuple(shape) for name, shape in shapes.items()}
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.counting = _Counting()
        self.census = Census([VisitCensus() for _ in visits])
        self.calls: list[_Call] = []
        self.known: dict[Any, tuple[VisitCensus, _Call]] = {}

    def take(self, loss_fn: Callable[[nn.Module, Any], Tensor], micro_batch: Any) -> Census:
        with ExitStack() as stack:
            stack.enter_context(self._without_bytes())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.counting)
            self.counting.into = self.census.begin
            loss = loss_fn(self.model, micro_batch)
            if len(self.calls) != len(self.names):
                raise PlanError(
                    f"the model called {len(self.calls)} blocks, expected {len(self.names)}: its calls depend on more than "
                    f"the shapes of its inputs, and its step cannot be predicted"
                )
            self.counting.into = self.census.turn
            loss.sum().backward()
            for number in reversed(range(len(self.calls))):
                self._back(number)
        return self.census

    # the model, meanwhile

    @contextmanager
    def _without_bytes(self) -> Iterator[None]:
        """Parameters and buffers without bytes, and blocks that come here when they are called."""
        kept: list[tuple[dict[str, Any], str, Any]] = []
        made: dict[int, nn.Parameter] = {}
        within = {id(parameter) for module in self.modules.values() for parameter in module.parameters()}
        for module in self.model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    kept.append((module._parameters, key, parameter))
                    if id(parameter) not in made:
                        made[id(parameter)] = self._parameter(parameter, fake=id(parameter) in within)
                    module._parameters[key] = made[id(parameter)]
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device.type == "meta":
                    kept.append((module._buffers, key, buffer))
                    module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        had = {name: module.__dict__.get("forward") for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.__dict__["forward"] = self._interception(name)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                if had[name] is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = had[name]
            for holder, key, value in reversed(kept):
                holder[key] = value

    def _parameter(self, parameter: nn.Parameter, *, fake: bool) -> nn.Parameter:
        """Zeros that take no room where it is used between blocks."""
        dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
        shape = self.shapes.get(id(parameter), tuple(parameter.shape))
        if not fake:
            zeros = torch.zeros((), dtype=dtype).expand(shape)
            return nn.Parameter(zeros, requires_grad=parameter.requires_grad)
        with self.fakes:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=parameter.requires_grad)

    def _interception(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(name, args, kwargs)

        return forward

    # forward

    def _forward(self, name: str, args: Any, kwargs: Any) -> Any:
        number = len(self.calls)
        if number >= len(self.names) or self.names[number] != name:
            expected = self.names[number] if number < len(self.names) else "nothing more"
            raise PlanError(f"the model called block '{name}', expected was {expected}; its step cannot be predicted")
        inputs, spec = tree_flatten((args, kwargs))
        like = self._likeness(name, inputs)
        last = number == len(self.names) - 1
        found = self.known.get(like) if self.share_like and not last else None
        if found is None:
            found = self.known[like] = self._count(name, inputs, spec)
        self.census.visits[number] = found[0].copy()
        self.counting.into = self.census.visits[number].forward
        before = found[1]
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        handed_on = {id(inner): tensors[place] for place, inner in enumerate(before.inputs)}
        outputs: list[Tensor] = []

        def cut(x: Tensor) -> Tensor:
            if id(x) in handed_on:
                return handed_on[id(x)]
            leaf = x.detach() if last and before.fake else self._zeros(x)
            outputs.append(leaf.requires_grad_(x.requires_grad))
            return leaf

        self.counting.paused = True
        reply = tree_unflatten([cut(x) if isinstance(x, Tensor) else x for x in before.inner], before.spec)
        self.counting.paused = False
        self.calls.append(_Call(name, tensors, outputs, [], before.spec, before.fake))
        return reply

    def _likeness(self, name: str, inputs: Sequence[Any]) -> Any:
        module = self.modules[name]
        sizes = tuple((key, tuple(p.shape), p.requires_grad) for key, p in module.named_parameters())
        given = tuple(
            (tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else type(x).__name__ for x in inputs
        )
        return type(module), sizes, given, self._settings(module)

    def _settings(self, module: nn.Module) -> tuple[tuple[str, Any], ...]:
        """Plain attributes of a block that its kernels may depend on (a window of attention, say); not its number."""
        plain = (bool, str, float)
        return tuple(
            (f"{path}.{key}", value)
            for path, child in module.named_modules()
            for key, value in sorted(child.__dict__.items())
            if isinstance(value, plain)
        )

    def _zeros(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype).expand(x.shape)

    def _count(self, name: str, inputs: list[Any], spec: TreeSpec) -> tuple[VisitCensus, _Call]:
        """Runs a block forward and back by itself."""
        self.counting.paused = True  # what runs inside is counted inside
        try:
            if name not in self.by_values:
                with self.fakes:
                    return self._run(name, inputs, spec, fake=True)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            pass
        try:
            with self._random_parameters(self.modules[name]):
                return self._run(name, inputs, spec, fake=False)
        finally:
            self.counting.paused = False

    def _run(self, name: str, inputs: list[Any], spec: TreeSpec, *, fake: bool) -> tuple[VisitCensus, _Call]:
        found, inside = VisitCensus(), _Counting()
        given, views = self._stand_ins(inputs, fake=fake)
        args, kwargs = tree_unflatten(given, spec)

        def saved(tensor: Tensor) -> Tensor:
            found.recompute = found.forward.copy()  # what has run when the last tensor is saved
            return tensor

        inside.into = found.forward
        with inside, torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            outputs, out_spec = tree_flatten(self.forwards[name](*args, **kwargs))
        ends = [y for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
        grads = [torch.zeros_like(y) for y in ends]
        inside.into = found.backward
        if ends:
            with inside:
                torch.autograd.backward(ends, grads)
        for parameter in self.modules[name].parameters():
            if parameter.grad is not None:
                found.gradients[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
                found.parameters += 1
                parameter.grad = None
        return found, _Call(name, views, [], outputs, out_spec, fake)

    def _stand_ins(self, inputs: Sequence[Any], *, fake: bool) -> tuple[list[Any], list[Tensor]]:
        views: dict[int, Tensor] = {}
        for value in inputs:
            if isinstance(value, Tensor) and id(value) not in views:
                leaf = self._stand_in(value, fake=fake).requires_grad_(value.requires_grad)
                views[id(value)] = leaf.view_as(leaf) if leaf.requires_grad else leaf
        given = [views[id(x)] if isinstance(x, Tensor) else x for x in inputs]
        return given, [views[id(x)] for x in inputs if isinstance(x, Tensor)]

    def _stand_in(self, x: Tensor, *, fake: bool) -> Tensor:
        if fake:
            return torch.empty(x.shape, dtype=x.dtype)
        if isinstance(x, FakeTensor) or x.is_floating_point():
            return torch.randn(x.shape).to(x.dtype) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)
        return x.detach().clone()

    @contextmanager
    def _random_parameters(self, module: nn.Module) -> Iterator[None]:
        """A block's parameters for real, for as long as it runs."""
        kept: list[tuple[nn.Module, str, Any]] = []
        generator = torch.Generator().manual_seed(0)
        for child in module.modules():
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    kept.append((child, key, parameter))
                    values = torch.randn(parameter.shape, generator=generator) * 0.02
                    child._parameters[key] = nn.Parameter(
                        values.to(parameter.dtype), requires_grad=parameter.requires_grad
                    )
        try:
            yield
        finally:
            for child, key, parameter in kept:
                child._parameters[key] = parameter

    # and back

    def _back(self, number: int) -> None:
        """The gradients of a visit's inputs reach the outputs of the one before, through what lies between."""
        call = self.calls[number]
        self.counting.into = self.census.visits[number].backward
        if not any(y.grad is not None for y in call.outputs):
            return
        for x in {id(x): x for x in call.inputs if x.requires_grad}.values():
            self.counting.paused = True
            grad = torch.zeros((), dtype=x.dtype).expand(x.shape)
            self.counting.paused = False
            if not x.is_leaf:
                torch.autograd.backward([x], [grad])
            elif x.grad is None:
                x.grad = grad
            else:
                x.grad = x.grad + grad
