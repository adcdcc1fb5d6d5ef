"""Snapshots: what they hold, how it is given up, and how a store goes back to it.

All of it happens between two commits, in their thread (`Commits.between`).
"""

import sqlite3
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightstream.errors import StoreError
from weightstream.store.futures import gather
from weightstream.store.members import Noted, folder_of
from weightstream.store.records import is_elsewhere, slot_of
from weightstream.store.rows import RecordRow

if TYPE_CHECKING:
    from weightstream.store.versions import Versions


def add(versions: "Versions", name: str) -> None:
    """Hold the files of the last commit."""
    with _changing(versions, f"snapshot {name!r}"):
        versions.shared.manifest.add_snapshot(name)
    with versions.shared.lock:
        for _, state in versions.records.in_memory():
            if state.committed.slot is not None and not state.committed.offset:
                state.held.add(state.committed.slot)


def remove(versions: "Versions", name: str) -> int:
    """Remove the files that nothing else holds; gives their bytes."""
    nbytes, folders = 0, set[Path]()
    rows = list[RecordRow]()
    with Noted() as removed, _changing(versions, f"deleting snapshot {name!r}"):
        rows = versions.shared.manifest.remove_snapshot(name)
    # no file goes before all ranks have forgotten it: whoever opens the store next may take any rank's word
    versions.members.check(versions.members.exchange(removed.reason))
    for row in rows:
        if row.offset:
            nbytes += row.nbytes
            continue
        path = versions.shared.segments / row.file
        if not _is_ours(versions, row.file) or not path.exists():
            continue
        nbytes += path.stat().st_size
        folders.add(path.parent)
        while (users := _unlink(versions, row.block, slot_of(row.file, versions.members.folder), path)) is not None:
            users.exception()  # a reader that began before still has its file
    for folder in folders:
        versions.shared.disk.device.sync_directory(folder)
    _hold(versions, set(versions.shared.manifest.snapshots().values()))
    with versions.shared.lock:
        versions.shared.collect()
    return nbytes


def restore(versions: "Versions", name: str) -> None:
    """Make what a snapshot holds the newest version of every record."""
    with _changing(versions, f"going back to snapshot {name!r}"):
        commit = versions.shared.manifest.restore(name)
    with versions.shared.lock:
        for index, state in versions.records.in_memory():
            rows = [row for row in versions.shared.manifest.records(index, index + 1) if row.died is None]
            state.go_to(state.entry_of(rows[0] if rows else None))
            for pin in state.pinned.values():
                if pin.entry is not state.newest:
                    pin.forget()
        versions.commits.restored(commit)
        versions.shared.collect()


@contextmanager
def _changing(versions: "Versions", what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(
            f"store '{versions.path}': {what} failed: {error}; the commit of step {versions.step} is whole, make room on the "
            "disk and try again"
        ) from error


def _is_ours(versions: "Versions", file: str) -> bool:
    """Whether this rank removes a file that nothing points to: its own, and the first one those of ranks that are no
    more."""
    slot = slot_of(file, versions.members.folder)
    active = {folder_of(rank) for rank in range(versions.members.count)}
    return not is_elsewhere(slot) or (versions.members.rank == 0 and file.rpartition("/")[0] not in active)


def _unlink(versions: "Versions", index: int, slot: str, path: Path) -> "Future[Any] | None":
    """Removes a file that nothing points to; gives what still uses it instead, if anything does."""
    with versions.shared.lock:  # no version may take the name meanwhile
        state = versions.records[index]
        users = state.users(slot)
        if users:
            return gather(users)
        versions.shared.disk.device.unlink(path)
        state.forget(slot)
    return None


def _hold(versions: "Versions", numbers: Collection[int]) -> None:
    """Notes which files of the records in memory the snapshots of these commits hold."""
    with versions.shared.lock:
        for index, state in versions.records.in_memory():
            if state.held:
                rows = versions.shared.manifest.records(index, index + 1)
                state.held = {
                    slot_of(row.file, versions.members.folder) for row in rows if any(row.lives_at(n) for n in numbers)
                }
