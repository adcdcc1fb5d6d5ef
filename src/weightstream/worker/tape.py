"""The tape: how a graph that is cut at block boundaries gives the gradients of the whole one, bit for bit.

What a micro-batch does is one list: calls of blocks, and the glue operations between them, each with a graph of its own.
Every result is a leaf for whatever comes after it, and the list is walked in reverse, as autograd orders its nodes.
Rules that make this equal to plain autograd: (a) a forward that will be recomputed still runs with grad enabled, under
hooks that drop what is saved, because kernels are chosen by grad mode; (b) an output leaf needs a gradient exactly if the
output does; (c) a result of glue is cut as soon as it is made, so that its graph is walked once, when all that used it
have been; (d) a gradient already gathered for a block's input enters that block's backward as a root, so that sums keep
autograd's order.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from weightstream.errors import AuditError
from weightstream.worker import audit
from weightstream.worker.generators import Generators, State
from weightstream.worker.microbatch import Modes
from weightstream.worker.pages import on_pages

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
    graph: "Graph | None" = None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self.inputs if isinstance(x, Tensor)]


class Dropped:
    """What a forward saves for backward, by number only. A recomputation brings the tensors back, as far as needed.

    The graph of the first pass stays; its nodes hold numbers. So what follows the last saved tensor (in a decoder
    layer, the last product) is not computed twice, as in torch.utils.checkpoint (Chen et al. 2016, section 4).
    """

    def __init__(self, note: Callable[[Tensor], None] | None = None) -> None:
        self.count = 0
        self.values: list[Tensor] = []
        self._note = note

    @property
    def hooks(self) -> Hooks:
        return self._number, self._value

    def _number(self, tensor: Tensor) -> int:
        if self._note is not None:
            self._note(tensor)
        self.count += 1
        return self.count - 1

    def _value(self, number: int) -> Tensor:
        return self.values[number]

    def _take(self, tensor: Tensor) -> int:
        self.values.append(tensor.detach())
        if len(self.values) == self.count:
            raise _EnoughError
        return len(self.values) - 1

    def recompute(self, call: "Call", side_outputs: SideOutputs | None) -> None:
        """Runs the block again until all that was saved is there.

        Raises:
            AuditError: the block saved less than the first time, so it does not do the same twice.
        """
        self.values = []
        if not self.count:
            return
        try:
            run(call, side_outputs, (self._take, self._value), grad=True)
        except _EnoughError:
            return
        raise AuditError(
            f"block '{call.module}' saved {self.count} tensors for backward at first, {len(self.values)} when it was "
            f"recomputed: what it does depends on more than its inputs and the random state; keep its activations "
            f"(activations='keep') or make it repeatable"
        )


class _EnoughError(Exception):
    """Ends a recomputation that has brought back everything."""


@dataclass(slots=True)
class Forward:
    """One execution of a block's forward: the leaves and views that stood for its inputs, by id, and its outputs."""

    leaves: dict[int, Tensor]
    views: dict[int, Tensor]
    outputs: list[Any]


@dataclass(slots=True)
class Graph:
    """The graph of a forward by its ends, without the tensors: inputs that need a gradient, and outputs."""

    leaves: dict[int, Tensor]
    views: dict[int, GradientEdge]
    outputs: list[GradientEdge | None]
    dropped: Dropped | None

    @classmethod
    def of(cls, made: Forward, dropped: Dropped | None) -> "Graph":
        needed = {key: leaf for key, leaf in made.leaves.items() if leaf.requires_grad}
        return cls(
            needed,
            {key: get_gradient_edge(made.views[key]) for key in needed},
            [get_gradient_edge(y) if isinstance(y, Tensor) and y.requires_grad else None for y in made.outputs],
            dropped,
        )

    def has_custom_function(self) -> bool:
        """Whether a Python autograd function is part of it: what such a one keeps aside cannot be seen or brought back."""
        seen: set[Any] = set()
        nodes: list[Any] = [edge.node for edge in self.outputs if edge is not None]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                return True
            nodes.extend(following for following, _ in node.next_functions)
        return False


def run(call: Call, side_outputs: SideOutputs | None, hooks: Hooks, *, grad: bool) -> tuple[Forward, TreeSpec]:
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
    return Forward(leaves, views, outputs), spec


def forward(
    call: Call,
    generators: Generators,
    rng: State,
    side_outputs: SideOutputs | None,
    saved: Dropped | Hooks,
    *,
    first_pass: audit.FirstPass | None,
) -> tuple[Any, State]:
    """Runs a call and cuts the graph behind it; what its graph saves is dropped, or kept by the hooks given.

    Returns:
        `((output, side outputs) as cut leaves, random state afterwards)`.
    """
    audit.check_inputs(call.module, call.inputs)
    call.versions = [tensor._version for tensor in call.tensors]
    generators.restore(rng)
    try:
        with first_pass or nullcontext():
            hooks = saved.hooks if isinstance(saved, Dropped) else saved
            graph, spec = run(call, side_outputs, hooks, grad=True)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise audit.changed_by_block(call.module, error) from error
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
            leaf = value.detach()
            if isinstance(saved, Dropped) and value.requires_grad:
                leaf = on_pages(leaf)
            leaf.requires_grad_(value.requires_grad)
            cut[id(value)] = leaf
            reply.append(leaf)
            call.outputs.append(leaf)
    call.graph = Graph.of(graph, saved if isinstance(saved, Dropped) else None)
    return tree_unflatten(reply, spec), after


