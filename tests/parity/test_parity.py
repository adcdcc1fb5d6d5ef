"""Streamed against resident: ten steps, then parameters and optimizer state equal bit for bit.

The cases cover every pair of values of every two factors rather than their full product. What is particular to one
model or to one setting has a test of its own below.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.parity.pairwise import Case, pairwise
from tests.parity.reference import ContractTrainer, OptimizerSettings, OrdinaryTrainer
from tests.parity.zoo import ZOO, MicroBatch, SkipNet, SkipOutput, ZooModel
from torch import Tensor, nn

import weightstream as ws
from weightstream.errors import PlanError
from weightstream.schedule.allotment import Facts, allot

STEPS = 10
AMPLE = 4 << 30
OPTIMIZERS: dict[str, tuple[OptimizerSettings, Callable[[], Any]]] = {
    "adamw": (
        OptimizerSettings(lr=2e-3),
        lambda: ws.AdamW(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8),
    ),
    "sgd": (
        OptimizerSettings(optimizer=torch.optim.SGD, lr=0.05, arguments={"momentum": 0.9}),
        lambda: ws.SGD(lr=0.05, weight_decay=0.1, momentum=0.9),
    ),
}
FACTORS: dict[str, Sequence[Any]] = {
    "model": tuple(ZOO),
    "precision": ("fp32", "bf16"),
    "micro_batches": (4, 1, 9, 3),
    "clip_norm": (0.5, None),
    "dropout": (0.1, 0.0),
    "ragged": (True, False),
    "frozen": (False, True),
    "activations": ("recompute", "keep", "auto"),
    "device": ("tight", "ample"),  # tight: boundary activations are spilled
    "host": ("nothing", "some", "everything"),  # what stays in RAM between uses
    "prefetch": (2, 1, 4),
    "optimizer": ("adamw", "sgd"),
    "weights": ("tokens", "given"),
}
CASES = pairwise(FACTORS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# compute there, optimizer and sums of squares on the host, on both sides
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


def label(case: Case) -> str:
    names = (f"{key}={value}" if isinstance(value, bool | int | float) else str(value) for key, value in case.items())
    return ",".join(name.replace("=True", "").replace("clip_norm", "clip") for name in names if "=False" not in name)


def smallest(works: Callable[[int], object]) -> int:
    """The smallest budget, to a KiB, that a plan is possible with."""
    low, high = 0, 1 << 20  # KiB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            works(middle << 10)
        except PlanError:
            low = middle
        else:
            high = middle
    return high << 10


def budgets(facts: Facts, case: Case) -> dict[str, int]:
    """Bytes for the words of a case, from a plan that has measured a step of this very case."""
    facts = replace(facts, activations=case["activations"], prefetch=case["prefetch"])
    device = AMPLE
    if case["device"] == "tight":
        device = smallest(lambda found: allot(replace(facts, device_memory=found)))
    facts = replace(facts, device_memory=device)
    if case["host"] == "everything":
        return {"device_memory": device, "host_memory": AMPLE}
    host = smallest(lambda found: allot(replace(facts, host_memory=found)))
    if case["host"] == "some":
        host = (host + allot(replace(facts, host_memory=AMPLE)).host_bytes) // 2
    return {"device_memory": device, "host_memory": host}


def open_engine(zoo: ZooModel, store: Path, **settings: Any) -> ws.Engine:
    return ws.Engine(zoo.build, store, threads_per_worker=1, block_rules=dict(zoo.block_rules) or None, **settings)


def initial_values(engine: ws.Engine) -> dict[str, Tensor]:
    return {name: tensors["param"] for name, tensors in engine.store.items()}


def assert_equal_items(engine: ws.Engine, expected: dict[str, dict[str, Tensor]]) -> None:
    """Every tensor, by name and part; all that differ are named."""
    engine.commit()
    different = []
    for name, tensors in engine.store.items():
        wanted = expected[name]
        # A parameter that never got a gradient has no state in PyTorch, and zeros in the store.
        assert wanted.keys() in (tensors.keys(), {"param"}), (name, tensors.keys(), wanted.keys())
        for part, tensor in tensors.items():
            reference = wanted.get(part, torch.zeros_like(tensor))
            if not torch.equal(tensor, reference):
                different.append(f"{part} of {name}: up to {float((tensor - reference).abs().max()):.1e}")
    assert not different, f"{len(different)} tensors differ: " + "; ".join(different[:5])
    assert expected.keys() == {name for name, _ in engine.store.items()}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_streamed_equals_resident(case: Case, on: str, tmp_path: Path) -> None:
    zoo = ZOO[case["model"]].with_(dropout=case["dropout"], frozen=case["frozen"])
    settings, optimizer = OPTIMIZERS[case["optimizer"]]
    common = {
        "optimizer": optimizer(), "precision": case["precision"], "clip_norm": case["clip_norm"], "seed": 11, "device": on,
    }  # fmt: skip

    def micro_batches(step: int) -> list[MicroBatch]:
        return zoo.micro_batches(case["micro_batches"], ragged=case["ragged"], step=step)

    memory = {"device_memory": AMPLE, "host_memory": AMPLE}
    if (case["device"], case["host"]) != ("ample", "everything"):
        with open_engine(zoo, tmp_path / "measured", **common) as engine:
            engine.step(micro_batches(1), zoo.loss_fn)
            engine.step(micro_batches(2), zoo.loss_fn)  # planned with what the first has shown
            memory = budgets(engine.runtime.facts, case)
    planned = {"activations": case["activations"], "prefetch": case["prefetch"], "ram_tier": case["host"] != "nothing"}
    with open_engine(zoo, tmp_path / "store", **common, **planned, **memory) as engine:
        resident = ContractTrainer(
            zoo.build, initial_values(engine), settings, calls=zoo.calls,
            precision=case["precision"], clip_norm=case["clip_norm"], seed=11, device=on,
        )  # fmt: skip
        for step in range(1, STEPS + 1):
            batch = micro_batches(step)
            weights = (
                zoo.token_shares(batch) if case["weights"] == "tokens" else [0.3 + 0.1 * i for i in range(len(batch))]
            )
            expected = resident.step(batch, zoo.loss_fn, weights)
            found = engine.step(batch, zoo.loss_fn, weights=None if case["weights"] == "tokens" else weights)
            assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm), f"step {step}"
        assert_equal_items(engine, resident.items())
        assert_the_case_took_place(engine, case)


def assert_the_case_took_place(engine: ws.Engine, case: Case) -> None:
    """That the budgets did what the case's words say."""
    plan = engine.allotment
    facts = engine.runtime.facts
    assert facts.boundary_bytes is not None
    if case["device"] == "tight" and case["activations"] != "keep" and any(facts.boundary_bytes[:-1]):
        assert set(plan.boundaries[:-1]) - {"device"}
        assert engine.worker.activations.spilled_bytes > 0
    if case["host"] == "nothing":
        assert not plan.pinned_copies
        assert not plan.pinned_states
    if case["host"] == "everything":
        assert plan.pinned_states
    if case["activations"] == "keep":
        assert len(plan.keep) == len(plan.boundaries) - 1
    if case["activations"] == "recompute":
        assert not plan.keep


