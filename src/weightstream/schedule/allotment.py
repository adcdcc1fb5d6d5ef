"""Who gets which memory: the first half of a plan.

A pure function of facts. `allot` decides how many slabs and record buffers there are, which activations are kept, where
boundary activations and gradients wait, and what stays in RAM; it refuses what cannot work and names the smallest budget
that does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weightstream.errors import PlanError
from weightstream.schedule.cost import BlockFacts
from weightstream.schedule.operations import Visit
from weightstream.schedule.reduction import partial_sums
from weightstream.schedule.residency import Candidate, most_saved
from weightstream.units import MIB, format_bytes

Activations = Literal["auto", "keep", "recompute"]
Tier = Literal["device", "host", "disk"]
RESTORE_AHEAD = 2
MOST_HELD = 8
"""Gradients of a block that are held and added in one pass; with more, their pieces no longer fit a cache together."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a plan depends on.

    `boundary_bytes` and `kept_bytes` are per visit and micro-batch: the inputs that backward needs again, and what a
    block's forward saves if it is not recomputed. They are None until a first step has measured them. `lasting_bytes`
    per micro-batch are what lies between blocks and cannot be spilled (the model itself still refers to it).

    With several ranks `share` is the most micro-batches that one of them computes, of `share_groups` reduction groups at
    most, `sum_buffers` how many blocks'
    gradients it holds on their way to their owners, and `fabric_bytes` what moving bytes between ranks takes besides.
    """

    blocks: tuple[BlockFacts, ...]
    visits: tuple[Visit, ...]
    micro_batches: int
    reduction_groups: int
    deferred: bool
    device_memory: int
    host_memory: int
    activations: Activations = "auto"
    prefetch: int = 2
    ram_tier: bool = True
    host_is_device: bool = True
    boundary_bytes: tuple[int, ...] | None = None
    kept_bytes: tuple[int, ...] | None = None
    lasting_bytes: int = 0
    workspace_bytes: int = 0
    share: int | None = None
    share_groups: int | None = None
    sum_buffers: int = 0
    fabric_bytes: int = 0

    @property
    def present(self) -> int:
        """Micro-batches that are in one rank's memory at once."""
        return self.micro_batches if self.share is None else self.share

    @property
    def sums_at_once(self) -> int:
        """Partial sums of gradients that one rank has at once, at most."""
        return partial_sums(self.present, self.share_groups or self.reduction_groups)


@dataclass(frozen=True, slots=True)
class Allotment:
    """Who gets which memory."""

    slabs: int
    slab_bytes: int
    resident_bytes: int
    partial_sums: int
    partial_bytes: int
    tied_bytes: int
    held_gradients: int
    held_bytes: int
    record_buffers: int
    record_bytes: int
    gradient_buffers: int
    gradient_bytes: int
    staged_in_ram: frozenset[int]
    pinned_copies: frozenset[int]
    pinned_states: frozenset[int]
    keep: frozenset[int]
    boundaries: tuple[Tier, ...]
    device_bytes: int
    host_bytes: int
    compressed_bytes: int = 0
    """In which sparse blocks land, beside each slab that blocks pass through."""
    beside_bytes: int = 0
    """The same with the places of their non-zeros."""
    kept_places: frozenset[int] = frozenset()
    """Blocks whose places are kept in host memory from one fetch to the next."""


