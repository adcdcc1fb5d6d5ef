"""Sparse parameters out of a store and in again: dense weights with zeros, and their masks beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.hub.conftest import tiny_llama
from transformers import AutoModelForCausalLM

import weightstream as ws
from weightstream.blocks import split
from weightstream.errors import StoreError
from weightstream.hub import export_store
from weightstream.hub.checkpoint import Checkpoint, masks_beside
from weightstream.store.given import Masks, fill, masks_by_magnitude, masks_given, masks_of_zeros
from weightstream.store.sparsity import InitialMask

SPARSE = {f"model.layers.{n}.mlp.{part}_proj.weight": InitialMask("given") for n in range(3) for part in ("up", "down")}


def imported(path: Path, model: Any, values: Any, masks: Masks | None, panel_elements: int) -> str:
    """A store of these values; gives its digest."""
    with ws.Store.create(
        path, blocks=split(model), recipes={}, optimizer=ws.AdamW(), precision="bf16", contract={"seed": 1}, masks=SPARSE,
        panel_elements=panel_elements,
    ) as store:  # fmt: skip
        fill(store, values, masks)
        assert store.verify() == []
        return store.digest()


def test_masked_weights_come_back_as_they_were(tmp_path: Path) -> None:
    model = tiny_llama()
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    density = dict.fromkeys(SPARSE, 0.1)
    digest = imported(tmp_path / "store", model, values, masks_by_magnitude(density), 512)
    export_store(tmp_path / "store", tmp_path / "out", config=model.config, optimizer_state=True, masks=True)

    masks, loaded = (
        load_file(tmp_path / "out" / "masks.safetensors"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    weights = dict(loaded.named_parameters())
    assert masks.keys() == SPARSE.keys()
    for name, value in values.items():
        kept = masks.get(name, torch.ones(value.shape, dtype=torch.bool))
        assert torch.equal(weights[name], torch.where(kept, value, torch.zeros(())))
    assert 0.08 < sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()) < 0.12
    states = load_file(tmp_path / "out" / "optimizer.safetensors")
    assert states.keys() == {f"{part}/{name}" for part in ("exp_avg", "exp_avg_sq") for name in values}

    checkpoint, beside = Checkpoint(tmp_path / "out", model), masks_beside(tmp_path / "out")
    assert beside is not None
    ways: list[tuple[str, Masks]] = [("beside", masks_given(beside)), ("zeros", masks_of_zeros)]
    for name, way in ways:
        for panel_elements in (512, 1 << 20):
            assert imported(tmp_path / f"{name} {panel_elements}", model, checkpoint, way, panel_elements) == digest
    with pytest.raises(StoreError, match="is sparse and its mask is to be given; say where it comes from"):
        imported(tmp_path / "not said", model, checkpoint, None, 512)
