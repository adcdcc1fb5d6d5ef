"""A run of a small store that can be taken up wherever a crash left it, and what must hold when it is.

Seven steps of two small records, one of them sparse and of another size after every other step, four of a family of
billions that share files, and one that is never trained, with all that a store does: an update that is undone, a record
that is written twice in one step, a snapshot that is made and later removed, a file that a branch outside shares by a hard
link, a shared file that is mostly dead and emptied, dead ones that are filled anew, cut or removed, a clean close and a
reopening.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.faults.device import Image, Recorder, lay_down
from tests.store.cases import (
    assert_accounted,
    fast_directory,
    filled,
    make,
    reopen,
    segment,
    sparsity_of,
    told_apart_by,
)

from weightstream.blocks import Block, Parameter
from weightstream.store.families import Family
from weightstream.store.initial import Recipe
from weightstream.store.recipes import Step
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import InitialMask
from weightstream.store.store import Store

BLOCKS = (
    Block(0, "wide", (Parameter("wide.weight", (40, 30)), Parameter("wide.bias", (40,))), ("wide",)),
    Block(1, "small", (Parameter("small.weight", (7, 3)),), ("small",)),
    Block(2, "still", (Parameter("still.weight", (4, 4), trainable=False),), ("still",)),
)
RECIPES = {p.name: Recipe((Step("normal", (0.0, 0.5)),)) for block in BLOCKS for p in block.parameters}
MASKS = {"wide.weight": InitialMask("random", counts=(300,))}
FAMILY = Family(
    "expert {}", 2**33, (Parameter("expert.{}", (9, 5)),), {"expert.{}": Recipe((Step("normal", (0.0, 1.0)),))}
)
FIRST, SECOND, THIRD, FOURTH = (len(BLOCKS) + number for number in (0, 2**32, 2**32 + 1, 2**33 - 1))
STEPS = 7
UPDATED = {
    1: (0, 1, FIRST, SECOND, THIRD),
    2: (0, 1, FIRST, FOURTH),
    3: (0,),
    4: (0, 1, FIRST, SECOND),
    5: (0, 1, FIRST, FOURTH),  # of the first file only THIRD is live now, and moves
    6: (0, 1, SECOND),  # fills a dead file anew that had more records
    7: (0, 1, FIRST),
}
UNDONE, TWICE, LINKED = 2, 5, 2  # steps in which an update is undone first, a record written twice, a file shared
SNAPSHOT, TAKEN, REMOVED, CLOSED = "held", 2, 4, 4  # after which step


@dataclass(frozen=True)
class Expected:
    """What may be found: a commit from `durable`, which was reported done (-1: the store itself was not), to `asked`,
    which was asked for last; and one of these sets of snapshots."""

    durable: int = -1
    asked: int = 0
    snapshots: tuple[frozenset[str], ...] = (frozenset(),)


def image_of(root: Path) -> Image:
    """The files below a directory as they are now: what a crash would leave."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    return {name: None if path.is_dir() else (path.stat().st_ino, path.read_bytes()) for name, path in found.items()}


def new_store(path: Path, device: Any = None) -> Store:
    return make(path, device=device, blocks=BLOCKS, recipes=RECIPES, families=[FAMILY], masks=MASKS)


