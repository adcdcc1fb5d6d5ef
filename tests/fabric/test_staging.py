"""Staged gradients: in RAM, or through a ring of buffers to scratch; no buffer is lost on any way."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from weightstream.blocks import Parameter, Unit
from weightstream.fabric.reduction import Squares
from weightstream.fabric.staging import Pool, Staging
from weightstream.store.futures import done, new_future
from weightstream.store.images import Image, gradient_image


class FakeScratch:
    """Scratch in a dictionary. Where `hold` is set nothing ends before `flush`, in order of issue."""

    def __init__(self, *, hold: bool = False) -> None:
        self.bytes: dict[object, bytes] = {}
        self.hold = hold
        self._waiting: list[tuple[Future[None], object, memoryview, bool]] = []

    def scratch_write(self, key: object, view: memoryview) -> Future[None]:
        return self._issue(key, view, write=True)

    def scratch_read(self, key: object, view: memoryview) -> Future[None]:
        return self._issue(key, view, write=False)

    def scratch_free(self, key: object) -> None:
        self.flush()
        del self.bytes[key]

    def _issue(self, key: object, view: memoryview, *, write: bool) -> Future[None]:
        future: Future[None] = new_future()
        self._waiting.append((future, key, view, write))
        if not self.hold:
            self.flush()
        return future

    def flush(self) -> None:
        while self._waiting:
            future, key, view, write = self._waiting.pop(0)
            if write:
                self.bytes[key] = bytes(view)
            else:
                view[:] = self.bytes[key]
            future.set_result(None)


def image(block: int) -> Image:
    """Of a block of two units, the second of which is frozen."""
    w, b = Parameter(f"b{block}.w", (3, 5)), Parameter(f"b{block}.b", (7,))
    frozen = Unit(1, block, "", (Parameter(f"b{block}.f", (2,), trainable=False),))
    return gradient_image([Unit(0, block, "", (w, b)), frozen])


def make(scratch: FakeScratch, count: int = 4, **settings: object) -> Staging:
    chosen = {"in_ram": frozenset(), "ring": 2, "partial_sums": 1, "held_gradients": 1,
              "device": torch.device("cpu"), "immediate": False}  # fmt: skip
    return Staging(scratch, [image(block) for block in range(count)], **(chosen | settings))  # type: ignore[arg-type]


def stage(staging: Staging, block: int, names: tuple[str, ...] = ("w", "b"), value: float = 1.0) -> Squares:
    total = staging.open(block, micro_batches=2, groups=2, brief=True)
    for micro_batch in range(2):
        for name in names:
            shape = (3, 5) if name == "w" else (7,)
            total.add(f"b{block}.{name}", 0, micro_batch, torch.full(shape, value * (1 + micro_batch)))
    return staging.close(block)


def found(staging: Staging, block: int) -> dict[str, Tensor]:
    staging.ready(block).result(timeout=5)
    return {name: grad.clone() for (name, _), grad in staging.gradients(block).items()}


@pytest.fixture(params=["in RAM", "through the ring", "some of each"])
def in_ram(request: pytest.FixtureRequest) -> frozenset[int]:
    return {"in RAM": frozenset(range(4)), "through the ring": frozenset(), "some of each": frozenset({1, 2})}[
        request.param
    ]


def test_comes_back_as_it_was_staged(in_ram: frozenset[int]) -> None:
    scratch = FakeScratch()
    staging = make(scratch, in_ram=in_ram, ring=0 if len(in_ram) == 4 else 2)
    for _ in range(3):  # steps
        for block in range(4):
            squares = stage(staging, block, value=block + 1)
            assert squares == {(f"b{block}.{n}", 0): count * 9 * (block + 1) ** 2 for n, count in (("w", 15), ("b", 7))}
        assert staging.staged() == {0, 1, 2, 3}
        assert set(scratch.bytes) == {("gradient", block) for block in set(range(4)) - in_ram}
        for block in range(4):
            grads = found(staging, block)
            assert list(grads) == [f"b{block}.w", f"b{block}.b"]
            assert all(torch.equal(grad, torch.full_like(grad, 3.0 * (block + 1))) for grad in grads.values())
            staging.release(block)
        assert staging.staged() == frozenset()
        assert scratch.bytes == {}
    assert len(staging._ring.buffers) == (0 if len(in_ram) == 4 else 2)  # did not grow
    staging.close_buffers()


def test_only_what_got_a_gradient(in_ram: frozenset[int]) -> None:
    staging = make(FakeScratch(), in_ram=in_ram)
    stage(staging, 0)
    staging.release(0)
    assert set(stage(staging, 0, names=("b",))) == {("b0.b", 0)}  # the other one's old bytes are no gradient
    assert list(found(staging, 0)) == ["b0.b"]
    assert stage(staging, 1, names=()) == {}
    assert staging.staged() == {0}
    assert staging.close(3) == {}
    staging.close_buffers()


def test_a_buffer_is_not_taken_before_its_write_has_ended() -> None:
    scratch = FakeScratch(hold=True)
    staging = make(scratch, ring=1)
    stage(staging, 0, value=1.0)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(stage, staging, 1, ("w", "b"), 5.0)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.1)
        scratch.flush()
        second.result(timeout=5)
    scratch.hold = False
    scratch.flush()
    assert torch.equal(found(staging, 0)["b0.b"], torch.full((7,), 3.0))
    staging.close_buffers()


def test_the_ring_grows_where_more_sums_are_open_than_planned() -> None:
    staging = make(FakeScratch(), ring=1)
    sums = [staging.open(block, micro_batches=1, groups=1, brief=False) for block in range(3)]
    for block, total in enumerate(sums):
        total.add(f"b{block}.b", 0, 0, torch.full((7,), float(block)))
    for block in range(3):
        staging.close(block)
    for block in range(3):
        assert torch.equal(found(staging, block)[f"b{block}.b"], torch.full((7,), float(block)))
        staging.release(block)
    assert len(staging._ring.buffers) == 3
    staging.close_buffers()


def test_an_aborted_step_gives_its_sums_back() -> None:
    scratch = FakeScratch()
    staging = make(scratch, ring=2, in_ram=frozenset({3}))
    stage(staging, 0)
    for block in (1, 3):
        staging.open(block, micro_batches=1, groups=1, brief=True).add(f"b{block}.b", 0, 0, torch.ones(7))
    staging.abort()
    assert staging.staged() == {0}
    stage(staging, 1)
    stage(staging, 2)
    assert len(staging._ring.buffers) == 2
    staging.clear()
    assert scratch.bytes == {}
    staging.close_buffers()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_clearing_what_is_on_its_way_back_loses_no_buffer(order: tuple[int, ...]) -> None:
    """A skipped or failed step: some gradients were prefetched, one of them still waits for a buffer of the ring."""
    scratch = FakeScratch()
    staging = make(scratch, ring=2)
    for block in range(3):
        stage(staging, block)
    for block in order:
        staging.prefetch(block)
    ended = threading.Event()
    threading.Thread(target=lambda: (staging.clear(), ended.set()), daemon=True).start()
    assert ended.wait(5), "clear() waits for a buffer that it gives back itself later"
    assert scratch.bytes == {}
    stage(staging, 0)
    assert len(staging._ring.buffers) == 2
    staging.close_buffers()


def test_a_gradient_that_is_needed_now_does_not_wait_for_those_loaded_ahead() -> None:
    """Where a model calls other blocks than were planned: the ring is full of gradients that are not wanted yet."""
    staging = make(FakeScratch(), ring=2)
    for block in range(3):
        stage(staging, block, value=block + 1)
    staging.prefetch(0)
    staging.prefetch(1)
    assert torch.equal(found(staging, 2)["b2.b"], torch.full((7,), 9.0))
    staging.clear()
    staging.close_buffers()


def test_immediate_gradients_never_go_to_scratch() -> None:
    scratch = FakeScratch()
    staging = make(scratch, immediate=True, ring=1)
    for block in range(4):
        stage(staging, block, value=2.0)
        assert torch.equal(found(staging, block)[f"b{block}.b"], torch.full((7,), 6.0))
        staging.release(block)
    assert scratch.bytes == {}
    assert len(staging._ring.buffers) == 1
    staging.close_buffers()


def test_gradients_lie_on_cache_lines() -> None:
    assert image(0).nbytes == 4096
    staging = make(FakeScratch(), count=1)
    stage(staging, 0)
    assert all(grad.data_ptr() % 64 == 0 for grad in staging.gradients(0).values())
    staging.close_buffers()


class TestPool:
    def test_first_come_first_served(self) -> None:
        pool = Pool(["a"])
        first, second, third = pool.take(), pool.take(), pool.take()
        assert first.result() == "a"
        busy: Future[None] = new_future()
        pool.give("a", after=busy)
        assert not second.done()
        busy.set_result(None)
        assert second.result() == "a"
        assert not third.done()
        pool.give("a", after=done(None))
        assert third.done()

    def test_comes_back_after_a_failed_use(self) -> None:
        pool, busy = Pool(["a"]), new_future()
        pool.take()
        pool.give("a", after=busy)
        busy.set_exception(OSError())
        assert pool.take().result(timeout=1) == "a"

    @pytest.fixture
    def switching(self) -> Iterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_no_buffer_is_lost_between_threads(self, switching: None) -> None:
        """`take` in one thread beside `give` in another: each must see the other's half."""
        pool = Pool(range(2))
        with ThreadPoolExecutor(2) as workers:
            for _ in range(3000):
                buffer = pool.take().result(timeout=10)
                pool.give(buffer, after=workers.submit(int))
            assert sorted(pool.take().result(timeout=10) for _ in range(2)) == [0, 1]