def run_both(
    zoo: ZooModel,
    store: Path,
    *,
    steps: int,
    count: int,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    settings: OptimizerSettings | None = None,
    optimizer: Any = None,
    calls: Sequence[str] | None = None,
    clip_norm: float | None = 0.5,
    precision: str = "fp32",
    on: str = "cpu",
    panel_elements: int | None = None,
    **rest: Any,
) -> None:
    """A run of its own beside the table: ragged, clipped, AdamW unless said otherwise."""
    loss_fn = loss_fn or zoo.loss_fn
    common = {
        "optimizer": optimizer or OPTIMIZERS["adamw"][1](), "clip_norm": clip_norm, "precision": precision, "device": on,
        "panel_elements": panel_elements,
    }  # fmt: skip
    with open_engine(zoo, store, **common, **rest) as engine:
        resident = ContractTrainer(
            zoo.build, initial_values(engine), settings or OPTIMIZERS["adamw"][0], clip_norm=clip_norm,
            precision=precision, calls=zoo.calls if calls is None else calls, device=on, panel_elements=panel_elements,
        )  # fmt: skip
        for step in range(1, steps + 1):
            batch = zoo.micro_batches(count, ragged=True, step=step)
            expected = resident.step(batch, loss_fn, zoo.token_shares(batch))
            found = engine.step(batch, loss_fn)
            assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm), f"step {step}"
        assert_equal_items(engine, resident.items())


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "moe_router"])
def test_layers_that_are_split(name: str, precision: str, on: str, tmp_path: Path) -> None:
    """Blocks below a layer: attention, MLP and norms by themselves, with the residual stream as glue between them."""
    zoo = ZOO[name].with_(dropout=0.1)
    run_both(zoo, tmp_path / "store", steps=4, count=3, precision=precision, max_block_bytes=9000, on=on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "moe", "glue"])
