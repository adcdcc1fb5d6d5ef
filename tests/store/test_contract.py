"""What every store promises, whatever lies in memory and however its disk is reached."""

import hashlib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tests.store.cases import (
    BLOCKS,
    TRAINED,
    Buffered,
    Gated,
    Jittery,
    Mortal,
    abandon,
    assert_holds,
    filled,
    loaded,
    make,
    reopen,
    segment,
)

from weightstream.store.layout import Precision
from weightstream.store.segments import AlignedBuffer, RecordBuffer, part_tensors
from weightstream.store.store import Store

EVERYTHING = ("copy", "param", "exp_avg", "exp_avg_sq")


class StoreContract:
    """Subclasses say which parts are pinned, in which precision, and on what device."""

    pins: tuple[str, ...] = ()
    precision: Precision = "bf16"

    def device(self) -> Any:
        return None

    def pin(self, store: Store) -> None:
        for block in store.blocks:
            store.pin(block.index, self.pins)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with make(tmp_path / "store", self.precision, self.device()) as store:
            self.pin(store)
            yield store

    def reopen(self, store: Store) -> Store:
        again = reopen(store.path, self.device())
        self.pin(again)
        return again

    def test_begins_with_the_recipes_and_zeros_and_takes_no_space(self, store: Store) -> None:
        for index in TRAINED:
            assert store.version(index) == store.optimizer_steps(index) == 0
            found = loaded(store, index)
            assert all(tensor.abs().sum() == 0 for key, tensor in found.items() if key.startswith("exp_avg"))
            assert_holds(store, index, None, {index: found})
        assert [path.name for path in (store.path / "segments").iterdir()] == ["00002.a.safetensors"]
        assert (store.step, store.progress) == (0, {})

    def test_serves_what_was_written_before_and_after_the_commit(self, store: Store) -> None:
        before = store.digest()
        for step in range(1, 4):
            for index in TRAINED:
                store.write(index, filled(store.layout(index), step + index), step, step)
                assert store.version(index) == store.optimizer_steps(index) == step
                assert_holds(store, index, step + index, {})
            assert store.digest() == before
            store.commit(step, {"tokens": step * 100}).result()
            assert (store.step, store.progress) == (step, {"tokens": step * 100})
            assert store.digest() != before
            before = store.digest()
            for index in TRAINED:
                assert_holds(store, index, step + index, {})

    def test_opens_at_the_last_commit(self, store: Store) -> None:
        first = {index: loaded(store, index) for index in TRAINED}
        store.write(0, filled(store.layout(0), 7), 1, 1)
        store.commit(5, {"position": [1, 2]}).result()
        digest = store.digest()
        store.write(0, filled(store.layout(0), 8), 2, 2).result()
        store.write(1, filled(store.layout(1), 9), 2, 2).result()
        store.close()
        with self.reopen(store) as again:
            assert (again.step, again.progress, again.version(0), again.version(1)) == (5, {"position": [1, 2]}, 1, 0)
            assert_holds(again, 0, 7, {})
            assert_holds(again, 1, None, first)
            assert again.digest() == digest
            assert again.verify() == []
            assert again.blocks == BLOCKS

    def test_discard_undoes_what_was_not_committed(self, store: Store) -> None:
        first = {index: loaded(store, index) for index in TRAINED}
        store.write(0, filled(store.layout(0), 1), 1, 1)
        store.discard()
        assert_holds(store, 0, None, first)
        store.write(0, filled(store.layout(0), 2), 1, 1)
        committed = store.commit(1, {})
        store.write(0, filled(store.layout(0), 3), 2, 2)
        store.discard()
        assert_holds(store, 0, 2, {})
        committed.result()
        store.write(0, filled(store.layout(0), 4), 2, 2)
        store.commit(2, {}).result()
        assert_holds(store, 0, 4, {})
        assert store.optimizer_steps(0) == 2

    def test_a_step_may_be_written_before_the_last_one_is_committed(self, store: Store) -> None:
        """Twelve steps in flight at once: no record takes more than three files, and the order holds."""
        commits = []
        for step in range(1, 13):
            for index in TRAINED:
                store.write(index, filled(store.layout(index), step), step, step)
            commits.append(store.commit(step, {"step": step}))
        for commit in commits:
            commit.result(timeout=30)
        names = sorted(path.name for path in (store.path / "segments").iterdir())
        assert all(len([name for name in names if name.startswith(f"{index:05d}")]) <= 3 for index in TRAINED)
        for index in TRAINED:
            assert_holds(store, index, 12, {})
        assert store.verify() == []

    def test_writing_never_touches_what_was_committed(self, store: Store) -> None:
        for step in range(1, 5):
            store.write(0, filled(store.layout(0), step), step, step)
            store.commit(step, {}).result()
            live = segment(store, 0)
            before = hashlib.sha256(live.read_bytes()).digest()
            for attempt in range(4):  # several versions between two commits
                store.write(0, filled(store.layout(0), 100 + attempt), 50 + step, 9).result()
            assert hashlib.sha256(live.read_bytes()).digest() == before
            store.discard()

    def test_items_are_in_order_of_name_and_are_copies(self, store: Store) -> None:
        store.write(0, filled(store.layout(0), 1), 1, 1)
        items = dict(store.items())
        names = sorted(parameter.name for block in BLOCKS for parameter in block.parameters)
        assert list(items) == names
        assert set(items["odd.weight"]) == {"param", "exp_avg", "exp_avg_sq"}
        assert set(items["odd.frozen"]) == {"param"}
        for block in BLOCKS:
            for key, tensor in loaded(store, block.index).items():
                part, name = key.split("/", 1)
                assert torch.equal(items[name][part], tensor)
                assert torch.equal(store.tensor(name, part), tensor)
        assert all(tensor.dtype == torch.float32 for parts in items.values() for tensor in parts.values())

    def test_digest_does_not_depend_on_where_records_lie(self, store: Store, tmp_path: Path) -> None:
        with make(tmp_path / "plain", self.precision) as plain:
            assert plain.digest() == store.digest()
            for step in (1, 2, 3):
                for index in TRAINED:
                    for each in (store, plain):
                        each.write(index, filled(each.layout(index), step), step, step)
                store.commit(step, {}).result()
            plain.commit(3, {}).result()
            assert plain.digest() == store.digest()

    def test_pinning_may_change_at_any_time(self, store: Store) -> None:
        for step in range(1, 6):
            store.write(0, filled(store.layout(0), step), step, step)
            store.pin(0, EVERYTHING[: step % 5])
            assert_holds(store, 0, step, {})
            store.commit(step, {})
            store.unpin(0, EVERYTHING[step % 3 : step % 5])
            assert_holds(store, 0, step, {})
        store.unpin(0)
        assert_holds(store, 0, 5, {})

    def test_whatever_overlaps_reads_see_the_version_of_their_time(self, tmp_path: Path) -> None:
        """Writes, reads, commits, undos and pins issued without ever waiting, on a device of uneven speed."""
        random = Random(7)
        with make(tmp_path / "jittery", self.precision, Jittery(5, 0.001)) as jittery:
            self.pin(jittery)
            value = committed = 0
            reads = []
            for number in range(1, 120):
                action = random.choice(("write", "write", "load", "load", "fetch", "commit", "discard", "pin", "unpin"))
                if action == "write":
                    value = number
                    jittery.write(0, filled(jittery.layout(0), value), value, value)
                elif action == "commit":
                    committed = value
                    jittery.commit(number, {})
                elif action == "discard":
                    value = committed
                    jittery.discard()
                elif action == "pin":
                    jittery.pin(0, random.sample(EVERYTHING, 2))
                elif action == "unpin":
                    jittery.unpin(0, random.sample(EVERYTHING, 2))
                elif value:
                    record = RecordBuffer(jittery.layout(0))
                    parts = None if action == "load" else [jittery.layout(0).streamed.name]
                    view = record.view(jittery.layout(0).streamed.name)
                    future = jittery.fetch(0, view) if action == "fetch" else jittery.load(0, record)
                    reads.append((value, record, parts, future))
            for wanted, record, parts, future in reads:
                assert future.result(timeout=30) == wanted
                expected = filled(record.layout, wanted)
                for part in parts or [part.name for part in record.layout.states]:
                    for name, tensor in record.tensors(part).items():
                        assert torch.equal(tensor, expected.tensors(part)[name])


