"""Families: billions of records from one template, of which only those that were updated exist."""

import sqlite3
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.store.cases import BLOCKS, assert_holds, fetched, files, filled, loaded, make, reopen, segment

from weightstream.blocks import Parameter
from weightstream.errors import DamagedRecordError, StoreError, StoreMismatchError
from weightstream.store import records
from weightstream.store.difference import difference
from weightstream.store.families import Family
from weightstream.store.initial import generate
from weightstream.store.pull import pull
from weightstream.store.push import push
from weightstream.store.recipes import Recipe, Step
from weightstream.store.store import Store

COUNT = 8_589_934_592
NORMAL, ONES = Recipe((Step("normal", (0.0, 0.1)),)), Recipe((Step("fill", (1.0,)),))
EXPERTS = Family(
    "layer.expert.{}",
    COUNT,
    (Parameter("layer.expert.{}.up", (16, 8)), Parameter("layer.expert.{}.scale", (8,))),
    {"layer.expert.{}.up": NORMAL, "layer.expert.{}.scale": ONES},
)
FEW = Family("few.{}", 3, (Parameter("few.{}", (5,)),), {"few.{}": ONES})


def of(path: Path, **changes: object) -> Store:
    return make(path, families=[EXPERTS, FEW], **changes)  # type: ignore[arg-type]


def put(store: Store, value: int, *numbers: int, family: str = EXPERTS.name) -> None:
    """One step that updates these records."""
    for number in numbers:
        index = store.index(family, number)
        version = store.version(index) + 1
        store.write(index, filled(store.layout(index), value), version, version)
    store.commit(store.step + 1, {"value": value}).result(timeout=30)


