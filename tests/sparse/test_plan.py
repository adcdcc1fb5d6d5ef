"""What `plan` says of sparse parameters is what the run's own store will be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from weightstream.commands import engines
from weightstream.commands.plan import plan
from weightstream.config.architectures import architecture
from weightstream.config.config import RunConfig, load_config
from weightstream.engine.engine import Engine
from weightstream.engine.multiplying import AutoKernels
from weightstream.sparse.choosing import Curve

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    "model": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "data": {"sources": ["text"], "tokenizer": {"size": 300}},
    "training": {"steps": 4, "micro_batches": 2, "micro_batch_size": 1, "sequence_length": 16},
    "engine": {"precision": "fp32", "device_memory": "16MiB", "host_memory": "64MiB", "threads_per_worker": 1},
}  # fmt: skip
BLOCK = [8, 8]
COUNTED = {"patterns": ["*.self_attn.*"], "sparsity": 0.75, "block": BLOCK, "init": "random"}


def config_in(folder: Path, **unknown: Any) -> RunConfig:
    """A configuration of which only the attention's counts are known beforehand."""
    sparsity = {"kernels": "auto", "groups": [COUNTED, {"patterns": ["*.mlp.*"], "block": BLOCK, **unknown}]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"sparsity": sparsity, "out": str(folder / "run")}))
    return load_config(path, [])


def fast(**settings: Any) -> AutoKernels:
    """A machine on which kernels are always faster."""
    curve = Curve(
        kernel="gathered",
        dtype="float32",
        block=(8, 8),
        tokens=16,
        threads=1,
        densities=(0.01, 0.9),
        speedups=(9.0, 9.0),
    )
    return AutoKernels(tokens=16, curves=lambda: [curve])


@contextmanager
def begun(config: RunConfig) -> Iterator[Engine]:
    """The run's own engine, on weights of which three blocks of four are zero."""
    _, build = architecture(config.model, vocabulary=300, end_of_text=0)

    def given(name: str, parameter: nn.Parameter) -> torch.Tensor:
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        if ".mlp." in name:
            rows, columns = parameter.shape
            values *= (torch.arange(rows)[:, None] // 8 + torch.arange(columns) // 8) % 4 == 0
        return values

    with torch.device("meta"):
        model = build()
    initial = {name: given(name, parameter) for name, parameter in model.named_parameters()}
    with engines.engine_of(config, config.store, build, None, initial) as engine:
        yield engine


@pytest.mark.parametrize(
    "unknown",
    [
        {"init": "zeros"},
        {"init": "magnitude", "distribution": "global", "sparsity": 0.75},
        {"init": "magnitude", "distribution": "uniform", "sparsity": 0.75},
    ],
    ids=["zeros", "global", "uniform"],
)
def test_kernels_are_those_that_the_run_will_use(
    unknown: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only weights tell is expanded, though the plan's stand-in has a density."""
    monkeypatch.setattr(engines, "auto_kernels", fast)
    monkeypatch.setattr(engines, "DEFAULT_PATH", tmp_path / "no profile")
    config = config_in(tmp_path, **unknown)
    planned = plan(config, lambda text: None)
    with begun(config) as engine:
        assert planned["kernels"] == engine.kernels
        expanded = len(engine.densities()) - len(engine.kernels)
    assert expanded == (0 if unknown.get("distribution") == "uniform" else 2 * 3)
    assert f"{expanded} expanded" in planned["text"]
