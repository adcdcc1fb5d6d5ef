"""A branch: a new store that shares the segments of a snapshot.

Its files are hard links to the same inodes. Neither store ever writes to a file that has another link: a version that
would recycle one takes a new file (`tiers.Disk`). Where a file system has no hard links, reflinks serve.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.errors import StoreError
from weightstream.store import directory
from weightstream.store.directory import SHARED
from weightstream.store.manifest import Manifest

if TYPE_CHECKING:
    from weightstream.store.store import Store

_FICLONE = 0x40049409  # Linux: ioctl(new, FICLONE, old) shares all extents of a file


def branch(store: "Store", name: str, path: Path) -> None:
    """Make a store in `path` whose last commit is the one that snapshot `name` of `store` holds.

    It is made beside its name and moved there whole; what an interrupted branch left is cleared by the next one.
    """
    directory.require_new(path)
    if store.path.resolve() in path.resolve().parents:
        raise StoreError(
            f"'{path}' lies in the store that is branched, whose files are its own; give a path outside of it"
        )
    manifest = store.manifest
    with manifest.at_one_moment():
        commit = manifest.commit_row(manifest.snapshot(name))
        rows = [row for row in manifest.records() if row.lives_at(commit.number)]
        meta = manifest.meta() | {"id": uuid.uuid4().hex}  # a target of pushes tells it from its origin
        blocks, families = manifest.blocks(), manifest.families()
        files = {row.file for row in rows}
        shared = [row for row in manifest.shared() if row.file in files]
    path = path.absolute()
    partial = path.with_name(f".{path.name}.branch")
    shutil.rmtree(partial, ignore_errors=True)
    handle = directory.make(partial)
    try:
        segments = partial / directory.SEGMENTS
        if families:
            (segments / SHARED).mkdir()
        folders = sorted({(segments / file).parent for file in files} - {segments})  # shared ones, other memory ranks'
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files):
            _share(store.path / directory.SEGMENTS / file, segments / file)
        if manifest.snapshots().get(name) != commit.number:  # its files were free to be used again
            raise StoreError(
                f"store '{store.path}': snapshot {name!r} was deleted while it was branched; nothing was made"
            )
        for extra in store.path.iterdir():
            if (
                extra.is_dir()
                and extra.name not in (directory.SEGMENTS, directory.SCRATCH)
                and not directory.is_rank(extra)
            ):
                shutil.copytree(extra, partial / extra.name)  # config.json and the like of an import
        above = {parent for folder in folders for parent in folder.parents if segments in parent.parents}
        for folder in (*folders, *sorted(above), *([segments / SHARED] if families else []), segments):
            store.disk.device.sync_directory(folder)
        Manifest.create(
            partial / directory.MANIFEST,
            meta=meta, blocks=blocks, families=families, step=commit.step, progress=commit.progress, records=rows,
            shared=shared,
        )  # fmt: skip
        try:
            partial.rename(path)
        except OSError as error:
            raise StoreError(
                f"'{path}': the branch cannot be moved there: {error.strerror}; give another path"
            ) from error
        store.disk.device.sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        directory.unlock(handle)


def _share(source: Path, target: Path) -> None:
    """The same bytes under another name, without copying them."""
    ways: tuple[Callable[[Path, Path], None], ...] = (os.link, _reflink)
    reason = ""
    for way in ways:
        try:
            way(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError as error:
            target.unlink(missing_ok=True)
            reason = error.strerror or str(error)
    raise StoreError(
        f"'{target.parent.parent.parent}': its file system cannot share files with that of '{source.parent.parent}' "
        f"({reason}); give a path on the same file system"
    )


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("xb") as new:
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
