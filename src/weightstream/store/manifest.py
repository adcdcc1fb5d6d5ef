"""The manifest: which file holds which version of which record, in SQLite.

One transaction is one commit. A row of `records` lives from the commit that published it (`born`) until the one that
replaced it (`died`), so a snapshot is nothing but the number of a commit: it holds what lived then. Commits are
numbered by themselves rather than by training step, since a restored store goes through a step twice. A row of `shared`
is a file in which records of families lie, with the bytes of it that rows of `records` point to: kept with every
change, so that nobody has to look through the records for what is dead. Every row carries a checksum of its own values,
for SQLite does not notice a changed one.
"""

import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.facts import SPARSE
from weightstream.store.sparsity import DENSE, Sparsity, sparsity_from_json, sparsity_to_json

FORMAT_NUMBER, SPARSE_FORMAT_NUMBER = 4, 5
"""Of a store without sparse parameters, and of one with them: its rows say how sparse each version is."""
META = ("id", "made_by", "contract", "precision", "optimizer", "chunk_bytes", "panel_elements", "counts")
"""What table meta always has."""
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
_TOGETHER = "(together)"
"""In a commit's progress: how many memory ranks made it, and its name."""
_OF_THE_SYSTEM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN}
"""Errors of SQLite that say nothing about the file's contents."""

_ASKED_AT_ONCE = 500
"""Values in one statement."""
_NO_RECORD = 2**63 - 1
"""SQLite's largest integer: families may have records up to just below it."""

_COLUMNS = {
    "meta": ("key", "value"),
    "blocks": ("block", "name", "facts"),
    "families": ("first", "name", "count", "facts"),
    "records": ("block", "version", "born", "died", "file", "checksums", "optimizer_steps", "offset", "nbytes"),
    "shared": ("serial", "file", "nbytes", "header_nbytes", "said_nbytes", "header_checksum", "live_bytes"),
    "commits": ("number", "step", "progress"),
    "snapshots": ("name", "number"),
    "life": ("written_bytes", "session"),
}


@dataclass(frozen=True, slots=True)
class RecordRow:
    """One published version of one record; `checksums` maps each part to the checksum of its bytes.

    In a file that it shares its parts take `nbytes` from `offset` on; both are 0 where the file is its own. `sparsity` is
    what its layout follows from.
    """

    block: int
    version: int
    file: str
    checksums: Mapping[str, int]
    optimizer_steps: int
    born: int = 0
    died: int | None = None
    offset: int = 0
    nbytes: int = 0
    sparsity: Sparsity = DENSE

    @property
    def place(self) -> tuple[str, int]:
        """Where it lies: file and offset."""
        return self.file, self.offset

    def to_json(self) -> list[Any]:
        """What another rank needs to publish it, too."""
        checksums = {part: f"{value:016x}" for part, value in self.checksums.items()}
        sparse = [sparsity_to_json(self.sparsity)] if self.sparsity else []
        place = [self.offset, self.nbytes]
        return [self.block, self.version, self.file, checksums, self.optimizer_steps, *place, *sparse]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> "RecordRow":
        block, version, file, checksums, steps, offset, nbytes, *sparse = data
        sums = {part: int(value, 16) for part, value in checksums.items()}
        sparsity = sparsity_from_json(sparse[0]) if sparse else DENSE
        return cls(block, version, file, sums, steps, offset=offset, nbytes=nbytes, sparsity=sparsity)

    def at(self, number: int) -> "RecordRow":
        """The row as it was at an earlier commit, at or after its birth."""
        return replace(self, died=None) if self.died is not None and self.died > number else self

    def lives_at(self, number: int) -> bool:
        """Whether the commit of that number holds it."""
        return self.born <= number and (self.died is None or number < self.died)


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A file that records of families share; `live_bytes` of it are those of versions that rows point to.

    Of its header, pages up to `said_nbytes` say something; the others are as dead as bytes of no version.
    """

    serial: int
    file: str
    nbytes: int
    header_nbytes: int
    said_nbytes: int
    header_checksum: str
    live_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LifeRow:
    """What the store has written to its disk in its life, and figures of its writer's last session."""

    written_bytes: int = 0
    session: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """A record's bytes were copied to another place; what points to the old one is to point to the new one."""

    block: int
    old: tuple[str, int]
    new: tuple[str, int]


