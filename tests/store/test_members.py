"""Several memory ranks: a step is committed when all hold it, whichever dies when, and any number of ranks goes on."""

import contextlib
import errno
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.cases import CHUNK_BYTES, assert_accounted, fast_directory, filled, make, sparsity_of, told_apart_by
from tests.store.test_families import EXPERTS

from weightstream.cluster import owned
from weightstream.errors import PlanError, StoreError
from weightstream.store.manifest import Manifest
from weightstream.store.members import Members
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import InitialMask
from weightstream.store.store import Store
from weightstream.store.tiers import Disk

PANEL = 1000
UNITS = 5
MEMBERS = 12  # records of a family that steps write, about a third each
MASKS = {"embed.weight": InitialMask("random", counts=(300, 200))}  # one for each panel


class DeadError(BaseException):
    """The process of a rank is gone."""


class Exchange:
    """A collective of threads. A rank that dies takes the others with it: they wait for nobody."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=20)
        self._values: list[Any] = [None] * count
        self.calls = [0] * count
        self.dies: tuple[int, int] | None = None  # rank, and before which of its calls

    def member(self, rank: int) -> Members:
        return Members(rank, len(self._values), lambda value: self._exchange(rank, value))

    def _exchange(self, rank: int, value: Any) -> list[Any]:
        self.calls[rank] += 1
        if self.dies == (rank, self.calls[rank]):
            self.kill()
        try:
            self._values[rank] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise DeadError from None
        return found

    def kill(self) -> None:
        self._barrier.abort()
        raise DeadError


def as_ranks(count: int, work: Callable[[Members], Any], exchange: Exchange | None = None) -> list[Any]:
    exchange = exchange or Exchange(count)

    def one(rank: int) -> Any:
        try:
            return work(exchange.member(rank))
        except BaseException:
            exchange._barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one, rank) for rank in range(count)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        real = [error for error in errors if not isinstance(error, DeadError)]
        if errors:
            raise (real or errors)[0]
        return [future.result() for future in futures]


def reopen(path: Path, members: Members | None = None, *, writable: bool = True) -> Store:
    extra = {} if members is None else {"members": members}
    return Store.open(path, writable=writable, disk=Disk(chunk_bytes=CHUNK_BYTES), **extra)  # type: ignore[arg-type]


def write_step(store: Store, step: int) -> None:
    """A new version of every unit of this rank that this step updates, and the commit."""
    for unit in store.units:
        if unit.trainable and store.owner[unit.index] == store.members.rank and (unit.index + step) % 3:
            share = (0.6, 0.2, 1.0)[step % 3]  # of a store with sparse parameters
            buffer = filled(store.layout_of(unit.index, sparsity_of(store, unit.index, share)), 10 * step + unit.index)
            store.write(
                unit.index, buffer, store.version(unit.index) + 1, store.optimizer_steps(unit.index) + 1
            ).result()
    own = owned(MEMBERS, store.members.rank, store.members.count)
    numbers = [number for number in own if Random(100 * step + number).random() < 0.35]
    indices = [store.index(EXPERTS.name, number) for number in numbers]
    buffers = [RecordBuffer(store.layout(index)) for index in indices]
    versions = store.read_many(list(zip(indices, buffers, strict=True))).result(timeout=30)
    assert versions == [store.version(index) for index in indices]
    written = [
        (index, filled(store.layout(index), 10 * step + number), version + 1, version + 1)
        for index, number, version in zip(indices, numbers, versions, strict=True)
    ]
    store.write_many(written).result(timeout=30)
    store.commit(step, {"step": step}).result(timeout=30)


def go_on(path: Path, count: int, until: int, exchange: Exchange | None = None) -> None:
    def work(members: Members) -> None:
        store = reopen(path, members if count > 1 else None)
        try:
            for step in range(store.step + 1, until + 1):
                write_step(store, step)
        finally:
            store.close()

    as_ranks(count, work, exchange)


def look(path: Path) -> tuple[int, str]:
    with reopen(path, writable=False) as store:
        assert store.progress == ({"step": store.step} if store.step else {})
        return store.step, store.digest()


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Of every step, of one rank that nothing disturbs."""
    path = tmp_path_factory.mktemp("alone") / "store"
    make(path, panel_elements=PANEL, masks=MASKS, families=[EXPERTS]).close()
    found = dict([look(path)])
    for step in range(1, 9):
        go_on(path, 1, step)
        found |= dict([look(path)])
    assert len(set(found.values())) == 9
    with reopen(path, writable=False) as store:
        assert len(store.units) == UNITS
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "store", panel_elements=PANEL, masks=MASKS, families=[EXPERTS]).close()
    return tmp_path / "store"


def test_any_number_of_ranks_goes_on(path: Path, digests: dict[int, str]) -> None:
    for step, count in enumerate((2, 3, 1, 5, 2, 4, 1), start=1):
        go_on(path, count, step)
        require_equal_manifests(path, count)
        assert look(path) == (step, digests[step])
        with reopen(path) as store:
            assert store.verify() == []
            assert_accounted(store)
            files = [file for file in (path / "segments").rglob("*.safetensors") if "shared" not in file.parts]
            names = [file.name.split(".")[0] for file in files]
            assert max(map(names.count, names)) <= 4


