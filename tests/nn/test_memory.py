"""Memory of experts is bounded and what is said of them is so: gradients, lookups, layers that a block calls repeatedly."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.plain_experts import PlainExperts, PlainTraining
from tests.nn.test_experts import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    WIDTH,
    Layer,
    Model,
    engine,
    loss_fn,
    name_in_store,
    same_as,
    streamed,
    text,
)
from tests.nn.test_pool import LAYERS, pooled
from torch import Tensor

from weightstream.errors import PlanError
from weightstream.experts.reaching import Reached
from weightstream.fabric.packed import Gradients
from weightstream.families.touching import Touching
from weightstream.nn import HashRouter, ProductKeyRouter, StreamedExperts
from weightstream.schedule.reduction import partial_sums

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_take_as_much_however_many_micro_batches_reach_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, most, in_all, left, every = 2, Counter[int](), Counter[int](), list[int](), dict[int, Gradients]()
    predicted = {}
    add, collect = Gradients.add, Touching.collect

    def watched(held: Gradients, *given: Any) -> None:
        add(held, *given)
        every[id(held)] = held
        most[count] = max(most[count], held.nbytes)
        in_all[count] = max(in_all[count], sum(each.nbytes for each in every.values()))

    def closing(touching: Touching) -> None:
        left.append(sum(family.gradient_bytes for family in touching.families.values()))
        collect(touching)

    monkeypatch.setattr(Gradients, "add", watched)
    monkeypatch.setattr(Touching, "collect", closing)
    with engine(tmp_path / "store", reduction_groups=groups) as trained:
        for count in (1, 8, 32):
            facts = trained.step([text(0)[0]] * count, loss_fn).experts
            sums = partial_sums(count, groups)
            planned = [each.gradients_at_most(sums) for each in trained.growing.layers.values()]
            assert most[count] < in_all[count] <= sum(filter(None, planned))
            reached = {name: Reached(found.touched, 0, found.touched) for name, found in facts.items()}
            with_gradients, without = (trained.experts.held_bytes(reached, 1, each, sums) for each in (count, 0))
            predicted[count] = with_gradients - without
            assert in_all[count] <= predicted[count]
    assert predicted[1] < predicted[8] == predicted[32]
    one = [facts[name].touched * (8 + 4 * 2 * WIDTH * HIDDEN) for name in LAYERS]
    assert left == [sum(one)] * 3
    assert most[1] == max(one)
    assert most[8] == most[32] == (partial_sums(32, groups) + 1) * max(one)


class Twice(Layer):
    """A block that calls its layer twice, the second time with fewer tokens."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = super().forward(x, ids)
        found: Tensor = x.index_add(1, torch.arange(3), self.experts(self.norm(x[:, 2:5]), ids[:, 2:5]))
        return found


class TwiceModel(Model):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.layers[1] = Twice(make(1))


def hashed(index: int) -> StreamedExperts:
    return StreamedExperts(WIDTH, HIDDEN, EXPERTS, TOP_K, HashRouter(tokens=2, seed=index))


