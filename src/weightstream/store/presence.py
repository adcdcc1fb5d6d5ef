"""Which records of families were ever written, those that no commit has published yet among them.

Those in memory know it themselves; of all others the manifest does. Nothing here takes a record into memory, and nothing
but a count grows with a family.
"""

from bisect import bisect_left
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightstream.store.versions import Versions


def written(versions: "Versions", indices: Collection[int]) -> set[int]:
    """Those of these records that are not as the generator makes them."""
    with versions.shared.lock:
        states = {index: versions.records.known(index) for index in indices}
        found = {index for index, state in states.items() if state is not None and state.newest.slot is not None}
        return found | versions.shared.manifest.existing([i for i, state in states.items() if state is None])


def next_written(versions: "Versions", within: range, indices: Collection[int]) -> dict[int, int]:
    """For each of these records the first one of a range, from it on and then from the range's begin, that was ever written.

    Raises:
        LookupError: none was.
    """
    with versions.shared.lock:
        pending = _in_memory(versions, within)
        return {index: _next(versions, within, pending, index) for index in indices}


def count_written(versions: "Versions", within: range) -> int:
    """How many records of a range were ever written; looks at each of them."""
    with versions.shared.lock:
        pending = _in_memory(versions, within)
        published = versions.shared.manifest.existing(pending)
        return versions.shared.manifest.count_living(within.start, within.stop) + len(pending) - len(published)


def _in_memory(versions: "Versions", within: range) -> list[int]:
    return sorted(i for i, state in versions.records.in_memory() if i in within and state.newest.slot is not None)


def _next(versions: "Versions", within: range, pending: list[int], index: int) -> int:
    for first in (index, within.start):
        place = bisect_left(pending, first)
        published = versions.shared.manifest.first_living(first, within.stop)
        candidates = [found for found in (published, *pending[place : place + 1]) if found is not None]
        if candidates:
            return min(candidates)
    raise LookupError(f"no record from {within.start} to {within.stop - 1} was ever written")
