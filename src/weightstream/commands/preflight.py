"""What several ranks find out about their hosts before the first step, so that all refuse what one of them cannot do."""

import os
import socket
from pathlib import Path

from weightstream.config.config import RunConfig
from weightstream.data.dataset import Dataset
from weightstream.engine.engine import Engine
from weightstream.errors import DataError, PlanError, StoreError
from weightstream.launch.ranks import RunRanks
from weightstream.store.store import Store
from weightstream.units import format_bytes


def store_exists(config: RunConfig, ranks: RunRanks) -> bool:
    """Whether there is a store, which the first rank decides: where hosts share no files, the others have parts of it.

    Raises:
        RefusedError: a host cannot keep its part of the run, or has none of the store that the first rank has.
    """
    nearest = _nearest(config.out)
    own = {
        "host": socket.gethostname(),
        "exists": Store.exists(config.store),
        "part": config.store.is_dir(),
        "writable": os.access(nearest, os.W_OK | os.X_OK),
        "out": str(config.out.absolute()),
    }
    told = ranks.gather(own)

    def check() -> None:
        if not nearest.is_dir():
            raise StoreError(f"out={own['out']}: {nearest} is a file, expected a folder; give another path")
        if not own["writable"]:
            raise StoreError(
                f"out={own['out']} cannot be made or written by this user; give a path that every host has"
            )
        if told[0]["exists"] and ranks.owns and not own["part"]:
            raise StoreError(
                f"no part of a store at {config.store.absolute()}, where rank 0 on {told[0]['host']} has {told[0]['out']}; "
                "mount that path here too, or go on with as many memory ranks on the hosts that have their parts"
            )

    ranks.together(check)
    return bool(told[0]["exists"])


def require_same_text(dataset: Dataset, ranks: RunRanks) -> None:
    """Refuse hosts that prepared different text.

    Raises:
        RefusedError: on all ranks.
    """
    first = ranks.gather(dataset.digest)[0]

    def check() -> None:
        if dataset.digest != first:
            raise DataError(
                f"the text here has digest {dataset.digest}, rank 0's {first}; give every host the same files in data.sources"
            )

    ranks.together(check)


def require_memory(engine: Engine, free_bytes: int | None, ranks: RunRanks) -> None:
    """Refuse a plan for which a host has not enough memory, counted over all ranks on it.

    Args:
        free_bytes: what the host had free before the engine was made.

    Raises:
        RefusedError: on all ranks.
    """
    if ranks.links is None:
        return
    allotment = engine.allotment
    needed = allotment.host_bytes + (allotment.device_bytes if engine.device.type == "cpu" else 0)
    told = ranks.gather([socket.gethostname(), needed, free_bytes])

    def check() -> None:
        here = [(others, free) for host, others, free in told if host == socket.gethostname()]
        all_needed, free = (
            sum(others for others, _ in here),
            min((free for _, free in here if free is not None), default=None),
        )
        if free is not None and all_needed > free:
            raise PlanError(
                f"{len(here)} ranks on {socket.gethostname()} plan {format_bytes(all_needed)} of memory together, "
                f"{format_bytes(free)} are free; lower engine.host_memory or engine.device_memory, which are each rank's own, "
                "or take fewer ranks per host"
            )

    ranks.together(check)


def _nearest(path: Path) -> Path:
    """The path itself, or the folder in which it, or the first of the folders above it, is to be made."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
