"""Sparse training on several ranks has the digest of one: compressed blocks go down, gradients at non-zeros come up."""

from pathlib import Path
from typing import Any

import pytest
from tests.sparse.masked import CASES, digest, group, loss_fn, micro_batches, open_engine, train

from weightstream.cluster import Cluster
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


CLUSTERS = [Cluster(2), Cluster(3, 1), Cluster(3, 2)]


@pytest.mark.parametrize("case", CASES)
def test_any_cluster_has_the_digest_of_one_rank(case: str, tmp_path: Path) -> None:
    sparsity, _ = CASES[case]
    number = list(CASES).index(case)
    cluster, clip_norm = CLUSTERS[number % 3], (None, 0.5)[number % 2]
    settings = {"precision": "bf16", "clip_norm": clip_norm}

    def work(links: Links) -> list[tuple[float, float]]:
        return train(tmp_path / "ranks", sparsity, [9], 9, cluster=cluster, links=links, **settings)

    alone = train(tmp_path / "alone", sparsity, [9], 9, **settings)
    assert all(found == alone for found in run_ranks(cluster, work, timeout_s=60))
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
def test_what_masks_came_to_needs_no_exchange_of_its_own(clip_norm: float | None, tmp_path: Path) -> None:
    """Every rank reports what one alone does; they tell each other as often as where nothing is sparse."""

    def work(links: Links) -> tuple[int, list[Any]]:
        name = f"ranks {sparsity is None}"
        gather, told = links.control.gather, []

        def counted(value: Any) -> list[Any]:
            told.append(value)
            return gather(value)

        with open_engine(tmp_path / name, sparsity, clip_norm=clip_norm, cluster=Cluster(2), links=links) as engine:
            engine.step(micro_batches(1), loss_fn)
            links.control.gather = counted  # type: ignore[method-assign]
            masks = [engine.step(micro_batches(step), loss_fn).masks for step in range(2, 6)]
            return len(told), masks

    exchanges = {}
    for sparsity in (None, group(algorithm="set", end=9, every=2)):
        found = run_ranks(Cluster(2), work, timeout_s=60)
        exchanges[sparsity is None] = [count for count, _ in found]
    with open_engine(tmp_path / "alone", sparsity, clip_norm=clip_norm) as engine:
        alone = [engine.step(micro_batches(step), loss_fn).masks for step in range(1, 6)][1:]
    assert [bool(masks) for masks in alone] == ([True, False, True, False] if clip_norm is None else [False, True] * 2)
    assert all(masks == alone for _, masks in found)
    assert exchanges[False] == exchanges[True]
