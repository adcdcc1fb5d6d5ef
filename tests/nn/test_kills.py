"""Training of experts that is killed ten times, at random points of steps, writes and commits, ends like one that is not.

What is killed are processes: forks of one that has imported all and computed nothing, since a start takes seconds. Each
ends itself with SIGKILL before or after a call that was drawn beforehand, and so was how often it comes to it before.
"""

import ctypes
import functools
import gc
import mmap
import multiprocessing as mp
import os
import random
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # which autograd imports in its first backward: here once for all forks
from tests.nn.test_experts import engine, loss_fn, text

from weightstream.families.touching import Touched
from weightstream.runtime.keeping import Keeper
from weightstream.store.device import Device
from weightstream.store.manifest import Manifest
from weightstream.store.store import Store

STEPS = 24  # a process that is killed comes two steps further at most
KILLS = {Device: 3, Manifest: 1, Touched: 3, Keeper: 3}
PROMISED_LOSS = {None: 1, 0.5: 2}  # steps, by clipping
CALLS: tuple[tuple[type, str], ...] = (
    (Device, "read"), (Device, "write"), (Device, "sync"), (Device, "allocate"), (Manifest, "publish"),
    (Touched, "expect"), (Touched, "weights"), (Touched, "gradients"), (Touched, "close_sums"), (Touched, "update"),
    (Keeper, "load"), (Keeper, "update"), (Keeper, "write"), (Keeper, "commit"),
)  # fmt: skip
POINTS = tuple(f"{when} {owner.__name__}.{name}" for owner, name in CALLS for when in ("before", "after"))
_CONTEXT = mp.get_context("forkserver")
_PATIENCE_S = 240.0


class Seen(ctypes.Structure):
    """What a process leaves behind: how often it came to each point; the step at which it opened the store, and the last
    that it finished (-1: none)."""

    _fields_ = (("opened", ctypes.c_int64), ("finished", ctypes.c_int64), ("points", ctypes.c_int64 * len(POINTS)))


Fatal = tuple[int, int]
"""A point, and which time that it comes there is the last."""


def fork(work: Callable[[Seen], int]) -> tuple[int, Seen]:
    """Runs this in a fork; its exit code, negative for a signal, and what it has seen."""
    seen = Seen.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))  # shared
    seen.opened = seen.finished = -1
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen
    code = 1
    try:
        code = work(seen)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def train(path: Path, clip_norm: float | None, fatal: Fatal | None, seen: Seen) -> int:
    """Trains to the end, unless it is killed; 2 if the last one left damage."""
    if Store.exists(path):
        with Store.open(path, writable=False) as store:
            if store.verify():
                return 2
    watch(seen, fatal)
    with engine(path, clip_norm=clip_norm) as trained:
        seen.opened = trained.step_count
        while trained.step_count < STEPS:
            trained.step(text(trained.step_count), loss_fn)
            seen.finished = trained.step_count
    return 0


def watch(seen: Seen, fatal: Fatal | None) -> None:
    """Counts points from now on, and kills this process at one of them."""
    lock = threading.Lock()

    def point(number: int) -> None:
        with lock:
            seen.points[number] += 1
            if (number, seen.points[number]) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    for place, (owner, name) in enumerate(CALLS):
        setattr(owner, name, between(getattr(owner, name), point, 2 * place))


def between(inner: Callable[..., Any], point: Callable[[int], None], number: int) -> Callable[..., Any]:
    """The same with a point before and one after it."""

    @functools.wraps(inner)
    def watched(*arguments: Any, **settings: Any) -> Any:
        point(number)
        result = inner(*arguments, **settings)
        point(number + 1)
        return result

    return watched


def killed_and_not(pipe: Connection, folder: Path, clip_norm: float | None, seed: int) -> None:
    """In a process of its own: one run, and one that is killed; what came of both."""
    torch.set_num_threads(1)
    gc.freeze()  # forks open engines, which need not look through all that was imported, nor copy it
    code, whole = fork(lambda seen: train(folder / "whole", clip_norm, None, seen))
    assert code == 0
    drawn, kills = random.Random(seed), []
    often = {number: count // STEPS for number, count in enumerate(whole.points) if count >= STEPS}
    points = [
        number
        for owner, count in KILLS.items()
        for number in drawn.sample([number for number in often if CALLS[number // 2][0] is owner], count)
    ]
    drawn.shuffle(points)
    for number in [*points, None]:
        fatal = None if number is None else (number, drawn.randint(1, often[number]))
        code, seen = fork(lambda seen, fatal=fatal: train(folder / "killed", clip_norm, fatal, seen))
        point = "" if number is None else POINTS[number]
        kills.append({"code": code, "point": point, "opened": seen.opened, "finished": seen.finished})
    pipe.send(kills)


@pytest.mark.parametrize(
    ("clip_norm", "seed"), [pytest.param(None, 0, marks=pytest.mark.slow), (0.5, 1)], ids=["no clip", "clip"]
)
def test_ten_kills_at_random_points(clip_norm: float | None, seed: int, tmp_path: Path) -> None:
    _CONTEXT.set_forkserver_preload([__name__])
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=killed_and_not, args=(theirs, tmp_path, clip_norm, seed))
    process.start()
    theirs.close()
    try:
        assert ours.poll(_PATIENCE_S), "no answer"
        *kills, last = ours.recv()
    finally:
        process.join(1)
        process.kill()
    assert [kill["code"] for kill in kills] == 10 * [-signal.SIGKILL]
    assert last["code"] == 0
    stood = 0
    for kill in [*kills, last]:
        if kill["opened"] >= 0:  # not killed before
            assert stood - PROMISED_LOSS[clip_norm] <= kill["opened"] <= stood + 1, kills
            stood = max(kill["opened"], kill["finished"])
    digests = []
    for name in ("whole", "killed"):
        with Store.open(tmp_path / name, writable=False) as store:
            assert not store.verify()
            assert store.step == STEPS
            digests.append(store.digest())
    assert digests[0] == digests[1]
