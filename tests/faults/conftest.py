"""What all the tests of faults compare with, and how they say how much they tried."""

from collections.abc import Callable

import pytest
from tests.faults.run import undisturbed


@pytest.fixture(scope="session")
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
