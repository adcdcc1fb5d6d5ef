"""A pool of experts on several ranks: who exists is found out together, and all decide as one rank does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.test_experts import SIDE, WIDTH, KilledError, Layer, Model, digest, loss_fn, text
from torch import nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.errors import FabricError, PlanError
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.nn import HashRouter, Pool, ProductKeyRouter

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = Pool(65, "existing")


class Hashed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(HashRouter(tokens=2, seed=seed), "frozen") for seed in range(2))


class Learned(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(ProductKeyRouter(WIDTH, SIDE**2), "frozen")])


def train(
    path: Path, until: int, cluster: Cluster | None = None, links: Links | None = None, *, killed: bool = False,
    build: Any = Hashed, pool: Pool = SMALL, **settings: Any,
) -> list[Any]:  # fmt: skip
    """Up to a step, and to the middle of the next one if it is killed; what each came to, and what exists."""
    found: list[Any] = []
    last = text(until + 1, 6)[-1]["input_ids"]

    def loss_or_end(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = loss_fn(model, batch)
        if torch.equal(batch["input_ids"], last):
            raise KilledError
        return loss

    with ws.Engine(
        build, path, ws.AdamW(lr=1e-2), seed=3, threads_per_worker=1, cluster=cluster, links=links, clip_norm=0.5,
        experts_memory="8MiB", host_memory="64MiB", device_memory="64MiB", experts_pool=pool, **settings,
    ) as engine:  # fmt: skip
        for step in range(engine.step_count + 1, until + 1):
            result = engine.step(text(step, 6), loss_fn)
            written = [layer.written for layer in engine.growing.layers.values()]
            found.append((step, result.loss, result.grad_norm, result.experts, written, engine.growing.pools))
        if killed:
            engine.step(text(until + 1, 6), loss_or_end)
    return found


@pytest.mark.parametrize("cluster", [Cluster(2), Cluster(3), Cluster(2, 2), Cluster(3, 1)], ids=str)
def test_any_cluster_decides_as_one_rank(cluster: Cluster, tmp_path: Path) -> None:
    expected = train(tmp_path / "alone", 4)
    found = run_ranks(cluster, lambda links: train(tmp_path / "ranks", 4, cluster, links), timeout_s=30)
    assert all(each == expected for each in found)
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")
    pools = [pools[0].closed for *_, pools in expected]
    assert pools[0] is False
    assert pools[-1] is True
    assert sum(facts.redirected for facts in expected[-1][3].values()) > 0


def test_a_run_that_is_killed_goes_on_with_any_ranks(tmp_path: Path) -> None:
    for cluster, until in ((Cluster(2), 1), (Cluster(3, 1), 2), (Cluster(2, 3), 3)):
        with pytest.raises((KilledError, FabricError)):
            run_ranks(
                cluster,
                lambda links, c=cluster, u=until: train(tmp_path / "ranks", u, c, links, killed=True),
                timeout_s=30,
            )
    found = train(tmp_path / "ranks", 5)
    assert found == train(tmp_path / "alone", 5)[-len(found) :]
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


@pytest.mark.parametrize(
    ("build", "pool", "said"),
    [
        (Hashed, Pool(20), r"0 experts of 20 experts exist, the step of \d+ tokens may add \d+ experts"),
        (Learned, Pool(20, "existing"), "it must follow from a step's input_ids what it reaches"),
    ],
)
def test_what_is_refused_is_refused_by_all(build: Any, pool: Pool, said: str, tmp_path: Path) -> None:
    if build is Learned:
        train(tmp_path / "ranks", 1, build=build, pool=Pool(SIDE**2))
    messages: list[str] = []
    cluster = Cluster(2, 1)

    def work(links: Links) -> None:
        try:
            train(tmp_path / "ranks", 3, cluster, links, build=build, pool=pool)
        except (PlanError, FabricError) as error:
            messages.append(str(error))
            links.stop(str(error))

    run_ranks(cluster, work, timeout_s=20)
    assert len(messages) == cluster.size
    for message in messages:
        assert re.search(said, message)
