"""`weightstream fit` on sparse layers, killed between two mask updates."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tests.forks import Command

import weightstream as ws
from weightstream.cli import main

KILLED_AT = 4
"""Masks change at steps 1 to 5 under one algorithm or the other; with clipping what this step did is not committed then."""

CONFIG = {
    "model": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "data": {"sources": ["text"], "tokenizer": {"size": 300}, "validation_share": 0.2},
    "training": {
        "steps": 6, "micro_batches": 2, "micro_batch_size": 1, "sequence_length": 32, "clip_norm": 0.5, "tensorboard": False,
        "validation": {"every": 6, "sequences": 4}, "sample": {"prompts": []},
    },
    "sparsity": {
        "groups": [
            {"patterns": ["*.mlp.*"], "algorithm": "gmp", "distribution": "global", "begin": 1, "end": 5, "every": 2},
            {"patterns": ["*.self_attn.*"], "algorithm": "rigl", "sparsity": 0.75, "every": 2, "end": 6},
        ],
    },
    "engine": {"device_memory": "16MiB", "host_memory": "64MiB", "threads_per_worker": 1},
}  # fmt: skip

KILLED = f"""
import os, signal
from weightstream.cli import main
from weightstream.training.loop import Trainer

step = Trainer._step

def killed(trainer):
    facts = step(trainer)
    if facts.step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return facts

Trainer._step = killed
main()
"""


def fit(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Fits to the end; what was said."""
    monkeypatch.setattr(sys, "argv", ["weightstream", "fit", "config.yaml", f"out={name}", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert not caught.value.code, said.err
    assert json.loads(said.out)["step"] == 6
    return said.err


def test_killed_in_the_middle_of_schedules_it_ends_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(8):
        Path(f"text/{number}.py").write_text(
            f"def function_{number}(argument):\n    return argument + {number}\n\n" * 6
        )
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    fit("whole", monkeypatch, capsys)
    killed = Command([sys.executable, "-c", KILLED, "fit", "config.yaml", "out=pieces"], tmp_path)
    said = killed.communicate(timeout=240)
    assert killed.returncode == -9, said
    assert "going on from step 3 of 6" in fit("pieces", monkeypatch, capsys)
    digests, kept = [], {}
    for name in ("whole", "pieces"):
        with ws.Store.open(Path(name) / "store", writable=False) as store:
            digests.append(store.digest())
            kept = {key: parts["mask"] for key, parts in store.items() if "mask" in parts}
    assert digests[0] == digests[1]
    for part, density in ((".mlp.", 0.1), (".self_attn.", 0.25)):
        masks = [mask for key, mask in kept.items() if part in key]
        assert sum(int(mask.sum()) for mask in masks) == pytest.approx(
            density * sum(mask.numel() for mask in masks), abs=1
        )
