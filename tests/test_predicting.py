"""A whole prediction of a small engine's steps: bytes that the engine then moves, and what more work changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.machine.profiles import profile
from tests.schedule.examples import smallest
from tests.sparse.masked import Model, loss_fn, micro_batches
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.engine.engine import Engine
from weightstream.prediction.costing import Costs
from weightstream.prediction.predicting import Stretch, census_of, predict, prediction_text, stretches
from weightstream.schedule.allotment import buffers_bytes
from weightstream.sparse.choosing import Curve
from weightstream.sparse.codec import decoding_steps
from weightstream.sparse.native.products import obstacle


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def moved(engine: ws.Engine) -> list[int]:
    """Bytes that an engine has read from the disk and written to it."""
    disk = [counts for (tier, _), counts in engine.store.counters.items() if tier == "disk"]
    return [sum(counts[key] for counts in disk) for key in ("read", "written")]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_is_predicted_before_it_is_made(tmp_path: Path, clip_norm: float | None) -> None:
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with ws.Engine(
        Stack, tmp_path / "store", ws.AdamW(), clip_norm=clip_norm, precision="bf16", ram_tier=False,
        device_memory="16MiB", host_memory="16MiB", threads_per_worker=1, activations="recompute",
    ) as engine:  # fmt: skip
        engine.rehearse(x, loss, micro_batches=2)
        one, more = (
            predict(engine, x, profile(), micro_batches=count, loss_fn=loss, cluster=Cluster(), threads=1)
            for count in (2, 4)
        )
        pair = predict(engine, x, profile(), micro_batches=4, loss_fn=loss, cluster=Cluster(2), threads=1)
        bound = engine.bytes_bound()
        results = [engine.step([x] * 2, loss) for _ in range(5)]
        engine.commit()
        before = moved(engine)
        engine.step([x] * 2, loss)
        engine.commit()
        whole = [after - earlier for after, earlier in zip(moved(engine), before, strict=True)]
    assert 0 < one.seconds_per_step < more.seconds_per_step < 2 * one.seconds_per_step
    assert more.compute_s > pair.compute_s > one.compute_s  # half of the micro-batches each, and what ranks cost
    assert pair.link_s > one.link_s == 0
    assert one.memory_bytes > engine.allotment.device_bytes + engine.allotment.host_bytes
    assert (one.read_bytes, one.written_bytes) == (bound.read, bound.written)
    if clip_norm is None:  # what goes on in the background at the end of a step would count in the next one
        assert whole == [one.read_bytes, one.written_bytes]
    else:  # a commit in between would update before the norm is needed: what has a buffer may still be on its way
        record = max(block.record_bytes for block in one.inputs.facts.blocks)
        buffers = one.inputs.allotment.record_buffers
        for key, predicted in (("read", one.read_bytes), ("written", one.written_bytes)):
            assert (
                abs(sum(getattr(result.bytes, key) for result in results[2:]) - 3 * predicted) <= (buffers + 1) * record
            )
    assert sum(one.seconds_by_kind().values()) <= one.seconds_per_step
    assert one.disk_s > 0
    text = prediction_text([Stretch(None, 100, one)], tokens_per_micro_batch=32)
    assert f"{one.binds} binds" in text
    assert "for 100 steps" in text


def test_each_rank_is_predicted_by_the_records_that_it_owns(tmp_path: Path) -> None:
    """The plan is the same on all ranks: of each block the most that any of them owns."""
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with ws.Engine(
        Stack, tmp_path / "store", ws.AdamW(), clip_norm=1.0, precision="bf16", ram_tier=True,
        device_memory="16MiB", host_memory="64MiB", threads_per_worker=1, activations="recompute", reduction_groups=3,
    ) as engine:  # fmt: skip
        engine.rehearse(x, loss, micro_batches=3)
        cluster = Cluster(3)
        found = predict(engine, x, profile(), micro_batches=3, loss_fn=loss, cluster=cluster, threads=1)
        facts, allotment = found.inputs.facts, found.inputs.allotment
        owned = [engine.outlook.facts_of_rank(rank, cluster, 3) for rank in range(3)]
        whole = engine.outlook.facts_at(Cluster(), 3, whole=True)
        keeper = engine.runtime.keeper
        buffers = [keeper._records_of(block.index).buffers for block in facts.blocks]
    for block, *parts in zip(whole.blocks, *(each.blocks for each in owned), strict=True):
        assert block.record_bytes == sum(part.record_bytes for part in parts)
    assert max(buffers_bytes(each, allotment) for each in owned) < buffers_bytes(facts, allotment)
    assert found.memory_bytes * 2 < found.all_memory_bytes < found.memory_bytes * 3
    assert [[buffer.capacity_bytes for buffer in own] for own in buffers] == [[b.record_bytes] for b in whole.blocks]


SPARSE = ("*.up.weight", "*.down.weight")
GROUPS = {
    "static": ws.SparsityGroup(patterns=SPARSE, sparsity=0.9),
    "rigl": ws.SparsityGroup(patterns=SPARSE, algorithm="rigl", sparsity=0.8, every=2, begin=2, end=100),
    "gmp": ws.SparsityGroup(patterns=SPARSE, algorithm="gmp", sparsity=0.8, every=4, begin=1, end=60),
}


def sparse_engine(path: Path, algorithm: str | None, **settings: Any) -> Engine:
    chosen: dict[str, Any] = {
        "clip_norm": None, "precision": "bf16", "ram_tier": False, "device_memory": "16MiB", "host_memory": "16MiB",
        "threads_per_worker": 1,
    }  # fmt: skip
    sparsity = None if algorithm is None else ws.Sparsity((GROUPS[algorithm],))
    return ws.Engine(Model, path, ws.AdamW(), sparsity=sparsity, **chosen | settings)


@pytest.mark.parametrize(("algorithm", "clip_norm"), [("static", None), ("static", 1.0), ("rigl", 1.0), ("rigl", None)])
def test_a_sparse_step_moves_the_bytes_that_were_predicted(
    tmp_path: Path, algorithm: str, clip_norm: float | None
) -> None:
    """Exactly: between two commits, after which nothing is under way, steps read and write what was said of each of them."""
    with sparse_engine(tmp_path / "store", algorithm, clip_norm=clip_norm, host_memory="640KiB") as engine:
        batches = micro_batches(1)
        engine.step(batches, loss_fn)
        engine.step(batches, loss_fn)
        engine.commit()
        engine.recorder.forget()
        predicted = [
            predict(engine, batches[0], profile(), micro_batches=len(batches), loss_fn=loss_fn, step=step)
            for step in range(3, 7)
        ]
        results = [engine.step(batches, loss_fn) for _ in predicted]
        facts, allotment = predicted[0].inputs.facts, engine.allotment
        assert allotment == predicted[0].inputs.allotment
        engine.commit()
        behind = engine.recorder.log.take()
    moved = {
        way: sum(note[5] for note in behind if note[2] == way) + sum(getattr(r.bytes, name) for r in results)
        for way, name in (("read", "read"), ("write", "written"))
    }
    # with clipping a commit before the first step has updated what its forward would have been served with
    served = sum(block.fetched_bytes for block in facts.blocks if block.trainable and clip_norm is not None)
    assert moved["read"] == sum(each.read_bytes for each in predicted) + served
    assert moved["write"] == sum(each.written_bytes for each in predicted)
    if (
        algorithm == "rigl" and clip_norm is not None
    ):  # gradients of the sparse parameters are whole in every other step
        assert len(engine.allotment.staged_in_ram) < len(facts.blocks)
        assert predicted[1].written_bytes > predicted[0].written_bytes


def test_sparse_parameters_cost_less_to_move_and_update_and_more_to_expand(tmp_path: Path) -> None:
    found = {}
    for name in (None, "static"):
        with sparse_engine(tmp_path / f"{name}", name) as engine:
            x = micro_batches(1)[0]
            engine.rehearse(x, loss_fn, micro_batches=2)
            found[name] = predict(engine, x, profile(), micro_batches=2, loss_fn=loss_fn, cluster=Cluster(2), threads=1)
    dense, sparse = found[None].inputs, found["static"].inputs
    assert found["static"].link_s < found[None].link_s
    assert found["static"].optimizer_s < found[None].optimizer_s
    assert found["static"].disk_s < found[None].disk_s
    layer = next(block.index for block in sparse.facts.blocks if block.compressed_bytes)
    assert not dense.durations.expand
    # two matrices of 32×192: zeros of two bytes, and each non-zero to its place, which is kept: masks are not gone through
    assert layer in found["static"].inputs.allotment.kept_places
    elements, nonzeros = 2 * 32 * 192, round(0.1 * 2 * 32 * 192)
    assert sparse.durations.expand[layer] == pytest.approx((2 * elements + nonzeros) * 1e-9, rel=1e-3)
    visit = next(number for number, visit in enumerate(sparse.facts.visits) if visit.block == layer)
    assert sparse.durations.forward[visit] == pytest.approx(
        dense.durations.forward[visit], rel=0.05
    )  # multiplied densely


def test_a_kernel_takes_its_share_of_a_dense_product(tmp_path: Path) -> None:
    """Blocks of 32×32 at a density of about a tenth are ten times as fast, says the profile by hand."""
    block = ws.SparsityGroup(patterns=("*.up.weight",), sparsity=0.9, block=(32, 32))
    found = {}
    for kernel in ({}, {"*.up.weight": "gathered"}):
        with ws.Engine(
            Model, tmp_path / f"{len(kernel)}", ws.AdamW(), sparsity=ws.Sparsity((block,)), kernels=kernel,  # type: ignore[arg-type]
            device_memory="16MiB", host_memory="16MiB", threads_per_worker=1,
        ) as engine:  # fmt: skip
            x = micro_batches(1)[0]
            engine.rehearse(x, loss_fn)
            found[len(kernel)] = predict(engine, x, profile(), micro_batches=1, loss_fn=loss_fn, threads=1).inputs
    expanded, multiplied = found[0], found[1]
    visit = next(
        v for v, each in enumerate(expanded.facts.visits) if expanded.facts.blocks[each.block].compressed_bytes
    )
    tokens, product_s = micro_batches(1)[0].numel(), 2 * 32 * 192 / 1e9  # of one token, at 1 GFLOP/s
    for name, products in (("forward", 1), ("recompute", 1), ("backward", 2)):
        saved = getattr(expanded.durations, name)[visit] - getattr(multiplied.durations, name)[visit]
        assert saved == pytest.approx(products * tokens * product_s * 0.9, rel=0.2), name


@pytest.mark.skipif(obstacle() is not None, reason="no C compiler")
def test_what_a_kernel_asks_of_a_mask_costs_nothing_where_it_is_kept(tmp_path: Path) -> None:
    """Else a nanosecond for each gap and two for each non-zero, of both matrices, beside a product that takes as long."""
    machine = profile(
        codec=profile().codec.model_copy(update={"prepare_s": 2e-9}),  # type: ignore[union-attr]
        sparse=[Curve(
            kernel="native", dtype="bfloat16", block=(1, 1), tokens=16, threads=1, densities=(0.01, 0.5),
            speedups=(1.0, 0.5), prepared_speedups=(4.0, 4.0),
        )],
    )  # fmt: skip
    settings: dict[str, Any] = {"kernels": dict.fromkeys(SPARSE, "native"), "activations": "recompute"}
    found = []
    for name in ("kept", "without"):
        with sparse_engine(tmp_path / name, "static", **settings) as engine:
            x = micro_batches(1)[0]
            engine.rehearse(x, loss_fn)
            found.append(predict(engine, x, machine, micro_batches=1, loss_fn=loss_fn, threads=1).inputs)
            settings["host_memory"] = smallest(engine.outlook.facts(1), "host_memory")
            census = census_of(engine, x, loss_fn)
    kept, without = found
    layers = [block.index for block in kept.facts.blocks if block.compressed_bytes]
    assert kept.allotment.kept_places == set(layers)
    assert not without.allotment.kept_places
    elements, nonzeros = 2 * 32 * 192, round(0.1 * 2 * 32 * 192)
    for layer in layers:
        assert kept.durations.expand[layer] == 0
        steps = 2 * decoding_steps(elements // 2, nonzeros // 2)
        assert without.durations.expand[layer] == pytest.approx((steps + 2 * nonzeros) * 1e-9, rel=1e-3)
    assert kept.durations.forward == without.durations.forward
    own = Costs(machine, 1).durations(
        census, kept.facts, kept.allotment, tensors=[1] * len(kept.facts.blocks), clipped=False, dtype="bfloat16"
    )  # all dense
    visit = next(v for v, each in enumerate(kept.facts.visits) if each.block in layers)
    products_s = micro_batches(1)[0].numel() * 2 * elements / 1e9
    assert own.forward[visit] - kept.durations.forward[visit] == pytest.approx(products_s * 3 / 4, rel=1e-3)


def test_a_run_whose_masks_change_is_predicted_in_stretches(tmp_path: Path) -> None:
    with sparse_engine(tmp_path / "store", "gmp") as engine:
        x = micro_batches(1)[0]
        engine.rehearse(x, loss_fn)
        kinds = engine.masking.alike(100) if engine.masking else []
        pieces = stretches(
            engine, 100, lambda step: predict(engine, x, profile(), micro_batches=1, loss_fn=loss_fn, step=step)
        )
    assert sum(count for _, count in kinds) == sum(piece.steps for piece in pieces) == 100
    assert len(pieces) == 6 < len(kinds)
    assert pieces[-1].step == 100
    written = [piece.found.written_bytes for piece in pieces]
    assert written == sorted(written, reverse=True)
    assert written[0] > written[-1]
