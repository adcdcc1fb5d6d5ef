"""A limit on experts: refused beforehand, or only those that exist are reached; against plain PyTorch with the same gate."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nn.plain_experts import PlainTraining
from tests.nn.test_experts import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    WIDTH,
    KilledError,
    Model,
    engine,
    loss_fn,
    name_in_store,
    plain,
    same_as,
    streamed,
    text,
)
from torch import Tensor, nn

import weightstream as ws
from weightstream.errors import ConfigError, NonFiniteError, PlanError
from weightstream.nn import HashRouter, Pool, ProductKeyRouter, StreamedExperts
from weightstream.units import format_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = ("layers.0.experts", "layers.1.experts")


def frozen(experts: int = EXPERTS) -> Model:
    return streamed(("frozen", "frozen"), experts)


def pooled(path: Path, limit: Any, when_full: str = "existing", model: Any = frozen, **settings: Any) -> ws.Engine:
    pool = Pool(limit, when_full) if not isinstance(limit, dict) else limit  # type: ignore[arg-type]
    return engine(path, model, experts_pool=pool, **settings)


def meant(step: list[dict[str, Tensor]], index: int) -> set[int]:
    """The experts that a step's tokens lead to in one layer."""
    router = HashRouter(tokens=2, seed=index)
    return {n for batch in step for n in router.beforehand(batch["input_ids"], EXPERTS, TOP_K).flatten().tolist()}


