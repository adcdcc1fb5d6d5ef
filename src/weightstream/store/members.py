"""Several memory ranks, one store: which commit they have in common, and how a rank gets a manifest.

Every memory rank has a manifest of its own, and each lists all records, whoever wrote them: what a rank publishes it
tells the others before, so that any one manifest says where everything is. Rank 0's is in the store's folder, that of
rank k in `memory-k/`; segments of rank k are in `segments/rank-k/`.

A step is committed when all ranks hold it. Each keeps the commit before until then, so that opening can go back to the
newest one that all of its ranks have. Rank 0's manifest decides; a rank that has another (it was not there for some
steps, or is new) takes a copy of it. So a store opens with any number of ranks; records move as they are updated.
"""

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.errors import StoreError
from weightstream.store import directory
from weightstream.store.device import Device
from weightstream.store.manifest import Manifest
from weightstream.store.rows import CommitRow
from weightstream.store.syncing import sync_directory


@dataclass(frozen=True, slots=True)
class Members:
    """This memory rank among `count`; `exchange` gives a small JSON value of each, in order: all of them call it."""

    rank: int = 0
    count: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    def told(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's small JSON value, in order; what one cannot find out ends it for all, here.

        Raises:
            StoreError: what the first such rank met.
        """
        value, refused = None, None
        try:
            value = work()
        except StoreError as error:
            refused = error
        found = self.exchange([None if refused is None else str(refused), value])
        if refused is not None:
            raise refused
        for rank, (reason, _) in enumerate(found):
            if reason is not None:
                raise StoreError(f"memory rank {rank}: {reason}")
        return [told for _, told in found]

    def check(self, reasons: Sequence[str | None]) -> None:
        """Refuses for all what one of the ranks could not do.

        Raises:
            StoreError: what the first such rank met.
        """
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise StoreError(f"memory rank {rank}: {reason}" if rank != self.rank else reason)

    @property
    def folder(self) -> str:
        """Where its segments are, below those of rank 0."""
        return folder_of(self.rank)


ALONE = Members()


class Noted:
    """Notes a refusal instead of raising it: the other ranks must hear of it first."""

    reason: str | None = None

    def __enter__(self) -> "Noted":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, StoreError):
            self.reason = str(error)
            return True
        return False


def folder_of(rank: int) -> str:
    """The folder of a rank's segments."""
    return f"rank-{rank}" if rank else ""


def place_of(path: Path, rank: int) -> Path:
    """The directory of a rank's manifest, lock and scratch."""
    return path / f"memory-{rank}" if rank else path


def first_look(path: Path, place: Path, members: Members, *, writable: bool) -> tuple[int | None, Manifest | None]:
    """The lock, and the manifest if this rank has one; where one of several ranks is refused, all of them are."""
    handle: int | None = None
    manifest: Manifest | None = None
    refused: StoreError | None = None
    try:
        if members.rank == 0:
            directory.require_store(path)
        else:
            directory.make_place(path, place, members.folder)
            directory.sync_place(path, Device())
        handle = directory.lock(place) if writable else None
        file = place / directory.MANIFEST
        manifest = Manifest.open(file, writable=writable) if members.rank == 0 or file.is_file() else None
    except StoreError as error:
        refused = error
    reasons = [None if refused is None else str(refused)] if members.count == 1 else None
    try:
        if reasons is None:
            reasons = members.exchange(None if refused is None else str(refused))
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            raise refused if refused is not None else StoreError(reason)
    except BaseException:
        if manifest is not None:
            manifest.close()
        if handle is not None:
            directory.unlock(handle)
        raise
    return handle, manifest


def common_commit(path: Path, manifest: Manifest | None, members: Members) -> CommitRow:
    """The newest commit that all ranks that made it hold, as rank 0 finds it.

    Raises:
        StoreError: the manifest of one of them is not to be seen; on every rank.
    """
    found = members.told(lambda: None if manifest is None else _state(manifest))

    def decided() -> dict[str, Any] | None:
        if members.rank:
            return None
        assert manifest is not None
        return _decide(path, manifest, found)

    verdict = members.told(decided)[0]
    if "refused" in verdict:
        raise StoreError(verdict["refused"])
    return CommitRow(verdict["number"], verdict["step"], {}, verdict["ranks"], verdict["name"])


def _decide(path: Path, manifest: Manifest, found: list[Any]) -> dict[str, Any]:
    last = manifest.last_commit()
    for rank in range(1, last.ranks):
        if rank < len(found):
            state = found[rank]
        else:
            state = _seen(path, rank)
            if state is None:
                return {
                    "refused": f"store '{path}': its last commit (step {last.step}) was made by {last.ranks} memory ranks, and "
                    f"the folder of rank {rank}, {place_of(path, rank).name}, is not there; bring it to this host, or start "
                    f"{last.ranks} memory ranks where their folders are"
                }
        if state is None:  # it had one before it could take part in a commit
            return {
                "refused": f"store '{path}': memory rank {rank} took part in the last commit (step {last.step}) and has no "
                f"manifest now; restore {place_of(path, rank).name} from a copy of the store"
            }
        if [last.number, last.name] not in state["commits"]:
            before = manifest.commit_before(last.number)
            if before is None:
                return {
                    "refused": f"store '{path}': rank {rank} lacks the last commit (step {last.step}), and the one before is "
                    f"not kept; restore {place_of(path, rank).name} from a copy of the store"
                }
            last = before
            break
    return {"number": last.number, "step": last.step, "ranks": last.ranks, "name": last.name}


def level(path: Path, manifest: Manifest | None, common: CommitRow, members: Members) -> Manifest:
    """Every rank has rank 0's manifest at the common commit when this ends; gives that of this rank."""

    def own_state() -> dict[str, Any] | None:
        if members.rank == 0:
            assert manifest is not None
            if manifest.last_commit().number != common.number:
                manifest.undo_last()
        return None if manifest is None else _state(manifest)

    states = members.told(own_state)
    lacking = [rank for rank, other in enumerate(states) if other != states[0]]
    if not lacking:
        assert manifest is not None
        return manifest
    copy = None
    if members.rank == 0:
        assert manifest is not None
        copy = base64.b64encode(manifest.copied()).decode()
    copy = members.exchange(copy)[0]
    if members.rank not in lacking:
        assert manifest is not None
        return manifest
    if manifest is not None:
        manifest.close()
    return _replace(place_of(path, members.rank) / directory.MANIFEST, base64.b64decode(copy))


def _replace(path: Path, data: bytes) -> Manifest:
    """Another manifest in place of this one, whole at every instant."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    for leftover in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        leftover.unlink(missing_ok=True)  # a log of the old one would be played into the new one
    partial.rename(path)
    sync_directory(path.parent)
    return Manifest.open(path, writable=True)


def _state(manifest: Manifest) -> dict[str, Any]:
    """What tells whether two manifests are the same: the last two commits, the snapshots, and the files that records
    share, as what a commit has moved to others stays there when it is undone."""
    with manifest.at_one_moment():
        last = manifest.last_commit()
        before = manifest.commit_before(last.number)
        commits = [[commit.number, commit.name] for commit in (last, before) if commit is not None]
        own = {"id": manifest.meta()["id"], "commits": commits, "snapshots": manifest.snapshots()}
        return own | {"shared": manifest.shared_checksum()}


def _seen(path: Path, rank: int) -> dict[str, Any] | None:
    """The state of a rank that takes no part now, if its folder is on this host."""
    file = place_of(path, rank) / directory.MANIFEST
    if not file.is_file():
        return None
    manifest = Manifest.open(file, writable=False)
    try:
        return _state(manifest)
    finally:
        manifest.close()
