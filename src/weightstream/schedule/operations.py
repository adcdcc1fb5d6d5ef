"""One step as pure data: the operations, and the schedule that orders them.

An operation's place in the schedule is where it is *issued*. Operations that move bytes (`Load`, `Write`, `Fetch`,
`Spill`, `Restore`, `Commit`) go on while later ones run; those that compute (`Update`, `Forward`, `Turn`, `Backward`,
`Reduce`) take their turn on the device, in order. An operation that needs the result of another waits for it.
"""

from dataclasses import dataclass
from enum import Enum


class Resource(Enum):
    """What an operation keeps busy."""

    COMPUTE = "compute"
    READ = "read"
    WRITE = "write"
    MANIFEST = "manifest"


@dataclass(frozen=True, slots=True)
class Load:
    """Store → host memory: a block's masters, moments and staged gradient into a record buffer, ahead of `Update`."""

    block: int


@dataclass(frozen=True, slots=True)
class Update:
    """At the store: the optimizer step on a loaded record, in place in its buffer; makes a new version."""

    block: int


@dataclass(frozen=True, slots=True)
class Write:
    """Host memory → store: the updated record as a new segment; the record buffer is free when it is on disk."""

    block: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Store → slab: the streamed copy, from the record buffer if it was just updated, else from RAM or disk."""

    block: int
    slab: int


@dataclass(frozen=True, slots=True)
class Evict:
    """The slab is free for another block."""

    block: int
    slab: int


@dataclass(frozen=True, slots=True)
class Forward:
    """One micro-batch through one visit (a call of one module of a block)."""

    visit: int
    block: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A micro-batch's loss and the way back to the outputs of its last visit."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """One micro-batch back through one visit; recomputes the forward unless the plan keeps its activations."""

    visit: int
    block: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """A block's gradient is complete: the fixed-order sum is closed, its norm taken, and it is staged at the store."""

    block: int


@dataclass(frozen=True, slots=True)
class Spill:
    """The inputs of a visit leave device memory (to host memory or scratch on disk)."""

    visit: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Restore:
    """The inputs of a visit come back to device memory."""

    visit: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The versions written since the last commit become the store's state, in one transaction."""


Operation = (
    Load | Update | Write | Fetch | Evict | Forward | Turn | Backward | Reduce | Spill | Restore | Commit
)  # fmt: skip


def resource(operation: Operation) -> Resource:
    """What an operation keeps busy while it runs."""
    match operation:
        case Load() | Fetch() | Restore():
            return Resource.READ
        case Write() | Spill():
            return Resource.WRITE
        case Commit():
            return Resource.MANIFEST
        case _:
            return Resource.COMPUTE


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of one module of a block, made by every micro-batch. Visits are numbered in order of the forward."""

    block: int
    module: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """The operations of one step, in order of issue, and what held when they were planned.

    `pending` are the blocks that enter the step with a staged gradient (the update of the step before, which waited
    for the global norm); `loaded` those whose records are already in a record buffer when the step begins, and
    `loads_next` those that are being loaded when it ends.
    """

    operations: tuple[Operation, ...]
    visits: tuple[Visit, ...]
    micro_batches: int
    slabs: int
    record_buffers: int
    pending: frozenset[int] = frozenset()
    loaded: tuple[int, ...] = ()
    loads_next: tuple[int, ...] = ()

    def text(self) -> str:
        """One line an operation; golden schedules are kept in this form."""
        head = [
            f"# {len(self.visits)} visits, {self.micro_batches} micro-batches, {self.slabs} slabs, "
            f"{self.record_buffers} record buffers",
            f"# pending {sorted(self.pending)} loaded {list(self.loaded)} loads next {list(self.loads_next)}",
        ]
        return "\n".join([*head, *map(describe, self.operations)]) + "\n"


def describe(operation: Operation) -> str:
    """`Fetch(3 -> slab 1)`: how an operation prints in schedules, traces and errors."""
    match operation:
        case Fetch(block, slab):
            return f"Fetch({block} -> slab {slab})"
        case Evict(block, slab):
            return f"Evict({block} from slab {slab})"
        case Forward(visit, block, micro_batch) | Backward(visit, block, micro_batch):
            return f"{type(operation).__name__}({block}, visit={visit}, mb={micro_batch})"
        case Spill(visit, micro_batch) | Restore(visit, micro_batch):
            return f"{type(operation).__name__}(visit={visit}, mb={micro_batch})"
        case Turn(micro_batch):
            return f"Turn(mb={micro_batch})"
        case Load(block) | Update(block) | Write(block) | Reduce(block):
            return f"{type(operation).__name__}({block})"
        case Commit():
            return "Commit()"
