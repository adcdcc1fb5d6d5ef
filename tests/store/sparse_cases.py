"""Records with sparse tensors whose counts change, and an oracle that expands them by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.store.cases import kept_by, make, raw_mask
from torch import Tensor

from weightstream.blocks import Block, Parameter
from weightstream.store.initial import Recipe
from weightstream.store.layout import RecordLayout
from weightstream.store.recipes import Step
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import InitialMask, Sparsity
from weightstream.store.store import Store

PANEL = 2048
BLOCKS = (
    Block(
        0,
        "thin",
        (Parameter("thin.weight", (40, 30)), Parameter("thin.bias", (40,)), Parameter("thin.grid", (12, 4))),
        ("thin",),
    ),
    Block(1, "tall", (Parameter("tall.weight", (70, 64)),), ("tall",)),
    Block(2, "plain", (Parameter("plain.weight", (7, 3)),), ("plain",)),
)  # fmt: skip
RECIPES = {p.name: Recipe((Step("normal", (0.0, 0.5)),)) for block in BLOCKS for p in block.parameters}
MASKS = {
    "thin.weight": InitialMask("random", counts=(120,)),
    "thin.grid": InitialMask("dense", (3, 2)),
    "tall.weight": InitialMask("random", (2, 1), (204, 100, 12)),
}
THIN, TALL, PLAIN = 0, (1, 2, 3), 4  # units: a tensor of 70 rows is cut into panels of 32, 32 and 6


def make_sparse(path: Path, **changes: Any) -> Store:
    """A new store with sparse parameters: whole and cut, in single elements and in blocks, one that is dense at first."""
    arguments: dict[str, Any] = {"blocks": BLOCKS, "recipes": RECIPES, "masks": MASKS, "panel_elements": PANEL}
    return make(path, **(arguments | changes))


def sparse_filled(layout: RecordLayout, value: int) -> tuple[RecordBuffer, dict[str, Tensor]]:
    """A record whose every tensor is a function of `value`; and what it expands to, by `part/name`."""
    buffer, expected = RecordBuffer(layout), dict[str, Tensor]()
    for number, part in enumerate(layout.states):
        if part.name == "mask":
            continue
        for spec in part.tensors:
            count = torch.arange(int(np.prod(spec.piece_shape)), dtype=torch.float32).reshape(spec.piece_shape)
            dense = count % 97 + value * 100 + number * 10 + 1
            tensor = buffer.tensors(part.name)[spec.name]
            if spec.piece is None:
                tensor.copy_(dense)
            else:
                mask = kept_by(spec.piece_shape, spec.piece, value)
                tensor.copy_(dense[mask].reshape(-1, 1))
                buffer.tensors("mask")[spec.name].copy_(raw_mask(layout, spec.name, mask))
                dense = torch.where(mask, dense, torch.zeros(()))
                expected[f"mask/{spec.name}"] = mask
            expected[f"{part.name}/{spec.name}"] = dense
    if layout.has("copy"):
        for name, copy in buffer.tensors("copy").items():
            copy.copy_(buffer.tensors("param")[name])
    return buffer, expected


def write_sparse(store: Store, index: int, value: int, sparsity: Sparsity) -> dict[str, Tensor]:
    """A new version; gives what it expands to."""
    buffer, expected = sparse_filled(store.layout_of(index, sparsity), value)
    version = store.version(index) + 1
    store.write(index, buffer, version, version)
    return expected


def assert_expands(store: Store, index: int, expected: dict[str, Tensor]) -> None:
    """What `load` and `fetch` serve, expanded, is this."""
    layout = store.layout(index)
    buffer = RecordBuffer(layout)
    store.load(index, buffer).result(timeout=30)
    found: dict[str, Tensor] = {}
    for part in layout.states:
        for name, tensor in buffer.tensors(part.name).items():
            spec = layout.spec(part.name, name)
            assert spec is not None
            mask = expected.get(f"mask/{name}")
            assert (spec.piece is None) == (mask is None)
            if mask is None:
                found[f"{part.name}/{name}"] = tensor
            elif part.name == "mask":
                assert torch.equal(tensor, raw_mask(layout, name, mask))
                found[f"mask/{name}"] = mask
            else:
                dense = torch.zeros(spec.piece_shape)
                dense[mask] = tensor.reshape(-1)
                found[f"{part.name}/{name}"] = dense
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    view = memoryview(bytearray(layout.fetched_nbytes))
    store.fetch(index, view).result(timeout=30)
    if layout.has("copy"):
        for name, copy in buffer.tensors("copy").items():
            copy.copy_(buffer.tensors("param")[name])
    assert view == b"".join(bytes(buffer.view(part.name)) for part in layout.fetched)
