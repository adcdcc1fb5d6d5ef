"""Files that records of families share: what lies in them, that space stays bounded, and that nothing live is lost."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.faults.run import fast_directory
from tests.store.cases import (
    CHUNK_BYTES,
    TRAINED,
    Jittery,
    Logged,
    Slow,
    Wrapped,
    abandon,
    assert_accounted,
    assert_holds,
    filled,
    loaded,
    make,
    put,
    reopen,
    segment,
)
from tests.store.test_families import COUNT, EXPERTS

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store import compaction, shared
from weightstream.store.segments import RecordBuffer
from weightstream.store.store import Store
from weightstream.store.tiers import Disk

NUMBERS = (0, 1, 2, 3, 2**32 + 7, COUNT - 1)


class Counting(Wrapped):
    """How many calls moved how many bytes, and how many of them ran at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {"read": [], "write": []}
        self.syncs = self.now = self.most = 0
        self._lock = threading.Lock()

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        return self._counted("read", handle, view, offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        return self._counted("write", handle, view, offset)

    def sync(self, handle: int) -> None:
        self.syncs += 1
        self._device.sync(handle)

    def _counted(self, way: str, handle: int, view: memoryview, offset: int) -> int:
        with self._lock:
            self.calls[way].append(view.nbytes)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return int(getattr(self._device, way)(handle, view, offset))
        finally:
            with self._lock:
                self.now -= 1


def experts(path: Path, device: object = None, **changes: object) -> Store:
    return make(path, families=[EXPERTS], device=device, **changes)  # type: ignore[arg-type]


def indices(store: Store, *numbers: int) -> list[int]:
    return [store.index(EXPERTS.name, number) for number in numbers]


def shared_files(store: Store) -> list[Path]:
    return sorted((store.path / "segments").glob("shared/*/*"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few records, two in a folder; a commit copies as much as it writes and no more."""
    monkeypatch.setattr(shared, "FILE_BYTES", 80_000)
    monkeypatch.setattr(shared, "FILES_PER_FOLDER", 2)
    monkeypatch.setattr(compaction, "SHARE", 1.0)
    monkeypatch.setattr(compaction, "KEPT_BYTES", 0)
    monkeypatch.setattr(compaction, "_BUFFER_BYTES", 40_000)


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        first, second, third = indices(store, 0, 5, COUNT - 1)
        store.write(third, filled(store.layout(third), 8), 1, 1).result(timeout=30)
        store.discard()  # its place is taken by another one, or named as padding
        put(store, 3, first, second)
        (file,) = {segment(store, index) for index in (first, second)}
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            assert opened.metadata() == {"format": "weightstream-1", "records": f"{first}:1,{second}:1"}
            keys = set(opened.keys())
            for index in (first, second):
                buffer = filled(store.layout(index), 3)
                for part in buffer.layout.parts:
                    for name, tensor in buffer.tensors(part.name).items():
                        assert torch.equal(opened.get_tensor(f"{part.name}/{name}"), tensor)
                        keys.remove(f"{part.name}/{name}")
        assert all(key.startswith("pad/") for key in keys)
        assert store.layout(first).part("param").offset % 4096 == 0
        assert store.versions.records[second].committed.offset % 4096 == 0


def test_a_commit_is_one_file_one_sync_and_few_writes(tmp_path: Path) -> None:
    device = Counting()
    disk = Disk(chunk_bytes=1 << 20, device=device)  # type: ignore[arg-type]
    with experts(tmp_path / "store", disk=disk) as store:
        wanted = indices(store, *range(100))
        put(store, 1, *wanted)
        device.calls["write"].clear()
        device.syncs = 0
        put(store, 2, *wanted)
        parts = 100 * store.layout(wanted[0]).parts_nbytes
        assert device.syncs == 1
        assert len({segment(store, index) for index in wanted}) == 1
        assert sum(device.calls["write"]) == parts + segment(store, wanted[0]).stat().st_size - parts
        assert len(device.calls["write"]) <= parts / (1 << 20) + 3
        device.calls["read"].clear()
        for index in wanted[:10]:
            assert store.read(index)
        assert device.calls["read"] == 10 * [sum(part.nbytes for part in store.layout(wanted[0]).states)]
        for index in wanted:
            assert_holds(store, index, 2, {})


def test_many_are_read_with_many_reads_at_a_time(tmp_path: Path) -> None:
    device = Counting()
    slow = Disk(chunk_bytes=CHUNK_BYTES, device=Slow(read_s=0.05))  # type: ignore[arg-type]
    slow.device.read = lambda *arguments: (device._counted("read", *arguments), 0)[0]  # type: ignore[method-assign]
    device._device = Slow(read_s=0.05)  # type: ignore[assignment]
    with experts(tmp_path / "store", disk=slow) as store:
        wanted = indices(store, *range(40), *range(2**31, 2**31 + 40), COUNT - 1)
        put(store, 1, *wanted[::2])
        put(store, 2, *wanted[1::4])
        asked = random.Random(1).sample(wanted, len(wanted))
        buffers = [RecordBuffer(store.layout(index)) for index in asked]
        versions = store.read_many(list(zip(asked, buffers, strict=True))).result(timeout=60)
        assert device.most >= 32
        for index, buffer, version in zip(asked, buffers, versions, strict=True):
            assert version == store.version(index) == (wanted.index(index) % 2 == 0 or wanted.index(index) % 4 == 1)
            kept = loaded(store, index)
            for part in buffer.layout.states:
                for name, tensor in buffer.tensors(part.name).items():
                    assert torch.equal(tensor, kept[f"{part.name}/{name}"])


def test_many_of_every_kind_at_once(tmp_path: Path) -> None:
    """Blocks and families, in memory and not, committed, written and never touched, pinned; single parts of them."""
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *NUMBERS)
        put(store, 1, *wanted[:4], *TRAINED)
    with reopen(tmp_path / "store") as store:
        store.pin(wanted[1], ("param", "copy"))
        store.write(wanted[2], filled(store.layout(wanted[2]), 9), 5, 5)
        asked = [wanted[5], *TRAINED, *wanted[:4], wanted[0]]
        for parts in (None, ("param",), ("exp_avg", "copy")):
            buffers = [RecordBuffer(store.layout(index)) for index in asked]
            versions = store.read_many(list(zip(asked, buffers, strict=True)), parts).result(timeout=30)
            assert versions == [store.version(index) for index in asked]
            for index, buffer in zip(asked, buffers, strict=True):
                for name in parts or [part.name for part in buffer.layout.states]:
                    whole = RecordBuffer(store.layout(index))
                    store.load(index, whole, [name]).result(timeout=30)
                    assert whole.view(name) == buffer.view(name)
        assert store.read_many([]).result(timeout=1) == []
        assert store.write_many([]).result(timeout=1) is None


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        first, second = indices(store, 0, 1)
        put(store, 1, first, second)
        good, bad = filled(store.layout(first), 2), filled(store.layout(second), 2)
        with pytest.raises(ValueError, match="version 0 after 1"):
            store.write_many([(first, good, 2, 2), (second, bad, 0, 0)])
        with pytest.raises(ValueError, match="bound to block"):
            store.write_many([(first, good, 2, 2), (second, good, 2, 2)])
        assert store.version(first) == store.version(second) == 1
        assert_holds(store, first, 1, {})


@pytest.mark.usefixtures("small")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.sets(st.integers(0, 29), min_size=1), st.integers(0, 9)), min_size=15, max_size=40))
def test_space_stays_bounded(steps: list[tuple[set[int], int]]) -> None:
    """Dead bytes are at most as many as live ones, but for one file and the bytes of the commits since the last deletion of
    a snapshot; whatever is updated, held, deleted, and reopened."""
    allowed, before, values = 0, 0, {}
    with fast_directory() as path:
        store = experts(path / "store")
        image = store.layout(store.index(EXPERTS.name, 0)).parts_nbytes
        for number, (chosen, what) in enumerate(steps, 1):
            put(store, number, *indices(store, *chosen))
            values |= dict.fromkeys(chosen, number)
            assert_accounted(store)
            rows = [row for row in store.manifest.shared() if row.live_bytes]
            live = sum(row.live_bytes for row in rows)
            dead = sum(row.nbytes - row.said_nbytes - row.live_bytes for row in rows)
            written = len(chosen) * image
            allowed = max(80_000 + written, allowed - written)
            assert dead <= live + allowed
            most = max(written, before)
            before = written
            spare = sum(file.stat().st_size for file in shared_files(store)) - sum(row.nbytes for row in rows)
            assert spare <= 2 * most + 80_000
            if what == 0 and store.snapshots():
                allowed += store.remove_snapshot("held")
            elif what == 0:
                store.snapshot("held")
            elif what == 1:
                store.close()
                store = reopen(path / "store")
        assert store.verify() == []
        for chosen_number, value in values.items():
            assert_holds(store, *indices(store, chosen_number), value, {})
        store.close()


@pytest.mark.usefixtures("small")
def test_what_a_snapshot_alone_holds_moves_though_its_record_is_written_at_every_commit(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        hot = indices(store, *range(5))
        others = indices(store, *range(10, 25))
        for number, index in enumerate(hot):
            put(store, 1, index, *others[3 * number : 3 * number + 3])
        store.snapshot("first")
        put(store, 2, *others)
        store.snapshot("second")
        put(store, 3, *hot)
        store.remove_snapshot("first")  # a file of each is left with one version, which the second one holds
        assert store.manifest.mostly_dead_files(100)
        for value in range(4, 14):
            put(store, value, *hot)
        assert store.manifest.mostly_dead_files(100) == []
        assert_accounted(store)
        assert store.verify() == []


@pytest.mark.usefixtures("small")
def test_room_in_a_header_that_is_not_used_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "FILE_BYTES", 10 << 20)
    with experts(tmp_path / "store") as store:
        for number in range(0, 100, 20):  # each small commit follows a large one, and makes as much room as that used
            put(store, number + 1, *indices(store, *range(100, 160)))
            put(store, number + 1, *indices(store, number))
        put(store, 200, *indices(store, *range(100, 160)))
        rows = [row for row in store.manifest.shared() if row.live_bytes]
        assert sum(row.nbytes - row.said_nbytes for row in rows) <= 2 * sum(row.live_bytes for row in rows)
        assert sum(row.header_nbytes for row in rows) <= 4 * sum(row.said_nbytes for row in rows)


@pytest.mark.usefixtures("small")
def test_steps_between_commits_take_the_same_places(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *range(4))
        for value in range(1, 40):
            for index in wanted:
                store.write(index, filled(store.layout(index), value), value, value).result(timeout=30)
            if value % 5 == 0:
                store.discard()
            else:
                store.accept()
        sizes = sum(file.stat().st_size for file in shared_files(store))
        assert sizes <= 3 * len(wanted) * store.layout(wanted[0]).parts_nbytes + 4 * 4096
        store.commit(39, {}).result(timeout=30)
        for index in wanted:
            assert_holds(store, index, 39, {})
        assert store.verify() == []
        assert_accounted(store)


@pytest.mark.usefixtures("small")
def test_reads_that_overlap_moves_and_reuse_see_the_version_of_their_time(tmp_path: Path) -> None:
    """Records move between files and files are filled anew while slow reads of them are under way."""
    draw = random.Random(3)
    with experts(tmp_path / "store", Jittery(5, 0.003)) as store:
        wanted = indices(store, *range(12))
        newest = dict.fromkeys(wanted, 0)
        reads = []
        for value in range(1, 120):
            chosen = draw.sample(wanted, draw.randint(1, 5))
            store.write_many([(i, filled(store.layout(i), value), value, value) for i in chosen])
            newest |= dict.fromkeys(chosen, value)
            if draw.random() < 0.3:
                store.commit(value, {})
            for index in draw.sample([i for i in wanted if newest[i]], 1):
                buffer = RecordBuffer(store.layout(index))
                future = store.load(index, buffer) if draw.random() < 0.5 else store.read_many([(index, buffer)])
                reads.append((index, newest[index], buffer, future))
        store.commit(200, {}).result(timeout=60)
        for _, wanted_value, buffer, future in reads:
            found = future.result(timeout=60)  # type: ignore[attr-defined]
            assert found in (wanted_value, [wanted_value])
            assert buffer.view("param") == filled(buffer.layout, wanted_value).view("param")
        for index, value in newest.items():
            if value:
                assert_holds(store, index, value, {})
        assert store.verify() == []
        assert_accounted(store)


@pytest.mark.usefixtures("small")
def test_a_crash_leaves_no_file_behind(tmp_path: Path) -> None:
    for attempt in range(3):
        store = experts(tmp_path / "store") if not attempt else reopen(tmp_path / "store")
        wanted = indices(store, *range(10))
        put(store, 1 + attempt, *wanted[attempt:])
        for index in wanted:
            store.write(index, filled(store.layout(index), 77), 50, 50).result(timeout=30)
        assert len(store.versions.shared.filling.files) > 1
        abandon(store)
    with reopen(tmp_path / "store") as store:
        assert_accounted(store)
        for number, index in enumerate(wanted):
            assert_holds(store, index, min(number + 1, 3), {})


@pytest.mark.usefixtures("small")
def test_a_branch_shares_files_and_both_go_on(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *range(8))
        put(store, 1, *wanted)
        store.snapshot("first")
        digest = store.digest()
        store.branch("first", tmp_path / "branch")
        files = {segment(store, index) for index in wanted}
        assert all(file.stat().st_nlink == 2 for file in files)
        store.remove_snapshot("first")
        for value in range(2, 12):
            put(store, value, *wanted[: 1 + value % 8])
    with reopen(tmp_path / "branch") as branch:
        assert branch.digest() == digest
        assert_accounted(branch)
        for value in range(20, 30):
            put(branch, value, *wanted[value % 8 :])
        assert branch.verify() == []
        assert_accounted(branch)
    with reopen(tmp_path / "store") as store:
        assert store.verify() == []
        assert_accounted(store)
        assert_holds(store, wanted[0], 11, {})


def test_a_reader_that_was_overtaken_says_so(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        first, second, third = indices(store, 0, 1, 2)
        put(store, 1, first, second)
        with reopen(tmp_path / "store", writable=False) as reader:
            assert_holds(reader, first, 1, {})
            before = reader.digest()
            put(store, 2, first, second, third)
            put(store, 3, first)
            for look in (lambda: loaded(reader, first), lambda: loaded(reader, second), reader.digest):
                with pytest.raises(StoreError, match="open (the store|it) anew"):
                    look()
            with pytest.raises(StoreError, match="written since"):
                loaded(reader, third)
        with reopen(tmp_path / "store", writable=False) as reader:
            assert reader.digest() == store.digest() != before


@pytest.mark.parametrize("held", [False, True], ids=["living", "of a snapshot alone"])
def test_damage_that_compaction_meets(held: bool, tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *range(6))
        put(store, 1, *wanted)
        if held:
            store.snapshot("first")
            put(store, 2, wanted[0])
            store.remove_snapshot("first")
            store.snapshot("second")
        file, offset = segment(store, wanted[5]), store.versions.records[wanted[5]].committed.offset
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(b"damage")
        if held:
            put(store, 3, *wanted)  # all but what the snapshot holds is dead
            put(store, 4, *wanted[:3])
            assert_accounted(store)
            assert [line for line in store.verify() if "only snapshots hold it (second)" in line]
        else:
            put(store, 2, *wanted[:4])
            with pytest.raises(DamagedRecordError, match="block 8 .*'copy' in shared"):
                put(store, 3, wanted[4])
            store.discard()
            assert store.step == 2


def test_a_damaged_header_is_found_and_its_records_written_anew(tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *range(3))
        put(store, 1, *wanted)
        digest, file = store.digest(), segment(store, wanted[0])
        with file.open("r+b") as opened:
            opened.seek(300)
            opened.write(b"\0")
        (line,) = store.verify()
        assert file.name in line
        assert "header" in line
        assert "verify --repair makes it anew" in line
        store.repair()
        assert (store.verify(), store.digest()) == ([], digest)
        assert file not in {segment(store, index) for index in wanted}


@pytest.mark.parametrize("cut_bytes", [4096, 60_000, None])
def test_a_shared_file_that_is_cut_or_missing(cut_bytes: int | None, tmp_path: Path) -> None:
    with experts(tmp_path / "store") as store:
        wanted = indices(store, *range(4))
        put(store, 1, *wanted)
        store.snapshot("before")
        put(store, 2, *wanted)
        file = segment(store, wanted[0])
    if cut_bytes is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-cut_bytes])
    with Store.open(tmp_path / "store", accept_damage=True) as store:
        lines = store.verify()
        assert [line for line in lines if "layer.expert.3" in line and "snapshot 'before' is whole" in line]
        with pytest.raises((StoreError, DamagedRecordError), match="block 6 "):
            loaded(store, wanted[3])
        store.repair()
        assert (store.step, store.verify()) == (1, [])
        for index in wanted:
            assert_holds(store, index, 1, {})


def test_opening_looks_at_the_last_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "FILES_PER_FOLDER", 2)
    listed: list[str] = []
    iterdir = Path.iterdir

    def watched(path: Path) -> Iterator[Path]:
        listed.append(path.name)
        return iterdir(path)

    with experts(tmp_path / "store") as store:
        for number in range(20):
            put(store, 1, *indices(store, number))
    monkeypatch.setattr(Path, "iterdir", watched)
    with reopen(tmp_path / "store") as store:
        assert {name for name in listed if name.isdigit()} <= {"000009", "000010"}
        assert store.verify() == []


def test_the_folder_of_names_is_synced_before_the_commit(tmp_path: Path) -> None:
    device = Logged()
    with experts(tmp_path / "store", device) as store:
        put(store, 1, *indices(store, 0))
        publish = store.manifest.publish

        def logged(*arguments: object, **options: object) -> object:
            device.events.append("publish")
            return publish(*arguments, **options)  # type: ignore[arg-type]

        store.manifest.publish = logged  # type: ignore[assignment, method-assign]
        device.events.clear()
        put(store, 2, *indices(store, 0))
        file = segment(store, *indices(store, 0))
        assert device.events[:3] == [file.name, file.parent.name, "publish"]


class LateFile(Logged):
    """Files are made only once the gate is open, and the first one is synced only once `first` is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.first = threading.Event(), threading.Event()
        self.first.set()

    def open(self, path: Path, *, write: bool) -> int:
        if path.name.startswith("000000002"):
            assert self.gate.wait(timeout=30)
        return super().open(path, write=write)

    def sync(self, handle: int) -> None:
        assert self.first.wait(timeout=30)
        super().sync(handle)


def test_a_file_that_is_made_after_the_folder_was_synced_for_an_earlier_commit(tmp_path: Path) -> None:
    device = LateFile()
    disk = Disk(device=device, write_depth=64)  # type: ignore[arg-type]  # those that wait do not keep others waiting
    with experts(tmp_path / "store", disk=disk) as store:
        one, other = indices(store, 0, 1)
        device.first.clear()
        store.write(one, filled(store.layout(one), 1), 1, 1)
        earlier = store.commit(1, {"value": 1})
        written = store.write(other, filled(store.layout(other), 2), 1, 1)  # its file has a name, and is not made
        device.first.set()
        earlier.result(timeout=30)
        device.gate.set()
        written.result(timeout=30)
        store.commit(2, {"value": 2}).result(timeout=30)
        file = segment(store, other)
        assert file.name.startswith("000000002")
        assert device.events[-2:] == [file.name, file.parent.name]


def test_a_new_folder_is_on_the_medium_before_the_commit(tmp_path: Path, small: None) -> None:
    """Also when the process was killed, or the sync failed, between making it and the commit."""
    device = Logged()
    with experts(tmp_path / "store", device) as store:
        for number in range(4):
            device.events.clear()
            put(store, number, *indices(store, 0))
            folder = segment(store, *indices(store, 0)).parent
            assert device.events.index(folder.name) < len(device.events)
            if number in (0, 1):  # the first folder of all, and the second one
                assert "shared" in device.events
    device = Logged()
    with reopen(tmp_path / "store", device) as store:
        put(store, 9, *indices(store, 0))
        assert {"segments", "shared"} <= set(device.events), "a killed process may have left it"
