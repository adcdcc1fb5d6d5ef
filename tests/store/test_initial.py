"""Initial values: equal bits however the range is cut, the right distributions, and the model's own initialisation."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightstream.errors import AuditError, StoreError
from weightstream.store import random_numbers
from weightstream.store.initial import Recipe, generate, generate_range, record
from weightstream.store.recipes import Region, Step


def recipe_of(*steps: Step) -> Recipe:
    return Recipe(steps)


NORMAL = recipe_of(Step("normal", (0.0, 0.02)))
LAYERED = recipe_of(
    Step("normal", (0.5, 2.0)),
    Step("uniform", (-1.0, 3.0), Region(70, (20, 5), (37, 2)), draw=1),
    Step("multiply", (0.3,), Region(100, (900,), (1,))),
    Step("fill", (0.0,), Region(37 * 4, (37,), (1,))),
    Step("literal", (1.0, 2.0, 3.0), Region(1000, (3,), (90,))),
    Step("truncated_normal", (0.0, 1.0, -1.0, 1.0, 0.158655, 0.841345), Region(1200, (300,), (1,)), draw=2),
    Step("clamp", (-math.inf, 2.5)),
)


@given(st.data(), st.sampled_from([NORMAL, LAYERED]))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_range_gives_equal_bits(data: Any, recipe: Recipe) -> None:
    shape = (50, 37)
    whole = generate(recipe, seed=3, name="a.weight", shape=shape).view(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=5)))
    edges = [0, *cuts, whole.numel()]
    pieces = [generate_range(recipe, 3, "a.weight", shape, low, high) for low, high in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)


def test_cuts_far_apart_and_across_chunks() -> None:
    shape = (3, 100_001)
    whole = generate(NORMAL, seed=3, name="w", shape=shape).view(-1)
    for low, high in ((0, 40_000), (32_761, 32_777), (99_999, 300_003), (300_002, 300_003), (5, 5)):
        assert torch.equal(generate_range(NORMAL, 3, "w", shape, low, high), whole[low:high])
    beyond = 10**13  # a part of a tensor that no machine holds
    assert generate_range(NORMAL, 3, "w", (2 * beyond,), beyond, beyond + 5).shape == (5,)


def test_bits_are_those_of_every_machine() -> None:
    values = generate(LAYERED, seed=11, name="model.embed.weight", shape=(50, 37))
    assert hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest() == (
        "6015488416e4ad935e645dc68bdeed0e2a8346f1e9cc2243666e4d640f21c97b"
    )
    assert values.view(-1)[1000].item() == 1.0
    assert not values[4].any()


def philox_words(key: int, counter: int) -> list[int]:
    """One block of Philox 4x64-10, in whole numbers (Salmon et al. 2011)."""
    mask = 2**64 - 1
    low, high = key & mask, key >> 64
    x = [(counter >> 64 * i) & mask for i in range(4)]
    for _ in range(10):
        first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(second >> 64) ^ x[1] ^ low, second & mask, (first >> 64) ^ x[3] ^ high, first & mask]
        low, high = (low + 0x9E3779B97F4A7C15) & mask, (high + 0xBB67AE8584CAA73B) & mask
    return x


def plain_log(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.70710678118654752440:
        mantissa, exponent = mantissa * 2, exponent - 1
    f = mantissa - 1.0
    s = f / (f + 2.0)
    z, series, half = s * s, 0.0, f * f * 0.5
    for coefficient in reversed(random_numbers._LOG):
        series = (series + coefficient) * z
    series = (series + half) * s
    return exponent * random_numbers._LN2_HIGH - ((half - (series + exponent * random_numbers._LN2_LOW)) - f)


def plain_normal(word: int) -> float:
    """Algorithm AS 241 in the order of the paper, one number at a time, in Python's own floats."""

    def ratio(x: float, sides: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
        over, under = 0.0, 0.0
        for a, b in zip(reversed(sides[0]), reversed(sides[1]), strict=True):
            over, under = over * x + a, under * x + b
        return over / under

    q = word * 2.0**-32 + (2.0**-33 - 0.5)
    if abs(q) <= 0.425:
        return q * ratio(0.180625 - q * q, random_numbers._CENTRE)
    r = math.sqrt(-plain_log(0.5 - abs(q)))
    value = ratio(r - 1.6, random_numbers._MIDDLE) if r <= 5 else ratio(r - 5, random_numbers._FAR)
    return math.copysign(value, q)


def test_bits_are_those_of_plain_arithmetic() -> None:
    """Vector loops of a machine round as a plain machine does, one operation at a time."""
    key = int.from_bytes(hashlib.sha256(b"weightstream initial values\x005\0w").digest()[:16], "little")
    start, draw = 8 * 10**9, 3
    expected = []
    for block in range(start // 8, start // 8 + 200):
        for word in philox_words(key, block + 1 + (draw << 192)):
            expected += [plain_normal(word & (2**32 - 1)), plain_normal(word >> 32)]
    recipe = recipe_of(Step("normal", (0.0, 1.0), draw=draw))
    values = generate_range(recipe, 5, "w", (10**11,), start, start + 1600)
    assert values.tolist() == np.array(expected).astype(np.float32).tolist()
    words = np.array([0, 2**32 - 1, 5, 2**31, 12345678, 4 * 10**9], dtype=np.uint32)
    assert random_numbers.normal(words).tolist() == [plain_normal(int(word)) for word in words]


def test_values_depend_on_seed_name_and_draw() -> None:
    def first(seed: int, name: str, draw: int) -> Tensor:
        return generate(recipe_of(Step("normal", (0.0, 1.0), draw=draw)), seed=seed, name=name, shape=(8,))

    distinct = [first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)]
    assert len({tuple(values.tolist()) for values in distinct}) == 4


def test_threads_and_order_do_not_matter() -> None:
    shape, step = (400_000,), 50_000
    out = torch.empty(shape)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(generate_range, NORMAL, 0, "w", shape, low, low + step, out[low : low + step])
            for low in reversed(range(0, shape[0], step))
        ]
        for job in jobs:
            job.result()
    assert torch.equal(out, generate(NORMAL, seed=0, name="w", shape=shape))


