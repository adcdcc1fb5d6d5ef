"""How long each operation of a step takes where it has its resource to itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds on one rank; where these come from is not the simulator's concern.

    `forward`, `recompute` and `backward` are per visit and of one micro-batch: a visit whose activations are not kept takes
    `recompute` + `backward` on its way back. `turn` is one micro-batch's loss and the way back to the outputs of its last
    visit. `update` and `reduce` are per block: the optimizer step on all that the block has, and closing its sum. `expand`,
    where anything is sparse, is also per block: one thread fills a slab with what has arrived, beside what computes.
    `overhead` is what the executor itself needs per operation, by kind; `between_steps` passes outside of all operations.
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
