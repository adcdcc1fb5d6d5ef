"""Experts that are sparse: a stack of matrices in one parameter, or a layer each, of which some tokens use some."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.sparse.masked import (
    DECAY,
    LR,
    PANEL,
    SEED,
    VOCABULARY,
    WIDTH,
    Reference,
    Rules,
    assert_equal_to,
    gmp,
    group,
    loss_fn,
    micro_batches,
)
from torch import Tensor, nn

import weightstream as ws

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, STEPS = 4, 12


class Stacked(nn.Module):
    """All experts' matrices in one parameter; two of them are a panel."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.gelu(x @ self.up[expert]) @ self.down[expert]


class Apart(nn.Module):
    """Each expert has parameters of its own; one that is not used has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.down[expert](F.gelu(self.up[expert](x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.norm(x)
        shares = self.router(hidden).softmax(-1)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            chosen = tokens % EXPERTS == expert
            if chosen.any():
                out[chosen] = self.experts(hidden[chosen], expert) * shares[chosen][:, expert, None]
        return x + out


class Model(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, tokens)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def cut(name: str, value: Tensor) -> list[Tensor]:
    """The panels of 2,048 elements."""
    return list(value.split(2)) if value.ndim == 3 else [value]


MOVING: dict[str, Any] = {"begin": 0, "end": 11, "every": 5}
PRUNING: dict[str, Any] = {"algorithm": "gmp", "begin": 4, "end": 24, "every": 4}


@pytest.mark.parametrize(
    ("experts", "settings", "rules"),
    [
        (Stacked, {"algorithm": "rigl", **MOVING}, Rules(algorithm="rigl", **MOVING)),
        (Stacked, {**PRUNING, "distribution": "global", "sparsity": 0.9}, Rules(**PRUNING, together=gmp)),
        (Apart, {"algorithm": "set", **MOVING}, Rules(algorithm="set", **MOVING)),
        (Apart, {"algorithm": "rigl", **MOVING}, Rules(algorithm="rigl", **MOVING)),
    ],
    ids=["stacked rigl", "stacked global gmp", "apart set", "apart rigl"],
)
def test_experts_equal_masked_dense_training(
    experts: type[nn.Module], settings: dict[str, Any], rules: Rules, tmp_path: Path
) -> None:
    """Weights, moments and masks over two mask updates; some experts have no token in some micro-batches."""

    def build() -> nn.Module:
        return Model(experts)

    def sparse(name: str) -> bool:
        return ".experts." in name and not name.endswith("bias")

    torch.manual_seed(SEED)
    values = {name: value.detach() for name, value in build().named_parameters()}
    batches = [micro_batches(step) for step in range(1, STEPS + 1)]
    assert any(len((each % EXPERTS).unique()) < EXPERTS for batch in batches for each in batch)
    masters = {name: value.clone() for name, value in values.items()}
    reference = Reference(rules, 0.5, torch.float32, masters, build, sparse, cut)
    found = []
    with ws.Engine(
        build, tmp_path, ws.AdamW(lr=LR, weight_decay=DECAY), sparsity=group(patterns=("*.experts.*",), **settings),
        initial=values, clip_norm=0.5, seed=SEED, panel_elements=PANEL,
    ) as engine:  # fmt: skip
        assert any(parameter.rows for unit in engine.store.units for parameter in unit.parameters) == (
            experts is Stacked
        )
        for batch in batches:
            result = engine.step(batch, loss_fn)
            found.append((result.loss, result.grad_norm))
    assert found == [reference.step(step) for step in range(1, STEPS + 1)]
    assert_equal_to(reference, tmp_path)
