"""The process dies before any of its calls, or in the middle of any write."""

from collections import Counter
from collections.abc import Callable

import pytest
from tests.faults.device import Moment, device_calls, lay_down
from tests.faults.run import check, fast_directory, recorded

_TABLES = ("meta", "blocks", "families", "records", "shared", "commits", "snapshots", "life")
STATEMENTS = (
    {f"SQL INSERT INTO {table}" for table in _TABLES}
    | {f"SQL SELECT {table}" for table in _TABLES}
    | {f"SQL CREATE TABLE {table}" for table in _TABLES}
    | {f"SQL DELETE FROM {table}" for table in ("records", "shared", "commits", "snapshots", "life")}
    | {"SQL BEGIN", "SQL BEGIN IMMEDIATE", "SQL COMMIT", "SQL PRAGMA journal_mode", "SQL PRAGMA synchronous"}
)
BESIDE = {"os.open", "os.mkdir", "os.rename", "os.unlink", "os.ftruncate", "os.pwrite", "os.fsync"}


def distinct(moments: list[Moment]) -> list[Moment]:
    """One moment of each kind: a call that changes no file leaves what the one before it left."""
    return list({moment.key(): moment for moment in moments}.values())


@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlapping"])
def test_a_crash_at_any_call_leaves_a_whole_commit(
    overlap: bool, digests: dict[int, str], say: Callable[[str], None]
) -> None:
    with fast_directory() as directory:
        moments = recorded(directory, overlap=overlap).moments
    calls = Counter(moment.call for moment in moments)
    tried = distinct(moments)
    found = Counter(check(moment.image(), moment.expected, digests) for moment in tried)
    say(
        f"crashes: {len(moments)} points at {len(calls)} kinds of calls, {len(tried)} of them with files of their own; "
        f"reopened at {dict(sorted(found.items()))}"
    )
    for missing in (device_calls() | STATEMENTS | BESIDE | {"Device.write, half of it"}) - calls.keys():
        raise AssertionError(f"the run never came to a call of {missing}; extend it")
    assert found.keys() == {-1, *digests}


def test_a_crash_while_a_crash_is_being_recovered_from(digests: dict[int, str], say: Callable[[str], None]) -> None:
    """From some of these crashes on: the next process dies too, at any call up to its first commit."""
    with fast_directory() as directory:
        first = distinct(recorded(directory).moments)
    tried = 0
    for moment in first[7 :: len(first) // 5]:
        with fast_directory() as directory:
            lay_down(moment.image(), directory)
            second = recorded(directory, expected=moment.expected, until=moment.expected.asked).moments
        for again in distinct(second):
            check(again.image(), again.expected, digests)
            tried += 1
    say(f"crashes after a crash: {tried} points with files of their own")
