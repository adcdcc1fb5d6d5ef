"""Where non-zeros are is kept while their mask is the same, within what was planned, and changes no bit."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schedule.examples import smallest
from tests.sparse.masked import digest, group, loss_fn, micro_batches, open_engine
from torch import Tensor

import weightstream as ws
from weightstream.blocks import Parameter, Unit
from weightstream.cluster import Cluster
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.sparse.algorithms import next_mask
from weightstream.sparse.codec import encode_mask
from weightstream.sparse.grid import Grid
from weightstream.sparse.kernels import prepared_bytes
from weightstream.sparse.masks import Mask
from weightstream.sparse.native.products import as_elements, obstacle
from weightstream.sparse.pieces import sparse_pieces
from weightstream.sparse.structure import Structure
from weightstream.store.layout import MASK, TensorSpec, record_layout
from weightstream.store.optimizers import SGD
from weightstream.store.sparsity import SparsePiece
from weightstream.worker import places
from weightstream.worker.places import KeptPlaces

NATIVE = {"*.up.weight": "native", "*.down.weight": "native"}
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(obstacle() is not None, reason="no C compiler")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters whose places had to be found from a mask, in order; and the threads that found what kernels ask."""
    names: list[str] = []
    finding, preparing = places.places_of, places.prepare

    def noted(spec: TensorSpec, mask: Tensor) -> object:
        names.append(spec.name)
        return finding(spec, mask)

    def noted_too(structure: Structure, kernel: Any) -> None:
        names.append(threading.current_thread().name)
        preparing(structure, kernel)

    monkeypatch.setattr(places, "places_of", noted)
    monkeypatch.setattr(places, "prepare", noted_too)
    return names


def masked(parameter: Parameter, mask: Mask) -> tuple[TensorSpec, Tensor]:
    """What comes with a fetch."""
    piece = SparsePiece(parameter.name, mask.nonzeros, mask.grid.block)
    layout = record_layout(Unit(0, 0, "u", (parameter,)), "bf16", SGD(), (piece,))
    return layout.part(MASK).tensors[0], torch.from_numpy(encode_mask(mask))


def test_kept_while_the_mask_is_the_same(found: list[str]) -> None:
    def piece(chosen: list[int]) -> tuple[TensorSpec, Tensor]:
        cells = np.zeros(128, np.bool_)
        cells[chosen] = True
        return masked(Parameter("w", (4, 32)), Mask(Grid(4, 32), cells))

    kept = KeptPlaces([3])
    # a version, the same, others with as many and with fewer non-zeros, the first again; then a block without room
    for block, chosen, searched in (
        (3, [5, 90], 1), (3, [5, 90], 1), (3, [6, 90], 2), (3, [90], 3), (3, [5, 90], 4), (4, [5, 90], 5), (4, [5, 90], 6),
    ):  # fmt: skip
        assert kept.of(block, *piece(chosen)).segments.tolist() == chosen
        assert len(found) == searched
        assert kept.nbytes == (4 * len(chosen) if block == 3 else 8)


