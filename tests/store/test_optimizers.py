"""Optimizers at the store give the bits of `torch.optim`, for every class, and survive JSON."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.store.optimizers import SGD, Adafactor, AdamW, Group, Lion, Optimizer, Torch
from weightstream.store.schedules import Schedule, constant, cosine, linear, schedule_from_json, wsd

SHAPES = [(), (1,), (37,), (24, 40), (3, 16, 10)]
RATE = linear(3e-3, warmup=3, steps=20)


def run_ours(optimizer: Optimizer, start: Tensor, grads: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    param = start.clone()
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in optimizer.states(start.shape).items()}
    for step, grad in enumerate(grads, 1):
        before = grad.clone()
        optimizer.update(param, grad, state, name="block.weight", step=step, count=step)
        assert torch.equal(grad, before), "the gradient belongs to the caller"
    return param, state


def run_torch(
    cls: Any, options: dict[str, Any], start: Tensor, grads: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    param = torch.nn.Parameter(start.clone())
    decay = {"weight_decay": options["weight_decay"] if start.dim() > 1 else 0.0} if "weight_decay" in options else {}
    optimizer = cls([param], **(options | decay | {"lr": 1.0}))
    for step, grad in enumerate(grads, 1):
        optimizer.param_groups[0]["lr"] = RATE(step)
        param.grad = grad.clone()
        optimizer.step()
    state = {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
    return param.detach(), state


def numbers(shape: tuple[int, ...], steps: int = 10) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(shape, generator=generator)
    return start, [torch.randn(shape, generator=generator) * 10.0 ** (-step) for step in range(steps)]


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    for name, value in ours[1].items():
        assert torch.equal(value, theirs[1][name]), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_has_the_bits_of_torch(shape: tuple[int, ...], decay: float) -> None:
    start, grads = numbers(shape)
    ours = run_ours(AdamW(lr=RATE, betas=(0.9, 0.95), weight_decay=decay), start, grads)
    options = {"betas": (0.9, 0.95), "weight_decay": decay, "fused": True}
    assert_same(ours, run_torch(torch.optim.AdamW, options, start, grads))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.8, "dampening": 0.3}, {"nesterov": True}], ids=str
)
def test_sgd_has_the_bits_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    start, grads = numbers(shape)
    options = {"momentum": 0.9, "weight_decay": 0.05} | options
    assert_same(
        run_ours(SGD(lr=RATE, **options), start, grads),
        run_torch(torch.optim.SGD, options | {"fused": True}, start, grads),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactor_has_the_bits_of_torch(shape: tuple[int, ...]) -> None:
    start, grads = numbers(shape)
    ours = run_ours(Adafactor(lr=RATE, weight_decay=0.1), start, grads)
    assert_same(ours, run_torch(torch.optim.Adafactor, {"weight_decay": 0.1, "foreach": False}, start, grads))


TORCH_CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("ASGD", {}),
    ("Adadelta", {"rho": 0.8}),
    ("Adafactor", {}),
    ("Adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"betas": (0.8, 0.9)}),
    ("Adamax", {}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("Rprop", {}),
    ("SGD", {"momentum": 0.9}),
]


@pytest.mark.parametrize("shape", [(37,), (24, 40)], ids=str)
@pytest.mark.parametrize(("name", "options"), TORCH_CLASSES, ids=[name for name, _ in TORCH_CLASSES])
def test_any_torch_class_has_its_own_bits(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    cls = getattr(torch.optim, name)
    start, grads = numbers(shape)
    decay = {} if name == "Rprop" else {"weight_decay": 0.1}
    ours = run_ours(Torch(cls, lr=RATE, **decay, **options), start, grads)
    assert_same(ours, run_torch(cls, options | decay | {"foreach": False}, start, grads))


def test_muon_takes_matrices_and_refuses_vectors() -> None:
    start, grads = numbers((24, 40))
    muon = Torch(torch.optim.Muon, lr=RATE, weight_decay=0.1)
    assert_same(run_ours(muon, start, grads), run_torch(torch.optim.Muon, {"weight_decay": 0.1}, start, grads))
    with pytest.raises(ConfigError, match=r"shape \(7,\).*2D"):
        muon.states((7,))


def lion_reference(
    start: Tensor, grads: list[Tensor], betas: tuple[float, float], decay: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of Chen et al. 2023, line by line in fp64."""
    param, moment = start.double(), torch.zeros_like(start).double()
    for step, grad in enumerate(grads, 1):
        direction = (betas[0] * moment + (1 - betas[0]) * grad.double()).sign()
        param = param - RATE(step) * (direction + decay * param)
        moment = betas[1] * moment + (1 - betas[1]) * grad.double()
    return param, moment


