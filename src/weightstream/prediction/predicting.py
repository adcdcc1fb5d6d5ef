"""What a run would take, before it starts: its plan, a machine's profile, and the simulator on the same schedule.

A model's kernels are counted (`census.py`), priced (`costing.py`) and put on a virtual clock (`simulator/`), with the facts
and the allotment that the run itself would have.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weightstream.cluster import Cluster
from weightstream.engine.engine import DTYPES, Engine
from weightstream.engine.multiplying import kept_structure_bytes
from weightstream.engine.steps import default_loss
from weightstream.experts.reaching import ExpertBytes, Reached
from weightstream.machine.profile import Profile
from weightstream.prediction.census import Census, take
from weightstream.prediction.costing import Costs, Product, Sparse, hardware_of, slowdown_of
from weightstream.schedule.allotment import Allotment, Facts, buffers_bytes
from weightstream.schedule.flows import disk_bound
from weightstream.simulator.durations import Durations, ExpertWork
from weightstream.simulator.hardware import Hardware
from weightstream.simulator.simulator import Simulation, simulate
from weightstream.sparse.choosing import Curve, Piece, speedup_of
from weightstream.sparse.codec import decoding_steps
from weightstream.sparse.native.products import as_elements
from weightstream.units import MIB, format_bytes, format_count, format_seconds
from weightstream.worker.expanding import Driven

MOST_STRETCHES = 6
"""Kinds of steps of a run whose masks change that are predicted by themselves."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that the simulator is given."""

    facts: Facts
    allotment: Allotment
    durations: Durations
    hardware: Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A steady step: its length, and how long each resource works for it if it never waits, in seconds.

    Bytes are of all ranks together, with those of `experts`; `memory_bytes` of the rank that holds most and
    `all_memory_bytes` of all together, beyond what idle processes have.
    """

    inputs: Inputs
    simulation: Simulation
    seconds_per_step: float
    compute_s: float
    optimizer_s: float
    disk_s: float
    link_s: float
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    all_memory_bytes: int
    experts: ExpertBytes | None = None

    @property
    def binds(self) -> str:
        """What works longest."""
        busy = {"compute": self.compute_s, "optimizer": self.optimizer_s, "disk": self.disk_s, "link": self.link_s}
        return max(busy, key=lambda name: busy[name])

    def seconds_by_kind(self) -> dict[str, float]:
        """What each kind of operation that computes takes of a step on one rank, as `StepResult.seconds` counts it."""
        return {kind: _computed(self.inputs, kind) for kind in ("forward", "backward", "turn", "reduce", "update")}

    def compute_bound_micro_batches(self) -> int:
        """The fewest micro-batches per step with which compute works longer than anything else."""
        each = self.compute_s / self.inputs.facts.micro_batches
        return max(1, ceil(max(self.optimizer_s, self.disk_s, self.link_s) / each))


def sparse_of(
    engine: Engine, profile: Profile, step: int | None, *, kept_places: Collection[int], tokens: int, threads: int
) -> dict[int, Sparse]:
    """By block what is sparse of an engine's model in a step, and how it is multiplied.

    Args:
        kept_places: blocks of which it is known where their non-zeros are, so that masks are not gone through, nor is anything
            found that kernels ask of them.
        tokens: of one micro-batch.
    """
    blocks: dict[int, _Counted] = {}
    for unit, pieces in engine.outlook.sparsity_at(step).items():
        block = engine.store.units[unit].block
        own = blocks.setdefault(block, _Counted())
        shapes = {p.name: p.numel for p in engine.store.units[unit].parameters}
        for piece in pieces:
            cells, searched = shapes[piece.name] // prod(piece.block), block not in kept_places
            if (driven := engine.multiplied.get(piece.name)) is not None:
                if searched and kept_structure_bytes(driven) is not None:  # of others a product's own figure has it
                    own.steps += decoding_steps(cells, piece.ones)
                    own.prepared += piece.nonzeros if as_elements(piece.block) else piece.ones
                continue
            own.nonzeros[piece.block[1]] += piece.nonzeros
            own.elements += shapes[piece.name]
            own.steps += decoding_steps(cells, piece.ones) if searched else 0
    found = {}
    for index, own in blocks.items():
        parameters = [p for p in engine.store.blocks[index].parameters if p.trainable]
        products = []
        for parameter in parameters:
            if (driven := engine.multiplied.get(parameter.name)) is not None:
                seen = Piece(
                    block=driven.block, density=driven.nonzeros / parameter.numel, dtype=_dtype_of(engine), tokens=tokens,
                    threads=threads, device=engine.device.type,
                )  # fmt: skip
                products.append(_product(parameter.shape, driven, seen, profile.sparse))
        found[index] = Sparse(
            nonzeros=dict(own.nonzeros), elements=own.elements, decoding_steps=own.steps,
            parameters=sum(p.numel for p in parameters), products=products, prepared=own.prepared,
        )  # fmt: skip
    return found


@dataclass(slots=True)
class _Counted:
    nonzeros: Counter[int] = field(default_factory=Counter)
    elements: int = 0
    steps: int = 0
    prepared: int = 0


def _product(shape: tuple[int, ...], driven: Driven, piece: Piece, curves: Sequence[Curve]) -> Product:
    """How a kernel compares with the dense product; as fast where that was not measured."""
    return Product(shape=(shape[0], shape[1]), speedup=speedup_of(curves, driven.kernel, piece) or 1.0)


def census_of(engine: Engine, micro_batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss) -> Census:
    """The kernels of one micro-batch of an engine's model."""
    modules = [visit.module for visit in engine.runtime.facts.visits]
    forwards = {module: engine.worker.own_forward(module) for module in modules}
    dense = {p.name: p.shape for block in engine.store.blocks for p in block.parameters if p.name in engine.multiplied}
    with_experts = frozenset[int]().union(*engine.experts.blocks.values())
    by_values = {visit.module for visit in engine.runtime.facts.visits if visit.block in with_experts}
    with engine.experts.standing_in():
        return take(
            engine.model, modules, loss_fn, micro_batch, dtype=DTYPES[engine.precision], forwards=forwards, shapes=dense,
            by_values=by_values,
        )  # fmt: skip


