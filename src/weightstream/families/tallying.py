"""What micro-batches reach of a family: how often in all, and which records in place of those that may not come to exist.

It is noted once for each pass forward. A block that is computed again on the way back reaches what it reached before.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Walking(NamedTuple):
    """What is computed now: the use (visit) and the micro-batch, and whether it is on the way back."""

    use: int
    micro_batch: int
    back: bool


@dataclass(frozen=True, slots=True)
class TouchedFacts:
    """What one step reached of a family: records, of those the ones never written before, how often in all, and the one
    reached most often; how often another one, which does not exist and may not come to, was meant; how often a micro-batch
    called the family's layers with tokens, at most."""

    touched: int
    new: int
    assignments: int
    most: int
    redirected: int = 0
    calls: int = 1


class Tally:
    """What was reached of a family in a step so far, as sums: it does not grow with micro-batches."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.numbers = self.counts = torch.empty(0, dtype=torch.int64)
        self._calls: Counter[int] = Counter()  # by micro-batch
        self.redirected = 0
        """How often a record was meant that may not come to exist."""

    def add(self, numbers: Tensor, counts: Tensor) -> None:
        """These records are reached so often, more than before; a record may be named once."""
        every = torch.cat([self.numbers, numbers.cpu()])
        self.numbers, place = torch.unique(every, return_inverse=True)
        found = torch.zeros(self.numbers.numel(), dtype=torch.int64)
        self.counts = found.index_add_(0, place, torch.cat([self.counts, counts.cpu()]))

    def called(self, walking: Walking | None, numbers: Tensor, counts: Tensor) -> None:
        """A layer was called for these records, which get so many tokens each. Outside of steps (None) nothing is noted."""
        if walking is not None and not walking.back:
            self._calls[walking.micro_batch] += 1
            self.add(numbers, counts)

    def sent_elsewhere(self, walking: Walking | None, assignments: int) -> None:
        """So many assignments of one call went to other records than were meant."""
        if walking is not None and not walking.back:
            self.redirected += assignments

    @property
    def calls(self) -> int:
        """How often a micro-batch called, at most."""
        return max(self._calls.values(), default=0)


class Gate:
    """Which records are reached for those that may not come to exist. It is open at first: each for itself.

    What it is not told it looks up. The answer follows from what the steps before have written alone, so that it does not
    matter how many answers are kept.

    Args:
        find: of these records, those that exist, and for others what is reached in their place.
        most: how many answers are kept until `forget`, at most.
    """

    def __init__(self, find: Callable[[Sequence[int]], Mapping[int, int]], most: int) -> None:
        self._find, self._most = find, most
        self._told: Mapping[int, int] | None = None
        self._found: dict[int, int] = {}

    def set(self, instead: Mapping[int, int] | None) -> None:
        """From now on of these numbers what they lead to is reached; None: the gate is open."""
        self._told = instead
        self._found = {}

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """The records that are reached for these."""
        told, found = self._told, self._found
        if told is None:
            return list(numbers)
        asked = [number for number in dict.fromkeys(numbers) if number not in told and number not in found]
        now = self._find(asked) if asked else {}
        if len(found) + len(now) > self._most:
            self._found = {}
        else:
            found.update(now)
        return [told[n] if n in told else found[n] if n in found else now[n] for n in numbers]

    def routed(self, numbers: Tensor) -> Tensor:
        """The records that these assignments go to; each different one is asked for once."""
        if self._told is None:
            return numbers
        asked, place = torch.unique(numbers.cpu(), return_inverse=True)
        return torch.tensor(self.existing(asked.tolist()), dtype=torch.int64)[place].to(numbers.device)

    @property
    def kept(self) -> int:
        """How many answers are kept that it looked up."""
        return len(self._found)

    def forget(self) -> None:
        """What was looked up is dropped."""
        self._found = {}
