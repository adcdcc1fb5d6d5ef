"""What a run would take, before it starts: its plan, a machine's profile, and the simulator on the same schedule.

A model's kernels are counted (`census.py`), priced (`costing.py`) and put on a virtual clock (`simulator/`), with the facts
and the allotment that the run itself would have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor, nn

from weightstream.census import Census, take
from weightstream.cluster import Cluster
from weightstream.costing import Costs, hardware_of, slowdown_of
from weightstream.engine import DTYPES, Engine, default_loss
from weightstream.machine.profile import Profile
from weightstream.schedule.planner import Allotment, Facts, buffers_bytes
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Hardware
from weightstream.simulator.simulator import Simulation, simulate
from weightstream.units import MIB, format_bytes, format_count, format_seconds


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

    Bytes are of all ranks together; `memory_bytes` of the rank that holds most and `all_memory_bytes` of all together, beyond
    what idle processes have.
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


def census_of(engine: Engine, micro_batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss) -> Census:
    """The kernels of one micro-batch of an engine's model."""
    modules = [visit.module for visit in engine.runtime.facts.visits]
    forwards = {module: engine.worker.own_forward(module) for module in modules}
    return take(engine.model, modules, loss_fn, micro_batch, dtype=DTYPES[engine.precision], forwards=forwards)


def predict(
    engine: Engine,
    micro_batch: Any,
    profile: Profile,
    *,
    micro_batches: int,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    cluster: Cluster | None = None,
    threads: int | None = None,
    keep_spans: bool = False,
) -> Prediction:
    """A steady step of so many micro-batches like this one, on the virtual clock; with its spans if asked for.

    Args:
        engine: one that has rehearsed the micro-batch, or made a step of such.
        cluster: whose plan is asked for; by default the engine's own.
        threads: of each rank.

    Raises:
        PlanError: such steps do not fit, or the model makes other calls than planned.
    """
    cluster, threads = cluster or engine.cluster, threads or engine.threads
    facts, allotment = engine.planned_for(cluster, micro_batches)
    costs = Costs(
        profile, threads, optimizer=type(engine.optimizer).__name__,
        slowdown=slowdown_of(profile, cluster.size, threads), ranks=cluster.size,
    )  # fmt: skip
    durations = costs.durations(
        census_of(engine, micro_batch, loss_fn), facts, allotment,
        tensors=[sum(parameter.trainable for parameter in block.parameters) for block in engine.store.blocks],
        clipped=engine.clip_norm is not None, dtype=str(DTYPES[engine.precision]).removeprefix("torch."),
        owners=len(cluster.memory_ranks),
    )  # fmt: skip
    inputs = Inputs(facts, allotment, durations, hardware_of(profile, cluster, threads=threads))
    return _prediction_of(inputs, engine, profile, keep_spans=keep_spans)


def _prediction_of(inputs: Inputs, engine: Engine, profile: Profile, *, keep_spans: bool) -> Prediction:
    """The simulation of what was put together for it, and what each resource works."""
    facts, allotment, durations, hardware = inputs.facts, inputs.allotment, inputs.durations, inputs.hardware
    simulation = simulate(facts, allotment, durations, hardware, keep_spans=keep_spans)
    busy, size = simulation.busy_s, hardware.cluster.size
    crowded = max(1.0, hardware.hosts.count(0) * hardware.cores_per_rank / hardware.cores_per_host)
    read, written = simulation.read_bytes, simulation.written_bytes
    if size > 1:  # of all ranks together; the simulation tells of the one that moves most
        bound = engine.bytes_bound_of(engine.whole_facts(facts.micro_batches), allotment)
        read, written = bound.read, bound.written
    memory = _memory_by_rank(inputs, engine, profile)
    return Prediction(
        inputs=inputs, simulation=simulation, seconds_per_step=simulation.step_s,
        compute_s=crowded * sum(_computed(inputs, kind) for kind in ("forward", "backward", "turn", "reduce")),
        optimizer_s=crowded * _computed(inputs, "update"), disk_s=busy.get("disk", 0.0),
        link_s=max(busy.get("down", 0.0), busy.get("up", 0.0)), read_bytes=read,
        written_bytes=written, memory_bytes=max(memory), all_memory_bytes=sum(memory),
    )  # fmt: skip


def _memory_by_rank(inputs: Inputs, engine: Engine, profile: Profile) -> list[int]:
    """What is allotted, what a process needs besides, and the holes of the heap.

    All ranks have the same plan; of buffers for records only that fills which a rank owns.
    """
    facts, allotment, cluster = inputs.facts, inputs.allotment, inputs.hardware.cluster
    besides = allotment.device_bytes + profile.executor.process_bytes + _holes_bytes(facts, allotment)
    besides += allotment.host_bytes - buffers_bytes(facts, allotment)
    every = [facts] * cluster.size
    if cluster.size > 1:
        every = [engine.facts_of_rank(rank, cluster, facts.micro_batches) for rank in range(cluster.size)]
    return [besides + buffers_bytes(own, allotment) for own in every]


def _holes_bytes(facts: Facts, allotment: Allotment) -> int:
    """What the heap leaves free between what is in use, where activations lie in it: a bound, not a mean.

    Its parts are always there, around what one block works in, around kept activations, and around what each passage of a
    micro-batch through a block leaves until its way back. Pages are given back where they exceed the budgets by 2%.
    """
    if not facts.host_is_device:
        return 0
    kept = facts.present * sum((facts.kept_bytes or (0,) * len(facts.visits))[visit] for visit in allotment.keep)
    passages = facts.present * len(facts.visits)
    holes = 16 * MIB + 2 * facts.workspace_bytes + kept // 4 + passages * MIB // 2
    unused = facts.device_memory - allotment.device_bytes + facts.host_memory - allotment.host_bytes
    return min(holes, max(0, unused) + (facts.device_memory + facts.host_memory) // 20)


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


def prediction_text(found: Prediction, *, tokens_per_micro_batch: int, steps: int) -> str:
    """The prediction of a run as a person reads it, in the lines of a plan."""
    tokens = tokens_per_micro_batch * found.inputs.facts.micro_batches
    needed = found.compute_bound_micro_batches() * tokens_per_micro_batch
    each = found.seconds_per_step
    enough = "is so already" if found.binds == "compute" else f"with {format_count(needed)} tokens per step"
    return "\n".join([
        f"seconds per step  {each:.3g} predicted, {format_count(tokens / each)} tokens/s; {found.binds} binds: compute "
        f"{found.compute_s:.3g} s, optimizer {found.optimizer_s:.3g} s, disk {found.disk_s:.3g} s, link {found.link_s:.3g} s",
        f"compute-bound     {enough} ({format_count(tokens)} now)",
        f"the run           {format_seconds(each * steps)} for {steps} steps; {format_bytes(found.written_bytes * steps)} "
        f"written to the disk",
    ])  # fmt: skip
