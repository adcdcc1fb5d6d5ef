"""Tensors that ranks hand each other at a moment when all of them are there, of sizes that each knows beforehand."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from weightstream.fabric.links import Channel, Handle
from weightstream.trace.recorder import NO_LOG, Log

Direction = Literal["down", "up"]
_NOTED: dict[Direction, str] = {"down": "fetch", "up": "reduce"}
_WHAT = "records of families"

Sizes = Sequence[tuple[torch.dtype, Sequence[int]]]
"""Of the tensors in a parcel: what of and of which shape."""


class Parcels:
    """One rank's part in what all ranks hand each other, one moment after another. Every rank calls the same methods in
    the same order, in one thread."""

    def __init__(self, channel: Channel, log: Log = NO_LOG) -> None:
        self._channel, self._log = channel, log
        self.rank = channel.rank
        self.sent: Mapping[Direction, Counter[int]] = defaultdict(Counter)
        """Bytes by direction and the rank that they went to."""

    def tell(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in order of rank."""
        return self._channel.gather(value)

    def hand(
        self, given: Mapping[int, Sequence[Tensor]], expected: Mapping[int, Sizes], direction: Direction
    ) -> dict[int, list[Tensor]]:
        """Hands these tensors to other ranks and gives what came from them; this rank's own are given back as they are.

        Args:
            given: by rank, tensors in host memory.
            expected: by rank, what it hands to this one.

        Raises:
            FabricError: a rank is gone or silent.
        """
        found = {
            source: list(given[source])
            if source == self.rank
            else [torch.empty(tuple(shape), dtype=dtype) for dtype, shape in sizes]
            for source, sizes in expected.items()
        }
        self._hand(given, {source: tensors for source, tensors in found.items() if source != self.rank}, direction)
        return found

    def hand_into(
        self, memory: Mapping[int, Sequence[Tensor]], given: Mapping[int, Sequence[Tensor]], direction: Direction
    ) -> None:
        """The same, where there is memory for what comes: by rank, contiguous tensors that it goes to. This rank's own are
        copied there."""
        for mine, own in zip(memory.get(self.rank, ()), given.get(self.rank, ()), strict=True):
            mine.copy_(own)
        self._hand(given, {source: tensors for source, tensors in memory.items() if source != self.rank}, direction)

    def _hand(
        self, given: Mapping[int, Sequence[Tensor]], coming: Mapping[int, Sequence[Tensor]], direction: Direction
    ) -> None:
        began_s, rank = time.perf_counter(), self.rank
        under_way, came, left = list[tuple[Handle, Tensor]](), 0, 0
        for source, tensors in coming.items():
            for number, tensor in enumerate(tensors):
                if tensor.numel():
                    came += tensor.nbytes
                    data = _as_bytes(tensor)
                    under_way.append((self._channel.receive(data, source, number, _WHAT), data))
        for target, tensors in given.items():
            for number, tensor in enumerate(tensors):
                if target != rank and tensor.numel():
                    left += tensor.nbytes
                    self.sent[direction][target] += tensor.nbytes
                    data = _as_bytes(tensor.contiguous())
                    under_way.append((self._channel.send(data, target, number, _WHAT), data))
        for handle, _ in under_way:
            handle.wait()
        if under_way:
            self._log.note(_NOTED[direction], None, direction, began_s, time.perf_counter(), max(came, left))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
