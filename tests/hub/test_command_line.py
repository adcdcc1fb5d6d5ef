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


def configure(name: str, model: dict[str, Any], **more: Any) -> str:
    data = {"sources": ["text"], "tokenizer": {"size": 300}, "validation_share": 0.2}
    values = {"model": model, "data": data, "training": TRAINING, "engine": ENGINE, "out": name, **more}
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


def test_a_sparse_store_of_dense_weights_of_zeros_and_of_masks(run: Run) -> None:
    """Said how, a checkpoint becomes sparse; what is exported of it becomes the same store, and trains the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {key: value for key, value in MODEL.items() if key != "model_type"}
    torch.manual_seed(3)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=300, **keys))
    dense.save_pretrained("dense")
    moving = {
        "patterns": ["*.mlp.*"],
        "algorithm": "rigl",
        "sparsity": 0.75,
        "distribution": "global",
        "every": 1,
        "end": 2,
    }
    halved = {"patterns": ["*.o_proj.*"], "sparsity": 0.5, "block": [4, 4]}
    sparsity: dict[str, Any] = {"groups": [moving, halved, {"patterns": ["*.v_proj.*"], "sparsity": 0}]}

    first = configure("first", {"path": "dense"}, sparsity=sparsity)
    for arguments in (("store", "import", "dense", first), ("fit", first)):
        code, _, errors = run(*arguments)
        assert code == 2
        assert "which is to be sparse by group *.mlp.*" in errors or "by group *.o_proj.*" in errors
        assert "give init: magnitude for the largest" in errors
    code, _, errors = run("store", "import", "dense", first, "--masks", "zeros")
    assert (code, "expected given weights of which some are zero" in errors) == (2, True)
    code, _, errors = run("store", "import", "dense", first, "--masks", "nowhere")
    assert (code, "cannot read masks from nowhere" in errors) == (2, True)
    assert not Path("first").exists() or not ws.Store.exists("first/store")
    code, _, errors = run("store", "import", "dense", first, "--masks", "magnitude", "--json")
    assert code == 0, errors
    with ws.Store.open("first/store", writable=False) as store:
        digest, found = store.digest(), dict(store.items())
    weights = {name: value for name, value in dense.named_parameters() if ".mlp." in name}
    sizes = torch.cat([value.detach().abs().flatten() for value in weights.values()])
    masks = torch.cat([found[name]["mask"].flatten() for name in weights])
    assert int(masks.sum()) == sizes.numel() // 4
    assert sizes[masks].min() > sizes[~masks].max()

    assert run("store", "export", "first/store", "out", "--masks", "--json")[0] == 0
    ways = {"zeros": "zeros", "beside": "out/masks.safetensors"}
    for name, masks_from in ways.items():
        config = configure(name, {"path": "out"}, sparsity=sparsity)
        code, _, errors = run("store", "import", "out", config, "--masks", masks_from, "--json")
        assert code == 0, errors
        with ws.Store.open(f"{name}/store", writable=False) as store:
            assert store.digest() == digest
    Path("out/masks.safetensors").unlink()  # the stores have them
    by_fit = {"groups": [{**group, "init": "zeros"} if group["sparsity"] else group for group in sparsity["groups"]]}
    code, plan, errors = run("plan", configure("said", {"path": "out"}, sparsity=by_fit), "--json")
    assert code == 0, errors
    assert "masks of *.mlp.*: how many non-zeros each parameter has is found from the weights" in plan["text"]
    trained = ("beside", "said")
    for name in trained:
        code, report, errors = run("fit", f"{name}.yaml", "--json")
        assert (code, report["step"]) == (0, 2), errors
    stores = [ws.Store.open(f"{name}/store", writable=False) for name in trained]
    assert len({store.digest() for store in stores}) == 1
    assert stores[0].digest() != digest
    for store in stores:
        store.close()
    said = {"groups": [{**moving, "init": "random"}]}
    for name, found, message in (("random", said, "says init"), ("none", {"groups": []}, "has no groups")):
        config = configure(name, {"path": "dense"}, sparsity=found)
        code, _, errors = run("store", "import", "dense", config, "--masks", "zeros")
        assert (code, message in errors) == (2, True)