MOVING = {"end": 12, "every": 3}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "static": {"algorithm": "static", "sparsity": 0.7}, "set": {"algorithm": "set", "sparsity": 0.7, **MOVING},
    "rigl": {"algorithm": "rigl", "sparsity": 0.7, **MOVING},
    "gmp": {"algorithm": "gmp", "sparsity": 0.9, "begin": 0, **MOVING},
}  # fmt: skip


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    algorithm=st.sampled_from(sorted(ALGORITHMS)), block=st.sampled_from([(1, 1), (2, 4), (16, 16)]),
    panels=st.integers(1, 3), columns=st.sampled_from([16, 48]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_structure_that_is_kept_is_that_of_the_mask(
    algorithm: str, block: tuple[int, int], panels: int, columns: int, seed: int
) -> None:
    """While masks are updated panel by panel; and it takes what is said to be planned for it. Block 4 has no room."""
    pieces = sparse_pieces(
        ws.Sparsity((ws.SparsityGroup(patterns=("*",), block=block, **ALGORITHMS[algorithm]),)),
        [Parameter("w", (32, columns), row=32 * i, rows=32 * panels if panels > 1 else None) for i in range(panels)],
    )
    generator = torch.Generator().manual_seed(seed)
    kept, masks = KeptPlaces([3]), []
    for piece in pieces:
        cells = np.zeros(piece.grid.cells, np.bool_)
        cells[torch.randperm(cells.size, generator=generator)[: piece.count(4)].numpy()] = True
        masks.append(Mask(piece.grid, cells))
    for step in range(5, 14):
        came = [masked(piece.parameter, mask) for piece, mask in zip(pieces, masks, strict=True)]
        dense = torch.cat([mask.dense((32, columns)) for mask in masks])
        expected = lines_of(dense if as_elements(block) else dense[:: block[0], :: block[1]])
        for number in (3, 4, 3):  # a fetch for forward, that of another block, a fetch for backward
            structure = kept.structure(number, came, "native", CPU)
            assert torch.equal(structure.mask(), dense)
            lines = structure.prepared["native"]
            for name, there in expected.items():
                assert torch.equal(getattr(lines, name).long(), there), name
            assert kept.nbytes == prepared_bytes((32 * panels, columns), block, int(dense.sum()), "native")
        for i, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
            values = torch.randn(mask.nonzeros, 1, generator=generator)
            gradient = torch.randn(32, columns, generator=generator)
            masks[i] = next_mask(piece, values, mask, gradient, step=step, seed=seed)


def lines_of(kept: Tensor) -> dict[str, Tensor]:
    """A matrix by rows and by columns, from which of its elements are there."""
    numbers = torch.zeros(kept.shape, dtype=torch.long)
    numbers[kept] = torch.arange(int(kept.sum()))
    return {
        "row_starts": torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)]),
        "columns": kept.nonzero()[:, 1],
        "column_starts": torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(0).cumsum(0)]),
        "rows": kept.t().nonzero()[:, 1],
        "numbers": numbers.t()[kept.t()],
    }


@needs_compiler
def test_a_structure_in_use_is_given_again_where_none_is_kept(found: list[str]) -> None:
    """As by the way back of a product, when its block is fetched for that."""
    cells = np.zeros(64, np.bool_)
    cells[[3, 5]] = True
    came = [masked(Parameter("w", (4, 16)), Mask(Grid(4, 16), cells))]
    kept = KeptPlaces()
    in_use = kept.structure(0, came, "native", CPU)
    assert kept.structure(0, came, "native", CPU) is in_use
    assert len(found) == 1
    assert kept.nbytes == 0
    del in_use
    kept.structure(0, came, "native", CPU)
    assert len(found) == 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("clip_norm", "kernels", "pattern"),
    [
        (None, None, {}),
        (0.5, None, {}),
        pytest.param(0.5, NATIVE, {}, marks=needs_compiler),
        pytest.param(None, NATIVE, {"block": (16, 16), "sparsity": 0.5, "drop_fraction": 0.8}, marks=needs_compiler),
    ],
    ids=["no clip", "clip", "kernel for elements, clip", "kernel for blocks, no clip"],
)
def test_same_bits_with_places_kept_and_without(
    clip_norm: float | None, kernels: Any, pattern: dict[str, Any], found: list[str], tmp_path: Path
) -> None:
    """SET moves all masks at steps 3 and 6; every block is fetched in both directions, and ahead."""
    sparsity = group(algorithm="set", end=30, every=3, **pattern)
    settings: dict[str, object] = {"clip_norm": clip_norm, "activations": "recompute", "kernels": kernels}
    losses: dict[str, list[tuple[float, float]]] = {}
    searches = {}
    for name in ("kept", "without"):
        losses[name] = []
        with open_engine(tmp_path / name, sparsity, **settings) as engine:
            for step in range(1, 9):
                if step == 3:
                    found.clear()
                result = engine.step(micro_batches(step), loss_fn)
                losses[name].append((result.loss, result.grad_norm))
                planned = [engine.runtime.facts.blocks[b].kept_places_bytes for b in engine.allotment.kept_places]
                assert engine.runtime.places.nbytes == sum(planned)
                assert bool(planned) == (name == "kept")
                assert f"of {len(planned)} of 3 sparse blocks" in engine.plan
            searches[name] = len(found)
            if name == "kept":
                facts = engine.runtime.facts
                settings |= {budget: smallest(facts, budget) for budget in ("device_memory", "host_memory")}
    assert losses["kept"] == losses["without"]
    assert digest(tmp_path / "kept") == digest(tmp_path / "without")
    pieces = 3 * ((1 if kernels else 3) + 1)  # of three layers: `up` in 3 panels, or at once for a kernel; `down` whole
    assert searches["kept"] == 2 * pieces
    assert searches["without"] > 6 * pieces
    if kernels:
        assert all(thread.startswith("expand") for thread in found)


