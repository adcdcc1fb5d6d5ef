"""The SQLite file of a manifest: its tables, as rows of plain values that nobody can change unseen.

Every row carries a checksum of its own values, for SQLite does not notice a changed one; whoever reads rows here has had
them compared. What the rows mean is `rows.py` and `manifest.py`.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.syncing import sync_directory

FORMAT_NUMBER, SPARSE_FORMAT_NUMBER = 4, 5
"""Of a store without sparse parameters, and of one with them: its rows say how sparse each version is."""
APPLICATION_ID = 0x57535452  # "WSTR", where `file` finds it

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (block INTEGER PRIMARY KEY, name TEXT NOT NULL, facts TEXT NOT NULL, checksum TEXT NOT NULL);
CREATE TABLE families (
    first INTEGER PRIMARY KEY, name TEXT NOT NULL, count INTEGER NOT NULL, facts TEXT NOT NULL, checksum TEXT NOT NULL
);
CREATE TABLE records (
    block INTEGER NOT NULL, version INTEGER NOT NULL, born INTEGER NOT NULL, died INTEGER, file TEXT NOT NULL,
    checksums TEXT NOT NULL, optimizer_steps INTEGER NOT NULL, offset INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    {sparsity}checksum TEXT NOT NULL, PRIMARY KEY (block, born)
) WITHOUT ROWID;
CREATE INDEX records_by_birth ON records (born);
CREATE INDEX records_by_death ON records (died) WHERE died IS NOT NULL;
CREATE INDEX records_by_place ON records (file, offset) WHERE offset > 0;
CREATE TABLE shared (
    serial INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, nbytes INTEGER NOT NULL, header_nbytes INTEGER NOT NULL,
    said_nbytes INTEGER NOT NULL, header_checksum TEXT NOT NULL, live_bytes INTEGER NOT NULL, checksum TEXT NOT NULL
);
CREATE INDEX shared_mostly_dead ON shared (live_bytes) WHERE 2 * live_bytes < nbytes - said_nbytes;
CREATE TABLE commits (
    number INTEGER PRIMARY KEY, step INTEGER NOT NULL, progress TEXT NOT NULL, checksum TEXT NOT NULL
);
CREATE TABLE snapshots (name TEXT PRIMARY KEY, number INTEGER NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE life (written_bytes INTEGER NOT NULL, session TEXT NOT NULL, checksum TEXT NOT NULL);
"""
COLUMNS = {
    "meta": ("key", "value"),
    "blocks": ("block", "name", "facts"),
    "families": ("first", "name", "count", "facts"),
    "records": ("block", "version", "born", "died", "file", "checksums", "optimizer_steps", "offset", "nbytes"),
    "shared": ("serial", "file", "nbytes", "header_nbytes", "said_nbytes", "header_checksum", "live_bytes"),
    "commits": ("number", "step", "progress"),
    "snapshots": ("name", "number"),
    "life": ("written_bytes", "session"),
}
"""By table, what its rows have before their checksum; those of `records` end with `sparsity` in a sparse store."""

_OF_THE_SYSTEM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN}
"""Errors of SQLite that say nothing about the file's contents."""


