"""What a steady step moves, tier by tier and link by link, counted from its schedule; and the least that it could be.

Counted once more, from the operations themselves: neither executor is asked, and the simulator and the runtime are held to it.
"""

from dataclasses import dataclass, field

from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.cost import BlockFacts, StepBytes, lower_bound
from weightstream.schedule.operations import Fetch, Load, Reduce, Restore, Schedule, Spill, Update, Write
from weightstream.schedule.planner import build

_SETTLED = 3


@dataclass(slots=True)
class Flow:
    """Bytes in one place and direction, and the least that a step could move there."""

    planned: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Flows:
    """Bytes of one step. Of disk and RAM they are of the rank that moves most, of links of all ranks together.

    `ram_read` and `ram_written` are what records in RAM and what spills to host memory save the disk; nothing of it need be.
    """

    disk_read: Flow = field(default_factory=Flow)
    disk_written: Flow = field(default_factory=Flow)
    ram_read: Flow = field(default_factory=Flow)
    ram_written: Flow = field(default_factory=Flow)
    down: Flow = field(default_factory=Flow)
    up: Flow = field(default_factory=Flow)

    def to_json(self) -> dict[str, dict[str, int]]:
        return {
            name: {"bytes": flow.planned, "least_bytes": flow.least}
            for name in self.__slots__
            if isinstance(flow := getattr(self, name), Flow)
        }


def steady(facts: Facts, allotment: Allotment) -> Schedule:
    """The schedule of a step that others like it went before."""
    trained = frozenset(block.index for block in _touched(facts) if block.trainable) if facts.deferred else frozenset()
    pending: frozenset[int] = frozenset()
    loaded: tuple[int, ...] = ()
    for _ in range(_SETTLED):
        schedule = build(facts, allotment, pending=pending, loaded=loaded)
        pending, loaded = trained, tuple(block for block in schedule.loads_next if block in trained)
    return schedule


def flows_of(facts: Facts, allotment: Allotment, *, ranks: int = 1) -> Flows:
    """What a steady step moves.

    Args:
        ranks: how many there are; one alone moves nothing over links.
    """
    found = Flows()
    boundary = facts.boundary_bytes or (0,) * len(facts.visits)
    updated: set[int] = set()

    def moved(in_ram: bool, nbytes: int, *, read: bool) -> None:
        way = (
            (found.ram_read if read else found.ram_written)
            if in_ram
            else (found.disk_read if read else found.disk_written)
        )
        way.planned += nbytes

    for operation in steady(facts, allotment).operations:
        match operation:
            case Load(index):
                moved(index in allotment.pinned_states, facts.blocks[index].load_bytes, read=True)
            case Update(index):
                updated.add(index)
                if facts.deferred:
                    moved(index in allotment.staged_in_ram, facts.blocks[index].staged_bytes, read=True)
            case Write(index):
                updated.discard(index)
                block = facts.blocks[index]
                moved(False, block.record_bytes, read=False)
                for part, nbytes in (
                    (allotment.pinned_copies, block.fetched_bytes),
                    (allotment.pinned_states, block.load_bytes),
                ):
                    found.ram_written.planned += nbytes if index in part else 0
            case Reduce(index):
                found.up.planned += facts.blocks[index].gradient_bytes if ranks > 1 else 0
                if facts.deferred:
                    moved(index in allotment.staged_in_ram, facts.blocks[index].staged_bytes, read=False)
            case Fetch(index):
                nbytes = facts.blocks[index].fetched_bytes
                found.down.planned += nbytes if ranks > 1 else 0
                if index not in updated:
                    moved(index in allotment.pinned_copies, nbytes, read=True)
            case Spill(visit, micro_batch) | Restore(visit, micro_batch) if micro_batch < facts.present:
                on_disk = allotment.boundaries[visit] == "disk"
                if on_disk or not facts.host_is_device:
                    moved(not on_disk, boundary[visit], read=isinstance(operation, Restore))
            case _:
                pass
    _bounds(found, facts, allotment, ranks)
    return found


def disk_bound(facts: Facts, allotment: Allotment) -> StepBytes:
    """The least that a steady step must move between host and disk under an allotment."""
    blocks = _touched(facts)
    staged = frozenset(b.index for b in blocks if b.trainable and facts.deferred) - allotment.staged_in_ram
    return lower_bound(
        blocks, deferred=facts.deferred, kept_across_turn=_kept_across_turn(facts, allotment), staged_on_disk=staged,
        pinned_copies=allotment.pinned_copies, pinned_states=allotment.pinned_states,
    )  # fmt: skip


def _bounds(found: Flows, facts: Facts, allotment: Allotment, ranks: int) -> None:
    least = disk_bound(facts, allotment)
    found.disk_read.least, found.disk_written.least = least.read, least.written
    if ranks > 1:
        blocks, recent = _touched(facts), _kept_across_turn(facts, allotment)
        twice = (block for block in blocks if block.index not in recent and not block.resident)
        found.down.least = sum(b.fetched_bytes for b in blocks) + sum(b.fetched_bytes for b in twice)
        found.up.least = sum(block.gradient_bytes for block in blocks if block.trainable)


def _kept_across_turn(facts: Facts, allotment: Allotment) -> frozenset[int]:
    """The blocks that forward visits last: they lie in slabs when backward begins."""
    return frozenset(list(dict.fromkeys(visit.block for visit in reversed(facts.visits)))[: allotment.slabs])


def _touched(facts: Facts) -> list[BlockFacts]:
    visited = {visit.block for visit in facts.visits}
    return [block for block in facts.blocks if block.resident or block.index in visited]


__all__ = ["Flow", "Flows", "disk_bound", "flows_of", "steady"]