@needs_compiler
@pytest.mark.usefixtures("one_thread")
def test_what_kernels_ask_is_found_once_a_step_where_activations_are_kept(found: list[str], tmp_path: Path) -> None:
    """The way back has it from the way there, also without room to keep it."""
    settings: dict[str, Any] = {"activations": "keep", "kernels": NATIVE}
    with open_engine(tmp_path / "first", group(), **settings) as engine:
        engine.step(micro_batches(1), loss_fn)
        settings["host_memory"] = smallest(engine.outlook.facts(len(micro_batches(1))), "host_memory")
    with open_engine(tmp_path / "store", group(), **settings) as engine:
        for step in (1, 2, 3):
            found.clear()
            engine.step(micro_batches(step), loss_fn)
            assert not engine.allotment.kept_places
    assert 2 * 2 <= len(found) <= 3 * 2  # of three layers; what the step before has not let go yet is not found anew


@needs_compiler
@pytest.mark.usefixtures("one_thread")
def test_each_rank_that_computes_keeps_what_was_planned(tmp_path: Path) -> None:
    def work(links: Links | None = None) -> None:
        path, cluster = tmp_path / f"{links is None}", Cluster() if links is None else Cluster(2)
        settings: dict[str, Any] = {"kernels": NATIVE, "cluster": cluster, "links": links}
        with open_engine(path, group(algorithm="set", end=9, every=2), **settings) as engine:
            for step in range(1, 5):
                engine.step(micro_batches(step, 4), loss_fn)
                planned = [engine.runtime.facts.blocks[b].kept_places_bytes for b in engine.allotment.kept_places]
                assert len(planned) == 3
                assert engine.runtime.places.nbytes == sum(planned)

    work()
    run_ranks(Cluster(2), work, timeout_s=60)
    assert digest(tmp_path / "True") == digest(tmp_path / "False")


@pytest.mark.usefixtures("one_thread")
def test_no_room_is_planned_for_what_only_the_compiled_kernel_could_keep(found: list[str], tmp_path: Path) -> None:
    sparsity = group(block=(4, 4))
    with open_engine(tmp_path / "store", sparsity, kernels={"*.up.weight": "gathered"}) as engine:
        for step in (1, 2):
            engine.step(micro_batches(step), loss_fn)
        down = round(0.2 * 192 * 32 / 16) * 4 * 4  # 4x4 elements are four segments, each of which takes four bytes
        assert [block.kept_places_bytes for block in engine.runtime.facts.blocks if "layers" in block.name] == [
            down
        ] * 3
        assert engine.runtime.places.nbytes == 3 * down
    assert {name.rpartition("down")[1] for name in found if not name.startswith("expand")} == {"down"}
