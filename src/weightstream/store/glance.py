"""What a store says without being opened: how far it is, and what was fixed when it was made."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.store.manifest import Manifest

MANIFEST = "manifest.sqlite"  # as in directory.py, whose import would bring torch along: who only glances does without


@dataclass(frozen=True, slots=True)
class Glance:
    """The last commit's step and the progress that came with it, and the contract of `Store.create`."""

    step: int
    progress: dict[str, Any]
    contract: dict[str, Any]


def glance(path: str | os.PathLike[str]) -> Glance | None:
    """Read a store's manifest beside whoever writes; None if there is no store.

    Raises:
        StoreError: the manifest cannot be read.
    """
    place = Path(path) / MANIFEST
    if not place.exists():
        return None
    manifest = Manifest.open(place, writable=False)
    try:
        last = manifest.last_commit()
        return Glance(last.step, dict(last.progress), dict(manifest.meta()["contract"]))
    finally:
        manifest.close()


def committed_step(path: Path) -> int:
    """The training step of the store's last commit; 0 where there is no store yet."""
    found = glance(path)
    return 0 if found is None else found.step
