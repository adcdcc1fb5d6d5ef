"""The resident reference judged by itself and by PyTorch, before anything is judged by it."""

import ast
import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from tests.parity import reference
from tests.parity.pairwise import pairwise
from tests.parity.reference import ContractTrainer, OptimizerSettings, OrdinaryTrainer, square_sum, tree_sum
from tests.parity.zoo import ZOO, ZooModel
from torch import Tensor, nn

STEPS = 10
SGD = OptimizerSettings(optimizer=torch.optim.SGD, lr=0.05, arguments={"momentum": 0.9})


def initial_values(zoo: ZooModel) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: parameter.detach().clone() for name, parameter in zoo.build().named_parameters()}


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Euclidean, over all tensors together, in fp64."""
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True)))


def test_the_reference_imports_nothing_of_weightstream() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported
    assert {name.split(".")[0] for name in imported} <= {
        "collections", "dataclasses", "hashlib", "math", "numpy", "random", "torch", "typing",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "vit", "moe_router"])
@pytest.mark.parametrize("settings", [OptimizerSettings(), SGD], ids=["adamw", "sgd"])
def test_with_one_group_and_no_clipping_it_is_plain_torch_bit_for_bit(name: str, settings: OptimizerSettings) -> None:
    zoo = ZOO[name].with_(dropout=0.1, frozen=True)
    initial = initial_values(zoo)
    contract = ContractTrainer(zoo.build, initial, settings, reduction_groups=1)
    plain = OrdinaryTrainer(zoo.build, initial, settings, fused=True)
    for step in range(1, STEPS + 1):
        micro_batches = zoo.micro_batches(3, ragged=True, step=step)
        weights = zoo.token_shares(micro_batches)
        contract.step(micro_batches, zoo.loss_fn, weights)
        plain.step(micro_batches, zoo.loss_fn, weights)
    expected = plain.items()
    for parameter, tensors in contract.items().items():
        assert tensors.keys() == expected[parameter].keys()
        for part, tensor in tensors.items():
            assert torch.equal(tensor, expected[parameter][part]), (parameter, part)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_ordinary_loop_differs_by_rounding_only(name: str, clip_norm: float | None) -> None:
    """The second reference, within a stated bound after ten steps of nine ragged micro-batches with dropout.

    What differs is named at `OrdinaryTrainer`; all are roundings of fp32, 6e-8 each. Losses and norms stay within
    1e-6, moments within 2e-6 (relative, Euclidean over all of them), and the parameters are within 1e-4 of the
    distance that training moved them: Adam divides by the root of the second moment, so where a gradient nearly cancels
    its rounding counts in full. Measured: 9e-8, 2e-7, 4e-7 and 3e-5 (ViT; the others below 1e-5).
    """
    zoo, settings = ZOO[name].with_(dropout=0.1), OptimizerSettings()
    initial = initial_values(zoo)
    contract = ContractTrainer(zoo.build, initial, settings, clip_norm=clip_norm, calls=zoo.calls)
    ordinary = OrdinaryTrainer(zoo.build, initial, settings, clip_norm=clip_norm)
    for step in range(1, STEPS + 1):
        micro_batches = zoo.micro_batches(9, ragged=True, step=step)
        weights = zoo.token_shares(micro_batches)
        found = contract.step(micro_batches, zoo.loss_fn, weights)
        expected = ordinary.step(micro_batches, zoo.loss_fn, weights)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    found_items, expected_items = contract.items(), ordinary.items()
    for part in ("exp_avg", "exp_avg_sq"):
        mine = [tensors[part] for tensors in found_items.values()]
        other = [tensors[part] for tensors in expected_items.values()]
        assert distance(mine, other) <= 2e-6 * distance(other, [torch.zeros_like(tensor) for tensor in other]), part
    mine = [tensors["param"] for tensors in found_items.values()]
    other = [tensors["param"] for tensors in expected_items.values()]
    assert distance(mine, other) <= 1e-4 * distance(other, list(initial.values()))


@pytest.mark.parametrize("name", ["gpt2", "t5", "skip"])
def test_untying_keeps_values_and_splits_gradients(name: str) -> None:
    zoo = ZOO[name]
    initial = initial_values(zoo)
    tied = ContractTrainer(zoo.build, initial, OptimizerSettings())
    untied = ContractTrainer(zoo.build, initial, OptimizerSettings(), calls=zoo.calls)
    (micro_batch,) = zoo.micro_batches(1, ragged=False, step=1)
    _, expected = tied._gradients([micro_batch], zoo.loss_fn, [1.0])
    _, found = untied._gradients([micro_batch], zoo.loss_fn, [1.0])
    assert any(len(aliases) > 1 for aliases in untied.untied._aliases.values())
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter])


class TwoPlaces(nn.Module):
    """A parameter used by three calls, each with a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)

    def forward(self, factors: list[float]) -> Tensor:
        return sum((self.scale(torch.tensor([[factor]])) for factor in factors), start=torch.zeros(1, 1)).sum()


