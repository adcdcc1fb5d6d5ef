"""Compaction keeps its pace, and with it the disk its bound: against a dictionary, through kills, at any share."""

import random
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.run import fast_directory
from tests.store.cases import Mortal, abandon, assert_accounted, assert_holds, filled, make, put
from tests.store.test_families import EXPERTS
from tests.store.test_members import as_ranks, reopen

from weightstream.errors import ConfigError
from weightstream.store import compaction, shared
from weightstream.store.members import Members
from weightstream.store.store import Store

FILE_BYTES = 80_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few records; nothing is kept of what compaction did not use."""
    monkeypatch.setattr(shared, "FILE_BYTES", FILE_BYTES)
    monkeypatch.setattr(compaction, "KEPT_BYTES", 0)
    monkeypatch.setattr(compaction, "_BUFFER_BYTES", 40_000)


def at(store: Store, share: float) -> Store:
    store.compaction_share = share
    return store


def indices(store: Store, numbers: set[int]) -> list[int]:
    return [store.index(EXPERTS.name, number) for number in sorted(numbers)]


def dead_and_live(store: Store) -> tuple[int, int]:
    rows = [row for row in store.manifest.shared() if row.live_bytes]
    live = sum(row.live_bytes for row in rows)
    return sum(row.nbytes - row.said_nbytes for row in rows) - live, live


def session(store: Store) -> tuple[int, int]:
    """What compaction has copied since the store was opened, and commits have written."""
    found = store.info()["session"]["compaction"]
    return found["copied_bytes"], found["written_bytes"]


ends = st.sampled_from(("goes on", "goes on", "goes on", "killed", "closed"))
steps = st.lists(st.tuples(st.sets(st.integers(0, 29), min_size=1), ends), min_size=12, max_size=25)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, share=st.sampled_from((1.0, 0.5, 0.25, 0.1)))
def test_the_disk_is_bounded_and_nothing_is_lost(steps: list[tuple[set[int], str]], share: float) -> None:
    """After every commit dead bytes are at most 1 / share times the live ones, one file and a commit; and what compaction
    has written at most that share of what commits wrote, and a record. A kill leaves the last commit, in the same digest as
    a store has that was never killed and compacts at full speed."""
    with fast_directory() as path:
        store = at(make(path / "store", families=[EXPERTS], device=Mortal()), share)
        plain = make(path / "plain", families=[EXPERTS])
        image = store.layout(store.index(EXPERTS.name, 0)).parts_nbytes
        values: dict[int, int] = {}
        copied = written = most = 0
        for number, (chosen, end) in enumerate(steps, 1):
            put(store, number, *indices(store, chosen))
            put(plain, number, *indices(plain, chosen))
            values |= dict.fromkeys(chosen, number)
            most = max(most, len(chosen) * image)
            dead, live = dead_and_live(store)
            assert live == len(values) * image
            assert dead <= live / share + FILE_BYTES + most
            now = session(store)
            assert copied + now[0] <= share * (written + now[1]) + image
            if end != "goes on":
                copied, written = copied + now[0], written + now[1]
                if end == "killed":
                    for index in indices(store, chosen):
                        store.write(index, filled(store.layout(index), 99), store.version(index) + 1, 99).result(
                            timeout=30
                        )
                    abandon(store)
                else:
                    store.close()
                store = at(reopen(path / "store"), share)
                assert_accounted(store)
        assert written + session(store)[1] == sum(len(chosen) for chosen, _ in steps) * image
        assert store.verify() == []
        for chosen_number, value in values.items():
            assert_holds(store, *indices(store, {chosen_number}), value, {})
        assert store.digest() == plain.digest()
        store.close()
        plain.close()


def test_a_larger_share_makes_files_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are rewritten at random for long: dead bytes settle below what arithmetic says (docs/store.md), which
    empties files in order of age."""
    monkeypatch.setattr(shared, "FILE_BYTES", 1 << 20)
    settled = []
    for share in (0.1, 0.25, 1.0):
        draw, ratios, copied = random.Random(1), [], 0
        with fast_directory() as path, at(make(path / "store", families=[EXPERTS]), share) as store:
            image = store.layout(store.index(EXPERTS.name, 0)).parts_nbytes
            for number in range(80):
                put(store, number + 1, *indices(store, set(draw.sample(range(120), 12))))
                dead, live = dead_and_live(store)
                ratios.append(dead / live)
                before, (copied, written) = copied, session(store)
                assert copied - before <= share * 12 * image + image
                assert copied <= share * written + image
            assert copied > 0
        settled.append(fmean(ratios[50:]))
    assert 1.64 > settled[0] > settled[1] > settled[2]
    assert settled[1] < 1.01
    assert settled[2] < 0.6  # 0.39, and what files of a few records cannot be divided into


def test_short_sessions_keep_the_pace_together() -> None:
    """What compaction wrote too much in one session, a record where less was allowed, the next ones make up for."""
    copied = written = 0
    draw = random.Random(2)
    with fast_directory() as path:
        make(path / "store", families=[EXPERTS]).close()
        for number in range(40):
            with at(reopen(path / "store"), 0.05) as store:
                image = store.layout(store.index(EXPERTS.name, 0)).parts_nbytes
                put(store, number + 1, *indices(store, set(draw.sample(range(8), 3))))
                copied, written = copied + session(store)[0], written + session(store)[1]
    assert 0 < copied <= 0.05 * written + image


def test_several_ranks_keep_the_pace_each_for_its_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks write records at random, each its own; dead bytes of all files stay in bounds, and no rank waits for the
    files of others, of which there are more than one look takes."""
    monkeypatch.setattr(shared, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(compaction, "_FILES_AT_ONCE", 1)
    share, ranks = 0.5, 3

    def work(members: Members, path: Path) -> list[int]:
        draw, copied = random.Random(members.rank), 0
        with at(reopen(path, members=members), share) as store:
            image = store.layout(store.index(EXPERTS.name, 0)).parts_nbytes
            for number in range(50):
                mine = draw.sample(range(members.rank, 120, ranks), 4)
                put(store, number + 1, *indices(store, set(mine)))
                before, (copied, written) = copied, session(store)
                assert copied - before <= share * 4 * image + image
                dead, live = dead_and_live(store)
                assert dead <= live / share + FILE_BYTES + ranks * 4 * image
            assert written == 50 * 4 * image
        return [copied, written]

    with fast_directory() as path:
        make(path / "store", families=[EXPERTS]).close()
        found = as_ranks(ranks, lambda members: work(members, path / "store"))
        assert all(0 < copied <= share * written for copied, written in found)
        with reopen(path / "store") as store:
            assert store.verify() == []
            assert_accounted(store)


def test_no_share_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / "store", families=[EXPERTS]) as store:
        for share in (0.0, -1.0, 1.5, float("nan")):
            with pytest.raises(ConfigError, match="above 0 and at most 1"):
                store.compaction_share = share
        assert store.compaction_share == compaction.SHARE
