"""Micro-batches of a step, by position: the same for everyone who asks for the same position."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

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

    def at(self, position: int) -> "StepBatches":
        """The micro-batches of a step that begins at this position in the order, counted in sequences."""
        indices = self.order.take(position, self.sequences_per_step)
        return StepBatches(self.sequences, [indices[i * self.size : (i + 1) * self.size] for i in range(self.count)])


class StepBatches(SequenceOf[MicroBatch]):
    """The micro-batches of one step, each read when it is asked for: of several ranks each reads only its part."""

    def __init__(self, sequences: Sequences, indices: list[list[int]]) -> None:
        self._sequences, self._indices = sequences, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [micro_batch(self._sequences, indices) for indices in self._indices[index]]
        return micro_batch(self._sequences, self._indices[index])


def in_portions(sequences: Sequences, limit: int, size: int) -> list[list[int]]:
    """At most `limit` indices spread evenly over all sequences, `size` at a time."""
    count = min(limit, len(sequences))
    indices = [i * len(sequences) // count for i in range(count)]
    return [indices[start : start + size] for start in range(0, count, size)]
