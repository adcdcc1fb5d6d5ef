"""`store export` of a trained run, and runs that begin with given weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import weightstream as ws
from weightstream.cli import main

ENGINE = {"device_memory": "16MiB", "host_memory": "64MiB", "precision": "fp32", "threads_per_worker": 1}
TRAINING = {
    "steps": 2, "micro_batches": 2, "micro_batch_size": 1, "sequence_length": 32, "tensorboard": False,
    "validation": {"every": 2, "sequences": 4}, "sample": {"prompts": []},
}  # fmt: skip
MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "text").mkdir()
    for number in range(20):
        body = f"def function_{number}(argument):\n    return argument + {number}\n\n" * (4 + number % 5)
        (tmp_path / "text" / f"{number}.py").write_text(body)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["weightstream", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), json.loads(captured.out) if captured.out else None, captured.err

    return command


def configure(name: str, model: dict[str, Any]) -> str:
    data = {"sources": ["text"], "tokenizer": {"size": 300}, "validation_share": 0.2}
    values = {"model": model, "data": data, "training": TRAINING, "engine": ENGINE, "out": name}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
    return f"{name}.yaml"


def test_a_run_goes_out_and_begins_another(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("fit", configure("first", MODEL), "--json")[0] == 0
    code, report, errors = run("store", "export", "first", "exported", "--optimizer-state", "--json")
    assert code == 0, errors
    assert report["step"] == 2
    model = AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32)
    with ws.Store.open("first/store", writable=False) as store:
        trained = {name: parts["param"] for name, parts in store.items()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])
    tokenizer = AutoTokenizer.from_pretrained("exported")
    assert tokenizer.decode(tokenizer("def function_1(argument):")["input_ids"]) == "def function_1(argument):"

    # By the command, and by `fit` itself: both begin where the first run ended.
    second = configure("second", {"path": "exported"})
    code, report, errors = run("store", "import", "exported", second, "--json")
    assert code == 0, errors
    with ws.Store.open("second/store", writable=False) as store:
        assert all(torch.equal(parts["param"], trained[name]) for name, parts in store.items())
    first_loss = run("fit", second, "--json")[1]["loss_before"]
    third = run("fit", configure("third", {"path": "exported"}), "--json")
    assert "training starts from" in third[2]
    assert third[1]["loss_before"] == first_loss
    fresh = run("fit", configure("fourth", {"path": "exported", "weights": False}), "--json")
    assert fresh[1]["loss_before"] > first_loss
    with ws.Store.open("second/store", writable=False) as one, ws.Store.open("third/store", writable=False) as other:
        assert one.digest() == other.digest()


def test_refusals_leave_nothing_behind(run: Run) -> None:
    config = configure("broken", {"path": "weights"})
    Path("weights").mkdir()
    code, _, errors = run("store", "import", "weights", config)
    assert (code, "has no config.json" in errors) == (2, True)
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {key: value for key, value in MODEL.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **keys)).save_pretrained("weights")
    tensors = load_file("weights/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, "weights/model.safetensors", {"format": "pt"})
    for arguments in (("store", "import", "weights", config), ("fit", config)):
        code, _, errors = run(*arguments)
        assert (code, "missing in the checkpoint: lm_head.weight" in errors) == (2, True)
    code, _, errors = run("store", "export", "broken", "out")
    assert (code, "expected a store" in errors) == (2, True)
    assert not Path("broken").exists()
    assert not Path("out").exists()
