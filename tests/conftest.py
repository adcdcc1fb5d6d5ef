"""Order of the tests: from the fast and elementary to the slow and whole, so that a first failure is the cause.
Of those that go to several processes one by one, the slow ones come first: the last test is one that all wait for.

`--update-golden` writes golden schedules and simulations anew, so that a change of the planner shows as a diff of them.

`make test` runs two at a time (pytest-xdist). Those of one file stay together, as some keep processes or counts between
them; the files that take longest have neither, and their tests go wherever there is time.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if _BESIDE_OTHERS:  # beside another one, threads that wait for each other would wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# Where a folder or file is not named, it runs after those that are and before the last ones.
_FIRST = ("test_layers.py", "test_units.py", "test_blocks.py", "test_config.py", "schedule", "store", "data", "worker")
_LAST = ("parity", "test_training.py", "test_cli.py", "test_demo.py", "benchmarks")
# Their tests need not run in one process.
_APART = (
    "parity",
    "benchmarks",
    "test_full_disk.py",
    "hub",
    "test_cli.py",
    "test_demo.py",
    "test_fit.py",
    "test_launcher.py",
    "test_outcomes.py",
)


def _rank(item: pytest.Item) -> tuple[bool, int]:
    top = item.path.relative_to(Path(__file__).parent).parts[0]
    if top in _FIRST:
        place = _FIRST.index(top)
    elif top in _LAST:
        place = len(_FIRST) + 1 + _LAST.index(top)
    else:
        place = len(_FIRST)
    slow = item.get_closest_marker("slow") is not None
    return slow != _BESIDE_OTHERS, place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden schedules and simulations anew")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden", default=False))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        apart = item.path.name in _APART or item.path.parent.name in _APART
        if not apart and item.get_closest_marker("xdist_group") is None:
            # what one test of crashes has found out of a state, the others need not
            one = item.path.parent if item.path.parent.name == "faults" else item.path
            item.add_marker(pytest.mark.xdist_group(str(one)))
    items.sort(key=_rank)  # stable: within a file the order stays as written


class _SetAside:
    """What importing leaves is never garbage: an engine collects when it is opened, and need not look through torch."""

    modules = 0

    def now(self) -> None:
        gc.collect()
        gc.freeze()
        self.modules = len(sys.modules)

    def if_much_was_imported(self) -> None:
        """As by a first model, and by its first backward."""
        if len(sys.modules) > self.modules + 50:
            self.now()


_SET_ASIDE = _SetAside()


def pytest_collection_finish() -> None:
    _SET_ASIDE.now()


def pytest_runtest_logfinish() -> None:
    _SET_ASIDE.if_much_was_imported()
