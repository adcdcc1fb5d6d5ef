"""A folder of its own for every run of a benchmark, on the disk that is measured; and one benchmark at a time.

Two that ran at once would measure each other.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new folder below `parent`, removed at the end; after a failure its logs stay.

    Raises:
        SystemExit: another benchmark holds `parent`.
    """
    with _alone(parent):
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        try:
            yield folder
        except BaseException:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.suffix != ".log":
                    path.unlink(missing_ok=True)
            raise
        shutil.rmtree(folder)


@contextmanager
def lasting(parent: Path, name: str) -> Iterator[Path]:
    """The folder `name` below `parent`, which stays until its owner removes it: for what is done in several calls.

    Raises:
        SystemExit: another benchmark holds `parent`.
    """
    with _alone(parent):
        folder = parent / name
        folder.mkdir(exist_ok=True)
        yield folder


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another benchmark runs in {parent}; wait for it, or give another --scratch") from None
        yield
