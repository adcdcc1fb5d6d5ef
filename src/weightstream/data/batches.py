"""Micro-batches of a step, by position: the same for everyone who asks for the same position."""

from dataclasses import dataclass

import torch

from weightstream.data.dataset import Sequences
from weightstream.data.order import Order

MicroBatch = dict[str, torch.Tensor]


def micro_batch(sequences: Sequences, indices: list[int]) -> MicroBatch:
    """What a causal language model of transformers takes; it shifts the labels itself."""
    ids = torch.from_numpy(sequences.rows(indices))  # (len(indices), length)
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Training's micro-batches: `count` of `size` sequences each, in the order of `order`."""

    sequences: Sequences
    order: Order
    count: int
    size: int

    @property
    def sequences_per_step(self) -> int:
        return self.count * self.size

    def at(self, position: int) -> list[MicroBatch]:
        """The micro-batches of a step that begins at this position in the order, counted in sequences."""
        indices = self.order.take(position, self.sequences_per_step)
        return [micro_batch(self.sequences, indices[i * self.size : (i + 1) * self.size]) for i in range(self.count)]


def in_portions(sequences: Sequences, limit: int, size: int) -> list[list[int]]:
    """At most `limit` indices spread evenly over all sequences, `size` at a time."""
    count = min(limit, len(sequences))
    indices = [i * len(sequences) // count for i in range(count)]
    return [indices[start : start + size] for start in range(0, count, size)]
