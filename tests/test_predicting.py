"""A whole prediction of a small engine's steps: bytes that the engine then moves, and what more work changes."""

from pathlib import Path

import pytest
import torch
from tests.machine.profiles import profile
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.predicting import predict, prediction_text


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
    assert 0 < one.seconds_per_step < more.seconds_per_step < 2 * one.seconds_per_step
    assert more.compute_s > pair.compute_s > one.compute_s  # half of the micro-batches each, and what ranks cost
    assert pair.link_s > one.link_s == 0
    assert one.memory_bytes > engine.allotment.device_bytes + engine.allotment.host_bytes
    assert (one.read_bytes, one.written_bytes) == (bound.read, bound.written)
    # what goes on in the background at the end of a step counts in the next one: at most a record or two
    record = max(block.record_bytes for block in one.inputs.facts.blocks)
    for key, predicted in (("read", one.read_bytes), ("written", one.written_bytes)):
        assert abs(sum(getattr(result.bytes, key) for result in results[2:]) - 3 * predicted) <= 2 * record
    assert sum(one.seconds_by_kind().values()) <= one.seconds_per_step
    text = prediction_text(one, tokens_per_micro_batch=32, steps=100)
    assert f"{one.binds} binds" in text
    assert "for 100 steps" in text
