"""In and out again: what from_pretrained loads after the way through a store is what went in, bit for bit."""

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.hub.conftest import SETTINGS, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weightstream as ws
from weightstream.hub import builder, export_store, import_directory, import_model

OPTIMIZER = ws.AdamW(lr=1e-2)
TOKENS = torch.arange(24).reshape(2, 12) % 96


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("shard", ["1GiB", "20KiB"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_directory_comes_back_as_it_was(model: Any, tmp_path: Path, shard: str, precision: str) -> None:
    settings = SETTINGS | {"precision": precision}
    model.save_pretrained(tmp_path / "source", max_shard_size="15KB" if shard == "20KiB" else "1GB")
    report = import_directory(tmp_path / "source", tmp_path / "store", OPTIMIZER, **settings)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    with ws.Store.open(tmp_path / "store", writable=False) as store:
        assert store.step == 0
        assert store.verify() == []
    result = export_store(tmp_path / "store", tmp_path / "out", max_shard_bytes=shard)
    assert (len(result["shards"]) > 1) == (shard == "20KiB")
    assert_same_weights(loaded(tmp_path / "out"), model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensors_that_are_cut_come_back_whole(model: Any, tmp_path: Path, precision: str) -> None:
    model.save_pretrained(tmp_path / "source")
    settings = SETTINGS | {"precision": precision}
    import_directory(tmp_path / "source", tmp_path / "store", OPTIMIZER, **settings, panel_elements=2048)
    import_directory(tmp_path / "source", tmp_path / "uncut", OPTIMIZER, **settings)
    with ws.Store.open(tmp_path / "store", writable=False) as store:
        assert any(p.rows is not None for unit in store.units for p in unit.parameters)
    for name in ("store", "uncut"):
        export_store(tmp_path / name, tmp_path / f"out-{name}", optimizer_state=True)
        assert_same_weights(loaded(tmp_path / f"out-{name}"), model)
    found, expected = (load_file(tmp_path / f"out-{name}" / "optimizer.safetensors") for name in ("store", "uncut"))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}


def test_a_model_in_memory_comes_back_as_it_was(model: Any, tmp_path: Path) -> None:
    import_model(model, tmp_path / "store", OPTIMIZER, **SETTINGS)
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), model)
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_bf16_export_rounds_each_weight_once(model: Any, tmp_path: Path) -> None:
    import_model(model, tmp_path / "store", OPTIMIZER, **SETTINGS)
    export_store(tmp_path / "store", tmp_path / "out", dtype="bf16")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert_same_weights(loaded(tmp_path / "out", torch.bfloat16), model.to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_trained_weights_and_optimizer_state_come_out(model: Any, tmp_path: Path) -> None:
    import_model(model, tmp_path / "store", OPTIMIZER, **SETTINGS)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    with ws.Engine(builder(tmp_path / "store"), tmp_path / "store", OPTIMIZER, **SETTINGS) as engine:
        first = engine.step([batch])
        with torch.no_grad():
            assert first.loss == pytest.approx(float(model(**batch).loss), rel=1e-6)
        engine.step([batch])
        with engine.module() as streamed:
            logits = streamed(TOKENS).logits
        held = dict(engine.store.items())
        export_store(tmp_path / "store", tmp_path / "out", optimizer_state=True)
    exported = loaded(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(exported(TOKENS).logits, logits)
    weights = dict(exported.named_parameters())
    with safe_open(tmp_path / "out" / "optimizer.safetensors", "pt") as file:
        assert json.loads(file.metadata()["step"]) == 2
        for name, parts in held.items():
            assert torch.equal(parts.pop("param"), weights[name])
            for part, state in parts.items():
                assert torch.equal(file.get_tensor(f"{part}/{name}"), state)


class Counting(Mapping[str, Tensor]):
    """Values made on demand; notes how many are alive at a time."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes, self.asked, self.alive, self.most = shapes, [], weakref.WeakSet(), 0

    def __getitem__(self, name: str) -> Tensor:
        value = torch.full(self.shapes[name], float(len(self.asked)))
        self.asked.append(name)
        self.alive.add(value)
        self.most = max(self.most, len(self.alive))
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_values_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    config = tiny_llama().config
    values = Counting({name: p.shape for name, p in tiny_llama().named_parameters()})
    with ws.Engine(lambda: type(tiny_llama())(config), tmp_path / "s", OPTIMIZER, initial=values, **SETTINGS) as engine:
        assert sorted(values.asked) == sorted(values.shapes)
        assert values.most == 1
        for name, parts in engine.store.items():
            assert parts["param"].unique().tolist() == [float(values.asked.index(name))]
            assert not parts["exp_avg"].any()


def test_what_is_not_given_begins_as_the_model_says(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return type(tiny_gpt2())(tiny_gpt2().config)

    given = {"transformer.wpe.weight": torch.ones(64, 32)}
    with ws.Engine(build, tmp_path / "fresh", OPTIMIZER, **SETTINGS) as fresh:
        expected = {name: parts["param"] for name, parts in fresh.store.items()} | given
    with ws.Engine(build, tmp_path / "given", OPTIMIZER, initial=given, **SETTINGS) as engine:
        found = {name: parts["param"] for name, parts in engine.store.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


class FromItsOwnNumbers(nn.Linear):
    """Its initialisation cannot be replayed."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.randn(4, 4).cumsum(0))


def test_an_initialisation_that_cannot_be_replayed_is_no_obstacle(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(FromItsOwnNumbers(4, 4, bias=False), nn.Linear(4, 4, bias=False))

    with pytest.raises(ws.errors.AuditError, match="replayed"):
        ws.Engine(build, tmp_path / "refused", OPTIMIZER, **SETTINGS)
    model = build()
    import_model(model, tmp_path / "store", OPTIMIZER, build=build, **SETTINGS)
    with ws.Engine(build, tmp_path / "store", OPTIMIZER, **SETTINGS) as engine:
        for name, parts in engine.store.items():
            assert torch.equal(parts["param"], dict(model.named_parameters())[name])


def test_names_that_transformers_has_changed_since(tmp_path: Path) -> None:
    """save_pretrained writes a ViT under the names that its checkpoints always had."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "source")
    import_directory(tmp_path / "source", tmp_path / "store", OPTIMIZER, **SETTINGS)
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_weights(ViTForImageClassification.from_pretrained(tmp_path / "out"), model)