def dying(store: Path, rank: int, kind: str, number: int, exchange: Exchange) -> Callable[..., Any]:
    """`Manifest.publish` of ranks of which one dies before or after one of its publishes."""
    publish, published = Manifest.publish, 0

    def replacement(self: Manifest, *args: Any, **keys: Any) -> Any:
        nonlocal published
        if self.path.parent.name != (f"memory-{rank}" if rank else store.name):
            return publish(self, *args, **keys)
        published += 1
        if kind == "before" and published == number:
            exchange.kill()
        row = publish(self, *args, **keys)
        if kind == "after" and published == number:
            exchange.kill()
        return row

    return replacement


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with fast_directory() as directory:
        yield directory


def require_equal_manifests(path: Path, count: int) -> None:
    """Each says of every record and shared file what the first one says."""
    found = []
    for rank in range(count):
        manifest = Manifest.open((path / f"memory-{rank}" if rank else path) / "manifest.sqlite", writable=False)
        found.append((manifest.records(), manifest.shared(), manifest.snapshots(), manifest.last_commit()))
        manifest.close()
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_die_twice(
    first: int, tmp_path: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one has published a step and another has not, and again while the one that is ahead goes back. Its records are
    where the lost step has moved them to."""
    origin = tmp_path / "origin"
    make(origin, panel_elements=PANEL, masks=MASKS, families=[EXPERTS]).close()
    go_on(origin, 1, 5)
    exchange, publish, done = Exchange(2), Manifest.publish, threading.Event()

    def one_dies(self: Manifest, *arguments: Any, **options: Any) -> Any:
        if self.path.parent.name == ("memory-1" if first else origin.name):
            assert done.wait(20)
            exchange.kill()
        row = publish(self, *arguments, **options)
        done.set()
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", one_dies)
        with pytest.raises(DeadError):
            go_on(origin, 2, 6, exchange)
    for number in range(3, 7):
        store, exchange = tmp_path / f"{number}", Exchange(2)
        shutil.copytree(origin, store)
        exchange.dies = (0, number)
        with contextlib.suppress(DeadError):
            go_on(store, 2, 5, exchange)
        go_on(store, 2, 6)
        require_equal_manifests(store, 2)
        assert look(store) == (6, digests[6])
        go_on(store, 3, 8)
        require_equal_manifests(store, 3)
        assert look(store) == (8, digests[8])
        with reopen(store) as reopened:
            assert reopened.verify() == []
            assert_accounted(reopened)


@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_that_dies_costs_the_step_under_way_at_most(
    count: int, in_memory: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its exchanges, and before and after each of its publishes; others go on from each state that this leaves."""
    tried, gone_on_from = 0, set[bytes]()
    origin, other = in_memory / "origin", in_memory / "again"
    make(origin, panel_elements=PANEL, masks=MASKS, families=[EXPERTS]).close()
    go_on(origin, 2, 2)
    for rank in (0, count - 1):  # those between do what the last one does
        for kind in ("exchange", "before", "after"):
            for number in range(1, 15 if kind == "exchange" else 4):
                store = in_memory / f"{kind}{rank}{number}"
                shutil.copytree(origin, store)
                exchange = Exchange(count)
                if kind == "exchange":
                    exchange.dies = (rank, number)
                with monkeypatch.context() as patch:
                    patch.setattr(Manifest, "publish", dying(store, rank, kind, number, exchange))
                    try:
                        go_on(store, count, 5, exchange)
                    except DeadError:
                        tried += 1
                step, digest = look(store)
                assert 2 <= step <= 5
                assert digest == digests[step]
                if (state := told_apart_by(store)) not in gone_on_from:
                    for again in (1, count, count + 1):
                        shutil.rmtree(other, ignore_errors=True)
                        shutil.copytree(store, other)
                        go_on(other, again, 6)
                        assert look(other) == (6, digests[6])
                    with reopen(other) as reopened:
                        assert reopened.verify() == []
                        assert_accounted(reopened)
                    gone_on_from.add(state)
                shutil.rmtree(store)
    assert tried >= 2 * 12


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=6), data=st.data())
def test_snapshots_are_what_they_were(
    tmp_path_factory: pytest.TempPathFactory, digests: dict[int, str], counts: list[int], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("snapshots") / "store"
    make(path, panel_elements=PANEL, masks=MASKS, families=[EXPERTS]).close()
    taken: dict[str, int] = {}
    for step, count in enumerate(counts, start=1):
        name = f"s{step}" if data.draw(st.booleans()) else None
        gone = data.draw(st.sampled_from([None, *taken])) if taken else None

        def work(members: Members, step: int = step, count: int = count, name: Any = name, gone: Any = gone) -> None:
            store = reopen(path, members if count > 1 else None)
            try:
                write_step(store, step)
                if name is not None:
                    store.snapshot(name)
                if gone is not None:
                    store.remove_snapshot(gone)
            finally:
                store.close()

        as_ranks(count, work)
        if name is not None:
            taken[name] = step
        if gone is not None:
            del taken[gone]
        assert look(path) == (step, digests[step])
    for name, step in taken.items():
        with reopen(path) as store:
            assert store.snapshots() == taken
            assert store.verify() == []
            store.branch(name, path.with_name(f"branch-{name}"))
        assert look(path.with_name(f"branch-{name}")) == (step, digests[step])
    for name, step in taken.items():
        with reopen(path) as store:
            store.restore(name, discard=True)
        assert look(path) == (step, digests[step])
        go_on(path, 3, step + 1)
        assert look(path) == (step + 1, digests[step + 1])


def lagging(path: Path) -> None:
    """Rank 1 of two holds step 2, rank 0 step 3."""
    go_on(path, 2, 2)
    kept = path.with_name("kept")
    shutil.copytree(path / "memory-1", kept)
    go_on(path, 2, 3)
    shutil.rmtree(path / "memory-1")
    kept.rename(path / "memory-1")


def test_a_rank_that_dies_while_it_takes_a_manifest_has_its_old_one(
    path: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lagging(path)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(StoreError, match="No space left"):
            go_on(path, 2, 3)
    go_on(path, 2, 4)
    assert look(path) == (4, digests[4])
    with reopen(path) as store:
        assert store.verify() == []


def test_a_rank_without_its_manifest_is_refused(path: Path, digests: dict[int, str]) -> None:
    go_on(path, 2, 3)
    (path / "memory-1" / "manifest.sqlite").rename(path / "elsewhere")
    with pytest.raises(StoreError, match=r"memory rank 1 took part in the last commit \(step 3\) and has no manifest"):
        go_on(path, 2, 4)
    (path / "elsewhere").rename(path / "memory-1" / "manifest.sqlite")
    go_on(path, 2, 4)
    assert look(path) == (4, digests[4])


def test_no_file_of_a_snapshot_goes_before_all_ranks_have_forgotten_it(
    path: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = Manifest.remove_snapshot

    def full_on_the_first(self: Manifest, name: str) -> Any:
        if self.path.parent == path:
            raise sqlite3.OperationalError("database or disk is full")
        return forget(self, name)

    def work(members: Members) -> None:
        with reopen(path, members) as store:
            write_step(store, 1)
            store.snapshot("held")
            write_step(store, 2)
            write_step(store, 3)
            with pytest.raises(StoreError, match="disk is full"):
                store.remove_snapshot("held")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "remove_snapshot", full_on_the_first)
        as_ranks(2, work)
    with reopen(path) as store:
        assert store.snapshots() == {"held": 1}
        assert store.verify() == []
        store.restore("held", discard=True)
    assert look(path) == (1, digests[1])


def test_a_commit_that_one_rank_alone_could_make_is_not_gone_on_from(
    path: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on(path, 2, 2)
    publish = Manifest.publish

    def full_on_the_second(self: Manifest, *arguments: Any, **options: Any) -> Any:
        if self.path.parent != path:
            raise sqlite3.OperationalError("database or disk is full")
        return publish(self, *arguments, **options)

    def work(members: Members) -> None:
        store = reopen(path, members)
        try:
            with pytest.raises(StoreError, match="disk is full"):
                write_step(store, 3)
            store.discard()
            with pytest.raises(StoreError, match="open it anew"):
                write_step(store, 3)
        finally:
            store.close()

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", full_on_the_second)
        as_ranks(2, work)
    go_on(path, 2, 4)
    assert look(path) == (4, digests[4])


class TestRefusals:
    def test_more_ranks_than_records(self, path: Path) -> None:
        with pytest.raises(PlanError, match=r"6 memory ranks, but only 5 records"):
            go_on(path, 6, 1)

    def test_a_folder_that_is_not_there(self, path: Path) -> None:
        go_on(path, 3, 2)
        shutil.rmtree(path / "memory-2")
        for count in (1, 2):
            with pytest.raises(StoreError, match=r"made by 3 memory ranks, and the folder of rank 2"):
                go_on(path, count, 3)

    def test_the_first_one_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"expected a store"):
            go_on(tmp_path / "nothing", 2, 1)

    def test_in_use(self, path: Path) -> None:
        go_on(path, 2, 1)
        with reopen(path), pytest.raises(StoreError, match=r"is being written by process"):
            go_on(path, 2, 2)

    def test_a_unit_of_another_rank(self, path: Path) -> None:
        def work(members: Members) -> None:
            with reopen(path, members) as store:
                other = next(unit for unit, rank in enumerate(store.owner) if rank != members.rank)
                with pytest.raises(ValueError, match=rf"unit {other} is owned by memory rank"):
                    store.write(other, filled(store.layout(other), 1), 1, 1)

        as_ranks(2, work)
