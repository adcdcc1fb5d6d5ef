"""Power fails: of what was written and not synced, anything may be on the medium and anything not.

Bytes survive by sectors of 512, names one by one (`device.after_power_loss`). What SQLite promises of its own files is
taken for granted (`device.py` says what that is), so these tests are about everything that a commit points to.
"""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.device import PAGE_BYTES, SECTOR_BYTES, Image, Moment, after_power_loss, left_to_chance
from tests.faults.run import check, fast_directory, recorded

SECTORS_PER_PAGE = PAGE_BYTES // SECTOR_BYTES


def chancy(*, overlap: bool) -> list[Moment]:
    """Those moments of a run that leave something to chance."""
    with fast_directory() as directory:
        return [moment for moment in recorded(directory, overlap=overlap).moments if any(left_to_chance(moment))]


@pytest.fixture(scope="module")
def moments() -> list[Moment]:
    return chancy(overlap=False)


@pytest.fixture(scope="module")
def overlapping_moments() -> list[Moment]:
    return chancy(overlap=True)


def nothing_survives(moment: Moment) -> Image:
    return after_power_loss(moment, lambda _: False, lambda *_: 0)


def only_names_survive(moment: Moment) -> Image:
    return after_power_loss(moment, lambda _: True, lambda *_: 0)


def only_bytes_survive(moment: Moment) -> Image:
    return after_power_loss(moment, lambda _: False, lambda *_: -1)


def every_other_sector_survives(moment: Moment) -> Image:
    return after_power_loss(moment, lambda _: True, lambda _, sector: -1 if sector is None or sector % 2 else 0)


@pytest.mark.parametrize(
    "survivors", [nothing_survives, only_names_survive, only_bytes_survive, every_other_sector_survives]
)
def test_at_any_call(
    survivors: Callable[[Moment], Image], moments: list[Moment], digests: dict[int, str], say: Callable[[str], None]
) -> None:
    images = {}
    for moment in moments:
        image = survivors(moment)
        key = frozenset((path, found and found[1]) for path, found in image.items() if not path.endswith("-shm"))
        images[key, moment.expected] = image
    for (_, expected), image in images.items():
        check(image, expected, digests)
    say(f"power losses, {survivors.__name__}: {len(moments)} points, {len(images)} with files of their own")


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "kept"])
def test_one_name_at_any_call(
    lost: bool, moments: list[Moment], digests: dict[int, str], say: Callable[[str], None]
) -> None:
    """One name is lost and all others are on the medium, or it alone is: a directory's names come in any order."""
    images = {}
    for moment in moments:
        names, _ = left_to_chance(moment)
        for name in names if len(names) > 1 else ():

            def survives(path: str, name: str = name) -> bool:
                return (path == name) != lost

            image = after_power_loss(moment, survives, lambda *_: -1)
            key = frozenset((path, found and found[1]) for path, found in image.items() if not path.endswith("-shm"))
            images[key, moment.expected] = image
    for (_, expected), image in images.items():
        check(image, expected, digests)
    assert images
    say(f"power losses, one name {'lost' if lost else 'kept'}: {len(images)} with files of their own")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_survives(
    moments: list[Moment], overlapping_moments: list[Moment], digests: dict[int, str], data: st.DataObject
) -> None:
    moments = [*moments, *overlapping_moments]
    moment = moments[data.draw(st.integers(0, len(moments) - 1), label="moment")]
    names, files = left_to_chance(moment)
    surviving = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()), label="names")
    lengths: dict[int, int] = {}
    pages: dict[int, list[int]] = {}
    torn: dict[tuple[int, int], list[int]] = {}
    for file, count in files.items():
        version = st.integers(0, count - 1)
        lengths[file] = data.draw(version, label=f"length of file {file}")
        longest = max(map(len, moment.versions[file]))
        size = -(-longest // PAGE_BYTES)
        pages[file] = data.draw(st.lists(version, min_size=size, max_size=size), label=f"pages of file {file}")
        for page in data.draw(st.sets(st.integers(0, size - 1), max_size=2) if size else st.just(set()), label="torn"):
            sectors = st.lists(version, min_size=SECTORS_PER_PAGE, max_size=SECTORS_PER_PAGE)
            torn[file, page] = data.draw(sectors, label=f"sectors of page {page}")

    def version_of(file: int, sector: int | None) -> int:
        if sector is None:
            return lengths[file]
        page, within = divmod(sector, SECTORS_PER_PAGE)
        return torn[file, page][within] if (file, page) in torn else pages[file][page]

    check(after_power_loss(moment, surviving.__contains__, version_of), moment.expected, digests)
