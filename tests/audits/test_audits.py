"""What would train silently wrong is refused: by name, with what to do, and with nothing changed on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.audits import models
from tests.audits.models import VOCABULARY, Model
from tests.parity.zoo import ZOO, MicroBatch
from torch import Tensor, nn
from transformers import DynamicCache

import weightstream as ws
from weightstream.errors import AuditError, NonFiniteError


@dataclass(frozen=True)
class Refusal:
    """A model that is refused at its first step: what its message must hold, all of it, in any order."""

    model: type[Model]
    words: tuple[str, ...]
    block_rules: Mapping[str, Any] = field(default_factory=dict)


REFUSALS = [
    # the parameter that is used where its block is not, and the module to call instead
    Refusal(
        models.SplitAttention,
        ("layers.0.attention.out_proj.weight", "block_rules"),
        {"layers.?": "split", "layers.?.attention": "split"},
    ),
    Refusal(models.HeadWeight, ("head.weight", "call the module")),
    Refusal(models.Neighbours, ("layers.2.norm.weight", "call the module")),
    Refusal(models.OutsideGradient, ("layers.1.norm.weight", "call the module")),
    # the block whose input changes, and the operation to use instead
    Refusal(models.InPlace, ("layers.0", "in place", "out-of-place")),
    Refusal(models.InPlaceMask, ("layers.0", "in place", "out-of-place")),
    Refusal(models.ChangedLater, ("in place", "out-of-place")),
    # the block that lets a tensor escape, and where it should go
    Refusal(models.KeptOnModule, ("layers.0", "outlives", "return it")),
    Refusal(models.KeptInList, ("layers.0", "outlives", "return it")),
    Refusal(models.MutableCache, ("layers.0", "Cache", "use_cache=False")),
    Refusal(models.ChangedBuffer, ("layers.0", "passes", "buffer")),
    Refusal(models.ReplacedBuffer, ("layers.0", "average", "buffer")),
    Refusal(models.NotScalar, ("micro-batch 0", "scalar")),
    Refusal(models.NoGradient, ("micro-batch 0", "scalar", "trained parameters")),
]


def tokens(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (2, 9 + index), generator=generator) for index in range(count)]


def open_engine(build: Callable[[], nn.Module], store: Path, **settings: Any) -> ws.Engine:
    return ws.Engine(build, store, ws.AdamW(lr=1e-2), **{"clip_norm": 1.0, "threads_per_worker": 1} | settings)


def loss_fn(model: nn.Module, micro_batch: Tensor) -> Tensor:
    return model(micro_batch)


def train(build: Callable[[], nn.Module], store: Path, steps: int, **settings: Any) -> tuple[int, str]:
    """The step and digest at which it ends."""
    with open_engine(build, store, **settings) as engine:
        for _ in range(steps):
            engine.step(tokens(), loss_fn)
    return step_and_digest(store)


def step_and_digest(store: Path) -> tuple[int, str]:
    reader = ws.Store.open(store, writable=False)
    try:
        assert reader.verify() == []
        return reader.step, reader.digest()
    finally:
        reader.close()


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.model.__name__)
def test_refused_by_name_with_what_to_do_and_nothing_changed(
    refusal: Refusal, activations: str, tmp_path: Path
) -> None:
    store, settings = tmp_path / "store", {"block_rules": dict(refusal.block_rules) or None, "activations": activations}
    before = train(lambda: refusal.model(bad=False), store, 2, **settings)
    with open_engine(lambda: refusal.model(bad=True), store, **settings) as engine:
        with pytest.raises(AuditError) as caught:
            engine.step(tokens(), loss_fn)
        assert engine.step_count == 2
    message = str(caught.value)
    missing = [word for word in refusal.words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert message.count("\n") < 20  # one screen
    assert step_and_digest(store) == before
    after = train(lambda: refusal.model(bad=False), store, 1, **settings)  # and it goes on as if nothing had been
    assert after == train(lambda: refusal.model(bad=False), tmp_path / "other", 3, **settings)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.BatchNorm, ("layers.0.statistics", "BatchNorm1d", "LayerNorm")),
        (models.Unreplayable, ("layers.0.up.weight", "div_", "torch.nn.init")),
    ],
)
def test_refused_before_a_store_is_made(model: type[Model], words: tuple[str, ...], tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(AuditError) as caught:
        open_engine(lambda: model(bad=True), store)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert not store.exists()


def test_a_first_step_that_is_refused_leaves_a_store_without_steps(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with open_engine(lambda: models.KeptOnModule(bad=True), store) as engine, pytest.raises(AuditError):
        engine.step(tokens(), loss_fn)
    assert step_and_digest(store)[0] == 0
    good = train(lambda: models.KeptOnModule(bad=False), store, 2)
    assert good == train(lambda: models.KeptOnModule(bad=False), tmp_path / "other", 2)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_engine_goes_on_after_a_loss_function_was_refused(clip_norm: float | None, tmp_path: Path) -> None:
    """Found between blocks, in the middle of a step: what was fetched, staged and started is given up."""

    def reads_the_head(model: nn.Module, micro_batch: Tensor) -> Tensor:
        return model(micro_batch) + model.head.weight.square().mean()

    def fails(model: nn.Module, micro_batch: Tensor) -> Tensor:
        model(micro_batch)
        raise ZeroDivisionError("the user's own")

    with open_engine(lambda: Model(bad=False), tmp_path / "store", clip_norm=clip_norm) as engine:
        engine.step(tokens(), loss_fn)
        with pytest.raises(AuditError, match=r"'head\.weight'.*call the module"):
            engine.step(tokens(), reads_the_head)
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            engine.step(tokens(), fails)
        assert engine.step_count == 1
        engine.step(tokens(), loss_fn)
        assert engine.step_count == 2
    expected = train(lambda: Model(bad=False), tmp_path / "other", 2, clip_norm=clip_norm)
    assert step_and_digest(tmp_path / "store") == expected


def test_too_many_steps_that_are_not_finite_name_the_block_and_keep_the_last_good_state(tmp_path: Path) -> None:
    store = tmp_path / "store"
    before = train(lambda: Model(bad=False), store, 2)
    with open_engine(lambda: Model(bad=False), store, max_skipped_steps=2) as engine:
        for _ in range(2):
            assert engine.step(tokens(), loss_fn, weights=[1.0, float("nan"), 1.0]).skipped
        with pytest.raises(NonFiniteError, match=r"block '\w.*max_skipped_steps"):
            engine.step(tokens(), loss_fn, weights=[1.0, float("nan"), 1.0])
    step, digest = step_and_digest(store)
    assert digest == before[1]
    assert step in (4, 5)  # data and step advance where a step is skipped


def test_a_cache_of_transformers_is_refused_where_a_loss_function_insists(tmp_path: Path) -> None:
    zoo = ZOO["llama"]

    def with_cache(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        return model(**micro_batch, use_cache=True, past_key_values=DynamicCache()).loss

    batch = zoo.micro_batches(2, ragged=False, step=1)
    with open_engine(zoo.build, tmp_path / "store") as engine:
        with pytest.raises(AuditError, match=r"(?s)model\.layers\.0.*DynamicCache.*use_cache=False"):
            engine.step(batch, with_cache)
        engine.step(batch, zoo.loss_fn)


class TestSideOutputs:
    """What transformers takes out of layers by hooks is an output of the block: its gradient arrives."""

    @staticmethod
    def gradients(engine: ws.Engine, step: Callable[[], object]) -> dict[str, Tensor]:
        """By the change that one step of plain gradient descent makes at learning rate 1."""
        before = {name: tensors["param"] for name, tensors in engine.store.items()}
        step()
        engine.commit()
        return {name: before[name] - tensors["param"] for name, tensors in engine.store.items()}

    def compare(self, name: str, loss: Callable[[nn.Module, MicroBatch], Tensor], store: Path, **settings: Any) -> None:
        zoo = ZOO[name]
        batch = zoo.micro_batches(2, ragged=True, step=1)
        plain = ws.SGD(lr=1.0, momentum=0.0, weight_decay=0.0)
        with ws.Engine(zoo.build, store, plain, threads_per_worker=1, **settings) as engine:
            resident = zoo.build().train()
            resident.load_state_dict({n: t["param"] for n, t in engine.store.items()}, strict=False)
            found = self.gradients(engine, lambda: engine.step(batch, loss, weights=[0.5, 0.5]))
        for micro_batch in batch:
            (loss(resident, micro_batch) * 0.5).backward()
        for parameter, tensor in resident.named_parameters():
            expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            torch.testing.assert_close(found[parameter], expected, rtol=1e-4, atol=1e-6, msg=parameter)

    @pytest.mark.parametrize("activations", ["recompute", "keep"])
    def test_the_load_balancing_loss_alone_trains_the_routers(self, activations: str, tmp_path: Path) -> None:
        zoo = ZOO["moe_router"]
        batch = zoo.micro_batches(2, ragged=True, step=1)

        def balance(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
            return 10.0 * model(**micro_batch).aux_loss

        self.compare("moe_router", balance, tmp_path / "store", activations=activations)
        with open_engine(zoo.build, tmp_path / "other", activations=activations) as engine:
            gate = engine.store.tensor("model.layers.2.mlp.gate.weight")
            engine.step(batch, balance)
            engine.commit()
            assert not torch.equal(engine.store.tensor("model.layers.2.mlp.gate.weight"), gate)

    def test_router_logits_asked_for_by_argument(self, tmp_path: Path) -> None:
        def loss(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
            output = model(**micro_batch, output_router_logits=True)
            assert len(output.router_logits) == 3
            return output.loss + sum(logits.square().mean() for logits in output.router_logits)

        self.compare("moe", loss, tmp_path / "store")

    @pytest.mark.parametrize("name", ["llama", "t5", "vit"])
    def test_hidden_states(self, name: str, tmp_path: Path) -> None:
        def loss(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
            output = model(**micro_batch, output_hidden_states=True)
            states = output.decoder_hidden_states if name == "t5" else output.hidden_states
            assert len(states) >= 4
            return output.loss + sum(state.square().mean() for state in states)

        self.compare(name, loss, tmp_path / "store")