def reached_by(step: list[dict[str, Tensor]], index: int) -> Tensor:
    """By hand: what a step's tokens lead to in one layer, an assignment each."""
    router, found = HashRouter(tokens=2, seed=index), []
    for ids in (batch["input_ids"] for batch in step):
        for given in (ids,) if index == 0 else (ids, ids[:, 2:5]):
            found.append(router.beforehand(given, EXPERTS, TOP_K).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("activations", ["auto", "recompute"])
def test_a_layer_that_a_block_calls_twice_is_counted_twice(activations: str, tmp_path: Path) -> None:
    """Facts are those of both calls, once each, also where the block is computed again; and training is plain PyTorch's."""

    with engine(tmp_path / "store", lambda: TwiceModel(hashed), activations=activations) as trained:
        values = {name: tensors["param"] for name, tensors in trained.store.items()}

        def resident(index: int) -> PlainExperts:
            packed = [
                torch.stack([values[f"layers.{index}.experts.{number}.{short}"] for number in range(EXPERTS)])
                for short in ("w_in", "w_out")
            ]
            router = HashRouter(tokens=2, seed=index)
            return PlainExperts(*packed, lambda hidden, ids: router(hidden, ids, EXPERTS, TOP_K))

        plain = TwiceModel(resident)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(values[name_in_store(name)])
        reference = PlainTraining(plain, name_in_store, lr=1e-2, clip_norm=0.5, groups=2, dense=())
        for step in range(3):
            result = trained.step(text(step), loss_fn)
            assert (result.loss, result.grad_norm) == reference.step(text(step))
            for index, name in enumerate(LAYERS):
                numbers, counts = reached_by(text(step), index).unique(return_counts=True)
                facts = result.experts[name]
                assert (facts.touched, facts.assignments) == (numbers.numel(), int(counts.sum()))
                assert (facts.most, facts.calls) == (int(counts.max()), 1 + index)
        same_as(reference, trained)


def test_what_a_block_keeps_of_its_layers_is_measured(tmp_path: Path) -> None:
    """By hand, of each call: hidden states, gates, what the activation was given, outputs, and which rows go where."""
    batch = text(0)[2]
    rows = torch.tensor([batch["input_ids"].numel(), batch["input_ids"][:, 2:5].numel()])
    reached = [len(reached_by([{"input_ids": batch["input_ids"]}], index).unique()) for index in range(2)]
    kept = 4 * rows * (WIDTH + TOP_K * (1 + HIDDEN + WIDTH)) + 8 * 2 * TOP_K * rows
    norm = 4 * rows * (WIDTH + 2)
    with engine(tmp_path / "store", lambda: TwiceModel(hashed)) as trained:
        trained.rehearse(batch, loss_fn)
        _, first, second, _ = (nbytes for _, nbytes in sorted(trained.worker.measured.kept_bytes.items()))
    assert first == kept[0] + norm[0] + 8 * 2 * reached[0]
    assert second >= kept.sum() + norm.sum() + 8 * 2 * reached[1]


def test_what_a_step_could_add_counts_every_call_of_a_block(tmp_path: Path) -> None:
    """Of a learned router: tokens times calls, which the step before has shown; a process that goes on knows it, too."""

    def build() -> Model:
        return TwiceModel(lambda index: StreamedExperts(WIDTH, HIDDEN, 11**3, 3, ProductKeyRouter(WIDTH, 11**3, 3)))

    tokens = sum(batch["input_ids"].numel() for batch in text(0))
    limit = 2 * 3 * tokens  # what the first step could add, as far as is known
    with pooled(tmp_path / "store", limit, "refuse", build) as trained:
        trained.step(text(0), loss_fn)
        refused = pytest.raises(PlanError, match=f"of {tokens} tokens may add {3 * 3 * tokens} experts")
        with refused:
            trained.step(text(1), loss_fn)
    with pooled(tmp_path / "store", limit, "refuse", build) as trained, refused:
        trained.step(text(1), loss_fn)


def test_looking_for_long_through_a_full_pool_keeps_few_answers(tmp_path: Path) -> None:
    """Each text leads to other experts than exist; the answers to what is reached instead are as many as records fit."""

    def losses(experts_memory: str) -> list[float]:
        with pooled(tmp_path / "store", 50, model=lambda: streamed(("frozen", "frozen"), 10**9),
                    experts_memory=experts_memory) as trained:  # fmt: skip
            for step in range(trained.step_count, 3):
                trained.step(text(step, count=1), loss_fn)
            families = trained.experts.touching.families
            found, most = [], 0
            with trained.module() as model:
                for _ in range(2):
                    for step in range(10, 25):
                        found.append(float(loss_fn(model, text(step, count=1)[0])))
                        most = max(most, *(families[name].looked_up for name in LAYERS))
            capacity = families[LAYERS[0]].capacity
            assert 0 < most <= capacity
            if experts_memory != "64MiB":
                assert capacity < 15 * 2 * 5  # there are more answers than that
            assert not any(families[name].looked_up for name in LAYERS)
            return found

    assert losses("64MiB") == losses("1400KiB")
