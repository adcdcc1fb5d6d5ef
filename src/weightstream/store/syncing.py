"""Names that last: with nothing but the system's calls, so that whoever only glances at a store imports no torch."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Names made or removed in the directory are on the medium."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