def test_sums_run_over_micro_batches_first_and_over_uses_last() -> None:
    # In fp32 1e8 + 4 + 4 loses both fours, while 4 + 4 + 1e8 keeps them: the order shows.
    initial = {"scale.weight": torch.ones(1, 1)}
    big, small = 1e8, 4.0
    trainer = ContractTrainer(TwoPlaces, initial, OptimizerSettings(), reduction_groups=1, calls=("scale",))
    micro_batches = [[big, small, -big], [big, small, -big]]
    _, gradients = trainer._gradients(micro_batches, lambda model, mb: model(mb), [1.0, 1.0])
    uses = [torch.tensor(2 * big), torch.tensor(2 * small), torch.tensor(-2 * big)]
    assert gradients["scale.weight"].item() == ((uses[0] + uses[1]) + uses[2]).item() == 0.0
    native = ContractTrainer(TwoPlaces, initial, OptimizerSettings(), reduction_groups=1)
    _, gradients = native._gradients([[small, small, big]], lambda model, mb: model(mb), [1.0])
    assert gradients["scale.weight"].item() == 100_000_008.0 or gradients["scale.weight"].item() == 1e8


def test_the_tree_pairs_halves_and_skips_what_is_empty() -> None:
    one, big = torch.tensor(1.0), torch.tensor(2.0**24)
    assert tree_sum([big, one, one, None]).item() == 2.0**24 + 0  # (big + 1) + 1
    assert tree_sum([big, None, one, one]).item() == 2.0**24 + 2  # big + (1 + 1)
    assert tree_sum([None, None, None]) is None
    assert tree_sum([None, None, one]) is one


def test_a_gradient_beyond_one_piece_is_summed_in_double_precision() -> None:
    gradient = torch.full((300, 300), 1e-3)
    assert square_sum(gradient) == pytest.approx(90_000 * float(torch.tensor(1e-3)) ** 2, rel=1e-14)


def test_a_step_that_is_not_finite_changes_nothing_but_the_step() -> None:
    zoo = ZOO["llama"]
    initial = initial_values(zoo)
    trainer = ContractTrainer(zoo.build, initial, OptimizerSettings(), clip_norm=1.0)
    micro_batches = zoo.micro_batches(2, ragged=False, step=1)
    outcome = trainer.step(micro_batches, zoo.loss_fn, [math.inf, 0.5])
    assert outcome.skipped
    assert not math.isfinite(outcome.grad_norm)
    assert trainer.step_count == 1
    assert all(torch.equal(tensors["param"], initial[name]) for name, tensors in trainer.items().items())
    assert not trainer.step(micro_batches, zoo.loss_fn, [0.5, 0.5]).skipped


def test_every_two_values_meet() -> None:
    factors = {"a": [0, 1, 2], "b": ["x", "y"], "c": [True, False], "d": [1, 2, 3, 4]}
    cases = pairwise(factors)
    for left, right in combinations(factors, 2):
        met = {(case[left], case[right]) for case in cases}
        assert met == set(product(factors[left], factors[right]))
    assert len(cases) <= 16  # the two largest factors need 12
