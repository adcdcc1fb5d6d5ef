"""What all the tests of faults compare with, and how they say how much they tried."""

from collections.abc import Callable, Iterator

import pytest
from tests.faults.run import undisturbed

from weightstream.store import shared


@pytest.fixture(scope="package", autouse=True)
def _few_files_in_a_folder() -> Iterator[None]:
    """So that the run makes more folders than one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "FILES_PER_FOLDER", 3)
        yield


@pytest.fixture(scope="package")
def digests() -> dict[int, str]:
    """Step → digest in a run that nothing disturbs."""
    return undisturbed()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line that is seen also when the test passes."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return show
