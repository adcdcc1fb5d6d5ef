"""A whole prediction of a small engine's steps: bytes that the engine then moves, and what more work changes."""

from pathlib import Path

import pytest
import torch
from tests.machine.profiles import profile
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.predicting import predict, prediction_text
from weightstream.schedule.planner import buffers_bytes


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
    else:  # a commit in between would update before the norm is needed: at most a record or two are still on their way
        record = max(block.record_bytes for block in one.inputs.facts.blocks)
        for key, predicted in (("read", one.read_bytes), ("written", one.written_bytes)):
            assert abs(sum(getattr(result.bytes, key) for result in results[2:]) - 3 * predicted) <= 2 * record
    assert sum(one.seconds_by_kind().values()) <= one.seconds_per_step
    text = prediction_text(one, tokens_per_micro_batch=32, steps=100)
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
        owned = [engine.facts_of_rank(rank, cluster, 3) for rank in range(3)]
        whole = engine.whole_facts(3)
        keeper = engine.runtime.keeper
        buffers = [keeper._records_of(block.index).buffers for block in facts.blocks]
    for block, *parts in zip(whole.blocks, *(each.blocks for each in owned), strict=True):
        assert block.record_bytes == sum(part.record_bytes for part in parts)
    assert max(buffers_bytes(each, allotment) for each in owned) < buffers_bytes(facts, allotment)
    assert found.memory_bytes * 2 < found.all_memory_bytes < found.memory_bytes * 3
    assert [[buffer.capacity_bytes for buffer in own] for own in buffers] == [[b.record_bytes] for b in whole.blocks]
