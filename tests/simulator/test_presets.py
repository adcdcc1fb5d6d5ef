"""Presets: parameters as their names say, facts that the planner takes, and refusals that name what is wrong."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstream.errors import ConfigError, PlanError
from weightstream.schedule.planner import build
from weightstream.schedule.verify import verify
from weightstream.simulator import jobs
from weightstream.simulator.clusters import CLUSTERS, cluster_named
from weightstream.simulator.jobs import PROVISIONED_BYTES, Job, prepare, shortened
from weightstream.simulator.models import MODELS, ModelShape, SparseShape, model_named


def job(model: str, cluster: str = "cs-2", *, workers: int = 1, each: float = 2, **settings: object) -> Job:
    chosen = MODELS[model]
    return Job(
        model=chosen,
        cluster=CLUSTERS[cluster],
        workers=workers,
        batch=each * workers,
        sequence=chosen.sequence,
        **settings,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_parameters_are_those_of_the_name(model: ModelShape) -> None:
    assert model.parameters == pytest.approx(model.named, rel=model.named_within)
    assert model.source


def test_a_token_costs_what_was_published_of_gpt_j() -> None:
    """1.59 PFLOP/s at 19.8 samples per second of 2,048 tokens: forward and backward, without recomputation."""
    assert 3 * MODELS["gpt-j-6b"].forward_flops() * 2048 * 19.8 == pytest.approx(1.59e15, rel=0.05)


def test_memory_of_120_trillion_parameters_is_what_was_announced() -> None:
    assert PROVISIONED_BYTES * MODELS["120t"].parameters == pytest.approx(2.4e15, rel=0.01)


@given(
    layers=st.integers(1, 6), width=st.integers(1, 64).map(lambda heads: heads * 8), experts=st.integers(1, 9),
    used=st.integers(1, 3), every=st.integers(1, 3), tied=st.booleans(), most=st.integers(64, 200_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_cutting_layers_changes_neither_parameters_nor_cost(
    layers: int, width: int, experts: int, used: int, every: int, tied: bool, most: int
) -> None:
    model = ModelShape(
        name="any", named=0, layers=layers, width=width, heads=width // 8, intermediate=3 * width, vocabulary=97, sequence=64,
        experts=experts, experts_per_token=used, expert_every=every, tied=tied,
    )  # fmt: skip
    whole, cut = model.parts(), model.parts(most)
    assert sum(part.parameters for part in whole) + (0 if tied else model.table_parameters) == model.parameters
    assert all(part.parameters <= most for part in cut)
    # the router alone is left out where experts are blocks of their own
    routers = sum(width * experts for layer in range(layers) if model.experts_of(layer) > 1)
    assert 0 <= sum(part.parameters for part in whole) - sum(part.parameters for part in cut) <= routers
    cost = [sum(part.forward_flops(64) for part in parts) for parts in (whole, cut)]
    assert cost[1] == pytest.approx(cost[0], abs=2 * routers + 1e-6 * cost[0])
    heads = model.heads_within(most)
    assert sum(part.parameters for part in heads) == model.table_parameters


TOO_LARGE = {(model, cluster) for cluster in ("h100", "8xh100", "rtx-4090", "cs-3") for model in ("120t", "120t-moe")}
TOO_LARGE |= {(model, cluster) for cluster in ("h100", "8xh100", "rtx-4090") for model in ("1t", "1t-moe")}
TOO_LARGE |= {(model, cluster) for cluster in ("h100", "rtx-4090") for model in ("gpt3-175b", "llama-405b")}
TOO_LARGE |= {("llama-70b", "rtx-4090")}


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("clipping", [False, True])
def test_every_model_on_every_cluster_has_a_legal_plan_or_a_reason(model: str, cluster: str, clipping: bool) -> None:
    workers = min(2, CLUSTERS[cluster].most_workers)
    asked = job(model, cluster, workers=workers, clipping=clipping)
    if (model, cluster) in TOO_LARGE:
        assert "take a smaller model" in refused(asked)
        return
    found = prepare(asked)
    first = build(found.facts, found.allotment)
    schedule = first
    if clipping:
        everything = frozenset(block.index for block in found.facts.blocks)
        schedule = build(found.facts, found.allotment, pending=everything, loaded=first.loads_next)
    peak = verify(schedule, found.facts, found.allotment)
    assert peak <= found.allotment.device_bytes <= CLUSTERS[cluster].device_memory
    assert len(found.durations.forward) == len(found.facts.visits)
    assert len(found.durations.update) == len(found.facts.blocks)


def test_what_is_refused_is_refused_for_what_the_cluster_lacks() -> None:
    assert "1091 TiB" in refused(job("120t", "cs-3", workers=16))  # MemoryX of the CS-3 has 1.2 PB at most
    assert "disk" in refused(job("llama-70b", "rtx-4090"))
    assert "1 to 192 wafers" in refused(job("gpt-j-6b", workers=193))
    assert "--batch 4" in refused(job("gpt-j-6b", workers=4, each=0.5))
    small = replace(CLUSTERS["cs-2"], device_memory=10**6)
    assert "device_memory=" in refused(replace(job("cerebras-gpt-111m"), cluster=small))


def refused(wrong: Job) -> str:
    with pytest.raises(PlanError) as caught:
        prepare(wrong)
    return str(caught.value)


def test_a_cluster_without_a_link_or_without_its_bandwidth_is_impossible() -> None:
    without = replace(CLUSTERS["cs-2"], link=None)
    with pytest.raises(PlanError, match="no link between its wafers"):
        without.hardware(2)
    link = CLUSTERS["cs-2"].link
    assert link is not None
    with pytest.raises(PlanError, match=r"link\.bytes_per_s=0"):
        replace(without, link=replace(link, bytes_per_s=0.0)).hardware(2)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean gpt3-175b"):
        model_named("GPT3-175")
    with pytest.raises(ConfigError, match="did you mean cs-2"):
        cluster_named("cs2")


def test_activations_leave_the_wafer_only_when_they_must() -> None:
    """The published batch of 66 fits 40 GB just so; much more does not."""
    assert prepare(job("gpt-j-6b", each=66)).spilled == 0
    assert prepare(job("gpt-j-6b", each=132)).spilled > 0


def test_fewer_layers_are_the_same_plan() -> None:
    whole = prepare(job("gpt3-175b", workers=2, each=8))
    short = shortened(whole, 12)
    assert short.allotment.slabs == whole.allotment.slabs
    assert short.spilled == pytest.approx(whole.spilled, abs=1 / 12)
    verify(build(short.facts, short.allotment), short.facts, short.allotment)


def test_a_plan_by_a_few_layers_promises_no_more_than_one_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take smaller micro-batches and spill more, since whole visits of few stay or leave; never the other way."""
    for each in (1, 4, 8):
        asked = job("llama-405b", workers=2, each=each)
        whole = prepare(asked)
        with monkeypatch.context() as patched:
            patched.setattr(jobs, "MOST_VISITS", 100)
            few = prepare(asked)
        assert few.layers < whole.layers == asked.model.layers
        assert (few.allotment.slabs, few.blocks) == (whole.allotment.slabs, whole.blocks)
        assert few.each <= whole.each
        assert whole.spilled <= few.spilled <= whole.spilled + 1 / len(few.facts.visits)
        assert few.allotment.device_bytes <= asked.cluster.device_memory


