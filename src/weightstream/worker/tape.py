"""The tape: how a graph that is cut at block boundaries gives the gradients of the whole one, bit for bit.

Four rules make it equal to plain autograd. (a) A forward that will be recomputed still runs with grad enabled, under
hooks that drop what is saved, because kernels are chosen by grad mode. (b) An output leaf needs a gradient exactly if
the output does. (c) The glue between blocks is walked once per tensor, when its first consumer in forward order has been
walked. (d) A gradient already gathered for a block's input enters that block's backward as a root, so that sums keep
autograd's order.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from weightstream.worker import audit
from weightstream.worker.generators import Generators, State
from weightstream.worker.microbatch import Modes

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class SideOutputs(Protocol):
    """Outputs that a model takes out of a block behind its back (captured router logits), made proper ones.

    `begin` runs in the micro-batch's thread and returns a state or None; `collecting` surrounds every execution of the
    block and `collected` reads what it gave; `deliver` hands the cut leaves to the model.
    """

    def begin(self) -> Any: ...
    def collecting(self, state: Any) -> Any: ...
    def deliver(self, state: Any, side: Any) -> None: ...


@dataclass(slots=True)
class Call:
    """One pass of one micro-batch through one visit."""

    visit: int
    block: int
    module: str
    forward: Callable[..., Any]
    inputs: list[Any]
    spec: TreeSpec
    modes: Modes
    side: Any
    versions: list[int] = field(default_factory=list)
    rng: State | None = None
    outputs: list[Any] = field(default_factory=list)
    kept: "Graph | None" = None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self.inputs if isinstance(x, Tensor)]


@dataclass(slots=True)
class Graph:
    """A forward with its graph: what backward starts from and what it delivers to."""

    leaves: dict[int, Tensor]  # id of an input -> the leaf that stands for it
    views: dict[int, Tensor]  # id of an input -> what the block was given
    outputs: list[Any]


def run(call: Call, side_outputs: SideOutputs | None, hooks: Hooks, *, grad: bool) -> tuple[Graph, TreeSpec]:
    """Runs the block's own forward on leaves that stand for the call's inputs."""
    leaves: dict[int, Tensor] = {}
    views: dict[int, Tensor] = {}
    given: list[Any] = []
    with ExitStack() as stack:
        call.modes.enter(stack, grad=grad and call.modes.grad)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
        for value in call.inputs:
            if isinstance(value, Tensor):
                if id(value) not in leaves:
                    leaf = value.detach().requires_grad_(value.requires_grad)
                    leaves[id(value)] = leaf
                    # the view is a node of its own, at which what was gathered elsewhere can enter (rule d)
                    views[id(value)] = leaf.view_as(leaf) if leaf.requires_grad else leaf
                given.append(views[id(value)])
            else:
                given.append(value)
        args, kwargs = tree_unflatten(given, call.spec)
        if side_outputs is None or call.side is None:
            result: Any = (call.forward(*args, **kwargs), None)
        else:
            with side_outputs.collecting(call.side) as collected:
                output = call.forward(*args, **kwargs)
            result = (output, collected())
    outputs, spec = tree_flatten(result)
    return Graph(leaves, views, outputs), spec


def forward(
    call: Call,
    generators: Generators,
    rng: State,
    side_outputs: SideOutputs | None,
    hooks: Hooks,
    *,
    keep: bool,
    first_pass: audit.FirstPass | None,
) -> tuple[Any, State]:
    """Runs a call and cuts the graph behind it.

    Returns:
        `((output, side outputs) as cut leaves, random state afterwards)`.
    """
    audit.check_inputs(call.module, call.inputs)
    call.versions = [tensor._version for tensor in call.tensors]
    generators.restore(rng)
    if first_pass is None:
        graph, spec = run(call, side_outputs, hooks, grad=True)
    else:
        with first_pass:
            graph, spec = run(call, side_outputs, hooks, grad=True)
    after = generators.state()
    if not generators.same(rng, after):
        call.rng = rng
    audit.check_versions(call.module, call.tensors, call.versions, "by the block")
    audit.check_outputs(call.module, graph.outputs)
    if first_pass is not None:
        first_pass.check([*graph.outputs, *graph.leaves.values(), *graph.views.values()])
    passed_through = {id(view): key for key, view in graph.views.items()}
    by_id = {id(x): x for x in call.tensors}
    cut: dict[int, Tensor] = {}
    reply: list[Any] = []
    for value in graph.outputs:
        if not isinstance(value, Tensor):
            reply.append(value)
            call.outputs.append(None)
        elif id(value) in passed_through:
            reply.append(by_id[passed_through[id(value)]])  # an input handed through stays the caller's own tensor
            call.outputs.append(None)
        elif id(value) in cut:
            reply.append(cut[id(value)])
            call.outputs.append(None)
        else:
            leaf = value.detach().requires_grad_(value.requires_grad)
            cut[id(value)] = leaf
            reply.append(leaf)
            call.outputs.append(leaf)
    if keep:
        call.kept = graph
    return tree_unflatten(reply, spec), after


class Way:
    """A micro-batch's way back: its tape, and the gradients gathered so far for tensors that glue made."""

    def __init__(self) -> None:
        self.tape: list[Call] = []
        self._gathered: dict[int, Tensor] = {}
        self._first: dict[int, int] = {}

    def turn(self) -> None:
        """To be called once, when the forward is complete."""
        for position, call in enumerate(self.tape):
            for x in call.tensors:
                if x.requires_grad:
                    self._first.setdefault(id(x), position)

    def _so_far(self, x: Tensor) -> Tensor | None:
        return x.grad if x.is_leaf else self._gathered.get(id(x))

    def backward(
        self, generators: Generators, side_outputs: SideOutputs | None, hooks: Hooks, walking: Callable[[int | None], None]
    ) -> None:
        """One call back: recomputes it unless its graph was kept, then the glue whose first consumer it was.

        `walking(position)` is told before glue is walked, and None before the block itself.
        """
        call = self.tape.pop()
        position = len(self.tape)
        audit.check_versions(call.module, call.tensors, call.versions, "after the block had used it")
        walking(None)
        if any(leaf is not None and leaf.grad is not None for leaf in call.outputs):
            self._through(call, generators, side_outputs, hooks)
        glue = [
            (x, self._gathered.pop(id(x)))
            for x in {id(x): x for x in call.tensors}.values()
            if id(x) in self._gathered and self._first[id(x)] == position
        ]
        if glue:
            walking(position)
            torch.autograd.backward([x for x, _ in glue], [grad for _, grad in glue])

    def _through(
        self, call: Call, generators: Generators, side_outputs: SideOutputs | None, hooks: Hooks
    ) -> None:
        graph = call.kept
        call.kept = None
        if graph is None:
            if call.rng is not None:
                generators.restore(call.rng)
            graph, _ = run(call, side_outputs, hooks, grad=True)
        roots: list[tuple[Tensor, Tensor]] = []
        inputs = {id(x): x for x in call.tensors if x.requires_grad}
        for key, x in inputs.items():
            gathered = self._so_far(x)
            if gathered is not None:
                roots.append((graph.views[key], gathered.clone()))
        for output, leaf in zip(graph.outputs, call.outputs, strict=True):
            if leaf is not None and leaf.grad is not None and output.requires_grad:
                roots.append((output, leaf.grad))
        graph.outputs = []
        torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        for key, x in inputs.items():
            grad = graph.leaves[key].grad
            if grad is not None:
                if x.is_leaf:
                    x.grad = grad
                else:
                    self._gathered[key] = grad
