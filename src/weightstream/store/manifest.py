"""The manifest: which file holds which version of which record, in SQLite.

One transaction is one commit. A row of `records` lives from the commit that published it (`born`) until the one that
replaced it (`died`), so a snapshot is nothing but the number of a commit: it holds what lived then. Commits are
numbered by themselves rather than by training step, since a restored store goes through a step twice. Every row
carries a checksum of its own values, for SQLite does not notice a changed one.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError

FORMAT_NUMBER = 1
APPLICATION_ID = 0x57535452  # "WSTR", where `file` finds it

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (block INTEGER PRIMARY KEY, name TEXT NOT NULL, facts TEXT NOT NULL, checksum TEXT NOT NULL);
CREATE TABLE records (
    block INTEGER NOT NULL, version INTEGER NOT NULL, born INTEGER NOT NULL, died INTEGER, file TEXT NOT NULL,
    checksums TEXT NOT NULL, optimizer_steps INTEGER NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (block, born)
) WITHOUT ROWID;
CREATE TABLE commits (
    number INTEGER PRIMARY KEY, step INTEGER NOT NULL, progress TEXT NOT NULL, checksum TEXT NOT NULL
);
CREATE TABLE snapshots (name TEXT PRIMARY KEY, number INTEGER NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
"""
_OF_THE_SYSTEM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN}
"""Errors of SQLite that say nothing about the file's contents."""

_COLUMNS = {
    "meta": ("key", "value"),
    "blocks": ("block", "name", "facts"),
    "records": ("block", "version", "born", "died", "file", "checksums", "optimizer_steps"),
    "commits": ("number", "step", "progress"),
    "snapshots": ("name", "number"),
}


@dataclass(frozen=True, slots=True)
class RecordRow:
    """One published version of one record; `checksums` maps each part to the checksum of its bytes."""

    block: int
    version: int
    file: str
    checksums: Mapping[str, int]
    optimizer_steps: int
    born: int = 0
    died: int | None = None


@dataclass(frozen=True, slots=True)
class CommitRow:
    """One commit: its own number, the training step it published, and what the caller keeps with it."""

    number: int
    step: int
    progress: dict[str, Any]


