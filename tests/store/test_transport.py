"""Push and pull: what a target holds is at every instant a whole commit, whatever is killed, damaged or given wrong."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.store.cases import CONTRACT, TRAINED, filled, make, reopen

from weightstream.errors import DamagedRecordError, StoreError, StoreInUseError, StoreMismatchError
from weightstream.store import holding, pull, push, target
from weightstream.store.pull import pull as pull_store
from weightstream.store.push import push as push_store
from weightstream.store.pushed import newest
from weightstream.store.store import Store
from weightstream.store.target import Target


class DeadError(BaseException):
    """The process that pushes or pulls has died."""


class Life:
    """So many more writes are done; the one after dies half way, and all that follow do not begin."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.done = 0

    def spend(self) -> bool:
        """Whether this write dies half way."""
        self.done += 1
        if self.left is None:
            return False
        self.left -= 1
        if self.left < -1:
            raise DeadError
        return self.left < 0


class Bucket(MemoryFileSystem):
    """A file system of its own that leaves half an object when a write dies."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.life = Life()

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        dies = self.life.spend()
        super().pipe_file(path, value[: len(value) // 2] if dies else value, **kwargs)
        if dies:
            raise DeadError

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        handle = super()._open(path, mode, **kwargs)
        if mode == "wb" and "data" not in kwargs:
            write = handle.write

            def mortal(data: bytes) -> int:
                dies = self.life.spend()
                written: int = write(data[: len(data) // 2] if dies else data)
                if dies:
                    raise DeadError
                return written

            handle.write = mortal
        return handle

    def rm_file(self, path: str) -> None:
        if self.life.spend():
            raise DeadError
        super().rm_file(path)


class Folder(LocalFileSystem):
    """A local folder whose system calls die."""

    cachable = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        life = self.life = Life()

        class System:
            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def write(self, handle: int, view: memoryview) -> int:
                dies = life.spend()
                written = os.write(handle, view[: view.nbytes // 2] if dies else view)
                if dies:
                    raise DeadError
                return written

            def fsync(self, handle: int) -> None:
                if life.spend():
                    raise DeadError
                os.fsync(handle)

        monkeypatch.setattr(target, "os", System())

    def rm_file(self, path: str) -> None:
        if self.life.spend():
            raise DeadError
        super().rm_file(path)


@pytest.fixture(params=["memory", "memory in pieces", "local"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Target]:
    """Makes targets that are new and can die."""
    number = iter(range(1000))
    if request.param != "memory":
        monkeypatch.setattr(target, "PIECE_BYTES", 20_000)

    def new() -> Target:
        if request.param == "local":
            return Target(Folder(monkeypatch), str(tmp_path / f"target {next(number)}"))
        return Target(Bucket(), "/bucket/folder", f"memory {next(number)}")

    return new


def life(place: Target) -> Life:
    found: Life = place.filesystem.life
    return found


def write(store: Store, value: int, *indexes: int) -> None:
    """A commit in which these blocks have changed."""
    for index in indexes:
        store.write(index, filled(store.layout(index), value), value, value)
    store.commit(value, {"value": value}).result(timeout=30)


def digest(path: Path) -> str:
    with reopen(path, writable=False) as store:
        assert store.verify() == []
        return store.digest()


def objects(place: Target) -> dict[str, int]:
    return {
        name: size for folder in ("index", "segments", "hugging_face") for name, size in place.sizes(folder).items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Trained once; its blocks 0 and 1 have versions, block 2 is frozen."""
    with make(tmp_path / "store") as made:
        write(made, 1, *TRAINED)
        yield made