def allot(facts: Facts) -> Allotment:
    """Divides device and host memory; every figure is bytes.

    Raises:
        PlanError: a budget is too small; the message names the smallest that works.
    """
    streaming = [block for block in facts.blocks if not block.resident]
    trained = [block for block in facts.blocks if block.trainable]
    resident_bytes = sum(block.streamed_bytes + block.beside_bytes for block in facts.blocks if block.resident)
    slab_bytes = max((block.streamed_bytes for block in streaming), default=0)
    compressed_bytes = max((block.compressed_bytes for block in streaming), default=0)
    beside_bytes = compressed_bytes + max((block.places_bytes for block in streaming), default=0)
    each_slab = slab_bytes + beside_bytes
    gradient_bytes = max((block.gradient_bytes for block in trained), default=0)
    staged_bytes = max((block.staged_bytes for block in trained), default=0)
    shared = sharing_records(facts.blocks)
    record_bytes = max((block.record_bytes for block in shared), default=0)
    partials = max(0, facts.sums_at_once - (1 if facts.host_is_device else 0))
    stations = stations_of(facts.visits)
    # sums that stay open while other blocks' come and go cannot share room for partial sums
    often = {b for b, count in Counter(s.block for s in stations).items() if count > 1}
    lasting = [block for block in trained if block.resident or block.index in often]
    tied_bytes = sum(block.tied_bytes for block in facts.blocks) + partials * sum(b.gradient_bytes for b in lasting)
    visits, micro_batches = len(facts.visits), facts.present
    boundary = facts.boundary_bytes or (0,) * visits
    largest_boundary = max(boundary, default=0)

    # device memory: slabs, sums, workspace and the boundaries in flight; then more slabs, boundaries, kept activations
    slabs = min(2, max(1, len({station.block for station in stations})))
    # each micro-batch has either its way forward or its gradient's way back in device memory
    in_flight = (micro_batches + RESTORE_AHEAD + 2) * largest_boundary + micro_batches * facts.lasting_bytes
    device = (
        slabs * each_slab + resident_bytes + partials * gradient_bytes + tied_bytes + facts.workspace_bytes + in_flight
    )
    if device > facts.device_memory:
        raise PlanError(
            f"device_memory={format_bytes(facts.device_memory)} is too small: {slabs} slabs of "
            f"{format_bytes(each_slab)}, resident parameters {format_bytes(resident_bytes)}, gradient sums "
            f"{format_bytes(partials * gradient_bytes + tied_bytes)}, activations between blocks "
            f"{format_bytes(in_flight)} and of one block {format_bytes(facts.workspace_bytes)} need "
            f"{format_bytes(device)}; the smallest value that works is device_memory={-(-device // MIB)}MiB (or fewer or "
            f"smaller micro-batches, or max_block_bytes)"
        )
    wanted = min(facts.prefetch + 1, len({station.block for station in stations}))
    while slabs < wanted and device + each_slab <= facts.device_memory:
        slabs, device = slabs + 1, device + each_slab
    # all gradients of a block held until the last is there are added in one pass, and need no room for partial sums
    held, held_bytes = 1, 0
    wanted_bytes = (micro_batches - 1) * max((b.streamed_bytes for b in trained if not b.resident), default=0)
    more = wanted_bytes - partials * gradient_bytes
    if facts.host_is_device and 1 < micro_batches <= MOST_HELD and device + more <= facts.device_memory:
        device += more
        held, held_bytes, partials = micro_batches, wanted_bytes, 0
    # what follows is worth less than room for the holes that the heap's allocator leaves between what is in use
    spare = facts.device_memory - (2 * facts.workspace_bytes if facts.host_is_device else 0)
    keeps_all = facts.activations == "keep" and facts.boundary_bytes is not None  # inputs are kept with the rest
    tiers: list[Tier] = ["device" if keeps_all else "disk"] * visits
    for visit in reversed(range(visits)):
        size = boundary[visit] * micro_batches
        if facts.boundary_bytes is not None and not keeps_all and device + size <= spare:
            tiers[visit], device = "device", device + size
    keep, device = _choose_kept(facts, tiers, device, spare)
    if (
        facts.boundary_bytes is not None
    ):  # what is left keeps blocks across the turn, so that backward need not fetch them
        while slabs < len({station.block for station in stations}) and device + each_slab <= spare:
            slabs, device = slabs + 1, device + each_slab

    # host memory: buffers that the stream cannot do without, then what saves disk traffic, cheapest first
    records = _SharingRecords.of(facts.blocks)
    buffers = records.buffers_from(min(2, len(shared)))
    ring = min(2 + len(often), len(trained))
    host = records.room(buffers) + ring * staged_bytes + 2 * largest_boundary
    host += sum(block.staged_bytes + block.record_bytes for block in trained if block.resident)
    travelling = facts.sum_buffers * gradient_bytes + facts.fabric_bytes
    masks_bytes = max((block.masks_bytes for block in trained), default=0)
    host += travelling + masks_bytes
    if host > facts.host_memory:
        raise PlanError(
            f"host_memory={format_bytes(facts.host_memory)} is too small: {buffers_text(facts.blocks, buffers)}, "
            f"{ring} gradient buffers of {format_bytes(staged_bytes)}, those of resident "
            f"blocks{_between_ranks(travelling)}{_for_masks(masks_bytes)} need {format_bytes(host)}; the smallest value "
            f"that works is host_memory={-(-host // MIB)}MiB (or a smaller max_block_bytes)"
        )
    for visit in reversed(range(visits)):
        size = boundary[visit] * micro_batches
        if facts.boundary_bytes is not None and tiers[visit] == "disk" and host + size <= facts.host_memory:
            tiers[visit], host = "host", host + size
    while buffers < min(3, len(shared)) and host + records.for_more(buffers) <= facts.host_memory:
        host += records.for_more(buffers)
        buffers = records.buffers_from(buffers + 1)
    staged = {block.index for block in trained if block.resident}
    if facts.deferred:
        for block in trained:
            if not block.resident and host + block.staged_bytes <= facts.host_memory:
                staged.add(block.index)
                host += block.staged_bytes
        if len(staged) == len(trained):
            host -= ring * staged_bytes
            ring = 0
    pins = _choose_pins(facts, slabs, facts.host_memory - host)
    pinned_copies = {index for kind, index in pins if kind == "copy"}
    pinned_states = {index for kind, index in pins if kind == "states"}
    host += sum(block.fetched_bytes for block in facts.blocks if block.index in pinned_copies)
    host += sum(block.load_bytes for block in facts.blocks if block.index in pinned_states)
    kept_places = {index for kind, index in pins if kind == "places"}
    host += sum(block.kept_places_bytes for block in facts.blocks if block.index in kept_places)
    # what is left lets reads run ahead into the backward and writes trail into it, where the disk is idle otherwise
    while buffers < len(shared) and host + records.for_more(buffers) <= facts.host_memory:
        host += records.for_more(buffers)
        buffers = records.buffers_from(buffers + 1)
    for block in streaming if facts.ram_tier else ():  # no step reads these again, but evaluation does
        if block.index not in pinned_copies and host + block.fetched_bytes <= facts.host_memory:
            pinned_copies.add(block.index)
            host += block.fetched_bytes
    return Allotment(
        slabs=slabs, slab_bytes=slab_bytes, resident_bytes=resident_bytes,
        partial_sums=partials, partial_bytes=gradient_bytes, tied_bytes=tied_bytes,
        held_gradients=held, held_bytes=held_bytes, record_buffers=buffers, record_bytes=record_bytes,
        gradient_buffers=ring, gradient_bytes=gradient_bytes, staged_in_ram=frozenset(staged),
        pinned_copies=frozenset(pinned_copies), pinned_states=frozenset(pinned_states),
        keep=keep, boundaries=tuple(tiers),
        device_bytes=device, host_bytes=host, compressed_bytes=compressed_bytes, beside_bytes=beside_bytes,
        kept_places=frozenset(kept_places),
    )  # fmt: skip


