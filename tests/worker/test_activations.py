"""Spilled activations keep their identity and their bytes; what somebody else can touch is never spilled."""

from typing import Any

import pytest
import torch
from tests.fabric.test_staging import FakeScratch
from torch import Tensor

from weightstream.worker.activations import Activations, spillable

KEY = (0, 0)


def boundary(seed: int = 0, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (64, 32)), generator=generator).to(dtype).requires_grad_()


def make(scratch: FakeScratch) -> Activations:
    return Activations(scratch, torch.device("cpu"))


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_and_bytes_survive(to_disk: bool, dtype: torch.dtype) -> None:
    scratch, tensors = FakeScratch(), [boundary(0, dtype=dtype), boundary(1, 5, 1031, dtype=dtype)]
    activations = make(scratch)
    expected = [tensor.detach().clone() for tensor in tensors]
    versions, ids = [tensor._version for tensor in tensors], [id(tensor) for tensor in tensors]
    for _ in range(2):  # forward and backward
        activations.spill(KEY, tensors, to_disk=to_disk)
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
        activations.restore(KEY)
        activations.wait(KEY)
        assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))
    assert [id(tensor) for tensor in tensors] == ids
    assert [tensor._version for tensor in tensors] == versions  # nobody changed it in place
    assert activations.spilled_bytes == sum(tensor.nbytes for tensor in tensors)  # written once, not twice
    assert activations.restored_bytes == 2 * activations.spilled_bytes
    assert len(scratch.bytes) == (2 if to_disk else 0)
    activations.drop(KEY)
    assert scratch.bytes == {}
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))
    activations.close()


def test_a_gradient_flows_through_what_was_spilled() -> None:
    activations, x = make(FakeScratch()), boundary()
    activations.spill(KEY, [x], to_disk=True)
    activations.wait(KEY)
    (x * 3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    activations.close()


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_tensor_of_two_visits_comes_back_and_stays(to_disk: bool) -> None:
    activations, x = make(FakeScratch()), boundary()
    expected = x.detach().clone()
    activations.spill(KEY, [x], to_disk=to_disk)
    activations.ensure([x])
    assert torch.equal(x, expected)
    activations.spill((3, 0), [x], to_disk=to_disk)
    assert torch.equal(x, expected)  # still here
    activations.clear()
    activations.spill((0, 0), [x], to_disk=to_disk)  # in the next step it is like any other
    assert x.untyped_storage().nbytes() == 0
    activations.close()


def test_buffers_are_used_again_and_not_before_their_write_has_ended() -> None:
    scratch = FakeScratch()
    activations = make(scratch)
    tensors = [boundary(seed) for seed in range(20)]
    expected = [tensor.detach().clone() for tensor in tensors]
    for index, tensor in enumerate(tensors):
        activations.spill((index, 0), [tensor], to_disk=True)
    held = sum(len(buffers) for buffers in activations._pool.values()) + len(activations._bounces)
    assert held <= 5, "the pool of bounce buffers grows with the number of visits"
    for index in reversed(range(20)):
        activations.wait((index, 0))
        activations.drop((index, 0))
        assert torch.equal(tensors[index], expected[index])
    assert scratch.bytes == {}
    activations.close()


def test_clearing_while_a_read_is_under_way_keeps_its_buffer_from_others() -> None:
    """A step that fails between Restore and its use: the read must end before its buffer is given to anybody."""

    class SlowReads(FakeScratch):
        pending: Any = None

        def scratch_read(self, key: object, view: memoryview) -> Any:
            from weightstream.store.futures import new_future

            future = new_future()
            data = self.bytes[key]

            def finish() -> None:
                view[:] = data
                future.set_result(None)

            import threading

            self.pending = threading.Timer(0.2, finish)
            self.pending.start()
            return future

    scratch = SlowReads()
    activations, old, new = make(scratch), boundary(0), boundary(1)
    expected = new.detach().clone()
    activations.spill(KEY, [old], to_disk=True)
    activations.restore(KEY)
    activations.clear()  # the step has failed
    for visit in range(4):  # the next one spills; some of it into the buffer that was being read into
        activations.spill((visit, 1), [new] if visit == 0 else [boundary(visit)], to_disk=False)
    scratch.pending.join()
    activations.wait((0, 1))
    assert torch.equal(new, expected)
    activations.close()


class TestSpillable:
    """In these calls the tensor has one reference: the variable here."""

    def test_a_leaf_of_the_tape(self) -> None:
        x = boundary()
        assert spillable(x, 1)

    def test_another_reference(self) -> None:
        x = boundary()
        held = [x]
        assert not spillable(x, 1)
        assert spillable(x, 2)
        assert held

    def test_another_tensor_on_the_same_bytes(self) -> None:
        x = boundary()
        other = x.detach()
        assert not spillable(x, 1)
        del other
        assert spillable(x, 1)
        part = x[1:]
        assert not spillable(x, 1)
        del part

    def test_saved_by_a_graph(self) -> None:
        x = boundary()
        y = x.exp() * x  # x is saved for backward
        assert not spillable(x, 1)
        del y

    def test_too_small_or_without_gradient_or_not_a_number(self) -> None:
        small, constant, index = boundary(0, 8), torch.randn(64, 32), torch.arange(4096)
        assert not spillable(small, 1)
        assert not spillable(constant, 1)
        assert not spillable(index, 1)