class Tables:
    """The tables of one manifest. Methods may be called from any thread; whoever holds `lock` is alone with them.

    Args:
        sparse: whether rows of `records` say how sparse versions are.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, sparse: bool) -> None:
        self.path, self.sparse = path, sparse
        self.lock = threading.RLock()
        self._connection = connection

    @classmethod
    def create(cls, path: Path, fill: Callable[["Tables"], None], *, sparse: bool) -> None:
        """Write new tables beside their name and move them there whole, so that they are complete where they exist.

        Args:
            fill: inserts the first rows.
        """
        partial = path.with_suffix(".partial")
        for leftover in (partial, Path(f"{partial}-journal")):
            leftover.unlink(missing_ok=True)
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SPARSE_FORMAT_NUMBER if sparse else FORMAT_NUMBER}")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN")
            for statement in _SCHEMA.format(sparsity="sparsity TEXT, " if sparse else "").split(";"):
                connection.execute(statement)
            fill(cls(path, connection, sparse=sparse))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreError(
                f"store '{path.parent}': the manifest could not be written: {error}; make room on the disk, try again"
            ) from error
        finally:
            connection.close()
        partial.rename(path)
        sync_directory(path.parent)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> "Tables":
        """Open existing ones.

        Raises:
            StoreError: they are no manifest of this format.
        """
        what = f"store '{path.parent}'"
        try:
            connection = _connection(path, writable=writable)
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (number,) = connection.execute("PRAGMA user_version").fetchone()
            known = application == APPLICATION_ID and number in (FORMAT_NUMBER, SPARSE_FORMAT_NUMBER)
            if writable and known:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreError(
                f"{what}: expected an SQLite manifest in {path.name}, found {error}; give the directory of a store, "
                "or restore the manifest from a copy"
            ) from error
        if not known:
            maker = _maker(connection)
            connection.close()
            found = f"format {number}" if application == APPLICATION_ID else "another program's database"
            hint = "give the directory of a store"
            if application == APPLICATION_ID:
                hint = f"weightstream {maker} reads it" if maker else "another version of weightstream reads it"
            expected = f"a manifest of format {FORMAT_NUMBER} or {SPARSE_FORMAT_NUMBER}"
            raise StoreError(f"{what}: expected {expected}, found {found}; {hint}")
        return cls(path, connection, sparse=number == SPARSE_FORMAT_NUMBER)

    # Reading.

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Reads inside see one commit, whatever a writer beside this process does meanwhile."""
        with self.lock:
            try:
                self._connection.execute("BEGIN")
                try:
                    yield
                finally:
                    if self._connection.in_transaction:
                        self._connection.execute("COMMIT")
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise _unreadable(f"manifest '{self.path}'", error) from error

    def rows(self, table: str, clause: str = "", values: Sequence[Any] = ()) -> list[Any]:
        """Rows without their checksum, after comparing it.

        Raises:
            DamagedRecordError: naming the first that was changed.
        """
        sparse = ("sparsity",) if table == "records" and self.sparse else ()
        columns = ", ".join((*COLUMNS[table], *sparse, "checksum"))
        try:
            with self.lock:
                rows = self._connection.execute(f"SELECT {columns} FROM {table} {clause}", values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _unreadable(f"manifest '{self.path}': table {table}", error) from error
        for *row, found in rows:
            expected = _row_checksum(table, row)
            if found != expected:
                raise DamagedRecordError(
                    f"manifest '{self.path}': row {row[0]!r} of table {table} was committed with checksum {found}, its "
                    f"values now give {expected}; the file was changed or damaged, restore it from a copy"
                )
        return [tuple(row) for *row, _ in rows]

    def select(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a statement finds; no checksum is compared."""
        try:
            with self.lock:
                return self._connection.execute(statement, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _unreadable(f"manifest '{self.path}'", error) from error

    def number(self, statement: str, values: Sequence[Any] = ()) -> int:
        """The one number that a statement finds."""
        try:
            with self.lock:
                return int(self._connection.execute(statement, values).fetchone()[0])
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            raise _unreadable(f"manifest '{self.path}'", error) from error

    def check(self) -> None:
        """Have SQLite check its own structure, and compare every row with its checksum.

        Raises:
            DamagedRecordError: naming the first that was changed.
        """
        found = [text for (text,) in self._connection.execute("PRAGMA integrity_check(1)")]
        if found != ["ok"]:
            raise DamagedRecordError(f"manifest '{self.path}': SQLite finds {found[0]}; restore it from a copy")
        for table in COLUMNS:
            self.rows(table)

    def copied(self) -> bytes:
        """The whole file, as it may be written to another one."""
        with self.lock:
            return self._connection.serialize()

    # Changing: the caller holds the lock, or is in a transaction, which holds it.

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together or, after an error, not at all."""
        with self.lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def insert(self, table: str, values: Sequence[Any]) -> None:
        """A row with its checksum."""
        marks = ",".join("?" * (len(values) + 1))
        self._connection.execute(f"INSERT INTO {table} VALUES ({marks})", (*values, _row_checksum(table, values)))

    def delete(self, table: str, clause: str = "", values: Sequence[Any] = ()) -> None:
        """Rows are no more."""
        self._connection.execute(f"DELETE FROM {table} {clause}", values)

    def has(self, table: str, clause: str, values: Sequence[Any]) -> bool:
        """Whether there is such a row, as a transaction has left it so far; no checksum is compared."""
        return self._connection.execute(f"SELECT 1 FROM {table} {clause}", values).fetchone() is not None

    def close(self) -> None:
        with self.lock:
            self._connection.close()


def _connection(path: Path, *, writable: bool) -> sqlite3.Connection:
    """SQLite keeps an index of its log beside the database. On a disk that is read-only there can be none, and without a
    log there need be none."""
    uri = f"{path.resolve().as_uri()}?mode={'rw' if writable else 'ro'}"
    options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False, "timeout": 30}
    connection: sqlite3.Connection = sqlite3.connect(uri, **options)
    try:
        connection.execute("PRAGMA application_id")
    except sqlite3.OperationalError as error:
        connection.close()
        if writable or os.access(path.parent, os.W_OK):
            raise
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise StoreError(
                f"store '{path.parent}': its last commits are in {log.name}, for which SQLite needs to write beside it, and "
                "the disk is read-only; make it writable and open the store once, or copy the store to another disk"
            ) from error
        connection = sqlite3.connect(f"{uri}&immutable=1", **options)
    return connection


def _unreadable(what: str, error: Exception) -> StoreError:
    """The system failed, or the file is not what was written."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_SYSTEM:
        return StoreError(f"{what} cannot be read ({error}); make room or look after the disk, and try again")
    return DamagedRecordError(f"{what} cannot be read ({error}); restore the manifest from a copy")


def _maker(connection: sqlite3.Connection) -> str | None:
    """The version of weightstream that made a manifest of whatever format."""
    try:
        (found,) = connection.execute("SELECT value FROM meta WHERE key = 'made_by'").fetchone()
        return str(json.loads(found))
    except (sqlite3.Error, TypeError, ValueError):
        return None


def _row_checksum(table: str, values: Sequence[Any]) -> str:
    """Over the values as JSON; one that no JSON has (a blob where text was) is spelled so that nothing equals it."""
    text = json.dumps([table, *values], sort_keys=True, separators=(",", ":"), default=repr)
    return xxhash.xxh3_64_hexdigest(text.encode())


def json_text(value: Any) -> str:
    """One spelling for equal values, so that checksums can be taken over it. NaN has no place in JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
