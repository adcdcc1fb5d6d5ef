"""The same digest for any number of workers and memory ranks, in any order of arrival: virtual ranks of one process.

Beside `cluster/test_fit.py`, which does the same with real ones, since those take seconds to start.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.pairwise import pairwise
from tests.parity.zoo import ZOO, ZooModel

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.engine import opening
from weightstream.errors import AuditError, FabricError, PlanError, StoreMismatchError
from weightstream.fabric.links import Channel, Links
from weightstream.fabric.local import run_ranks
from weightstream.store.interval import Interval
from weightstream.store.store import Store

STEPS = 3
WORDS: dict[str, Sequence[Any]] = {
    "workers": [1, 2, 3, 4, 8],
    "memory": ["colocated", 1, 3],
    "model": ["llama", "t5", "moe_router"],  # gpt2 has tests of its own below
    "precision": ["fp32", "bf16"],
    "clip_norm": [0.5, None],
    "micro_batches": [8, 11],
    "optimizer": ["AdamW", "Adafactor"],
    "panel_elements": [3000, 600],
    "activations": ["auto", "recompute"],
    "host_memory": ["1GiB", "24MiB"],
    "delays": [False, True],
}
CASES = pairwise(WORDS)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: ws.AdamW(lr=2e-3, weight_decay=0.1),
    "Adafactor": lambda: ws.Adafactor(lr=1e-2),
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Delayed(Channel):
    """Messages that are late at random, on either side."""

    def __init__(self, channel: Channel, seed: int) -> None:
        super().__init__(channel.name, channel.rank, channel.members)
        self._channel, self._random = channel, random.Random(seed)

    def _send(self, *message: Any) -> Any:
        time.sleep(self._random.random() * 0.001)
        return self._channel._send(*message)

    def _receive(self, *message: Any) -> Any:
        time.sleep(self._random.random() * 0.001)
        return self._channel._receive(*message)

    def gather(self, value: Any) -> list[Any]:
        time.sleep(self._random.random() * 0.003)
        return self._channel.gather(value)

    def stop(self, reason: str) -> None:
        self._channel.stop(reason)


def train(
    zoo: ZooModel, store: Path, steps: range, count: int, cluster: Cluster | None = None, links: Links | None = None,
    bad: Sequence[int] = (), **settings: Any,
) -> list[tuple[float, float, bool]]:  # fmt: skip
    engine = ws.Engine(
        zoo.build, store, threads_per_worker=1, block_rules=dict(zoo.block_rules) or None, seed=11, cluster=cluster,
        links=links, **settings,
    )  # fmt: skip
    with engine:
        assert engine.step_count == steps.start - 1
        found = []
        for step in steps:
            batch = zoo.micro_batches(count, ragged=True, step=step)
            shares = zoo.token_shares(batch)
            if step in bad:
                shares[count // 2] = float("inf")
            result = engine.step(batch, zoo.loss_fn, weights=shares if step in bad else None)
            found.append((result.loss, result.grad_norm, result.skipped))
        engine.commit()
    return found


def on_ranks(cluster: Cluster, delays: bool, *arguments: Any, **settings: Any) -> list[tuple[float, float, bool]]:
    """What every rank found, which is the same."""

    def work(links: Links) -> Any:
        if delays:
            for number, name in enumerate(("down", "up", "control", "commits")):
                setattr(links, name, Delayed(getattr(links, name), 10 * links.rank + number))
        return train(*arguments, cluster=cluster, links=links, **settings)

    first, *others = run_ranks(cluster, work, timeout_s=60)
    assert all(other == first for other in others)
    return first


def digest(path: Path) -> str:
    with Store.open(path, writable=False) as store:
        assert store.verify() == []
        return store.digest()


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(str(value) for value in case.values()))
def test_any_cluster_has_the_digest_of_one_rank(case: dict[str, Any], tmp_path: Path) -> None:
    zoo = ZOO[case["model"]].with_(dropout=0.1)
    settings = {
        "optimizer": OPTIMIZERS[case["optimizer"]](), "precision": case["precision"], "clip_norm": case["clip_norm"],
        "activations": case["activations"], "panel_elements": case["panel_elements"], "host_memory": case["host_memory"],
    }  # fmt: skip
    steps, count = range(1, STEPS + 1), case["micro_batches"]
    expected = train(zoo, tmp_path / "alone", steps, count, **settings)
    found = on_ranks(
        Cluster(case["workers"], case["memory"]), case["delays"], zoo, tmp_path / "ranks", steps, count, **settings
    )
    assert found == expected
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


def test_every_step_with_another_cluster(tmp_path: Path) -> None:
    zoo = ZOO["gpt2"].with_(dropout=0.1)
    settings = {"optimizer": OPTIMIZERS["AdamW"](), "clip_norm": 0.5, "panel_elements": 1500}
    clusters = [Cluster(4, 2), None, Cluster(3, 4), Cluster(1, 1), Cluster(2)]
    for step, cluster in enumerate(clusters, start=1):
        steps = range(step, step + 1)
        train(zoo, tmp_path / "alone", steps, 8, **settings)
        if cluster is None:
            train(zoo, tmp_path / "ranks", steps, 8, **settings)
        else:
            on_ranks(cluster, False, zoo, tmp_path / "ranks", steps, 8, **settings)
        assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_a_step_that_is_not_finite_is_skipped_on_all(clip_norm: float | None, tmp_path: Path) -> None:
    zoo = ZOO["gpt2"].with_(dropout=0.1)
    settings = {"optimizer": OPTIMIZERS["AdamW"](), "clip_norm": clip_norm, "bad": (1, 3)}
    steps = range(1, 5)
    expected = train(zoo, tmp_path / "alone", steps, 8, **settings)
    assert [skipped for *_, skipped in expected] == [True, False, True, False]
    found = on_ranks(Cluster(3), False, zoo, tmp_path / "ranks", steps, 8, **settings)
    assert [skipped for *_, skipped in found] == [True, False, True, False]
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


def test_evaluation_in_between_changes_nothing_and_gives_the_same(tmp_path: Path) -> None:
    zoo = ZOO["llama"]
    settings = {"optimizer": ws.AdamW(lr=1e-3), "clip_norm": 0.5, "threads_per_worker": 1}

    def work(path: Path, cluster: Cluster | None = None, links: Links | None = None) -> list[float]:
        losses = []
        with ws.Engine(zoo.build, path, cluster=cluster, links=links, **settings) as engine:  # type: ignore[arg-type]
            for step in (1, 2, 3):
                engine.step(zoo.micro_batches(8, ragged=True, step=step), zoo.loss_fn)
                with engine.module() as model:
                    if engine.computes:
                        losses.append(float(zoo.loss_fn(model, zoo.micro_batches(1, ragged=False, step=9)[0])))
                if step == 2:
                    engine.snapshot("second")
                    assert engine.snapshots() == {"second": 2}
        return losses

    expected = work(tmp_path / "alone")
    cluster = Cluster(3, 2)
    found = run_ranks(cluster, lambda links: work(tmp_path / "ranks", cluster, links), timeout_s=60)
    assert found == [[]] * 2 + [expected] * 3
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


class TestRefusals:
    """On all ranks, with one message, and nothing hangs."""

    def refused(self, cluster: Cluster, *arguments: Any, **settings: Any) -> list[tuple[type, str]]:
        def work(links: Links) -> tuple[type, str]:
            try:
                train(*arguments, cluster=cluster, links=links, **settings)
            except Exception as error:
                return type(error), str(error)
            raise AssertionError("not refused")

        return run_ranks(cluster, work, timeout_s=20)

    def test_workers_without_work(self, tmp_path: Path) -> None:
        found = self.refused(Cluster(4), ZOO["llama"], tmp_path / "s", range(1, 2), 3, optimizer=ws.AdamW())
        assert len(set(found)) == 1
        assert found[0][0] is PlanError
        assert "training.micro_batches=4" in found[0][1]

    def test_too_little_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The store is removed again, while other ranks than the first are still closing their part of it."""
        close = Store.close

        def later(store: Store) -> None:
            if store._place != store.path:
                time.sleep(0.2)
            close(store)

        monkeypatch.setattr(Store, "close", later)
        settings = {"optimizer": ws.AdamW(), "device_memory": "64KiB", "max_block_bytes": "1MiB"}
        found = self.refused(Cluster(3), ZOO["llama"], tmp_path / "s", range(1, 2), 8, **settings)
        assert len(set(found)) == 1
        assert found[0][0] is PlanError
        assert not (tmp_path / "s").exists()

    def test_another_model(self, tmp_path: Path) -> None:
        train(ZOO["llama"], tmp_path / "s", range(1, 2), 8, optimizer=ws.AdamW())
        found = self.refused(Cluster(2, 1), ZOO["gpt2"], tmp_path / "s", range(2, 3), 8, optimizer=ws.AdamW())
        assert len(set(found)) == 1
        assert found[0][0] is StoreMismatchError

    def test_a_model_that_is_refused(self, tmp_path: Path) -> None:
        """By each rank by itself, whoever comes first; the others are told."""

        def loss_fn(model: Any, micro_batch: Any) -> Any:
            return model(**micro_batch).loss + model.lm_head.weight.sum()

        cluster = Cluster(2)

        def work(links: Links) -> None:
            with ws.Engine(
                ZOO["llama"].build, tmp_path / "s", ws.AdamW(), threads_per_worker=1, cluster=cluster, links=links
            ) as engine:
                engine.step(ZOO["llama"].micro_batches(8, ragged=False, step=1), loss_fn)

        with pytest.raises((AuditError, FabricError)):
            run_ranks(cluster, work, timeout_s=20)


