"""What is interrupted in the middle of a step that updates experts: nothing of that step stays, whoever goes on afterwards."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.faults.device import Filling
from tests.nn.test_experts import engine, loss_fn, text

import weightstream as ws
from weightstream.errors import StoreError
from weightstream.keeping import Keeper
from weightstream.outlook import Outlook
from weightstream.store import tiers
from weightstream.store.futures import chain, new_future
from weightstream.store.optimizers import AdamW
from weightstream.touching import Touched

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def once(inner: Callable[..., Any], call: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., Any]:
    """The same, but that one of its calls is interrupted, counted from 0."""
    calls = iter(range(call + 1))

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if next(calls, None) == call:
            raise error
        return inner(*arguments, **settings)

    return interrupted


def finished(trained: ws.Engine) -> str:
    while trained.step_count < STEPS:
        trained.step(text(trained.step_count), loss_fn)
    digest = trained.store.digest()
    trained.close()
    return digest


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("again", [True, False], ids=["tried again", "closed"])
def test_a_step_that_has_written_experts_of_one_layer_alone(
    again: bool, clip_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before waits for its commit: what is written of this one must not go with it."""
    settings = {"clip_norm": clip_norm, "commit_every": 3}
    expected = finished(engine(tmp_path / "whole", **settings))
    trained = engine(tmp_path / "interrupted", **settings)
    for step in range(2):
        trained.step(text(step), loss_fn)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Touched, "_optimize", once(Touched._optimize, 1))
        trained.step(text(2), loss_fn)
    if not again:
        trained.close()
        trained = engine(tmp_path / "interrupted", **settings)
    assert trained.step_count == 2
    assert finished(trained) == expected


@pytest.mark.parametrize("call", range(3))
def test_an_update_within_a_commit(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of which some parameters have taken their step, and others have not."""
    expected = finished(engine(tmp_path / "whole"))
    trained = engine(tmp_path / "interrupted")
    for step in range(2):
        trained.step(text(step), loss_fn)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AdamW, "update", once(AdamW.update, call))
        trained.commit()
    with pytest.raises(StoreError, match="a step was interrupted while it updated a record"):
        trained.commit()
    trained.close()
    trained = engine(tmp_path / "interrupted")
    assert trained.step_count == 1
    assert finished(trained) == expected


def test_records_that_could_not_be_written_leave_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine(tmp_path / "whole")
    touched = [whole.step(text(step), loss_fn).experts.values() for step in range(STEPS)]
    records = max(facts.touched for step in touched for facts in step) + 2  # hardly more than a step needs
    nbytes = records * sum(family.slot_bytes for family in whole.experts.touching.families.values())
    expected = finished(whole)
    trained = engine(tmp_path / "refused", experts_memory=nbytes)
    for step in range(2):
        for _ in range(2):
            with monkeypatch.context() as patched, pytest.raises(StoreError):
                patched.setattr(trained.store, "write_many", once(trained.store.write_many, 1, StoreError))
                trained.step(text(step), loss_fn)
        trained.step(text(step), loss_fn)
    assert finished(trained) == expected


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_disk_that_is_full_is_all_that_is_said(clip_norm: float | None, tmp_path: Path) -> None:
    """Of experts that a step could not write the next one reads some; nothing of them is damaged."""
    settings = {"clip_norm": clip_norm, "commit_every": 3}
    expected = finished(engine(tmp_path / "whole", **settings))
    device = Filling("write")
    with mock.patch.object(tiers, "Device", lambda: device):
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
    assert finished(engine(tmp_path / "full", **settings)) == expected


class Held:
    """Reads or writes of a store that are done only when they are let go."""

    def __init__(self, inner: Callable[..., "Future[Any]"]) -> None:
        self._inner, self.go, self.under_way = inner, new_future(), 0

    def __call__(self, records: Sequence[Any], *rest: Any, **settings: Any) -> "Future[Any]":
        self.under_way += 1
        return chain([self.go], lambda: self._inner(records, *rest, **settings))


def test_memory_that_is_being_read_into_is_not_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two reads the wait for the first is interrupted."""
    with engine(tmp_path / "store") as trained:
        touched = next(iter(trained.experts.touching.families.values()))
        reads = Held(trained.store.read_many)
        monkeypatch.setattr(trained.store, "read_many", reads)
        touched.begin(1, 0)
        touched.expect([1])
        touched.expect([2])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(touched, "_wait", once(touched._wait, 0))
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
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(touched, "_wait", once(touched._wait, 0))
            touched._make_room(touched.capacity)
        assert len(touched._free) == kept
        writes.go.set_result(None)
        touched._make_room(touched.capacity)
        assert len(touched._free) == touched.capacity
        trained.store.discard()


def test_interruptions_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after what a step does one after another at the store: who tries again ends like one that was never
    interrupted, unless an update was: then the engine says so."""
    calls = [(Keeper, name) for name in ("load", "update", "write", "update_touched", "publish_pending")]
    expected = finished(engine(tmp_path / "whole"))
    for number, (owner, name) in enumerate([*calls, (Outlook, "learn")]):
        trained = engine(tmp_path / f"{number}")
        trained.step(text(0), loss_fn)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, name, once(getattr(owner, name), 0))
            trained.step(text(1), loss_fn)
            trained.commit()
        try:
            trained.commit()
        except StoreError:
            trained.close()
            trained = engine(tmp_path / f"{number}")
        assert finished(trained) == expected, name
