"""What outlives an operation lies outside the heap, and goes back to the kernel with its tensor."""

import gc

import pytest
import torch

from weightstream.worker import pages
from weightstream.worker.activations import spillable
from weightstream.worker.allocator import Ceiling, anonymous_bytes, give_back, keep_memory

LARGE = (512, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values_and_nobody_else_holds_them(dtype: torch.dtype) -> None:
    heap = torch.randn(LARGE).to(dtype)
    made = pages.on_pages(heap)
    assert torch.equal(made, heap)
    assert (made.dtype, made.shape, made.stride()) == (heap.dtype, heap.shape, heap.stride())
    assert made.data_ptr() != heap.data_ptr()
    assert pages.has_pages(made)
    assert not pages.has_pages(heap)
    assert pages.on_pages(made) is made
    made.requires_grad_()
    assert spillable(made, 1)


def test_what_is_small_or_a_part_stays() -> None:
    whole = torch.randn(LARGE)
    for tensor in (torch.randn(8), whole[1:], whole.t(), whole[:, :512]):
        assert pages.on_pages(tensor) is tensor


def test_emptied_pages_leave_memory_and_can_be_filled_again() -> None:
    made = pages.on_pages(torch.ones(64 << 20, dtype=torch.uint8))
    full = anonymous_bytes()
    pages.empty(made)
    assert full - anonymous_bytes() > 60 << 20
    assert not made.any()
    made.fill_(7)
    assert int(made.sum(dtype=torch.int64)) == 7 * made.numel()


def test_pages_that_were_spilled_take_no_memory_while_they_are_free() -> None:
    heap = torch.ones(64 << 20, dtype=torch.uint8)  # throughout, as an allocator may keep what it had for it
    before = anonymous_bytes()
    for _ in range(3):  # boundaries that come back one after another
        made = pages.on_pages(heap)
        pages.empty(made)
        made.fill_(7)
        assert anonymous_bytes() - before > 60 << 20
        del made
        gc.collect()
        assert anonymous_bytes() - before < 10 << 20
    kept = pages.on_pages(heap)  # never spilled: its pages are the next one's
    del kept
    gc.collect()
    assert anonymous_bytes() - before > 60 << 20


def test_pages_outlive_no_alias_and_serve_the_next_tensor_of_their_size() -> None:
    made = pages.on_pages(torch.ones(64 << 20, dtype=torch.uint8))
    alias, where = made.detach(), made.untyped_storage().data_ptr()
    del made
    assert pages.has_pages(alias)
    assert pages.on_pages(torch.ones(64 << 20, dtype=torch.uint8)).data_ptr() != where, "an alias still has them"
    del alias
    gc.collect()
    again = pages.on_pages(torch.zeros(64 << 20, dtype=torch.uint8))
    assert again.data_ptr() == where
    assert not again.any()


def test_free_pages_go_back_when_their_size_is_not_wanted_any_more() -> None:
    gone = pages.on_pages(torch.ones(64 << 20, dtype=torch.uint8))
    pages.trim()
    full = anonymous_bytes()
    del gone
    assert full - anonymous_bytes() < 4 << 20, "kept for the next tensor"
    pages.trim()
    assert full - anonymous_bytes() > 60 << 20


def test_holes_of_the_heap_are_given_back_above_the_ceiling_only() -> None:
    if not keep_memory():
        pytest.skip("not glibc")
    give_back()  # what earlier tests left free would be used first, and the process not grow
    kept, ceiling = [], Ceiling(64 << 20)
    for _ in range(256):  # what is used between what is freed, so that the heap cannot shrink
        freed = torch.ones(1 << 20, dtype=torch.uint8)
        kept.append(torch.ones(1 << 14, dtype=torch.uint8))
        kept.append(freed)
        del freed
    kept = kept[::2]
    before = anonymous_bytes()
    ceiling.check()
    assert ceiling.returns == 1
    assert before - anonymous_bytes() > 180 << 20
    high = Ceiling(1 << 40)
    high.check()
    assert high.returns == 0
