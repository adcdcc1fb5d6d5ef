"""Blocks cut into units: every element is in one of them, and whoever reads a whole tensor need not know of it."""

import shutil
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store.cases import CONTRACT, filled, make
from tests.store.test_initial import LAYERED, NORMAL

from weightstream.blocks import PANEL_MULTIPLE, Block, Parameter, Unit, cut
from weightstream.errors import StoreError
from weightstream.store.difference import difference
from weightstream.store.given import fill, unfilled
from weightstream.store.images import gradient_image, slab_image
from weightstream.store.initial import generate
from weightstream.store.layout import TensorSpec, record_layout
from weightstream.store.optimizers import SGD, Adafactor, AdamW
from weightstream.store.owned import Holding, WorkingBuffer, bytes_of_blocks
from weightstream.store.pull import pull
from weightstream.store.push import push
from weightstream.store.recipes import Recipe
from weightstream.store.segments import AlignedBuffer
from weightstream.store.store import Store

PANEL_ELEMENTS = 4096
SHAPES = {  # 5 panels with a short one at the end; 2 that are three-dimensional; a frozen one that is cut
    "weight": (300, 64), "norm": (64,), "experts": (3, 32, 128), "bias": (100,), "still": (70, 128), "wide": (1, 5000),
}  # fmt: skip
BLOCKS = (
    Block(0, "embed", (Parameter("embed.weight", (40, 8)),), ("embed",)),
    Block(1, "layer", tuple(Parameter(f"layer.{k}", s, k != "still") for k, s in SHAPES.items()), ("layer",)),
    Block(2, "frozen", (Parameter("frozen.a", (130, 64), False), Parameter("frozen.b", (3,), False)), ("frozen",)),
)
RECIPES = {p.name: NORMAL for block in BLOCKS for p in block.parameters} | {"layer.weight": LAYERED}


def make_cut(path: Path, panel_elements: int = PANEL_ELEMENTS, precision: Any = "bf16", **changes: Any) -> Store:
    arguments: dict[str, Any] = {"blocks": BLOCKS, "recipes": RECIPES, "panel_elements": panel_elements}
    return make(path, precision, **(arguments | changes))


def train(store: Store, steps: int = 2) -> None:
    """Steps of AdamW on every block, with gradients that depend on the step alone."""
    holding = Holding(store)
    for step in range(1, steps + 1):
        for block in BLOCKS:
            if not block.trainable:
                continue
            buffer = WorkingBuffer(holding.bytes[block.index].written)
            holding.load(block.index, buffer).result(timeout=30)
            update(holding, block, buffer, step)
            holding.write(block.index, buffer, holding.checksums(block.index, buffer)).result(timeout=30)
            buffer.close()
        store.commit(step, {}).result(timeout=30)


def update(holding: Holding, block: Block, buffer: WorkingBuffer, step: int) -> None:
    grads = gradients(block, step)
    for piece in holding.pieces(block.index, buffer):
        assert piece.count == step
        if piece.trainable:
            holding.store.optimizer.update(
                piece.master, piece.of(grads[piece.name]), piece.states, name=piece.name, step=step, count=piece.count
            )
        if piece.copy is not None:
            piece.copy.copy_(piece.master)


def gradients(block: Block, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + block.index)
    return {p.name: torch.randn(p.shape, generator=generator) for p in block.parameters if p.trainable}


shapes = st.lists(st.integers(0, 300), min_size=0, max_size=3).map(tuple)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([1, 1000, 2048, 5000, 40_000, 8 << 20]), st.booleans(), st.sampled_from(["bf16", "fp32"]),
)  # fmt: skip
def test_units_have_every_element_once(
    blocks_shapes: list[list[tuple[tuple[int, ...], bool]]], panel_elements: int, panels: bool, precision: Any
) -> None:
    blocks = [
        Block(i, f"b{i}", tuple(Parameter(f"b{i}.{j}", *chosen) for j, chosen in enumerate(chosen_shapes)), ())
        for i, chosen_shapes in enumerate(blocks_shapes)
    ]
    units = cut(blocks, panel_elements=panel_elements, panels=panels)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)
    for block in blocks:
        own = [unit for unit in units if unit.block == block.index]
        assert len({unit.name for unit in own}) == len(own)
        if block.numel <= panel_elements:
            assert [unit.parameters for unit in own] == [block.parameters]
        if len(own) == 1:
            assert own[0].name == block.name
        for parameter in block.parameters:
            check_pieces(parameter, [p for unit in own for p in unit.parameters if p.name == parameter.name], panels)
        assert all(unit.numel <= panel_elements or len(unit.parameters) == 1 for unit in own)
        check_images(block, own, precision)


