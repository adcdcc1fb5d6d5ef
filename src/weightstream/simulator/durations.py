"""How long each operation of a step takes where it has its resource to itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """What one rank does in a step for a layer of experts in a block, beside the schedule's operations.

    When a step begins it begins to read `read_bytes`, which it needs, and `down_bytes` that it is lent, before the block's
    first micro-batch; at the end of backward it gives `up_bytes` of gradients back, sums and updates for `update` seconds,
    and begins to write `written_bytes`. A rank that owns no records reads, updates and writes nothing.
    """

    block: int
    read_bytes: int
    written_bytes: int
    update: float
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds on one rank; where these come from is not the simulator's concern.

    `forward`, `recompute` and `backward` are per visit and of one micro-batch: a visit whose activations are not kept takes
    `recompute` + `backward` on its way back. `turn` is one micro-batch's loss and the way back to the outputs of its last
    visit. `update` and `reduce` are per block: the optimizer step on all that the block has, and closing its sum. `expand`,
    where anything is sparse, is also per block: one thread fills a slab with what has arrived, beside what computes.
    `overhead` is what the executor itself needs per operation, by kind; `between_steps` passes outside of all operations.
    `experts` has one entry for each layer of experts.
    """

    forward: tuple[float, ...]
    recompute: tuple[float, ...]
    backward: tuple[float, ...]
    turn: float
    update: tuple[float, ...]
    reduce: tuple[float, ...]
    expand: tuple[float, ...] = ()
    overhead: Mapping[str, float] = field(default_factory=dict)
    between_steps: float = 0.0
    experts: tuple[ExpertWork, ...] = ()
