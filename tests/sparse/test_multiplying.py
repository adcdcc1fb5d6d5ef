"""Sparse layers that are multiplied by kernels while the engine trains them: the same training but for the order of sums."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sparse.masked import SEED, Model, digest, group, initial_values, loss_fn, micro_batches
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.engine.multiplying import AutoKernels, structures
from weightstream.errors import AuditError, ConfigError, StoreMismatchError
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.sparse.choosing import Curve
from weightstream.sparse.kernels import Kernel
from weightstream.sparse.native.compiling import compiled
from weightstream.sparse.native.products import obstacle

GATHERED = {"*.up.weight": "gathered", "*.down.weight": "gathered"}
NATIVE = {"*.up.weight": "native", "*.down.weight": "native"}
SETTINGS = {"algorithm": "set", "block": (8, 8), "begin": 0, "end": 9, "every": 3}
needs_compiler = pytest.mark.skipif(obstacle() is not None, reason="no C compiler")

pytestmark = pytest.mark.usefixtures("one_thread")


def open_engine(store: Path, kernels: Any, build: Any = Model, **settings: Any) -> ws.Engine:
    chosen = {
        "clip_norm": 0.5,
        "threads_per_worker": 1,
        "panel_elements": 2048,
        "sparsity": group(**SETTINGS),
    } | settings
    return ws.Engine(
        build, store, ws.SGD(lr=0.1, momentum=0.9), kernels=kernels, initial=initial_values(), seed=SEED, **chosen
    )


def train(store: Path, kernels: Any, pieces: list[int], count: int = 3, **settings: Any) -> list[float]:
    losses = []
    for steps in pieces:
        with open_engine(store, kernels, **settings) as engine:
            for _ in range(steps):
                losses.append(engine.step(micro_batches(engine.step_count + 1, count), loss_fn).loss)
    return losses


def values(store: Path) -> dict[str, dict[str, Tensor]]:
    with ws.Store.open(store, writable=False) as found:
        return dict(found.items())


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_the_same_training_up_to_the_order_of_sums(activations: str, tmp_path: Path) -> None:
    """Over two mask updates; `up` is cut into panels. The bound is that of a few dozen fp32 roundings."""
    settings = {"activations": activations}
    expanded = train(tmp_path / "expanded", None, [7], **settings)
    assert train(tmp_path / "kernel", GATHERED, [7], **settings) == pytest.approx(expanded, abs=2e-6)
    found, expected = values(tmp_path / "kernel"), values(tmp_path / "expanded")
    for name, parts in expected.items():
        for part, tensor in parts.items():
            assert torch.allclose(found[name][part].double(), tensor.double(), rtol=1e-4, atol=2e-6), (name, part)
    assert digest(tmp_path / "kernel") != digest(tmp_path / "expanded")  # the kernel was used


@pytest.mark.parametrize("kernels", [GATHERED, pytest.param(NATIVE, marks=needs_compiler)], ids=["gathered", "native"])
def test_in_pieces_and_on_several_ranks_as_in_one_go(kernels: Any, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", kernels, [6], 8, precision="bf16")
    assert train(tmp_path / "pieces", kernels, [2, 4], 8, precision="bf16", ram_tier=False) == whole

    def work(links: Links) -> list[float]:
        settings = {"cluster": Cluster(2), "links": links, "precision": "bf16"}
        return train(tmp_path / "ranks", kernels, [6], 8, **settings)

    assert all(found == whole for found in run_ranks(Cluster(2), work, timeout_s=60))
    assert digest(tmp_path / "whole") == digest(tmp_path / "pieces") == digest(tmp_path / "ranks")


def test_evaluation_is_by_kernels_too(tmp_path: Path) -> None:
    with open_engine(tmp_path / "store", GATHERED) as engine:
        engine.step(micro_batches(1), loss_fn)
        with engine.module() as model:
            found = float(model(micro_batches(9)[0]))
    resident = Model()
    for name, parts in values(tmp_path / "store").items():
        resident.get_parameter(name).data = parts["param"]
    with torch.no_grad():
        assert found == pytest.approx(float(resident(micro_batches(9)[0])), abs=2e-6)


def test_slabs_have_room_for_non_zeros_only(tmp_path: Path) -> None:
    """A block of two matrices of 192×32 in fp32, a tenth of them left; the rest are vectors, and up to a page for each unit."""
    found = []
    for kernels in (None, GATHERED):
        with open_engine(tmp_path / f"{bool(kernels)}", kernels, panel_elements=8192) as engine:
            engine.step(micro_batches(1), loss_fn)
            found.append(max(block.streamed_bytes for block in engine.runtime.facts.blocks))
            assert engine.allotment.slab_bytes == found[-1]
    expanded, thin = found
    assert expanded > 4 * 2 * 192 * 32
    assert thin < 4 * 2 * 192 * 32 / 10 + 4 * (192 + 4 * 32) + 3 * 4096


class Penalised(Model):
    """One of its layers uses a weight beside its product."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.layers[1]
        inner = layer.forward
        layer.forward = lambda x: inner(x) + layer.down.weight.square().mean()  # type: ignore[method-assign]