def test_the_first_rank_s_clock_decides_when_a_commit_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that differ, as far as they can: ranks that committed different steps would wait for each other."""
    draw = random.Random(0)
    monkeypatch.setattr(Interval, "elapsed", lambda self: draw.random() < 0.5)
    zoo, steps = ZOO["llama"], range(1, 7)
    for clip_norm in (None, 0.5):
        settings = {"optimizer": OPTIMIZERS["AdamW"](), "clip_norm": clip_norm, "commit_every": "1h"}
        expected = train(zoo, tmp_path / f"alone-{clip_norm}", steps, 4, **settings)
        assert on_ranks(Cluster(3), True, zoo, tmp_path / f"ranks-{clip_norm}", steps, 4, **settings) == expected
        assert digest(tmp_path / f"ranks-{clip_norm}") == digest(tmp_path / f"alone-{clip_norm}")


def test_an_import_that_was_cut_short_is_completed_by_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, steps = ZOO["llama"], range(1, 3)
    torch.manual_seed(5)
    initial = {name: parameter.detach().clone() for name, parameter in zoo.build().named_parameters()}
    settings = {"optimizer": OPTIMIZERS["AdamW"](), "initial": initial}
    expected = train(zoo, tmp_path / "alone", steps, 4, **settings)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(opening, "fill", killed)
        patch.setattr(
            opening.shutil, "rmtree", lambda *arguments, **options: None
        )  # a killed process clears nothing away
        with pytest.raises(KeyboardInterrupt):
            train(zoo, tmp_path / "ranks", steps, 4, **settings)
    assert Store.exists(tmp_path / "ranks")
    assert on_ranks(Cluster(2, 2), False, zoo, tmp_path / "ranks", steps, 4, **settings) == expected
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")
