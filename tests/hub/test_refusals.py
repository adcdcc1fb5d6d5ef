"""What cannot be imported or exported is refused by name, and leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub.conftest import SETTINGS, tiny_gpt2, tiny_llama
from torch import Tensor

import weightstream as ws
from weightstream.errors import ConfigError, StoreError, StoreMismatchError, WeightstreamError
from weightstream.hub import builder, export_store, import_directory, import_model, load_gguf

OPTIMIZER = ws.AdamW(lr=1e-3)
DOWN = "model.layers.0.mlp.down_proj.weight"


def refused(source: Path, kind: type[WeightstreamError], message: str) -> None:
    store = source.parent / "store"
    with pytest.raises(kind, match=message):
        import_directory(source, store, OPTIMIZER, **SETTINGS)
    assert not store.exists()


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({DOWN: None}, f"missing in the checkpoint: {DOWN}"),
        ({"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}, "not of this model: model.layers.7.mlp.up_proj.weight"),
        ({DOWN: torch.zeros(32, 47)}, rf"{DOWN}: shape \(32, 47\) in the checkpoint, \(32, 48\) in the model"),
        ({DOWN: torch.zeros(32, 48, dtype=torch.int8)}, f"{DOWN}: I8 in the checkpoint, expected one of BF16, F16"),
    ],
)
def test_tensors_that_are_not_the_model_s(llama_folder: Path, changes: dict[str, Any], message: str) -> None:
    change(llama_folder, changes)
    refused(llama_folder, StoreMismatchError, message)


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    tiny_gpt2().save_pretrained(folder)
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change(folder, {"lm_head.weight": embedding + 1})
    refused(
        folder, StoreMismatchError, r"transformer\.wte\.weight: tied in the model, but .* and lm_head\.weight differ"
    )
    change(folder, {"lm_head.weight": embedding.clone()})
    import_directory(folder, tmp_path / "store", OPTIMIZER, **SETTINGS)
    change(folder, {"transformer.wte.weight": None})
    import_directory(folder, tmp_path / "other", OPTIMIZER, **SETTINGS)
    with ws.Store.open(tmp_path / "store", writable=False) as one, ws.Store.open(tmp_path / "other") as other:
        assert one.digest() == other.digest()


def test_names_of_the_bare_model(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has `h.0…` without the prefix, and masks that nobody reads any more."""
    folder = tmp_path / "gpt2"
    model = tiny_gpt2()
    model.save_pretrained(folder)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors", {"format": "pt"})
    import_directory(folder, tmp_path / "store", OPTIMIZER, **SETTINGS)
    with ws.Store.open(tmp_path / "store", writable=False) as store:
        assert torch.equal(store.tensor("transformer.h.1.mlp.c_fc.weight"), tensors["h.1.mlp.c_fc.weight"])


def test_folders_that_are_no_checkpoints(llama_folder: Path, tmp_path: Path) -> None:
    weights = (llama_folder / "model.safetensors").read_bytes()
    (llama_folder / "model.safetensors").write_bytes(weights[:-8])
    refused(llama_folder, StoreError, "cannot be read")
    (llama_folder / "model.safetensors").unlink()
    refused(
        llama_folder, StoreError, r"expected model\.safetensors or model\.safetensors\.index\.json, found config\.json"
    )
    (llama_folder / "config.json").write_text("{")
    refused(llama_folder, ConfigError, r"config\.json' cannot be read")
    (llama_folder / "config.json").unlink()
    refused(llama_folder, ConfigError, r"has no config\.json")
    refused(tmp_path / "nowhere", ConfigError, r"has no config\.json")


def test_shards_that_are_missing_or_wrongly_listed(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder, max_shard_size="15KB")
    index = folder / "model.safetensors.index.json"
    right = index.read_text()
    listed = json.loads(right)
    first, last = sorted(set(listed["weight_map"].values()))[:: len(set(listed["weight_map"].values())) - 1]
    key = next(key for key, name in listed["weight_map"].items() if name == first)
    listed["weight_map"][key] = last
    index.write_text(json.dumps(listed))
    refused(folder, StoreError, f"tensor '{re.escape(key)}' is in {last}, which does not have it")
    listed["weight_map"][key] = "../" + first
    index.write_text(json.dumps(listed))
    refused(folder, StoreError, "outside of its folder")
    index.write_text(right)
    (folder / last).unlink()
    refused(folder, StoreError, f"lacks {last}")


