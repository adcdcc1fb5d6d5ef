"""Slabs, and the parameters that are views of them while their block is present."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from weightstream.blocks import split
from weightstream.store.images import slab_image
from weightstream.store.layout import record_layout
from weightstream.store.optimizers import SGD
from weightstream.worker.slabs import Parameters, Slabs, SlabView

CPU = torch.device("cpu")


@pytest.fixture
def slabs() -> Iterator[Slabs]:
    made = Slabs(CPU, (2, 4096), [8192])
    for slab in range(3):
        made[slab].base.copy_(torch.arange(made[slab].base.numel()).to(torch.uint8))
    yield made
    made.close()


def test_what_lies_in_a_slab_is_saved_as_its_place(slabs: Slabs) -> None:
    slabs.hold(7, 1)
    weight = slabs[1].view(64, torch.float32, (4, 8), (8, 1))
    saved = slabs.pack(weight.t()[1:])
    assert isinstance(saved, SlabView)
    assert (saved.block, saved.offset, saved.shape, saved.stride) == (7, 64 + 4, (7, 4), (1, 8))
    expected = weight.t()[1:].clone()
    slabs.release(7)
    slabs[1].base.zero_()
    slabs.hold(7, 0)  # it comes back elsewhere, with the same bytes
    assert torch.equal(slabs.unpack(saved), expected)


def test_what_lies_elsewhere_is_saved_itself(slabs: Slabs) -> None:
    slabs.hold(7, 1)
    for tensor in (torch.randn(3), torch.empty(0), slabs[0].view(0, torch.float32, (4,), (1,))):
        assert slabs.pack(tensor) is tensor
        assert slabs.unpack(tensor) is tensor


def test_within(slabs: Slabs) -> None:
    last = slabs[2].view(8188, torch.float32, (1,), (1,))
    assert slabs.within(last)
    assert not slabs.within(torch.randn(3))
    assert not slabs.within(torch.empty(0))
    assert slabs.slab_of(3) is None


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_parameters_are_nan_unless_their_block_is_present(precision: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    model[0].weight.requires_grad_(False)
    blocks = split(model)
    parameters = Parameters(model, blocks, CPU, dtype)
    layout = record_layout(blocks[0], precision, SGD(lr=0.1))  # type: ignore[arg-type]
    slabs = Slabs(CPU, (1, layout.streamed.nbytes), [])
    values = torch.arange(15).reshape(5, 3).to(dtype)
    place = next(spec for spec in layout.streamed.tensors if spec.name == "0.weight")
    slabs[0].view(place.offset, dtype, (5, 3), (3, 1)).copy_(values)
    identity = id(model[0].weight)

    def absent() -> None:
        assert not parameters.present(0)
        assert model[0].weight.shape == (5, 3)
        assert model[0].weight.isnan().all()
        assert model[0].weight.untyped_storage().nbytes() == dtype.itemsize  # one NaN, expanded

    absent()
    parameters.bind(0, slabs[0], slab_image([layout]))
    assert parameters.present(0)
    assert not parameters.present(1)
    assert torch.equal(model[0].weight, values)
    assert slabs.within(model[0].weight)
    assert id(model[0].weight) == identity
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]
    assert parameters.name(model[0].bias) == "0.bias"
    parameters.unbind(0)
    absent()
    slabs.close()


def test_tied_parameters_stay_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    Parameters(model, split(model), CPU, torch.float32)
    assert model["b"].weight is model["a"].weight
