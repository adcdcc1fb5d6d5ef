"""What steps reach of layers of experts, and what that moves: against what engines then move, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.test_experts import Layer, text
from tests.machine.profiles import profile
from tests.nn.test_experts import loss_fn as plain_loss
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.engine.engine import Engine
from weightstream.experts.reaching import ExpertSizes, bytes_of, counted, different, pool_of
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.nn import HashRouter, StreamedExperts
from weightstream.prediction.predicting import predict

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, HIDDEN, EXPERTS, TOP_K = 32, 16, 8, 36, 2


class Model(nn.Module):
    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList()
        for index in range(2):
            layer = Layer(HashRouter(tokens=2, seed=index), "frozen")
            layer.experts = StreamedExperts(WIDTH, HIDDEN, experts, TOP_K, HashRouter(tokens=2, seed=index))
            self.layers.append(layer)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten() % WIDTH)


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return plain_loss(model, batch)


def batches(step: int, count: int) -> list[dict[str, Tensor]]:
    return [batch | {"labels": batch["input_ids"]} for batch in text(step, count)]


def engine(path: Path, model: Any = Model, **settings: Any) -> Engine:
    chosen: dict[str, Any] = {
        "clip_norm": None, "ram_tier": False, "device_memory": "16MiB", "host_memory": "16MiB",
        "threads_per_worker": 1, "experts_memory": "8MiB",
    }  # fmt: skip
    return Engine(model, path, ws.AdamW(lr=1e-2), **chosen | settings)


@pytest.mark.parametrize(("draws", "top_k", "experts"), [(12, 1, 5), (12, 3, 7), (40, 2, 1000), (6, 3, 3)])
def test_the_mean_is_that_of_many_trials(draws: int, top_k: int, experts: int) -> None:
    generator, trials = torch.Generator().manual_seed(0), 4000
    scores = torch.rand(trials, draws // top_k, experts, generator=generator)
    chosen = torch.zeros(trials, experts).scatter_(1, scores.topk(top_k).indices.flatten(1), 1.0)
    assert different(draws, top_k, experts) == pytest.approx(float(chosen.sum(1).mean()), rel=0.01)


def test_what_was_seen_says_from_how_many_it_was_drawn() -> None:
    for pool in (2.0, 17.0, 4e4):
        touched = different(300, 2, pool)
        assert pool_of(touched, 300, 2, 2**40) == pytest.approx(pool, rel=1e-3)
    assert pool_of(300, 300, 2, 2**40) == 2**40  # all different: from all of them, as far as one knows
    assert different(1e6, 1, float(2**62)) == pytest.approx(1e6)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_bytes_of_known_ids_are_those_that_the_engine_moves(tmp_path: Path, clip_norm: float | None) -> None:
    """Of experts alone, and with all other records as the prediction of the whole step."""
    with engine(tmp_path / "store", clip_norm=clip_norm) as trained:
        for step in range(2):
            trained.step(batches(step, 3), loss_fn)
        trained.commit()
        for step in range(2, 5):
            step_of = batches(step, 3)
            reached = trained.experts.counted(step_of, Cluster())
            found = predict(trained, step_of[0], profile(), micro_batches=3, loss_fn=loss_fn, reached=reached)
            before = moved(trained)
            result = trained.step(step_of, loss_fn)
            trained.commit()
            whole = [after - earlier for after, earlier in zip(moved(trained), before, strict=True)]
            facts = result.experts
            assert {name: (each.touched, each.new) for name, each in reached.items()} == {
                name: (each.touched, each.new) for name, each in facts.items()
            }
            assert any(each.new < each.touched for each in facts.values())
            assert found.experts is not None
            assert found.experts.read + found.experts.written == trained.experts.touching.least_bytes
            # with clipping a commit before the step has updated what its forward would have been served with
            served = sum(b.fetched_bytes for b in found.inputs.facts.blocks if b.trainable and clip_norm is not None)
            assert whole[0] == found.read_bytes + served
            # and the headers of files that records share, of which each says in some hundred bytes what it holds
            assert 0 <= whole[1] - found.written_bytes < 4096 * sum(each.touched for each in facts.values())


def moved(trained: Engine) -> list[int]:
    """Bytes that an engine has read from the disk and written to it; what compaction moves comes on top of a plan."""
    disk = [
        counts for (tier, kind), counts in trained.store.counters.items() if tier == "disk" and kind != "compaction"
    ]
    return [sum(counts[key] for counts in disk) for key in ("read", "written")]


@pytest.mark.parametrize(("cluster", "count"), [(Cluster(2), 4), (Cluster(3), 7), (Cluster(2, 1), 5)])
def test_bytes_between_ranks_are_those_that_they_send(tmp_path: Path, cluster: Cluster, count: int) -> None:
    """Also where the shares of workers are no subtrees, so that they send several sums."""
    step_of = batches(1, count)

    def work(links: Links) -> list[int]:
        with engine(tmp_path / "ranks", cluster=cluster, links=links) as trained:
            trained.step(step_of, loss_fn)
            return [trained.experts.sent(way).total() for way in ("down", "up")]

    down, up = (sum(sent) for sent in zip(*run_ranks(cluster, work, timeout_s=30), strict=True))
    layers = {f"layers.{index}.experts": layer.experts for index, layer in enumerate(Model().layers)}
    reached = counted(layers, step_of, {}, cluster, 8)
    own = ExpertSizes(0, 0, 4 * 2 * WIDTH * HIDDEN, 4 * 2 * WIDTH * HIDDEN)
    found = bytes_of(reached, dict.fromkeys(layers, own), 0.25)
    assert (found.down, found.up) == (down, up)


def test_steps_are_predicted_with_their_experts(tmp_path: Path) -> None:
    """By even chance before there was any, then as they were; whatever the ids of the micro-batch that is counted."""
    with engine(tmp_path / "store", lambda: Model(10**9)) as trained:
        zeros = {key: torch.zeros((2, 24), dtype=torch.long) for key in ("input_ids", "labels")}
        trained.rehearse(zeros, loss_fn, micro_batches=2)

        def predicted(count: int = 2, cluster: Cluster | None = None, **given: Any) -> Any:
            return predict(
                trained, zeros, profile(), micro_batches=count, loss_fn=loss_fn, cluster=cluster, threads=1, **given
            )

        expected = trained.experts.expected(2, Cluster())["layers.0.experts"]
        draws = 2 * 2 * 24 * TOP_K
        assert (expected.touched, expected.new) == (
            pytest.approx(draws, rel=1e-4),
            0,
        )  # of a billion hardly two the same
        one, none, more = predicted(keep_spans=True), predicted(reached={}), predicted(4)
        pair, apart = predicted(4, Cluster(2)), predicted(4, Cluster(2, 1))
        assert f"about {2 * draws} reached, by text fewer" in trained.plan

        # what trains is text of 4 pairs of tokens: far fewer experts
        few = {key: torch.tensor([[1, 2, 3, 4] * 6] * 2) for key in ("input_ids", "labels")}
        for _ in range(3):
            result = trained.step([few, few], loss_fn)
        seen = trained.experts.expected(2, Cluster())["layers.0.experts"]
        facts = result.experts["layers.0.experts"]
        assert seen.touched == pytest.approx(facts.touched, rel=1e-3)
        assert seen.new == pytest.approx(facts.touched / 3, rel=1e-3)  # all of them in the first of three steps
        later = predicted()
        both = sum(each.touched for each in result.experts.values())
        assert f"lately about {both} reached, {both / 3:.1f} of them new" in trained.plan
        sizes = trained.growing.layers["layers.0.experts"]
    record, loaded = sizes.record_bytes, sizes.loaded_bytes
    assert one.written_bytes - none.written_bytes == one.experts.written == pytest.approx(2 * draws * record, rel=1e-4)
    assert one.read_bytes - none.read_bytes == one.experts.read == pytest.approx(2 * draws * loaded, rel=1e-4)
    assert one.seconds_per_step > none.seconds_per_step
    assert one.optimizer_s > none.optimizer_s
    assert one.memory_bytes > none.memory_bytes
    assert more.experts.written == pytest.approx(2 * one.experts.written, rel=1e-4)
    assert one.experts.down == one.link_s == 0
    for several in (pair, apart):
        assert several.link_s > 0
        assert several.read_bytes > several.experts.read == more.experts.read
    assert apart.experts.down > 1.9 * pair.experts.down > 0  # with two owners half of it is one's own
    assert later.seconds_per_step < one.seconds_per_step
    spans = {(span.kind, span.resource): span for span in one.simulation.spans if span.nbytes}
    assert {("load", "read"), ("write", "write")} <= spans.keys()