def test_a_store_that_is_there_is_left_alone(llama_folder: Path, tmp_path: Path) -> None:
    import_directory(llama_folder, tmp_path / "store", OPTIMIZER, **SETTINGS)
    with pytest.raises(StoreError, match="already holds a store"):
        import_directory(llama_folder, tmp_path / "store", OPTIMIZER, **SETTINGS)
    with ws.Engine(builder(tmp_path / "store"), tmp_path / "trained", OPTIMIZER, **SETTINGS):
        pass
    with pytest.raises(StoreError, match="already holds a store"):
        import_model(tiny_llama(), tmp_path / "trained", OPTIMIZER, **SETTINGS)


def test_an_interrupted_import_is_completed_by_repeating_it(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: the store is there, its values are not."""
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr("weightstream.engine.opening.fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        kept = SimpleNamespace(rmtree=lambda *_, **__: None, disk_usage=shutil.disk_usage)
        patched.setattr("weightstream.engine.opening.shutil", kept)
        with pytest.raises(KeyboardInterrupt):
            import_directory(llama_folder, store, OPTIMIZER, **SETTINGS)
    with pytest.raises(StoreError, match="its import was not completed"):
        ws.Engine(lambda: tiny_llama(), store, OPTIMIZER, **SETTINGS)
    import_directory(llama_folder, store, OPTIMIZER, **SETTINGS)
    with ws.Store.open(store, writable=False) as opened:
        assert torch.equal(opened.tensor(DOWN), load_file(llama_folder / "model.safetensors")[DOWN])


def test_values_for_what_the_model_does_not_have(tmp_path: Path) -> None:
    config = tiny_llama().config
    for values, message in (
        ({"model.nowhere": torch.ones(2)}, "'model.nowhere'"),
        ({DOWN: torch.ones(2)}, rf"{DOWN}' has shape \(32, 48\), the values given are of shape \(2,\)"),
    ):
        with pytest.raises(StoreError, match=message):
            ws.Engine(lambda: type(tiny_llama())(config), tmp_path / "store", OPTIMIZER, initial=values, **SETTINGS)
        assert not (tmp_path / "store").exists()


def test_models_in_memory_that_cannot_be(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="give build="):
        import_model(plain, tmp_path / "store", OPTIMIZER, **SETTINGS)
    with pytest.raises(StoreMismatchError, match=r"0\.weight: \(4, 4\) in the model given, \(4, 5\)"):
        import_model(
            plain, tmp_path / "store", OPTIMIZER, build=lambda: torch.nn.Sequential(torch.nn.Linear(5, 4)), **SETTINGS
        )
    assert not (tmp_path / "store").exists()


def test_exports_that_cannot_be(llama_folder: Path, tmp_path: Path) -> None:
    import_directory(llama_folder, tmp_path / "store", OPTIMIZER, **SETTINGS)
    with pytest.raises(ConfigError, match="not empty"):
        export_store(tmp_path / "store", llama_folder)
    with pytest.raises(ConfigError, match="expected one of fp32, bf16, found 'int8'"):
        export_store(tmp_path / "store", tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(StoreMismatchError, match="give the configuration that the store was trained with"):
        export_store(tmp_path / "store", tmp_path / "out", config=tiny_gpt2().config)
    assert not (tmp_path / "out").exists()
    with ws.Engine(builder(tmp_path / "store"), tmp_path / "fresh", OPTIMIZER, **SETTINGS):
        pass
    with pytest.raises(StoreError, match="give one as config="):
        export_store(tmp_path / "fresh", tmp_path / "out")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_gguf(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        load_gguf(tmp_path / "text.gguf")