def check_pieces(parameter: Parameter, pieces: list[Parameter], panels: bool) -> None:
    if len(pieces) == 1:
        assert pieces == [parameter]
        return
    assert panels
    row = 0
    for piece in pieces:
        assert (piece.row, piece.rows) == (row, parameter.shape[0])
        assert piece.shape[1:] == parameter.shape[1:]
        assert piece.trainable == parameter.trainable
        row += piece.shape[0]
        assert piece.numel % PANEL_MULTIPLE == 0 or row == parameter.shape[0]
    assert row == parameter.shape[0]


def check_images(block: Block, units: list[Unit], precision: Any) -> None:
    """Every tensor is whole and by itself, and every unit's span is its own pages."""
    slab = slab_image([record_layout(unit, precision, SGD()) for unit in units])
    gradient = gradient_image(units)
    for image, wanted in ((slab, block.parameters), (gradient, [p for p in block.parameters if p.trainable])):
        assert {spec.name: spec.shape for spec in image.tensors} == {p.name: p.shape for p in wanted}
        assert [stop for _, stop in image.spans[:-1]] == [start for start, _ in image.spans[1:]]
        assert all(start % 4096 == 0 for start, _ in image.spans)
        assert image.nbytes == image.spans[-1][1]
        places = sorted((spec.offset, spec.offset + spec.nbytes) for spec in image.tensors if spec.nbytes)
        assert all(offset % 64 == 0 for offset, _ in places)
        assert all(before <= after for (_, before), (after, _) in pairwise(places))
        assert not places or places[-1][1] <= image.nbytes
        for name, panels in image.panels.items():
            spec = next(spec for spec in image.tensors if spec.name == name)
            assert [panel.stop for panel in panels[:-1]] == [panel.start for panel in panels[1:]]
            assert (panels[0].start, panels[-1].stop) == (0, prod(spec.shape))
            starts = {spec.offset + panel.start * spec.dtype.itemsize for panel in panels}
            assert starts <= {start for start, _ in image.spans}


def test_the_cases_are_what_they_say(tmp_path: Path) -> None:
    with make_cut(tmp_path / "store") as store:
        pieces = {p.name: len(store.units_with(p.name)) for block in BLOCKS for p in block.parameters}
        assert pieces == {
            "embed.weight": 1, "layer.weight": 5, "layer.norm": 1, "layer.experts": 3, "layer.bias": 1, "layer.still": 3,
            "layer.wide": 1, "frozen.a": 3, "frozen.b": 1,
        }  # fmt: skip
        assert [len(store.units_of(block.index)) for block in BLOCKS] == [1, 13, 4]
        assert store.layout(0).block == "embed"
        assert store.layout(3).block == "layer.weight[0:64]"
        assert store.units_with("nothing") == ()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_panels_are_made_as_the_whole_is(tmp_path: Path, precision: Any) -> None:
    with make_cut(tmp_path / "store", precision=precision) as store:
        for block in BLOCKS:
            for p in block.parameters:
                expected = generate(RECIPES[p.name], seed=CONTRACT["seed"], name=p.name, shape=p.shape)  # type: ignore[arg-type]
                assert torch.equal(store.tensor(p.name), expected)
        holding = Holding(store)
        for block in BLOCKS:
            found = in_slab(holding, block.index)
            for p in block.parameters:
                assert torch.equal(found[p.name], store.tensor(p.name).to(found[p.name].dtype))


def in_slab(holding: Holding, block: int, *, memory: AlignedBuffer | None = None) -> dict[str, torch.Tensor]:
    image = holding.slabs[block]
    memory = memory or AlignedBuffer(image.nbytes)
    holding.fetch(block, memory.view).result(timeout=30)
    return views(memory, image.tensors)


def views(memory: AlignedBuffer, tensors: tuple[TensorSpec, ...]) -> dict[str, torch.Tensor]:
    return {spec.name: memory.tensor(spec.dtype, spec.offset, spec.shape) for spec in tensors}


