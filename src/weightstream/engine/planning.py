"""From a model and its budgets to the facts of a plan: how it is split, what a step moves, whether the disk will hold it."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from weightstream.blocks import Block, Rule, Unit, split
from weightstream.cluster import Cluster, owners
from weightstream.engine.multiplying import Structures
from weightstream.errors import PlanError, StoreMismatchError
from weightstream.fabric.together import SUMS_TRAVELLING, fabric_bytes
from weightstream.masking.masking import Masking
from weightstream.schedule.allotment import Activations, Allotment, Facts, allot
from weightstream.schedule.cost import BlockFacts
from weightstream.schedule.operations import Visit
from weightstream.schedule.reduction import subtrees
from weightstream.store.block_bytes import NEVER_SPARSE, BlockBytes, Largest, block_bytes, largest
from weightstream.store.images import gradient_image
from weightstream.store.layout import RecordLayout
from weightstream.store.sparsity import Sparsity
from weightstream.store.store import Store
from weightstream.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What a plan is held to: the settings of an engine that every plan of it shares."""

    device_memory: int
    host_memory: int
    reduction_groups: int
    deferred: bool
    host_is_device: bool
    activations: Activations
    prefetch: int
    ram_tier: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step has shown of its activations: bytes per visit and micro-batch, and while one block computes."""

    boundary_bytes: tuple[int, ...]
    kept_bytes: tuple[int, ...]
    lasting_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Division:
    """What the division of work between ranks adds to the facts: see `Facts`. The same on every rank.

    `records` are bytes by block, of what is owned the most that any memory rank has; `gradients` are of whole blocks.
    """

    cluster: Cluster
    records: tuple[BlockBytes, ...]
    gradients: tuple[int, ...]
    sum_buffers: int = 0
    fabric_bytes: int = 0
    masks: tuple[int, ...] = ()


def owners_of(catalogue: Store, cluster: Cluster) -> tuple[int, ...]:
    """The memory rank of a cluster that owns each unit of a store."""
    sizes = [catalogue.layouts[unit.index].image_nbytes for unit in catalogue.units]  # as they began
    return owners(sizes, len(cluster.memory_ranks))


def divide(
    catalogue: Store,
    cluster: Cluster,
    owner: Sequence[int],
    groups: int,
    *,
    sparse: Largest = NEVER_SPARSE,
    masking: Masking | None = None,
    of: int | None = None,
    driven: Collection[str] = (),
) -> Division:
    """The division of a store's records among the memory ranks that own them (`owner`, by unit).

    Args:
        of: count what this rank owns, not the most that any does.
        sparse: how sparse versions may be: there is room for all of them.
        masking: of the sparse parameters, if their masks change.
        driven: those that kernels multiply by.
    """
    counted = cluster.memory_ranks if of is None else (of,)
    owned = [{unit for unit, rank in enumerate(owner) if rank == one} for one in counted]
    records, gradients, largest_unit = [], [], 0

    def layout_of(unit: Unit, sparsity: Sparsity) -> RecordLayout:
        return catalogue.layout_of(unit.index, sparsity)

    for block in catalogue.blocks:
        units = [catalogue.units[index] for index in catalogue.units_of(block.index)]
        records.append(largest([block_bytes(units, layout_of, own, sparse, driven) for own in owned]))
        image = gradient_image(units, sparse.gradients)
        gradients.append(image.nbytes)
        largest_unit = max([largest_unit, *(stop - start for start, stop in image.spans)])
    masks = masks_bytes(catalogue.units, records, masking)
    if cluster.size == 1:
        return Division(cluster, tuple(records), tuple(gradients), masks=masks)
    images = max(len(subtrees(groups, cluster.groups_of(rank, groups))) for rank in cluster.compute_ranks)
    return Division(
        cluster, tuple(records), tuple(gradients), SUMS_TRAVELLING * images, fabric_bytes(cluster, largest_unit), masks
    )


def masks_bytes(units: Sequence[Unit], records: Sequence[BlockBytes], masking: Masking | None) -> tuple[int, ...]:
    """By block, the host memory that a change of its masks needs: where counts change, also its records while they move."""
    found = [0] * len(records)
    if masking is None:
        return tuple(found)
    for unit in units:
        moved = records[unit.block].written if masking.resizes(unit.index) else 0
        found[unit.block] = max(found[unit.block], masking.update_bytes(unit.index) + moved)
    return tuple(found)


def facts_of(
    blocks: Sequence[Block],
    records: Sequence[BlockBytes],
    budgets: Budgets,
    *,
    visits: tuple[Visit, ...] = (),
    uses: Mapping[str, Sequence[int]] | None = None,
    micro_batches: int = 1,
    measured: Measured | None = None,
    division: Division | None = None,
    masks: Sequence[int] = (),
    structures: Mapping[int, Structures] | None = None,
) -> Facts:
    """The facts of a step; before the calls of the model are known every block is visited once, in order.

    Args:
        uses: the visits that use each parameter; more than one means that it is tied.
        measured: left out of account where it is of other visits.
        division: with several ranks, who does what.
        masks: where there is no division, what changes of masks need, by block.
        structures: by block, what kernels need to know of the weights that they multiply by.
    """
    counts = {name: len(visits) for name, visits in (uses or {}).items()}
    gradients = division.gradients if division else [record.gradients for record in records]

    masks = (division.masks if division else masks) or (0,) * len(records)
    known = [(structures or {}).get(block.index, Structures()) for block in blocks]
    block_facts = tuple(
        BlockFacts(
            block.index, block.name, record.streamed, record.loaded, record.written, whole,
            block.trainable, block.resident,
            sum(4 * p.numel * counts[p.name] for p in block.parameters if p.trainable and counts.get(p.name, 0) > 1),
            record.gradients, record.fetched if record.sparse else 0,
            record.places + own.nbytes, changes, record.places + own.kept_bytes, record.decoding + own.steps,
        )
        for block, record, whole, changes, own in zip(blocks, records, gradients, masks, known, strict=True)
    )  # fmt: skip
    if not visits:
        visits = tuple(Visit(block.index, block.name) for block in blocks if not block.resident)
    if measured is not None and len(measured.boundary_bytes) != len(visits):
        measured = None
    share = _share(division, micro_batches, budgets.reduction_groups)
    return Facts(
        blocks=block_facts, visits=visits, micro_batches=micro_batches, reduction_groups=budgets.reduction_groups,
        deferred=budgets.deferred, device_memory=budgets.device_memory, host_memory=budgets.host_memory,
        activations=budgets.activations, prefetch=budgets.prefetch, ram_tier=budgets.ram_tier,
        host_is_device=budgets.host_is_device,
        boundary_bytes=measured.boundary_bytes if measured else None,
        kept_bytes=_kept_bytes(measured, visits, known, share.get("share", micro_batches)) if measured else None,
        lasting_bytes=measured.lasting_bytes if measured else 0,
        workspace_bytes=measured.workspace_bytes if measured else 0,
        **share,
    )  # fmt: skip


def _kept_bytes(
    measured: Measured, visits: Sequence[Visit], structures: Sequence[Structures], micro_batches: int
) -> tuple[int, ...]:
    """What a visit keeps of one micro-batch, with its part of what a product's way back needs to know of its weights: all
    micro-batches present share that, and it stays where activations do, after the weights themselves have gone."""
    return tuple(
        kept + -(-structures[visit.block].nbytes // max(1, micro_batches))
        for kept, visit in zip(measured.kept_bytes, visits, strict=True)
    )


def _share(division: Division | None, micro_batches: int, groups: int) -> dict[str, int]:
    if division is None or division.cluster.size == 1:
        return {}
    cluster = division.cluster
    return {
        "share": cluster.largest_share(micro_batches, groups),
        "share_groups": max(len(cluster.groups_of(rank, groups)) for rank in cluster.compute_ranks),
        "sum_buffers": division.sum_buffers,
        "fabric_bytes": division.fabric_bytes,
    }


def splits(
    model: nn.Module, *, element_bytes: int, max_block_bytes: int | None, rules: Mapping[str, Rule] | None
) -> Iterator[tuple[Block, ...]]:
    """The one split that is asked for; where no bound is given, all from coarse to fine."""
    bound = max_block_bytes
    while True:
        blocks = split(model, max_block_bytes=bound, element_bytes=element_bytes, rules=rules)
        yield blocks
        largest = max((block.numel for block in blocks if not block.resident), default=0) * element_bytes
        if max_block_bytes is not None or largest < 2 or (bound is not None and largest > bound):
            return  # leaves: they are never cut
        bound = largest // 2


def split_within(
    model: nn.Module,
    budgets: Budgets,
    bytes_of: Callable[[Sequence[Block]], Sequence[BlockBytes]],
    *,
    element_bytes: int,
    max_block_bytes: int | None,
    rules: Mapping[str, Rule] | None,
) -> tuple[Block, ...]:
    """Splits a model as coarsely as its budgets allow, or as the bound says.

    Raises:
        PlanError: no split fits; the message is about the finest.
    """
    error: PlanError | None = None
    for blocks in splits(model, element_bytes=element_bytes, max_block_bytes=max_block_bytes, rules=rules):
        if max_block_bytes is not None:
            return blocks
        try:
            allot(facts_of(blocks, bytes_of(blocks), budgets))
            return blocks
        except PlanError as refused:
            error = refused
    assert error is not None
    raise error


def check_blocks(
    store: Store, model: nn.Module, *, element_bytes: int, max_block_bytes: int | None, rules: Mapping[str, Rule] | None
) -> None:
    """Blocks are fixed when a store is made: what a later run asks for must be what it has.

    Raises:
        StoreMismatchError: it has others.
    """
    has = [block.parameters for block in store.blocks]
    possible = splits(model, element_bytes=element_bytes, max_block_bytes=max_block_bytes, rules=rules)
    if not any([block.parameters for block in blocks] == has for blocks in possible):
        raise StoreMismatchError(
            f"store '{store.path}' has {len(has)} blocks, other ones than max_block_bytes={max_block_bytes} with "
            f"block_rules={dict(rules or {})} gives; blocks are fixed when a store is made: leave both out to use the "
            f"store's, or give another store"
        )


def disk_bytes(records: Sequence[BlockBytes], *, deferred: bool) -> tuple[int, int]:
    """One version of every record; and the most that a run needs beyond what snapshots hold: three versions, since one may
    be committed, one being committed and one being written, and staged gradients."""
    images = sum(record.stored for record in records)
    staged = sum(record.gradients for record in records) if deferred else 0
    return images, 3 * images + staged


@dataclass(frozen=True, slots=True)
class Reach:
    """Parameters of the largest model like this one that a budget holds: with its disk alone, and with all records in RAM."""

    disk: int
    ram: int


def reach(
    records: Sequence[BlockBytes], parameters: int, *, free_bytes: int, host_memory: int, deferred: bool
) -> Reach:
    """What budgets hold of a model, were it larger in proportion: a disk what `disk_bytes` counts, RAM copies, masters,
    states and staged gradients."""
    _, most = disk_bytes(records, deferred=deferred)
    kept = sum(each.fetched + each.loaded + (each.gradients if deferred else 0) for each in records)
    return Reach(parameters * free_bytes // max(1, most), parameters * host_memory // max(1, kept))


def check_disk(path: Path, records: Sequence[BlockBytes], *, deferred: bool) -> None:
    """What a run needs must fit before anything is made.

    Raises:
        PlanError: it does not.
    """
    images, most = disk_bytes(records, deferred=deferred)
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if most > free:
        raise PlanError(
            f"store '{path}' needs up to {format_bytes(most)} (three versions of {format_bytes(images)}, staged gradients "
            f"{format_bytes(most - 3 * images)}), its disk has {format_bytes(free)} free; free some space or give a store "
            f"on another disk"
        )


def same_buffers(one: Allotment, other: Allotment) -> bool:
    """Whether two allotments differ only in what needs no buffers of its own."""
    return _buffers(one) == _buffers(other)


def _buffers(allotment: Allotment) -> Allotment:
    return replace(allotment, keep=frozenset(), boundaries=(), device_bytes=0, host_bytes=0)
