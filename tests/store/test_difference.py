"""Two stores compared tensor by tensor, against plain numpy, and never equal when their digests are not."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store.cases import BLOCKS, RECIPES, TRAINED, filled, make
from torch import Tensor

from weightstream.blocks import Block, Parameter
from weightstream.store import difference as module
from weightstream.store.difference import difference, distance, rows
from weightstream.store.optimizers import SGD, AdamW
from weightstream.store.store import Store


def write(store: Store, index: int, value: int, step: int, **changed: Tensor) -> None:
    """Write a record that is a function of `value`; `changed` gives masters by the last part of their name."""
    record = filled(store.layout(index), value)
    for key, tensor in changed.items():
        record.tensors("param")[f"odd.{key}"].copy_(tensor)
    store.write(index, record, step, step).result(timeout=30)
    store.commit(step, {}).result(timeout=30)


def compared(a: Store, b: Store) -> dict[str, Any]:
    """The difference; equal exactly if the digests are, and plain JSON."""
    found = difference(a, b)
    assert found["equal"] == (a.digest() == b.digest())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['part']}/{row['name']}": row for row in found["tensors"] if row["state"] != "equal"}


def test_equal_stores(tmp_path: Path) -> None:
    with make(tmp_path / "a") as a, make(tmp_path / "b", "fp32") as b:
        assert compared(a, b)["equal"]  # precision is not part of the numbers
        for index in TRAINED:
            write(a, index, 5, index + 1)
            write(b, index, 5, index + 1)
        found = compared(a, b)
        assert found["lines"] == []
        assert found["summary"].startswith(f"equal: all {len(found['tensors'])} tensors")


def test_distances_are_those_of_plain_numbers(tmp_path: Path) -> None:
    with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        before = torch.linspace(-3.0, 5.0, 33)
        after = before.clone()
        after[[1, 30]] += torch.tensor([0.5, -2.0])
        write(a, 1, 5, 1, bias=before)
        write(b, 1, 5, 1, bias=after)
        found = compared(a, b)
        ((name, row),) = by_name(found).items()
        assert name == "param/odd.bias"
        gap = before.double().numpy() - after.double().numpy()
        assert row["norm"] == pytest.approx(np.linalg.norm(gap), rel=1e-12)
        assert row["relative"] == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(before.double()), rel=1e-12)
        assert row["largest"] == abs(gap).max()
        assert (row["differing"], row["elements"], row["not_finite"]) == (2, 33, 0)
        assert found["parts"]["param"]["norm"] == row["norm"]
        assert found["parts"]["exp_avg"]["norm"] == 0.0
        assert found["summary"].startswith(f"1 of {len(found['tensors'])} tensors differ; param: norm")
        assert found["lines"][0].startswith("odd.bias param: norm ")


def test_equality_is_of_bits(tmp_path: Path) -> None:
    quiet = torch.tensor(math.nan)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]
    with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        values = torch.ones(33)
        values[0], values[1] = quiet, 0.0
        write(a, 1, 5, 1, bias=values)
        write(b, 1, 5, 1, bias=values)
        assert compared(a, b)["equal"]
        values[0], values[1], values[2] = other, -0.0, math.inf
        write(b, 1, 5, 1, bias=values)
        (row,) = by_name(compared(a, b)).values()
        assert (row["differing"], row["not_finite"], row["norm"], row["largest"]) == (3, 2, 0.0, 0.0)


def test_optimizer_steps_count(tmp_path: Path) -> None:
    with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        write(a, 0, 5, 1)
        write(b, 0, 5, 2)
        found = compared(a, b)
        assert by_name(found) == {
            "optimizer_steps/embed.weight": {
                "name": "embed.weight", "part": "optimizer_steps", "state": "differs", "a": "1", "b": "2",
            }
        }  # fmt: skip
        assert found["lines"] == ["embed.weight optimizer_steps: 1 in A, 2 in B"]
        assert "1 parameters had other numbers of optimizer steps" in found["summary"]


def test_blocks_may_be_split_otherwise(tmp_path: Path) -> None:
    """Every parameter alone, in reverse order, one of them without a single number."""
    parameters = [parameter for block in BLOCKS for parameter in block.parameters]
    alone = [Block(n, p.name, (p,), (p.name,)) for n, p in enumerate(reversed(parameters))]
    with make(tmp_path / "a") as a, make(tmp_path / "b", blocks=alone) as b:
        assert compared(a, b)["equal"]
        write(a, 1, 5, 1)
        for index, block in enumerate(alone):
            if not block.parameters[0].name.startswith("odd."):
                continue
            record = filled(b.layout(index), 5)
            whole = filled(a.layout(1), 5)
            for part in b.layout(index).states:
                for name, tensor in record.tensors(part.name).items():
                    tensor.copy_(whole.tensors(part.name)[name])
            b.write(index, record, 1, 1)
        b.commit(1, {}).result(timeout=30)
        assert compared(a, b)["equal"]
        assert compared(b, a)["equal"]
        write(a, 1, 6, 2)
        assert len(compared(a, b)["lines"]) == len(compared(b, a)["lines"]) > 5


def test_what_only_one_store_has(tmp_path: Path) -> None:
    others = list(BLOCKS)
    renamed = [Parameter("odd.other", p.shape) if p.name == "odd.bias" else p for p in BLOCKS[1].parameters]
    renamed = [Parameter(p.name, (80, 33)) if p.name == "odd.weight" else p for p in renamed]
    others[1] = Block(1, BLOCKS[1].name, tuple(renamed), BLOCKS[1].modules)
    recipes = RECIPES | {"odd.other": RECIPES["odd.bias"]}
    with make(tmp_path / "a") as a, make(tmp_path / "b", blocks=others, recipes=recipes, optimizer=SGD(lr=0.1)) as b:
        found = compared(a, b)
        states = {name: row["state"] for name, row in by_name(found).items()}
        assert states["param/odd.bias"] == "only in A"
        assert states["param/odd.other"] == "only in B"
        assert states["param/odd.weight"] == "other shape"
        assert states["exp_avg/embed.weight"] == "only in A"
        assert "odd.weight param: F32 [33, 80] in A, F32 [80, 33] in B" in found["lines"]
        assert "1 other shape" in found["summary"]
        mirrored = {name: row["state"] for name, row in by_name(compared(b, a)).items()}
        turned = {"only in A": "only in B", "only in B": "only in A"}
        assert mirrored == {name: turned.get(state, state) for name, state in states.items()}
    assert AdamW().states((2,)).keys() == {"exp_avg", "exp_avg_sq"}


def test_each_record_is_read_once(tmp_path: Path) -> None:
    with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        write(a, 1, 5, 1)
        write(b, 1, 6, 1)
    with Store.open(tmp_path / "a", writable=False) as a, Store.open(tmp_path / "b", writable=False) as b:
        assert "differs" in {row.state for row in rows(a, b)}
        for store in (a, b):
            states = sum(part.nbytes for index in (1, 2) for part in store.layout(index).states)
            assert store.counters["disk", "states"]["read"] == states


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=9), st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.integers(1, 4),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_chunks_add_up(first: list[float], second: list[float], chunk: int) -> None:
    a, b = torch.tensor(first), torch.tensor(second[: len(first)])
    before = module._CHUNK_ELEMENTS
    whole = distance(a, b)
    try:
        module._CHUNK_ELEMENTS = chunk
        found = distance(a, b)
    finally:
        module._CHUNK_ELEMENTS = before
    assert (found.differing, found.not_finite, found.largest) == (whole.differing, whole.not_finite, whole.largest)
    assert found.norm == pytest.approx(whole.norm, rel=1e-12)
    assert found.differing == sum(x != y for x, y in zip(a.view(torch.int32), b.view(torch.int32), strict=True))
    both = torch.isfinite(a) & torch.isfinite(b)
    assert found.norm == pytest.approx(float(np.linalg.norm((a.double() - b.double())[both])), rel=1e-9)
