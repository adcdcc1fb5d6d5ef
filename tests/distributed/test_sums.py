"""Gradients summed over ranks have the bits of one sum over all micro-batches, whoever has which, whatever is missing."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightstream.fabric.reduce as reduce_module
from weightstream.blocks import Block, Parameter, cut
from weightstream.cluster import Cluster
from weightstream.fabric import coming
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.fabric.reduction import BlockSum
from weightstream.fabric.staging import Staging
from weightstream.fabric.together import Together
from weightstream.store.elsewhere import Elsewhere, catalogue_of
from weightstream.store.facts import block_rows
from weightstream.store.optimizers import AdamW
from weightstream.store.owned import Holding

SHAPES = {"w": (40, 64), "b": (7,), "v": (3, 5), "c": (64, 32)}
PANEL = 1024  # w and c are cut
Gradients = dict[tuple[str, int, int], Tensor]
"""(name, use, micro-batch) → gradient."""


def catalogue(tmp: str) -> dict[str, object]:
    block = Block(0, "block", tuple(Parameter(name, shape) for name, shape in SHAPES.items()), ("block",))
    units = cut([block], panel_elements=PANEL, panels=True)
    rows = block_rows([block], units, {})
    return catalogue_of(
        rows, precision="fp32", optimizer=AdamW().to_json(), panel_elements=PANEL, contract={}, step=0, progress={}
    )


def whole(gradients: Gradients, micro_batches: int, groups: int) -> dict[str, Tensor]:
    """The sum of one rank that has everything."""
    targets = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    total = BlockSum(targets, lambda slot, name: torch.empty(SHAPES[name]), micro_batches=micro_batches, groups=groups)
    for name, use, micro_batch in sorted(gradients, key=lambda key: (key[2], -key[1], key[0])):
        total.add(name, use, micro_batch, gradients[name, use, micro_batch])
    return {name: found.clone() for name, found in total.close().items()}


def over_ranks(
    tmp_path: object,
    cluster: Cluster,
    gradients: Gradients,
    uses: dict[str, Sequence[int]],
    micro_batches: int,
    groups: int,
) -> tuple[dict[str, Tensor], dict[tuple[str, int], float]]:
    facts = catalogue(str(tmp_path))

    def work(links: Links) -> tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], float], bool]:
        from pathlib import Path

        store = Elsewhere(Path("s"), facts, Path(str(tmp_path)) / f"{random.random()}")
        owner = [unit.index % len(cluster.memory_ranks) for unit in store.units]
        holding = Holding(store, [unit for unit, rank in enumerate(owner) if rank == links.rank])  # type: ignore[arg-type]
        common = {
            "in_ram": frozenset({0}),
            "ring": 1,
            "partial_sums": 1,
            "held_gradients": 2,
            "device": torch.device("cpu"),
        }
        staging = Staging(store, holding.staged, immediate=True, **common)  # type: ignore[arg-type]
        sums = Staging(store, holding.gradients, immediate=True, **(common | {"in_ram": frozenset()}))  # type: ignore[arg-type]
        peers = Together(
            links, cluster, holding, owner, sums=sums, staging=staging, groups=groups, uses=lambda _, name: uses[name]
        )
        own = cluster.share(links.rank, micro_batches, groups)
        mine = sorted((key for key in gradients if key[2] in own), key=lambda key: (key[2], -key[1], key[0]))
        for name, use, micro_batch in mine:
            total = peers.sum_of(0) or peers.open(0, micro_batches=micro_batches, brief=True)
            total.add(name, use, micro_batch, gradients[name, use, micro_batch])
        reduced = peers.finish(0, peers.reduce(0).result(timeout=30))
        found = {key: grad.clone() for key, grad in staging.gradients(0).items()}
        peers.close()
        store.close()
        return found, reduced.squares, reduced.found

    results = run_ranks(cluster, work, timeout_s=30)
    pieces: dict[tuple[str, int], Tensor] = {}
    squares: dict[tuple[str, int], float] = {}
    for rank, (found, own, any_found) in enumerate(results):
        assert not pieces.keys() & found.keys()
        pieces |= found
        squares |= own
        if rank in cluster.memory_ranks:
            assert any_found == bool(gradients) or not found
    names = {name for name, _ in pieces}
    return {
        name: torch.cat([pieces[key] for key in sorted(pieces) if key[0] == name]).reshape(SHAPES[name])
        for name in names
    }, squares


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce_module, "CHUNK", 320)
    monkeypatch.setattr(reduce_module, "AHEAD_ELEMENTS", 640)
    monkeypatch.setattr(coming, "POSTED", 3)
    monkeypatch.setattr(reduce_module, "BEGUN", 2)  # so that a block's units are begun in several turns


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(1, 6), memory=st.sampled_from(["colocated", 1, 2]), more=st.integers(0, 6),
    micro_batches=st.integers(1, 14), missing=st.sampled_from([0.0, 0.3, 0.9]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_the_bits_of_one_sum(
    tmp_path_factory: pytest.TempPathFactory,
    workers: int,
    memory: int | str,
    more: int,
    micro_batches: int,
    missing: float,
    seed: int,
) -> None:
    cluster, groups = Cluster(workers, memory), workers + more  # type: ignore[arg-type]
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    uses: dict[str, Sequence[int]] = {"w": [3], "b": [4], "v": [2, 9], "c": [1, 5, 7]}
    gradients = {
        (name, use, micro_batch): torch.randn(SHAPES[name], generator=generator)
        for name, visits in uses.items()
        for use in visits
        for micro_batch in range(micro_batches)
        if draw.random() >= missing
    }
    expected = whole(gradients, micro_batches, groups)
    found, squares = over_ranks(tmp_path_factory.mktemp("ranks"), cluster, gradients, uses, micro_batches, groups)
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert torch.equal(found[name].view(torch.int32), total.view(torch.int32)), name
    assert {name for name, _ in squares} == expected.keys()
