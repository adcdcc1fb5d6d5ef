"""The kernels of a micro-batch: matrix products against counts by hand, what is recomputed, blocks that are alike."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from weightstream.blocks import call_order, split
from weightstream.engine.steps import default_loss
from weightstream.errors import PlanError
from weightstream.prediction.census import Census, flops, take

SEQUENCES, LENGTH, VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS = 2, 16, 96, 32, 80, 4, 2
TOKENS = SEQUENCES * LENGTH


def llama(layers: int = 3) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def counted(model: nn.Module, **settings: Any) -> Census:
    blocks = split(model.train(), max_block_bytes=None, element_bytes=2, rules=None)
    called = {name for block in blocks if not block.resident for name in block.modules}
    visits = [name for _, name in call_order(model, blocks) if name in called]
    ids = torch.zeros((SEQUENCES, LENGTH), dtype=torch.long)
    return take(
        model, visits, default_loss, {"input_ids": ids, "labels": ids}, dtype=torch.bfloat16, **settings
    )  # fmt: skip


def test_products_of_a_llama_are_those_counted_by_hand() -> None:
    embedding, *layers, head = counted(llama()).visits
    head_width = WIDTH // HEADS
    attention = 2 * TOKENS * WIDTH * (2 * WIDTH + 2 * KEY_HEADS * head_width)  # query and output; key and value
    mlp = 3 * 2 * TOKENS * WIDTH * HIDDEN
    assert len(layers) == 3
    for layer in layers:
        assert flops(layer.forward) == attention + mlp
        assert flops(layer.backward) == 2 * (attention + mlp)  # of the input, and of the weight
        assert flops(layer.recompute) == attention + mlp - mlp // 3  # nothing is saved after the last product
        seen = [kernel for kernel in layer.forward if kernel.name == "attention"]
        assert [(kernel.product, kernel.layout) for kernel in seen] == [
            ((SEQUENCES * HEADS, LENGTH, LENGTH, head_width), "causal")
        ]
    logits = 2 * TOKENS * WIDTH * VOCABULARY
    assert (flops(head.forward), flops(head.backward)) == (logits, 2 * logits)
    assert flops(embedding.forward) == 0
    assert embedding.gradients == Counter(bfloat16=VOCABULARY * WIDTH)


def test_operands_are_told_apart() -> None:
    layer = counted(llama()).visits[1]
    forward = {kernel.layout for kernel in layer.forward if kernel.flops}
    backward = Counter(
        kernel.layout for kernel, count in layer.backward.items() for _ in range(count) if kernel.flops
    )  # fmt: skip
    assert forward == {"nt"}
    assert backward == {"nn": 7, "tn": 7}


def test_blocks_that_are_alike_count_as_they_would_alone() -> None:
    for one, other in zip(
        counted(llama(4)).visits, counted(llama(4), share_like=False).visits, strict=True
    ):  # fmt: skip
        assert one == other


def test_the_turn_has_the_loss_but_no_product_of_a_block() -> None:
    census = counted(llama())
    names = {kernel.name for kernel in census.turn}
    assert flops(census.turn) == 0
    assert {"nll_loss_backward", "_log_softmax_backward_data"} <= names


def test_tokens_make_products_grow_alone() -> None:
    """Twice the tokens: twice the products of a linear layer, the same number of kernels."""
    model = llama(1)
    counts = []
    for length in (LENGTH, 2 * LENGTH):
        ids = torch.zeros((SEQUENCES, length), dtype=torch.long)
        names = ["model.embed_tokens", "model.layers.0", "lm_head"]
        counts.append(
            take(model, names, default_loss, {"input_ids": ids, "labels": ids}, dtype=torch.bfloat16).visits[1]
        )
    assert flops(counts[1].forward) == 2 * flops(counts[0].forward)
    assert sum(counts[1].forward.values()) == sum(counts[0].forward.values())


def test_experts_whose_kernels_depend_on_values() -> None:
    """The loop over experts that were hit: it runs for real, and every token goes through its two."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    layer = counted(model).visits[1]
    attention = 2 * TOKENS * WIDTH * (2 * WIDTH + 2 * KEY_HEADS * (WIDTH // HEADS))
    router = 2 * TOKENS * WIDTH * 4
    experts = 2 * 3 * 2 * TOKENS * WIDTH * HIDDEN
    assert flops(layer.forward) == attention + router + experts


def test_the_model_is_left_as_it_was() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=HEADS, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    census = counted(model)
    assert flops(census.visits[-1].forward) == 2 * TOKENS * WIDTH * VOCABULARY
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == before
    assert not any("forward" in module.__dict__ for module in model.modules())


class Plain(nn.Module):
    """Two layers with something between them that belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))


def test_glue_counts_with_the_block_before_it_and_back_with_the_one_after() -> None:
    model = Plain()
    census = take(
        model, ["one", "other"], lambda model, x: model(x).float().sum(), torch.randn(3, 8).bfloat16(), dtype=torch.bfloat16
    )  # fmt: skip
    first, second = census.visits
    assert [kernel.name for kernel in first.forward if kernel.name == "tanh"] == ["tanh"]
    assert [kernel.name for kernel in second.backward if kernel.name == "tanh_backward"] == ["tanh_backward"]
    assert first.parameters == second.parameters == 2
    assert model.one.weight.dtype == torch.float32


def test_other_calls_than_planned_are_refused() -> None:
    with pytest.raises(PlanError, match="called block 'one', expected was other"):
        take(Plain(), ["other", "one"], lambda model, x: model(x).sum(), torch.randn(3, 8), dtype=torch.float32)
    with pytest.raises(PlanError, match="called 2 blocks, expected 3"):
        take(Plain(), ["one", "other", "one"], lambda model, x: model(x).sum(), torch.randn(3, 8), dtype=torch.float32)