def test_tensors_that_are_cut(name: str, precision: str, clip_norm: float | None, on: str, tmp_path: Path) -> None:
    """Blocks of several units, and panels of rows: only the norm's order of sums knows of them."""
    zoo = ZOO[name].with_(dropout=0.1, frozen=name == "moe")
    run_both(
        zoo, tmp_path / "store", steps=4, count=9, precision=precision, clip_norm=clip_norm, on=on, panel_elements=3000
    )
    with ws.Store.open(tmp_path / "store", writable=False) as store:
        assert any(parameter.rows is not None for unit in store.units for parameter in unit.parameters)
        assert any(len(store.units_of(block.index)) > 1 for block in store.blocks)


class Tied(SkipNet):
    """An embedding of several panels that is the head as well."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width, dropout, glue=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tied_tensor_that_is_cut(precision: str, optimizer: str, tmp_path: Path) -> None:
    zoo = replace(
        ZOO["skip"], build_with_dropout=lambda p: Tied(32, p), calls=("shared", "embedding", "head"), block_rules={}
    )
    settings, make = OPTIMIZERS[optimizer]
    run_both(
        zoo, tmp_path / "store", steps=4, count=3, precision=precision, settings=settings, optimizer=make(),
        panel_elements=2048, activations="recompute", device_memory=64 << 20,
    )  # fmt: skip


def test_an_optimizer_that_is_not_elementwise_has_whole_tensors(tmp_path: Path) -> None:
    with open_engine(ZOO["llama"], tmp_path / "store", optimizer=ws.Adafactor(), panel_elements=1000) as engine:
        assert all(parameter.rows is None for unit in engine.store.units for parameter in unit.parameters)
        assert len(engine.store.units) > len(engine.store.blocks)
        batch = ZOO["llama"].micro_batches(2, ragged=True, step=1)
        assert not engine.step(batch, ZOO["llama"].loss_fn).skipped


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_ordinary_loop_is_met_within_rounding(clip_norm: float | None, tmp_path: Path) -> None:
    """The second reference against the stream itself; its bound is that of `test_reference.py`."""
    zoo = ZOO["gpt2"].with_(dropout=0.1)
    with open_engine(zoo, tmp_path / "store", optimizer=OPTIMIZERS["adamw"][1](), clip_norm=clip_norm) as engine:
        initial = initial_values(engine)
        ordinary = OrdinaryTrainer(zoo.build, initial, OPTIMIZERS["adamw"][0], clip_norm=clip_norm)
        for step in range(1, STEPS + 1):
            batch = zoo.micro_batches(9, ragged=True, step=step)
            expected = ordinary.step(batch, zoo.loss_fn, zoo.token_shares(batch))
            found = engine.step(batch, zoo.loss_fn)
            assert found.loss == pytest.approx(expected.loss, rel=1e-6)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        engine.commit()
        apart = moved = 0.0
        items = ordinary.items()
        for name, tensors in engine.store.items():
            apart += float((tensors["param"] - items[name]["param"]).double().square().sum())
            moved += float((items[name]["param"] - initial[name]).double().square().sum())
        assert apart**0.5 <= 1e-4 * moved**0.5


class ReadsTwice(SkipNet):
    """Between blocks, one operation reads a tensor twice that later blocks read as well."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> SkipOutput:
        embedded = self.embedding(input_ids)
        squared = embedded * embedded
        unit = F.normalize(embedded, dim=-1)
        hidden = self.blocks[0](embedded)["hidden"]
        for block in self.blocks[1:]:
            hidden = block(hidden + squared, skip=unit)["hidden"] + embedded
        logits = self.head(self.norm(hidden))
        return SkipOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))


def test_glue_that_reads_a_tensor_twice(tmp_path: Path) -> None:
    zoo = replace(ZOO["skip"], build_with_dropout=lambda p: ReadsTwice(32, p, glue=False), calls=(), block_rules={})
    run_both(zoo, tmp_path / "store", steps=3, count=3)


def test_a_learning_rate_schedule_and_groups_count_training_steps(tmp_path: Path) -> None:
    warm = OptimizerSettings(lr=lambda step: 2e-3 * min(1.0, step / 4))
    optimizer = ws.AdamW(lr=ws.constant(2e-3, warmup=4), weight_decay=0.1, betas=(0.9, 0.95))
    run_both(ZOO["llama"], tmp_path / "store", steps=6, count=2, settings=warm, optimizer=optimizer)


