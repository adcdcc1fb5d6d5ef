"""Units: every element of a block in exactly one of them, and no number depends on how a block is cut."""

from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.zoo import ZOO
from tests.store.cases import BLOCKS, filled, make

import weightstream as ws
from weightstream.blocks import PANEL_MULTIPLE, Block, Parameter, cut
from weightstream.errors import StoreMismatchError
from weightstream.store.images import gradient_image, slab_image
from weightstream.store.layout import record_layout
from weightstream.store.optimizers import Adafactor, AdamW
from weightstream.store.store import Store


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    found = []
    for index in range(draw(st.integers(1, 3))):
        shapes = draw(st.lists(st.lists(st.integers(1, 300), min_size=0, max_size=3), min_size=1, max_size=5))
        parameters = tuple(
            Parameter(f"b{index}.p{number}", tuple(shape), trainable=draw(st.booleans()))
            for number, shape in enumerate(shapes)
        )
        found.append(Block(index, f"b{index}", parameters, (f"b{index}",)))
    return found


@settings(max_examples=150, deadline=None)
@given(blocks(), st.integers(1, 40_000), st.booleans(), st.sampled_from(["bf16", "fp32"]))
def test_every_row_is_in_one_unit_and_panels_lie_without_gaps(
    given_blocks: list[Block], panel_elements: int, panels: bool, precision: str
) -> None:
    units = cut(given_blocks, panel_elements=panel_elements, panels=panels)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)
    for block in given_blocks:
        own = [unit for unit in units if unit.block == block.index]
        for parameter in block.parameters:
            pieces = [piece for unit in own for piece in unit.parameters if piece.name == parameter.name]
            rows = parameter.shape[0] if parameter.shape else 1
            if len(pieces) == 1:
                assert pieces[0] == parameter
            else:
                assert panels
                assert [piece.row for piece in pieces] == [
                    sum(p.shape[0] for p in pieces[:i]) for i in range(len(pieces))
                ]
                assert sum(piece.shape[0] for piece in pieces) == rows
                assert all(piece.rows == rows and piece.trainable == parameter.trainable for piece in pieces)
                assert all(prod(piece.shape) % PANEL_MULTIPLE == 0 for piece in pieces[:-1])
        slab = slab_image([record_layout(unit, precision, AdamW()) for unit in own])  # type: ignore[arg-type]
        gradients = gradient_image(own)
        for image, wanted in (
            (slab, {p.name for p in block.parameters}),
            (gradients, {p.name for p in block.parameters if p.trainable}),
        ):
            assert {spec.name for spec in image.tensors} == wanted
            ends = sorted((spec.offset, spec.offset + spec.nbytes) for spec in image.tensors)
            assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
            assert all(start % 4096 == 0 and stop % 4096 == 0 for start, stop in image.spans)
            shapes = {p.name: p.shape for p in block.parameters}
            assert all(spec.shape == shapes[spec.name] for spec in image.tensors)


@pytest.mark.parametrize("panel_elements", [1, 700, 2100, 8 << 20])
def test_neither_initial_values_nor_the_digest_depend_on_the_cut(panel_elements: int, tmp_path: Path) -> None:
    with make(tmp_path / "whole", panel_elements=1 << 30) as whole:
        assert len(whole.units) == len(BLOCKS)
        with make(tmp_path / "cut", panel_elements=panel_elements) as other:
            if panel_elements < 1000:
                assert len(other.units) > len(BLOCKS)
            for name, tensors in whole.items():
                for part, tensor in tensors.items():
                    assert torch.equal(other.tensor(name, part), tensor), (name, part)
            assert other.digest() == whole.digest()


def test_written_records_have_one_digest_however_cut(tmp_path: Path) -> None:
    digests = set()
    for panel_elements in (700, 1 << 30):
        path = tmp_path / f"{panel_elements}"
        with make(path, panel_elements=panel_elements) as store:
            for unit in store.units:
                if not unit.trainable:
                    continue
                buffer = filled(store.layout(unit.index), 1)
                for part in buffer.layout.states:
                    for spec, tensor in zip(part.tensors, buffer.tensors(part.name).values(), strict=True):
                        # a number for each place in the whole tensor
                        tensor.copy_((torch.arange(tensor.numel()) + spec.first_element).reshape(tensor.shape))
                if buffer.layout.has("copy"):
                    for name, tensor in buffer.tensors("copy").items():
                        tensor.copy_(buffer.tensors("param")[name])
                store.write(unit.index, buffer, 1, 1).result()
            store.commit(1, {}).result()
            digests.add(store.digest())
            assert store.verify() == []
    assert len(digests) == 1


def train(path: Path, steps: range, **settings: object) -> tuple[list[tuple[float, float]], str]:
    zoo = ZOO["gpt2"].with_(dropout=0.1)
    with ws.Engine(zoo.build, path, threads_per_worker=1, seed=3, **settings) as engine:  # type: ignore[arg-type]
        found = []
        for step in steps:
            result = engine.step(zoo.micro_batches(3, ragged=True, step=step), zoo.loss_fn)
            found.append((result.loss, result.grad_norm))
    with Store.open(path, writable=False) as store:
        return found, store.digest()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_without_clipping_a_cut_model_trains_to_the_same_bits(precision: str, tmp_path: Path) -> None:
    """The norm is summed by panel, and nothing else can tell."""
    common = {"optimizer": AdamW(lr=1e-2), "precision": precision}
    losses, whole = train(tmp_path / "whole", range(1, 5), **common)
    first, _ = train(tmp_path / "cut", range(1, 3), **common, panel_elements=600)
    second, cut_digest = train(tmp_path / "cut", range(3, 5), **common)
    assert [loss for loss, _ in (*first, *second)] == [loss for loss, _ in losses]
    assert [norm for _, norm in (*first, *second)] == pytest.approx([norm for _, norm in losses], rel=1e-12)
    assert cut_digest == whole


def test_a_cut_is_fixed_when_the_store_is_made(tmp_path: Path) -> None:
    train(tmp_path / "store", range(1, 2), optimizer=AdamW(), panel_elements=600)
    with pytest.raises(StoreMismatchError, match=r"panel_elements=600, this run has panel_elements=700"):
        train(tmp_path / "store", range(2, 3), optimizer=AdamW(), panel_elements=700)


def test_an_optimizer_that_looks_at_whole_tensors_is_not_cut(tmp_path: Path) -> None:
    with make(tmp_path / "store", optimizer=Adafactor(lr=0.1), panel_elements=1) as store:
        assert all(parameter.rows is None for unit in store.units for parameter in unit.parameters)
        assert len(store.units) > len(store.blocks)
