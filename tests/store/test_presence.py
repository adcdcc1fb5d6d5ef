"""Which records exist, and the next one that does: the same whether they are in memory, published, or neither yet."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.run import fast_directory
from tests.store.cases import filled, make, reopen
from tests.store.test_families import COUNT, EXPERTS

from weightstream.store import records

NUMBERS = (0, 1, 2, 17, 18, 2**32, 2**32 + 7, COUNT - 2, COUNT - 1)

actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sets(st.sampled_from(NUMBERS), min_size=1)),
        st.tuples(st.sampled_from(("accept", "discard", "commit", "reopen")), st.just(frozenset())),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=actions)
def test_what_exists_is_what_was_written_and_not_undone(
    actions: list[tuple[str, set[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MEMBERS_KEPT", 2)  # what rests is known to the manifest alone
    with fast_directory() as path:
        store = make(path / "store", families=[EXPERTS])
        newest, accepted, committed = set[int](), set[int](), set[int]()
        for action, numbers in actions:
            match action:
                case "write":
                    wanted = [store.index(EXPERTS.name, number) for number in sorted(numbers)]
                    versions = {index: store.version(index) + 1 for index in wanted}
                    images = [(index, filled(store.layout(index), 1), v, v) for index, v in versions.items()]
                    store.write_many(images).result(timeout=30)
                    newest = newest | numbers
                case "accept":
                    store.accept()
                    accepted = newest
                case "discard":
                    store.discard()
                    newest = accepted
                case "commit":
                    committing = store.commit(store.step + 1, {})
                    committed = accepted = newest
                case _:
                    store.close()
                    store = reopen(path / "store")
                    newest = accepted = committed
            first = store.index(EXPERTS.name, 0)
            within = range(first, first + COUNT)
            assert {index - first for index in store.written([first + number for number in NUMBERS])} == newest
            assert store.count_written(within) == len(newest)
            asked = [first + number for number in (*NUMBERS, 5, 2**40)]
            if not newest:
                with pytest.raises(LookupError, match="was ever written"):
                    store.next_written(within, asked)
            else:
                ring = sorted(newest)
                expected = {i: first + next((n for n in ring if n >= i - first), ring[0]) for i in asked}
                assert store.next_written(within, asked) == expected
            if action == "commit":
                committing.result(timeout=30)
        store.close()


def test_families_are_told_apart(tmp_path: Path) -> None:
    with make(tmp_path / "store", families=[EXPERTS]) as store:
        first = store.index(EXPERTS.name, 0)
        store.write(first + 3, filled(store.layout(first + 3), 1), 1, 1).result(timeout=30)
        assert store.next_written(range(first, first + COUNT), [first + 4]) == {first + 4: first + 3}
        assert store.count_written(range(first + 4, first + COUNT)) == 0
        assert store.count_written(range(first, first + 4)) == 1