def sharing_records(blocks: Sequence[BlockFacts]) -> list[BlockFacts]:
    """Blocks whose records pass through working buffers: a resident block has its own."""
    return [block for block in blocks if block.trainable and not block.resident]


@dataclass(frozen=True, slots=True)
class _SharingRecords:
    """The records that pass through working buffers: how many, and their bytes."""

    count: int
    together_bytes: int
    largest_bytes: int

    @classmethod
    def of(cls, blocks: Sequence[BlockFacts]) -> "_SharingRecords":
        sizes = [block.record_bytes for block in sharing_records(blocks)]
        return cls(len(sizes), sum(sizes), max(sizes, default=0))

    def room(self, buffers: int) -> int:
        """Bytes of so many working buffers. Each takes any block's record, unless there is one for every block: then each
        is as large as its own block's."""
        return self.together_bytes if buffers >= self.count else buffers * self.largest_bytes

    def buffers_from(self, least: int) -> int:
        """So many working buffers, or one for every block where these take no more room."""
        return self.count if self.room(self.count) <= self.room(least) else least

    def for_more(self, buffers: int) -> int:
        """Bytes that the next working buffer takes."""
        return self.room(self.buffers_from(buffers + 1)) - self.room(buffers)


def records_room(blocks: Sequence[BlockFacts], buffers: int) -> int:
    """Bytes of so many working buffers."""
    return _SharingRecords.of(blocks).room(buffers)


def buffers_text(blocks: Sequence[BlockFacts], buffers: int) -> str:
    """`3 record buffers of 2 MiB`, or what they are where each block has its own."""
    if buffers < len(sharing_records(blocks)):
        return f"{buffers} record buffers of {format_bytes(records_room(blocks, 1))}"
    return f"a record buffer for each of {buffers} blocks, {format_bytes(records_room(blocks, buffers))}"


