"""How models are split into blocks."""

import pytest
import torch
from torch import Tensor, nn

from weightstream.blocks import ROOT, Block, call_order, split
from weightstream.errors import ConfigError, PlanError


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.router = nn.Linear(width, 2)


class Model(nn.Module):
    def __init__(self, width: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def build(**settings: bool) -> Model:
    with torch.device("meta"):
        return Model(**settings)  # type: ignore[arg-type]


def by_name(blocks: tuple[Block, ...]) -> dict[str, tuple[str, ...]]:
    assert [block.index for block in blocks] == list(range(len(blocks)))
    return {block.name: block.modules for block in blocks}


def names(model: nn.Module, blocks: tuple[Block, ...]) -> list[str]:
    """All parameters, each of which must be in exactly one block, under its first name and with its shape."""
    found = [parameter.name for block in blocks for parameter in block.parameters]
    expected = dict(model.named_parameters())
    assert sorted(found) == sorted(expected)
    for block in blocks:
        for parameter in block.parameters:
            assert parameter.shape == tuple(expected[parameter.name].shape)
            assert parameter.trainable == expected[parameter.name].requires_grad
    return found


def test_layers_embeddings_and_head_are_blocks_and_the_rest_is_resident() -> None:
    model = build()
    blocks = split(model)
    names(model, blocks)
    assert list(by_name(blocks)) == [ROOT, "embedding", "layers.0", "layers.1", "head"]
    root = blocks[0]
    assert root.resident
    assert [parameter.name for parameter in root.parameters] == ["scale", "norm.weight", "norm.bias"]
    assert not any(block.resident for block in blocks[1:])
    order = [module for _, module in call_order(model, blocks)]
    assert order == ["embedding", "layers.0", "layers.1", "head"]


def test_tied_modules_share_a_block() -> None:
    model = build(tied=True)
    blocks = split(model)
    names(model, blocks)
    assert by_name(blocks)["embedding"] == ("embedding", "head")
    assert "head" not in by_name(blocks)
    assert [visit for visit in call_order(model, blocks) if visit[0] == 1] == [(1, "embedding"), (1, "head")]


def test_a_parameter_that_joins_two_blocks_joins_all_three() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    model["c"].weight, model["c"].bias = model["a"].weight, model["b"].bias
    blocks = split(model)
    names(model, blocks)
    assert by_name(blocks) == {"a": ("a", "b", "c"), "d": ("d",)}


def test_tied_to_a_resident_one_is_resident() -> None:
    model = build(tied=True)
    blocks = split(model, rules={"embedding": "resident"})
    names(model, blocks)
    assert [block.name for block in blocks if block.resident] == [ROOT]
    assert "head.weight" not in [p.name for block in blocks for p in block.parameters]
    assert "head" not in by_name(blocks)


def test_frozen_blocks() -> None:
    model = build()
    model.layers[0].requires_grad_(False)
    model.layers[1].attention.requires_grad_(False)  # type: ignore[union-attr,operator]
    blocks = split(model)
    names(model, blocks)
    assert [block.trainable for block in blocks] == [True, True, False, True, True]


class TestBound:
    """A layer of width 16 in fp32: attention 2 × 1,024 bytes, the two of the mlp about 4.2 KiB each."""

    def test_a_layer_above_it_is_split_into_children(self) -> None:
        model = build()
        blocks = split(model, max_block_bytes=8600)
        names(model, blocks)
        found = by_name(blocks)
        assert list(found) == [
            ROOT, "embedding", "layers.0.attention", "layers.0.mlp", "layers.0.router",
            "layers.1.attention", "layers.1.mlp", "layers.1.router", "head",
        ]  # fmt: skip
        assert found["layers.0.attention"] == (
            "layers.0.norm",
            "layers.0.attention",
        )  # leftovers join, in order of call
        assert sum(p.numel for p in blocks[3].parameters) * 4 <= 8600

    def test_small_leaves_of_a_split_layer_are_leftovers(self) -> None:
        model = build()
        found = by_name(split(model, max_block_bytes=8704))
        assert found["layers.0.attention"] == ("layers.0.norm", "layers.0.attention", "layers.0.router")

    def test_deeper(self) -> None:
        model = build()
        blocks = split(model, max_block_bytes=1024)
        names(model, blocks)
        found = by_name(blocks)
        assert {"layers.1.attention.query", "layers.1.attention.out", "layers.1.mlp.0", "layers.1.mlp.2"} <= set(found)
        assert found["layers.1.attention.query"][0] == "layers.1.norm"

    def test_a_leaf_is_never_cut(self) -> None:
        assert by_name(split(build(), max_block_bytes=1))["embedding"] == ("embedding",)

    def test_bytes_of_the_streamed_dtype_count(self) -> None:
        assert list(by_name(split(build(), max_block_bytes=6000, element_bytes=2))) == list(
            by_name(split(build(), max_block_bytes=12000))
        )

    def test_bare_parameters_of_a_split_layer_are_resident(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gain = nn.Parameter(torch.ones(4))
                self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        model = nn.Sequential(Scaled(), Scaled())
        blocks = split(model, max_block_bytes=20_000)
        names(model, blocks)
        assert [parameter.name for parameter in blocks[0].parameters] == ["0.gain", "1.gain"]
        assert blocks[0].resident


class TestRules:
    def test_block(self) -> None:
        model = build()
        blocks = split(model, max_block_bytes=1024, rules={"layers.*.mlp": "block"})
        names(model, blocks)
        assert by_name(blocks)["layers.0.mlp"] == ("layers.0.mlp",)

    def test_split(self) -> None:
        model = build()
        found = by_name(split(model, rules={"layers.1": "split"}))
        assert {"layers.0", "layers.1.attention", "layers.1.mlp"} <= set(found)

    def test_resident(self) -> None:
        model = build()
        blocks = split(model, rules={"head": "resident"})
        names(model, blocks)
        assert "head.weight" in [parameter.name for parameter in blocks[0].parameters]
        assert "head" not in [module for _, module in call_order(model, blocks)]

    def test_the_first_match_wins(self) -> None:
        found = by_name(split(build(), rules={"layers.0": "split", "layers.?": "block"}))
        assert {"layers.0.mlp", "layers.1"} <= set(found)

    def test_one_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'layer\.\*'.*matches no module"):
            split(build(), rules={"head": "block", "layer.*": "block"})

    def test_the_whole_model_as_one_block(self) -> None:
        model = build()
        (block,) = split(model, rules={"": "block"})
        assert block.modules == ("",)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(PlanError, match="Identity has no parameter"):
        split(nn.Identity())


def test_parameters_that_are_no_floating_point_are_refused() -> None:
    model = nn.Module()
    model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    with pytest.raises(PlanError, match=r"'codes' is torch\.int64"):
        split(model)


def test_the_same_module_twice_is_one() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    blocks = split(model)
    names(model, blocks)
    assert len(blocks) == 1
    x: Tensor = torch.ones(1, 4)
    assert model(x).shape == (1, 4)
