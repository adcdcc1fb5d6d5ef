"""Layers of experts out of a store, against plain PyTorch with all experts resident."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests.nn.plain_experts import PlainExperts, PlainTraining, Route
from torch import Tensor, nn

import weightstream as ws
from weightstream.errors import ConfigError, PlanError, StoreMismatchError
from weightstream.nn import HashRouter, ProductKeyRouter, StreamedExperts

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, HIDDEN, EXPERTS, TOP_K = 32, 32, 20, 64, 2


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.experts(self.norm(x), ids)


class Model(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(make(index)) for index in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


UNTOUCHED: tuple[Literal["frozen", "dense"], ...] = ("frozen", "dense")  # of layers 0 and 1


def streamed(untouched: tuple[Literal["frozen", "dense"], ...] = UNTOUCHED, experts: int = EXPERTS) -> Model:
    return Model(
        lambda index: StreamedExperts(
            WIDTH, HIDDEN, experts, TOP_K, HashRouter(tokens=2, seed=index), untouched=untouched[index]
        )
    )


def text(step: int, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    found = [torch.randint(0, VOCABULARY, (2, 5 + index), generator=generator) for index in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], batch["labels"])  # type: ignore[no-any-return]


def engine(path: Path, model: Any = streamed, **settings: Any) -> ws.Engine:
    settings = {
        "clip_norm": 0.5, "reduction_groups": 2, "host_memory": "64MiB", "device_memory": "64MiB",
        "experts_memory": "16MiB",
    } | settings  # fmt: skip
    return ws.Engine(model, path, ws.AdamW(lr=1e-2, weight_decay=0.1), **settings)


def name_in_store(name: str) -> str:
    """`layers.0.experts.w_in.5` of the plain model is record 5's `layers.0.experts.5.w_in`."""
    *layer, short, number = name.split(".")
    return ".".join([*layer, number, short]) if short in ("w_in", "w_out") else name


def plain(values: dict[str, Tensor], gate: Callable[[int, Tensor], Tensor] = lambda index, numbers: numbers) -> Model:
    """The plain model with a new store's values; `gate` may send a layer's tokens elsewhere."""
    routes: list[Route] = []
    for index in range(2):

        def route(hidden: Tensor, ids: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            numbers, gates = HashRouter(tokens=2, seed=index)(hidden, ids, EXPERTS, TOP_K)
            return gate(index, numbers), gates

        routes.append(route)

    def make(index: int) -> nn.Module:
        own = [
            torch.stack([values[f"layers.{index}.experts.{number}.{short}"] for number in range(EXPERTS)])
            for short in ("w_in", "w_out")
        ]
        return PlainExperts(*own, routes[index])

    model = Model(make)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name_in_store(name)])
    return model


def same_as(reference: PlainTraining, trained: ws.Engine) -> None:
    for name, tensors in trained.store.items():
        own = reference.named[name]
        assert torch.equal(tensors["param"], own), name
        state = reference.optimizer.state.get(own) or dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(own))
        assert torch.equal(tensors["exp_avg"], state["exp_avg"]), name
        assert torch.equal(tensors["exp_avg_sq"], state["exp_avg_sq"]), name


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_training_is_that_of_plain_pytorch(tmp_path: Path, clip_norm: float | None) -> None:
    with engine(tmp_path / "store", clip_norm=clip_norm) as trained:
        values = {name: tensors["param"] for name, tensors in trained.store.items()}
        reference = PlainTraining(
            plain(values), name_in_store, lr=1e-2, clip_norm=clip_norm, groups=2, dense=("layers.1.experts.",)
        )
        for step in range(3):
            loss, norm = reference.step(text(step))
            result = trained.step(text(step), loss_fn)
            assert (result.loss, result.grad_norm) == (loss, norm)
        trained.make_up_experts()
        same_as(reference, trained)


