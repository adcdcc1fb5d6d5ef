"""The store as a directory: its names, its lock, making it, and what its files say when it is opened.

manifest.sqlite     the catalogue; where it exists the store is whole
segments/           one safetensors file per block and version; shared/ has those that records of families share
scratch/            bytes of the running process only
lock                held by the process that writes
memory-1/ …         manifest, scratch and lock of other memory ranks (`members.py`); their segments are in segments/rank-1/ …
workers/            scratch of ranks that own no records
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from weightstream.errors import DamagedRecordError, PlaceTakenError, StoreError, StoreInUseError
from weightstream.store.device import Device
from weightstream.store.families import Layouts
from weightstream.store.records import FILES_PER_RECORD, Record, slot_of
from weightstream.store.rows import RecordRow

MANIFEST = "manifest.sqlite"
SEGMENTS = "segments"
SHARED = "shared"
SCRATCH = "scratch"
LOCK = "lock"
WORKERS = "workers"


def make(path: Path) -> int:
    """Make the empty directories of a new store and lock it; what an interrupted creation left is cleared first.

    Raises:
        PlaceTakenError: the path holds a store, or something else.
        StoreInUseError: another process makes one there.
    """
    require_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = lock(path)
        try:
            if (path / MANIFEST).exists():  # made by a process that had the lock until now
                raise PlaceTakenError(f"'{path}' already holds a store; open it, or give another path")
            for name in (SEGMENTS, SCRATCH):
                shutil.rmtree(path / name, ignore_errors=True)
                (path / name).mkdir()
        except BaseException:
            unlock(handle)
            raise
    except OSError as error:
        raise StoreError(f"'{path}': a store cannot be made there: {error.strerror}; give another path") from error
    return handle


def require_new(path: Path) -> None:
    """Refuse a path where no new store may be made.

    Raises:
        PlaceTakenError: it holds a store, or something else.
    """
    if path.exists() and not path.is_dir():
        raise PlaceTakenError(
            f"'{path}': expected a new or empty directory for a store, found a file; give another path"
        )
    if (path / MANIFEST).exists():
        raise PlaceTakenError(f"'{path}' already holds a store; open it, or give another path")
    ours = {SEGMENTS, SCRATCH, LOCK, f"{MANIFEST}-wal", f"{MANIFEST}-shm"}
    strangers = [entry.name for entry in path.iterdir() if _is_strange(entry, ours)] if path.exists() else []
    if strangers:
        raise PlaceTakenError(
            f"'{path}': expected a new or empty directory for a store, found {', '.join(sorted(strangers)[:3])}"
            f"{' and more' if len(strangers) > 3 else ''}; give another path"
        )
    begun = any(path.glob("manifest.partial*"))
    if not begun and (_sizes(path / SEGMENTS) or any((path / SEGMENTS / SHARED).glob("*"))):  # made after the manifest
        raise PlaceTakenError(
            f"'{path}': expected a new or empty directory for a store, found one whose {MANIFEST} is missing; restore it "
            "from a copy, or give another path"
        )


def require_store(path: Path) -> None:
    """Refuse a path that holds no store.

    Raises:
        StoreError: saying what is there instead.
    """
    if (path / MANIFEST).is_file():
        return
    if not path.exists():
        found = "nothing"
    elif not path.is_dir():
        found = "a file"
    else:
        names = sorted(entry.name for entry in path.iterdir())
        found = (
            f"a directory with {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            if names
            else ("an empty directory")
        )
    raise StoreError(f"'{path}': expected a store (a directory with {MANIFEST}), found {found}; give a store's path")


def make_place(path: Path, place: Path, folder: str) -> None:
    """The directories of another memory rank than the first; they may be there."""
    try:
        (place / SCRATCH).mkdir(parents=True, exist_ok=True)
        (path / SEGMENTS / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"store '{path}' cannot be written on this host: {error.strerror}; see to the path and its permissions"
        ) from error


def sync_place(path: Path, device: Device) -> None:
    """The names of a memory rank's own directories are on the medium, before anything in them matters."""
    try:
        for folder in (path, path / SEGMENTS):
            device.sync_directory(folder)
        _sync_names_above(path, device)
    except OSError as error:
        raise StoreError(
            f"store '{path}' cannot be written on this host: {error.strerror}; make room, or see to the path and its "
            "permissions"
        ) from error


def _sync_names_above(path: Path, device: Device) -> None:
    """The name of a new store is on the medium, and those of directories above that may be as new as the store: a power
    loss could else take it whole, commits and all."""
    for parent in path.absolute().parents:
        try:
            device.sync_directory(parent)
        except OSError:  # not ours to open, or of a file system without this: nobody made it just now
            if parent == path.absolute().parent:
                raise
            return