class TestDisk(StoreContract):
    """Nothing pinned."""

    def test_a_fetch_waits_for_the_write_without_a_thread(self, tmp_path: Path) -> None:
        device = Gated()
        with make(tmp_path / "store", device=device) as store:
            device.gate.clear()
            record = filled(store.layout(0), 5)
            written = store.write(0, record, 1, 1)
            part = store.layout(0).streamed
            views = [AlignedBuffer(part.nbytes) for _ in range(12)]  # more than there are threads
            fetches = [store.fetch(0, buffer.view) for buffer in views]
            commit = store.commit(1, {})
            other = RecordBuffer(store.layout(2))
            assert store.load(2, other).result(timeout=30) == 0  # the pools are free meanwhile
            assert not written.done()
            assert not commit.done()
            assert not any(fetch.done() for fetch in fetches)
            device.gate.set()
            assert [fetch.result(timeout=30) for fetch in fetches] == [1] * 12
            commit.result(timeout=30)
            wanted = record.tensors("copy")["embed.weight"]
            assert all(torch.equal(part_tensors(part, b.view)["embed.weight"], wanted) for b in views)


class TestMemory(StoreContract):
    """Everything pinned."""

    pins = EVERYTHING

    def test_pinned_parts_move_no_disk_bytes(self, store: Store) -> None:
        for index in TRAINED:
            store.write(index, filled(store.layout(index), 1), 1, 1).result()
        before = dict(store.disk.traffic.read_bytes)
        for index in TRAINED:
            assert_holds(store, index, 1, {})
        assert dict(store.disk.traffic.read_bytes) == before
        assert store.counters["ram", "copy"]["read"] == sum(store.layout(i).streamed.nbytes for i in TRAINED)
        for index in TRAINED:  # unpinned, the same comes from disk
            store.unpin(index)
            assert_holds(store, index, 1, {})
        assert store.pinned_bytes == sum(part.nbytes for part in store.layout(2).parts)