class Gate:
    """The rule in plain words: once a step could exceed the pool, only what exists then is reached, the next by number."""

    def __init__(self, limit: int) -> None:
        self.limit, self.closed = limit, False
        self.existing: list[set[int]] = [set(), set()]

    def begin(self, step: list[dict[str, Tensor]]) -> None:
        after = [here | meant(step, index) for index, here in enumerate(self.existing)]
        if not self.closed and sum(map(len, after)) <= self.limit:
            self.existing = after
        else:
            self.closed = True

    def __call__(self, index: int, numbers: Tensor) -> Tensor:
        ring = sorted(self.existing[index])
        return numbers.clone().apply_(lambda n: ring[bisect_left(ring, int(n)) % len(ring)]) if self.closed else numbers


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_full_pool_trains_as_plain_pytorch_with_the_same_gate(tmp_path: Path, clip_norm: float | None) -> None:
    """Bit for bit, with steps that die in the middle and a process that begins anew after each step; and so without."""

    def loss_or_end(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if batch["input_ids"].shape[1] == 7:  # the last micro-batch
            raise KilledError
        return loss_fn(model, batch)

    gate = Gate(limit=90)
    with engine(tmp_path / "values", frozen) as fresh:
        values = {name: tensors["param"] for name, tensors in fresh.store.items()}
    reference = PlainTraining(plain(values, gate), name_in_store, lr=1e-2, clip_norm=clip_norm, groups=2, dense=())
    closed, again = [], pooled(tmp_path / "again", 90, clip_norm=clip_norm)
    for step in range(5):
        gate.begin(text(step))
        loss, norm = reference.step(text(step))
        for _ in range(step % 2):
            with pytest.raises(KilledError):
                again.step(text(step), loss_or_end)
            again.abandon()
            again = pooled(tmp_path / "again", 90, clip_norm=clip_norm)
        result = again.step(text(step), loss_fn)
        assert (result.loss, result.grad_norm) == (loss, norm)
        redirected = sum(facts.redirected for facts in result.experts.values())
        closed.append(gate.closed)
        assert (redirected > 0) == gate.closed
        assert [growth.written for growth in again.growing.layers.values()] == [len(here) for here in gate.existing]
        again.close()
        again = pooled(tmp_path / "again", 90, clip_norm=clip_norm)
    assert closed[0] is False
    assert closed[-1] is True
    same_as(reference, again)
    with again.module() as model, torch.no_grad():  # looking takes the same ways
        looked = [float(loss_fn(model, batch)) for batch in text(9)]
        assert looked == [float(loss_fn(reference.model, batch)) for batch in text(9)]
    with pooled(tmp_path / "straight", 90, clip_norm=clip_norm) as straight:
        for step in range(5):
            straight.step(text(step), loss_fn)
        assert straight.store.digest() == again.store.digest()
    again.close()


def test_it_does_not_matter_how_a_step_is_divided(tmp_path: Path) -> None:
    """The same tokens in 1, 2 and 4 micro-batches, in another order: the same experts come to exist, and the same are meant
    and not reached."""
    found = set()
    for count, turn in ((1, 1), (2, -1), (4, 1)):
        with pooled(tmp_path / f"{count}", 100) as trained:
            facts = []
            for step in range(3):
                ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
                batches = [{"input_ids": part, "labels": part} for part in ids.chunk(count)][::turn]
                experts = trained.step(batches, loss_fn).experts
                facts.append(tuple((each.touched, each.new, each.redirected) for each in experts.values()))
            exist = tuple(
                tuple(n for n in range(EXPERTS) if trained.experts.touching.families[name].written([n]))
                for name in LAYERS
            )
            found.add((tuple(facts), exist))
    assert len(found) == 1
    ((facts, exist),) = found
    assert sum(map(len, exist)) <= 100
    assert sum(redirected for _, _, redirected in facts[-1]) > 0


def test_a_step_that_could_exceed_a_pool_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    with engine(tmp_path / "free", frozen) as free:
        for step in (0, 1, 0, 2):
            free.step(text(step), loss_fn)
        expected = free.store.digest()
    sizes = [len(meant(text(0), index) | meant(text(1), index)) for index in range(2)]
    with pooled(tmp_path / "store", sum(sizes), "refuse") as trained:
        trained.step(text(0), loss_fn)
        trained.step(text(1), loss_fn)
        digest = trained.store.digest()
        added = sum(len(meant(text(2), index) | meant(text(0), index) | meant(text(1), index)) for index in range(2))
        added -= sum(sizes)
        said = rf"{sum(sizes)} experts of {sum(sizes)} experts exist, the step of 36 tokens may add {added} experts"
        with pytest.raises(PlanError, match=said):
            trained.step(text(2), loss_fn)
        assert (trained.store.digest(), trained.step_count) == (digest, 2)
        trained.step(text(0), loss_fn)  # nothing new
        assert "experts pool" in trained.plan
    with pooled(tmp_path / "store", 2 * EXPERTS, "refuse") as trained:
        trained.step(text(2), loss_fn)
        assert trained.store.digest() == expected


def test_a_pool_that_is_made_larger_opens_again(tmp_path: Path) -> None:
    with pooled(tmp_path / "store", 95) as trained:
        for step in range(4):
            trained.step(text(step), loss_fn)
        (pool,) = trained.growing.pools
        assert pool.closed
        written = pool.used
    with pooled(tmp_path / "store", 90) as trained:  # smaller: it stays closed
        assert trained.growing.pools[0].closed
        assert "0.0 a step lately, 0 B\n" in trained.plan
        assert "it is full: tokens go to experts that exist" in trained.plan
        assert trained.step(text(5), loss_fn).experts[LAYERS[0]].new == 0
    with pooled(tmp_path / "store", 2 * EXPERTS) as trained:
        assert not trained.growing.pools[0].closed
        facts = trained.step(text(4), loss_fn).experts
        assert sum(each.new for each in facts.values()) == trained.growing.pools[0].used - written > 0
        assert not any(each.redirected for each in facts.values())


def test_without_a_pool_what_had_closed_is_open_whoever_looks_at_the_model(tmp_path: Path) -> None:
    """Also where the pool is left out of one layer alone; looking changes nothing of what the next step does."""
    pools: dict[str, Any] = {"none": {}, "looked": {}, "second": {"*.1.*": Pool(5, "existing")}}
    with pooled(tmp_path / "closed", 90) as trained:
        for step in range(4):
            trained.step(text(step), loss_fn)
        assert trained.growing.pools[0].closed
        trained.snapshot("closed")
        for name in pools:
            trained.store.branch("closed", tmp_path / name)
    reached = {}
    for name, limits in pools.items():
        with pooled(tmp_path / name, limits) as trained:
            if name == "looked":
                with trained.module() as model, torch.no_grad():
                    loss_fn(model, text(9)[0])
            reached[name] = [(each.new, each.redirected) for each in trained.step(text(5), loss_fn).experts.values()]
    assert reached["none"] == reached["looked"] == [(13, 0), (13, 0)]
    first, (new, redirected) = reached["second"]
    assert first == (13, 0)
    assert new == 0
    assert redirected >= 13  # each of those that would be new has a token at least


def test_a_pool_that_is_made_smaller_than_what_exists_lets_nothing_come_to_exist(tmp_path: Path) -> None:
    with pooled(tmp_path / "store", 95) as trained:
        for step in range(4):
            trained.step(text(step), loss_fn)
        used = trained.growing.pools[0].used
    with pooled(tmp_path / "store", used - 1, "existing") as trained:
        assert not any(facts.new for facts in trained.step(text(5), loss_fn).experts.values())
    with pooled(tmp_path / "store", used - 1, "refuse") as trained:
        trained.step(text(0), loss_fn)  # nothing new
        with pytest.raises(PlanError, match=f"{used} experts of {used - 1} experts exist"):
            trained.step(text(5), loss_fn)
        assert trained.growing.pools[0].used == used


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_step_that_is_skipped_closes_a_pool_even_if_it_is_one_too_many(
    tmp_path: Path, clip_norm: float | None
) -> None:
    """Whoever goes on after the refusal does as a process that is started again."""
    limit = sum(len(meant(text(0), index)) for index in range(2))
    with pooled(tmp_path / "store", limit, max_skipped_steps=0, clip_norm=clip_norm) as trained:
        trained.step(text(0), loss_fn)
        with pytest.raises(NonFiniteError):
            trained.step(text(1), loss_fn, weights=[float("inf")] * 3)
        assert trained.growing.pools[0].closed
        trained.step(text(0), loss_fn)
        assert trained.growing.pools[0].used == limit
    with pooled(tmp_path / "store", limit, clip_norm=clip_norm) as trained:
        assert trained.growing.pools[0].closed


def test_pools_of_single_layers_in_bytes(tmp_path: Path) -> None:
    """Each layer by its own limit: one closes, the other goes on; records count as many bytes as they take."""
    with engine(tmp_path / "sizes", frozen) as free:
        record = free.growing.layers[LAYERS[0]].record_bytes
        assert record == free.store.layouts.parts_nbytes(free.store.index(LAYERS[0] + ".{}", 0))
    pools = {"*.0.*": Pool(f"{50 * record}B", "existing"), "*": Pool(EXPERTS)}
    with pooled(tmp_path / "store", pools) as trained:
        for step in range(4):
            trained.step(text(step), loss_fn)
        first, second = trained.growing.layers.values()
        assert first.written <= 50 < second.written
        assert [pool.closed for pool in trained.growing.pools] == [True, False]
        assert trained.growing.pools[0].used == first.written * record


def test_learned_routers_count_as_reaching_all_that_they_could(tmp_path: Path) -> None:
    def build() -> Model:
        return Model(lambda index: StreamedExperts(WIDTH, HIDDEN, 7**3, 3, ProductKeyRouter(WIDTH, 7**3, 3)))

    tokens = sum(batch["input_ids"].numel() for batch in text(0))
    with pytest.raises(PlanError, match=f"of {tokens} tokens may add {2 * 3 * tokens} experts"), \
            pooled(tmp_path / "store", 6 * tokens - 1, "refuse", build) as trained:  # fmt: skip
        trained.step(text(0), loss_fn)
    with pooled(tmp_path / "store", 6 * tokens, "existing", build) as trained:
        assert sum(each.new for each in trained.step(text(0), loss_fn).experts.values()) > 0
        before = trained.growing.pools[0].used
        facts = trained.step(text(1), loss_fn).experts.values()
        assert not sum(each.new for each in facts)
        assert trained.growing.pools[0].used == before


def test_what_a_model_that_calls_its_layers_twice_could_reach_is_known_to_who_goes_on(tmp_path: Path) -> None:
    """A process that goes on has not seen how often layers are called; the pool closes at the same step."""

    class Twice(Model):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in (*self.layers, *self.layers):
                x = layer(x, input_ids)
            return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def build() -> Model:
        return Twice(lambda index: StreamedExperts(WIDTH, HIDDEN, 7**3, 3, ProductKeyRouter(WIDTH, 7**3, 3)))

    closed = []
    with pooled(tmp_path / "straight", 500, model=build) as straight:
        for step in range(3):
            straight.step(text(step), loss_fn)
            closed.append(straight.growing.pools[0].closed)
    assert closed == [False, True, True]
    for step in range(3):
        with pooled(tmp_path / "again", 500, model=build) as again:
            again.step(text(step), loss_fn)
            assert again.growing.pools[0].closed == closed[step]
            digest = again.store.digest()
    with pooled(tmp_path / "straight", 500, model=build) as straight:
        assert straight.store.digest() == digest


def test_experts_that_no_input_ids_lead_to_are_refused_in_time(tmp_path: Path) -> None:
    """The model gives its layers other ids than the micro-batch has: what comes of it is found before it is written."""

    class Shifted(Model):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return super().forward((input_ids + 1) % 32, labels)

    def build() -> Model:
        return Shifted(lambda index: StreamedExperts(WIDTH, HIDDEN, 10**9, TOP_K, HashRouter(tokens=2, seed=index)))

    first = sum(
        len(set(HashRouter(tokens=2, seed=index).beforehand((ids + 1) % 32, 10**9, TOP_K).flatten().tolist()))
        for index in range(2) for ids in (text(0, count=1)[0]["input_ids"],)
    )  # fmt: skip
    with pooled(tmp_path / "store", 10**6, "refuse", build) as trained:
        trained.step(text(0, count=1), loss_fn)
        digest = trained.store.digest()
        assert trained.growing.pools[0].used == first
    same = [{"input_ids": (text(0, count=1)[0]["input_ids"] + 1) % 32, "labels": text(0, count=1)[0]["labels"]}]
    with pooled(tmp_path / "store", first, "refuse", build) as trained:
        with pytest.raises(PlanError, match="reached experts that do not follow from its input_ids"):
            trained.step(same, loss_fn)  # it means experts that exist, and reaches others
        assert trained.store.digest() == digest


def test_what_is_no_pool_is_refused(tmp_path: Path) -> None:
    for limit in (0, -1, "0GiB", "many"):
        with pytest.raises(ConfigError, match="Pool: expected"):
            Pool(limit)
    with pytest.raises(ConfigError, match="when_full must be 'refuse' or 'existing', found 'drop'"):
        Pool(5, "drop")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"no layer of experts is called 'head'; the model's are: layers\.0\.experts, "
    ):
        pooled(tmp_path / "pattern", {"head": Pool(5)})
    with pytest.raises(ConfigError, match="untouched='dense' changes experts that no step reaches"):
        pooled(tmp_path / "dense", 100, model=streamed)
    with pooled(tmp_path / "store", 5) as trained:
        with pytest.raises(ConfigError, match="expected micro-batches that are dicts with input_ids"):
            trained.step(
                [text(0)[0]["input_ids"]], lambda model, ids: loss_fn(model, {"input_ids": ids, "labels": ids})
            )
        with pytest.raises(PlanError, match=r"0 experts of 5 experts exist, .* has none to route to"):
            trained.step(text(0), loss_fn)


