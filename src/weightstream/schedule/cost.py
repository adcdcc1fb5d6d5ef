"""Bytes: what a step must move at least, by arithmetic on the model alone.

The formulas are those of the project's reference (Adam on disk, no RAM tier); `b_w` are streamed bytes per parameter,
`b_g` bytes per staged gradient, `s` bytes of optimizer state per parameter, ρ the share kept across the turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What the planner knows of a block: bytes, and what kind of block it is.

    `streamed_bytes` lie in a slab; `load_bytes` are masters and optimizer state, read for an update; `record_bytes` the
    whole image that an update writes; `gradient_bytes` the fp32 gradients of its trained parameters; `tied_bytes` the
    fp32 gradients of parameters used by more than one visit, which are summed per use. With several memory ranks
    `load_bytes`, `record_bytes` and `owned_gradient_bytes` are of what one rank owns, the most that any does.

    Of a block with sparse parameters `compressed_bytes` are what moves on links and from disk, lands beside its slab and is
    kept in RAM, and `places_bytes` say where its non-zeros are while it is in a slab; `kept_places_bytes` are those of them
    that may be kept from one fetch to the next, `decoding_steps` how many bits or gaps of its masks are gone through to find
    them anew, with as many as take as long as finding what kernels ask of them; `masks_bytes` are what a change of its masks
    needs. A dense one has none of these: what moves is what lies in the slab.
    """

    index: int
    name: str
    streamed_bytes: int
    load_bytes: int
    record_bytes: int
    gradient_bytes: int
    trainable: bool = True
    resident: bool = False
    tied_bytes: int = 0
    owned_gradient_bytes: int | None = None
    compressed_bytes: int = 0
    places_bytes: int = 0
    masks_bytes: int = 0
    kept_places_bytes: int = 0
    decoding_steps: int = 0

    @property
    def fetched_bytes(self) -> int:
        """What moves when it is fetched."""
        return self.compressed_bytes or self.streamed_bytes

    @property
    def beside_bytes(self) -> int:
        """What it needs beside its slab while it is in it."""
        return self.compressed_bytes + self.places_bytes

    @property
    def staged_bytes(self) -> int:
        """The part of its gradient that waits at the store of one rank."""
        return self.gradient_bytes if self.owned_gradient_bytes is None else self.owned_gradient_bytes


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one steady step moves between host and disk."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def lower_bound(
    blocks: Iterable[BlockFacts],
    *,
    deferred: bool,
    kept_across_turn: frozenset[int] = frozenset(),
    staged_on_disk: frozenset[int] = frozenset(),
    pinned_copies: frozenset[int] = frozenset(),
    pinned_states: frozenset[int] = frozenset(),
) -> StepBytes:
    """The least a step can move when every visited block is read, updated and written once.

    With clipping (`deferred`) the forward needs no read of the streamed copy, since the update has just made it;
    without, both directions read it, less what stays in a slab across the turn.
    """
    read = written = 0
    for block in blocks:
        copies = (0 if block.index in kept_across_turn or block.resident else 1) + (
            1 if not (deferred and block.trainable) else 0
        )
        if block.index not in pinned_copies:
            read += copies * block.fetched_bytes
        if block.trainable:
            written += block.record_bytes
            if block.index not in pinned_states:
                read += block.load_bytes
            if block.index in staged_on_disk:
                read += block.staged_bytes
                written += block.staged_bytes
    return StepBytes(read, written)