def test_what_is_read_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    found = []
    for number, panel_elements in enumerate((PANEL_ELEMENTS, 2048, 20_000, 8 << 20)):
        with make_cut(tmp_path / str(number), panel_elements) as store:
            initial = store.digest()
            train(store)
            items = {name: {part: t.clone() for part, t in parts.items()} for name, parts in store.items()}
            assert [name for name, _ in store.items()] == sorted(p.name for b in BLOCKS for p in b.parameters)
            found.append((initial, store.digest(), items))
            assert store.verify() == []
    for initial, digest, items in found[1:]:
        assert (initial, digest) == found[0][:2]
        for name, parts in found[0][2].items():
            assert parts.keys() == items[name].keys()
            assert all(torch.equal(tensor, items[name][part]) for part, tensor in parts.items()), name
    with Store.open(tmp_path / "0", writable=False) as a, Store.open(tmp_path / "2", writable=False) as b:
        assert difference(a, b)["equal"]
    with Store.open(tmp_path / "1") as a, Store.open(tmp_path / "0", writable=False) as b:
        (unit, *_) = a.units_with("layer.weight")[1:]
        with a.transaction() as changes:
            changes[unit]["layer.weight"]["param"][1, 3] += 1
        report = difference(a, b)
        assert report["lines"] == [str(line) for line in report["lines"] if line.startswith("layer.weight param: ")]
        assert "1 of 19200 elements" in report["lines"][0]
        assert a.digest() != b.digest()


def test_a_store_opens_as_it_was_cut(tmp_path: Path) -> None:
    with make_cut(tmp_path / "store") as store:
        train(store)
        units, digest, blocks = store.units, store.digest(), store.blocks
        store.snapshot("here")
        store.branch("here", tmp_path / "branch")
    push(tmp_path / "store", tmp_path / "target")
    pull(tmp_path / "target", tmp_path / "pulled")
    for name in ("store", "branch", "pulled"):
        with Store.open(tmp_path / name) as store:
            assert (store.units, store.blocks, store.digest()) == (units, blocks, digest)
            assert store.panel_elements == PANEL_ELEMENTS
            assert blocks == BLOCKS
            assert store.info()["units"] == len(units)


def test_what_is_frozen_is_written_once(tmp_path: Path) -> None:
    """Also a frozen tensor in a block whose others are trained, if it has units of its own."""
    with make_cut(tmp_path / "store") as store:
        train(store)
        still = {*store.units_with("layer.still"), *store.units_of(2)}
        assert {unit.index for unit in store.units if not unit.trainable} == still
        versions = store.info()["versions"]
        assert all(version == (0 if index in still else 2) for index, version in enumerate(versions))


def test_given_values_of_tensors_that_are_cut(tmp_path: Path) -> None:
    values = {p.name: torch.randn(p.shape) for block in BLOCKS for p in block.parameters}
    with make_cut(tmp_path / "store", recipes={}) as store:
        assert len(unfilled(store)) == len(store.units)
        fill(store, values)
        assert not unfilled(store)
        assert all(torch.equal(parts["param"], values[name]) for name, parts in store.items())
    shutil.rmtree(tmp_path / "store")
    with (
        make_cut(tmp_path / "store", recipes={}) as store,
        pytest.raises(
            StoreError, match=r"'layer.weight' has shape \(300, 64\), the values given are of shape \(30, 64\)"
        ),
    ):
        fill(store, values | {"layer.weight": values["layer.weight"][:30]})