class KilledError(Exception):
    """Stands for the end of a process in the middle of a step."""


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path, clip_norm: float | None) -> None:
    def loss_or_end(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = loss_fn(model, batch)
        if batch["input_ids"].shape[1] == 7:  # the last micro-batch
            raise KilledError
        return loss

    digests = []
    for ends in ((), (1, 2)):
        path = tmp_path / f"{len(ends)}"
        for end in (*ends, 3):
            trained = engine(path, clip_norm=clip_norm)
            while trained.step_count < end:
                trained.step(text(trained.step_count), loss_fn)
            if end in ends:
                with pytest.raises(KilledError):
                    trained.step(text(trained.step_count), loss_or_end)
                trained.abandon()
        digests.append(trained.store.digest())
        assert not trained.store.verify()
        trained.close()
    assert digests[0] == digests[1]


def test_a_step_that_failed_may_be_tried_again(tmp_path: Path) -> None:
    digests = []
    for failing in (False, True):
        with engine(tmp_path / f"{failing}") as trained:
            for step in range(2):
                if failing:
                    with pytest.raises(ZeroDivisionError):
                        trained.step(text(step), lambda model, batch: loss_fn(model, batch) / (1 // 0))
                trained.step(text(step), loss_fn)
            digests.append(trained.store.digest())
    assert digests[0] == digests[1]


def test_what_does_not_count_leaves_no_trace(tmp_path: Path) -> None:
    with engine(tmp_path / "store", max_skipped_steps=3) as trained:
        trained.step(text(0), loss_fn)
        before = trained.store.digest()
        skipped = trained.step(text(1), lambda model, batch: loss_fn(model, batch) * float("inf"))
        trained.rehearse(text(2)[0], loss_fn)
        assert skipped.skipped
        assert trained.store.digest() == before


def test_a_family_of_four_billion_is_opened_and_trained(tmp_path: Path) -> None:
    many = 256**4
    with engine(tmp_path / "store", lambda: streamed(experts=many), precision="bf16") as trained:
        batches = text(0, count=2)
        losses = [trained.step(batches, loss_fn).loss for _ in range(2)]
        facts = trained.step(batches, loss_fn).experts["layers.1.experts"]
        assert losses[-1] < losses[0]
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        assert facts.assignments == TOP_K * tokens
        assert 0 < facts.touched <= TOP_K * tokens
        assert facts.new == 0
        info = trained.store.info()
        assert info["families"][0]["records"] == many
        with trained.module() as model, torch.no_grad():
            looked = model(batches[0]["input_ids"], batches[0]["labels"])
        assert torch.isfinite(looked)
        digest = trained.store.digest()
    with engine(tmp_path / "store", lambda: streamed(experts=many), precision="bf16") as again:
        assert again.store.digest() == digest


def test_looking_reaches_more_than_fits_at_once(tmp_path: Path) -> None:
    """Looking at more experts than there is memory for, with those that are there among the wanted ones."""
    with engine(tmp_path / "store") as trained:
        trained.step(text(0), loss_fn)
        with trained.module() as model:
            expected = [model(batch["input_ids"], batch["labels"]) for batch in text(1)]
    with engine(tmp_path / "store", experts_memory="1400KiB") as trained, trained.module() as model:
        for _ in range(2):
            assert [model(batch["input_ids"], batch["labels"]) for batch in text(1)] == expected


def test_product_keys_learn_and_choose_the_best(tmp_path: Path) -> None:
    def build() -> Model:
        return Model(lambda index: StreamedExperts(WIDTH, HIDDEN, 7**3, 3, ProductKeyRouter(WIDTH, 7**3, 3)))

    with engine(tmp_path / "store", build) as trained:
        before = trained.store.tensor("layers.0.experts.router.keys")
        losses = [trained.step(text(0), loss_fn).loss for _ in range(5)]
        assert losses[-1] < losses[0]
        assert not torch.equal(trained.store.tensor("layers.0.experts.router.keys"), before)


def test_what_a_layer_cannot_do_is_refused_with_figures(tmp_path: Path) -> None:
    class Bare(nn.Module):
        """A layer in no block that streams: nothing beside it has parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.experts = StreamedExperts(WIDTH, HIDDEN, EXPERTS, TOP_K, HashRouter())

    with pytest.raises(ConfigError, match=r"layer 'experts' \(StreamedExperts\) is in no block that streams"):
        engine(tmp_path / "bare", Bare)
    with pytest.raises(PlanError, match="one record takes .* give more"):
        engine(tmp_path / "small", experts_memory="16KiB")
    few = pytest.raises(
        PlanError, match=r"the step reaches \d+ experts, there is memory for .* give .* \(experts_memory\)"
    )
    with engine(tmp_path / "store", experts_memory="500KiB") as trained, few:
        trained.step(text(0), loss_fn)
    with pytest.raises(StoreMismatchError, match="experts"):
        engine(tmp_path / "store", lambda: streamed(("dense", "dense")))


def test_a_router_that_sends_all_tokens_to_one_expert_is_reported(tmp_path: Path) -> None:
    said: list[str] = []

    def build() -> Model:
        return Model(lambda index: StreamedExperts(WIDTH, HIDDEN, EXPERTS, 1, HashRouter()))

    ids = torch.zeros(4, 32, dtype=torch.int64)
    with engine(tmp_path / "store", build, log=said.append) as trained:
        for _ in range(2):
            result = trained.step([{"input_ids": ids, "labels": ids}], loss_fn)
    assert result.experts["layers.0.experts"].touched == 2
    warned = [text for text in said if "one expert of 64 got 124 of 128 assignments, the step reached 2" in text]
    assert len(warned) == 2  # once for each layer


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shift", [1, -1])
def test_a_router_cannot_reach_what_is_not_of_its_layer(shift: int, known: bool, tmp_path: Path) -> None:
    """Beyond its experts lie those of the next layer, and before them the blocks."""

    class Beside(HashRouter):
        def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Any:
            return super().beforehand(ids, experts, top_k) + shift if known else None

        def forward(self, hidden: Tensor, ids: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
            numbers, gates = HashRouter(tokens=2)(hidden, ids, experts, top_k)
            return numbers + shift, gates

    def build() -> Model:
        return Model(lambda index: StreamedExperts(WIDTH, HIDDEN, 3, TOP_K, Beside(tokens=2, seed=index)))

    with engine(tmp_path / "store", build) as trained:
        before = trained.store.digest()
        with pytest.raises(
            ConfigError, match=rf"Beside: expected experts from 0 to 2, found {3 if shift > 0 else -1};"
        ):
            trained.step(text(0), loss_fn)
        assert trained.store.digest() == before


@pytest.mark.parametrize("change", [lambda n: n.view(2, -1, TOP_K), lambda n: n.int(), lambda n: n[:, :1]])
def test_a_router_that_returns_something_else_is_told_what_is_expected(change: Callable[[Tensor], Tensor]) -> None:
    class Other(HashRouter):
        def forward(self, hidden: Tensor, ids: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
            numbers, gates = super().forward(hidden, ids, experts, top_k)
            return change(numbers), gates

    layer = StreamedExperts(WIDTH, HIDDEN, 8, TOP_K, Other()).resident()
    with pytest.raises(
        ConfigError, match=r"Other: expected experts \(int64\) and gates of shape \(6, 2\), \(tokens, top_k\)"
    ):
        layer(torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, dtype=torch.int64))


class Few(Layer):
    """Only some tokens of a micro-batch go to the experts, of some none."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        some = ids < ids[0, 0] - 16
        return x.index_put((some,), self.experts(self.norm(x[some]), ids[some]), accumulate=True)


def test_a_layer_may_be_given_no_tokens(tmp_path: Path) -> None:
    class Selecting(Model):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.layers[1] = Few(make(1))

    reached = []
    with engine(tmp_path / "store", lambda: Selecting(streamed_layer)) as trained:
        for first in (0, 31):
            ids = torch.arange(5).add(first).remainder(32).expand(2, 5)
            facts = trained.step([{"input_ids": ids, "labels": ids}], loss_fn).experts
            reached.append(facts["layers.1.experts"].assignments if "layers.1.experts" in facts else 0)
    assert reached == [0, 8 * TOP_K]


def streamed_layer(index: int) -> StreamedExperts:
    return StreamedExperts(WIDTH, HIDDEN, EXPERTS, TOP_K, HashRouter(tokens=2, seed=index))


@pytest.mark.parametrize("activations", ["auto", "recompute"])
def test_autocast_computes_experts_as_it_does_products(activations: str, tmp_path: Path) -> None:
    def cast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, batch)

    norms = {}
    for name, loss in (("full", loss_fn), ("cast", cast)):
        with engine(tmp_path / name, lambda: Model(streamed_layer), activations=activations) as trained:
            norms[name] = [trained.step(text(step), loss).grad_norm for step in range(2)]
    assert norms["cast"] != norms["full"]
    assert norms["cast"] == pytest.approx(norms["full"], rel=0.02)
