"""What stays in RAM: the set of things to keep that saves the most bytes per step within a budget.

A step reads every record and copy once or twice, in an order that is known beforehand, so nothing is gained by deciding
at run time: the best set is a 0/1 knapsack, solved here once per plan. Blocks come in few sizes, which makes it small:
equal things are counted, and of two ways to fill the same bytes only the better one is kept (Nemhauser and Ullmann, 1969).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_WAYS_KEPT = 20_000


@dataclass(frozen=True, slots=True)
class Candidate(Generic[K]):
    """Something that takes `nbytes` of RAM and saves `saved_bytes` of each step's traffic."""

    key: K
    nbytes: int
    saved_bytes: int


def most_saved(candidates: Iterable[Candidate[K]], capacity_bytes: int) -> set[K]:
    """The candidates that save the most within the capacity; of equal sets the smallest, and in it the first.

    Exact as long as there are no more than 20,000 ways worth keeping, that is, for any model whose blocks come in a few
    sizes; beyond that the ways that save least are dropped.
    """
    alike: dict[tuple[int, int], list[K]] = defaultdict(list)
    for candidate in candidates:
        if candidate.saved_bytes > 0 and candidate.nbytes <= capacity_bytes:
            alike[candidate.nbytes, candidate.saved_bytes].append(candidate.key)
    kinds = sorted(alike, key=lambda kind: (-kind[1] / max(kind[0], 1), -kind[0]))
    ways: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]  # bytes, saved, how many of each kind
    for nbytes, saved in kinds:
        longer = [
            (used + count * nbytes, gained + count * saved, (*counts, count))
            for used, gained, counts in ways
            for count in range(len(alike[nbytes, saved]) + 1)
            if used + count * nbytes <= capacity_bytes
        ]
        ways = _undominated(longer)
    _, _, counts = ways[-1]
    return {key for kind, count in zip(kinds, counts, strict=True) for key in alike[kind][:count]}


def _undominated(ways: list[tuple[int, int, tuple[int, ...]]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Those that save more than every way of as few bytes; in order of bytes, and so of what they save."""
    kept: list[tuple[int, int, tuple[int, ...]]] = []
    for way in sorted(ways, key=lambda way: (way[0], -way[1])):
        if not kept or way[1] > kept[-1][1]:
            kept.append(way)
    return kept[-_WAYS_KEPT:]
