"""Experts on several ranks: the same losses, norms and digests as on one, whoever owns them and whatever is late."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests.distributed.test_digests import Delayed
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.nn import HashRouter, ProductKeyRouter, StreamedExperts
from weightstream.nn.routers import Router
from weightstream.store.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, HIDDEN, SIDE, TOP_K = 32, 16, 8, 6, 2
Found = list[tuple[Any, ...]]


class Layer(nn.Module):
    def __init__(self, router: Router, untouched: Literal["frozen", "dense"]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.before, self.after = nn.Dropout(0.1), nn.Dropout(0.1)
        self.experts = StreamedExperts(WIDTH, HIDDEN, SIDE**2, TOP_K, router, untouched=untouched)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = x + self.after(self.experts(self.before(self.norm(x)), ids))
        return found


class Model(nn.Module):
    """A layer whose experts are known beforehand, one whose are known in forward, and one whose are not as foreseen; the
    last one is the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            [
                Layer(HashRouter(tokens=2), "dense"),
                Layer(ProductKeyRouter(WIDTH, SIDE**2), "frozen"),
                Layer(HashRouter(tokens=2, seed=1), "frozen"),
            ]
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer, ids in zip(self.layers, (input_ids, input_ids, input_ids // 2), strict=True):
            x = layer(x, ids)
        return F.cross_entropy(x[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten() % WIDTH)


def text(step: int, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (1, 4 + index % 3), generator=generator)} for index in range(count)
    ]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"])  # type: ignore[no-any-return]


class KilledError(Exception):
    """Stands for the end of a process in the middle of a step."""


def train(
    path: Path, steps: range, count: int, cluster: Cluster | None = None, links: Links | None = None, *,
    bad: Sequence[int] = (), killed: bool = False, **settings: Any,
) -> Found:  # fmt: skip
    settings = {"host_memory": "64MiB", "device_memory": "64MiB", "experts_memory": "8MiB"} | settings
    optimizer = ws.AdamW(lr=1e-2, weight_decay=0.1)
    found: Found = []

    def loss_or_end(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = loss_fn(model, batch)
        if torch.equal(batch["input_ids"], text(steps.stop, count)[count // 2]["input_ids"]):
            raise KilledError
        return loss

    with ws.Engine(Model, path, optimizer, seed=3, threads_per_worker=1, cluster=cluster, links=links, **settings) as e:
        assert e.step_count == steps.start - 1
        for step in steps:
            weights = [float("inf") if step in bad else 1 / count] * count
            result = e.step(text(step, count), loss_fn, weights=weights)
            found.append((result.loss, result.grad_norm, result.skipped, result.experts))
        if killed:
            e.step(text(steps.stop, count), loss_or_end)
        with e.module() as model:
            if e.computes:
                found.append(tuple(float(loss_fn(model, batch)) for batch in text(99, 2)))
        e.make_up_experts()
    return found


def on_ranks(cluster: Cluster, *arguments: Any, late: bool = False, **settings: Any) -> Found:
    """What every rank that computes found, which is the same."""

    def work(links: Links) -> Found:
        if late:
            links.add_records()
            for number, name in enumerate(("down", "up", "control", "commits", "records")):
                setattr(links, name, Delayed(getattr(links, name), 10 * links.rank + number))
        return train(*arguments, cluster=cluster, links=links, **settings)

    found = run_ranks(cluster, work, timeout_s=30)
    computing = [found[rank] for rank in cluster.compute_ranks]
    assert all(other == computing[0] for other in computing)
    return computing[0]


def digest(path: Path) -> str:
    with Store.open(path, writable=False) as store:
        assert store.verify() == []
        return store.digest()


@pytest.mark.parametrize(
    ("cluster", "count", "settings"),
    [
        (Cluster(2), 4, {"clip_norm": 0.5}),
        (Cluster(4), 11, {"clip_norm": 0.5, "late": True}),
        (Cluster(3), 8, {"clip_norm": None, "precision": "bf16"}),
        (Cluster(2, 2), 5, {"clip_norm": 0.5, "activations": "recompute"}),
        (Cluster(3, 1), 9, {"clip_norm": None, "late": True}),
    ],
    ids=["2", "4", "3", "2 with 2 apart", "3 with 1 apart"],
)
def test_any_cluster_has_the_digest_of_one_rank(
    cluster: Cluster, count: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    steps, late = range(1, 4), settings.pop("late", False)
    expected = train(tmp_path / "alone", steps, count, **settings)
    assert on_ranks(cluster, tmp_path / "ranks", steps, count, late=late, **settings) == expected
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")
