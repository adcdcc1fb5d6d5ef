"""The order of training is a permutation per epoch and a pure function of (seed, position)."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from weightstream.data.order import Order, Permutation


@given(count=st.integers(1, 400), key=st.binary(min_size=1, max_size=32))
def test_every_index_comes_once(count: int, key: bytes) -> None:
    permutation = Permutation(count, key)
    assert sorted(permutation(index) for index in range(count)) == list(range(count))


@given(count=st.integers(1, 60), seed=st.integers(0, 2**63), position=st.integers(0, 300), size=st.integers(1, 50))
def test_positions_are_independent_of_how_they_are_asked(count: int, seed: int, position: int, size: int) -> None:
    order = Order(count, seed)
    assert order.take(position, size) == [order[position + i] for i in range(size)]
    whole = order.take(0, position + size)
    assert whole[position:] == order.take(position, size)


def test_epochs_and_seeds_differ_and_each_epoch_is_whole() -> None:
    order = Order(1000, seed=0)
    first, second = order.take(0, 1000), order.take(1000, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    assert first != Order(1000, seed=1).take(0, 1000)


def test_neighbours_do_not_stay_neighbours() -> None:
    order = Order(100_000, seed=3).take(0, 2000)
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 5


def test_a_large_corpus_costs_no_table() -> None:
    assert 0 <= Order(10**12, seed=0)[10**13 + 7] < 10**12