def test_autocast_inside_the_loss_function(tmp_path: Path) -> None:
    """Recomputation runs under the autocast state of the first pass."""
    zoo = ZOO["llama"].with_(dropout=0.1)

    def loss_fn(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**micro_batch).loss

    run_both(zoo, tmp_path / "store", steps=3, count=3, loss_fn=loss_fn, activations="recompute")


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_step_that_is_not_finite_is_skipped_alike(clip_norm: float | None, tmp_path: Path) -> None:
    """Found early, found late, in the first step, twice in a row: parameters, moments, counts stay; steps advance."""
    zoo = ZOO["gpt2"].with_(dropout=0.1)
    bad_steps = {1: 0, 3: 2, 4: 1}  # step → the micro-batch that is not finite

    with open_engine(zoo, tmp_path / "store", optimizer=OPTIMIZERS["adamw"][1](), clip_norm=clip_norm) as engine:
        resident = ContractTrainer(
            zoo.build, initial_values(engine), OPTIMIZERS["adamw"][0], clip_norm=clip_norm, calls=zoo.calls
        )
        for step in range(1, 8):
            batch = zoo.micro_batches(3, ragged=True, step=step)
            weights = zoo.token_shares(batch)
            if step in bad_steps:
                weights[bad_steps[step]] = float("inf")
            expected = resident.step(batch, zoo.loss_fn, weights)
            found = engine.step(batch, zoo.loss_fn, weights=weights)
            assert found.skipped == expected.skipped == (step in bad_steps)
        assert engine.step_count == 7
        assert_equal_items(engine, resident.items())


def test_micro_batches_may_change_in_number_from_step_to_step(tmp_path: Path) -> None:
    zoo = ZOO["t5"].with_(dropout=0.1)
    with open_engine(zoo, tmp_path / "store", optimizer=OPTIMIZERS["adamw"][1](), clip_norm=0.5) as engine:
        resident = ContractTrainer(
            zoo.build, initial_values(engine), OPTIMIZERS["adamw"][0], clip_norm=0.5, calls=zoo.calls
        )
        for step, count in enumerate((3, 9, 1, 12, 3), start=1):
            batch = zoo.micro_batches(count, ragged=True, step=step)
            resident.step(batch, zoo.loss_fn, zoo.token_shares(batch))
            engine.step(batch, zoo.loss_fn)
        assert_equal_items(engine, resident.items())


def test_a_run_in_two_pieces_equals_the_resident_one(tmp_path: Path) -> None:
    """Closing and opening again in between, with other budgets, changes nothing."""
    zoo = ZOO["moe_router"].with_(dropout=0.1)
    resident = None
    for first, last, memory in ((1, 3, AMPLE), (4, 6, 64 << 20)):
        with open_engine(
            zoo, tmp_path / "store", optimizer=OPTIMIZERS["adamw"][1](), clip_norm=0.5, host_memory=memory
        ) as engine:
            assert engine.step_count == first - 1
            if resident is None:
                resident = ContractTrainer(zoo.build, initial_values(engine), OPTIMIZERS["adamw"][0], clip_norm=0.5)
            for step in range(first, last + 1):
                batch = zoo.micro_batches(3, ragged=True, step=step)
                resident.step(batch, zoo.loss_fn, zoo.token_shares(batch))
                engine.step(batch, zoo.loss_fn)
            assert_equal_items(engine, resident.items())


def test_two_threads(tmp_path: Path) -> None:
    """The other cases run on one thread; kernels that cut their work among threads cut it alike."""
    torch.set_num_threads(2)
    zoo = ZOO["llama"].with_(dropout=0.1)
    with ws.Engine(
        zoo.build, tmp_path / "store", OPTIMIZERS["adamw"][1](), clip_norm=0.5, threads_per_worker=2
    ) as engine:
        resident = ContractTrainer(zoo.build, initial_values(engine), OPTIMIZERS["adamw"][0], clip_norm=0.5)
        for step in range(1, 4):
            batch = zoo.micro_batches(3, ragged=True, step=step)
            resident.step(batch, zoo.loss_fn, zoo.token_shares(batch))
            engine.step(batch, zoo.loss_fn)
        assert_equal_items(engine, resident.items())