def predict(
    engine: Engine,
    micro_batch: Any,
    profile: Profile,
    *,
    micro_batches: int,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    cluster: Cluster | None = None,
    threads: int | None = None,
    step: int | None = None,
    census: Census | None = None,
    keep_spans: bool = False,
    reached: Mapping[str, Reached] | None = None,
) -> Prediction:
    """A steady step of so many micro-batches like this one, on the virtual clock; with its spans if asked for.

    Args:
        engine: one that has rehearsed the micro-batch, or made a step of such.
        cluster: whose plan is asked for; by default the engine's own.
        threads: of each rank.
        step: of training, which says how sparse the model is; by default as it is now.
        census: of this micro-batch, where it is known already.
        reached: what the step reaches of layers of experts; by default what is expected (`Experts.expected`).

    Raises:
        PlanError: such steps do not fit, or the model makes other calls than planned.
    """
    cluster, threads = cluster or engine.cluster, threads or engine.threads
    _, allotment = engine.outlook.planned_for(cluster, micro_batches)
    facts = engine.outlook.facts_at(cluster, micro_batches, step)
    costs = Costs(
        profile, threads, optimizer=type(engine.optimizer).__name__,
        slowdown=slowdown_of(profile, cluster.size, threads), ranks=cluster.size,
    )  # fmt: skip
    durations = costs.durations(
        census or census_of(engine, micro_batch, loss_fn), facts, allotment,
        tensors=[sum(parameter.trainable for parameter in block.parameters) for block in engine.store.blocks],
        clipped=engine.clip_norm is not None, dtype=_dtype_of(engine), owners=len(cluster.memory_ranks),
        sparse=sparse_of(
            engine, profile, step, kept_places=allotment.kept_places, tokens=_tokens_of(micro_batch), threads=threads
        ),
    )  # fmt: skip
    if reached is None:
        reached = engine.experts.expected(micro_batches, cluster)
    experts = _experts(engine, costs, cluster, reached, facts)
    durations = replace(durations, experts=experts)
    inputs = Inputs(facts, allotment, durations, hardware_of(profile, cluster, threads=threads))
    whole = engine.outlook.facts_at(cluster, micro_batches, step, whole=True)
    return _prediction_of(inputs, engine, profile, whole, reached, keep_spans=keep_spans)


def _experts(
    engine: Engine, costs: Costs, cluster: Cluster, reached: Mapping[str, Reached], facts: Facts
) -> tuple[ExpertWork, ...]:
    """What a rank does for the experts that are reached; each owner and each worker has an equal part."""
    owners, workers = len(cluster.memory_ranks), cluster.workers
    found = []
    for name, own in reached.items():
        moved = engine.experts.bytes_of({name: own})
        seconds = costs.experts_s(
            own.touched / owners, facts.present * own.each, engine.experts.numel(name), load_bytes=moved.read // owners,
            record_bytes=moved.written // owners, clipped=engine.clip_norm is not None, dtype=_dtype_of(engine),
        )  # fmt: skip
        found.append(
            ExpertWork(
                block=min(engine.experts.blocks[name]), read_bytes=moved.read // owners,
                written_bytes=moved.written // owners, update=seconds,
                down_bytes=moved.down // workers, up_bytes=moved.up // workers,
            )
        )  # fmt: skip
    return tuple(found)


