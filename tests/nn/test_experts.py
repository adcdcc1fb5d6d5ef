"""Layers of experts out of a store, against plain PyTorch with all experts resident."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests.nn.plain_experts import PlainExperts, PlainTraining, Route
from torch import Tensor, nn

import weightstream as ws
from weightstream.nn import HashRouter, StreamedExperts

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, HIDDEN, EXPERTS, TOP_K = 32, 32, 20, 64, 2


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.experts(self.norm(x), ids)


class Model(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(make(index)) for index in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def streamed(untouched: Literal["frozen", "dense"] = "frozen", experts: int = EXPERTS) -> Model:
    return Model(
        lambda index: StreamedExperts(
            WIDTH, HIDDEN, experts, TOP_K, HashRouter(tokens=2, seed=index), untouched=untouched
        )
    )


def text(step: int, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    found = [torch.randint(0, VOCABULARY, (2, 5 + index), generator=generator) for index in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], batch["labels"])  # type: ignore[no-any-return]


def engine(path: Path, model: Any = streamed, **settings: Any) -> ws.Engine:
    settings = {"clip_norm": 0.5, "reduction_groups": 2, "host_memory": "64MiB", "device_memory": "64MiB"} | settings
    return ws.Engine(model, path, ws.AdamW(lr=1e-2, weight_decay=0.1), experts_memory="16MiB", **settings)


def name_in_store(name: str) -> str:
    """`layers.0.experts.w_in.5` of the plain model is record 5's `layers.0.experts.5.w_in`."""
    *layer, short, number = name.split(".")
    return ".".join([*layer, number, short]) if short in ("w_in", "w_out") else name


def plain(path: Path) -> Model:
    """The plain model with a new store's values."""
    routes: list[Route] = []
    for index in range(2):
        router = HashRouter(tokens=2, seed=index)
        routes.append(lambda hidden, ids, router=router: router(hidden, ids, EXPERTS, TOP_K))
    with engine(path) as made:
        values = {name: tensors["param"] for name, tensors in made.store.items()}

    def make(index: int) -> nn.Module:
        own = [
            torch.stack([values[f"layers.{index}.experts.{number}.{short}"] for number in range(EXPERTS)])
            for short in ("w_in", "w_out")
        ]
        return PlainExperts(*own, routes[index])

    model = Model(make)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name_in_store(name)])
    return model


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_lazy_adamw_is_that_of_plain_pytorch(tmp_path: Path, clip_norm: float | None) -> None:
    reference = PlainTraining(
        plain(tmp_path / "first"), name_in_store, lr=1e-2, clip_norm=clip_norm, groups=2, dense=False
    )
    with engine(tmp_path / "store", clip_norm=clip_norm) as trained:
        for step in range(4):
            loss, norm = reference.step(text(step))
            result = trained.step(text(step), loss_fn)
            assert (result.loss, result.grad_norm) == (loss, norm)
        for name, tensors in trained.store.items():
            own = reference.named[name]
            assert torch.equal(tensors["param"], own), name
            state = reference.optimizer.state.get(own)
            if state:
                assert torch.equal(tensors["exp_avg_sq"], state["exp_avg_sq"]), name
            else:
                assert not tensors["exp_avg"].any()
