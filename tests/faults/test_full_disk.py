"""The disk is full, cannot be read, or belongs to another writer: what is said, and that the run goes on from it."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.faults.device import Filling, Statements, Unreadable
from tests.faults.run import (
    BLOCKS,
    SNAPSHOT,
    STEPS,
    TAKEN,
    Expected,
    check,
    fast_directory,
    image_of,
    new_store,
    run,
    train_step,
    write,
)
from tests.store.cases import Gated, reopen, segment
from tests.test_engine import TIGHT, loss_fn, open_engine, step_and_digest, tokens, train

from weightstream.errors import StoreError, StoreInUseError
from weightstream.store import directory as store_directory
from weightstream.store import tiers
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.store.store import Store

FULL = ("No space left on device", "database or disk is full", "disk I/O error")


@pytest.fixture
def directory() -> Iterator[Path]:
    with fast_directory() as path:
        yield path


def copied(path: Path, step: int, directory: Path) -> Path:
    """A store that was trained to this step, made once and copied."""
    base = directory / f"base {step}"
    if not base.exists():
        base.mkdir()
        run(base / "store", until=step)
    if path.parent.exists():
        shutil.rmtree(path.parent)
    shutil.copytree(base, path.parent)
    return path


def finished(path: Path) -> str:
    """The digest after the run was taken up and went to its end."""
    run(path)
    with reopen(path) as store:
        assert (store.step, store.verify()) == (STEPS, [])
        return store.digest()


# Full, in the middle of a step.


@pytest.mark.parametrize("by", ["allocate", "write"])
@pytest.mark.parametrize("reopened", [False, True], ids=["discard", "reopen"])
def test_a_disk_that_fills_in_a_step(
    by: str, reopened: bool, directory: Path, digests: dict[int, str], say: Callable[[str], None]
) -> None:
    tried = 0
    for before in (0, 1, 5):  # after 5 the next step writes over old files, before that it makes new ones
        room_bytes, device = 0, None
        while device is None or device.refused:
            path, device = copied(directory / "trial" / "store", before, directory), Filling(by)
            store = reopen(path, device)
            try:
                device.room_bytes = room_bytes
                refused = _refused(
                    before, lambda kept, step: train_step(kept, step, wait=False).result(30), store, before + 1
                )
                assert device.refused or not refused  # what is refused may be what the step undoes
                if refused:
                    tried += 1
                    with pytest.raises(StoreError, match=rf"discard\(\) goes back to step {before}"):
                        write(store, 0, 1)
                    store.discard()
                    assert store.digest() == digests[before]
                    assert store.verify() == []
                    device.room_bytes = None
                    if not reopened:
                        train_step(store, before + 1).result(timeout=30)
                        assert store.digest() == digests[before + 1]
            finally:
                store.close()
            assert finished(path) == digests[STEPS]
            room_bytes += 12_288
    say(f"full disks by {by}: {tried} points")
    assert tried > 10


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_statement_of_a_commit_that_fails(
    after: bool, directory: Path, digests: dict[int, str], say: Callable[[str], None]
) -> None:
    """SQLite has no room, or reports an error although the statement was carried out; also of the COMMIT itself."""
    # A COMMIT that was carried out and failed is seen by the manifest at once, which SQLite never lets happen: this
    # process goes on from the commit before it, and shared files are the manifest's to tell.
    done = 2 if after else 4
    expected = frozenset({SNAPSHOT}) if done == TAKEN else frozenset[str]()
    failed: list[str] = []
    for number in range(100):
        path, statements = copied(directory / "trial" / "store", done, directory), Statements(after=after)
        with statements.watching():
            store = reopen(path)
        try:
            first = len(statements.seen)
            statements.fail_at = first + number
            commit = train_step(store, done + 1)
            if not _refused(done, commit.result, 30):
                break
            failed.append(statements.seen[first + number])
            store.discard()
            assert store.step == done
            assert store.digest() == digests[done]
            torn = write(store, 0, 77)  # takes a file that nothing points to, and ends before any commit
            torn.result(timeout=30)
            crashed = image_of(directory / "trial")
            store.discard()
            train_step(store, done + 1).result(timeout=30)
            assert store.digest() == digests[done + 1]
            assert store.verify() == []
        finally:
            store.close()
        assert finished(path) == digests[STEPS]
        check(crashed, Expected(done, done + 1, (expected,)), digests)
    say(f"statements of a commit that fail ({'after' if after else 'before'}): {len(failed)}")
    assert {"BEGIN IMMEDIATE", "COMMIT", "INSERT INTO records", "DELETE FROM records"} <= set(failed)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", ["snapshot", "remove_snapshot"])
def test_a_statement_of_a_snapshot_that_fails(
    change: str, after: bool, directory: Path, digests: dict[int, str]
) -> None:
    base = TAKEN if change == "remove_snapshot" else 1
    name = SNAPSHOT if change == "remove_snapshot" else "new"
    for number in range(100):
        path, statements = copied(directory / "trial" / "store", base, directory), Statements(after=after)
        with statements.watching():
            store = reopen(path)
        try:
            before = store.snapshots()
            statements.fail_at = len(statements.seen) + number
            if not _refused(base, getattr(store, change), name):
                break
            statements.fail_at = None
            if store.snapshots() == before:
                getattr(store, change)(name)
            assert (name in store.snapshots()) == (change == "snapshot")
            if name == "new":
                store.remove_snapshot(name)
            assert store.verify() == []
            assert store.digest() == digests[base]
        finally:
            store.close()
    assert number >= (1 if change == "snapshot" else 4)


def test_a_disk_that_is_full_when_a_store_is_made_or_opened(
    directory: Path, digests: dict[int, str], say: Callable[[str], None]
) -> None:
    """Any of the calls that take space fails; with room again the same call works."""
    tried = 0
    for existing in (False, True):
        for number in range(100):
            path = directory / "trial" / "store"
            if existing:
                copied(path, 1, directory)
            else:
                shutil.rmtree(path.parent, ignore_errors=True)
                path.parent.mkdir()
            with _Failing(number) as made:
                refused = _refused(None, _open_and_close, path)
            if len(made) <= number:
                break
            # directories above the store's own are synced where that is possible
            assert refused or made[number] == "fsync", f"{made[number]} failed and nobody said so"
            tried += 1
            assert finished(path) == digests[STEPS]
    say(f"full disks at creation and opening: {tried} points")
    assert tried > 8


def test_a_manifest_that_finds_no_room_when_it_is_read(directory: Path, digests: dict[int, str]) -> None:
    """The first read makes the index of SQLite's write-ahead log."""
    path, statements = directory / "store", Statements()
    run(path, until=2)
    with statements.watching():
        statements.unreadable = True
        assert _refused(None, reopen, path)
        statements.unreadable = False
        with reopen(path) as store:
            statements.unreadable = True
            assert [line for line in store.verify() if "make room" in line]
            assert _refused(None, lambda: train_step(store, 3).result(timeout=30))
            store.discard()
            statements.unreadable = False
            assert store.digest() == digests[2]
    assert finished(path) == digests[STEPS]