def _dtype_of(engine: Engine) -> str:
    return str(DTYPES[engine.precision]).removeprefix("torch.")


def _tokens_of(micro_batch: Any) -> int:
    """Rows that the layers of a model multiply: the elements of its first tensor of numbers of tokens, else its rows."""
    leaves = tree_leaves(micro_batch)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if first is None or not first.ndim:
        return 1
    return first.shape[0] if first.is_floating_point() else first.numel()


def _prediction_of(
    inputs: Inputs,
    engine: Engine,
    profile: Profile,
    whole: Facts,
    reached: Mapping[str, Reached],
    *,
    keep_spans: bool,
) -> Prediction:
    """The simulation of what was put together for it, and what each resource works."""
    facts, allotment, durations, hardware = inputs.facts, inputs.allotment, inputs.durations, inputs.hardware
    simulation = simulate(facts, allotment, durations, hardware, keep_spans=keep_spans)
    busy, size = simulation.busy_s, hardware.cluster.size
    crowded = max(1.0, hardware.hosts.count(0) * hardware.cores_per_rank / hardware.cores_per_host)
    read, written = simulation.read_bytes, simulation.written_bytes
    if size > 1:  # of all ranks together; the simulation tells of the one that moves most
        bound = disk_bound(whole, allotment)
        read, written = bound.read, bound.written
    experts = engine.experts.bytes_of(reached) if reached else None
    if experts is not None and size > 1:
        read, written = read + experts.read, written + experts.written
    memory = _memory_by_rank(inputs, engine, profile, reached)
    handed = [sum(each.down_bytes for each in durations.experts), sum(each.up_bytes for each in durations.experts)]
    rate = hardware.link.bytes_per_s if hardware.link else float("inf")
    link_s = max(busy.get(way, 0.0) + nbytes / rate for way, nbytes in zip(("down", "up"), handed, strict=True))
    return Prediction(
        inputs=inputs, simulation=simulation, seconds_per_step=simulation.step_s,
        compute_s=crowded * sum(_computed(inputs, kind) for kind in ("forward", "backward", "turn", "reduce")),
        optimizer_s=crowded * (_computed(inputs, "update") + sum(each.update for each in durations.experts)),
        disk_s=_disk_s(busy, hardware), link_s=link_s, read_bytes=read, written_bytes=written,
        memory_bytes=max(memory), all_memory_bytes=sum(memory), experts=experts,
    )  # fmt: skip


def _memory_by_rank(inputs: Inputs, engine: Engine, profile: Profile, reached: Mapping[str, Reached]) -> list[int]:
    """What is allotted, what a process needs besides, experts that are reached, and the holes of the heap.

    All ranks have the same plan; of buffers for records only that fills which a rank owns.
    """
    cluster = inputs.hardware.cluster
    facts, allotment = engine.outlook.planned_for(cluster, inputs.facts.micro_batches)  # there is room for every step
    besides = allotment.device_bytes + profile.executor.process_bytes + _holes_bytes(facts, allotment)
    besides += allotment.host_bytes - buffers_bytes(facts, allotment)
    besides += engine.experts.held_bytes(reached, len(cluster.memory_ranks), facts.present, facts.sums_at_once)
    every = [facts] * cluster.size
    if cluster.size > 1:
        every = [engine.outlook.facts_of_rank(rank, cluster, facts.micro_batches) for rank in range(cluster.size)]
    return [besides + buffers_bytes(own, allotment) for own in every]