def sample(operation: Any, *values: float, elements: int = 400_000) -> np.ndarray[Any, Any]:
    recipe = recipe_of(Step(operation, values))
    return generate(recipe, seed=5, name="w", shape=(elements,)).double().numpy()


def kolmogorov_smirnov(
    values: np.ndarray[Any, Any], cdf: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> float:
    """The statistic times the root of the sample size; 1.95 is exceeded once in a thousand."""
    ordered = np.sort(values)
    steps = np.arange(1, len(ordered) + 1) / len(ordered)
    return float(np.abs(cdf(ordered) - steps).max() * math.sqrt(len(ordered)))


def normal_cdf(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 0.5 * (1 + torch.erf(torch.from_numpy(values) / math.sqrt(2))).numpy()


def test_normal_values() -> None:
    values = sample("normal", 0.0, 1.0)
    assert abs(values.mean()) < 4 / math.sqrt(len(values))
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / len(values))
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / len(values))
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / len(values))
    assert kolmogorov_smirnov(values, normal_cdf) < 1.95
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))


def test_uniform_values() -> None:
    values = sample("uniform", -2.0, 6.0)
    assert values.min() >= -2.0
    assert values.max() <= 6.0
    assert kolmogorov_smirnov(values, lambda x: (x + 2) / 8) < 1.95


def test_truncated_normal_values() -> None:
    low, high = NormalDist().cdf(-1.0), NormalDist().cdf(2.0)
    values = sample("truncated_normal", 1.0, 2.0, -1.0, 5.0, low, high)
    assert values.min() >= -1.0
    assert values.max() <= 5.0
    assert kolmogorov_smirnov(values, lambda x: (normal_cdf((x - 1) / 2) - low) / (high - low)) < 1.95