def test_a_disk_that_fills_while_frozen_records_are_written(directory: Path, digests: dict[int, str]) -> None:
    device = Filling()
    device.room_bytes = 4096
    with pytest.raises(StoreError, match="block 2 .*No space left.*make room"):
        new_store(directory / "store", device)
    assert finished(directory / "store") == digests[STEPS]


FILE_SYSTEMS = """
    import subprocess, sys
    from pathlib import Path
    from tests.faults.run import STEPS, run, undisturbed
    from tests.store.cases import reopen
    from weightstream.errors import StoreError

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", sys.argv[1]], check=True)

    digests = undisturbed()
    for kibibytes in range(4, 400, 20):
        mount(f"size={kibibytes}k")
        store = Path(sys.argv[1]) / "store"
        try:
            run(store)
            print(f"{kibibytes} KiB: enough")
        except StoreError as error:
            assert "make room" in str(error) or "give another path" in str(error), error
            print(f"{kibibytes} KiB: {error}")
        mount("remount,size=10m")
        run(store)
        with reopen(store) as opened:
            assert opened.verify() == []
            assert opened.digest() == digests[STEPS]
        subprocess.run(["umount", sys.argv[1]], check=True)
"""


def test_file_systems_of_many_sizes(tmp_path: Path, say: Callable[[str], None]) -> None:
    """Real ones, so that SQLite too runs out of room wherever it does; in a name space of our own, where we may mount."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = "mount -t tmpfs -o size=64k none /mnt && mount -o remount,size=1m /mnt"
    if shutil.which("unshare") is None or subprocess.run([*alone, "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("this system lets us mount no file system")
    (tmp_path / "script.py").write_text(textwrap.dedent(FILE_SYSTEMS))
    (tmp_path / "mounted").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(
        [*alone, sys.executable, tmp_path / "script.py", tmp_path / "mounted"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full = [line for line in done.stdout.splitlines() if not line.endswith("enough")]
    say(f"full file systems: {len(full)}")
    assert len(full) > 5


# Not to be read.


def test_a_read_error_names_block_and_file_and_harms_nothing(directory: Path, digests: dict[int, str]) -> None:
    device, path = Unreadable(), directory / "store"
    run(path, until=3)
    with reopen(path, device) as store:
        buffer = RecordBuffer(store.layout(0))
        view = AlignedBuffer(store.layout(0).fetched_nbytes).view
        name = segment(store, 0).name
        for pinned in (False, True):
            if pinned:
                store.pin(0, ["copy", "param"])
            device.broken = True
            for reading in (store.fetch(0, view), store.load(0, buffer), store.load(0, buffer, check=False)):
                with pytest.raises(StoreError, match=rf"block 0 'wide'.*{name}.*Input/output error"):
                    reading.result(timeout=30)
            with pytest.raises(StoreError, match="block 0 .*Input/output error"):
                store.digest()
            problems = store.verify()
            assert all(any(f"block {block.index} {block.name!r}" in line for line in problems) for block in BLOCKS)
            device.broken = False
            assert store.fetch(0, view).result(timeout=30) == 3
            assert store.verify() == []
            assert store.digest() == digests[3]
    assert finished(path) == digests[STEPS]


def test_a_file_that_cannot_be_opened_is_named(directory: Path) -> None:
    run(directory / "store", until=3)
    with reopen(directory / "store") as store:
        file = segment(store, 0)
        file.rename(directory / "elsewhere")
        with pytest.raises(StoreError, match=rf"block 0 'wide'.*{file.name}.*No such file"):
            store.load(0, RecordBuffer(store.layout(0))).result(timeout=30)


# A second writer.


def test_a_second_writer_is_refused_in_the_middle_of_a_step(directory: Path, digests: dict[int, str]) -> None:
    device, path = Gated(), directory / "store"
    with new_store(path, device) as store:
        device.gate.clear()
        commit = train_step(store, 1, wait=False)
        for attempt in (lambda: reopen(path), lambda: reopen(path)):
            with pytest.raises(StoreInUseError, match=f"being written by process {os.getpid()}"):
                attempt()
        with pytest.raises(StoreError, match="already holds a store"):
            new_store(path)
        device.gate.set()
        commit.result(timeout=30)
        assert store.digest() == digests[1]
    assert finished(path) == digests[STEPS]


def test_a_store_that_another_process_makes_meanwhile_is_left_alone(directory: Path, digests: dict[int, str]) -> None:
    """It saw no store, then another process made one and ended, then it got the lock."""
    path, lock = directory / "store", store_directory.lock

    def lock_late(locked: Path) -> int:
        with mock.patch.object(store_directory, "lock", lock):
            run(path, until=2)
        return lock(locked)

    with (
        mock.patch.object(store_directory, "lock", lock_late),
        pytest.raises(StoreError, match="already holds a store"),
    ):
        new_store(path)
    with reopen(path) as store:
        assert store.digest() == digests[2]


# The engine.


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
def test_an_engine_says_so_and_goes_on_when_there_is_room(clip_norm: float | None, tmp_path: Path) -> None:
    """Every byte that is written takes space, as where files are copied on write. The engine's disk is the usual one
    over a device of ours."""
    settings: dict[str, Any] = {"clip_norm": clip_norm}
    expected = train(tmp_path / "whole", [5], **settings)
    for number, room_bytes in enumerate((0, 80_000)):
        store, device = tmp_path / f"store {number}", Filling("write")
        with mock.patch.object(tiers, "Device", lambda device=device: device):
            engine = open_engine(store, **settings)
        engine.step(tokens(1), loss_fn)
        for moving in list(engine.store.versions._in_flight):
            moving.exception()  # what this step stages has room
        device.room_bytes = room_bytes
        refused = [_refused(None, engine.step, tokens(step), loss_fn) for step in (2, 3, 4)]
        assert refused[-1]
        assert sorted(refused) == refused  # it stays so: what followed would follow a step that is lost
        device.room_bytes = None
        with pytest.raises(StoreError):
            engine.step(tokens(engine.step_count + 1), loss_fn)
        with contextlib.suppress(StoreError):
            engine.close()
        assert step_and_digest(store)[0] < 4
        with open_engine(store, **settings) as engine:
            while engine.step_count < 5:
                engine.step(tokens(engine.step_count + 1), loss_fn)
        assert step_and_digest(store) == expected


@pytest.mark.usefixtures("one_thread")
def test_an_engine_without_room_for_a_staged_gradient(tmp_path: Path) -> None:
    """The gradient of a step that was taken is lost, so no step may follow it; the store is at the step before."""
    settings: dict[str, Any] = {"clip_norm": 0.5, **TIGHT}
    expected = train(tmp_path / "whole", [4], **settings)
    for number, room_bytes in enumerate((0, 30_000)):
        store, device = tmp_path / f"store {number}", Filling("write", only="scratch.bin")
        with mock.patch.object(tiers, "Device", lambda device=device: device):
            engine = open_engine(store, **settings)
        engine.step(tokens(1), loss_fn)
        for moving in list(engine.store.versions._in_flight):
            moving.exception()  # what this step stages has room
        device.room_bytes = room_bytes
        refused = [_refused(None, engine.step, tokens(step), loss_fn) for step in (2, 3, 4)]
        assert refused == [False, True, True]
        device.room_bytes = None
        with pytest.raises(StoreError, match="scratch.*No space left"):
            engine.close()
        assert step_and_digest(store)[0] == 1
        with open_engine(store, **settings) as engine:
            for step in (2, 3, 4):
                engine.step(tokens(step), loss_fn)
        assert step_and_digest(store) == expected


def _refused(step: int | None, action: Callable[..., Any], *arguments: Any) -> bool:
    """Whether it failed as it should on a full disk: saying which step is whole and what to do."""
    try:
        action(*arguments)
    except StoreError as error:
        text = str(error)
    else:
        return False
    assert any(cause in text for cause in FULL), text
    assert step is None or f"step {step} is whole" in text, text
    assert any(advice in text for advice in ("make room", "give another path")), text
    return True


def _open_and_close(path: Path) -> None:
    (reopen(path) if Store.exists(path) else new_store(path)).close()


class _Failing:
    """Call number `number` of those that take space fails for want of it."""

    def __init__(self, number: int) -> None:
        self.number, self.made = number, list[str]()
        names = ("open", "mkdir", "pwrite", "rename", "fsync", "posix_fallocate")
        self._patch = mock.patch.multiple(os, **{name: self._failing(name, getattr(os, name)) for name in names})

    def __enter__(self) -> list[str]:
        self._patch.__enter__()
        return self.made

    def __exit__(self, *error: Any) -> None:
        self._patch.__exit__(*error)

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            takes_space = {"open": lambda: arguments[1] & os.O_CREAT, "mkdir": lambda: not Path(arguments[0]).exists()}
            if takes_space.get(name, lambda: True)():
                self.made.append(name)
                if len(self.made) - 1 == self.number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call
