"""What a commit publishes, and in which order that comes to be on the medium.

Commits are made in a thread of their own, one at a time and in order of issue; each waits for its writes, and for the one
before it. Everything that a transaction will point to is on the medium before it begins. With several memory ranks each
publishes the rows of all.
"""

import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, TypeVar

from weightstream.errors import StoreError
from weightstream.store.compaction import Copied, compact
from weightstream.store.directory import SHARED
from weightstream.store.futures import chain, gather, new_future
from weightstream.store.members import Members, Noted
from weightstream.store.records import Entry
from weightstream.store.rows import CommitRow, Move, RecordRow, SharedRow
from weightstream.store.shared import Batch
from weightstream.trace.recorder import NO_LOG, Log

if TYPE_CHECKING:
    from weightstream.store.versions import Versions

T = TypeVar("T")


class Commits:
    """The commits of one open store. Methods without an underscore may be called from any thread.

    Args:
        last: the one at which the store is open.
    """

    def __init__(self, versions: "Versions", members: Members, last: CommitRow) -> None:
        self.step, self.progress = last.step, last.progress
        self.log: Log = NO_LOG
        self.under_way: list[Future[None]] = []
        """In order."""
        self._versions, self._shared, self._members = versions, versions.shared, members
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-commit")
        self._doomed: set[Future[None]] = set()  # those under way that followed one that failed
        self._failure: BaseException | None = None
        self._names_synced = False  # a process that was killed may have left names that are not on the medium yet

    def ask(self, step: int, progress: dict[str, Any]) -> "Future[None]":
        """Publish the newest version of every record; later writes belong to the next commit."""
        out: Future[None] = new_future()
        with self._shared.lock:
            self.check_usable()
            published, batch = self._versions.take_changed()
            waits = [entry.ready for entry in published.values()] + self.under_way[-1:]
            self.under_way.append(out)
            self._versions.track(out)
        return chain(waits, lambda: self._thread.submit(self._commit, out, step, progress, published, batch), out)

    def forgive(self) -> bool:
        """Whether one has failed. Then those under way fail, too, as what they were to publish builds on it; and others
        may be asked for."""
        failed = self._failure is not None
        if failed:
            self._doomed.update(self.under_way)
        if self._members.count == 1:  # several ranks may hold different commits: only an opening levels them
            self._failure = None
        return failed

    def between(self, work: Callable[[], T]) -> T:
        """Do something between two commits, in their thread."""
        return self._thread.submit(work).result()

    def restored(self, commit: CommitRow) -> None:
        """The store has gone back to another commit."""
        self.step, self.progress = commit.step, commit.progress

    def close(self) -> None:
        """Ends the thread once all that was asked for is done."""
        self._thread.shutdown(wait=True)

    def check_usable(self) -> None:
        if self._failure is not None:
            remedy = f"discard() goes back to step {self.step}"
            if self._members.count > 1:
                remedy = (
                    "close the store on all ranks and open it anew, which goes back to the last commit that all have"
                )
            raise StoreError(
                f"store '{self._versions.path}': a commit failed ({self._failure}); {remedy}"
            ) from self._failure

    # In the thread of commits, one at a time.

    def _commit(
        self,
        out: "Future[None]",
        step: int,
        progress: dict[str, Any],
        published: Mapping[int, Entry],
        batch: Batch,
    ) -> None:
        began_s = time.perf_counter()
        try:
            copied, shared, gone = self._publish(out, step, progress, published, batch)
        except BaseException as error:
            with self._shared.lock:
                self._failure = error
                self._versions.changed.update(published)
                self._shared.failed(batch)
                self._end_commit(out, published)
            raise
        with self._shared.lock:
            self._move(copied)
            for index, entry in published.items():
                self._versions.records[index].committed = entry
            for _, state in self._versions.records.in_memory():
                state.doubtful.clear()
            self.step, self.progress = step, progress
            self._shared.committed(batch, shared, gone)
            self._end_commit(out, published)
        self.log.note("commit", step, "manifest", began_s, time.perf_counter(), 0)

    def _end_commit(self, out: "Future[None]", published: Mapping[int, Entry]) -> None:
        self.under_way.remove(out)
        self._doomed.discard(out)
        for index, entry in published.items():
            self._versions.records[index].committing.remove(entry)

    def _publish(
        self,
        out: "Future[None]",
        step: int,
        progress: dict[str, Any],
        published: Mapping[int, Entry],
        batch: Batch,
    ) -> tuple[Copied, list[SharedRow], list[str]]:
        """Everything that the transaction will point to is on the medium before it begins."""
        if self._failure is not None or out in self._doomed:
            raise StoreError(
                f"store '{self._versions.path}': step {step} follows a commit that failed"
            ) from self._failure
        if self._members.count > 1:
            return self._publish_together(step, progress, published, batch)
        for entry in published.values():
            entry.ready.result()
        with self._committing(step):
            copied = compact(self._versions, batch, published)
            shared = self._shared.seal(batch, [*published.values(), *copied.entries]).result()
            rows = [self._row(index, entry) for index, entry in published.items()]
            gone = self._sync_names(published, batch)
            life = self._versions.session.row(self._versions.pinned_bytes, step, self._versions.pace.to_json())
            batch.asked = True
            with self._doubting(published):
                self._shared.manifest.publish(
                    step, progress, rows, shared=shared, moves=copied.moves, gone=gone, life=life
                )
        return copied, shared, gone

    def _publish_together(
        self, step: int, progress: dict[str, Any], published: Mapping[int, Entry], batch: Batch
    ) -> tuple[Copied, list[SharedRow], list[str]]:
        """With other memory ranks: each publishes the rows of all, and keeps the commit before until all have done so."""
        together, name = self._members, uuid.uuid4().hex
        copied, shared, rows, gone = Copied(), list[SharedRow](), list[RecordRow](), list[str]()
        with Noted() as ready:
            for entry in published.values():
                entry.ready.result()
            with self._committing(step):
                copied = compact(self._versions, batch, published)
                shared = self._shared.seal(batch, [*published.values(), *copied.entries]).result()
                rows = [self._row(index, entry) for index, entry in published.items()]
                gone = self._sync_names(published, batch)
        own = [
            [row.to_json() for row in rows],
            [astuple(row) for row in shared],
            [astuple(m) for m in copied.moves],
            gone,
        ]
        told = together.exchange([ready.reason, name, own])
        self._members.check([reason for reason, _, _ in told])
        every: list[list[Any]] = [[each for *_, own in told for each in own[kind]] for kind in range(len(own))]
        rows, shared, gone = (
            [RecordRow.from_json(row) for row in every[0]],
            [SharedRow(*row) for row in every[1]],
            every[3],
        )
        moves = [Move(block, tuple(old), tuple(new)) for block, old, new in every[2]]
        batch.asked = True
        with Noted() as done_here, self._committing(step), self._doubting(published):
            life = self._versions.session.row(self._versions.pinned_bytes, step, self._versions.pace.to_json())
            self._shared.manifest.publish(
                step, progress, rows, ranks=together.count, name=told[0][1], keep_before=True, shared=shared,
                moves=moves, gone=gone, life=life,
            )  # fmt: skip
            self._hear_of_others(rows, moves, published)
        # until all have it, the files of the commit before are left alone
        self._members.check(together.exchange(done_here.reason))
        return Copied(moves, copied.entries), shared, gone

    def _hear_of_others(self, rows: Sequence[RecordRow], moves: Sequence[Move], published: Mapping[int, Entry]) -> None:
        """Records of families are as other ranks say, and nobody here reads any more where they have copied some away: they
        will use those files again."""
        with self._shared.lock:
            for row in rows:
                if (
                    row.offset
                    and row.block not in published
                    and (state := self._versions.records.known(row.block)) is not None
                ):
                    state.go_to(state.entry_of(row))
            self._move(Copied(list(moves)))
            left = {move.old[0] for move in moves if not self._shared.is_ours(move.old[0])}
            reading = [self._shared.readers_gone(file) for file in left]
        gather(reading).exception()

    @contextmanager
    def _doubting(self, published: Mapping[int, Entry]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._doubt(published)
            raise

    @contextmanager
    def _committing(self, step: int) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"store '{self._versions.path}': the commit of step {step} failed: {error}; the commit of step {self.step} is "
                "whole, make room on the disk and run again"
            ) from error

    def _row(self, index: int, entry: Entry) -> RecordRow:
        assert entry.slot is not None
        name = self._versions.file_name(index, entry.slot)
        nbytes = self._versions.layouts.parts_nbytes(index) if entry.offset else 0
        return RecordRow(
            index, entry.version, name, entry.checksums, entry.optimizer_steps, offset=entry.offset, nbytes=nbytes,
            sparsity=entry.sparsity,
        )  # fmt: skip

    def _move(self, copied: Copied) -> None:
        """Versions in memory are where the manifest now says; who reads one there holds its file."""
        for move in copied.moves:
            state = self._versions.records.known(move.block)
            for entry in (state.committed, state.newest, state.accepted, *state.committing) if state else ():
                if (entry.slot, entry.offset) == move.old:
                    entry.slot, entry.offset = move.new
                    for reader in entry.users():
                        self._shared.reading(move.new[0], reader)

    def _doubt(self, published: Mapping[int, Entry]) -> None:
        """SQLite may have written a commit that it reports as failed, and find it after a crash: until one succeeds, its
        files are left alone."""
        with self._shared.lock:
            for index, entry in published.items():
                if entry.slot is not None and not entry.offset:
                    self._versions.records[index].doubtful.add(entry.slot)

    def _sync_names(self, published: Mapping[int, Entry], batch: Batch) -> list[str]:
        """Names of these versions' files are on the medium, also of a file that an undone version was the first in.
        Gives the dead files whose names are off it for good."""
        with self._shared.lock:
            folders, gone = self._shared.pending(batch)
            unsynced = [
                (index, e.slot) for index, e in published.items() if e.slot in self._versions.records[index].unsynced
            ]
        names = {self._versions.slot_path(index, slot).parent for index, slot in unsynced if slot is not None}
        if not self._names_synced:
            names |= {self._shared.segments, self._shared.segments / self._members.folder}
            shared = self._shared.segments / self._members.folder / SHARED
            names |= {shared} if shared.is_dir() else set()
        try:
            for folder in sorted(folders | names):
                self._shared.disk.device.sync_directory(folder)
        except BaseException:
            with self._shared.lock:
                self._shared.again(folders)
            raise
        self._names_synced = True
        with self._shared.lock:
            for index, slot in unsynced:
                self._versions.records[index].unsynced -= {slot}
        return gone