def lock(path: Path) -> int:
    """Become the store's only writer; the lock goes with the process, however it ends.

    Raises:
        StoreInUseError: another process is.
    """
    try:
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"store '{path}' cannot be written: {error.strerror}; make room, see to the permissions, or open it for reading"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        os.close(handle)
        raise StoreInUseError(
            f"store '{path}' is being written by process {holder or 'unknown'}; wait for it, end it, or open the "
            "store for reading"
        ) from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(handle)
        raise StoreError(
            f"store '{path}' cannot be written: {error.strerror}; make room, or open it for reading"
        ) from error
    return handle


def unlock(handle: int) -> None:
    """Let another process write."""
    os.close(handle)


def clear_scratch(path: Path) -> None:
    """Remove what a process kept for itself; of a store that another rank has removed meanwhile nothing is left."""
    with suppress(FileNotFoundError):
        for file in (path / SCRATCH).iterdir():  # the directory stays: on a full disk it could not be made again
            file.unlink(missing_ok=True)


def records(
    path: Path,
    layouts: Layouts,
    rows: Sequence[RecordRow],
    held: Collection[int],
    *,
    keep_dead: bool,
    accept_damage: bool = False,
    folder: str = "",
    owned: Collection[int] | None = None,
    active: Collection[str] = ("",),
) -> list[Record]:
    """The state of every block's record as of the last commit.

    `held` are the commits that snapshots name. Files that nothing points to are kept to be recycled if `keep_dead`, and
    removed where they are too many, or of another size than the record always has; for a reader they do not exist. With
    `accept_damage`, files that the manifest names need not be there.

    With several memory ranks `folder` is this rank's own, `active` those of all that take part, and files of records that
    this one does not own need not be on its host.

    Raises:
        StoreError: a file is missing.
        DamagedRecordError: a file was cut short.
    """
    sizes = _sizes(path / SEGMENTS)
    by_block: list[list[RecordRow]] = [[] for _ in layouts.units]
    for row in rows:
        expected = layouts.of(row.block, row.sparsity).image_nbytes
        if owned is not None and row.block not in owned:
            by_block[row.block].append(row)
            continue
        if row.file not in sizes and not accept_damage:
            raise StoreError(
                f"store '{path}': version {row.version} of block {row.block} should be in {SEGMENTS}/{row.file}, which "
                "is missing; restore the file from a copy of the store, or see what `weightstream store verify` says of it"
            )
        if sizes.get(row.file) != expected and not accept_damage:
            raise DamagedRecordError(
                f"store '{path}': {SEGMENTS}/{row.file} should have {expected} bytes, it has {sizes[row.file]}; "
                "restore the file from a copy of the store, or see what `weightstream store verify` says of it"
            )
        by_block[row.block].append(row)
    found = [Record.load(own, held, folder, layouts.initial(index)) for index, own in enumerate(by_block)]
    if keep_dead:
        _adopt_dead(path, layouts, found, sizes, {row.file for row in rows}, folder, owned, active)
    return found


def _sizes(segments: Path) -> dict[str, int]:
    """Bytes of every segment, by name; those of other memory ranks' folders with the folder."""
    if not segments.is_dir():
        return {}
    sizes: dict[str, int] = {}
    with os.scandir(segments) as entries:
        folders = [entry.name for entry in entries if entry.is_dir() and entry.name != SHARED]
    for folder in ("", *folders):
        with os.scandir(segments / folder) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        sizes[f"{folder}/{entry.name}" if folder else entry.name] = entry.stat().st_size
                except FileNotFoundError:
                    pass  # another rank has just removed what nothing points to
    return sizes


def _adopt_dead(
    path: Path,
    layouts: Layouts,
    found: list[Record],
    sizes: dict[str, int],
    live: set[str],
    folder: str,
    owned: Collection[int] | None,
    active: Collection[str],
) -> None:
    """Files that nothing points to: own ones are used again or removed, those of ranks that are no more are removed by the
    first rank; those of the others are theirs."""
    for name, nbytes in sorted(sizes.items()):
        place, _, bare = name.rpartition("/")
        if name in live or (place != folder and (folder or place in active)):
            continue
        index = int(bare.split(".")[0]) if bare.count(".") == 2 and bare.split(".")[0].isdigit() else len(found)
        record = found[index] if index < len(found) and (owned is None or index in owned) else None
        if (
            record is not None
            and place == folder
            and (layouts.varies(index) or nbytes == layouts[index].image_nbytes)
            and len(record.slots.keys() - record.held) < FILES_PER_RECORD
        ):
            record.slots[slot_of(name, folder)] = None
        else:
            (path / SEGMENTS / name).unlink()


def is_rank(entry: Path) -> bool:
    """Whether a folder in a store is that of another memory rank, or of workers."""
    return entry.name == WORKERS or (entry.name.startswith("memory-") and entry.name[7:].isdigit())


def _is_strange(entry: Path, ours: Collection[str]) -> bool:
    return entry.name not in ours and not entry.name.startswith("manifest.partial")
