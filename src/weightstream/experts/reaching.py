"""How many experts of a layer a step reaches, and the bytes that this moves: counted where token ids are known, else expected.

An expectation takes every token to draw its experts by even chance: from all of a layer's before there were any steps, which
is the most that a text may reach, as text repeats itself; later from as many as make it what the last steps came to.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, log1p
from typing import Any

import torch
from torch import Tensor

from weightstream.cluster import Cluster, owner_of
from weightstream.nn.attaching import known_beforehand
from weightstream.nn.experts import StreamedExperts
from weightstream.schedule.reduction import group_of, subtrees

NUMBER_BYTES = 8
"""An expert's number, and how often it was reached, on its way between ranks."""
GRADIENT_BYTES = 4
_HALVINGS = 60
_MOST_DRAWN = 2**62


@dataclass(frozen=True, slots=True)
class Reached:
    """Of one layer in one step, on all ranks together; what is expected is no whole number.

    `touched` are different experts, `new` those of them that were never written. With several ranks `borrowed` are those
    that a worker reaches and another rank owns, of all workers; `summed` the partial sums of gradients that go back;
    `each` those that one micro-batch reaches, on average.
    """

    touched: float
    new: float
    each: float
    borrowed: float = 0.0
    summed: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Bytes of one expert: its record on disk, what an update reads of it, its values as they are lent, its gradient."""

    record_bytes: int
    loaded_bytes: int
    value_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """What a step moves for experts, of all ranks together; compaction reads and writes at most `compacted` bytes besides."""

    read: int
    written: int
    compacted: int
    down: int
    up: int


def bytes_of(reached: Mapping[str, Reached], sizes: Mapping[str, ExpertSizes], share: float) -> ExpertBytes:
    """The bytes of a step that reaches so many experts.

    Args:
        share: what compaction may write for each byte that is written.
    """
    read = written = down = up = 0.0
    for name, found in reached.items():
        own = sizes[name]
        read += (found.touched - found.new) * own.loaded_bytes
        written += found.touched * own.record_bytes
        down += found.borrowed * (NUMBER_BYTES + own.value_bytes)
        up += found.borrowed * 2 * NUMBER_BYTES + found.summed * (NUMBER_BYTES + own.gradient_bytes)
    return ExpertBytes(round(read), round(written), round(share * written), round(down), round(up))


def different(draws: float, top_k: int, experts: float) -> float:
    """How many different experts so many draws reach on average, `top_k` different ones for each token."""
    if top_k >= experts:
        return float(experts) if draws else 0.0
    return -experts * expm1(draws / top_k * log1p(-top_k / experts))


def pool_of(touched: float, draws: float, top_k: int, experts: int) -> float:
    """From how many experts these draws reach so many, all alike; at most from all that there are."""
    low, high = float(top_k), float(experts)
    if touched >= different(draws, top_k, high):
        return high
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if different(draws, top_k, middle) < touched else (low, middle)
    return high


def expected(
    layer: StreamedExperts,
    draws_each: float,
    micro_batches: int,
    cluster: Cluster,
    groups: int,
    *,
    pool: float | None = None,
    new_share: float = 0.0,
) -> Reached:
    """What a step is expected to reach.

    Args:
        draws_each: assignments of one micro-batch.
        groups: the reduction groups of a step.
        pool: of how many experts draws are made; by default of all.
        new_share: the part of what is reached that was never written.
    """

    def reach(count: int) -> float:
        return different(count * draws_each, layer.top_k, layer.experts if pool is None else pool)

    borrowed = summed = 0.0
    for rank in cluster.compute_ranks:
        foreign = _foreign(cluster, rank)
        borrowed += foreign * reach(len(cluster.share(rank, micro_batches, groups)))
        summed += foreign * sum(
            reach(high * micro_batches // groups - low * micro_batches // groups)
            for low, high in subtrees(groups, cluster.groups_of(rank, groups))
        )
    touched = reach(micro_batches)
    return Reached(touched, new_share * touched, reach(1), borrowed, summed)


def _foreign(cluster: Cluster, rank: int) -> float:
    """The part of what a worker reaches that other ranks own."""
    return 1 - 1 / len(cluster.memory_ranks) if rank in cluster.memory_ranks else 1.0


def counted(
    layers: Mapping[str, StreamedExperts],
    micro_batches: Sequence[Any],
    written: Mapping[str, Collection[int]],
    cluster: Cluster,
    groups: int,
) -> dict[str, Reached]:
    """What the micro-batches of a step reach, of layers of which it follows from their `input_ids`.

    Args:
        written: experts that exist, by layer.
    """
    count, owners = len(micro_batches), len(cluster.memory_ranks)
    found = {}
    for name, layer in layers.items():
        by_batch = [{*known_beforehand({name: layer}, [each]).get(name, ())} for each in micro_batches]
        if not all(by_batch):
            continue
        borrowed = summed = 0
        for rank in cluster.compute_ranks:
            share, owns = cluster.share(rank, count, groups), rank in cluster.memory_ranks

            def foreign(batches: Sequence[int], rank: int = rank, owns: bool = owns, by_batch: Any = by_batch) -> int:
                numbers = {number for batch in batches for number in by_batch[batch]}
                return sum(not owns or owner_of(number, owners) != rank for number in numbers)

            borrowed += foreign(share)
            for low, high in subtrees(groups, cluster.groups_of(rank, groups)):
                summed += foreign([batch for batch in share if low <= group_of(batch, count, groups) < high])
        touched = set().union(*by_batch)
        each = sum(map(len, by_batch)) / count
        found[name] = Reached(
            len(touched), len(touched - {*written.get(name, ())}), each, float(borrowed), float(summed)
        )
    return found


class StandIn:
    """Serves a layer with zeros, of which its tokens draw from so many experts by even chance (`nn.experts.Source`): for
    whoever counts what it computes."""

    def __init__(self, layer: StreamedExperts, pool: float, dtype: torch.dtype) -> None:
        self._top, self._random = max(1, round(min(pool, _MOST_DRAWN))), torch.Generator().manual_seed(0)
        shapes = [parameter.shape for parameter in layer.family("experts").parameters]
        self._masters = [torch.zeros((1, *shape), dtype=dtype) for shape in shapes]

    def routed(self, numbers: Tensor) -> Tensor:
        return torch.randint(self._top, numbers.shape, generator=self._random)

    def weights(self, numbers: Tensor, counts: Tensor) -> list[Tensor]:
        return [masters.index_select(0, torch.zeros_like(numbers)) for masters in self._masters]

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        for each in gradients:
            each.to(torch.float32)
