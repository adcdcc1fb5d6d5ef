"""Any flipped bit in what is live is found, and repaired where something whole is left."""

import json
import random
import sqlite3
from pathlib import Path

import pytest
from tests.store.cases import assert_holds, filled, make, reopen, segment, step
from tests.store.test_families import FEW

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.store import Store
from weightstream.store.tables import COLUMNS


def trained(path: Path) -> Store:
    """Blocks 0 and 1 at step 3; a snapshot of step 2, and one of step 1 in which block 1 was never updated. Records of a
    family in a shared file of which some is dead."""
    store = make(path, families=[FEW])
    step(store, 1, 0)
    store.snapshot("early")
    step(store, 2, 1)
    store.snapshot("late")
    members = [store.index(FEW.name, number) for number in range(3)]
    store.write_many([(index, filled(store.layout(index), 3), 1, 1) for index in members])
    step(store, 3, 0)
    store.write(members[1], filled(store.layout(members[1]), 4), 2, 2)
    store.commit(3, {"value": 3}).result(timeout=30)
    return store


def live_bits(path: Path) -> list[tuple[Path, int, int]]:
    """Of every file that rows point to: where live bits begin, and how many there are. In a shared file these are the header
    and the places of records."""
    found = []
    with Store.open(path, writable=False) as store:
        headers = {row.file: row.header_nbytes for row in store.manifest.shared()}
        for row in store.manifest.records():
            file = path / "segments" / row.file
            found.append((file, 8 * row.offset, 8 * (row.nbytes or file.stat().st_size)))
            if row.offset:
                found.append((file, 0, 8 * headers[row.file]))
    return found


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def place(store: Store, index: int, part: str) -> int:
    """A bit in the middle of a part of the last commit's version."""
    layout = store.layout(index)
    found = layout.part(part)
    return 8 * (found.offset + found.tensors[0].offset + found.tensors[0].nbytes // 2)


def damage_of(path: Path) -> list[str]:
    try:
        with Store.open(path, writable=False, accept_damage=True) as store:
            return store.verify()
    except (StoreError, ValueError) as error:
        return [str(error)]


def test_a_thousand_flipped_bits_are_found(tmp_path: Path) -> None:
    """Live bytes are what rows of the manifest point to, and their values."""
    draw = random.Random(0)
    path = tmp_path / "store"
    with trained(path):
        pass
    assert damage_of(path) == []
    manifest = sqlite3.connect(path / "manifest.sqlite", isolation_level=None)
    manifest.execute("PRAGMA synchronous=OFF")
    live = live_bits(path)
    assert any(file.parent.name == "000000" for file, _, _ in live)
    cells = [
        (table, column, key)
        for table, columns in COLUMNS.items()
        for key in manifest.execute(
            f"SELECT {columns[0]}, {'born' if table == 'records' else 0} FROM {table}"
        ).fetchall()
        for column in (*columns, "checksum")
    ]
    found = 0
    for number in range(1000):
        if number % 2:
            segment, first, count = draw.choice(live)
            bit = first + draw.randrange(count)
            flip(segment, bit)
            found += bool(damage_of(path))
            flip(segment, bit)
        else:
            while (result := _changed_cell_is_found(manifest, path, draw, *draw.choice(cells))) is None:
                pass  # a key that another row has already: SQLite itself has none twice
            found += result
    assert found == 1000
    assert damage_of(path) == []
    manifest.close()


def _changed_cell_is_found(
    manifest: sqlite3.Connection, path: Path, draw: random.Random, table: str, column: str, key: tuple[object, int]
) -> bool | None:
    """Flips one bit of one value, as SQLite stores it, and puts it back; None where the table has no room for it."""
    first = COLUMNS[table][0]
    where = f"{first} = ?" + (" AND born = ?" if table == "records" else "")
    keys = list(key) if table == "records" else [key[0]]
    ((before,),) = manifest.execute(f"SELECT {column} FROM {table} WHERE {where}", keys).fetchall()
    after: object
    if before is None:
        after = 1 << draw.randrange(20)
    elif isinstance(before, int):
        after = before ^ (1 << draw.randrange(48))
    else:
        bits = bytearray(before.encode())
        at = draw.randrange(8 * len(bits))
        bits[at // 8] ^= 1 << at % 8
        after = bytes(bits)
    moved = [after if column == first else keys[0], *keys[1:]]
    if table == "records" and column == "born":
        moved = [keys[0], after]
    mark = "CAST(? AS TEXT)" if isinstance(after, bytes) else "?"
    try:
        manifest.execute(f"UPDATE {table} SET {column} = {mark} WHERE {where}", [after, *keys])
    except sqlite3.IntegrityError:
        return None
    found = bool(damage_of(path))
    back = where.replace("?", mark, 1) if column == first else where
    manifest.execute(f"UPDATE {table} SET {column} = ? WHERE {back}", [before, *moved])
    return found


@pytest.mark.parametrize("part", ["header", "copy"])
def test_what_follows_from_the_rest_is_made_anew(part: str, tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        digest, path = store.digest(), segment(store, 0)
        bit = 8 * 100 if part == "header" else place(store, 0, "copy")
    flip(path, bit)
    with reopen(tmp_path / "store") as store:
        (line,) = store.verify()
        assert path.name in line
        assert "verify --repair makes it anew" in line
        (done,) = store.repair()
        assert "wrote 1 records anew" in done
        assert (store.step, store.digest(), store.verify()) == (3, digest, [])
        assert store.repair() == []
        assert_holds(store, 0, 3, {})


@pytest.mark.parametrize("part", ["param", "exp_avg"])
def test_else_the_store_goes_back_to_the_newest_whole_snapshot(part: str, tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        path, bit = segment(store, 0), place(store, 0, part)
    flip(path, bit)
    with reopen(tmp_path / "store") as store:
        (line,) = store.verify()
        assert repr(part) in line
        assert "snapshot 'late' is whole" in line
        (done,) = store.repair()
        assert "from step 3 to snapshot 'late' (step 2)" in done
        assert (store.step, store.verify()) == (2, [])
        assert_holds(store, 0, 1, {})
        assert_holds(store, 1, 2, {})


def test_a_snapshot_that_shares_the_damage_is_passed_over(tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        path, bit = segment(store, 1), place(store, 1, "param")  # the last commit and "late" share this file
    flip(path, bit)
    with reopen(tmp_path / "store") as store:
        assert "snapshot 'early' is whole" in store.verify()[0]
        store.repair()
        assert store.step == 1
        (line,) = store.verify()
        assert "only snapshots hold it (late); delete them" in line
        store.remove_snapshot("late")
        assert store.verify() == []


def test_without_a_whole_snapshot_nothing_is_changed(tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        store.remove_snapshot("early")
        path, bit = segment(store, 1), place(store, 1, "param")
    flip(path, bit)
    with reopen(tmp_path / "store") as store:
        assert "no snapshot is whole" in store.verify()[0]
        before = json.dumps(store.info()["versions"])
        with pytest.raises(DamagedRecordError, match="no snapshot is whole; restore the files from a copy"):
            store.repair()
        assert (store.step, json.dumps(store.info()["versions"])) == (3, before)


@pytest.mark.parametrize("cut", [True, False])
def test_a_missing_or_cut_file_is_repaired_too(cut: bool, tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        path = segment(store, 0)
    if cut:
        path.write_bytes(path.read_bytes()[:-4096])
    else:
        path.unlink()
    (line,) = damage_of(tmp_path / "store")
    assert path.name in line
    assert "snapshot 'late' is whole" in line
    with Store.open(tmp_path / "store", accept_damage=True) as store:
        store.repair()
    with reopen(tmp_path / "store") as store:
        assert (store.step, store.verify()) == (2, [])
        for value in range(3, 8):
            step(store, value, 0)
        assert store.verify() == []