def test_whole_tensors_where_the_optimizer_needs_them(tmp_path: Path) -> None:
    with make_cut(tmp_path / "store", optimizer=Adafactor()) as store:
        assert all(p.rows is None for unit in store.units for p in unit.parameters)
        assert [len(store.units_of(block.index)) for block in BLOCKS] == [1, 6, 2]
        store.write(2, filled(store.layout(2), 1), 1, 1).result(timeout=30)

    class Scalars(SGD):
        def states(self, shape: tuple[int, ...]) -> dict[str, Any]:
            return {"scale": (torch.float32, ())}

    with pytest.raises(StoreError, match="state 'scale' of layer.weight.*is not elementwise"):
        make_cut(tmp_path / "other", optimizer=Scalars())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_owners_of_parts_make_what_one_owner_makes(tmp_path: Path, precision: Any) -> None:
    """Three ranks on stores of their own: their parts of a slab, and their updates, put together."""
    with make_cut(tmp_path / "whole", precision=precision) as store:
        train(store)
        whole = Holding(store)
        slabs = {block.index: in_slab(whole, block.index) for block in BLOCKS}
        items = dict(store.items())
        sizes = whole.bytes
        assert sizes == tuple(
            bytes_of_blocks(BLOCKS, precision=precision, optimizer=AdamW(), panel_elements=PANEL_ELEMENTS)
        )
    parts = []
    units = range(18)
    for rank in range(3):
        with make_cut(tmp_path / f"{rank}", precision=precision) as store:
            # the embedding has one owner, so that two ranks hold nothing of it
            holding = Holding(store, [unit for unit in units if unit % 3 == rank])
            parts.append(holding.bytes)
            step_by_step(holding)
            for block in BLOCKS:
                memory = AlignedBuffer(holding.slabs[block.index].nbytes)
                found = in_slab(holding, block.index, memory=memory)
                compare_owned(holding, block.index, found, slabs[block.index])
            for unit in holding.owned:
                for part in store.layout(unit).states:
                    for name, tensor in store.read(unit).items():
                        if part.name in tensor:
                            spec = next(s for s in part.tensors if s.name == name)
                            rows = slice(None) if spec.rows is None else slice(spec.row, spec.row + spec.shape[0])
                            assert torch.equal(tensor[part.name], items[name][part.name][rows])
    for block in BLOCKS:
        mine, theirs = sizes[block.index], [part[block.index] for part in parts]
        assert all(their.streamed == mine.streamed for their in theirs)
        for key in ("loaded", "written", "gradients", "stored"):
            assert getattr(mine, key) == sum(getattr(their, key) for their in theirs)


def step_by_step(holding: Holding) -> None:
    for step in (1, 2):
        for block in BLOCKS:
            buffer = WorkingBuffer(holding.bytes[block.index].written)
            holding.load(block.index, buffer, check=False).result(timeout=30)
            holding.check(block.index, buffer)
            update(holding, block, buffer, step)
            memory = AlignedBuffer(holding.slabs[block.index].nbytes)
            holding.serve(block.index, buffer, memory.view).result(timeout=30)
            served = {
                name: tensor.clone() for name, tensor in views(memory, holding.slabs[block.index].tensors).items()
            }
            holding.write(block.index, buffer, holding.checksums(block.index, buffer)).result(timeout=30)
            compare_owned(holding, block.index, served, in_slab(holding, block.index))
            buffer.close()
        holding.store.commit(step, {}).result(timeout=30)


def compare_owned(
    holding: Holding, block: int, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """What other ranks own is still zero."""
    for unit in holding.store.units_of(block):
        for p in holding.store.units[unit].parameters:
            rows = ... if p.rows is None else slice(p.row, p.row + p.shape[0])
            wanted = (
                expected[p.name][rows] if unit in holding.owned else torch.zeros(p.shape, dtype=found[p.name].dtype)
            )
            assert torch.equal(found[p.name][rows], wanted), (unit, p.name)


def test_pins_of_a_block_are_those_of_its_units(tmp_path: Path) -> None:
    with make_cut(tmp_path / "store") as store:
        holding = Holding(store)
        for block in BLOCKS:
            holding.pin_copies(block.index)
            holding.pin_states(block.index)
        trained = [holding.bytes[block.index] for block in BLOCKS if block.trainable]
        assert store.pinned_bytes == sum(b.streamed for b in holding.bytes) + sum(b.loaded for b in trained)
        train(store)
        assert ("disk", "copy") not in store.counters
        for block in BLOCKS[:2]:
            in_slab(holding, block.index)
        still = sum(store.layout(unit).streamed.nbytes for unit in store.units_with("layer.still"))
        assert store.counters["disk", "copy"]["read"] == still  # frozen: filled by this first fetch
        for block in BLOCKS:
            holding.unpin(block.index)
        assert store.pinned_bytes == 0


def test_a_recipe_of_every_kind_is_the_same_in_panels(tmp_path: Path) -> None:
    steps = {step.operation for recipe in (NORMAL, LAYERED) for step in recipe.steps}
    assert {"normal", "uniform", "multiply", "fill", "literal", "truncated_normal", "clamp"} <= steps
    with make_cut(tmp_path / "store", recipes=dict.fromkeys(RECIPES, LAYERED)) as store:
        for name in ("layer.weight", "layer.experts", "layer.still"):
            expected = generate(LAYERED, seed=3, name=name, shape=SHAPES[name.removeprefix("layer.")])
            assert torch.equal(store.tensor(name), expected)
    with make_cut(tmp_path / "filled", recipes=dict.fromkeys(RECIPES, Recipe.fill(0.5))) as store:
        assert store.tensor("layer.weight").eq(0.5).all()