@dataclass(slots=True)
class Glue:
    """One operation between blocks: the ends of its graph, and the leaves that stand for its results."""

    edges: list[GradientEdge]
    leaves: list[Tensor]


def _take_gradients(edges: list[GradientEdge]) -> list[tuple[Tensor, Tensor]]:
    """The gradients that the leaves of one operation already have, taken off: as roots they come first (rule d).

    Where an operation reads a tensor twice, autograd adds both to them one after another, not their sum.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    seen: set[Any] = set()
    nodes: list[Any] = [edge.node for edge in edges]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is None:
            nodes.extend(following for following, _ in node.next_functions)
        elif leaf.grad is not None:
            found[id(leaf)] = (leaf, leaf.grad)
    for leaf, _ in found.values():
        leaf.grad = None
    return list(found.values())


class Way:
    """A micro-batch's way through the model, and back."""

    def __init__(self) -> None:
        self.entries: list[Call | Glue] = []

    @property
    def last_call(self) -> Call | None:
        """The last call that is not walked yet; glue that follows it is skipped."""
        return next((entry for entry in reversed(self.entries) if isinstance(entry, Call)), None)

    def cut(self, result: Any) -> Any:
        """What the model gets instead of an operation's result: the same values as leaves (rules b, c)."""
        if isinstance(result, Tensor):
            if result.is_leaf or not result.requires_grad:
                return result
            leaf = result.detach().requires_grad_()
            self.entries.append(Glue([get_gradient_edge(result)], [leaf]))
            return leaf
        values, spec = tree_flatten(result)
        made = [x for x in values if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf]
        if not made:
            return result
        leaves = {id(x): x.detach().requires_grad_() for x in made}
        self.entries.append(Glue([get_gradient_edge(x) for x in made], [leaves[id(x)] for x in made]))
        return tree_unflatten([leaves.get(id(x), x) for x in values], spec)

    def cut_in_place(self, tensors: list[Tensor]) -> None:
        """Cuts what no torch function gave (a custom autograd function's result), before its first use by a block."""
        for x in {id(x): x for x in tensors}.values():
            if x.requires_grad and not x.is_leaf and not x._is_view():
                edge = get_gradient_edge(x)
                x.detach_().requires_grad_()
                self.entries.append(Glue([edge], [x]))

    def through_glue(self, walking: Callable[[int | None], None]) -> None:
        """Back through the operations after the last call. `walking(position)` is told before each."""
        while self.entries and isinstance(entry := self.entries[-1], Glue):
            self.entries.pop()
            pairs = [(edge, leaf.grad) for edge, leaf in zip(entry.edges, entry.leaves, strict=True)]
            given = [(edge, grad) for edge, grad in pairs if grad is not None]
            if given:
                walking(len(self.entries))
                before = _take_gradients([edge for edge, _ in given])
                roots = [*before, *given]
                torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])  # type: ignore[arg-type]

    def backward(
        self,
        generators: Generators,
        side_outputs: SideOutputs | None,
        hooks: Hooks,
        walking: Callable[[int | None], None],
    ) -> None:
        """One call back, recomputed unless its graph was kept, then the glue before it. Glue after it must be walked.

        `walking(position)` is told before glue is walked, and None before the block itself.
        """
        call = self.entries.pop()
        assert isinstance(call, Call)
        audit.check_versions(call.module, call.tensors, call.versions, "after the block had used it")
        walking(None)
        if any(leaf is not None and leaf.grad is not None for leaf in call.outputs):
            self._through(call, generators, side_outputs, hooks)
        self.through_glue(walking)

    def _through(self, call: Call, generators: Generators, side_outputs: SideOutputs | None, hooks: Hooks) -> None:
        graph, call.graph = call.graph, None
        if call.rng is not None and (graph is None or graph.dropped is not None):
            generators.restore(call.rng)
        if graph is None:
            made, _ = run(call, side_outputs, hooks, grad=True)
            graph = Graph.of(made, None)
            del made
        elif graph.dropped is not None:
            graph.dropped.recompute(call, side_outputs)
        roots: list[tuple[GradientEdge, Tensor]] = []
        inputs = {id(x): x for x in call.tensors if x.requires_grad}
        for key, x in inputs.items():
            if x.is_leaf and x.grad is not None:
                roots.append((graph.views[key], x.grad.clone()))
        for edge, leaf in zip(graph.outputs, call.outputs, strict=True):
            if edge is not None and leaf is not None and leaf.grad is not None:
                roots.append((edge, leaf.grad))
        graph.outputs = []
        torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        for key, x in inputs.items():
            grad = graph.leaves[key].grad
            if grad is not None:
                if x.is_leaf:
                    x.grad = on_pages(grad)
                else:  # a view that was not cut: nothing but views lies between it and a leaf
                    torch.autograd.backward([x], [grad])
