"""Pinned parts in memory that outlives a process: found again if it holds what was committed, else read from the disk."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.store.cases import abandon, filled, loaded, make, reopen, step

from weightstream.cluster import LASTING_VARIABLE
from weightstream.store.store import Store

PINNED = ("param", "exp_avg", "copy")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv(LASTING_VARIABLE, str(folder))
    return folder


def killed(path: Path, *, undone: int | None = None) -> None:
    """Two commits of block 0 with pinned parts; perhaps one more version that no commit publishes; then the end."""
    store = make(path)
    store.pin(0, PINNED)
    step(store, 1)
    step(store, 2)
    if undone is not None:
        store.write(0, filled(store.layout(0), undone), 3, 3).result(timeout=30)
    abandon(store)


def read_from_disk(store: Store, index: int = 0) -> int:
    """Bytes of the disk that a load of everything takes; what it gives is what was committed."""
    before = sum(store.disk.traffic.read_bytes.values())
    found = loaded(store, index)
    wanted = filled(store.layout(index), store.progress["value"])
    for part in store.layout(index).states:
        for name, tensor in wanted.tensors(part.name).items():
            assert torch.equal(found[f"{part.name}/{name}"], tensor)
    return sum(store.disk.traffic.read_bytes.values()) - before


def part_bytes(store: Store, *names: str) -> int:
    return sum(store.layout(0).part(name).nbytes for name in names)


def test_what_was_committed_is_not_read_again(tmp_path: Path, memory: Path) -> None:
    killed(tmp_path / "store")
    assert len(list(memory.iterdir())) == len(PINNED)
    with reopen(tmp_path / "store") as store:
        store.pin(0, PINNED)
        assert read_from_disk(store) == part_bytes(store, "exp_avg_sq")
        step(store, 3)  # written through as ever
        assert read_from_disk(store) == part_bytes(store, "exp_avg_sq")


def test_a_step_that_was_undone_is_read_from_the_disk(tmp_path: Path, memory: Path) -> None:
    killed(tmp_path / "store", undone=9)
    with reopen(tmp_path / "store") as store:
        store.pin(0, PINNED)
        assert read_from_disk(store) == part_bytes(store, "param", "exp_avg", "exp_avg_sq")
        assert read_from_disk(store) == part_bytes(store, "exp_avg_sq"), "now it is pinned again"


def test_a_copy_that_was_cut_short_is_read_from_the_disk(tmp_path: Path, memory: Path) -> None:
    killed(tmp_path / "store")
    (torn,) = memory.glob("*-param")
    with torn.open("r+b") as file:
        file.seek(100)
        file.write(b"torn")
    (short,) = memory.glob("*-exp_avg")
    os.truncate(short, 10)
    with reopen(tmp_path / "store") as store:
        store.pin(0, PINNED)
        assert read_from_disk(store) == part_bytes(store, "param", "exp_avg", "exp_avg_sq")


def test_another_store_at_the_same_path_finds_nothing(tmp_path: Path, memory: Path) -> None:
    killed(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "old")
    with make(tmp_path / "store") as store:
        store.pin(0, PINNED)
        step(store, 1)
        store.unpin(0)
        store.pin(0, PINNED)
        assert read_from_disk(store) == part_bytes(store, "param", "exp_avg", "exp_avg_sq")


def test_what_is_not_pinned_any_more_takes_no_memory(tmp_path: Path, memory: Path) -> None:
    with make(tmp_path / "store") as store:
        store.pin(0, PINNED)
        store.unpin(0, ["param"])
        assert sorted(path.name.rpartition("-")[2] for path in memory.iterdir()) == ["copy", "exp_avg"]


def test_without_room_the_memory_is_the_process_own(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate = os.posix_fallocate

    def full(handle: int, offset: int, nbytes: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(memory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(handle, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with make(tmp_path / "store") as store:
        store.pin(0, PINNED)
        assert list(memory.iterdir()) == []
        assert caplog.text.count("will not outlive this process") == 1
        step(store, 1)
        assert read_from_disk(store) == part_bytes(store, "exp_avg_sq")
