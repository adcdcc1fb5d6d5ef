"""Experts on several ranks: the same losses, norms and digests as on one, whoever owns them and whatever is late."""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests.distributed.processes import LOST, Processes
from tests.distributed.test_digests import Delayed
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.errors import AuditError, FabricError, PlanError
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
        for layer, ids in zip(self.layers, (input_ids, input_ids, input_ids // 2), strict=False):
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


def end() -> None:
    raise KilledError


def train(
    path: Path, until: int, count: int, cluster: Cluster | None = None, links: Links | None = None, *,
    bad: Sequence[int] = (), killed: Callable[[], None] | None = None, build: Any = Model, **settings: Any,
) -> Found:  # fmt: skip
    """Up to a step and, if the run is killed, to the middle of the next one; what each step came to."""
    settings = {"host_memory": "64MiB", "device_memory": "64MiB", "experts_memory": "8MiB"} | settings
    optimizer, last = ws.AdamW(lr=1e-2, weight_decay=0.1), text(until + 1, count)[-1]["input_ids"]
    found: Found = []

    def loss_or_end(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = loss_fn(model, batch)
        if torch.equal(batch["input_ids"], last):
            assert killed is not None
            killed()
        return loss

    with ws.Engine(build, path, optimizer, seed=3, threads_per_worker=1, cluster=cluster, links=links, **settings) as e:
        for step in range(e.step_count + 1, until + 1):
            weights = [float("inf") if step in bad else 1 / count] * count
            result = e.step(text(step, count), loss_fn, weights=weights)
            found.append((step, result.loss, result.grad_norm, result.skipped, result.experts))
        if killed is not None:
            e.step(text(until + 1, count), loss_or_end)
        with e.module() as model:
            if e.computes:
                found.append(tuple(float(loss_fn(model, batch)) for batch in text(99, 2)))
        e.make_up_experts()
    return found


def on_ranks(cluster: Cluster, *arguments: Any, late: bool = False, **settings: Any) -> Found:
    """What every rank that computes found, which is the same."""
    if cluster.size == 1:
        return train(*arguments, **settings)

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
        (Cluster(2), 4, {"clip_norm": 0.5, "bad": (2,)}),
        (Cluster(4), 11, {"clip_norm": 0.5, "late": True}),
        (Cluster(3), 8, {"clip_norm": None, "precision": "bf16"}),
        (Cluster(2, 2), 5, {"clip_norm": 0.5, "activations": "recompute"}),
        (Cluster(3, 1), 9, {"clip_norm": None, "late": True, "bad": (1,)}),
    ],
    ids=["2", "4", "3", "2 with 2 apart", "3 with 1 apart"],
)
def test_any_cluster_has_the_digest_of_one_rank(
    cluster: Cluster, count: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    late = settings.pop("late", False)
    expected = train(tmp_path / "alone", 3, count, **settings)
    assert on_ranks(cluster, tmp_path / "ranks", 3, count, late=late, **settings) == expected
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


class Sharing(Model):
    """The last layer has the experts of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].experts = self.layers[0].experts


def test_layers_may_share_their_experts(tmp_path: Path) -> None:
    expected = train(tmp_path / "alone", 2, 4, build=Sharing)
    assert on_ranks(Cluster(2), tmp_path / "ranks", 2, 4, build=Sharing) == expected
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


@pytest.mark.parametrize(
    ("clip_norm", "clusters"),
    [(None, [Cluster(3), Cluster(1, 2)]), (0.5, [Cluster(2), Cluster(4), Cluster(1), Cluster(2, 3)])],
    ids=["as gradients arrive", "clipped"],
)
def test_a_run_that_is_killed_goes_on_with_any_ranks(
    clip_norm: float | None, clusters: list[Cluster], tmp_path: Path
) -> None:
    for until, cluster in enumerate(clusters[:-1], start=1):
        with pytest.raises((KilledError, FabricError)):
            on_ranks(cluster, tmp_path / "ranks", until, 4, killed=end, clip_norm=clip_norm)
    found = on_ranks(clusters[-1], tmp_path / "ranks", len(clusters) + 1, 4, clip_norm=clip_norm)
    expected = train(tmp_path / "alone", len(clusters) + 1, 4, clip_norm=clip_norm)
    assert found == expected[-len(found) :]
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


def as_process(links: Links, path: Path, cluster: Cluster) -> Found:
    return train(path, 2, 4, cluster, links, clip_norm=0.5, killed=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """The last worker in the middle of step 3: the others hear of it, and the run goes on alone."""
    cluster = Cluster(2, 1)
    ranks = Processes(cluster, timeout_s=10)  # one of them waits so long for what the dead one owes it
    try:
        *others, last = ranks.ask(as_process, tmp_path / "ranks", cluster, within_s=120)
    finally:
        ranks.end()
    assert last == LOST
    for kind, message in others:
        assert (kind, "rank 2" in message) == ("FabricError", True), message
    found = train(tmp_path / "ranks", 3, 4, clip_norm=0.5)
    expected = train(tmp_path / "alone", 3, 4, clip_norm=0.5)
    assert len(found) in (2, 3)  # one or two steps are lost, and evaluation
    assert found == expected[-len(found) :]
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


def test_bytes_between_ranks_are_those_of_records_that_others_own(tmp_path: Path) -> None:
    class Hashed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(HashRouter(tokens=2), "frozen")])

    cluster, router, batches = Cluster(2), HashRouter(tokens=2), text(1, 4)

    def work(links: Links) -> tuple[int, int]:
        with ws.Engine(
            Hashed, tmp_path / "ranks", ws.AdamW(lr=1e-2), threads_per_worker=1, cluster=cluster, links=links,
            experts_memory="8MiB",
        ) as engine:  # fmt: skip
            dense = Counter(links.down.traffic.sent), Counter(links.up.traffic.sent)
            engine.step(batches, loss_fn)
            sent = engine.sent_bytes()[1 - links.rank]
            after = links.down.traffic.sent[1 - links.rank], links.up.traffic.sent[1 - links.rank]
            assert dense == (Counter(), Counter())
            return sent[0] - after[0], sent[1] - after[1]

    down, up = zip(*run_ranks(cluster, work, timeout_s=30), strict=True)
    foreign = 0
    for rank in range(2):
        ids = [batches[index]["input_ids"] for index in cluster.share(rank, 4, 8)]
        reached = torch.cat([router.beforehand(each, SIDE**2, TOP_K).flatten() for each in ids]).unique()
        foreign += int((reached % 2 != rank).sum())
    values, number = 4 * 2 * WIDTH * HIDDEN, 8
    assert sum(down) == foreign * (number + values)
    assert sum(up) == foreign * (number + values + 2 * number)  # and how often each was reached


class Moody(HashRouter):
    """Chooses others each time."""

    calls = 0

    def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Tensor:
        self.calls += 1
        return super().beforehand(ids + self.calls, experts, top_k)


class Unsteady(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(Moody(tokens=2), "frozen"), Layer(HashRouter(tokens=2), "frozen")])


@pytest.mark.parametrize(
    ("cluster", "count", "settings", "said"),
    [
        (Cluster(2), 16, {"experts_memory": "400KiB"}, r"the micro-batches of a rank reach .* values .* give more"),
        (Cluster(2, 1), 16, {"experts_memory": "1200KiB"}, r"a step reaches .* records or more, .* give more"),
        (
            Cluster(2),
            2,
            {"build": Unsteady, "activations": "recompute"},
            r"backward reaches records that forward did not",
        ),
    ],
    ids=["values", "records", "router"],
)
def test_what_one_rank_refuses_ends_all(
    cluster: Cluster, count: int, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    messages = []

    def work(links: Links) -> None:
        try:
            train(tmp_path / "ranks", 1, count, cluster, links, **settings)
        except (AuditError, FabricError, PlanError) as error:
            messages.append(str(error))
            links.stop(str(error))

    run_ranks(cluster, work, timeout_s=20)
    assert len(messages) == cluster.size
    for message in messages:
        assert re.search(said, message)


def test_a_model_that_fails_on_one_rank_while_it_is_looked_at_ends_all(tmp_path: Path) -> None:
    """The others wait for what the failed one may ask them for."""
    cluster = Cluster(2, 1)
    said: dict[int, str] = {}

    class FailedError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise FailedError

    def work(links: Links) -> None:
        try:
            with ws.Engine(
                Model, tmp_path / "ranks", ws.AdamW(lr=1e-2), threads_per_worker=1, cluster=cluster, links=links,
                experts_memory="8MiB",
            ) as engine, engine.module() as model:  # fmt: skip
                if links.rank == 2:
                    model.get_submodule("layers.1.before").register_forward_hook(fail)
                if engine.computes:
                    loss_fn(model, text(1, 1)[0])
        except (FailedError, FabricError) as error:
            said[links.rank] = type(error).__name__
            links.stop("it failed")

    run_ranks(cluster, work, timeout_s=20)
    assert said == {0: "FabricError", 1: "FabricError", 2: "FailedError"}