def test_there_and_back(place: Callable[[], Target], store: Store, tmp_path: Path) -> None:
    there = place()
    report = push_store(store.path, there)
    assert report["sent_records"] == 3
    assert report["sent_bytes"] == sum(objects(there).values())
    found = pull_store(there, tmp_path / "a new" / "store")
    assert (found["step"], found["received_bytes"]) == (1, report["record_bytes"])
    assert digest(tmp_path / "a new" / "store") == store.digest()
    with reopen(tmp_path / "a new" / "store") as pulled:
        assert (pulled.step, pulled.progress) == (1, {"value": 1})
        assert pulled.contract == CONTRACT
        write(pulled, 2, 0)
        write(store, 2, 0)
        assert pulled.digest() == store.digest()
    assert {path.name for path in (tmp_path / "a new" / "store").iterdir()} >= {"manifest.sqlite", "segments"}
    assert not list((tmp_path / "a new" / "store").glob("pull*"))
    assert not list(tmp_path.glob(".*.push"))


def test_by_path_and_by_url(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, there in enumerate([tmp_path / "t", "relative/t", f"file://{tmp_path}/u", "memory://weights/x"]):
        push_store(store.path, there)
        pull_store(there, tmp_path / f"pulled {number}")
        assert digest(tmp_path / f"pulled {number}") == store.digest()
    assert (tmp_path / "relative" / "t" / "index" / "00000001.json").is_file()
    MemoryFileSystem.store.clear()


def test_an_object_is_the_file_itself(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    pushed = sorted(path.read_bytes() for path in (tmp_path / "target" / "segments").iterdir())
    assert pushed == sorted(path.read_bytes() for path in (store.path / "segments").iterdir())


def test_only_what_changed_is_sent(place: Callable[[], Target], store: Store, tmp_path: Path) -> None:
    there = place()
    push_store(store.path, there)
    assert push_store(store.path, there)["sent_bytes"] == 0
    write(store, 2, 0)
    report = push_store(store.path, there)
    assert report["sent_records"] == 1
    assert report["sent_bytes"] - report["index_bytes"] == store.layout(0).image_nbytes
    assert report["removed_objects"] == 2  # the former version, the former index
    write(store, 3)
    report = push_store(store.path, there)
    assert report["sent_bytes"] == report["index_bytes"] > 0
    assert len(objects(there)) == 4
    pull_store(there, tmp_path / "pulled")
    with reopen(tmp_path / "pulled") as pulled:
        assert (pulled.step, pulled.digest()) == (3, store.digest())


def test_blocks_never_updated_take_nothing(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        report = push_store(store.path, tmp_path / "target")
        assert report["record_bytes"] == store.layout(2).image_nbytes  # the frozen one
        pull_store(tmp_path / "target", tmp_path / "pulled")
        assert digest(tmp_path / "pulled") == store.digest()


def test_a_push_that_dies_at_any_write(place: Callable[[], Target], store: Store, tmp_path: Path) -> None:
    """The target holds the commit before, or this one; the next push ends what this one began, and tidies up."""
    before = store.digest()
    for writes in range(100):
        path = tmp_path / f"store {writes}"
        shutil.copytree(store.path, path)
        there = place()
        push_store(path, there)
        with reopen(path) as changed:
            write(changed, 2, *TRAINED)
            after = changed.digest()
        life(there).left = writes
        try:
            push_store(path, there)
            died = False
        except DeadError:
            died = True
        life(there).left = None
        pull_store(there, tmp_path / f"pulled {writes}")
        assert digest(tmp_path / f"pulled {writes}") in (before, after)
        report = push_store(path, there)
        assert report["sent_records"] <= 2
        assert len(objects(there)) == 4
        pull_store(there, tmp_path / f"again {writes}")
        assert digest(tmp_path / f"again {writes}") == after
        if not died:
            break
        shutil.rmtree(path)
    else:
        raise AssertionError("a push needs fewer writes")
    assert writes > 5


def test_a_first_push_that_dies_at_any_write(place: Callable[[], Target], store: Store, tmp_path: Path) -> None:
    for writes in range(100):
        there = place()
        life(there).left = writes
        try:
            push_store(store.path, there)
            died = False
        except DeadError:
            died = True
        life(there).left = None
        pulled = tmp_path / f"pulled {writes}"
        if newest(there) is None:
            assert died
            with pytest.raises(StoreError, match="expected a store that was pushed there to its end"):
                pull_store(there, pulled)
            assert not pulled.exists()
        else:
            pull_store(there, pulled)
            assert digest(pulled) == store.digest()
        push_store(store.path, there)
        assert len(objects(there)) == 4
        pull_store(there, tmp_path / f"again {writes}")
        assert digest(tmp_path / f"again {writes}") == store.digest()
        if not died:
            break
    assert writes >= 4  # three records, one index


def test_an_interrupted_push_goes_on(store: Store) -> None:
    there = Target(Bucket(), "/bucket")
    life(there).left = 2
    with pytest.raises(DeadError):
        push_store(store.path, there)
    life(there).left = None
    report = push_store(store.path, there)
    assert report["sent_records"] == 1
    assert report["records"] == 3


class Busy(Target):
    """Something happens before each write."""

    happens: Callable[[], None]

    def write(self, name: str, pieces: Any) -> int:
        self.happens()
        return super().write(name, pieces)


def busy(happens: Callable[[], None]) -> Busy:
    there = Busy(Bucket(), "/bucket")
    there.happens = happens
    return there


def several_steps(store: Store, times: int) -> Callable[[], None]:
    """Trains on, so that every file is used again, each of the first so many times."""
    left = iter(range(times))

    def happens() -> None:
        if next(left, None) is not None:
            for value in range(store.step + 1, store.step + 6):
                write(store, value, *TRAINED)

    return happens


def test_a_store_may_be_trained_while_it_is_pushed(store: Store, tmp_path: Path) -> None:
    before = store.digest()
    there = busy(several_steps(store, 1000))
    assert push_store(store.path, there)["step"] == 1
    assert store.step > 10
    pull_store(there, tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == before
    assert not list(tmp_path.glob(".*.push"))
    assert len(list((store.path / "segments").glob("00000.*"))) <= 3


def test_without_links_the_newer_commit_is_pushed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(holding.os, "link", refused)
    there = busy(several_steps(store, 2))
    assert push_store(store.path, there)["step"] == store.step > 1
    pull_store(there, tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == store.digest()
    assert len(objects(there)) == 4
    with pytest.raises(StoreError, match="faster than they were sent, 5 times.*push while nothing trains"):
        push_store(store.path, busy(several_steps(store, 1000)))


def test_a_commit_between_reading_the_manifest_and_linking(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, happens = os.link, several_steps(store, 2)

    def late(source: Path, place: Path) -> None:
        happens()
        link(source, place)

    monkeypatch.setattr(holding.os, "link", late)
    assert push_store(store.path, tmp_path / "target")["step"] == store.step > 1
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == store.digest()


def test_a_disk_that_is_nearly_full_is_not_filled_by_a_push(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    linked: list[object] = []
    monkeypatch.setattr(holding.os, "link", lambda *names: linked.append(names))
    monkeypatch.setattr(holding.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    push_store(store.path, busy(lambda: None))
    assert linked == []


def test_one_push_of_a_store_at_a_time(store: Store, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(StoreInUseError, match="is being pushed by another process"):
            push_store(store.path, tmp_path / "target")

    push_store(store.path, busy(second))


def test_another_push_to_the_same_target_is_noticed(store: Store, tmp_path: Path) -> None:
    """From a copy of the store, on another host: the lock does not reach there."""
    shutil.copytree(store.path, tmp_path / "copy")
    with reopen(tmp_path / "copy") as copy:
        write(copy, 2, *TRAINED)
    filesystem = Bucket()
    pushed: list[dict[str, Any]] = []

    def other() -> None:
        if not pushed:
            pushed.append({})
            pushed.append(push_store(tmp_path / "copy", Target(filesystem, "/bucket")))

    there = Busy(filesystem, "/bucket")
    there.happens = other
    with pytest.raises(StoreError, match="another one is at work"):
        push_store(store.path, there)
    pull_store(there, tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == digest(tmp_path / "copy")


def test_an_interrupted_pull_goes_on(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_store(store.path, tmp_path / "target")
    receive = pull._Attempt._receive
    done: list[int] = []

    def dies(attempt: Any, record: Any, file: Path) -> None:
        if len(done) == 2:
            raise DeadError
        receive(attempt, record, file)
        done.append(record.nbytes)

    monkeypatch.setattr(pull._Attempt, "_receive", dies)
    with pytest.raises(DeadError):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    monkeypatch.undo()
    assert not Store.exists(tmp_path / "pulled")
    with pytest.raises(StoreError, match=r"expected a new or empty directory for a store, found pull\.unfinished"):
        make(tmp_path / "pulled")

    torn = tmp_path / "pulled" / "segments" / "00000.a.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    report = pull_store(tmp_path / "target", tmp_path / "pulled")
    assert report["received_records"] == 2  # one was there, one was damaged since, one was missing
    assert digest(tmp_path / "pulled") == store.digest()


@pytest.mark.parametrize("name", ["create", "rename"])
def test_a_pull_that_dies_at_its_manifest(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store.path, tmp_path / "target")

    def dies(*_: object, **__: object) -> None:
        raise DeadError

    owner: Any = Path if name == "rename" else pull.Manifest
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(DeadError):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    monkeypatch.undo()
    assert not Store.exists(tmp_path / "pulled")
    assert pull_store(tmp_path / "target", tmp_path / "pulled")["received_records"] == 0
    assert digest(tmp_path / "pulled") == store.digest()


def test_a_pull_during_a_push_ends_at_the_newer_commit(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store.path, tmp_path / "target")
    receive = pull._Attempt._receive

    def slow(attempt: Any, record: Any, file: Path) -> None:
        if record.block == 1 and store.step == 1:
            write(store, 2, *TRAINED)
            push_store(store.path, tmp_path / "target")
        receive(attempt, record, file)

    monkeypatch.setattr(pull._Attempt, "_receive", slow)
    assert pull_store(tmp_path / "target", tmp_path / "pulled")["step"] == 2
    assert digest(tmp_path / "pulled") == store.digest()


def test_one_pull_at_a_time(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_store(store.path, tmp_path / "target")
    receive = pull._Attempt._receive

    def second(attempt: Any, record: Any, file: Path) -> None:
        with pytest.raises(StoreInUseError):
            pull_store(tmp_path / "target", tmp_path / "pulled")
        receive(attempt, record, file)

    monkeypatch.setattr(pull._Attempt, "_receive", second)
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == store.digest()


# Damage.


def damaged(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [100, 5000, -1], ids=["header", "part", "padding"])
def test_a_damaged_record_is_named(position: int, store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    (path,) = (tmp_path / "target" / "segments").glob("00001.*")
    damaged(path, position)
    with pytest.raises(
        DamagedRecordError, match=r"block 1 .* at version 1.*00001\.1\.[0-9a-f]{16}\.safetensors.*no store"
    ):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    assert not Store.exists(tmp_path / "pulled")
    path.unlink()  # as the message says
    assert push_store(store.path, tmp_path / "target")["sent_records"] == 1
    assert pull_store(tmp_path / "target", tmp_path / "pulled")["received_records"] == 2
    assert digest(tmp_path / "pulled") == store.digest()


def test_a_record_that_is_missing_or_cut_short_is_named(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    (path,) = (tmp_path / "target" / "segments").glob("00000.*")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DamagedRecordError, match="block 0 .*expected [0-9]+ bytes in .*, found 5000"):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    path.unlink()
    with pytest.raises(DamagedRecordError, match=r"segments/00000\.1.*found none.*push again"):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    assert push_store(store.path, tmp_path / "target")["sent_records"] == 1
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == store.digest()


def test_a_damaged_index_is_named_and_nothing_is_removed(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    write(store, 2, 0)
    push_store(store.path, tmp_path / "target")
    before = objects(Target.of(tmp_path / "target"))
    index = tmp_path / "target" / "index" / "00000002.json"
    whole = index.read_bytes()
    for broken in (whole.replace(b'"step": 2', b'"step": 3'), whole[:-50], b"", b"[]", b"{}"):
        index.write_bytes(broken)
        for attempt in (
            lambda: pull_store(tmp_path / "target", tmp_path / "pulled"),
            lambda: push_store(store.path, tmp_path / "target"),
        ):
            with pytest.raises(DamagedRecordError, match=r"index/00000002\.json.*remove index/ and push again"):
                attempt()
        assert not (tmp_path / "pulled").exists()
    assert objects(Target.of(tmp_path / "target")).keys() == before.keys()
    shutil.rmtree(tmp_path / "target" / "index")
    assert push_store(store.path, tmp_path / "target")["sent_records"] == 0
    body = json.loads(index.with_name("00000001.json").read_bytes())
    index.write_text(json.dumps(body | {"format": 4}))
    with pytest.raises(StoreError, match="expected format 2 or 3, found 4; another version of weightstream reads it"):
        pull_store(tmp_path / "target", tmp_path / "pulled")


def test_a_damaged_store_is_not_pushed(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    before = store.digest()
    write(store, 2, *TRAINED)
    with reopen(store.path, writable=False) as reader:
        path = reader.versions.segment_path(1, reader.versions.records[1].committed)
    damaged(path, 5000)
    with pytest.raises(DamagedRecordError, match="block 1 .* at version 2, part .*: expected checksum"):
        push_store(store.path, tmp_path / "target")
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == before


# Refusals: nothing at the target or on disk changes.


def test_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    before = objects(Target.of(tmp_path / "target"))
    with make(tmp_path / "other", contract=CONTRACT | {"seed": 4}) as other:
        write(other, 9, *TRAINED)
        with pytest.raises(StoreMismatchError, match=r"contract\.seed: the target has 3, this store has 4"):
            push_store(other.path, tmp_path / "target", replace=True)
    with make(tmp_path / "twin") as twin, pytest.raises(StoreMismatchError, match="holds step 1 of another store"):
        push_store(twin.path, tmp_path / "target", replace=True)
    assert objects(Target.of(tmp_path / "target")) == before
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == store.digest()


def test_an_earlier_step_takes_the_place_of_a_later_one_only_on_demand(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "earlier")
    write(store, 2, 0)
    push_store(store.path, tmp_path / "target")
    with pytest.raises(StoreMismatchError, match="holds step 2, this store is at step 1.*--replace"):
        push_store(tmp_path / "earlier", tmp_path / "target")
    with reopen(tmp_path / "earlier") as earlier:
        write(earlier, 2, 1)
    with pytest.raises(StoreMismatchError, match="holds step 2 with other contents"):
        push_store(tmp_path / "earlier", tmp_path / "target")
    assert push_store(tmp_path / "earlier", tmp_path / "target", replace=True)["step"] == 2
    pull_store(tmp_path / "target", tmp_path / "pulled")
    assert digest(tmp_path / "pulled") == digest(tmp_path / "earlier")


def test_targets_that_hold_something_else_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    (tmp_path / "photos" / "segments").mkdir()
    with pytest.raises(StoreError, match=r"expected a new or empty place.*found one\.jpg; give another target"):
        push_store(store.path, tmp_path / "photos")
    with pytest.raises(StoreError, match=r"expected a new or empty place.*found .*manifest\.sqlite"):
        push_store(store.path, store.path)
    with pytest.raises(StoreError, match=r"expected a store that was pushed there to its end, found one\.jpg"):
        pull_store(tmp_path / "photos", tmp_path / "pulled")
    with pytest.raises(StoreError, match="found one.jpg"):
        push_store(store.path, tmp_path / "photos" / "one.jpg")
    with pytest.raises(StoreError, match="found nothing"):
        pull_store(tmp_path / "absent", tmp_path / "pulled")
    with pytest.raises(StoreError, match="an fsspec URL such as s3://.*Protocol not known: nowhere"):
        push_store(store.path, "nowhere://x")
    with pytest.raises(StoreError, match="expected a store"):
        push_store(tmp_path / "photos", tmp_path / "target")
    assert not (tmp_path / "pulled").exists()
    assert not (tmp_path / "target").exists()


def test_strange_files_among_objects_are_left_alone(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    strange = tmp_path / "target" / "segments" / "notes.txt"
    strange.write_text("mine")
    write(store, 2, *TRAINED)
    push_store(store.path, tmp_path / "target")
    assert strange.read_text() == "mine"


def test_a_pull_into_something_is_refused(store: Store, tmp_path: Path) -> None:
    push_store(store.path, tmp_path / "target")
    (tmp_path / "full" / "segments").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="already holds a store, and nothing is pulled over it"):
        pull_store(tmp_path / "target", store.path)
    with pytest.raises(StoreError, match="or one where a pull was interrupted, found segments"):
        pull_store(tmp_path / "target", tmp_path / "full")
    with pytest.raises(StoreError, match="found a file"):
        pull_store(tmp_path / "target", tmp_path / "file")
    with pytest.raises(StoreError, match="a store cannot be made there"):
        pull_store(tmp_path / "target", tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    pull_store(tmp_path / "target", tmp_path / "empty")
    assert digest(tmp_path / "empty") == store.digest()


def test_a_pull_without_room_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_store(store.path, tmp_path / "target")
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="the store needs .* more, its disk has 1 B free"):
        pull_store(tmp_path / "target", tmp_path / "pulled")
    monkeypatch.undo()
    pull_store(tmp_path / "target", tmp_path / "pulled")


def test_what_the_file_system_says_is_passed_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Target(Bucket(), "/bucket", "s3://bucket")

    def refused(*_: object, **__: object) -> None:
        raise ValueError("credentials have expired")

    monkeypatch.setattr(there.filesystem, "pipe_file", refused)
    with pytest.raises(
        StoreError, match=r"'s3://bucket': cannot write segments/.*ValueError: credentials have expired"
    ):
        push_store(store.path, there)
    assert push._ATTEMPTS == 5


# What lies beside the records.


def test_the_folder_of_an_imported_store_comes_along(place: Callable[[], Target], store: Store, tmp_path: Path) -> None:
    folder = store.path / "hugging_face"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "config.json").write_text("another of this name")
    (folder / "empty").write_bytes(b"")
    there = place()
    first = push_store(store.path, there)
    assert first["sent_bytes"] == sum(objects(there).values())
    pull_store(there, tmp_path / "pulled")
    for name in ("config.json", "sub/config.json", "empty"):
        assert (tmp_path / "pulled" / "hugging_face" / name).read_bytes() == (folder / name).read_bytes()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    report = push_store(store.path, there)
    assert report["sent_records"] == 0
    assert report["sent_bytes"] - report["index_bytes"] == len('{"model_type": "gpt2"}')
    pull_store(there, tmp_path / "again")
    assert (tmp_path / "again" / "hugging_face" / "config.json").read_text() == '{"model_type": "gpt2"}'


def test_what_a_killed_push_left_beside_the_store_is_removed_by_the_next(store: Store, tmp_path: Path) -> None:
    left = tmp_path / ".store.push"
    left.mkdir()
    os.link(next((store.path / "segments").iterdir()), left / "x")
    push_store(store.path, tmp_path / "target")
    assert not left.exists()