class Manifest:
    """The catalogue of one store. Methods may be called from any thread, one at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: Path, *, meta: Mapping[str, Any], blocks: Iterable[tuple[int, str, dict[str, Any]]]) -> None:
        """Write a new manifest beside its name and move it there whole, so that it is complete where it exists."""
        partial = path.with_suffix(".partial")
        for leftover in (partial, Path(f"{partial}-journal")):
            leftover.unlink(missing_ok=True)
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={FORMAT_NUMBER}")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            for key, value in meta.items():
                _insert(connection, "meta", (key, _json(value)))
            for block, name, facts in blocks:
                _insert(connection, "blocks", (block, name, _json(facts)))
            _insert(connection, "commits", (0, 0, _json({})))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreError(
                f"store '{path.parent}': the manifest could not be written: {error}; make room on the disk, try again"
            ) from error
        finally:
            connection.close()
        partial.rename(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> "Manifest":
        """Open an existing manifest.

        Raises:
            StoreError: it is no manifest of this format.
        """
        what = f"store '{path.parent}'"
        try:
            mode = "rw" if writable else "ro"
            uri = f"{path.resolve().as_uri()}?mode={mode}"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (number,) = connection.execute("PRAGMA user_version").fetchone()
            if writable and (application, number) == (APPLICATION_ID, FORMAT_NUMBER):
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as error:
            raise StoreError(
                f"{what}: expected an SQLite manifest in {path.name}, found {error}; give the directory of a store, "
                "or restore the manifest from a copy"
            ) from error
        if application != APPLICATION_ID or number != FORMAT_NUMBER:
            connection.close()
            found = f"format {number}" if application == APPLICATION_ID else "another program's database"
            hint = "a newer weightstream reads it" if number > FORMAT_NUMBER else "give the directory of a store"
            raise StoreError(f"{what}: expected a manifest of format {FORMAT_NUMBER}, found {found}; {hint}")
        return cls(path, connection)

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Reads inside see one commit, whatever a writer beside this process does meanwhile."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if self._connection.in_transaction:  # an error of the system may have ended it
                    self._connection.execute("COMMIT")

    def meta(self) -> dict[str, Any]:
        """What was fixed when the store was made."""
        return {key: json.loads(value) for key, value in self._rows("meta")}

    def blocks(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Index, name and facts of every block, in order of index."""
        return [(block, name, json.loads(facts)) for block, name, facts in self._rows("blocks", "ORDER BY block")]

    def last_commit(self) -> CommitRow:
        """The newest commit."""
        rows = self._rows("commits", "ORDER BY number DESC LIMIT 1")
        if not rows:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected a commit, found none; restore the manifest from a copy"
            )
        number, step, progress = rows[0]
        return CommitRow(number, step, json.loads(progress))

    def commit_row(self, number: int) -> CommitRow:
        """One commit by its number; the last one and those that snapshots name are kept."""
        ((_, step, progress),) = self._rows("commits", "WHERE number = ?", (number,))
        return CommitRow(number, step, json.loads(progress))

    def snapshots(self) -> dict[str, int]:
        """Name → number of the commit that the snapshot holds."""
        return dict(self._rows("snapshots", "ORDER BY number, name"))

    def records(self) -> list[RecordRow]:
        """Every row: those that live now (`died` is None) and those that only snapshots hold."""
        return [
            RecordRow(block, version, file, _checksums(text), steps, born, died)
            for block, version, born, died, file, text, steps in self._rows("records", "ORDER BY block, born")
        ]

    def publish(self, step: int, progress: dict[str, Any], records: Sequence[RecordRow]) -> CommitRow:
        """Make a commit of these new versions: everything or, if this fails, nothing."""
        with self._lock:
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                number = self.last_commit().number + 1
                held = sorted(set(self.snapshots().values()))
                for record in records:
                    self._retire(record.block, number, held)
                    text = _json({part: f"{value:016x}" for part, value in record.checksums.items()})
                    values = (record.block, record.version, number, None, record.file, text, record.optimizer_steps)
                    _insert(connection, "records", values)
                _insert(connection, "commits", (number, step, _json(progress)))
                kept = (number, *held)
                connection.execute(f"DELETE FROM commits WHERE number NOT IN ({','.join('?' * len(kept))})", kept)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        return CommitRow(number, step, progress)

    def add_snapshot(self, name: str) -> int:
        """Name the last commit; gives its number.

        Raises:
            StoreError: the name is taken.
        """
        with self._lock:
            if name in self.snapshots():
                raise StoreError(
                    f"store '{self.path.parent}' already has a snapshot {name!r}; delete it first or take another name"
                )
            number = self.last_commit().number
            _insert(self._connection, "snapshots", (name, number))
        return number

    def remove_snapshot(self, name: str) -> None:
        """Forget a snapshot, and the rows that it alone held.

        Raises:
            StoreError: there is no such snapshot.
        """
        with self._lock:
            if name not in self.snapshots():
                known = ", ".join(self.snapshots()) or "none"
                raise StoreError(f"store '{self.path.parent}' has no snapshot {name!r}; it has {known}")
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute("DELETE FROM snapshots WHERE name = ?", (name,))
                held = sorted(set(self.snapshots().values()))
                for row in self.records():
                    if row.died is not None and not any(row.born <= number < row.died for number in held):
                        connection.execute("DELETE FROM records WHERE block = ? AND born = ?", (row.block, row.born))
                kept = (self.last_commit().number, *held)
                connection.execute(f"DELETE FROM commits WHERE number NOT IN ({','.join('?' * len(kept))})", kept)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _retire(self, block: int, number: int, held: Sequence[int]) -> None:
        """The living row of a block dies at this commit; it is kept only if a snapshot holds it."""
        for row in self._rows("records", "WHERE block = ? AND died IS NULL", (block,)):
            born = row[2]
            self._connection.execute("DELETE FROM records WHERE block = ? AND born = ?", (block, born))
            if any(born <= snapshot < number for snapshot in held):
                _insert(self._connection, "records", (*row[:3], number, *row[4:]))

    def _rows(self, table: str, clause: str = "", values: Sequence[Any] = ()) -> list[Any]:
        """Rows without their checksum, after comparing it."""
        columns = ", ".join((*_COLUMNS[table], "checksum"))
        try:
            with self._lock:
                rows = self._connection.execute(f"SELECT {columns} FROM {table} {clause}", values).fetchall()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_SYSTEM:
                raise StoreError(
                    f"manifest '{self.path}': table {table} cannot be read ({error}); make room or look after the disk, "
                    "and try again"
                ) from error
            raise DamagedRecordError(
                f"manifest '{self.path}': table {table} cannot be read ({error}); restore the manifest from a copy"
            ) from error
        for *row, found in rows:
            expected = _row_checksum(table, row)
            if found != expected:
                raise DamagedRecordError(
                    f"manifest '{self.path}': row {row[0]!r} of table {table} was committed with checksum {found}, its "
                    f"values now give {expected}; the file was changed or damaged, restore it from a copy"
                )
        return [tuple(row) for *row, _ in rows]


def _insert(connection: sqlite3.Connection, table: str, values: Sequence[Any]) -> None:
    marks = ",".join("?" * (len(values) + 1))
    connection.execute(f"INSERT INTO {table} VALUES ({marks})", (*values, _row_checksum(table, values)))


def _row_checksum(table: str, values: Sequence[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(_json([table, *values]).encode())


def _json(value: Any) -> str:
    """One spelling for equal values, so that checksums can be taken over it. NaN has no place in JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksums(text: str) -> dict[str, int]:
    return {part: int(value, 16) for part, value in json.loads(text).items()}