def _combinations() -> Iterator[tuple[str, type[StoreContract]]]:
    """A class for every other set of parts that may lie in memory, in both precisions."""
    for precision, parts in (("bf16", EVERYTHING), ("fp32", EVERYTHING[1:])):
        for size in range(len(parts) + 1):
            for pins in combinations(parts, size):
                if precision == "fp32" or 0 < size < len(parts):
                    name = f"Test_{precision}_{'_'.join(pins) or 'disk'}"
                    yield name, type(name, (StoreContract,), {"pins": pins, "precision": precision})


globals().update(_combinations())


class TestPageCache(StoreContract):
    """A file system that has no direct I/O."""

    def device(self) -> Any:
        return Buffered()


class TestCrash(StoreContract):
    """Reopening after a crash instead of a close."""

    def device(self) -> Any:
        return Mortal()

    def reopen(self, store: Store) -> Store:
        return reopen(store.path, self.device())

    @pytest.mark.parametrize("writes_left", [0, 1, 3, 7, 20, 60])
    def test_a_crash_leaves_the_last_commit(self, tmp_path: Path, writes_left: int) -> None:
        device = Mortal()
        store = make(tmp_path / "store", device=device)
        store.write(0, filled(store.layout(0), 1), 1, 1)
        store.commit(1, {"step": 1}).result()
        digest = store.digest()
        device.writes_left = writes_left
        store.write(0, filled(store.layout(0), 2), 2, 2)
        store.write(1, filled(store.layout(1), 2), 2, 2)
        commit = store.commit(2, {"step": 2})
        commit.exception(timeout=30)
        abandon(store)
        with self.reopen(store) as again:
            assert again.verify() == []
            if commit.exception() is None:
                assert (again.step, again.progress) == (2, {"step": 2})
            else:
                assert (again.step, again.progress, again.digest()) == (1, {"step": 1}, digest)
            for step in (3, 4, 5):
                again.write(0, filled(again.layout(0), step), step, step)
                again.commit(step, {}).result()
            assert_holds(again, 0, 5, {})
