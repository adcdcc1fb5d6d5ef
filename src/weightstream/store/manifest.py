"""The manifest: which file holds which version of which record, in SQLite.

One transaction is one commit. A row of `records` lives from the commit that published it (`born`) until the one that
replaced it (`died`), so a snapshot is nothing but the number of a commit: it holds what lived then. Commits are
numbered by themselves rather than by training step, since a restored store goes through a step twice. A row of `shared`
is a file in which records of families lie, with the bytes of it that rows of `records` point to: kept with every
change, so that nobody has to look through the records for what is dead. What rows are made of is `rows.py`, the file
that holds them `tables.py`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.facts import SPARSE
from weightstream.store.rows import CommitRow, LifeRow, Move, RecordRow, SharedRow
from weightstream.store.tables import Tables, json_text

META = ("id", "made_by", "contract", "precision", "optimizer", "chunk_bytes", "panel_elements", "counts")
"""What table meta always has."""
_ASKED_AT_ONCE = 500
"""Values in one statement."""
_NO_RECORD = 2**63 - 1
"""SQLite's largest integer: families may have records up to just below it."""


class Manifest:
    """The catalogue of one store. Methods may be called from any thread, one at a time."""

    def __init__(self, tables: Tables) -> None:
        self.path, self._tables = tables.path, tables
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
        blocks, families = list(blocks), list(families)
        sparse = any(SPARSE in facts for _, _, facts in blocks)

        def fill(tables: Tables) -> None:
            counts = {"blocks": len(blocks), "families": len(families)}
            for key, value in {**meta, "counts": counts}.items():
                tables.insert("meta", (key, json_text(value)))
            for block, name, facts in blocks:
                tables.insert("blocks", (block, name, json_text(facts)))
            for first, name, count, facts in families:
                tables.insert("families", (first, name, count, json_text(facts)))
            live: Counter[str] = Counter()
            for record in records:
                tables.insert("records", record.values(0, sparse=sparse))
                live[record.file] += record.nbytes
            for file in shared:
                tables.insert("shared", replace(file, live_bytes=live[file.file]).values)
            tables.insert("commits", (0, step, json_text(progress or {})))
            tables.insert("life", (0, "{}"))

        Tables.create(path, fill, sparse=sparse)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> "Manifest":
        """Open an existing manifest.

        Raises:
            StoreError: it is no manifest of this format.
        """
        return cls(Tables.open(path, writable=writable))

    def at_one_moment(self) -> AbstractContextManager[None]:
        """Reads inside see one commit, whatever a writer beside this process does meanwhile."""
        return self._tables.at_one_moment()

    def meta(self) -> dict[str, Any]:
        """What was fixed when the store was made.

        Raises:
            DamagedRecordError: some of it is gone, or some blocks or families are.
        """
        found = {key: json.loads(value) for key, value in self._tables.rows("meta")}
        missing = [key for key in META if key not in found]
        if missing:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected {missing[0]!r} in table meta, found nothing; restore the manifest "
                "from a copy"
            )
        for table, count in found["counts"].items():
            rows = len(self._tables.rows(table))
            if rows != count:
                raise DamagedRecordError(
                    f"manifest '{self.path}': expected {count} rows in table {table}, found {rows}; restore the "
                    "manifest from a copy"
                )
        return found

    def blocks(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Index, name and facts of every block, in order of index."""
        return [
            (block, name, json.loads(facts)) for block, name, facts in self._tables.rows("blocks", "ORDER BY block")
        ]

    def families(self) -> list[tuple[int, str, int, dict[str, Any]]]:
        """First index, name, number of records and template of every family, in order."""
        rows = self._tables.rows("families", "ORDER BY first")
        return [(first, name, count, json.loads(facts)) for first, name, count, facts in rows]

    def last_commit(self) -> CommitRow:
        """The newest commit."""
        rows = self._tables.rows("commits", "ORDER BY number DESC LIMIT 1")
        if not rows:
            raise DamagedRecordError(
                f"manifest '{self.path}': expected a commit, found none; restore the manifest from a copy"
            )
        return CommitRow.of(*rows[0])

    def commit_before(self, number: int) -> CommitRow | None:
        """The commit before the one of that number, if it is kept."""
        rows = self._tables.rows("commits", "WHERE number = ?", (number - 1,))
        return CommitRow.of(*rows[0]) if rows else None

    def commit_row(self, number: int) -> CommitRow:
        """One commit by its number; the last one and those that snapshots name are kept."""
        rows = self._tables.rows("commits", "WHERE number = ?", (number,))
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
        self._tables.check()
        for number in self.snapshots().values():
            self.commit_row(number)

    def snapshots(self) -> dict[str, int]:
        """Name → number of the commit that the snapshot holds."""
        return dict(self._tables.rows("snapshots", "ORDER BY number, name"))

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
        return self._tables.number(clause, (first, stop))

    def existing(self, blocks: Sequence[int]) -> set[int]:
        """Those of these records that have a row that lives now."""
        found = set[int]()
        for start in range(0, len(blocks), _ASKED_AT_ONCE):
            some = blocks[start : start + _ASKED_AT_ONCE]
            clause = f"SELECT block FROM records WHERE died IS NULL AND block IN ({','.join('?' * len(some))})"
            found.update(block for (block,) in self._tables.select(clause, some))
        return found

    def first_living(self, first: int, stop: int) -> int | None:
        """The first record of a range that has a row that lives now."""
        clause = "SELECT block FROM records WHERE block >= ? AND block < ? AND died IS NULL ORDER BY block LIMIT 1"
        return next((block for (block,) in self._tables.select(clause, (first, stop))), None)

    def _records(self, where: str, values: Sequence[Any]) -> list[RecordRow]:
        rows = self._tables.rows("records", f"WHERE {where} ORDER BY block, born", values)
        return [RecordRow.of(row) for row in rows]

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
        return xxhash.xxh3_64_hexdigest(json_text([row.values for row in self.shared()]).encode())

    def life(self) -> LifeRow:
        """The figures of the last commit; none in a store that was just made."""
        rows = self._tables.rows("life")
        return LifeRow(rows[0][0], json.loads(rows[0][1])) if rows else LifeRow()

    def last_serial(self) -> int:
        """The serial number of the newest shared file; 0 if there is none."""
        return self._tables.number("SELECT COALESCE(MAX(serial), 0) FROM shared")

    def dead_files(self) -> list[SharedRow]:
        """Shared files that nothing points to."""
        return self._shared("WHERE 2 * live_bytes < nbytes - said_nbytes AND live_bytes = 0 ORDER BY serial")

    def mostly_dead_files(self, count: int, wanted: Callable[[str], bool] = lambda file: True) -> list[SharedRow]:
        """Shared files of which less than half is live, but something is; those of which least is live first. `wanted` is
        asked by name: those of other ranks must not stand before a rank's own."""
        clause = "SELECT file FROM shared WHERE 2 * live_bytes < nbytes - said_nbytes AND live_bytes > 0"
        names = self._tables.select(f"{clause} ORDER BY 1.0 * live_bytes / (nbytes - said_nbytes), serial", ())
        found = islice((name for (name,) in names if wanted(name)), count)
        return [row for name in found for row in self._shared("WHERE file = ?", (name,))]

    def _shared(self, clause: str, values: Sequence[Any] = ()) -> list[SharedRow]:
        return [SharedRow(*row) for row in self._tables.rows("shared", clause, values)]

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
                self._tables.delete("shared", "WHERE file = ? AND live_bytes = 0", (file,))
            for row in shared:
                self._tables.insert("shared", row.values)
            self._retire([record.block for record in records], number, kept)
            for record in records:
                self._insert(record, number, new=True)
            for move in moves:
                self._move(move)
            if life is not None:
                self._tables.delete("life")
                self._tables.insert("life", (life.written_bytes, json_text(life.session)))
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
            self._tables.delete("commits", "WHERE number = ?", (number,))
            return before

    def copied(self) -> bytes:
        """The whole manifest, as it may be written to another file."""
        return self._tables.copied()

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
        with self._tables.lock:
            if name in self.snapshots():
                raise StoreError(
                    f"store '{self.path.parent}' already has a snapshot {name!r}; delete it first or take another name"
                )
            number = self.last_commit().number
            self._tables.insert("snapshots", (name, number))
        return number

    def remove_snapshot(self, name: str) -> list[RecordRow]:
        """Forget a snapshot, and the rows that it alone held; gives those whose bytes no other row points to.

        Raises:
            StoreError: there is no such snapshot.
        """
        with self._transaction():
            number = self.snapshot(name)
            self._tables.delete("snapshots", "WHERE name = ?", (name,))
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
        self._tables.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together or, after an error, not at all."""
        with self._tables.transaction():
            self._live.clear()
            yield
            self._keep_live_bytes()

    def _next(self) -> tuple[int, list[int]]:
        """The number of the commit to be made, and those of the commits that snapshots hold."""
        return self.last_commit().number + 1, sorted(set(self.snapshots().values()))

    def _seal(self, commit: CommitRow, held: Sequence[int]) -> CommitRow:
        """Writes the commit's own row and forgets those that nothing holds any more."""
        self._tables.insert("commits", (commit.number, commit.step, json_text(commit.packed())))
        self._forget_commits((commit.number, *held))
        return commit

    def _forget_commits(self, kept: Sequence[int]) -> None:
        self._tables.delete("commits", f"WHERE number NOT IN ({','.join('?' * len(kept))})", kept)

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
        self._tables.insert("records", row.values(born, died, sparse=self._tables.sparse))

    def _delete(self, row: RecordRow, *, alone: bool = False) -> None:
        """`alone`: it is the only row of its record."""
        self._tables.delete("records", "WHERE block = ? AND born = ?", (row.block, row.born))
        if row.offset and (alone or not self._has_place(row)):
            self._live[row.file] -= row.nbytes

    def _has_place(self, row: RecordRow) -> bool:
        """Whether a row points to these bytes: one of the same record, as places belong to one alone."""
        return self._tables.has("records", "WHERE block = ? AND file = ? AND offset = ?", (row.block, *row.place))

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
            self._tables.delete("shared", "WHERE file = ?", (file,))
            after = replace(rows[0], live_bytes=rows[0].live_bytes + change)
            self._tables.insert("shared", after.values)
