"""The order of sums, against the contract's own words: recursive, with nothing clever."""

import pytest
from tests.fabric.contract import groups_of, tree_text

from weightstream.schedule.reduction import group_of, partial_sums, tree


@pytest.mark.parametrize("groups", range(1, 17))
def test_every_micro_batch_is_in_the_group_of_the_contract(groups: int) -> None:
    for count in range(1, 41):
        for group, members in enumerate(groups_of(count, groups)):
            assert [group_of(index, count, groups) for index in members] == [group] * len(members)


@pytest.mark.parametrize("groups", range(1, 33))
def test_the_tree_is_the_recursive_one(groups: int) -> None:
    text = {(group, group + 1): str(group) for group in range(groups)}
    for low, middle, high in tree(groups):
        text[low, high] = f"({text.pop((low, middle))}+{text.pop((middle, high))})"  # children before parents
    assert text == {(0, groups): tree_text(0, groups)}


def test_partial_sums_by_hand() -> None:
    assert partial_sums(1, 8) == 1
    assert partial_sums(16, 1) == 1
    # eight groups of one: 0+1 is held, 2+3 joins it; (0..3), 4+5, 6, 7 are alive before the last merges
    assert partial_sums(8, 8) == 4
    assert partial_sums(0, 8) == 0