@given(
    density=st.floats(0.01, 1), rows=st.sampled_from([1, 4, 32]), columns=st.sampled_from([1, 4, 32]),
    share=st.sampled_from([0.0, 0.5, 1.0]), parameters=st.integers(1, 10_000_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_sparse_layer_keeps_whole_blocks_and_a_mask(
    density: float, rows: int, columns: int, share: float, parameters: int
) -> None:
    shape = SparseShape(density=density, block=(rows, columns), share=share)
    sparse = round(share * parameters)
    kept = shape.nonzeros(parameters) - (parameters - sparse)
    assert 0 <= kept <= sparse
    assert kept % (rows * columns) == 0
    assert abs(kept - density * sparse) <= rows * columns * (1 + density)
    assert shape.mask_bytes(parameters) <= -(-sparse // (8 * rows * columns))  # never more than a bit for each block


def test_a_sparse_job_moves_and_stores_what_exists_and_its_masks() -> None:
    """By hand: a fifth of the layers' parameters and a bit for each element; tables and computing stay as they are."""
    dense = job("gpt-j-6b", workers=2, each=8)
    sparse = replace(dense, sparse=SparseShape(density=0.2))
    tables = 2 * dense.model.table_parameters
    layers = dense.model.parameters - tables
    plans = prepare(dense), prepare(sparse)
    for found, exists, mask_bits in ((plans[0], layers, 0), (plans[1], layers // 5, layers)):
        fetched = sum(block.fetched_bytes for block in found.facts.blocks)
        assert fetched == pytest.approx(2 * (tables + exists) + mask_bits / 8, rel=1e-6)
        records = sum(block.record_bytes for block in found.facts.blocks)
        assert records == pytest.approx(14 * (tables + exists) + mask_bits / 8, rel=1e-6) == found.job.record_bytes
        assert sum(block.gradient_bytes for block in found.facts.blocks) == pytest.approx(
            4 * (tables + exists), rel=1e-6
        )
    assert plans[0].durations.forward == plans[1].durations.forward
    assert sum(plans[1].durations.update) == pytest.approx(
        sum(plans[0].durations.update) * sparse.nonzeros / dense.nonzeros
    )
    assert sparse.reachable > 3 * dense.reachable
    by_kernel = prepare(replace(dense, sparse=SparseShape(density=0.2, speedup=5)))
    assert by_kernel.job.compute_s < dense.compute_s / 3  # the head and attention's scores stay dense
    assert replace(dense, sparse=SparseShape(density=1.0)).record_bytes == dense.record_bytes


def test_a_model_that_a_disk_does_not_hold_is_there_if_it_is_sparse() -> None:
    asked = job("llama-70b", "rtx-4090")
    assert "--sparsity" in refused(asked)
    found = prepare(replace(asked, sparse=SparseShape(density=0.1)))
    assert found.job.needed_bytes <= CLUSTERS["rtx-4090"].disk_bytes
    assert found.job.reachable >= asked.model.parameters > asked.reachable