@pytest.mark.parametrize("elements", [24, 300_000])
def test_lion_is_the_algorithm_of_the_paper(elements: int) -> None:
    start, grads = numbers((2, elements // 2))
    param, state = run_ours(Lion(lr=RATE, betas=(0.9, 0.98), weight_decay=0.3), start, grads)
    expected, moment = lion_reference(start, grads, (0.9, 0.98), 0.3)
    # Ten steps of fp32 rounding; no direction may flip, which would show as twice the learning rate.
    torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg"].double(), moment, rtol=1e-5, atol=1e-6)


ELEMENTWISE = [AdamW(lr=RATE, weight_decay=0.1), SGD(lr=RATE, weight_decay=0.1), Lion(lr=RATE, weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", ELEMENTWISE, ids=lambda optimizer: type(optimizer).__name__)
def test_bits_depend_neither_on_threads_nor_on_panels(optimizer: Optimizer) -> None:
    start, grads = numbers((3, 100_003), steps=3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run_ours(optimizer, start, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(results[0], other)
    assert optimizer.elementwise
    whole, cut = results[0], 16 * 5001
    low, _ = run_ours(optimizer, start.view(1, -1)[:, :cut].contiguous(), [g.view(1, -1)[:, :cut] for g in grads])
    high, _ = run_ours(optimizer, start.view(1, -1)[:, cut:].contiguous(), [g.view(1, -1)[:, cut:] for g in grads])
    assert torch.equal(torch.cat([low, high], 1).view_as(whole[0]), whole[0])


def test_count_and_not_step_corrects_the_bias() -> None:
    start, grads = numbers((5, 4), steps=1)
    fresh, late = AdamW(lr=1e-3), AdamW(lr=1e-3)
    first, second = start.clone(), start.clone()
    for optimizer, param, step in ((fresh, first, 1), (late, second, 9)):
        state = {name: torch.zeros(shape) for name, (_, shape) in optimizer.states((5, 4)).items()}
        optimizer.update(param, grads[0], state, name="w", step=step, count=1)
    assert torch.equal(first, second)


class Mixing(torch.optim.SGD):
    """Scales every gradient by the norm over all tensors."""

    def step(self, closure: Any = None) -> Any:
        norm = sum(p.grad.norm() for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(norm)
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Keeps a count in its parameter group."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


class Numbered(torch.optim.SGD):
    """Keeps plain numbers beside tensors."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            p.data.mul_(1.0 - 0.001 * self.state[p]["count"])
        return super().step(closure)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (torch.optim.LBFGS, "closure"),
        (torch.optim.SparseAdam, "dense gradients"),
        (Mixing, "mixes tensors"),
        (Counting, "per parameter group"),
    ],
)
def test_classes_that_do_not_work_per_tensor_are_refused(cls: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"Torch\({cls.__name__}\) cannot run at the store: .*{reason}"):
        Torch(cls)


def test_plain_numbers_in_the_state_become_tensors() -> None:
    optimizer = Torch(Numbered, lr=RATE, momentum=0.9)
    assert optimizer.states((2, 2))["count"] == (torch.int64, ())
    start, grads = numbers((4, 4))
    param, state = run_ours(optimizer, start, grads)
    assert state["count"].item() == 10
    assert torch.equal(param, run_torch(Numbered, {"momentum": 0.9}, start, grads)[0])


EVERY = [
    AdamW(lr=cosine(3e-4, warmup=5, steps=50), groups=(Group(pattern="*.bias", lr_scale=2.0, weight_decay=0.3),)),
    SGD(lr=0.1, nesterov=True),
    Lion(betas=(0.95, 0.98), weight_decay=1.0),
    Adafactor(lr=wsd(1e-2, warmup=2, steps=9, decay=3), eps=(1e-30, 1e-3)),
    Torch(torch.optim.RAdam, lr=constant(1e-3, warmup=4), betas=(0.8, 0.99)),
    Torch(torch.optim.Rprop, step_sizes=(1e-6, 10)),
    Torch(Numbered),
]


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda optimizer: type(optimizer).__name__)
def test_json_round_trip(optimizer: Optimizer) -> None:
    text = json.dumps(optimizer.to_json(), allow_nan=False)
    assert Optimizer.from_json(json.loads(text)) == optimizer
    assert not {"lr", "weight_decay", "groups"} & optimizer.fixed().keys()
    assert optimizer.fixed()["class"] == type(optimizer).__name__
    json.dumps(optimizer.fixed(), allow_nan=False)


def test_fixed_leaves_out_what_may_change() -> None:
    assert AdamW(lr=1.0, weight_decay=0.0).fixed() == AdamW(lr=constant(2.0), groups=(Group(pattern="*"),)).fixed()
    assert AdamW(betas=(0.9, 0.95)).fixed() != AdamW().fixed()
    assert Torch(torch.optim.RAdam, eps=1e-6).fixed() != Torch(torch.optim.RAdam).fixed()


def test_groups_and_the_default_decay_rule() -> None:
    optimizer = AdamW(
        lr=1.0,
        weight_decay=0.1,
        groups=(
            Group(pattern="*.embed.*", weight_decay=0.0),
            Group(pattern="*.norm.weight", weight_decay=0.5),
            Group(pattern="*", lr_scale=0.5),
        ),
    )
    assert optimizer.weight_decay_of("a.embed.weight", 2) == 0.0
    assert optimizer.weight_decay_of("a.norm.weight", 1) == 0.5
    assert optimizer.weight_decay_of("a.q.weight", 2) == 0.1
    assert optimizer.weight_decay_of("a.q.bias", 1) == 0.0
    assert [optimizer.lr_at(1, name) for name in ("a.embed.weight", "a.q.weight")] == [1.0, 0.5]
    assert optimizer.lr_at(1) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=-1.0), "AdamW: lr must be a number at least 0"),
        (lambda: AdamW(lr=math.nan), "AdamW: lr"),
        (lambda: AdamW(lr="3e-4"), "AdamW: lr .* found '3e-4'"),  # type: ignore[arg-type]
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas\[1\] must be a number at least 0 and below 1, found 1.0"),
        (lambda: AdamW(betas=(0.9,)), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: AdamW(weight_decay=-0.1), "weight_decay"),
        (lambda: AdamW(groups=({"pattern": "*"},)), "Group objects"),  # type: ignore[arg-type]
        (lambda: SGD(momentum=0.0, nesterov=True), "nesterov needs momentum"),
        (lambda: Adafactor(d=0.5), "Adafactor: d"),
        (lambda: Adafactor(beta2_decay=0.5), "at most 0"),
        (lambda: Group(pattern=""), "pattern"),
        (lambda: Group(pattern="*", lr_scale=-1), "lr_scale"),
        (lambda: Torch(torch.optim.RAdam, beta=1), "has no argument 'beta'; it has params|has no argument 'beta'"),
        (lambda: Torch(torch.optim.Rprop, weight_decay=0.1), "has no weight_decay"),
        (lambda: Torch(dict), "subclass of torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda: Torch(torch.optim.RAdam, betas=(2.0, 0.9)), "Invalid beta"),
        (lambda: Optimizer.from_json({"class": "Adam"}), "expected one of .*AdamW.* found 'Adam'"),
        (lambda: Optimizer.from_json({"class": "AdamW", "beta": 1}), "unexpected keyword argument 'beta'"),
        (lambda: Optimizer.from_json(Torch(Numbered).to_json() | {"optimizer_class": "a.b:C"}), "import module a.b"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_schedule_values() -> None:
    assert [constant(2.0, warmup=4)(step) for step in (1, 2, 4, 5, 10**6)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [linear(1.0, warmup=2, steps=6, end=0.2)(step) for step in (1, 2, 4, 6, 7)] == [0.5, 1.0, 0.6, 0.2, 0.2]
    assert [round(cosine(1.0, steps=4)(step), 6) for step in range(1, 6)] == [0.853553, 0.5, 0.146447, 0.0, 0.0]
    assert cosine(1.0, warmup=10, steps=20, end=0.1)(10) == 1.0
    assert [wsd(1.0, warmup=2, steps=10, decay=4)(step) for step in (1, 2, 6, 7, 9, 10, 11)] == [
        0.5, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0,
    ]  # fmt: skip


@given(
    st.sampled_from([constant(1.0, warmup=7), linear(1.0, warmup=3, steps=9), cosine(1.0, steps=9, end=0.5)])
    | st.builds(
        lambda warmup, decay, rest: wsd(1.0, warmup=warmup, steps=warmup + decay + rest, decay=decay),
        st.integers(0, 9), st.integers(1, 9), st.integers(0, 9),
    ),
    st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_schedules_stay_in_bounds_and_survive_json(schedule: Schedule, step: int) -> None:
    assert 0.0 <= schedule(step) <= 1.0
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(1.0, warmup=5, steps=5), "steps must be a whole number above warmup"),
        (lambda: cosine(math.inf, steps=5), "cosine schedule: lr"),
        (lambda: constant(1.0, warmup=-1), "warmup"),
        (lambda: wsd(1.0, steps=5, decay=6), r"decay must be a number of steps from 1 to steps - warmup \(5\)"),
        (lambda: constant(1.0)(0), "count from 1"),
        (lambda: schedule_from_json({"schedule": "step"}), "expected one of constant"),
        (lambda: schedule_from_json({"schedule": "constant", "steps": 3}), "unexpected keyword"),
    ],
)
def test_impossible_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
