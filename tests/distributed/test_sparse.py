"""Sparse training on several ranks has the digest of one: compressed blocks go down, gradients at non-zeros come up."""

from pathlib import Path

import pytest
from tests.sparse.masked import CASES, digest, train

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