@dataclass(frozen=True, slots=True)
class CommitRow:
    """One commit: its own number, the training step it published, and what the caller keeps with it.

    `ranks` are the memory ranks that made it together, under a `name` of its own.
    """

    number: int
    step: int
    progress: dict[str, Any]
    ranks: int = 1
    name: str = ""

    def packed(self) -> dict[str, Any]:
        """Its progress as it is kept."""
        return self.progress | ({_TOGETHER: [self.ranks, self.name]} if self.ranks > 1 else {})

    @classmethod
    def of(cls, number: int, step: int, progress: str) -> "CommitRow":
        """From the row that holds it."""
        kept = json.loads(progress)
        ranks, name = kept.pop(_TOGETHER, (1, ""))
        return cls(number, step, kept, ranks, name)


class Manifest:
    """The catalogue of one store. Methods may be called from any thread, one at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, *, sparse: bool) -> None:
        self.path = path
        self._sparse = sparse
        self._connection = connection
        self._lock = threading.RLock()
        self._live: Counter[str] = Counter()  # by how much the live bytes of shared files change in this transaction

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        meta: Mapping[str, Any],
        blocks: Iterable[tuple[int, str, dict[str, Any]]],
        step: int = 0,
        progress: Mapping[str, Any] | None = None,
        families: Iterable[tuple[int, str, int, dict[str, Any]]] = (),
        records: Iterable[RecordRow] = (),
        shared: Iterable[SharedRow] = (),
    ) -> None:
        """Write a new manifest beside its name and move it there whole, so that it is complete where it exists.

        Its only commit is of `step` and `progress` and holds `records`. What is live in `shared` files follows from these.
        """
        partial = path.with_suffix(".partial")
        for leftover in (partial, Path(f"{partial}-journal")):
            leftover.unlink(missing_ok=True)
        connection = sqlite3.connect(partial, isolation_level=None)
        blocks, families = list(blocks), list(families)
        sparse = any(SPARSE in facts for _, _, facts in blocks)
        try:
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SPARSE_FORMAT_NUMBER if sparse else FORMAT_NUMBER}")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN")
            for statement in _SCHEMA.format(sparsity="sparsity TEXT, " if sparse else "").split(";"):
                connection.execute(statement)
            counts = {"blocks": len(blocks), "families": len(families)}
            for key, value in {**meta, "counts": counts}.items():
                _insert(connection, "meta", (key, _json(value)))
            for block, name, facts in blocks:
                _insert(connection, "blocks", (block, name, _json(facts)))
            for first, name, count, facts in families:
                _insert(connection, "families", (first, name, count, _json(facts)))
            live: Counter[str] = Counter()
            for record in records:
                _insert_record(connection, record, 0, sparse=sparse)
                live[record.file] += record.nbytes
            for file in shared:
                _insert(connection, "shared", _shared_values(replace(file, live_bytes=live[file.file])))
            _insert(connection, "commits", (0, step, _json(progress or {})))
            _insert(connection, "life", (0, "{}"))
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

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Reads inside see one commit, whatever a writer beside this process does meanwhile."""
        with self._lock:
            try:
                self._connection.execute("BEGIN")
                try:
                    yield
                finally:
                    if self._connection.in_transaction:
                        self._connection.execute("COMMIT")
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise _unreadable(f"manifest '{self.path}'", error) from error

    def meta(self) -> dict[str, Any]:
        """What was fixed when the store was made.

        Raises:
            DamagedRecordError: some of it is gone, or some blocks or families are.
        """
        found = {key: json.loads(value) for key, value in self._rows("meta")}
        missing = [key for key in META if key not in found]
        if missing:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected {missing[0]!r} in table meta, found nothing; restore the manifest "
                "from a copy"
            )
        for table, count in found["counts"].items():
            rows = len(self._rows(table))
            if rows != count:
                raise DamagedRecordError(
                    f"manifest '{self.path}': expected {count} rows in table {table}, found {rows}; restore the "
                    "manifest from a copy"
                )
        return found

    def blocks(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Index, name and facts of every block, in order of index."""
        return [(block, name, json.loads(facts)) for block, name, facts in self._rows("blocks", "ORDER BY block")]

    def families(self) -> list[tuple[int, str, int, dict[str, Any]]]:
        """First index, name, number of records and template of every family, in order."""
        rows = self._rows("families", "ORDER BY first")
        return [(first, name, count, json.loads(facts)) for first, name, count, facts in rows]

    def last_commit(self) -> CommitRow:
        """The newest commit."""
        rows = self._rows("commits", "ORDER BY number DESC LIMIT 1")
        if not rows:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected a commit, found none; restore the manifest from a copy"
            )
        return CommitRow.of(*rows[0])

    def commit_before(self, number: int) -> CommitRow | None:
        """The commit before the one of that number, if it is kept."""
        rows = self._rows("commits", "WHERE number = ?", (number - 1,))
        return CommitRow.of(*rows[0]) if rows else None

    def commit_row(self, number: int) -> CommitRow:
        """One commit by its number; the last one and those that snapshots name are kept."""
        rows = self._rows("commits", "WHERE number = ?", (number,))
        if not rows:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected commit {number}, which a snapshot holds, found none; restore the "
                f"manifest from a copy"
            )
        return CommitRow.of(*rows[0])

    def check(self) -> None:
        """Have SQLite check its own structure, and compare every row with its checksum.

        Raises:
            DamagedRecordError: naming the first that was changed.
        """
        found = [text for (text,) in self._connection.execute("PRAGMA integrity_check(1)")]
        if found != ["ok"]:
            raise DamagedRecordError(f"manifest '{self.path}': SQLite finds {found[0]}; restore it from a copy")
        for table in _COLUMNS:
            self._rows(table)
        for number in self.snapshots().values():
            self.commit_row(number)

    def snapshots(self) -> dict[str, int]:
        """Name → number of the commit that the snapshot holds."""
        return dict(self._rows("snapshots", "ORDER BY number, name"))

    def snapshot(self, name: str) -> int:
        """The number of the commit that a snapshot holds.

        Raises:
            StoreError: there is no such snapshot.
        """
        snapshots = self.snapshots()
        if name not in snapshots:
            known = ", ".join(snapshots) or "none"
            raise StoreError(f"store '{self.path.parent}' has no snapshot {name!r}; it has {known}")
        return snapshots[name]

    def records(self, first: int = 0, stop: int = _NO_RECORD) -> list[RecordRow]:
        """Every row of the blocks in a range: those that live now (`died` is None) and those that only snapshots hold."""
        return self._records("block >= ? AND block < ?", (first, stop))

    def count_living(self, first: int, stop: int) -> int:
        """How many records of a range have been written."""
        clause = "SELECT COUNT(*) FROM records WHERE block >= ? AND block < ? AND died IS NULL"
        return self._number(clause, (first, stop))

    def existing(self, blocks: Sequence[int]) -> set[int]:
        """Those of these records that have a row that lives now."""
        found = set[int]()
        for start in range(0, len(blocks), _ASKED_AT_ONCE):
            some = blocks[start : start + _ASKED_AT_ONCE]
            clause = f"SELECT block FROM records WHERE died IS NULL AND block IN ({','.join('?' * len(some))})"
            found.update(block for (block,) in self._values(clause, some))
        return found

    def first_living(self, first: int, stop: int) -> int | None:
        """The first record of a range that has a row that lives now."""
        clause = "SELECT block FROM records WHERE block >= ? AND block < ? AND died IS NULL ORDER BY block LIMIT 1"
        return next((block for (block,) in self._values(clause, (first, stop))), None)

    def _values(self, clause: str, values: Sequence[Any]) -> list[Any]:
        try:
            with self._lock:
                return self._connection.execute(clause, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _unreadable(f"manifest '{self.path}'", error) from error

    def _records(self, where: str, values: Sequence[Any]) -> list[RecordRow]:
        return [
            RecordRow(block, version, file, _checksums(text), steps, born, died, offset, nbytes, _sparsity(*sparse))
            for block, version, born, died, file, text, steps, offset, nbytes, *sparse in self._rows(
                "records", f"WHERE {where} ORDER BY block, born", values
            )
        ]

    def living(self, blocks: Sequence[int]) -> list[RecordRow]:
        """The row that lives now of each of these records, some hundred at most, that has one."""
        return self._records(f"died IS NULL AND block IN ({','.join('?' * len(blocks))})", blocks) if blocks else []

    def in_shared(self, file: str) -> list[RecordRow]:
        """The rows that point into a shared file, in order of block."""
        return self._records("offset > 0 AND file = ?", (file,))

    def shared(self, serial: int = 0) -> list[SharedRow]:
        """The files that records share, from a serial number on."""
        return self._shared("WHERE serial >= ? ORDER BY serial", (serial,))

    def shared_checksum(self) -> str:
        """Over all that is said of shared files."""
        return xxhash.xxh3_64_hexdigest(_json([_shared_values(row) for row in self.shared()]).encode())

    def life(self) -> LifeRow:
        """The figures of the last commit; none in a store that was just made."""
        rows = self._rows("life")
        return LifeRow(rows[0][0], json.loads(rows[0][1])) if rows else LifeRow()

    def last_serial(self) -> int:
        """The serial number of the newest shared file; 0 if there is none."""
        return self._number("SELECT COALESCE(MAX(serial), 0) FROM shared")

    def _number(self, clause: str, values: Sequence[Any] = ()) -> int:
        try:
            with self._lock:
                return int(self._connection.execute(clause, values).fetchone()[0])
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            raise _unreadable(f"manifest '{self.path}'", error) from error

    def dead_files(self) -> list[SharedRow]:
        """Shared files that nothing points to."""
        return self._shared("WHERE 2 * live_bytes < nbytes - said_nbytes AND live_bytes = 0 ORDER BY serial")

    def mostly_dead_files(self, count: int, wanted: Callable[[str], bool] = lambda file: True) -> list[SharedRow]:
        """Shared files of which less than half is live, but something is; those of which least is live first. `wanted` is
        asked by name: those of other ranks must not stand before a rank's own."""
        clause = "SELECT file FROM shared WHERE 2 * live_bytes < nbytes - said_nbytes AND live_bytes > 0"
        names = self._values(f"{clause} ORDER BY 1.0 * live_bytes / (nbytes - said_nbytes), serial", ())
        found = islice((name for (name,) in names if wanted(name)), count)
        return [row for name in found for row in self._shared("WHERE file = ?", (name,))]

    def _shared(self, clause: str, values: Sequence[Any] = ()) -> list[SharedRow]:
        return [SharedRow(*row) for row in self._rows("shared", clause, values)]

    def publish(
        self,
        step: int,
        progress: dict[str, Any],
        records: Sequence[RecordRow],
        *,
        ranks: int = 1,
        name: str = "",
        keep_before: bool = False,
        shared: Sequence[SharedRow] = (),
        moves: Sequence[Move] = (),
        gone: Sequence[str] = (),
        life: LifeRow | None = None,
    ) -> CommitRow:
        """Make a commit of these new versions: everything or, if this fails, nothing.

        Args:
            keep_before: the commit before it can still be gone back to (`undo_last`), until the next one.
            shared: new files that hold some of them.
            moves: records whose bytes were copied into such files.
            gone: dead shared files that are no more.
            life: the figures to be kept from now on.
        """
        with self._transaction():
            last = self.last_commit().number
            number, held = self._next()
            self._forget_rows(last, held)
            kept = [*held, last] if keep_before else held
            for file in gone:
                self._connection.execute("DELETE FROM shared WHERE file = ? AND live_bytes = 0", (file,))
            for row in shared:
                _insert(self._connection, "shared", _shared_values(row))
            self._retire([record.block for record in records], number, kept)
            for record in records:
                self._insert(record, number, new=True)
            for move in moves:
                self._move(move)
            if life is not None:
                self._connection.execute("DELETE FROM life")
                _insert(self._connection, "life", (life.written_bytes, _json(life.session)))
            return self._seal(CommitRow(number, step, progress, ranks, name), kept)

    def undo_last(self) -> CommitRow:
        """Go back to the commit before the last one, which was published with `keep_before`."""
        with self._transaction():
            number = self.last_commit().number
            before = self.commit_before(number)
            assert before is not None, "only a commit that kept the one before can be undone"
            for row in self._records("born = ?", (number,)):
                self._delete(row)
            for row in self._records("died = ?", (number,)):
                self._delete(row)
                self._insert(row, row.born)
            self._connection.execute("DELETE FROM commits WHERE number = ?", (number,))
            return before

    def copied(self) -> bytes:
        """The whole manifest, as it may be written to another file."""
        with self._lock:
            return self._connection.serialize()

    def _forget_rows(self, died: int, held: Sequence[int]) -> None:
        """Rows that were kept only to go back before the commit at which they died."""
        for row in self._records("died = ?", (died,)):
            if not any(row.lives_at(number) for number in held):
                self._delete(row)

    def restore(self, name: str) -> CommitRow:
        """Make a commit that holds what a snapshot holds; what only the last commit held is forgotten.

        Raises:
            StoreError: there is no such snapshot.
        """
        with self._transaction():
            wanted = self.commit_row(self.snapshot(name))
            number, held = self._next()
            # only what was written since, or has died since, differs
            now = {row.block for row in self._records("died IS NULL AND born > ?", (wanted.number,))}
            died = self._records("died > ? AND born <= ?", (wanted.number, wanted.number))
            then = {row.block: row for row in died}
            self._retire(sorted(now | then.keys()), number, held)
            for row in then.values():
                self._insert(row, number)
            return self._seal(CommitRow(number, wanted.step, wanted.progress), held)

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

    def remove_snapshot(self, name: str) -> list[RecordRow]:
        """Forget a snapshot, and the rows that it alone held; gives those whose bytes no other row points to.

        Raises:
            StoreError: there is no such snapshot.
        """
        with self._transaction():
            number = self.snapshot(name)
            self._connection.execute("DELETE FROM snapshots WHERE name = ?", (name,))
            held = sorted(set(self.snapshots().values()))
            freed: list[RecordRow] = []
            for row in self._records("died > ? AND born <= ?", (number, number)):
                if any(row.lives_at(other) for other in held):
                    continue
                self._delete(row)
                if all(other.place != row.place for other in self.records(row.block, row.block + 1)):
                    freed.append(row)
            self._forget_commits((self.last_commit().number, *held))
            return freed

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together or, after an error, not at all."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            self._live.clear()
            try:
                yield
                self._keep_live_bytes()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _next(self) -> tuple[int, list[int]]:
        """The number of the commit to be made, and those of the commits that snapshots hold."""
        return self.last_commit().number + 1, sorted(set(self.snapshots().values()))

    def _seal(self, commit: CommitRow, held: Sequence[int]) -> CommitRow:
        """Writes the commit's own row and forgets those that nothing holds any more."""
        _insert(self._connection, "commits", (commit.number, commit.step, _json(commit.packed())))
        self._forget_commits((commit.number, *held))
        return commit

    def _forget_commits(self, kept: Sequence[int]) -> None:
        self._connection.execute(f"DELETE FROM commits WHERE number NOT IN ({','.join('?' * len(kept))})", kept)

    def _retire(self, blocks: Sequence[int], number: int, held: Sequence[int]) -> None:
        """The living rows of these die at this commit; one is kept only if a snapshot holds it."""
        for start in range(0, len(blocks), _ASKED_AT_ONCE):
            for row in self.living(blocks[start : start + _ASKED_AT_ONCE]):
                self._delete(row, alone=not held)
                if any(row.born <= snapshot < number for snapshot in held):
                    self._insert(row, row.born, number)

    def _insert(self, row: RecordRow, born: int, died: int | None = None, *, new: bool = False) -> None:
        """A row of `records`; its bytes are live from now on, unless they are not new and another one points to them."""
        if row.offset and (new or not self._has_place(row)):
            self._live[row.file] += row.nbytes
        _insert_record(self._connection, row, born, died, sparse=self._sparse)

    def _delete(self, row: RecordRow, *, alone: bool = False) -> None:
        """`alone`: it is the only row of its record."""
        self._connection.execute("DELETE FROM records WHERE block = ? AND born = ?", (row.block, row.born))
        if row.offset and (alone or not self._has_place(row)):
            self._live[row.file] -= row.nbytes

    def _has_place(self, row: RecordRow) -> bool:
        """Whether a row points to these bytes: one of the same record, as places belong to one alone."""
        clause = "SELECT 1 FROM records WHERE block = ? AND file = ? AND offset = ?"
        return self._connection.execute(clause, (row.block, *row.place)).fetchone() is not None

    def _move(self, move: Move) -> None:
        for row in self._records("block = ?", (move.block,)):
            if row.place == move.old:
                self._delete(row)
                file, offset = move.new
                self._insert(replace(row, file=file, offset=offset), row.born, row.died)

    def _keep_live_bytes(self) -> None:
        for file, change in self._live.items():
            if not change:
                continue
            rows = self._shared("WHERE file = ?", (file,))
            if not rows:
                raise DamagedRecordError(
                    f"manifest '{self.path}': expected shared file {file!r}, which records lie in, in table shared, found "
                    "nothing; restore the manifest from a copy"
                )
            self._connection.execute("DELETE FROM shared WHERE file = ?", (file,))
            after = replace(rows[0], live_bytes=rows[0].live_bytes + change)
            _insert(self._connection, "shared", _shared_values(after))

    def _rows(self, table: str, clause: str = "", values: Sequence[Any] = ()) -> list[Any]:
        """Rows without their checksum, after comparing it."""
        sparse = ("sparsity",) if table == "records" and self._sparse else ()
        columns = ", ".join((*_COLUMNS[table], *sparse, "checksum"))
        try:
            with self._lock:
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


def _insert(connection: sqlite3.Connection, table: str, values: Sequence[Any]) -> None:
    marks = ",".join("?" * (len(values) + 1))
    connection.execute(f"INSERT INTO {table} VALUES ({marks})", (*values, _row_checksum(table, values)))


def _insert_record(
    connection: sqlite3.Connection, record: RecordRow, born: int, died: int | None = None, *, sparse: bool
) -> None:
    """A record's row, alive from commit `born` on; `sparse` is whether the table says how sparse versions are."""
    assert sparse or not record.sparsity, "only a store that was made with sparse parameters has sparse versions"
    text = _json({part: f"{value:016x}" for part, value in record.checksums.items()})
    facts: tuple[Any, ...] = (record.file, text, record.optimizer_steps, record.offset, record.nbytes)
    if sparse:
        facts += (_json(sparsity_to_json(record.sparsity)) if record.sparsity else None,)
    _insert(connection, "records", (record.block, record.version, born, died, *facts))


def _shared_values(row: SharedRow) -> tuple[Any, ...]:
    return (row.serial, row.file, row.nbytes, row.header_nbytes, row.said_nbytes, row.header_checksum, row.live_bytes)


def _row_checksum(table: str, values: Sequence[Any]) -> str:
    """Over the values as JSON; one that no JSON has (a blob where text was) is spelled so that nothing equals it."""
    text = json.dumps([table, *values], sort_keys=True, separators=(",", ":"), default=repr)
    return xxhash.xxh3_64_hexdigest(text.encode())


def _json(value: Any) -> str:
    """One spelling for equal values, so that checksums can be taken over it. NaN has no place in JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sparsity(text: str | None = None) -> Sparsity:
    return DENSE if text is None else sparsity_from_json(json.loads(text))


def _checksums(text: str) -> dict[str, int]:
    return {part: int(value, 16) for part, value in json.loads(text).items()}