def test_the_plan_knows_how_experts_grow(tmp_path: Path) -> None:
    with pooled(tmp_path / "store", 120, "refuse", commit_every=1) as trained:
        assert "experts per step  not known yet" in trained.plan
        trained.rehearse(text(0, count=1)[0], loss_fn, micro_batches=3)
        tokens = text(0, count=1)[0]["input_ids"].numel()
        growth = trained.growing.layers[LAYERS[0]]
        most = min(3 * tokens * TOP_K, EXPERTS)
        assert growth.most_per_step == most
        assert growth.loaded_bytes >= 12 * 2 * WIDTH * HIDDEN
        needed = format_bytes(2 * most * growth.slot_bytes)
        said = (
            f"at most {2 * most}, which take {needed} of experts_memory; 16.0 MiB are given, for {growth.held} of each"
        )
        assert f"experts per step  {said}" in trained.plan
        results = [trained.step(text(step, count=1), loss_fn) for step in range(3)]
        new = [sum(facts.new for facts in result.experts.values()) for result in results]
        trained.commit()
        (pool,) = trained.growing.pools
        assert pool.used == sum(new) == sum(layer.written for layer in trained.growing.layers.values())
        assert pool.steps_left == int((120 - sum(new)) / (sum(new) / 3))
        shown = trained.plan
        assert f"experts           {sum(new)} of 128 in 2 layers exist" in shown
        assert f"experts grow by   {sum(new) / 3:,.1f} a step lately" in shown
        said = f"{sum(new)} of 120 experts of {', '.join(LAYERS)}; full after {pool.steps_left} steps, "
        assert f"experts pool      {said}" in shown
    with pooled(tmp_path / "store", 120, "refuse") as trained:
        assert trained.growing.pools[0].steps_left == pool.steps_left
        assert f"full after {pool.steps_left} steps, " in trained.plan


def test_memory_that_learned_routers_may_exceed_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []

    def build() -> Model:
        return Model(lambda index: StreamedExperts(WIDTH, HIDDEN, 7**3, 3, ProductKeyRouter(WIDTH, 7**3, 3)))

    with engine(tmp_path / "store", build, experts_memory=2 * 107 * 28_672, log=said.append) as trained:
        for _ in range(2):
            trained.step(text(0), loss_fn)
    assert (
        len([line for line in said if "may reach up to 108 experts, there is memory for 107; " in line]) == 2
    )  # layers