@pytest.mark.parametrize("number", [0, 9, 10, 2**32 + 1, COUNT - 1])
def test_a_record_begins_by_its_recipe_and_its_own_name(number: int, tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        before = files(store.path / "segments")
        index = store.index("layer.expert.{}", number)
        name = f"layer.expert.{number}.up"
        wanted = generate(NORMAL, seed=store.seed, name=name, shape=(16, 8))
        assert torch.equal(loaded(store, index)[f"param/{name}"], wanted)
        assert torch.equal(store.tensor(name), wanted)
        assert torch.equal(fetched(store, index)[name], wanted.to(torch.bfloat16))
        assert not store.tensor(name, "exp_avg").any()
        assert (store.version(index), store.optimizer_steps(index)) == (0, 0)
        assert files(store.path / "segments") == before, "it takes no space"


def test_an_updated_record_takes_space_and_its_neighbours_are_not(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        first = store.index(EXPERTS.name, 0)
        initial = {first + n: loaded(store, first + n) for n in (0, 1, 2**30)}
        put(store, 5, 1)
        put(store, 6, 1, COUNT - 1)
        assert segment(store, first + 1) == segment(store, first + COUNT - 1)
        image = store.layout(first + 1)
        assert segment(store, first + 1).stat().st_size == 4096 + 2 * image.parts_nbytes
        taken = store.info()
        assert (taken["shared_files"], taken["shared_live_bytes"]) == (1, 2 * image.parts_nbytes)
    with reopen(tmp_path / "store") as store:
        assert_holds(store, first, None, initial)
        assert_holds(store, first + 1, 6, initial)
        assert_holds(store, first + 2**30, None, initial)
        assert_holds(store, first + COUNT - 1, 6, initial)
        assert store.optimizer_steps(first + 1) == 2
        assert store.verify() == []
        found = store.info()
        assert found["families"][0] == {
            "name": EXPERTS.name, "records": COUNT, "parameters": COUNT * 136, "records_written": 2,
        }  # fmt: skip
        assert found["parameters"] == sum(block.numel for block in BLOCKS) + COUNT * 136 + 15


def test_one_row_whatever_its_size(tmp_path: Path) -> None:
    of(tmp_path / "store").close()
    with sqlite3.connect(tmp_path / "store" / "manifest.sqlite") as connection:
        assert connection.execute("SELECT first, name, count FROM families").fetchall() == [
            (len(BLOCKS), EXPERTS.name, COUNT),
            (len(BLOCKS) + COUNT, "few.{}", 3),
        ]
    connection.close()


def test_records_leave_memory_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MEMBERS_KEPT", 4)
    with of(tmp_path / "store") as store:
        first = store.index(EXPERTS.name, 0)
        for value in range(1, 4):
            put(store, value, *range(40))
            assert len(store.versions.records.in_memory()) <= len(BLOCKS) + 40
        for number in range(40):
            assert_holds(store, first + number, 3, {})
        assert len(store.versions.records.in_memory()) <= len(BLOCKS) + 4
        assert store.verify() == []


def test_the_digest_tells_families_and_their_updates_apart(tmp_path: Path) -> None:
    digests = []
    for name, number, value in (("a", None, 0), ("b", 1, 5), ("c", 2, 5), ("d", 1, 5)):
        with of(tmp_path / name) as store:
            if number is not None:
                put(store, value, number)
            digests.append(store.digest())
    with make(tmp_path / "e", families=[FEW]) as store:
        digests.append(store.digest())
    assert len(set(digests)) == 4
    assert digests[1] == digests[3]


def test_items_go_through_blocks_and_then_families_by_number(tmp_path: Path) -> None:
    with make(tmp_path / "store", families=[FEW, EXPERTS]) as store:
        put(store, 9, 1, family="few.{}")
        own = sum(len(block.parameters) for block in BLOCKS)
        found = list(islice(store.items(), own, own + 5))
        names = ["few.0", "few.1", "few.2", "layer.expert.0.up", "layer.expert.0.scale"]
        assert [name for name, _ in found] == names
        assert torch.equal(found[0][1]["param"], torch.ones(5))
        assert torch.equal(found[1][1]["param"], store.tensor("few.1"))
        assert not torch.equal(found[1][1]["param"], torch.ones(5))


def test_records_of_the_last_families_are_as_safe_as_others(tmp_path: Path) -> None:
    """Their indices are beyond 2^62, up to just below what SQLite has integers for."""
    huge = [Family(f"{name}.{{}}", 2**61, (Parameter(f"{name}.{{}}", (5,)),), {f"{name}.{{}}": ONES}) for name in "abc"]
    with make(tmp_path / "store", families=huge) as store:
        before = store.digest()
        put(store, 3, 2**61 - 1, family="c.{}")
        assert store.digest() != before
        store.snapshot("now")
        store.branch("now", tmp_path / "branch")
        assert store.info()["families"][2]["records_written"] == 1
        path = segment(store, store.index("c.{}", 2**61 - 1))
        with reopen(tmp_path / "branch") as branch:
            assert branch.digest() == store.digest()
            assert torch.equal(branch.tensor(f"c.{2**61 - 1}"), store.tensor(f"c.{2**61 - 1}"))
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    with reopen(tmp_path / "store") as store:
        assert len(store.verify()) >= 1


def test_snapshots_branches_and_damage(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        first = store.index(EXPERTS.name, 0)
        initial = {first + 2: loaded(store, first + 2)}
        put(store, 1, 1, 3)
        store.snapshot("early")
        digest = store.digest()
        put(store, 2, 1, 2)
        store.branch("early", tmp_path / "branch")
        with reopen(tmp_path / "branch") as branch:
            assert branch.digest() == digest
            put(branch, 7, 1, 3)
        assert_holds(store, first + 3, 1, initial)
        path = segment(store, first + 2)
        layout = store.layout(first + 2)
        offset = store.versions.records[first + 2].committed.offset
        offset += layout.part("param").offset - layout.header_nbytes
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")
    with reopen(tmp_path / "store") as store:
        (line,) = store.verify()
        assert "layer.expert.2" in line
        with pytest.raises(DamagedRecordError):
            loaded(store, first + 2)
        store.repair()
        assert store.digest() == digest
        assert_holds(store, first + 1, 1, initial)
        assert_holds(store, first + 2, None, initial)
        put(store, 3, 1)
        assert store.remove_snapshot("early") == store.layout(first + 1).parts_nbytes
        assert store.verify() == []


def test_discard_and_a_crash_in_mid_step(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        first = store.index(EXPERTS.name, 0)
        put(store, 1, 5)
        store.write(first + 5, filled(store.layout(first + 5), 2), 2, 2).result(timeout=30)
        store.discard()
        assert_holds(store, first + 5, 1, {})
        store.write(first + 5, filled(store.layout(first + 5), 3), 2, 2).result(timeout=30)
    with reopen(tmp_path / "store") as store:  # closed without a commit, as a crash would
        assert_holds(store, first + 5, 1, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "expert"}, r"expected \{\} once in 'expert'"),
        ({"parameters": (Parameter("a.{}.{}", (2,)),)}, "once in"),
        ({"parameters": ()}, "expected records and parameters"),
        ({"count": 0}, "expected records and parameters"),
        ({"parameters": (Parameter("layer.expert.{}.up", (0, 2)),)}, "expected parameters with numbers in them"),
        ({"recipes": {}}, r"'layer.expert.\{\}.up' has no recipe"),
    ],
)
def test_what_is_no_family(changes: dict[str, object], message: str) -> None:
    facts = {"name": EXPERTS.name, "count": 2, "parameters": EXPERTS.parameters, "recipes": EXPERTS.recipes}
    with pytest.raises(StoreError, match=message):
        Family(**(facts | changes))  # type: ignore[arg-type]


def test_records_that_there_are_not(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        for family, number in (("few.{}", 3), ("few.{}", -1), ("other.{}", 0)):
            with pytest.raises(KeyError, match=r"the families are 'layer.expert.\{\}' with 8589934592 records"):
                store.index(family, number)
        for name in ("few.3", "few.01", "layer.expert.0", f"layer.expert.{COUNT}.up"):
            with pytest.raises(KeyError, match="has no parameter"):
                store.tensor(name)
        with pytest.raises(IndexError, match="the store has records 0 to"):
            store.layout(len(BLOCKS) + COUNT + 3)


def test_push_pull_and_difference(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        put(store, 1, 4, COUNT - 1)
        digest = store.digest()
    sent = push(tmp_path / "store", tmp_path / "target")
    assert sent["sent_records"] == 3  # the frozen block has a file, too
    pull(tmp_path / "target", tmp_path / "pulled")
    with reopen(tmp_path / "pulled") as pulled, reopen(tmp_path / "store") as store:
        assert (pulled.digest(), pulled.verify()) == (digest, [])
        assert difference(store, pulled)["equal"]
        put(store, 2, 4)
        put(pulled, 3, 9)
        found = difference(store, pulled)
        assert found["summary"].startswith("12 of 36 tensors differ")
        assert "1 families or their records are not in both" in found["summary"]
        assert {row["name"].split(".")[2] for row in found["tensors"] if row["state"] == "differs"} == {"4", "9"}
    assert push(tmp_path / "store", tmp_path / "target")["sent_records"] == 1
    with make(tmp_path / "other", families=[FEW]) as other, reopen(tmp_path / "store", writable=False) as store:
        assert "layer.expert.{} (family): only in A" in difference(store, other)["lines"]
    with pytest.raises(StoreMismatchError, match="of another store"):
        push(tmp_path / "other", tmp_path / "target")