def _holes_bytes(facts: Facts, allotment: Allotment) -> int:
    """What the heap leaves free between what is in use, where activations lie in it: a bound, not a mean.

    Its parts are always there, around what one block works in, around kept activations, and around what each passage of a
    micro-batch through a block leaves until its way back. Pages are given back where they exceed the budgets by 2%.
    Where a machine has huge pages to give, all of a buffer is resident however little of it was touched, so that nothing
    untouched makes up for holes: runs then came to 12 MiB more than half of the first figure would allow for. Gradients of
    a block's weights come and go in the heap, too: runs of wide blocks were closest to the bound before it counted them.
    """
    if not facts.host_is_device:
        return 0
    kept = facts.present * sum((facts.kept_bytes or (0,) * len(facts.visits))[visit] for visit in allotment.keep)
    passages = facts.present * len(facts.visits)
    holes = 32 * MIB + 2 * facts.workspace_bytes + kept // 4 + passages * MIB // 2 + allotment.slab_bytes // 2
    unused = facts.device_memory - allotment.device_bytes + facts.host_memory - allotment.host_bytes
    return min(holes, max(0, unused) + (facts.device_memory + facts.host_memory) // 20)


def _disk_s(busy: Mapping[str, float], hardware: Hardware) -> float:
    """Seconds that a disk works if it never waits: both directions together as far as they overlap, then the longer one."""
    read_s, write_s = busy.get("read", 0.0), busy.get("write", 0.0)
    both = 2 / hardware.disk.together if hardware.disk else 1.0
    return both * min(read_s, write_s) + abs(read_s - write_s)


def _computed(inputs: Inputs, kind: str) -> float:
    """Seconds of one rank's operations of a kind that computes, with what the executor adds to each."""
    facts, durations = inputs.facts, inputs.durations
    visits, blocks, present = len(facts.visits), sum(block.trainable for block in facts.blocks), facts.present
    again = [visit for visit in range(visits - 1) if visit not in inputs.allotment.keep]
    seconds, count = {
        "forward": (present * sum(durations.forward), present * visits),
        "backward": (
            present * (sum(durations.backward) + sum(durations.recompute[visit] for visit in again)), present * visits
        ),
        "turn": (present * durations.turn, present),
        "reduce": (sum(durations.reduce), blocks),
        "update": (sum(durations.update) / len(inputs.hardware.cluster.memory_ranks), blocks),
    }[kind]  # fmt: skip
    return seconds + count * durations.overhead.get(kind, 0.0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """So many steps of a run that are alike, of which `step` is one, and what one of them takes."""

    step: int | None
    steps: int
    found: Prediction


def stretches(engine: Engine, steps: int, predicted: Callable[[int | None], Prediction]) -> list[Stretch]:
    """A run whose masks change, in pieces of steps that are nearly alike; one piece if all of them are alike.

    Of more than a few kinds of steps those that are predicted stand also for the ones between them.
    """
    kinds: list[tuple[int | None, int]] = [(None, steps)]
    if engine.masking is not None:
        kinds = list(engine.masking.alike(steps))
    every = len(kinds)
    few = min(every, MOST_STRETCHES)
    chosen = [round(place * (every - 1) / max(1, few - 1)) for place in range(few)]
    counts: Counter[int] = Counter()
    for place, (_, count) in enumerate(kinds):
        counts[min(chosen, key=lambda pick, place=place: (abs(pick - place), pick))] += count  # type: ignore[misc]
    return [Stretch(kinds[pick][0], counts[pick], predicted(kinds[pick][0])) for pick in chosen]


def commonest(pieces: Sequence[Stretch]) -> Stretch:
    """The kind of step that a run has most of."""
    return max(pieces, key=lambda piece: piece.steps)


def prediction_text(pieces: Sequence[Stretch], *, tokens_per_micro_batch: int, disk_bytes: int | None = None) -> str:
    """The prediction of a run as a person reads it, in the lines of a plan.

    Args:
        disk_bytes: the size of the disk that is written to.
    """
    found = commonest(pieces).found
    tokens = tokens_per_micro_batch * found.inputs.facts.micro_batches
    needed = found.compute_bound_micro_batches() * tokens_per_micro_batch
    each = found.seconds_per_step
    enough = "is so already" if found.binds == "compute" else f"with {format_count(needed)} tokens per step"
    steps = sum(piece.steps for piece in pieces)
    run_s = sum(piece.found.seconds_per_step * piece.steps for piece in pieces)
    written = sum(piece.found.written_bytes * piece.steps for piece in pieces)
    wear = "" if disk_bytes is None else f", {written / disk_bytes:.2g} times all of it"
    lines = [
        f"seconds per step  {each:.3g} predicted, {format_count(tokens / each)} tokens/s; {found.binds} binds: compute "
        f"{found.compute_s:.3g} s, optimizer {found.optimizer_s:.3g} s, disk {found.disk_s:.3g} s, link {found.link_s:.3g} s",
        f"compute-bound     {enough} ({format_count(tokens)} now)",
        f"the run           {format_seconds(run_s)} for {steps} steps; {format_bytes(written)} written to the disk{wear}",
    ]
    if len(pieces) > 1:
        told = ", ".join(
            f"{piece.found.seconds_per_step:.3g} s like step {piece.step} ({piece.steps})" for piece in pieces
        )
        lines.append(f"as masks change   {told}")
    return "\n".join(lines)
