"""Refusals, damage, other readers, scratch, and what happens while a device is slow, full or killed."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.faults.run import fast_directory
from tests.forks import CONTEXT
from tests.store.cases import (
    BLOCKS,
    CONTRACT,
    RECIPES,
    TRAINED,
    Full,
    Gated,
    Logged,
    Slow,
    assert_holds,
    files,
    filled,
    loaded,
    make,
    put,
    reopen,
    segment,
    step,
    trains_on,
)
from tests.store.test_families import FEW

from weightstream.blocks import Block, Parameter
from weightstream.errors import DamagedRecordError, StoreError, StoreInUseError, StoreMismatchError
from weightstream.store.families import Family
from weightstream.store.figures import describe
from weightstream.store.optimizers import Adafactor, AdamW
from weightstream.store.segments import AlignedBuffer, RecordBuffer
from weightstream.store.store import Store

# Files that anyone can read.


def test_segments_are_plain_safetensors(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1, 1)
        path = segment(store, 1)
        layout = store.layout(1)
        record = filled(layout, 1)
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"block": BLOCKS[1].name, "format": "weightstream-1", "version": "1"}
            keys = [key for key in opened.keys() if not key.startswith("pad/")]  # noqa: SIM118
            assert set(keys) == {f"{part.name}/{spec.name}" for part in layout.parts for spec in part.tensors}
            for key in keys:
                part, name = key.split("/", 1)
                assert torch.equal(opened.get_tensor(key), record.tensors(part)[name])
        assert path.stat().st_size == layout.image_nbytes


def test_states_of_their_own_shape_are_stored(tmp_path: Path) -> None:
    with make(tmp_path / "store", optimizer=Adafactor()) as store:
        shapes = {key: tuple(tensor.shape) for key, tensor in loaded(store, 1).items()}
        assert shapes["row_var/odd.weight"] == (33, 1)
        assert shapes["col_var/odd.weight"] == (1, 80)
        assert shapes["variance/odd.bias"] == (33,)
        step(store, 1, 1)
        assert_holds(store, 1, 1, {})


# Damage.


@pytest.mark.parametrize("part", ["header", "copy", "param", "exp_avg_sq"])
def test_one_flipped_bit_is_found(tmp_path: Path, part: str) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1, 1)
        layout, path = store.layout(1), segment(store, 1)
    offset = 100 if part == "header" else layout.part(part).offset + 5
    with path.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 16]))
    with reopen(tmp_path / "store") as store:
        (problem,) = store.verify()
        assert "block 1" in problem
        if part == "header":
            return
        buffer = RecordBuffer(layout)
        with pytest.raises(DamagedRecordError, match=rf"block 1 .*version 1.*part '{part}'.*expected.*found") as caught:
            store.load(1, buffer, [part]).result(timeout=30)
        assert path.name in str(caught.value)
        if part == "copy":
            with pytest.raises(DamagedRecordError):
                store.fetch(1, AlignedBuffer(layout.streamed.nbytes).view).result(timeout=30)


@pytest.mark.parametrize("part", ["param", "exp_avg", "exp_avg_sq"])
def test_what_was_loaded_without_a_check_is_found_by_the_check(tmp_path: Path, part: str) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1, 1)
        layout, path = store.layout(1), segment(store, 1)
        buffer = RecordBuffer(layout)
        store.load(1, buffer, check=False).result(timeout=30)
        store.check(1, buffer)
        with path.open("r+b") as handle:
            handle.seek(layout.part(part).offset + layout.part(part).nbytes - 1)
            handle.write(b"\x55")
        store.load(1, buffer, check=False).result(timeout=30)
        with pytest.raises(DamagedRecordError, match=rf"block 1 .*version 1.*part '{part}'.*expected.*found"):
            store.check(1, buffer)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_checksums_do_not_depend_on_who_makes_them(tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    with make(tmp_path / "store") as store:
        step(store, 1, 1)
        layout, buffer = store.layout(1), RecordBuffer(store.layout(1))
        store.load(1, buffer, [part.name for part in layout.parts]).result(timeout=30)
        torch.set_num_threads(threads)
        try:
            assert store.checksums(1, buffer) == store.versions.records[1].newest.checksums
        finally:
            torch.set_num_threads(before)


def test_a_damaged_part_that_should_be_pinned_is_not_kept(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        path = segment(store, 0)
        whole = path.read_bytes()
        store.pin(0, ["copy", "param"])
        path.write_bytes(bytes(len(whole)))
        view = AlignedBuffer(store.layout(0).streamed.nbytes).view
        with pytest.raises(DamagedRecordError):
            store.fetch(0, view).result(timeout=30)
        path.write_bytes(whole)
        assert_holds(store, 0, 1, {})


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE records SET version = 2",
        "UPDATE records SET optimizer_steps = 7 WHERE block = 0",
        "UPDATE meta SET value = '\"fp32\"' WHERE key = 'precision'",
        "UPDATE blocks SET name = 'x' WHERE block = 1",
        "UPDATE commits SET step = 99",
    ],
)
def test_a_changed_row_of_the_manifest_is_found(tmp_path: Path, change: str) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
    with sqlite3.connect(tmp_path / "store" / "manifest.sqlite") as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(DamagedRecordError, match="checksum"):
        reopen(tmp_path / "store")


def test_missing_and_truncated_segments_are_named(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        path = segment(store, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(DamagedRecordError, match=rf"{path.name} should have {len(whole)} bytes"):
        reopen(tmp_path / "store")
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path.name}, which is missing"):
        reopen(tmp_path / "store")


def test_files_that_nothing_points_to_are_recycled_or_removed(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        step(store, 2)
    segments = tmp_path / "store" / "segments"
    dead = ({path.name for path in segments.glob("00000.*")} - {segment(store, 0).name}).pop()
    (segments / "00000.z.safetensors").write_bytes(b"cut short")
    (segments / "99999.a.safetensors").write_bytes(b"of no block")
    with reopen(tmp_path / "store") as store:
        assert {path.name for path in segments.glob("[09]*")} == {"00000.a.safetensors", "00000.b.safetensors"} | {
            "00002.a.safetensors"
        }
        step(store, 3)
        assert segment(store, 0).name == dead


def test_a_file_with_another_hard_link_is_not_recycled(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        first = segment(store, 0)
        os.link(first, tmp_path / "branch")
        before = (tmp_path / "branch").read_bytes()
        for value in range(2, 6):
            step(store, value)
        assert (tmp_path / "branch").read_bytes() == before
        assert_holds(store, 0, 5, {})


# Refusals.


def test_a_store_in_use_is_refused_and_may_be_read(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        with pytest.raises(StoreInUseError, match=f"being written by process {os.getpid()}"):
            reopen(tmp_path / "store")
        with reopen(tmp_path / "store", writable=False) as reader:
            assert reader.digest() == store.digest()
            assert_holds(reader, 0, 1, {})
            with pytest.raises(StoreError, match="opened for reading"):
                reader.write(0, filled(reader.layout(0), 2), 2, 2)
            with pytest.raises(StoreError, match="opened for reading"):
                reader.commit(2, {})
            for value in (2, 3, 4):
                step(store, value)
            with pytest.raises(DamagedRecordError, match="open the store anew"):
                loaded(reader, 0)
        assert_holds(store, 0, 4, {})
    with pytest.raises(StoreError, match="closed"):
        store.commit(9, {})
    reopen(tmp_path / "store").close()


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "thesis"
    directory.mkdir()
    (directory / "chapter.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "manifest.sqlite").write_bytes(os.urandom(8192))
    before = files(tmp_path)
    with pytest.raises(StoreError, match="chapter.txt"):
        Store.open(directory)
    with pytest.raises(StoreError, match="chapter.txt"):
        make(directory)
    with pytest.raises(StoreError, match="found a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(StoreError, match="found a file"):
        make(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be made there"):
        make(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="an empty directory"):
        Store.open(tmp_path / "empty")
    with pytest.raises(StoreError, match="found nothing"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="expected an SQLite manifest"):
        Store.open(tmp_path / "fake", writable=False)
    with pytest.raises(StoreError, match="already holds a store"):
        make(tmp_path / "fake")
    assert files(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()
    with make(tmp_path / "empty") as store:
        step(store, 1)


def test_a_newer_format_and_another_database_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "store").close()
    for pragma, message in (
        ("user_version=6", rf"format 6; weightstream {metadata.version('weightstream')} reads it"),
        ("user_version=3", "format 3; weightstream .* reads it"),
        ("application_id=1", "another program"),
    ):
        with sqlite3.connect(tmp_path / "store" / "manifest.sqlite") as connection:
            connection.execute(f"PRAGMA {pragma}")
        connection.close()
        with pytest.raises(StoreError, match=message):
            Store.open(tmp_path / "store")


def test_a_creation_that_was_interrupted_may_be_repeated(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
    (tmp_path / "store" / "manifest.sqlite").rename(tmp_path / "store" / "manifest.partial")
    assert not Store.exists(tmp_path / "store")
    with pytest.raises(StoreError):
        Store.open(tmp_path / "store")
    with make(tmp_path / "store") as store:
        assert Store.exists(tmp_path / "store")
        assert (store.step, store.version(0)) == (0, 0)
        assert store.verify() == []


def test_a_forbidden_change_shows_both_values(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        store.check_contract(CONTRACT | {"shape": (1, 2)})  # as JSON the same
        with pytest.raises(StoreMismatchError) as caught:
            store.check_contract({"seed": 4, "shape": [1, 2], "new": True})
        text = str(caught.value)
        assert "seed: the store has 3, this run has 4" in text
        assert "reduction_groups: the store has 8, this run has nothing" in text
        assert "new: the store has nothing, this run has True" in text
        assert "shape" not in text


def test_a_parameter_without_a_recipe_is_named_when_it_is_needed(tmp_path: Path) -> None:
    with make(tmp_path / "store", recipes={}) as store:
        with pytest.raises(StoreError, match=r"block 'odd .*'odd.weight' was never written and has no recipe"):
            loaded(store, 1)
        for index in range(3):  # an import writes version 0
            store.write(index, filled(store.layout(index), index), 0, 0)
        store.commit(0, {}).result(timeout=30)
        for index in range(3):
            assert_holds(store, index, index, {})


# Slow, full, killed.


def test_a_write_does_not_hold_up_its_caller(tmp_path: Path) -> None:
    with make(tmp_path / "store", device=Slow(write_s=0.05)) as store:
        record = filled(store.layout(1), 1)
        started = time.perf_counter()
        written = store.write(1, record, 1, 1)
        committed = store.commit(1, {})
        assert time.perf_counter() - started < 0.05
        assert not written.done()
        committed.result(timeout=30)


def test_reads_are_served_in_order_of_issue(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        for index in TRAINED:
            step(store, 1 + index, index)
    with reopen(tmp_path / "store", Slow(read_s=0.002)) as store:
        order: list[int] = []
        buffers = [RecordBuffer(store.layout(index)) for index in (1, 0, 1, 0)]
        futures = [store.load(index, buffer) for index, buffer in zip((1, 0, 1, 0), buffers, strict=True)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        for future in futures:
            future.result(timeout=30)
        assert order == [0, 1, 2, 3]


def test_a_full_disk_leaves_the_last_commit_and_the_run_goes_on(tmp_path: Path) -> None:
    device = Full()
    with make(tmp_path / "store", device=device) as store:
        step(store, 1)
        digest = store.digest()
        store.pin(0, ["copy"])
        device.full = True
        written = store.write(0, filled(store.layout(0), 2), 2, 2)
        committed = store.commit(2, {})
        with pytest.raises(StoreError, match=r"block 0 .* could not be written: No space left.*step 1 is whole"):
            written.result(timeout=30)
        with pytest.raises(StoreError, match="No space left"):
            committed.result(timeout=30)
        with pytest.raises(StoreError, match=r"a commit failed .*discard\(\) goes back to step 1"):
            store.write(1, filled(store.layout(1), 2), 2, 2)
        device.full = False
        store.discard()
        assert_holds(store, 0, 1, {})
        assert (store.digest(), store.step) == (digest, 1)
        step(store, 3)
        assert_holds(store, 0, 3, {})
        assert store.verify() == []


def test_a_file_is_not_recycled_under_a_reader(tmp_path: Path) -> None:
    """A load that was issued long ago still gets its version, though two commits have gone by."""
    device = Gated()
    with make(tmp_path / "store", device=Slow(read_s=0.05)) as store:
        step(store, 1)
        buffer = RecordBuffer(store.layout(0))
        old = store.load(0, buffer)
        for value in (2, 3, 4, 5, 6):
            store.write(0, filled(store.layout(0), value), value, value)
            store.commit(value, {})
        assert old.result(timeout=30) == 1
        assert torch.equal(
            buffer.tensors("param")["embed.weight"], filled(store.layout(0), 1).tensors("param")["embed.weight"]
        )
        assert_holds(store, 0, 6, {})
    assert device.gate.is_set()


def test_everything_a_commit_points_to_is_synced_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power loss would take: bytes of a file, or the name of a new one."""
    device = Logged()
    with make(tmp_path / "store", device=device) as store:
        publish = store.manifest.publish

        def logged_publish(*arguments: Any, **settings: Any) -> Any:
            device.events.append("publish")
            return publish(*arguments, **settings)

        monkeypatch.setattr(store.manifest, "publish", logged_publish)
        for value in range(1, 6):
            device.events.clear()
            new = len(list((store.path / "segments").iterdir()))
            commits = []
            for index in TRAINED:
                store.write(index, filled(store.layout(index), value), value, value)
            commits.append(store.commit(value, {}))
            commits[-1].result(timeout=30)
            new = len(list((store.path / "segments").iterdir())) - new
            assert device.events.count("publish") == 1
            before = device.events[: device.events.index("publish")]
            assert device.events[-1] == "publish"
            for index in TRAINED:
                assert before.count(segment(store, index).name) == 1
            assert ("segments" in before) == (new > 0 or value == 1)
            if new:
                assert max(map(before.index, before)) == before.index("segments")


