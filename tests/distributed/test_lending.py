"""What a rank borrows: values arrive where they stay, in memory that was given for them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weightstream.blocks import Parameter
from weightstream.cluster import Cluster, owner_of
from weightstream.errors import PlanError
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.fabric.parcels import Parcels
from weightstream.families.lending import Borrowed
from weightstream.store.families import Family
from weightstream.store.recipes import Recipe, Step

ONES = Recipe((Step("fill", (1.0,)),))
FAMILY = Family(
    "a.{}", 10_000, (Parameter("a.{}.x", (16, 8)), Parameter("a.{}.y", (8,))), {"a.{}.x": ONES, "a.{}.y": ONES}
)
VALUE_BYTES = 4 * FAMILY.numel


class Made(TorchDispatchMode):
    """Counts the bytes of tensors that operations make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        found = operation(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in before:
                self.nbytes += each.untyped_storage().nbytes()
        return found


def values(numbers: Tensor) -> list[Tensor]:
    """Of each record its number, everywhere."""
    return [numbers.float().view(-1, *[1] * len(p.shape)).expand(-1, *p.shape).contiguous() for p in FAMILY.parameters]


def borrowed(records: int, owners: int = 1, walking: Callable[[], None] = lambda: None) -> Borrowed:
    """With memory for so many values; who owns them has them at once."""

    def fetch(found: Borrowed, numbers: Tensor) -> None:
        found.require_room(numbers)
        parts = list(found.by_owner(numbers).values())
        for memory, part in zip(found.room([part.numel() for part in parts]), parts, strict=True):
            for mine, value in zip(memory, values(part), strict=True):
                mine.copy_(value)
        found.arrived(parts)

    made = Borrowed(
        FAMILY, None, nbytes=records * VALUE_BYTES, owners=owners, dtype=torch.float32, device=torch.device("cpu"),
        groups=1, walking=walking,
    )  # fmt: skip
    made.fetch = fetch
    return made


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 60), min_size=1, max_size=20), min_size=1, max_size=12), st.integers(1, 3))
def test_whoever_asks_gets_the_values_of_what_was_asked(rounds: list[set[int]], owners: int) -> None:
    """Outside of steps, where what does not fit beside the rest takes its place."""
    found = borrowed(25, owners)
    for wanted in rounds:
        numbers = torch.tensor(sorted(wanted, key=lambda n: (n % 7, n)))
        for got, expected in zip(found.weights(numbers, torch.ones_like(numbers)), values(numbers), strict=True):
            assert torch.equal(got, expected)
    with pytest.raises(PlanError, match="reach 26 records or more, there is memory for the values of 25"):
        found.weights(torch.arange(100, 126), torch.ones(26, dtype=torch.int64))
    found.close()


def test_what_is_there_is_not_copied_when_more_arrives() -> None:
    """A few records come with every micro-batch; each time only these are moved. There were two copies of all when there was
    no room for more."""
    found, few = borrowed(1000), 10
    found.weights(torch.arange(500), torch.ones(500, dtype=torch.int64))
    for first in range(500, 1000, few):
        numbers = torch.arange(first, first + few)
        with Made() as made:
            found.weights(numbers, torch.ones_like(numbers))
        # what comes, twice on the way to its place; what is given away; and some numbers for each that is there
        assert made.nbytes < 6 * few * VALUE_BYTES + 1000 * 8 * 8 < 500 * VALUE_BYTES
    found.close()


def test_what_is_handed_goes_where_it_is_to_stay() -> None:
    """Every rank owns a part of the records, and hands all ranks what it owns of them, itself as well."""
    cluster, numbers = Cluster(3), torch.arange(20)

    def work(links: Links) -> list[Tensor]:
        parcels, found = Parcels(links.add_records()), borrowed(30, owners=3)
        parts = list(found.by_owner(numbers + links.rank).values())
        room = dict(enumerate(found.room([part.numel() for part in parts])))
        mine = {to: values((numbers + to)[owner_of(numbers + to, 3) == links.rank]) for to in range(3)}
        parcels.hand_into(room, mine, "down")
        found.arrived(parts)
        got = found.weights(numbers + links.rank, torch.ones_like(numbers))
        found.close()
        return got

    for rank, got in enumerate(run_ranks(cluster, work, timeout_s=20)):
        assert all(torch.equal(a, b) for a, b in zip(got, values(numbers + rank), strict=True))