def image(store: Store, index: int, value: int) -> RecordBuffer:
    """A record to be written; that of the sparse one is smaller in every other step, so that its files are cut and grow."""
    if index:
        return filled(store.layout(index), value)
    return filled(store.layout_of(index, sparsity_of(store, index, 0.9 if value // 10 % 2 else 0.4)), value)


def write(store: Store, index: int, value: int) -> "Future[None]":
    version, count = store.version(index) + 1, store.optimizer_steps(index) + 1
    return store.write(index, image(store, index, value), version, count)


def train_step(store: Store, step: int, *, wait: bool = True) -> "Future[None]":
    """The writes of one step and its commit, which is returned; with `wait` each write ends before the next begins."""
    values = [(index, 10 * step + index) for index in UPDATED[step]]
    if step == UNDONE:
        for index, value in values:
            _settle(write(store, index, 1000 + value), wait=wait)
        store.discard()
    if step == TWICE:
        _settle(store.write(0, image(store, 0, 2000), store.version(0), store.optimizer_steps(0)), wait=wait)
    for index, value in values:
        _settle(write(store, index, value), wait=wait)
    return store.commit(step, {"step": step})


def run(
    path: Path,
    device: Callable[[], Any] = lambda: None,
    *,
    overlap: bool = False,
    until: int = STEPS,
    note: Callable[..., None] = lambda **_: None,
    look: Callable[[Store], None] = lambda _: None,
) -> None:
    """Create the store or take it up where it stands, train to the last step, close.

    With `overlap` a commit is under way while the writes of the next step are, and these are not waited for one by one.
    `note` is told what may be found from then on, `look` is given the store after each commit.
    """
    if Store.exists(path):
        store = reopen(path, device())
    else:
        store = new_store(path, device())
        note(durable=0)
    try:
        _after_commit(store, store.step, note)
        committing: dict[int, Future[None]] = {}

        def await_commit() -> None:
            for number, future in committing.items():
                future.result(timeout=30)
                note(durable=number)
                _after_commit(store, number, note)
                look(store)
            committing.clear()

        for step in range(store.step + 1, until + 1):
            if step - 1 in (LINKED, TAKEN, REMOVED, CLOSED):
                await_commit()
            if step - 1 == CLOSED:
                store.close()
                store = reopen(path, device())
            note(asked=step)
            commit = train_step(store, step, wait=not overlap)
            await_commit()
            committing[step] = commit
            if not overlap:
                await_commit()
        await_commit()
    finally:
        store.close()


def _settle(future: "Future[None]", *, wait: bool) -> None:
    if wait:
        future.result(timeout=30)


def _after_commit(store: Store, step: int, note: Callable[..., None]) -> None:
    """What follows a step: done once, also if the run was cut off between the commit and this."""
    with_it, without = frozenset({SNAPSHOT}), frozenset[str]()
    branch = store.path.parent / "branch"
    if step == LINKED and not branch.exists():
        branch.hardlink_to(segment(store, 0))
    if step == TAKEN and SNAPSHOT not in store.snapshots():
        note(snapshots=(without, with_it))
        store.snapshot(SNAPSHOT)
        note(snapshots=(with_it,))
    if step == REMOVED and SNAPSHOT in store.snapshots():
        note(snapshots=(with_it, without))
        store.remove_snapshot(SNAPSHOT)
        note(snapshots=(without,))


def _look(store: Store) -> None:
    store.digest()
    assert store.verify() == []


def undisturbed() -> dict[int, str]:
    """The digest of every commit of a run that nothing disturbs."""
    digests: dict[int, str] = {}
    with fast_directory() as directory:
        new_store(directory / "store").close()
        for step in range(STEPS + 1):
            run(directory / "store", until=step)
            with reopen(directory / "store") as store:
                digests[step] = store.digest()
    assert len(set(digests.values())) == STEPS + 1
    return digests


def recorded(
    directory: Path, *, overlap: bool = False, expected: Expected = Expected(), until: int = STEPS
) -> Recorder:
    """The run, with all its moments. `expected` is what may be found at its beginning."""
    recorder = Recorder(directory)
    recorder.expected = expected

    def note(**changes: Any) -> None:
        with recorder.one_at_a_time():
            changes["asked"] = max(recorder.expected.asked, changes.get("asked", 0))
            recorder.expected = replace(recorder.expected, **changes)

    with recorder.recording():
        run(directory / "store", recorder.device, overlap=overlap, until=until, note=note, look=_look)
    return recorder


def check(image: Image, expected: Expected, digests: dict[int, str], *, going_on: Callable[[Path], None] = run) -> int:
    """A crash left these files. The store opens at a whole commit that may be found, and the run goes on from it to the
    digest of the undisturbed one: once from each state, as many crashes are recovered from to the same bytes. Gives the
    step at which it was opened, -1 where there was no store yet."""
    with fast_directory() as directory:
        lay_down(image, directory)
        path, found = directory / "store", -1
        if Store.exists(path) or expected.durable >= 0:
            with reopen(path) as store:
                found = store.step
                assert max(expected.durable, 0) <= found <= expected.asked
                assert store.progress == ({"step": found} if found else {})
                assert store.verify() == []
                assert store.digest() == digests[found]
                assert frozenset(store.snapshots()) in expected.snapshots
                assert_accounted(store)
        state = going_on, told_apart_by(directory)
        if state in _GONE_ON_FROM:
            return found
        going_on(path)
        with reopen(path, writable=False) as store:
            assert (store.step, store.progress, store.snapshots()) == (STEPS, {"step": STEPS}, {})
            assert store.verify() == []
            assert store.digest() == digests[STEPS]
            assert_accounted(store)
            most = Counter(name.name.split(".")[0] for name in (path / "segments").glob("*.safetensors"))
            assert most.keys() == {"00000", "00001", "00002"}, most
            assert max(most.values()) <= 3, (most, found, expected)
        _GONE_ON_FROM.add(state)
        return found


_GONE_ON_FROM: set[tuple[Callable[[Path], None], bytes]] = set()
"""With what, and from which files."""
