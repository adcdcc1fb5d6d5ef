"""The push-button: a model, a number of workers, where the run goes and for how long; all else is planned.

Sizes of Llama-like models that `fit --model` knows by name, beside any model's folder.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightstream.cluster import Cluster
from weightstream.config.config import RunConfig, check_config, with_overrides
from weightstream.errors import ConfigError

SIZES: dict[str, tuple[int, int, int, int]] = {
    # hidden size, intermediate size, layers, heads; names are rounded parameters with a vocabulary of 8,192
    "llama-1m": (64, 176, 4, 4),
    "llama-8m": (256, 688, 5, 4),
    "llama-60m": (640, 1728, 10, 10),
    "llama-160m": (1024, 2816, 11, 16),
    "llama-1b": (2048, 5632, 20, 16),
    "llama-8b": (4096, 14336, 36, 32),
}
GROUPS = 192
"""Reduction groups: fixed when a store is made, and the most workers that it can ever have."""
_FEW = 8


def push_button(
    model: str, *, workers: int, out: Path | None, steps: int | None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The planned configuration. A store that it makes can be trained by 1 to 192 workers.

    Up to 8 workers a step has 8 micro-batches, so that the number of workers alone changes; above, 192.

    Raises:
        ConfigError: neither a known size nor a model's folder, or an override that is wrong.
        PlanError: more workers than there are reduction groups.
    """
    micro_batches = _FEW if workers <= _FEW else GROUPS
    steps = steps or 100
    Cluster(workers).check(micro_batches, GROUPS)
    values: dict[str, Any] = {
        "model": _model(model),
        "data": {"sources": ["stdlib"], "tokenizer": {"size": 8192}},
        "optimizer": {
            "name": "AdamW", "lr": 1e-3, "schedule": "cosine", "warmup": min(10, steps // 4), "weight_decay": 0.1,
        },
        "training": {
            "steps": steps, "micro_batches": micro_batches, "micro_batch_size": 1, "sequence_length": 256,
            "clip_norm": 1.0, "validation": {"every": 0, "sequences": 16},
        },
        "engine": {
            "precision": "bf16", "reduction_groups": GROUPS, "device_memory": "512MiB", "host_memory": "2GiB",
            "panel_elements": 1 << 20,
        },
        "cluster": {"workers": workers},
        "out": str(out or Path("runs") / Path(model).name),
    }  # fmt: skip
    return check_config(with_overrides(values, overrides), source=f"--model {model}")


def _model(model: str) -> dict[str, Any]:
    if model in SIZES:
        hidden, intermediate, layers, heads = SIZES[model]
        return {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 256,
        }  # fmt: skip
    if (Path(model).expanduser() / "config.json").is_file():
        return {"path": model}
    near = difflib.get_close_matches(model, SIZES, n=1, cutoff=0.3)
    raise ConfigError(
        f"--model {model}: neither a folder with a config.json nor a known size{f'; did you mean {near[0]}?' if near else ''} "
        f"(known: {', '.join(SIZES)})"
    )