def test_functions_made_of_exact_operations_are_accurate() -> None:
    probabilities = np.concatenate(
        [np.geomspace(1e-300, 0.4, 500), np.linspace(0.01, 0.99, 999), 1 - np.geomspace(1e-15, 0.4, 99)]
    )
    inverse = NormalDist().inv_cdf
    for p in probabilities[(probabilities > 1e-16)]:
        ours = random_numbers.probit(np.array([p - 0.5]))[0]
        assert ours == pytest.approx(inverse(p - 0.5 + 0.5), rel=1e-13, abs=1e-15)
    arguments = np.concatenate([np.geomspace(1e-310, 1e300, 4001), np.linspace(0.5, 2.0, 4001)])
    np.testing.assert_allclose(random_numbers.log(arguments), np.log(arguments), rtol=3e-16)
    assert random_numbers.log(np.array([0.0, np.inf, 1.0])).tolist() == [-math.inf, math.inf, 0.0]
    assert np.isnan(random_numbers.log(np.array([-1.0, np.nan]))).all()
    x = np.linspace(-0.999999, 0.999999, 2001)
    theirs = torch.erfinv(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(random_numbers.erfinv(x), theirs, rtol=1e-9, atol=1e-15)
    assert random_numbers.probit(np.array([-0.5, 0.5])).tolist() == [-math.inf, math.inf]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_regions_are_those_of_torch_views(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    base = torch.zeros(shape)
    view = base
    for dim in range(len(shape)):
        start = data.draw(st.integers(0, shape[dim] - 1))
        stop = data.draw(st.integers(start + 1, shape[dim]))
        view = view[(slice(None),) * dim + (slice(start, stop, data.draw(st.integers(1, 3))),)]
    if data.draw(st.booleans()):
        view = view.transpose(0, -1)
    region = Region.of(view.storage_offset(), view.shape, view.stride())
    assert region is not None
    view.fill_(1.0)
    recipe = recipe_of(Step("fill", (0.0,)), Step("fill", (1.0,), region))
    assert torch.equal(generate(recipe, seed=0, name="w", shape=shape), base)
    assert region.numel == int(base.sum())


@pytest.mark.parametrize("recipe", [NORMAL, LAYERED, recipe_of(Step("normal", (0.0, 1.0), draw=2, source="other"))])
def test_recipes_survive_json(recipe: Recipe) -> None:
    text = json.dumps(recipe.to_json(), allow_nan=False)
    assert Recipe.from_json(json.loads(text)) == recipe


def test_a_recipe_of_a_later_version_is_refused() -> None:
    with pytest.raises(StoreError, match="found 'cauchy'"):
        Recipe.from_json([{"operation": "cauchy"}])


def small_models() -> Iterator[Any]:
    common: dict[str, Any] = {
        "vocab_size": 601, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3,
    }  # fmt: skip
    t = transformers
    causal = t.AutoModelForCausalLM.from_config
    yield "llama", lambda: causal(t.LlamaConfig(**common))
    yield "llama tied bf16", lambda: causal(t.LlamaConfig(**common, tie_word_embeddings=True), dtype=torch.bfloat16)
    yield "mixtral", lambda: causal(t.MixtralConfig(**common, num_local_experts=4))
    gpt2 = t.GPT2Config(vocab_size=601, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    yield "gpt2", lambda: causal(gpt2)
    t5 = t.T5Config(vocab_size=601, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    yield "t5", lambda: t.T5ForConditionalGeneration(t5)
    vit = t.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    yield "vit", lambda: t.ViTForImageClassification(vit)
    bert = t.BertConfig(
        vocab_size=601, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    yield "bert", lambda: t.BertForMaskedLM(bert)
    yield "encoder", lambda: nn.TransformerEncoderLayer(64, 4, 128)
    yield "lstm", lambda: nn.LSTM(32, 64, 2)
    yield "convolutions", lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32), nn.Bilinear(9, 8, 7))


MODELS = dict(small_models())


@pytest.mark.parametrize("name", MODELS)
def test_models_start_as_they_do_in_memory(name: str) -> None:
    model, recipes = record(MODELS[name], seed=0)
    torch.manual_seed(0)
    theirs = MODELS[name]()
    assert list(recipes) == [name for name, _ in theirs.named_parameters()]
    assert all(parameter.is_meta for parameter in model.parameters())
    for (ours_name, ours), (their_name, other) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert ours_name == their_name
        assert (ours.shape, ours.dtype, ours.requires_grad) == (other.shape, other.dtype, other.requires_grad)
        values = generate(recipes[ours_name], seed=0, name=ours_name, shape=ours.shape)
        assert_alike(ours_name, values, other.detach().float())
    buffers = dict(theirs.named_buffers())
    for buffer_name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers.pop(buffer_name)), buffer_name
    assert not buffers
    # A tied parameter is one parameter still.
    assert len({id(p) for p in model.parameters()}) == len({id(p) for p in theirs.parameters()})
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(
        list(theirs.named_parameters(remove_duplicate=False))
    )


def assert_alike(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Equal where constant; else of equal mean, spread and extent, as far as samples of this size tell."""
    assert torch.equal(ours == 0, theirs == 0) or theirs.numel() > 10**5, name
    spread, count = theirs.std().item() if theirs.numel() > 1 else 0.0, theirs.numel()
    if spread == 0.0:
        assert torch.equal(ours, theirs), name
        return
    assert abs(ours.mean() - theirs.mean()).item() < 5.5 * spread * math.sqrt(2 / count), name
    assert ours.std().item() == pytest.approx(spread, rel=5 * math.sqrt(2 / count)), name
    # Kolmogorov and Smirnov's distance of two samples; the bound is exceeded once in ten million.
    edges = torch.cat([ours.flatten(), theirs.flatten()]).sort().values
    below = [torch.searchsorted(side.flatten().sort().values, edges, right=True) / count for side in (ours, theirs)]
    assert (below[0] - below[1]).abs().max().item() < 2.9 * math.sqrt(2 / count), name


class Custom(nn.Module):
    """One parameter, initialised by a function of the test."""

    def __init__(self, start: Callable[["Custom"], None]) -> None:
        super().__init__()
        start(self)


def recorded(start: Callable[[Custom], None]) -> tuple[Custom, dict[str, Recipe]]:
    return record(lambda: Custom(start), seed=0)


def recipe_after(change: Callable[[Tensor], Any], shape: tuple[int, ...] = (6, 4)) -> str:
    def start(module: Custom) -> None:
        module.weight = nn.Parameter(torch.empty(shape))
        with torch.no_grad():
            change(module.weight)

    return str(recorded(start)[1]["weight"])


def old_truncated_normal(w: Tensor) -> None:
    w.uniform_(-0.5, 0.5).erfinv_().mul_(0.02 * math.sqrt(2)).add_(1.0).clamp_(min=-2, max=2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nn.init.ones_, "fill(1)"),
        (lambda w: nn.init.constant_(w, 0.25), "fill(0.25)"),
        (lambda w: nn.init.xavier_uniform_(w, gain=2.0), "uniform(-1.54919, 1.54919)"),
        (nn.init.kaiming_normal_, "normal(0, 0.707107)"),
        (lambda w: nn.init.trunc_normal_(w, std=2.0), "truncated_normal(0, 2, -2, 2, 0.158655, 0.841345)"),
        (old_truncated_normal, "uniform(-0.5, 0.5), erfinv(), multiply(0.0282843), add(1), clamp(-2, 2)"),
        (nn.init.eye_, "fill(0), fill(1) on 4 elements from 0"),
        (lambda w: w.copy_(torch.randn(6, 4) * 0.5 - 1), "normal(0, 1), multiply(0.5), add(-1)"),
        (lambda w: w.copy_(torch.rand(4, 6).t()), "uniform(0, 1)"),
        (lambda w: w.copy_(3 - 2 / torch.rand(6, 4)), "uniform(0, 1), reciprocal(), multiply(2), multiply(-1), add(3)"),
        (lambda w: w.data.normal_(std=3)[2].zero_(), "normal(0, 3), fill(0) on 4 elements from 8"),
        (lambda w: w.normal_()[:, 1].fill_(2), "normal(0, 1), fill(2) on 6 elements from 1"),
        (
            lambda w: [w[:3].normal_(), w[3:].zero_()],
            "normal(0, 1) on 12 elements from 0, fill(0) on 12 elements from 12",
        ),
        (lambda w: w.copy_(torch.arange(4)), "literal(0, 1, 2, …)"),
        (
            lambda w: w.zero_()[0].copy_(torch.log(torch.ones(4))),
            "fill(0), fill(1) on 4 elements from 0, log() on 4 elements from 0",
        ),
        (lambda w: w.fill_(torch.tensor(2.0)).mul_(torch.tensor(3.0)), "fill(2), multiply(3)"),
        (lambda w: nn.init.orthogonal_(w).normal_(), "normal(0, 1)"),
        (lambda w: torch.zeros(6, 4, out=w), "fill(0)"),
    ],
)
def test_what_initialisers_do_becomes_steps(change: Callable[[Tensor], Any], expected: str) -> None:
    assert recipe_after(change) == expected


def test_values_of_deterministic_recipes_equal_torch() -> None:
    def dirac(module: Custom) -> None:
        module.weight = nn.Parameter(torch.empty(6, 4, 3))
        nn.init.dirac_(module.weight, groups=2)
        module.grid = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).t())
        module.scale = nn.Parameter(torch.tensor(2.6592))
        module.mixed = nn.Parameter(torch.zeros(5, 4))
        module.mixed.data[1::2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    model, recipes = recorded(dirac)
    for name, parameter in Custom(dirac).named_parameters():
        assert torch.equal(generate(recipes[name], seed=0, name=name, shape=parameter.shape), parameter.detach()), name
        assert model.get_parameter(name).is_contiguous()


def test_parameters_that_start_equal_in_memory_start_equal_here() -> None:
    def start(module: Custom) -> None:
        start = torch.randn(5, 5)
        module.first, module.second = nn.Parameter(start), nn.Parameter(start.clone() * 2)
        module.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)

    model, recipes = recorded(start)
    values = {n: generate(recipes[n], seed=0, name=n, shape=p.shape) for n, p in model.named_parameters()}
    assert torch.equal(values["second"], 2 * values["first"])
    assert torch.equal(values["layers.layers.0.linear1.weight"], values["layers.layers.1.linear1.weight"])
    assert not torch.equal(
        values["layers.layers.0.linear1.weight"][:8, :8], values["layers.layers.0.linear2.weight"][:8, :8]
    )


def test_references_from_before_registration_count() -> None:
    def start(module: Custom) -> None:
        weight = nn.Parameter(torch.empty(4, 4))
        module.weight = weight
        nn.init.normal_(weight)
        module.others = nn.ParameterList([weight])

    model, recipes = recorded(start)
    assert str(recipes["weight"]) == "normal(0, 1)"
    assert list(recipes) == ["weight"]
    assert model.others[0] is model.weight


def test_the_data_of_a_parameter_can_be_replaced() -> None:
    def start(module: Custom) -> None:
        module.norm = nn.LayerNorm(4)
        module.norm.weight.data = torch.full((4,), 0.5)

    model, recipes = recorded(start)
    assert str(recipes["norm.weight"]) == "fill(0.5)"
    assert model.norm.weight.is_meta


def test_parameters_that_never_were_registered() -> None:
    def start(module: Custom) -> None:
        module.first, module.second = nn.Linear(3, 3), nn.Linear(3, 3)
        module.first._parameters["weight"] = module.second._parameters["weight"] = nn.Parameter(torch.ones(3, 3))

    model, recipes = recorded(start)
    assert model.first.weight is model.second.weight
    assert model.first.weight.is_meta
    assert str(recipes["first.weight"]) == "fill(1)"


def test_large_models_take_no_memory() -> None:
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss

    def start(module: Custom) -> None:
        module.layers = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(16))
        module.table = nn.Parameter(torch.randn(2**14, 2**14))

    model, recipes = recorded(start)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20
    assert sum(p.numel() for p in model.parameters()) * 4 > 2 * 2**30
    assert str(recipes["table"]) == "normal(0, 1)"


def test_a_parameter_may_exceed_the_address_space() -> None:
    def start(module: Custom) -> None:
        module.wide = nn.Linear(2**24, 2**20, bias=False)  # 64 TiB
        module.drawn, module.filled = nn.Parameter(torch.randn(2**45)), nn.Parameter(torch.zeros(2**45))

    model, recipes = recorded(start)
    assert {name: str(recipe) for name, recipe in recipes.items()} == {
        "drawn": "normal(0, 1)",
        "filled": "fill(0)",
        "wide.weight": "uniform(-0.000244141, 0.000244141)",
    }
    low = 2**44 - 5
    values = generate_range(recipes["wide.weight"], 0, "wide.weight", model.wide.weight.shape, low, low + 5)
    assert values.abs().max().item() <= 2.0**-12


def test_the_callers_random_state_is_left_alone_and_buffers_follow_the_seed() -> None:
    def start(module: Custom) -> None:
        module.register_buffer("noise", torch.randn(3))
        module.weight = nn.Parameter(torch.ones(2))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    model, _ = record(lambda: Custom(start), seed=7)
    assert torch.equal(before, torch.get_rng_state())
    again, _ = record(lambda: Custom(start), seed=7)
    assert torch.equal(model.noise, again.noise)
    other, _ = record(lambda: Custom(start), seed=8)
    assert not torch.equal(model.noise, other.noise)


def write_through_a_view(w: Tensor) -> None:
    base = torch.zeros(8, 4)
    holder = nn.Module()
    holder.part = nn.Parameter(base[:6])
    base.normal_()
    w.copy_(holder.part)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: None, r"weight: was never filled"),
        (lambda w: w[:2].zero_(), r"weight: was never filled, at least in part"),
        (
            nn.init.orthogonal_,
            r"weight: orthogonal_ in .*\(test_initial.py:\d+\) cannot be replayed; import the weights",
        ),
        (lambda w: nn.init.sparse_(w, 0.5), "weight: sparse_"),
        (lambda w: w.exponential_(), "weight: exponential_ in <lambda>"),
        (lambda w: w.normal_().div_(w.norm()), "weight: div_"),
        (lambda w: w.copy_(torch.exp(torch.randn(6, 4))), "weight: exp in"),
        (lambda w: w.copy_(torch.randn(6, 1)), "weight: copy_ of a part"),
        (lambda w: w.copy_(torch.randn(1, 4).expand(6, 4).clone()), "weight: copy_ of a part|weight: clone"),
        (lambda w: w.copy_(torch.cat([torch.randn(3, 4), torch.zeros(3, 4)])), "weight: cat"),
        (lambda w: w.normal_().masked_fill_(w > 1, 0.0), "weight: masked_fill_"),
        (
            lambda w: w.normal_().index_fill_(0, torch.tensor([1]), 0.0),
            "index_fill_",
        ),
        (lambda w: w.copy_(torch.randperm(24).view(6, 4)), "weight: randperm"),
        (write_through_a_view, "weight: a change through another view"),
        (lambda w: w.zero_().view(torch.int32).fill_(7), "weight: a view as torch.int32"),
        (
            lambda w: w.normal_().sum().item(),
            r"parameter 'weight' of a Custom.*|tensor on the meta device.*numbers in it",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(change: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(AuditError, match=reason):
        recipe_after(change)


def table(module: Custom) -> None:
    module.table = nn.Parameter(torch.sin(torch.arange(80.0 * 80).view(80, 80)))


def in_two_orders(module: Custom) -> None:
    values = torch.randn(4, 4)
    module.first, module.second = nn.Parameter(values), nn.Parameter(values.t().clone())


def shared_memory(module: Custom) -> None:
    module.first = nn.Parameter(torch.ones(4))
    module.second = nn.Parameter(module.first.data)


def integers(module: Custom) -> None:
    module.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)


def on_meta(module: Custom) -> None:
    with torch.device("meta"):
        module.register_buffer("mask", torch.ones(3))


def many(module: Custom) -> None:
    module.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(9))
    for layer in module.layers:
        nn.init.orthogonal_(layer.weight)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (table, r"table: copy_ from a tensor of data of shape \(80, 80\)"),
        (in_two_orders, "second: holds random values of 'first' in another order"),
        (shared_memory, "second: shares its memory with 'first'"),
        (integers, "weight: is of torch.int8"),
        (on_meta, "buffer 'mask' .* has no numbers; .*leave torch.device"),
        (
            lambda m: setattr(m, "layer", nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))),
            r"buffer 'layer.parametrizations.weight.0._[uv]' .* is computed from a parameter's numbers",
        ),
        (many, r"9 parameter\(s\) cannot be replayed:\n  layers.0.weight: orthogonal_(.|\n)*and 4 more"),
        (lambda m: setattr(m, "layer", nn.LazyLinear(3)), "LazyLinear has no shape before the first use"),
    ],
)
def test_models_that_are_refused(start: Callable[[Custom], None], reason: str) -> None:
    with pytest.raises(AuditError, match=reason):
        recorded(start)


def test_a_model_from_outside_is_refused() -> None:
    model = nn.Linear(200, 200, bias=False)
    with pytest.raises(AuditError, match="weight: copy_ from a tensor of data"):
        record(lambda: model, seed=0)
    with pytest.raises(AuditError, match=r"must return a torch.nn.Module, found int"):
        record(lambda: 3, seed=0)  # type: ignore[type-var, return-value]


def test_recording_does_not_import_the_compiler() -> None:
    """`torch._dynamo` takes seconds, and every start of an engine records a model."""
    code = (
        "import sys; from torch import nn; from weightstream.store.initial import record; "
        "record(lambda: nn.Linear(2, 2), 0); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pytorch_is_left_as_it_was() -> None:
    before = nn.init._no_grad_trunc_normal_, dict(nn.modules.module._global_parameter_registration_hooks)
    with pytest.raises(AuditError):
        recorded(many)
    assert (nn.init._no_grad_trunc_normal_, dict(nn.modules.module._global_parameter_registration_hooks)) == before
    assert not nn.Linear(2, 2).weight.is_meta
