"""Which experts exist, as all ranks know it together: owners know what they have written, whether it is published or not.

All ranks call the same methods in the same order, and all are given the same; one rank alone asks nobody.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from weightstream.cluster import owner_of
from weightstream.families.touching import Touched

Numbers = Mapping[str, Sequence[int]]
"""Of experts, by layer."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of an expert on disk, of what a step reads of it, and in memory; and how many a rank has memory for."""

    record_bytes: int
    loaded_bytes: int
    slot_bytes: int
    capacity: int


class Existence:
    """Args:
    counts: by layer, how many experts there are.
    touched: the records that this rank owns; none, if it owns nothing.
    gather: a JSON value of every rank.
    member: this rank among those that own records, and how many these are.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        touched: Mapping[str, Touched],
        gather: Callable[[Any], list[Any]],
        member: tuple[int, int] = (0, 1),
    ) -> None:
        self._counts, self._touched, self._gather, self._member = counts, touched, gather, member
        own = {
            name: astuple(Sizes(each.record_bytes, each.loaded_bytes, each.slot_bytes, each.capacity))
            for name, each in touched.items()
        }
        self.sizes = {name: Sizes(*found) for name, found in next(filter(None, gather(own)), own).items()}

    def together(self, expected: Numbers, tokens: int | None) -> tuple[dict[str, list[int]], int | None]:
        """What all ranks expect to reach, and how many tokens they have, if each knows."""
        found = self._gather([{name: list(numbers) for name, numbers in expected.items()}, tokens])
        union: dict[str, set[int]] = {}
        for each, _ in found:
            for name, numbers in each.items():
                union.setdefault(name, set()).update(numbers)
        known = [each for _, each in found if each is not None]
        total = sum(known) if len(known) == len(found) else None
        return {name: sorted(numbers) for name, numbers in union.items()}, total

    def written(self, wanted: Numbers) -> dict[str, set[int]]:
        """Those of these that exist."""
        own = {}
        for name, touched in self._touched.items():
            rank, owners = self._member
            own[name] = sorted(touched.written([n for n in wanted.get(name, ()) if owner_of(n, owners) == rank]))
        found: dict[str, set[int]] = {name: set() for name in wanted}
        for each in self._gather(own):
            for name, numbers in each.items():
                if name in found:
                    found[name].update(numbers)
        return found

    def next_written(self, wanted: Numbers) -> dict[str, dict[int, int]]:
        """For each of these the next one that exists, by number, round the end; of layers of which there is any."""
        own = {name: touched.next_written(wanted[name]) for name, touched in self._touched.items() if name in wanted}
        told, found = self._gather(own), {}
        for name, numbers in wanted.items():
            by_rank = [each[name] for each in told if name in each]
            found[name] = {
                number: min((n for n in candidates if n is not None), key=lambda n: (n - number) % self._counts[name])
                for number, candidates in zip(numbers, zip(*by_rank, strict=True), strict=True)
            }
        return found

    def count(self) -> dict[str, int]:
        """How many there are, by the last commit or since; takes the longer the more there are."""
        own = {name: touched.count_written() for name, touched in self._touched.items()}
        return dict(next(filter(None, self._gather(own)), own))

    def sum(self, added: Mapping[str, int]) -> dict[str, int]:
        """Of all ranks."""
        told = self._gather(dict(added))
        return {name: sum(each.get(name, 0) for each in told) for name in self._counts}
