"""The worker: runs the user's model block by block, and keeps nothing but activations.

It is driven by operations (`forward`, `turn`, `backward`) of one schedule; which block is in which slab, what is spilled
and where gradients go is decided outside.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from weightstream.blocks import Block
from weightstream.errors import AuditError
from weightstream.schedule.operations import Visit
from weightstream.worker import audit, pages, tape
from weightstream.worker.activations import Activations, spillable
from weightstream.worker.generators import Generators, seed_of
from weightstream.worker.microbatch import MicroBatch, Request, current
from weightstream.worker.slabs import Parameters, Slabs

LossFunction = Callable[[nn.Module, Any], Tensor]
GradientSink = Callable[[int, str, int, int, Tensor], None]


@dataclass(slots=True)
class _Route:
    """Where a micro-batch is: its thread, its way back, and its share of the loss."""

    thread: MicroBatch
    weight: float
    way: tape.Way
    side: Any = None


@dataclass(slots=True)
class Measured:
    """What a step needed, per visit and micro-batch at most: bytes of inputs that could be spilled, of saved tensors.

    `lasting_bytes`, per micro-batch, lie on the tape and could not be spilled; `loss_bytes` are the loss's own and what
    lies behind the last block but one.
    """

    boundary_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    lasting_bytes: int = 0
    loss_bytes: int = 0


class Worker:
    """Drives one model on one device.

    Args:
        sink: called with `(block, parameter name, use, micro-batch, gradient)` as soon as a gradient is complete.
        kernels: the parameters that are multiplied by kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        parameters: Parameters,
        device: torch.device,
        sink: GradientSink,
        side_outputs: tape.SideOutputs | None = None,
        kernels: Collection[str] = (),
    ) -> None:
        self.kernels = kernels
        self.model, self.blocks, self.parameters, self.device = model, blocks, parameters, device
        self.generators = Generators(device)
        self.activations: Activations | None = None
        self.slabs: Slabs | None = None
        self.measured = Measured()
        self.measuring = False
        self._sink, self._side_outputs = sink, side_outputs
        self._foreign = audit.ForeignParameters(parameters.block_of, parameters.name, parameters.present)
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._modules: dict[str, nn.Module] = {}
        self.block_of_module: dict[str, int] = {}
        self._routes: dict[int, _Route] = {}
        self._audited: set[str] = set()
        self._recomputed_whole: set[str] = set()  # modules with autograd functions of their own
        self._walking: tuple[int | None, int, int] = (None, 0, 0)  # block or None for glue, use, micro-batch
        self.going_back = False
        """Whether what is computed now is on the way back, forwards that are repeated there included."""
        self.outside: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self._intercept()
        self._order = {name: position for position, name in enumerate(self._forwards)}
        for block in blocks:
            for name, parameter in parameters.of(block.index):
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._arrived(block, name))

    def _intercept(self) -> None:
        seen: set[int] = set()
        for block in self.blocks:
            if block.resident:
                continue
            for name in block.modules:
                module = self.model.get_submodule(name)
                if id(module) in seen:
                    continue
                seen.add(id(module))
                self._forwards[name], self._modules[name] = module.forward, module
                self.block_of_module[name] = block.index
                module.forward = self._interception(name)

    def _interception(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            micro_batch = current()
            if micro_batch is None:
                if self.outside is None:
                    raise AuditError(
                        f"module '{name}' is called outside a step: use `with engine.module() as model` to run the model"
                    )
                return self.outside(name, args, kwargs)
            route = self._routes[micro_batch.index]
            route.side = None if self._side_outputs is None else self._side_outputs.begin()
            output, side = micro_batch.call(name, args, kwargs)
            if side is not None:
                assert self._side_outputs is not None
                self._side_outputs.deliver(route.side, side)
            return output

        return forward

    def position(self, module: str) -> int:
        """A module's place in order of registration."""
        return self._order[module]

    def _multiplied_in(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters of a module that kernels multiply by."""
        own = ((self.parameters.name(p), p) for p in module.parameters() if id(p) in self.parameters.block_of)
        return {name: parameter for name, parameter in own if name in self.kernels}

    @property
    def walking(self) -> tuple[int, int]:
        """The visit and the micro-batch of the block that is computed now, in either direction."""
        _, visit, micro_batch = self._walking
        return visit, micro_batch

    def own_forward(self, module: str) -> Callable[..., Any]:
        """The module's forward as the model wrote it."""
        return self._forwards[module]

    def _arrived(self, block: Block, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            walking, use, micro_batch = self._walking
            if not block.resident and walking != block.index:
                where = "glue between blocks" if walking is None else f"block '{self.blocks[walking].name}'"
                raise AuditError(
                    f"parameter '{name}' of block '{block.name}' is given a gradient by {where}: call the module that owns "
                    f"it, or put both into one block with a block rule"
                )
            self._sink(block.index, name, use, micro_batch, grad)

        return hook

    # a step

    def begin(
        self,
        micro_batches: Mapping[int, Any],
        weights: Mapping[int, float],
        loss_fn: LossFunction,
        *,
        seed: int,
        step: int,
    ) -> None:
        """Starts every micro-batch, by its index in the step; each runs to its first block."""
        self._routes = {}
        for index, micro_batch in micro_batches.items():
            way = tape.Way()
            thread = MicroBatch(
                index,
                lambda mb=micro_batch: loss_fn(self.model, mb),  # type: ignore[misc]
                self.generators,
                self.device,
                lambda parameter: self._foreign.check(parameter, "between blocks"),
                way.cut,
            )
            self._routes[index] = _Route(thread, weights[index], way)
        for index, route in self._routes.items():
            route.thread.resume(seed=seed_of(seed, step, index))

    def wants(self, micro_batch: int) -> str | None:
        """The module that a micro-batch waits for; None once it has its loss."""
        request = self._routes[micro_batch].thread.request
        return None if request is None else request.module

    def top(self, micro_batch: int) -> tuple[int, int] | None:
        """`(visit, block)` of the last call on a micro-batch's tape that is not walked yet."""
        call = self._routes[micro_batch].way.last_call
        return (call.visit, call.block) if call is not None else None

    def forward(self, visit: int, micro_batch: int, *, keep: bool) -> None:
        """One micro-batch through the block that it waits for, and on to its next request."""
        route = self._routes[micro_batch]
        request = route.thread.request
        assert request is not None
        assert route.thread.rng is not None
        assert self.slabs is not None
        assert self.activations is not None
        call = self._call(visit, request, route)
        self._walking, self.going_back = (call.block, visit, micro_batch), False
        for tensor in call.tensors:
            if id(tensor) in route.thread.superseded:
                raise route.thread.changed_in_place("an operation", tensor)
        self.activations.wait((visit, micro_batch))
        self.activations.ensure(call.tensors)
        first_pass = None
        if call.module not in self._audited:
            self._audited.add(call.module)
            module = self._modules[call.module]
            first_pass = audit.FirstPass(call.module, module, self._foreign, self._multiplied_in(module))
        keep = keep and first_pass is None  # a kept graph keeps alive what the audit looks for
        if call.modes.grad:
            route.way.cut_in_place(call.tensors)
        meter = _Meter(self.slabs) if self.measuring else None
        saved = _kept(self.slabs, meter) if keep else tape.Dropped(meter.note if meter is not None else None)
        reply, rng = tape.forward(
            call, self.generators, route.thread.rng, self._side_outputs, saved, first_pass=first_pass
        )
        if first_pass is not None and call.graph is not None and call.graph.has_custom_function():
            self._recomputed_whole.add(call.module)
        if not keep and call.module in self._recomputed_whole:
            call.graph = None
        if meter is not None:
            self.measured.kept_bytes[visit] = max(self.measured.kept_bytes[visit], meter.nbytes)
            meter.forget()
        route.way.entries.append(call)
        route.thread.rng = rng
        del request
        route.thread.resume(reply)

    def _call(self, visit: int, request: Request, route: _Route) -> tape.Call:
        inputs, spec = torch.utils._pytree.tree_flatten((request.args, request.kwargs))
        block = self.block_of_module[request.module]
        return tape.Call(
            visit, block, request.module, self._forwards[request.module], inputs, spec, request.modes, route.side
        )

    def spill(self, visit: int, micro_batch: int, *, to_disk: bool) -> None:
        """Moves the inputs of a visit out, after its forward."""
        assert self.activations is not None
        assert self.slabs is not None
        route = self._routes[micro_batch]
        call = route.way.last_call
        if call is None or call.visit != visit:
            return
        held, aliases = _references(route.way.entries)
        candidates = [x for x in _unique(call.inputs) if not self.slabs.within(x)]
        held.update(id(x) for x in candidates if self.activations.backs((visit, micro_batch), x))
        # two more: the list of candidates, and the variable that runs through it
        tensors = [x for x in candidates if spillable(x, held[id(x)] + 2, aliases[id(x)])]
        del candidates
        if self.measuring:
            size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            self.measured.boundary_bytes[visit] = max(self.measured.boundary_bytes[visit], size)
        self.activations.spill((visit, micro_batch), tensors, to_disk=to_disk)

    def restore(self, visit: int, micro_batch: int) -> None:
        assert self.activations is not None
        self.activations.restore((visit, micro_batch))

    def turn(self, micro_batch: int) -> float:
        """A micro-batch's loss, and backward through the glue behind its last block.

        Returns:
            The loss, not weighted.

        Raises:
            AuditError: the loss function returned something that is no scalar with a gradient.
        """
        route = self._routes[micro_batch]
        loss = route.thread.loss
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = (
                f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else loss
            )
            raise AuditError(
                f"the loss of micro-batch {micro_batch} is {found!r}: expected a scalar tensor that depends on the model's "
                f"trained parameters; return it from loss_fn"
            )
        route.thread.loss = None
        call = route.way.last_call
        if self.measuring and call is not None:
            logits = [y for y in call.outputs if y is not None]
            # the outputs and their gradients, and in fp32 a copy, its softmax and that one's gradient
            size = sum(y.numel() * (2 * y.itemsize + 12) for y in logits)
            lasting, between = self._on_tape(route.way.entries)
            self.measured.loss_bytes = max(self.measured.loss_bytes, between + size)
            self.measured.lasting_bytes = max(self.measured.lasting_bytes, lasting)
        walking = self._walker(micro_batch, -1, -1)
        walking(len(route.way.entries))
        (loss * route.weight).sum().backward()
        route.way.through_glue(walking)
        return float(loss.detach())

    def _on_tape(self, entries: Sequence[tape.Call | tape.Glue]) -> tuple[int, int]:
        """Bytes on a tape that were not spilled: up to the last call but one, and between it and the last."""
        assert self.slabs is not None
        assert self.activations is not None
        calls = [position for position, entry in enumerate(entries) if isinstance(entry, tape.Call)]
        *_, before, last = [0, *calls]
        meter = _Meter(self.slabs)
        lasting = 0
        for position, entry in enumerate(entries[:last]):
            if isinstance(entry, tape.Glue):
                held = entry.leaves
            elif entry.graph is None or entry.graph.dropped is not None:
                held = entry.tensors
            else:
                held = []  # its kept activations are counted for themselves
            for tensor in held:
                if not self.activations.is_out(tensor):
                    meter.note(tensor)
            if position == before:
                lasting = meter.nbytes
        return lasting, meter.nbytes - lasting

    def _walker(self, micro_batch: int, block: int, visit: int) -> Callable[[int | None], None]:
        """Notes what is being walked: a block's visit, or glue at a position of the tape."""

        def walking(position: int | None) -> None:
            self._walking = (block, visit, micro_batch) if position is None else (None, position, micro_batch)
            self.going_back = True

        return walking

    def backward(self, visit: int, micro_batch: int) -> None:
        """One micro-batch back through its last call that is not walked yet."""
        assert self.slabs is not None
        assert self.activations is not None
        route = self._routes[micro_batch]
        call = route.way.last_call
        assert call is not None
        assert call.visit == visit
        self.activations.wait((visit, micro_batch))
        self.activations.ensure(call.tensors)

        walking = self._walker(micro_batch, call.block, visit)
        route.way.backward(self.generators, self._side_outputs, _kept(self.slabs, None), walking)
        self.activations.drop((visit, micro_batch))

    def end(self) -> None:
        """Ends a step, complete or not: threads stop, nothing is kept."""
        for route in self._routes.values():
            route.thread.stop()
        self._routes = {}
        if self.activations is not None:
            self.activations.clear()
        for block in self.blocks:
            for _, parameter in self.parameters.of(block.index):
                parameter.grad = None
        pages.trim()

    def uses(self, visits: Sequence[Visit]) -> dict[str, list[int]]:
        """The visits that use each parameter, in order; more than one means that it is tied."""
        found: dict[str, list[int]] = defaultdict(list)
        names = {id(p): name for block in self.blocks for name, p in self.parameters.of(block.index)}
        for number, visit in enumerate(visits):
            for parameter in self._modules[visit.module].parameters():
                if self.block_of_module[visit.module] == visit.block:
                    found[names[id(parameter)]].append(number)
        return found


def _references(entries: Sequence[tape.Call | tape.Glue]) -> tuple[Counter[int], Counter[int]]:
    """How often a tape refers to each tensor, and how many leaves of its graphs share its bytes, by id.

    The latest entries are all that matter to the latest call.
    """
    counts: Counter[int] = Counter()
    aliases: Counter[int] = Counter()
    calls = 0
    for entry in reversed(entries):
        if isinstance(entry, tape.Call):
            calls += 1
            counts.update(id(x) for x in (*entry.inputs, *entry.outputs))
            if entry.graph is not None:
                aliases.update(entry.graph.leaves.keys())
        else:
            counts.update(map(id, entry.leaves))
        if calls == 3:
            break
    return counts, aliases


def _unique(leaves: Sequence[Any]) -> list[Tensor]:
    return list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())


class _Meter:
    """Adds up the bytes of what autograd saves, each storage once, without the weights. Keeps none of it alive."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self.nbytes = 0
        self._seen: dict[int, StorageWeakRef] = {}  # while it is here no other storage gets the same number

    def note(self, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata not in self._seen and not self._slabs.within(tensor):
            self._seen[storage.cdata] = storage
            self.nbytes += tensor.untyped_storage().nbytes()

    def forget(self) -> None:
        """Lets go of the storages: the hooks that hold this meter live as long as their graph."""
        self._seen.clear()


def _kept(slabs: Slabs, meter: _Meter | None) -> tape.Hooks:
    """Hooks that keep what autograd saves, but for the weights, which are where their block is."""
    if meter is None:
        return slabs.pack, slabs.unpack

    def pack(tensor: Tensor) -> Any:
        meter.note(tensor)
        return slabs.pack(tensor)

    return pack, slabs.unpack
