"""A preset model on a preset cluster: the facts that the planner asks for, by arithmetic, and how long each part takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from weightstream.errors import PlanError
from weightstream.schedule.allotment import RESTORE_AHEAD, Allotment, Facts, Tier, allot
from weightstream.schedule.cost import BlockFacts
from weightstream.schedule.operations import Visit
from weightstream.simulator.clusters import ClusterPreset
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Hardware
from weightstream.simulator.models import ModelShape, Part, SparseShape
from weightstream.units import format_bytes, format_count

STREAMED_BYTES = 2  # per parameter and fetch, in 16 bits: twice a step, so 32 bits per parameter, step and direction …
GRADIENT_BYTES = 4  # … as there are on the way up, once a step in fp32
STATE_BYTES = 12  # fp32 master and Adam's two moments
PROVISIONED_BYTES = 20
"""Bytes per parameter that MemoryX is sized by: 4 TB for 200 billion, 2.4 PB for 120 trillion (vendor's glossary)."""
PLACE_BYTES = 4
"""Where a non-zero is while its block is on a device."""
UPDATE_BYTES = 2 * STATE_BYTES + GRADIENT_BYTES + STREAMED_BYTES
ACTIVATION_BYTES = 2
LOGIT_BYTES = 6
"""Per token and entry of the vocabulary: scores in 16 bits and their gradient in fp32."""
WEIGHTS_SHARE = 0.4
"""Of device memory, for two slabs and the gradient of a block: what decides whether a layer is cut."""
RECORDS_AHEAD = 4  # where records lie in memory, nothing is gained by bringing more of them to buffers beforehand
SUMS_TRAVELLING = 2  # how many blocks' gradients a rank holds on their way, as in the runtime
MOST_VISITS = 1500
"""Blocks up to which a model is planned as a whole; of one with more, a few layers are planned, since all are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, on what.

    Args:
        batch: sequences per step, all systems together.
        sequence: tokens in each.
        clipping: by the global norm, so that a step's updates wait for the next one.
        slowdown: by number of the system, how many times slower it computes.
        efficiency: inside a layer; by default the cluster's.
        sparse: how sparse its layers are, if they are.
    """

    model: ModelShape
    cluster: ClusterPreset
    workers: int
    batch: float
    sequence: int
    clipping: bool = False
    slowdown: Mapping[int, float] = field(default_factory=dict)
    efficiency: float | None = None
    sparse: SparseShape | None = None

    @property
    def nonzeros(self) -> int:
        """Parameters that exist."""
        if self.sparse is None:
            return self.model.parameters
        return self.model.parameters - sum(p.parameters - p.nonzeros(self.sparse) for p in self.parts())

    @property
    def record_bytes(self) -> int:
        """Of one version of all records: masters, moments, the copy that streams, and masks."""
        masks = sum(part.mask_bytes(self.sparse) for part in self.parts())
        return (STATE_BYTES + STREAMED_BYTES) * self.nonzeros + masks

    @property
    def provisioned_bytes(self) -> int:
        """Memory that a store apart has for it."""
        return self.record_bytes + (PROVISIONED_BYTES - STATE_BYTES - STREAMED_BYTES) * self.nonzeros

    @property
    def needed_bytes(self) -> int:
        """Of a cluster's memory, or of its disk where that is where records are."""
        if self.cluster.apart:
            return self.provisioned_bytes
        return 3 * self.record_bytes + (GRADIENT_BYTES if self.clipping else 0) * self.nonzeros

    @property
    def reachable(self) -> int:
        """Parameters of the largest model like it that the cluster's store holds."""
        room = self.cluster.memory_bytes if self.cluster.apart else self.cluster.disk_bytes
        return self.model.parameters * room // max(1, self.needed_bytes)

    @property
    def tokens(self) -> float:
        """Of one step."""
        return self.batch * self.sequence

    @property
    def flops_per_s(self) -> float:
        """Of one system, as long as it computes."""
        return self.cluster.peak_flops * (self.efficiency or self.cluster.efficiency)

    @property
    def most_parameters(self) -> float:
        """Of a block, so that two of them and the gradient of one have room beside activations."""
        return WEIGHTS_SHARE * self.cluster.device_memory / (2 * STREAMED_BYTES + GRADIENT_BYTES)

    def parts(self, layers: int | None = None) -> tuple[Part, ...]:
        """What is visited, in order: embedding, layers (only so many of them), head."""
        most = self.most_parameters
        return (*self.model.parts(most, layers), *self.model.heads_within(most))

    @property
    def compute_s(self) -> float:
        """Seconds that one system computes in a step in which every layer but the head is computed again."""
        parts = self.parts()
        again = sum(part.forward_flops(self.sequence, self.sparse) for part in parts[:-1])
        once = again + parts[-1].forward_flops(self.sequence, self.sparse)
        return self.tokens / self.workers * (3 * once + again) / self.flops_per_s

    @property
    def update_s(self) -> float:
        """Seconds that all updates of a step take at their owners."""
        return self.nonzeros * UPDATE_BYTES / self.cluster.update_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job as both planner and simulator take it.

    Args:
        each: micro-batches of one system.
        layers: how many of the model's layers these facts have; the rest cost the same again.
        blocks: of the whole model.
    """

    job: Job
    facts: Facts
    allotment: Allotment
    durations: Durations
    hardware: Hardware
    each: int
    layers: int
    blocks: int

    @property
    def operations(self) -> int:
        """Forward and backward, all systems together."""
        return 2 * len(self.facts.visits) * self.facts.micro_batches

    @property
    def spilled(self) -> float:
        """The share of activations between blocks that does not stay on the device."""
        sizes = self.facts.boundary_bytes or ()
        away = sum(size for size, tier in zip(sizes, self.allotment.boundaries, strict=True) if tier != "device")
        return away / max(1, sum(sizes))


def prepare(job: Job) -> Prepared:
    """Plans a job as a whole: of all divisions into micro-batches the one that spills least, and of those the coarsest.

    Raises:
        PlanError: it does not fit the cluster; the message says what is too small.
    """
    job.cluster.check(job.workers)
    _check_batch(job)
    _check_memory(job)
    best: Prepared | None = None
    refused: PlanError | None = None
    for each in _divisions(job.batch / job.workers):
        try:
            found = _planned(job, each, job.model.layers)
        except PlanError as error:
            refused = error
            continue
        if best is None or found.spilled < best.spilled - 1e-9:
            best = found
        if best.spilled == 0:
            break
    if best is None:
        assert refused is not None
        raise PlanError(
            f"{job.model.name} on {job.workers} {job.cluster.system}(s) of {job.cluster.name}, batch {job.batch:g} × "
            f"{job.sequence}: {refused}"
        )
    return best


def shortened(plan: Prepared, layers: int) -> Prepared:
    """The same plan for fewer layers: as many slabs, and the same share of activations spilled.

    Layers are alike, so that a step's seconds and bytes grow by the same amount with each of them.
    """
    facts = _facts(plan.job, plan.each, layers)
    return replace(
        plan, facts=facts, allotment=_in_memory(plan.allotment, facts, plan.spilled),
        durations=_durations(plan.job, plan.each, layers), layers=layers,
    )  # fmt: skip


def _in_memory(allotment: Allotment, facts: Facts, spilled: float) -> Allotment:
    """What a plan comes to where all records and gradients stay in memory, with this share of activations spilled."""
    everything = frozenset(block.index for block in facts.blocks)
    away = round(len(facts.visits) * spilled)
    tiers: list[Tier] = ["host" if visit < away else "device" for visit in range(len(facts.visits))]
    return replace(
        allotment, record_buffers=min(allotment.record_buffers, RECORDS_AHEAD),
        boundaries=tuple(tiers),
        staged_in_ram=everything, pinned_copies=everything, pinned_states=everything,
    )  # fmt: skip


def _check_batch(job: Job) -> None:
    if job.batch < job.workers:
        raise PlanError(
            f"a batch of {job.batch:g} sequences leaves {job.workers - job.batch:g} of {job.workers} "
            f"{job.cluster.system}s without any; give --batch {job.workers} or fewer workers"
        )


def _check_memory(job: Job) -> None:
    parameters, cluster = job.nonzeros, job.cluster
    existing = "" if job.sparse is None else " that exist"
    if cluster.apart:
        has, what = cluster.memory_bytes, "memory"
        why = f"{PROVISIONED_BYTES} bytes for each of {format_count(parameters)} parameters{existing}"
    else:
        has, what = cluster.disk_bytes, "disk"
        why = f"three versions of {format_count(parameters)} parameters{existing} with their optimizer state"
    if job.needed_bytes > has:
        raise PlanError(
            f"{job.model.name} needs {format_bytes(job.needed_bytes)} of {what} ({why}), {cluster.name} has "
            f"{format_bytes(has)}; take a smaller model, a sparser one (--sparsity) or a cluster with more"
        )


def _divisions(sequences: float) -> list[int]:
    """Micro-batches of one system: 1, 2, 4 and so on, as long as each has a sequence."""
    most = max(1, int(sequences))
    powers = [1 << power for power in range(most.bit_length())]
    return powers if powers[-1] == most else [*powers, most]


def _planned(job: Job, each: int, layers: int) -> Prepared:
    count = len(job.parts())
    if job.cluster.apart and count > MOST_VISITS:
        layers = min(layers, -(-4 * layers // count) * job.model.expert_every)
        facts = _facts(job, each, layers)
        allotment = _few_layers(job, facts, each)
    else:
        facts = _facts(job, each, layers)
        allotment = allot(facts)
        if job.cluster.apart:  # there is memory for all of it: what the planner would find one by one
            everything = frozenset(block.index for block in facts.blocks)
            allotment = replace(
                allotment, pinned_copies=everything, pinned_states=everything, staged_in_ram=everything,
                record_buffers=min(allotment.record_buffers, RECORDS_AHEAD),
            )  # fmt: skip
    if job.cluster.apart:
        allotment = replace(allotment, host_bytes=job.provisioned_bytes)
    return Prepared(
        job=job, facts=facts, allotment=allotment, durations=_durations(job, each, layers),
        hardware=job.cluster.hardware(job.workers, job.slowdown), each=each, layers=layers,
        blocks=count - 1 if job.model.tied else count,
    )  # fmt: skip


def _few_layers(job: Job, facts: Facts, each: int) -> Allotment:
    """The allotment of a few layers of many: memory is divided for all of them, and what of it is left to activations."""
    boundary = facts.boundary_bytes or ()
    passing = ceil((each + RESTORE_AHEAD + 2) * max(boundary) / each)  # of each micro-batch, as the planner counts it
    allotment = allot(replace(facts, boundary_bytes=None, kept_bytes=None, lasting_bytes=facts.lasting_bytes + passing))
    inputs = job.tokens / job.workers * ACTIVATION_BYTES * sum(part.input_width for part in job.parts())
    room = job.cluster.device_memory - allotment.device_bytes
    stays = min(1.0, room / inputs)
    return _in_memory(
        replace(allotment, device_bytes=round(allotment.device_bytes + stays * inputs), keep=frozenset()),
        facts,
        1 - stays,
    )


def _facts(job: Job, each: int, layers: int) -> Facts:
    model, cluster = job.model, job.cluster
    parts, ranks = job.parts(layers), cluster.ranks(job.workers)
    owners = len(ranks.memory_ranks)
    tokens = job.tokens / job.workers / each  # of one micro-batch
    blocks = tuple(
        _block(index, part, owners, job.sparse, tied=model.tied and index == 0)
        for index, part in enumerate(parts[:-1] if model.tied else parts)
    )
    visits = tuple(
        Visit(0 if model.tied and index == len(parts) - 1 else index, part.name) for index, part in enumerate(parts)
    )
    working = max(part.saved_width for part in parts) * ACTIVATION_BYTES
    return Facts(
        blocks=blocks, visits=visits, micro_batches=each * job.workers, reduction_groups=job.workers,
        deferred=job.clipping, device_memory=cluster.device_memory, host_memory=cluster.memory_bytes // _sharing(job),
        activations=cluster.activations, ram_tier=not cluster.apart, host_is_device=False,
        boundary_bytes=tuple(ceil(tokens * part.input_width * ACTIVATION_BYTES) for part in parts),
        kept_bytes=tuple(ceil(tokens * part.saved_width * ACTIVATION_BYTES) for part in parts),
        lasting_bytes=ceil(tokens * _between(parts, model) * ACTIVATION_BYTES),
        workspace_bytes=ceil(tokens * max(working, LOGIT_BYTES * _widest_head(parts, model))),
        share=each if ranks.size > 1 else None, share_groups=1 if ranks.size > 1 else None,
        sum_buffers=SUMS_TRAVELLING if ranks.size > 1 else 0,
    )  # fmt: skip


def _between(parts: tuple[Part, ...], model: ModelShape) -> int:
    """Elements per token that go from block to block within a layer that is cut: its own input, and the widest inside."""
    if len(parts) <= model.layers + 2:  # layers are whole: what goes between blocks is the next one's input
        return 0
    return model.width + model.intermediate * min(model.experts, model.experts_per_token)


def _sharing(job: Job) -> int:
    """How many ranks share a host's memory."""
    return 1 if job.cluster.apart else job.workers


def _widest_head(parts: tuple[Part, ...], model: ModelShape) -> int:
    """Entries of the vocabulary that are scored at once."""
    return max(part.parameters // model.width for part in parts if part.name.startswith("head"))


def _block(index: int, part: Part, owners: int, sparse: SparseShape | None, *, tied: bool) -> BlockFacts:
    nonzeros, mask_bytes = part.nonzeros(sparse), part.mask_bytes(sparse)
    gradient = GRADIENT_BYTES * nonzeros
    owned = ceil(nonzeros / owners)  # cut in panels: every owner has an equal part of each block
    owned_mask = ceil(mask_bytes / owners)
    compressed = STREAMED_BYTES * nonzeros + mask_bytes if nonzeros < part.parameters else 0
    return BlockFacts(
        index=index, name=part.name, streamed_bytes=STREAMED_BYTES * part.parameters,
        load_bytes=STATE_BYTES * owned + owned_mask, record_bytes=(STATE_BYTES + STREAMED_BYTES) * owned + owned_mask,
        gradient_bytes=gradient, tied_bytes=2 * gradient if tied else 0,
        owned_gradient_bytes=GRADIENT_BYTES * owned, compressed_bytes=compressed,
        places_bytes=PLACE_BYTES * nonzeros if compressed else 0,
    )  # fmt: skip


def _durations(job: Job, each: int, layers: int) -> Durations:
    parts = job.parts(layers)
    tokens = job.tokens / job.workers / each
    forward = tuple(tokens * part.forward_flops(job.sequence, job.sparse) / job.flops_per_s for part in parts)
    blocks = parts[:-1] if job.model.tied else parts
    # an owner has its part of each block, and its part of the rate
    rate = job.cluster.update_bytes_per_s / len(job.cluster.ranks(job.workers).memory_ranks)
    update = tuple(part.nonzeros(job.sparse) * UPDATE_BYTES / rate for part in blocks)
    return Durations(
        forward=forward, recompute=forward, backward=tuple(2 * seconds for seconds in forward), turn=0.0,
        update=update, reduce=(0.0,) * len(blocks),
    )  # fmt: skip
