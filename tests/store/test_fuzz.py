"""Whatever bytes a store's files hold, the reader names what is wrong: it never crashes, and never changes them."""

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.cases import files, make, put, step
from tests.store.test_families import FEW

from weightstream.errors import WeightstreamError
from weightstream.store.sparsity import InitialMask
from weightstream.store.store import Store

ANYTHING = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
TABLES = ["meta", "blocks", "families", "records", "shared", "commits", "snapshots", "life"]
PIECES = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=300)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    with make(path, families=[FEW], masks={"embed.weight": InitialMask("random", counts=(600,))}) as store:
        step(store, 1, 0)
        put(store, 1, *(store.index(FEW.name, number) for number in range(3)))
        store.snapshot("one")
        put(store, 2, 1, store.index(FEW.name, 1))
    return path


def look(path: Path) -> None:
    """Everything that reads a store; an error of ours is an answer, any other is a crash."""
    for accept in (False, True):
        with contextlib.suppress(WeightstreamError), Store.open(path, writable=False, accept_damage=accept) as store:
            for reads in (store.verify, store.info, store.snapshots, store.digest, lambda: list(store.items())):
                with contextlib.suppress(WeightstreamError):
                    reads()


def write(path: Path) -> None:
    """A writer opens it, updates, moves and recycles; or says what is wrong."""
    with contextlib.suppress(WeightstreamError), Store.open(path) as store:
        for value in (7, 8, 9):
            with contextlib.suppress(WeightstreamError):
                put(store, value, 0, store.index(FEW.name, 2))
            store.discard()
        store.remove_snapshot("one")


@ANYTHING
@given(pieces=PIECES, name=st.sampled_from(["manifest.sqlite", "segment", "shared"]))
def test_random_pieces_in_its_files(whole: Path, pieces: list[tuple[int, bytes]], name: str) -> None:
    path = whole.parent / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    where = {"segment": "segments/*.safetensors", "shared": "segments/shared/*/*"}.get(name, name)
    file = sorted(path.glob(where))[0]
    with file.open("r+b") as opened:
        for offset, data in pieces:
            opened.seek(offset % file.stat().st_size)
            opened.write(data)
    before = files(path)
    look(path)
    assert {key: value for key, value in files(path).items() if "-shm" not in key and "-wal" not in key} == before
    write(path)


@ANYTHING
@given(data=st.binary(max_size=4096))
@pytest.mark.parametrize("cut", [True, False])
def test_files_of_random_bytes(whole: Path, data: bytes, cut: bool) -> None:
    path = whole.parent / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    manifest = path / "manifest.sqlite"
    manifest.write_bytes(manifest.read_bytes()[: len(data) * 7] if cut else data)
    look(path)


@ANYTHING
@given(statements=st.lists(st.tuples(st.sampled_from(TABLES),
                                     st.sampled_from(["DELETE FROM {}", "DROP TABLE {}", "ALTER TABLE {} ADD x"])),
                           min_size=1, max_size=3))  # fmt: skip
def test_rows_and_tables_that_are_gone(whole: Path, statements: list[tuple[str, str]]) -> None:
    import sqlite3

    path = whole.parent / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    connection = sqlite3.connect(path / "manifest.sqlite", isolation_level=None)
    for table, statement in statements:
        try:
            connection.execute(statement.format(table))
        except sqlite3.OperationalError:
            pass  # it is gone already
    connection.close()
    look(path)
    write(path)
