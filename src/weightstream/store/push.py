"""Push: bring a target to the last commit of a store.

Records that the target does not have yet are sent, then an index that names them all, then what no index names any more
is removed (`pushed.py`). So what is at the target is at every instant a whole commit, and a push that was cut short goes
on with what it had sent.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightstream.errors import StoreError, StoreMismatchError
from weightstream.store.holding import Held, WriterWentOnError, held
from weightstream.store.pushed import (
    FILES,
    FOLDERS,
    SEGMENTS,
    Index,
    PushedFile,
    PushedRecord,
    indexes,
    newest,
    serial_of,
    strangers,
    unnamed,
)
from weightstream.store.segments import RecordBuffer
from weightstream.store.target import Counted, Place, Say, Target

_ATTEMPTS = 5
_SAME = ("id", "contract", "precision", "optimizer", "chunk_bytes")


def push(
    path: str | os.PathLike[str], target: Place, *, replace: bool = False, say: Say | None = None
) -> dict[str, Any]:
    """Bring a target to the last commit of a store; gives what was sent, in records and bytes.

    The store is only read, and may be trained meanwhile. Blocks that were never updated take nothing. One push at a
    time may go to a target.

    Args:
        target: a directory or an fsspec URL; new, empty, or pushed to before from this store.
        replace: also if the target holds a later step, or another course of the same store: it is lost.

    Raises:
        StoreMismatchError: the target holds another store, or a later step without `replace`.
        StoreError: the target holds something else, or cannot be written.
        DamagedRecordError: a record of the store, or the target's index, is damaged.
    """
    place = Target.of(target)
    for _ in range(_ATTEMPTS):
        with held(Path(path)) as commit:
            try:
                return _push(commit, place, replace, say)
            except WriterWentOnError as error:
                reason = error
    raise StoreError(
        f"store '{path}': its writer used files again faster than they were sent, {_ATTEMPTS} times ({reason}); its "
        "file system has no hard links, or not the room to hold a commit: push while nothing trains; what was sent "
        "so far is not sent again"
    )


def _push(commit: Held, target: Target, replace: bool, say: Say | None) -> dict[str, Any]:
    started = time.monotonic()
    if found := strangers(target):
        raise StoreError(
            f"target '{target.name}': expected a new or empty place, or one that a store was pushed to, found "
            f"{', '.join(found[:3])}{' and more' if len(found) > 3 else ''}; give another target"
        )
    before = newest(target)
    serial = max(map(serial_of, indexes(target)), default=0)
    layouts = commit.store.layouts
    records = [PushedRecord.of(row, layouts.of(row.block, row.sparsity).image_nbytes) for row in commit.records]
    paths = _companions(commit.store.path / FILES)
    files = [PushedFile.of(name, path.read_bytes()) for name, path in paths.items()]
    index = Index(serial + 1, commit.commit, commit.meta, commit.blocks, commit.families, records, files)
    if before is not None:
        _require_successor(target, before, index, replace)
    target.prepare(FOLDERS)

    there = target.sizes(SEGMENTS) | target.sizes(FILES)
    missing = [n for n, record in enumerate(records) if there.get(record.object) != record.nbytes]
    counted = Counted("sent", sum(records[n].nbytes for n in missing), say)
    buffer = RecordBuffer(max((records[n].nbytes for n in missing), default=0))
    try:
        for n in missing:
            commit.read(commit.records[n], buffer)
            counted.add(target.write(records[n].object, [buffer.image]))
    finally:
        buffer.close()
    for file in files:
        if there.get(file.object) != file.nbytes:
            counted.add(target.write(file.object, [paths[file.path].read_bytes()]))
    index_bytes = 0
    if before is not None and before.same_commit(index):
        index = before
    else:
        _check_arrived(target, index, serial)
        index_bytes = target.write(index.name, [index.to_bytes()])
        if not index.same_commit(Index.from_bytes(target.read(index.name), f"target '{target.name}': {index.name}")):
            raise StoreError(f"target '{target.name}': {index.name} reads back as another commit; push again")
    leftovers = unnamed(target, index)
    for name in leftovers:
        target.remove(name)
    return {
        "target": target.name,
        "step": index.commit.step,
        "commit": index.commit.number,
        "records": len(records),
        "record_bytes": sum(record.nbytes for record in records),
        "sent_records": len(missing),
        "sent_bytes": counted.done_bytes + index_bytes,
        "index_bytes": index_bytes,
        "removed_objects": len(leftovers),
        "seconds": round(time.monotonic() - started, 3),
    }


def _companions(folder: Path) -> dict[str, Path]:
    """The files of an imported store's folder, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _require_successor(target: Target, before: Index, index: Index, replace: bool) -> None:
    """Refuse to put another store, or an earlier state, in the place of what a target holds."""
    what = f"target '{target.name}' holds step {before.commit.step}"
    differing = [key for key in _SAME if before.meta.get(key) != index.meta.get(key)]
    there, here = (_flat({key: entry.meta.get(key) for key in _SAME}) for entry in (before, index))
    if differing or _split(before) != _split(index):
        said = [
            f"{key}: the target has {there.get(key)!r}, this store has {here.get(key)!r}"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ] or [f"blocks: the target has {len(before.blocks)}, this store has {len(index.blocks)}, split differently"]
        raise StoreMismatchError(f"{what} of another store:\n  " + "\n  ".join(said[:8]) + "\ngive another target")
    if replace:
        return
    if index.commit.step < before.commit.step:
        raise StoreMismatchError(
            f"{what}, this store is at step {index.commit.step}; pull it into a new directory to go on from there, "
            "give another target, or put the earlier step in its place with replace=True (--replace)"
        )
    ours = {record.block: record for record in index.records}
    if index.commit.step == before.commit.step and any(ours.get(record.block) != record for record in before.records):
        raise StoreMismatchError(
            f"{what} with other contents than this store has at that step; give another target, or put this store in "
            "its place with replace=True (--replace)"
        )


def _split(index: Index) -> list[list[Any]]:
    """What the records are of; JSON has lists only."""
    return [list(entry) for entry in (*index.blocks, *index.families)]


def _check_arrived(target: Target, index: Index, serial: int) -> None:
    """Just before an index is written: all that it will name is there, and nobody else has pushed."""
    there = target.sizes(SEGMENTS) | target.sizes(FILES)
    lost = [name for name, nbytes in index.objects.items() if there.get(name) != nbytes]
    if lost or max(map(serial_of, indexes(target)), default=0) != serial:
        found = f"{lost[0]} is not there" if lost else "there is a newer index"
        raise StoreError(
            f"target '{target.name}': {found}, though this push has not ended; another one is at work: push again "
            "when it has ended, one at a time"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
