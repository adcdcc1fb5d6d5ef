"""Threads of micro-batches: one runs at a time, errors come to the scheduler, and none is left behind."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weightstream.worker.generators import Generators
from weightstream.worker.microbatch import MicroBatch, current

CPU = torch.device("cpu")
made: list[MicroBatch] = []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("micro-batch")]


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    for micro_batch in made:
        micro_batch.stop()
    made.clear()
    assert threads() == []


def micro_batch(run: Callable[[], Any], index: int = 0) -> MicroBatch:
    made.append(MicroBatch(index, run, Generators(CPU), CPU, lambda parameter: None, lambda result: result))
    return made[-1]


def ask(module: str, *args: Any, **kwargs: Any) -> Any:
    me = current()
    assert me is not None
    return me.call(module, args, kwargs)


def test_runs_from_request_to_request() -> None:
    one = micro_batch(lambda: ask("a", 1) + ask("b", 2, key=3))
    one.resume(seed=0)
    assert one.request is not None
    assert (one.request.module, one.request.args) == ("a", (1,))
    one.resume(10)
    assert one.request is not None
    assert (one.request.module, one.request.args, one.request.kwargs) == ("b", (2,), {"key": 3})
    one.resume(20)
    assert one.request is None
    assert one.loss == 30
    assert current() is None  # here is the scheduler's thread


def test_an_error_is_raised_where_the_scheduler_resumes() -> None:
    def fails() -> Tensor:
        ask("a")
        raise ZeroDivisionError("mine")

    one = micro_batch(fails)
    one.resume(seed=0)
    with pytest.raises(ZeroDivisionError, match="mine"):
        one.resume(None)
    one.stop()
    assert threads() == []


def test_one_that_sleeps_is_stopped_and_its_finally_runs() -> None:
    ended = []

    def run() -> None:
        try:
            ask("a")
        except Exception:  # what a user's `except Exception` catches must not be the stop
            ended.append("caught")
        finally:
            ended.append("finally")

    one, never = micro_batch(run), micro_batch(run)
    one.resume(seed=0)
    one.stop()
    never.stop()
    assert ended == ["finally"]
    assert threads() == []


def test_each_has_its_own_random_state() -> None:
    def run() -> list[float]:
        drawn = [torch.rand(()).item()]
        ask("a")
        return [*drawn, torch.rand(()).item()]

    alone = micro_batch(run)
    alone.resume(seed=4)
    alone.resume()
    pair = [micro_batch(run, 0), micro_batch(run, 1)]
    pair[0].resume(seed=4)
    pair[1].resume(seed=5)
    torch.manual_seed(99)
    pair[1].resume()
    pair[0].resume()
    assert pair[0].loss == alone.loss
    assert pair[1].loss != alone.loss


def test_operations_between_blocks_run_in_the_schedulers_thread_with_the_callers_modes() -> None:
    seen: list[tuple[str, bool]] = []

    class Noticing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.exp.default:
                seen.append((threading.current_thread().name, torch.is_grad_enabled()))
            return func(*args, **(kwargs or {}))

    def run() -> tuple[Tensor, ...]:
        x = torch.ones(8, requires_grad=True)
        plain = torch.exp(x)
        with torch.no_grad():
            without = torch.exp(x)
            assert not torch.is_grad_enabled()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = torch.ones(8, 8) @ torch.ones(8, 8)
        assert torch.is_grad_enabled()
        return plain, without, cast

    one = micro_batch(run)
    with Noticing():  # of this thread
        one.resume(seed=0)
    plain, without, cast = one.loss  # type: ignore[misc]
    here = threading.current_thread().name
    assert [name for name, _ in seen] == [here, here]
    assert plain.requires_grad
    assert not without.requires_grad
    assert cast.dtype == torch.bfloat16
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_an_operation_is_raised_in_the_users_code() -> None:
    def run() -> str:
        try:
            torch.zeros(4) + torch.zeros(3)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    one = micro_batch(run)
    one.resume(seed=0)
    assert "must match" in str(one.loss)
