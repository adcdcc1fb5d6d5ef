"""Places of non-zeros are kept while their mask is the same, within what was planned, and change no bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.schedule.examples import smallest
from tests.sparse.masked import digest, group, loss_fn, micro_batches, open_engine

from weightstream.blocks import Parameter, Unit
from weightstream.sparse.codec import encode_mask
from weightstream.sparse.masks import Mask
from weightstream.store.layout import MASK, TensorSpec, record_layout
from weightstream.store.masks import grid_of
from weightstream.store.optimizers import SGD
from weightstream.store.sparsity import SparsePiece
from weightstream.worker import places
from weightstream.worker.places import KeptPlaces


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters whose places had to be found from a mask, in order."""
    names: list[str] = []
    finding = places.places_of

    def noted(spec: TensorSpec, mask: torch.Tensor) -> object:
        names.append(spec.name)
        return finding(spec, mask)

    monkeypatch.setattr(places, "places_of", noted)
    return names


def test_kept_while_the_mask_is_the_same(found: list[str]) -> None:
    def piece(chosen: list[int]) -> tuple[TensorSpec, torch.Tensor]:
        unit = Unit(0, 0, "u", (Parameter("w", (4, 32)),))
        spec = record_layout(unit, "bf16", SGD(), (SparsePiece("w", len(chosen)),)).part(MASK).tensors[0]
        cells = np.zeros(128, np.bool_)
        cells[chosen] = True
        return spec, torch.from_numpy(encode_mask(Mask(grid_of(spec), cells)))

    kept = KeptPlaces([3])
    # a version, the same, others with as many and with fewer non-zeros, the first again; then a block without room
    for block, chosen, searched in (
        (3, [5, 90], 1), (3, [5, 90], 1), (3, [6, 90], 2), (3, [90], 3), (3, [5, 90], 4), (4, [5, 90], 5), (4, [5, 90], 6),
    ):  # fmt: skip
        assert kept.of(block, *piece(chosen)).segments.tolist() == chosen
        assert len(found) == searched
        assert kept.nbytes == (4 * len(chosen) if block == 3 else 8)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
def test_same_bits_with_places_kept_and_without(clip_norm: float | None, found: list[str], tmp_path: Path) -> None:
    """SET moves all masks at steps 3 and 6; every block is fetched in both directions, and ahead."""
    sparsity = group(algorithm="set", end=9, every=3)
    settings: dict[str, object] = {"clip_norm": clip_norm, "activations": "recompute"}
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
    pieces = 3 * (3 + 1)  # of three layers: `up` in 3 panels, `down` whole
    assert searches["kept"] == 2 * pieces
    assert searches["without"] > 6 * pieces


@pytest.mark.usefixtures("one_thread")
def test_no_room_is_planned_for_what_kernels_multiply_by(found: list[str], tmp_path: Path) -> None:
    sparsity = group(block=(4, 4))
    with open_engine(tmp_path / "store", sparsity, kernels={"*.up.weight": "gathered"}) as engine:
        for step in (1, 2):
            engine.step(micro_batches(step), loss_fn)
        down = round(0.2 * 192 * 32 / 16) * 4 * 4  # 4x4 elements are four segments, each of which takes four bytes
        assert [block.kept_places_bytes for block in engine.runtime.facts.blocks if "layers" in block.name] == [
            down
        ] * 3
        assert engine.runtime.places.nbytes == 3 * down
    assert {name.rpartition("down")[1] for name in found} == {"down"}
