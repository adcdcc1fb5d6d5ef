"""What is interrupted in the middle of a step that updates experts: nothing of that step stays, whoever goes on afterwards."""

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.faults.device import Filling
from tests.nn.test_experts import engine, loss_fn, text

import weightstream as ws
from weightstream.engine.outlook import Outlook
from weightstream.errors import StoreError
from weightstream.experts.growing import Growing, LayerGrowth
from weightstream.families.touching import Touched
from weightstream.runtime.keeping import Keeper
from weightstream.store import tiers
from weightstream.store.futures import chain, new_future
from weightstream.store.optimizers import AdamW

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
CLIP = 0.5  # the engine's own in these tests


def once(inner: Callable[..., Any], call: int, error: type[BaseException]) -> Callable[..., Any]:
    """The same, but that one of its calls ends so."""
    calls = iter(range(call + 1))

    def ending(*arguments: Any, **settings: Any) -> Any:
        if next(calls, None) == call:
            raise error
        return inner(*arguments, **settings)

    return ending


@contextlib.contextmanager
def interrupted(
    owner: object, name: str, call: int = 0, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[None]:
    """One of these calls is interrupted, counted from 0, and whoever made it."""
    with mock.patch.object(owner, name, once(getattr(owner, name), call, error)), pytest.raises(error):
        yield


def finished(trained: ws.Engine) -> str:
    while trained.step_count < STEPS:
        trained.step(text(trained.step_count), loss_fn)
    digest = trained.store.digest()
    trained.close()
    return digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mapping[float | None, str]:
    """The digests of runs that were never interrupted, by clipping."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {clip: finished(engine(tmp_path_factory.mktemp("whole"), clip_norm=clip)) for clip in (None, CLIP)}
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("clip_norm", [None, CLIP])
@pytest.mark.parametrize("again", [True, False], ids=["tried again", "closed"])
def test_a_step_that_has_written_experts_of_one_layer_alone(
    again: bool, clip_norm: float | None, tmp_path: Path, whole: Mapping[float | None, str]
) -> None:
    """The step before waits for its commit: what is written of this one must not go with it."""
    settings = {"clip_norm": clip_norm, "commit_every": 3}
    trained = engine(tmp_path / "interrupted", **settings)
    for step in range(2):
        trained.step(text(step), loss_fn)
    with interrupted(Touched, "_optimize", 1):
        trained.step(text(2), loss_fn)
    if not again:
        trained.close()
        trained = engine(tmp_path / "interrupted", **settings)
    assert trained.step_count == 2
    assert finished(trained) == whole[clip_norm]


def test_an_update_within_a_commit(tmp_path: Path, whole: Mapping[float | None, str]) -> None:
    """A block of which some parameters have taken their step, and others have not."""
    trained = engine(tmp_path / "interrupted")
    for step in range(2):
        trained.step(text(step), loss_fn)
    with interrupted(AdamW, "update", 1):
        trained.commit()
    with pytest.raises(StoreError, match="a step was interrupted while it updated a record"):
        trained.commit()
    trained.close()
    trained = engine(tmp_path / "interrupted")
    assert trained.step_count == 1
    assert finished(trained) == whole[CLIP]


def test_records_that_could_not_be_written_leave_their_memory(
    tmp_path: Path, whole: Mapping[float | None, str]
) -> None:
    with engine(tmp_path / "ample") as ample:
        touched = [ample.step(text(step), loss_fn).experts.values() for step in range(STEPS)]
        records = max(facts.touched for step in touched for facts in step) + 2  # hardly more than a step needs
        nbytes = records * sum(family.slot_bytes for family in ample.experts.touching.families.values())
    trained = engine(tmp_path / "refused", experts_memory=nbytes)
    for step in range(2):
        for _ in range(2):
            with interrupted(trained.store, "write_many", 1, StoreError):
                trained.step(text(step), loss_fn)
        trained.step(text(step), loss_fn)
    assert finished(trained) == whole[CLIP]


@pytest.mark.parametrize("clip_norm", [None, CLIP])
def test_a_disk_that_is_full_is_all_that_is_said(
    clip_norm: float | None, tmp_path: Path, whole: Mapping[float | None, str]
) -> None:
    """Of experts that a step could not write the next one reads some; nothing of them is damaged."""
    settings = {"clip_norm": clip_norm, "commit_every": 3}
    device = Filling("write")
    with mock.patch.object(tiers, "Device", return_value=device):
        trained = engine(tmp_path / "full", **settings)
    for step in range(2):
        trained.step(text(step), loss_fn)
    device.room_bytes, said = 0, list[str]()
    for _ in range(4):
        try:
            trained.step(text(trained.step_count), loss_fn)
        except StoreError as error:
            said.append(str(error))
    assert said
    assert all("could not be written: No space left on device" in each for each in said), said
    with contextlib.suppress(StoreError):
        trained.close()
    assert finished(engine(tmp_path / "full", **settings)) == whole[clip_norm]


def half_way(path: Path) -> ws.Engine:
    trained = engine(path)
    for step in range(STEPS // 2):
        trained.step(text(step), loss_fn)
    trained.commit()
    return trained


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, LayerGrowth], str]:
    """How layers have grown after making up half-way, and the digest in the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = half_way(tmp_path_factory.mktemp("made up"))
    trained.make_up_experts()
    found = trained.growing.layers, finished(trained)
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("failing", ["write", "commit", "interrupted"])
def test_making_up_that_fails_leaves_the_run_as_it_was(
    failing: str, tmp_path: Path, made_up: tuple[dict[str, LayerGrowth], str]
) -> None:
    """With room it is tried again, and steps go on."""
    device, full = Filling("write"), OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(tiers, "Device", return_value=device):
        trained = half_way(tmp_path / "failing")
    before = trained.growing.layers
    if failing == "interrupted":
        with interrupted(Growing, "made"):
            trained.make_up_experts()
    else:
        device.room_bytes = 0 if failing == "write" else None
        publish = {"side_effect": full} if failing == "commit" else {"wraps": trained.store.manifest.publish}
        with (
            mock.patch.object(trained.store.manifest, "publish", **publish),
            pytest.raises(StoreError, match="No space left on device"),
        ):
            trained.make_up_experts()
        device.room_bytes = None
    assert trained.growing.layers == before
    trained.make_up_experts()
    assert trained.growing.layers == made_up[0]
    assert finished(trained) == made_up[1]


class Held:
    """Reads or writes of a store that are done only when they are let go."""

    def __init__(self, inner: Callable[..., "Future[Any]"]) -> None:
        self._inner, self.go, self.under_way = inner, new_future(), 0

    def __call__(self, records: Sequence[Any], *rest: Any, **settings: Any) -> "Future[Any]":
        self.under_way += 1
        return chain([self.go], lambda: self._inner(records, *rest, **settings))


def test_memory_that_is_being_read_into_is_not_given_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two reads the wait for the first is interrupted."""
    with engine(tmp_path / "store") as trained:
        touched = next(iter(trained.experts.touching.families.values()))
        reads = Held(trained.store.read_many)
        monkeypatch.setattr(trained.store, "read_many", reads)
        touched.begin(1, 0)
        touched.expect([1])
        touched.expect([2])
        with interrupted(touched, "_wait"):
            touched.packed([1, 2])
        dropping = threading.Thread(target=touched.drop)
        dropping.start()
        dropping.join(0.2)
        assert dropping.is_alive(), "it does not wait for the second read"
        reads.go.set_result(None)
        dropping.join()
        assert reads.under_way == 2


def test_memory_that_is_being_written_from_is_not_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tmp_path / "store") as trained:
        touched = next(iter(trained.experts.touching.families.values()))
        writes = Held(trained.store.write_many)
        monkeypatch.setattr(trained.store, "write_many", writes)
        touched.begin(1, 0)
        touched.packed(range(10))
        kept = len(touched._free)
        touched._write(range(10))
        with interrupted(touched, "_wait"):
            touched._make_room(touched.capacity)
        assert len(touched._free) == kept
        writes.go.set_result(None)
        touched._make_room(touched.capacity)
        assert len(touched._free) == touched.capacity
        trained.store.discard()


def test_interruptions_anywhere(tmp_path: Path, whole: Mapping[float | None, str]) -> None:
    """Who tries again ends like one that was never interrupted, unless an update was, or a step that counts: then the engine
    says so."""
    calls: list[tuple[type, str]] = [(Keeper, name) for name in ("update", "write", "publish_pending")]
    for number, (owner, name) in enumerate([*calls, (Outlook, "learn")]):
        trained = engine(tmp_path / f"{number}")
        trained.step(text(0), loss_fn)
        with interrupted(owner, name):
            trained.step(text(1), loss_fn)
            trained.commit()
        try:
            trained.commit()
        except StoreError:
            trained.close()
            trained = engine(tmp_path / f"{number}")
        assert finished(trained) == whole[CLIP], name