class TestRefused:
    def test_a_use_beside_the_product(self, tmp_path: Path) -> None:
        with (
            open_engine(tmp_path / "store", GATHERED, Penalised) as engine,
            pytest.raises(AuditError, match=r"layers\.1\.down\.weight.*outside its linear layer"),
        ):
            engine.step(micro_batches(1), loss_fn)

    def test_other_kernels_than_the_store_was_made_with(self, tmp_path: Path) -> None:
        train(tmp_path / "store", GATHERED, [1])
        with pytest.raises(StoreMismatchError, match="kernels: the store has .*gathered.*this run has nothing"):
            open_engine(tmp_path / "store", None)

    @needs_compiler
    def test_a_machine_without_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether a kernel was named or chosen: the run says what is missing, and the store stays as it was."""
        auto = measured(4.0, 4.0, kernel="native")
        train(tmp_path / "named", NATIVE, [1])
        train(tmp_path / "chosen", auto, [1])
        before = digest(tmp_path / "named"), digest(tmp_path / "chosen")
        monkeypatch.setenv("PATH", str(tmp_path))
        compiled.cache_clear()
        try:
            for store, kernels in ((tmp_path / "named", NATIVE), (tmp_path / "chosen", auto)):
                with pytest.raises(
                    ConfigError,
                    match=r"layers\.0\.\w+\.weight', kernel 'native': expected a product with 8×8 in torch.float32 on this "
                    "machine's cpu, found that 'native' needs a C compiler .* no C compiler .* install one; a store goes on",
                ):
                    open_engine(store, kernels)
            with open_engine(tmp_path / "new", auto) as engine:
                assert engine.kernels == {}
        finally:
            compiled.cache_clear()
        assert (digest(tmp_path / "named"), digest(tmp_path / "chosen")) == before

    @pytest.mark.parametrize(
        ("kernels", "settings", "said"),
        [
            ({"*.up.weight": "gathered"}, {"block": (1, 1)}, "'gathered' has no product of .* blocks of 1×1"),
            ({"*.up.weight": "gathered"}, {"algorithm": "rigl"}, "rigl needs its dense gradient"),
            ({"*.up.weight": "gathered"}, {"algorithm": "gmp"}, "the number of its non-zeros changes"),
            ({"*.up.weight": "gathered"}, {"sparsity": 1e-5}, "all of a panel of it exists"),
            ({"*.gate.weight": "gathered"}, {}, r"'\*\.gate\.weight' matches no sparse parameter"),
            ({"head.*": "gathered"}, {"patterns": ("head.weight",), "include_all": True}, "the weight of an nn.Linear within"),
        ],
    )  # fmt: skip
    def test_what_no_kernel_can_do(self, kernels: Any, settings: Any, said: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            open_engine(tmp_path / "store", kernels, sparsity=group(**(SETTINGS | settings)))


def test_what_products_know_of_kept_weights_is_planned_for(tmp_path: Path) -> None:
    with open_engine(tmp_path / "store", GATHERED, activations="keep") as engine:
        engine.step(micro_batches(1), loss_fn)
        facts, measured = engine.outlook.facts(4), engine.outlook.measured
        assert measured is not None
        needed = {i: one.nbytes for i, one in structures(engine.store.blocks, engine._driven, engine.threads).items()}
        assert any(needed.values())
        for number, visit in enumerate(facts.visits):
            more = facts.present * (facts.kept_bytes[number] - measured.kept_bytes[number])
            assert needed[visit.block] <= more < needed[visit.block] + facts.present


def test_models_are_as_they_were_when_nothing_is_present(tmp_path: Path) -> None:
    """Between steps no module of the model multiplies by a slab that has something else now."""
    with open_engine(tmp_path / "store", GATHERED) as engine:
        engine.step(micro_batches(1), loss_fn)
        linear = [module for module in engine.model.modules() if isinstance(module, nn.Linear)]
        assert sum("forward" in vars(module) for module in linear) == 1  # the head, which is a block of its own


def measured(*speedups: float, kernel: Kernel = "gathered") -> AutoKernels:
    curve = Curve(
        kernel=kernel, dtype="float32", block=(8, 8), tokens=16, threads=1, densities=(0.05, 0.5), speedups=speedups
    )
    return AutoKernels(tokens=16, curves=lambda: [curve])


def never() -> Sequence[Curve]:
    raise AssertionError("a store that is there has its choice")


class TestChosenByWhatWasMeasured:
    def test_where_it_is_faster_and_at_most_once(self, tmp_path: Path) -> None:
        """Only `up` is thin enough; the bits are those of the same kernels by name, also where nothing was measured."""
        both = (
            group(**(SETTINGS | {"patterns": ("*.up.weight",)})).groups + group(**SETTINGS | {"sparsity": 0.3}).groups
        )
        settings = {"sparsity": ws.Sparsity(both)}
        given = train(tmp_path / "given", {"*.up.weight": "gathered"}, [6], **settings)
        begun = train(tmp_path / "chosen", measured(4.0, 1.5), [2], **settings)
        with open_engine(tmp_path / "chosen", AutoKernels(tokens=16, curves=never), **settings) as engine:
            assert engine.kernels == {f"layers.{layer}.up.weight": "gathered" for layer in range(3)}
            assert "3 parameters by gathered, 3 expanded" in engine.plan
        assert begun + train(tmp_path / "chosen", AutoKernels(tokens=16, curves=never), [4], **settings) == given
        assert digest(tmp_path / "chosen") == digest(tmp_path / "given")
        with ws.Store.open(tmp_path / "chosen", writable=False) as store:
            found = store.info()["sparse"]
        assert {name for name, kept in found.items() if kept.get("kernel") == "gathered"} == {
            f"layers.{layer}.up.weight" for layer in range(3)
        }

    def test_slower_everywhere_is_dense(self, tmp_path: Path) -> None:
        expanded = train(tmp_path / "expanded", None, [2])
        assert train(tmp_path / "chosen", measured(0.9, 0.5), [2]) == expanded
        assert digest(tmp_path / "chosen") == digest(tmp_path / "expanded")

    @pytest.mark.parametrize("settings", [{"algorithm": "rigl"}, {"algorithm": "gmp"}, {"block": (1, 1)}])
    def test_what_no_kernel_can_do_is_expanded(self, settings: Any, tmp_path: Path) -> None:
        with open_engine(tmp_path / "store", measured(4.0, 4.0), sparsity=group(**(SETTINGS | settings))) as engine:
            assert engine.kernels == {}

    def test_nothing_measured_is_said(self, tmp_path: Path) -> None:
        said: list[str] = []
        auto = ws.auto_kernels(tokens=16, profile=tmp_path / "none.toml")
        with open_engine(tmp_path / "store", auto, log=said.append) as engine:
            assert engine.kernels == {}
        assert len(said) == 1
        assert "weightstream calibrate" in said[0]

    def test_a_store_of_other_choices(self, tmp_path: Path) -> None:
        train(tmp_path / "store", measured(4.0, 4.0), [1])
        with pytest.raises(StoreMismatchError, match="kernels: the store has .*auto.*this run has nothing"):
            open_engine(tmp_path / "store", None)
