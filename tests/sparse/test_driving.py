"""Unmodified models of transformers, with linear layers that multiply by non-zeros only."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightstream.errors import AuditError, ConfigError
from weightstream.sparse.driving import Watch, drivable, drive
from weightstream.sparse.kernels import Kernel
from weightstream.sparse.structure import Structure

TOKENS = torch.arange(60).view(3, 20) * 7 % 61


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def masked(model: nn.Module, block: tuple[int, int]) -> dict[str, Structure]:
    """The model's layers lose most blocks of all their weights; the head keeps its own."""
    generator = torch.Generator().manual_seed(3)
    structures = {}
    for name, module in drivable(model).items():
        if name.startswith("lm_head"):
            continue
        grid = (module.out_features // block[0], module.in_features // block[1])
        structures[name] = Structure(torch.rand(grid, generator=generator) < 0.3, block)
        module.weight.data.mul_(structures[name].mask())
    return structures


def driven(model: nn.Module, structures: dict[str, Structure], kernel: Kernel) -> list[Callable[[], None]]:
    undo = []
    for name, structure in structures.items():
        module = drivable(model)[name]
        module.weight = nn.Parameter(module.weight.detach()[structure.mask()].view(-1, 1))
        undo.append(drive(module, structure, kernel))
    return undo


def results(model: nn.Module, structures: dict[str, Structure]) -> dict[str, Tensor]:
    """Logits and all gradients, those of sparse weights at non-zeros."""
    output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    found = {"logits": output.logits.detach().double()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.double()
        if name in structures:
            grad = grad[structures[name].mask()] if grad.shape == structures[name].shape else grad.view(-1)
        found[name] = grad
    return found


@pytest.mark.parametrize(
    ("kernel", "block", "dtype"),
    [
        ("gathered", (8, 16), torch.float32), ("gathered", (16, 16), torch.bfloat16), ("csr", (1, 1), torch.float32),
        ("bsr", (16, 16), torch.float32),
    ],
)  # fmt: skip
def test_llama_is_as_near_to_exact_as_when_it_is_multiplied_densely(
    kernel: Kernel, block: tuple[int, int], dtype: torch.dtype
) -> None:
    """Errors against fp64 are at most four times those of the masked dense model of the same dtype."""
    dense = llama().to(dtype)
    structures = masked(dense, block)
    assert len(structures) == 14
    exact, sparse = copy.deepcopy(dense).double(), copy.deepcopy(dense)
    driven(sparse, structures, kernel)
    sparse_results, dense_results = results(sparse, structures), results(dense, structures)
    for name, true in results(exact, structures).items():
        scale = float(true.abs().max()) * torch.finfo(dtype).eps
        most = 4 * float((dense_results[name] - true).abs().max()) + scale
        assert float((sparse_results[name] - true).abs().max()) <= most, name


def test_undone_it_is_the_module_it_was() -> None:
    model = llama()
    structures = masked(model, (16, 16))
    before = model(input_ids=TOKENS).logits
    weights = {name: module.weight for name, module in drivable(model).items()}
    undo = driven(model, structures, "gathered")
    assert not set(structures) & set(drivable(model))  # what is driven is not offered again
    for one in undo:
        one()
    for name, module in drivable(model).items():
        module.weight = weights[name]
    assert set(structures) < set(drivable(model))
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_what_is_not_drivable() -> None:
    """Conv1D is no linear layer, a tied head has the embedding's weight, and own forwards are not known."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Kept(nn.Linear):
        pass

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    assert drivable(gpt2) == {}
    assert "lm_head.weight" in drivable(llama())
    assert "lm_head.weight" not in drivable(llama(tie_word_embeddings=True))
    assert list(drivable(nn.Sequential(Own(2, 2), Kept(2, 2)))) == ["1.weight"]


def test_a_product_that_bypasses_the_module_is_found() -> None:
    class Around(nn.Module):
        def __init__(self, around: Callable[[nn.Linear, Tensor], Tensor]) -> None:
            super().__init__()
            self.layer, self.around = nn.Linear(4, 4), around

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype)) + self.around(self.layer, x)

    def run(around: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        model = Around(around)
        driven(model, {"layer.weight": Structure(torch.eye(2, dtype=torch.bool), (2, 2))}, "gathered")
        with Watch({"layer.weight": model.layer.weight}):
            model(torch.ones(3, 4)).sum().backward()

    run(lambda layer, x: layer(x))
    with pytest.raises(AuditError, match="'layer.weight' is sparse .* uses it in 'norm'.*densely"):
        run(lambda layer, x: layer.weight.norm())
    with pytest.raises(AuditError, match="'linear'"):
        run(lambda layer, x: nn.functional.linear(x, layer.weight))
    with pytest.raises(AuditError, match="layer.weight"):
        run(lambda layer, x: x.mean() * layer.weight.shape[0])


def test_another_layers_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear layer of 4×2: the mask is one of 2×4"):
        drive(nn.Linear(2, 4), Structure(torch.ones(1, 2, dtype=torch.bool), (2, 2)), "gathered")
