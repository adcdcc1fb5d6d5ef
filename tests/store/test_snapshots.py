"""Snapshots, going back to them, and branches."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.store.cases import BLOCKS, Slow, abandon, assert_holds, files, filled, loaded, make, reopen, segment, step

import weightstream.store.branch
from weightstream.errors import StoreError, StoreInUseError
from weightstream.store.segments import AlignedBuffer


def sizes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "segments").iterdir())


def test_a_snapshot_holds_its_files_until_it_is_deleted(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        held = segment(store, 0)
        store.snapshot("best")
        before = held.read_bytes()
        with pytest.raises(StoreError, match="already has a snapshot 'best'"):
            store.snapshot("best")
        for value in range(2, 7):
            step(store, value)
        assert held.read_bytes() == before
    with reopen(tmp_path / "store") as store:
        assert store.snapshots() == {"best": 1}
        for value in range(7, 10):
            step(store, value)
        assert held.read_bytes() == before
        assert store.verify() == []
        store.remove_snapshot("best")
        with pytest.raises(StoreError, match="no snapshot 'best'"):
            store.remove_snapshot("best")
        assert not held.exists()
        for value in range(10, 14):
            step(store, value)
        assert store.snapshots() == {}
    with reopen(tmp_path / "store") as store:
        assert len(list((store.path / "segments").glob("00000.*"))) <= 3


def test_deleting_frees_exactly_what_it_alone_held(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1, 0)
        step(store, 1, 1)
        store.snapshot("first")
        step(store, 2, 0)
        store.snapshot("second")  # shares block 1 with the first
        step(store, 3, 0)
        step(store, 2, 1)
        image = [store.layout(block.index).image_nbytes for block in BLOCKS]
        found = store.info()["snapshots"]
        assert found == {"first": {"step": 1, "own_bytes": image[0]}, "second": {"step": 2, "own_bytes": image[0]}}
        before = sizes(store.path)
        assert store.remove_snapshot("first") == image[0]
        assert sizes(store.path) == before - image[0]
        assert store.info()["snapshots"] == {"second": {"step": 2, "own_bytes": image[0] + image[1]}}
        assert store.remove_snapshot("second") == image[0] + image[1]
        assert sizes(store.path) == before - 2 * image[0] - image[1]
        store.snapshot("now")  # holds nothing alone
        assert store.remove_snapshot("now") == 0
        assert_holds(store, 0, 3, {})
        assert_holds(store, 1, 2, {})
        assert store.verify() == []


def test_a_reader_keeps_the_file_of_a_deleted_snapshot_until_it_has_read_it(tmp_path: Path) -> None:
    with make(tmp_path / "store", device=Slow(read_s=0.02)) as store:
        step(store, 1)
        store.snapshot("first")
        part = store.layout(0).streamed
        buffer = AlignedBuffer(part.nbytes)
        reading = store.fetch(0, buffer.view)
        store.write(0, filled(store.layout(0), 2), 2, 2)
        store.commit(2, {}).result(timeout=30)
        store.remove_snapshot("first")
        assert reading.result(timeout=30) == 1


def test_restore_goes_back_and_training_goes_on_from_there(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        initial = {block.index: loaded(store, block.index) for block in BLOCKS}
        step(store, 1, 0)
        store.snapshot("first")
        digest = store.digest()
        for value in range(2, 6):
            step(store, value, 0)
        step(store, 6, 1)
        store.pin(0, ["param", "copy"])
        assert_holds(store, 0, 5, initial)
        before = files(store.path / "segments")
        with pytest.raises(StoreError, match=r"step 6\) is held by no snapshot and would be lost"):
            store.restore("first")
        with pytest.raises(StoreError, match="no snapshot 'other'; it has first"):
            store.restore("other", discard=True)
        assert store.step == 6
        store.snapshot("last")
        store.restore("first")
        assert files(store.path / "segments") == before, "no data is copied"
        assert (store.step, store.progress, store.digest()) == (1, {"value": 1}, digest)
        assert_holds(store, 0, 1, initial)
        assert_holds(store, 1, None, initial)  # it had no version then
        step(store, 2, 0)
        step(store, 3, 0)
    with reopen(tmp_path / "store") as store:
        assert store.step == 3
        assert_holds(store, 0, 3, initial)
        store.restore("last", discard=True)
        assert_holds(store, 0, 5, initial)
        assert_holds(store, 1, 6, initial)
        assert store.verify() == []
    with reopen(tmp_path / "store") as store:
        assert store.step == 6
        assert_holds(store, 0, 5, initial)
        for name in ("first", "last"):
            store.remove_snapshot(name)
        assert_holds(store, 0, 5, initial)
        assert store.verify() == []


def test_restore_refuses_what_is_not_committed_and_what_is_trained(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        store.snapshot("first")
        store.write(0, filled(store.layout(0), 2), 2, 2).result(timeout=30)
        with pytest.raises(StoreError, match="not committed"):
            store.restore("first")
        store.discard()
        store.attached = True
        with pytest.raises(StoreError, match="is being trained; close its engine"):
            store.restore("first")
        store.attached = False
        store.restore("first")
        assert_holds(store, 0, 1, {})


def test_a_branch_shares_files_and_goes_its_own_way(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1, 0)
        step(store, 1, 1)
        store.snapshot("first")
        digest = store.digest()
        step(store, 2, 0)
        (store.path / "hugging_face").mkdir()
        (store.path / "hugging_face" / "config.json").write_text("{}")
        store.branch("first", tmp_path / "branch")  # while the store is open for writing
        assert segment(store, 1).stat().st_nlink == 2
        with reopen(tmp_path / "branch") as branch:
            assert (branch.step, branch.progress, branch.digest()) == (1, {"value": 1}, digest)
            assert branch.snapshots() == {}
            assert branch.manifest.meta()["id"] != store.manifest.meta()["id"]
            assert (branch.path / "hugging_face" / "config.json").read_text() == "{}"
            for value in range(3, 8):  # so often that every file of either would have been recycled
                step(branch, value, 0)
                step(store, 10 + value, 0)
                step(branch, value, 1)
                step(store, 10 + value, 1)
            assert branch.verify() == []
            assert_holds(branch, 0, 7, {})
        assert store.verify() == []
        assert_holds(store, 0, 17, {})
        store.remove_snapshot("first")
        shutil.rmtree(tmp_path / "branch")
        assert store.verify() == []


def test_a_branch_outlives_its_origin(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        store.snapshot("first")
        digest = store.digest()
        store.branch("first", tmp_path / "branch")
    shutil.rmtree(tmp_path / "store")
    with reopen(tmp_path / "branch") as branch:
        assert branch.verify() == []
        assert branch.digest() == digest


def test_a_branch_is_refused_where_there_is_something(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        store.snapshot("first")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("text")
        for path in (tmp_path / "mine", tmp_path / "store", tmp_path / "store" / "inside"):
            before = files(tmp_path)
            with pytest.raises(StoreError, match=r"found thesis.txt|already holds a store|lies in the store"):
                store.branch("first", path)
            assert files(tmp_path) == before
        with pytest.raises(StoreError, match="no snapshot 'other'"):
            store.branch("other", tmp_path / "branch")
        assert not (tmp_path / "branch").exists()


@pytest.mark.parametrize("reflinks", [True, False])
def test_without_hard_links(reflinks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(weightstream.store.branch, "_reflink", shutil.copyfile if reflinks else refuse)
    with make(tmp_path / "store") as store:
        step(store, 1)
        store.snapshot("first")
        if reflinks:
            store.branch("first", tmp_path / "branch")
            with reopen(tmp_path / "branch") as branch:
                assert branch.digest() == store.digest()
        else:
            with pytest.raises(StoreError, match="cannot share files.*cross-device"):
                store.branch("first", tmp_path / "branch")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_branch_that_was_cut_short_is_made_by_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        store.snapshot("first")
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed: nothing is cleared
            patched.setattr(weightstream.store.branch.Manifest, "create", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                store.branch("first", tmp_path / "branch")
        assert not (tmp_path / "branch").exists()
        store.branch("first", tmp_path / "branch")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "store"]


def test_commands_need_the_writer_gone(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        with pytest.raises(StoreInUseError):
            reopen(tmp_path / "store")
    store = make(tmp_path / "other")
    step(store, 1)
    abandon(store)
    with reopen(tmp_path / "other") as again:
        again.snapshot("after a crash")
        again.restore("after a crash")
