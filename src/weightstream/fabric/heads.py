"""What goes ahead of a sum: which pieces of it there are at all, use by use."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightstream.errors import AuditError

MOST_LAYERS = 6
"""Uses of one parameter that a head has room for."""


@dataclass(slots=True)
class Head:
    """Which pieces of a sum are there, by layer; `found`: some rank had a gradient of this block, of whatever unit."""

    found: bool = False
    layers: dict[int, bytearray] = field(default_factory=dict)

    def merged(self, other: "Head") -> "Head":
        """Of the sum of both."""
        layers = {layer: bytearray(flags) for layer, flags in self.layers.items()}
        for layer, flags in other.layers.items():
            own = layers.setdefault(layer, bytearray(len(flags)))
            for index, flag in enumerate(flags):
                own[index] |= flag
        return Head(self.found or other.found, dict(sorted(layers.items())))

    def packed(self, pieces: int) -> Tensor:
        """As bytes of a size that both sides know: `found`, number of layers, then each with its number."""
        data = bytearray([self.found, len(self.layers)])
        for layer, flags in self.layers.items():
            data += bytes([layer]) + flags
        return torch.frombuffer(data.ljust(head_bytes(pieces), b"\0"), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, data: Tensor, pieces: int) -> "Head":
        values = bytes(data.tolist())
        head = cls(bool(values[0]))
        for number in range(values[1]):
            start = 2 + number * (1 + pieces)
            head.layers[values[start]] = bytearray(values[start + 1 : start + 1 + pieces])
        return head


def head_bytes(pieces: int) -> int:
    return 2 + MOST_LAYERS * (1 + pieces)


def layer_of(uses: Sequence[int], use: int, name: str) -> int:
    """The layer of a parameter's use: its place among the visits that use it.

    Raises:
        AuditError: more uses than a head has room for.
    """
    layer = uses.index(use)
    if layer >= MOST_LAYERS:
        raise AuditError(
            f"parameter '{name}' is used by {len(uses)} visits: with several ranks at most {MOST_LAYERS} are possible"
        )
    return layer