def buffers_bytes(facts: Facts, allotment: Allotment) -> int:
    """Host memory that is there from the beginning, whether it is full or not: all of a plan but activations."""
    blocks = {block.index: block for block in facts.blocks}
    trained = [block for block in facts.blocks if block.trainable]
    return (
        records_room(facts.blocks, allotment.record_buffers)
        + allotment.gradient_buffers * max((block.staged_bytes for block in trained), default=0)
        + sum(block.record_bytes for block in trained if block.resident)
        + sum(blocks[index].staged_bytes for index in allotment.staged_in_ram)
        + sum(blocks[index].fetched_bytes for index in allotment.pinned_copies)
        + sum(blocks[index].load_bytes for index in allotment.pinned_states)
        + sum(blocks[index].kept_places_bytes for index in allotment.kept_places)
        + facts.sum_buffers * allotment.gradient_bytes + facts.fabric_bytes
        + max((block.masks_bytes for block in trained), default=0)
        + 2 * max(facts.boundary_bytes or (0,))
    )  # fmt: skip


def _for_masks(nbytes: int) -> str:
    return f" and {format_bytes(nbytes)} for changes of masks" if nbytes else ""


def _between_ranks(nbytes: int) -> str:
    return f" and {format_bytes(nbytes)} on their way between ranks" if nbytes else ""


def _choose_pins(facts: Facts, slabs: int, room: int) -> set[tuple[str, int]]:
    """Copies and states that save the most reads within `room` bytes: what `lower_bound` counts without them; and places of
    non-zeros, where what they save is worth as much.

    Going through one bit or gap of a mask takes 0.5 to 0.8 ns (benchmarks/results/sparse.json), in which a disk of 1.3 to
    2 GB/s reads one byte.
    """
    order = list(dict.fromkeys(visit.block for visit in reversed(facts.visits)))
    across_turn = set(order[:slabs])
    candidates: list[Candidate[tuple[str, int]]] = []
    for block in facts.blocks:
        fetches = 1 + (block.index not in across_turn and not block.resident)
        if block.kept_places_bytes and (block.index in order or block.resident):
            saved = fetches * block.decoding_steps
            candidates.append(Candidate(("places", block.index), block.kept_places_bytes, saved))
        if not facts.ram_tier:
            continue
        if block.index in order and not block.resident:
            reads = (block.index not in across_turn) + (not (facts.deferred and block.trainable))
            candidates.append(Candidate(("copy", block.index), block.fetched_bytes, reads * block.fetched_bytes))
        if block.trainable:
            candidates.append(Candidate(("states", block.index), block.load_bytes, block.load_bytes))
    return most_saved(candidates, room)


def _choose_kept(facts: Facts, tiers: list[Tier], device: int, spare: int) -> tuple[frozenset[int], int]:
    """Which visits keep their activations: the latest first, as many as fit. The last one never recomputes anyway."""
    if facts.kept_bytes is None or facts.boundary_bytes is None:  # not measured yet
        return frozenset(range(len(facts.visits)) if facts.activations == "keep" else ()), device
    kept: set[int] = set()
    if facts.activations == "recompute":
        return frozenset(), device
    keeps_all = facts.activations == "keep"
    room = facts.device_memory if keeps_all else spare
    for visit in reversed(range(len(facts.visits) - 1)):
        inputs = 0 if tiers[visit] == "device" and not keeps_all else facts.boundary_bytes[visit]
        size = (facts.kept_bytes[visit] + inputs) * facts.present
        if device + size <= room:
            kept.add(visit)
            device += size
        elif keeps_all:
            each = sum(facts.kept_bytes[: visit + 1]) + sum(facts.boundary_bytes[: visit + 1])
            missing = device + each * facts.present
            raise PlanError(
                f"activations='keep' does not fit in device_memory={format_bytes(facts.device_memory)}: the smallest "
                f"value that works is device_memory={-(-missing // MIB)}MiB; or give activations='auto'"
            )
    return frozenset(kept), device


@dataclass(frozen=True, slots=True)
class Station:
    """Consecutive visits of one block: it is fetched once for all of them."""

    block: int
    visits: tuple[int, ...]


def stations_of(visits: Sequence[Visit]) -> list[Station]:
    """The stations of a step's way forward, in order."""
    stations: list[Station] = []
    for number, visit in enumerate(visits):
        if stations and stations[-1].block == visit.block:
            stations[-1] = Station(visit.block, (*stations[-1].visits, number))
        else:
            stations.append(Station(visit.block, (number,)))
    return stations