def test_sigkill_at_any_moment_leaves_a_whole_commit(tmp_path: Path) -> None:
    make(tmp_path / "store").close()
    for delay_s in (0.003, 0.011, 0.024):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=trains_on, args=(tmp_path / "store", theirs))
        process.start()
        theirs.close()
        last = ours.recv()
        time.sleep(delay_s)
        process.kill()
        process.join()
        with ours, contextlib.suppress(EOFError, OSError):  # the latter in the middle of a message
            while True:
                last = ours.recv()
        with reopen(tmp_path / "store") as store:
            assert store.step >= last
            assert store.progress == {"step": store.step}
            assert store.verify() == []
            for index in TRAINED:
                assert store.version(index) == store.step
                assert_holds(store, index, store.step + index, {})


# Scratch.


def test_scratch_keeps_bytes_of_any_length_and_place(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        generator = torch.Generator().manual_seed(0)
        sources = {n: torch.randint(0, 255, (n,), dtype=torch.uint8, generator=generator) for n in (0, 1, 4096, 20_001)}
        for nbytes, source in sources.items():
            store.scratch_write(("activation", nbytes), source[0:].numpy().data)
        for nbytes, source in sources.items():
            target = torch.zeros(nbytes + 3, dtype=torch.uint8)
            store.scratch_read(("activation", nbytes), target[3:].numpy().data).result(timeout=30)
            assert torch.equal(target[3:], source)
        with pytest.raises(ValueError, match="scratch holds 1 bytes"):
            store.scratch_read(("activation", 1), memoryview(bytearray(2)))
        store.scratch_free(("activation", 1))
        store.scratch_free("what was never there")
        with pytest.raises(KeyError):
            store.scratch_read(("activation", 1), memoryview(bytearray(1)))
        assert store.counters["disk", "scratch"]["written"] == sum(sources)
    assert list((tmp_path / "store" / "scratch").iterdir()) == []


def test_scratch_does_not_grow_from_step_to_step(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        generator = torch.Generator().manual_seed(1)
        for _ in range(40):
            sizes = torch.randint(1, 9 * 4096, (6,), generator=generator).tolist()
            for key, nbytes in enumerate(sizes):
                store.scratch_write(key, memoryview(bytearray(nbytes)))
            for key in range(6):
                store.scratch_read(key, memoryview(bytearray(sizes[key]))).result(timeout=30)
                store.scratch_free(key)
        assert store._scratch.allocated_bytes <= 2 * 6 * 9 * 4096


def test_info_is_json(tmp_path: Path) -> None:
    with make(tmp_path / "a store with spaces") as store:
        step(store, 1)
        found = json.loads(json.dumps(store.info()))
        assert found["step"] == 1
        assert found["parameters"] == sum(block.numel for block in BLOCKS)
        assert found["segment_bytes"] == store.layout(0).image_nbytes + store.layout(2).image_nbytes


def test_info_says_where_space_goes_and_how_long_the_disk_lasts(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        images = [store.layout(block.index).image_nbytes for block in BLOCKS]
        store.pin(0, ("copy",))
        step(store, 1)
        store.snapshot("one")
        step(store, 2)
        step(store, 3)
    written = images[2] + 3 * images[0]
    with reopen(tmp_path / "store", writable=False) as store:
        found = store.info(tbw_bytes=10 * written)
        assert found["last_commit_bytes"] == images[0] + images[2]
        assert found["snapshots_bytes"] == found["snapshots"]["one"]["own_bytes"] == images[0]
        assert found["reusable_bytes"] == images[0]
        on_disk = sum(path.stat().st_size for path in (store.path / "segments").glob("*.safetensors"))
        assert found["disk_bytes"] == on_disk == 3 * images[0] + images[2]
        assert found["life_written_bytes"] == written
        tiers, seconds = found["session"]["tiers"], found["session"]["seconds"]
        assert tiers["disk"]["written_bytes"] == written
        assert tiers["ram"]["written_bytes"] == 3 * store.layout(0).part("copy").nbytes
        assert found["session"]["pinned_bytes"] == store.layout(0).part("copy").nbytes
        assert found["disk_life_left_days"] == pytest.approx(9 * seconds / 86_400, rel=1e-6)
        text = describe(found)
        for said in ("step 3, bf16", "snapshot one", "alone", "tier ram", "days left at this rate", "0 to 3, by block"):
            assert said in text
    with reopen(tmp_path / "store") as store:
        step(store, 4)  # the life goes on, the session is another
        found = store.info(tbw_bytes=written / 2)
        assert found["life_written_bytes"] == written + images[0]
        assert found["session"]["tiers"]["disk"]["written_bytes"] == images[0]
        assert found["disk_life_left_days"] == 0
    with make(tmp_path / "new", families=[FEW]) as store:
        assert "family few.{}" in describe(store.info(tbw_bytes=1e12))


def test_a_store_may_be_moved(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        step(store, 1)
        digest = store.digest()
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    with reopen(tmp_path / "elsewhere") as store:
        assert store.digest() == digest


def test_a_model_without_states_or_with_many_tensors(tmp_path: Path) -> None:
    many = Block(0, "many", tuple(Parameter(f"p{n}", (3, n % 7)) for n in range(300)), ("many",))
    with make(tmp_path / "store", blocks=[many], recipes={}, optimizer=AdamW()) as store:
        step(store, 1)
        assert_holds(store, 0, 1, {})
        with safe_open(segment(store, 0), "pt") as opened:
            assert "param/p299" in opened.keys()  # noqa: SIM118
    assert RECIPES


READ_ONLY = """
    import subprocess, sys
    from pathlib import Path
    from tests.store.cases import TRAINED, files, make, put, reopen
    from tests.store.test_families import EXPERTS
    from weightstream.errors import StoreError
    from weightstream.store.store import Store

    disk = Path(sys.argv[1])
    def mount(options):
        subprocess.run(["mount", *options, disk], check=True)

    mount(["-t", "tmpfs", "-o", "size=64m", "none"])
    with make(disk / "store", families=[EXPERTS]) as store:
        put(store, 1, *TRAINED, store.index(EXPERTS.name, 5))
        store.snapshot("a")
        digest = store.digest()
    mount(["-o", "remount,ro"])
    before = files(disk)
    with reopen(disk / "store", writable=False) as store:
        assert (store.digest(), store.verify(), store.snapshots()) == (digest, [], {"a": 1})
        assert store.info()["step"] == 1
        for change in (lambda: store.snapshot("b"), lambda: store.branch("a", disk / "branch")):
            try:
                change()
            except StoreError as error:
                print(error)
    for change in (lambda: Store.open(disk / "store"), lambda: make(disk / "other")):
        try:
            change()
        except StoreError as error:
            print(error)
    assert files(disk) == before
    mount(["-t", "tmpfs", "none"])  # another one: what a process that was killed leaves
    (disk / "store").mkdir()
    for name in ("manifest.sqlite", "manifest.sqlite-wal"):
        (disk / "store" / name).write_bytes(b"SQLite" * 100)
    mount(["-o", "remount,ro"])
    try:
        reopen(disk / "store", writable=False)
    except StoreError as error:
        print(error)
"""


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    """A real one, in a name space of our own: whoever is root may write wherever permissions forbid it."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = "mount -t tmpfs -o size=64k none /mnt && mount -o remount,ro /mnt"
    if shutil.which("unshare") is None or subprocess.run([*alone, "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("this system lets us mount no file system")
    (tmp_path / "script.py").write_text(textwrap.dedent(READ_ONLY))
    (tmp_path / "mounted").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(
        [*alone, sys.executable, tmp_path / "script.py", tmp_path / "mounted"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 5
    for line, wanted in zip(
        said,
        (
            "was opened for reading",
            "Read-only file system; give another path",
            "cannot be written: Read-only file system.*open it for reading",
            "a store cannot be made there: Read-only file system",
            "its last commits are in manifest.sqlite-wal.*make it writable",
        ),
        strict=True,
    ):
        assert re.search(wanted, line), line


ODD = ["", " ", ".", "..", "a/b", 'quo"te', "back\\slash", "new\nline", "ünïcödé", "\u202e", "\U0001f600", "%s{}", "-x"]
FOLDERS = [" ", 'quo"te', "back\\slash", "new\nline", "ünïcödé", "\U0001f600", "%s{}", "-x", "?#%&=;"]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=20)), min_size=6, max_size=6, unique=True),
    folder=st.one_of(st.sampled_from(FOLDERS), st.text("aü %?#&=;'\"[]*", min_size=1, max_size=9)),
)
def test_names_of_any_characters(names: list[str], folder: str) -> None:
    """Of parameters, blocks, families, snapshots and folders: kept as they are, in segments too."""
    first, second, third, snapshot, other, family = names
    stem = family.replace("{}", "")
    blocks = (Block(0, first, (Parameter(first, (3,)), Parameter(second, (2, 2))), (third,)),)
    families = [
        Family(f"{stem}{{}}", 9, (Parameter(f"m{stem}{{}}.w", (4,)),), {f"m{stem}{{}}.w": RECIPES["embed.weight"]})
    ]
    recipes = dict.fromkeys((first, second), RECIPES["embed.weight"])
    with fast_directory() as directory:
        with make(directory / folder, blocks=blocks, recipes=recipes, families=families) as store:
            put(store, 1, 0, store.index(f"{stem}{{}}", 7))
            store.snapshot(snapshot)
            file = segment(store, 0)
            digest, parameter = store.digest(), f"m{stem}7.w"
        with reopen(directory / folder) as store:
            assert (store.digest(), store.verify(), store.snapshots()) == (digest, [], {snapshot: 1})
            assert store.blocks == blocks
            assert torch.equal(store.tensor(first), filled(store.layout(0), 1).tensors("param")[first])
            assert store.tensor(parameter).shape == (4,)
            with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
                assert torch.equal(opened.get_tensor(f"param/{second}"), store.tensor(second))
            with safe_open(segment(store, store.index(f"{stem}{{}}", 7)), "pt") as opened:  # type: ignore[no-untyped-call]
                assert torch.equal(opened.get_tensor(f"param/{parameter}"), store.tensor(parameter))
            store.branch(snapshot, directory / "branch")
            json.dumps(store.info())
            describe(store.info())
            store.remove_snapshot(snapshot)
            with pytest.raises(StoreError, match="no snapshot"):
                store.restore(other)


@pytest.mark.parametrize("where", ["block", "parameter", "family"])
def test_names_that_are_no_text_are_refused(where: str, tmp_path: Path) -> None:
    """As an argument that is not UTF-8 comes from the command line."""
    bad, name = "caf\udce9", RECIPES["embed.weight"]
    names = {"block": "b", "parameter": "p", "family": "f"} | {where: bad}
    blocks = (Block(0, names["block"], (Parameter(names["parameter"], (3,)),), ()),)
    families = [Family(f"{names['family']}{{}}", 2, (Parameter("w{}", (4,)),), {"w{}": name})]
    with pytest.raises(StoreError, match=r"name 'caf\\udce9.*' cannot be written as text"):
        make(tmp_path / "store", blocks=blocks, recipes={names["parameter"]: name}, families=families)
    assert not Store.exists(tmp_path / "store")
    with make(tmp_path / "store") as store:
        with pytest.raises(StoreError, match=r"name 'caf\\udce9' cannot be written as text"):
            store.snapshot(bad)
        for attempt in (store.remove_snapshot, store.restore):
            with pytest.raises(StoreError, match="no snapshot"):
                attempt(bad)


def test_what_was_asked_for_after_a_commit_that_failed_is_not_published(tmp_path: Path) -> None:
    device = Gated()
    with make(tmp_path / "store", device=device) as store:
        step(store, 1)
        digest, publish = store.digest(), store.manifest.publish

        asked = threading.Event()

        def full(*arguments: object, **options: object) -> object:
            assert asked.wait(timeout=30)
            raise sqlite3.OperationalError("database or disk is full")

        store.write(0, filled(store.layout(0), 2), 2, 2).result(timeout=30)
        store.manifest.publish = full  # type: ignore[assignment, method-assign]
        failing = store.commit(2, {"value": 2})
        device.gate.clear()
        store.write(1, filled(store.layout(1), 3), 1, 1)
        after = store.commit(3, {"value": 3})  # waits for that write, not for the commit before
        asked.set()
        with pytest.raises(StoreError, match="disk is full"):
            failing.result(timeout=30)
        store.manifest.publish = publish  # type: ignore[method-assign]
        store.discard()
        device.gate.set()
        with pytest.raises(StoreError, match="follows a commit that failed"):
            after.result(timeout=30)
        store.discard()
        assert (store.step, store.progress, store.digest()) == (1, {"value": 1}, digest)
        step(store, 2)
    with reopen(tmp_path / "store") as store:
        assert store.verify() == []
        assert_holds(store, 0, 2, {})
