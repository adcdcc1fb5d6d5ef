"""The engine: what a user does with it beyond plain steps, and that none of it leaves a trace in the numbers."""

import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import weightstream as ws
from weightstream.errors import ConfigError, DamagedRecordError, PlanError, StoreError, StoreMismatchError
from weightstream.store.futures import new_future
from weightstream.store.owned import Holding
from weightstream.store.pull import pull
from weightstream.store.push import push

VOCABULARY, WIDTH = 48, 16


pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Its head is registered first and used last, so that blocks are used in another order than they are numbered."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(4))
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.skip: frozenset[int] = frozenset()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            if index not in self.skip:
                x = layer(x)
        return F.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Plain(Model):
    """Draws nothing, so that a step does not depend on its number."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)


class Wide(Model):
    """Its head and its embedding have 300 rows of 16: three panels of at least 128 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.embedding = nn.Embedding(300, WIDTH)


def tokens(step: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, VOCABULARY, (2, 7 + index), generator=generator) for index in range(count)]


def loss_fn(model: nn.Module, micro_batch: Tensor) -> Tensor:
    return model(micro_batch)  # type: ignore[no-any-return]


def open_engine(store: Path, build: Callable[[], nn.Module] = Model, **settings: Any) -> ws.Engine:
    optimizer = settings.pop("optimizer", ws.AdamW(lr=ws.cosine(1e-2, warmup=2, steps=20)))
    chosen = {"clip_norm": 0.5, "threads_per_worker": 1, "ram_tier": False} | settings
    return ws.Engine(build, store, optimizer, **chosen)


def step_and_digest(store: Path) -> tuple[int, str]:
    reader = ws.Store.open(store, writable=False)
    try:
        assert reader.verify() == []
        return reader.step, reader.digest()
    finally:
        reader.close()


def train(store: Path, pieces: Sequence[int], **settings: Any) -> tuple[int, str]:
    """Trains in pieces, the store closed and opened between them."""
    for steps in pieces:
        with open_engine(store, **settings) as engine:
            for _ in range(steps):
                engine.step(tokens(engine.step_count + 1), loss_fn)
    return step_and_digest(store)


def each_step(store: Path, steps: int, **settings: Any) -> dict[int, tuple[int, str]]:
    """Where `train` would end after each number of steps."""
    found = {}
    with open_engine(store, **settings) as engine:
        for step in range(1, steps + 1):
            engine.step(tokens(step), loss_fn)
            engine.commit()
            found[step] = step, engine.store.digest()
    assert step_and_digest(store) == found[steps]
    return found


Whole = dict[float | None, dict[int, tuple[int, str]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """By clip norm and number of steps, where a run ends that nothing disturbs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return {clip: each_step(folder / str(clip), 8, clip_norm=clip) for clip in (None, 0.5)}


MODES = pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
# so little host memory that every staged gradient goes through the ring to disk
TIGHT = {"host_memory": "60KiB"}


class TestResume:
    @MODES
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_in_pieces_as_in_one_go(self, clip_norm: float | None, precision: str, tmp_path: Path) -> None:
        settings = {"clip_norm": clip_norm, "precision": precision}
        whole = train(tmp_path / "whole", [4], **settings)
        assert whole[0] == 4
        assert train(tmp_path / "pieces", [1, 2, 1], **settings) == whole
        assert train(tmp_path / "other", [4], seed=1, **settings)[1] != whole[1]

    @MODES
    def test_a_wiped_disk_goes_on_from_what_was_pushed(
        self, clip_norm: float | None, tmp_path: Path, whole: Whole
    ) -> None:
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            for step in (1, 2):
                engine.step(tokens(step), loss_fn)
            engine.commit()
            push(tmp_path / "store", tmp_path / "target")  # as another process would, while the engine is open
        shutil.rmtree(tmp_path / "store")
        pull(tmp_path / "target", tmp_path / "store")
        assert train(tmp_path / "store", [2], clip_norm=clip_norm) == whole[clip_norm][4]

    @MODES
    def test_looking_in_between_changes_nothing(self, clip_norm: float | None, tmp_path: Path, whole: Whole) -> None:
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            for step in range(1, 4):
                engine.step(tokens(step), loss_fn)
                if step == 1:
                    engine.commit()
                    assert step_and_digest(tmp_path / "store")[0] == 1
                if step == 2:
                    with engine.module() as model:
                        model(tokens(9)[0])
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][3]

    @MODES
    def test_the_callers_progress_comes_back_with_its_step(self, clip_norm: float | None, tmp_path: Path) -> None:
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            for step in (1, 2):
                engine.progress["position"] = 10 * step
                engine.step(tokens(step), loss_fn)
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            assert engine.step_count == 2
            assert engine.progress == {"position": 20}

    def test_what_may_change(self, tmp_path: Path, whole: Whole) -> None:
        settings: list[dict[str, Any]] = [
            {},
            {"device_memory": "8MiB", "host_memory": "8MiB"},
            {"ram_tier": True, "prefetch": 1, "activations": "recompute"},
            {"activations": "keep", "max_skipped_steps": 3, "log": print},
        ]
        for changed in settings:
            with open_engine(tmp_path / "store", **changed) as engine:
                engine.step(tokens(engine.step_count + 1), loss_fn)
        assert step_and_digest(tmp_path / "store") == whole[0.5][4]

    def test_learning_rate_and_decay_may_change(self, tmp_path: Path) -> None:
        for lr in (1e-2, 1e-3):
            with open_engine(tmp_path / "store", optimizer=ws.AdamW(lr=lr, weight_decay=lr)) as engine:
                result = engine.step(tokens(engine.step_count + 1), loss_fn)
                assert result.lr == lr

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"seed": 3}, ["seed", "0", "3"]),
            ({"precision": "bf16"}, ["precision", "fp32", "bf16"]),
            ({"reduction_groups": 4}, ["reduction_groups", "8", "4"]),
            ({"clip_norm": None}, ["clip_norm", "0.5", "None"]),
            ({"optimizer": ws.SGD(lr=0.1)}, ["optimizer", "AdamW", "SGD"]),
            ({"optimizer": ws.AdamW(lr=0.1, betas=(0.8, 0.9))}, ["optimizer", "0.8", "0.999"]),
            ({"build": lambda: nn.Sequential(nn.Linear(4, 4))}, ["model", "parameters"]),
            ({"threads_per_worker": 2}, ["threads_per_worker"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_may_not_change(self, changed: dict[str, Any], words: list[str], tmp_path: Path) -> None:
        before = train(tmp_path / "store", [1])
        with pytest.raises(StoreMismatchError) as caught:
            open_engine(tmp_path / "store", **changed)
        found = str(caught.value)
        assert [word for word in words if word not in found] == [], found
        torch.set_num_threads(1)
        assert step_and_digest(tmp_path / "store") == before

    def test_other_numerics_on_demand(self, tmp_path: Path) -> None:
        train(tmp_path / "store", [1])
        with open_engine(tmp_path / "store", threads_per_worker=2, allow_other_numerics=True) as engine:
            assert engine.step_count == 1

    def test_a_store_in_use(self, tmp_path: Path, whole: Whole) -> None:
        from weightstream.errors import StoreInUseError

        with open_engine(tmp_path / "store") as engine:
            with pytest.raises(StoreInUseError):
                open_engine(tmp_path / "store")
            engine.step(tokens(1), loss_fn)
        assert step_and_digest(tmp_path / "store") == whole[0.5][1]


class TestBudgets:
    @pytest.mark.parametrize("budget", ["device_memory", "host_memory"])
    def test_too_small_names_a_value_that_works_and_makes_nothing(self, budget: str, tmp_path: Path) -> None:
        import re

        from weightstream.errors import PlanError

        with pytest.raises(PlanError) as caught:
            open_engine(tmp_path / "store", **{budget: 4096})
        assert not (tmp_path / "store").exists()
        named = re.search(rf"{budget}=(\d+MiB)", str(caught.value))
        assert named is not None, str(caught.value)
        train(tmp_path / "store", [2], **{budget: named[1]})

    @MODES
    def test_a_step_that_does_not_fit_is_refused_and_the_engine_goes_on(
        self, clip_norm: float | None, tmp_path: Path
    ) -> None:
        from weightstream.errors import PlanError

        budget = next(kib for kib in range(8, 200, 2) if self.opens(tmp_path / "store", clip_norm, f"{kib}KiB"))
        # one micro-batch needs no partial sums, eight in eight groups need three
        with open_engine(tmp_path / "store", clip_norm=clip_norm, device_memory=f"{budget}KiB") as engine:
            with pytest.raises(PlanError, match="device_memory"):
                engine.step(tokens(1, 8), loss_fn)
            assert engine.step_count == 0
            assert engine.plan
        assert step_and_digest(tmp_path / "store")[0] == 0

    @staticmethod
    def opens(store: Path, clip_norm: float | None, budget: str) -> bool:
        from weightstream.errors import PlanError

        try:
            open_engine(store, clip_norm=clip_norm, device_memory=budget).close()
        except PlanError:
            return False
        return True


class TestBlocks:
    def test_a_later_run_may_leave_out_how_blocks_were_made_or_say_it_again(self, tmp_path: Path) -> None:
        rules = {"layers.*": "split"}
        open_engine(tmp_path / "store", block_rules=rules).close()
        with open_engine(tmp_path / "store") as engine:
            count = len(engine.store.blocks)
        with open_engine(tmp_path / "store", block_rules=rules, device_memory="2GiB") as engine:
            assert len(engine.store.blocks) == count

    @pytest.mark.parametrize("other", [{"block_rules": {"layers.*": "split"}}, {"max_block_bytes": 1000}])
    def test_other_blocks_than_the_store_has_are_refused(self, other: dict[str, Any], tmp_path: Path) -> None:
        open_engine(tmp_path / "store").close()
        before = step_and_digest(tmp_path / "store")
        with pytest.raises(StoreMismatchError, match="blocks are fixed when a store is made"):
            open_engine(tmp_path / "store", **other)
        assert step_and_digest(tmp_path / "store") == before

    @MODES
    @pytest.mark.parametrize("memory", [{}, TIGHT | {"host_memory": "400KiB"}, {"ram_tier": True}], ids=str)
    def test_blocks_of_many_units(self, clip_norm: float | None, memory: dict[str, Any], tmp_path: Path) -> None:
        """In pieces as in one go, in any tier; without a norm the same bits as uncut."""
        settings = {"build": Wide, "clip_norm": clip_norm, "precision": "bf16", "panel_elements": 2048} | memory
        whole = train(tmp_path / "whole", [4], **settings)
        again = settings | {"panel_elements": None}
        assert train(tmp_path / "pieces", [1], **settings)[0] == 1
        assert train(tmp_path / "pieces", [2, 1], **again) == whole
        with ws.Store.open(tmp_path / "whole", writable=False) as store:
            assert len(store.units_with("head.weight")) == 3
        uncut = train(tmp_path / "uncut", [4], **again)
        if clip_norm is None:
            assert uncut == whole

    def test_units_of_another_size_than_the_store_has_are_refused(self, tmp_path: Path) -> None:
        open_engine(tmp_path / "store", panel_elements=500).close()
        before = step_and_digest(tmp_path / "store")
        with pytest.raises(StoreMismatchError, match="panel_elements=500, this run has panel_elements=501"):
            open_engine(tmp_path / "store", panel_elements=501)
        with pytest.raises(ConfigError, match="panel_elements"):
            open_engine(tmp_path / "other", panel_elements=0)
        with open_engine(tmp_path / "store") as engine:
            assert len(engine.store.units) > len(engine.store.blocks)
        assert step_and_digest(tmp_path / "store") == before

    def test_a_list_of_modules_cannot_be_one_block(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"ModuleList is never called itself.*'layers\.\*'"):
            open_engine(tmp_path / "store", block_rules={"layers": "block"})
        assert not (tmp_path / "store").exists()


SCHEDULE = ws.linear(1e-2, warmup=0, steps=20)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """By clip norm, losses and end of a run without a third step, which is left out by what may change on resume."""
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("good"), {}
    for clip in (None, 0.5):
        losses = []
        for step in (1, 2, 4, 5):
            optimizer = ws.AdamW(lr=SCHEDULE(step))
            with open_engine(folder / str(clip), Plain, optimizer=optimizer, clip_norm=clip) as engine:
                result = engine.step(tokens(step), loss_fn)
                losses.append((result.loss, result.grad_norm))
        found[clip] = losses, step_and_digest(folder / str(clip))
    return found


class TestNotFinite:
    """A step whose gradient is not finite leaves nothing behind but its count."""

    @staticmethod
    def run(store: Path, bad: dict[int, Any], steps: int, **settings: Any) -> list[Any]:
        """`bad`: step → how it goes wrong."""
        results = []
        with open_engine(store, Plain, **settings) as engine:
            for step in range(1, steps + 1):
                kind = bad.get(step)
                function = (lambda model, mb: model(mb) * torch.inf) if kind == "loss" else loss_fn
                weights = [0.3, float(kind), 0.3] if isinstance(kind, float) else None
                results.append(engine.step(tokens(step), function, weights=weights))
            assert engine.skipped_steps == len(bad)
        return results

    @MODES
    @pytest.mark.parametrize(
        ("kind", "memory"),
        [(float("inf"), {"ram_tier": True}), (float("nan"), TIGHT), ("loss", TIGHT), ("loss", {"ram_tier": True})],
    )
    def test_without_a_trace(
        self, clip_norm: float | None, kind: Any, memory: dict[str, Any], tmp_path: Path, good: dict[Any, Any]
    ) -> None:
        settings = {"clip_norm": clip_norm, "ram_tier": False} | memory
        results = self.run(tmp_path / "bad", {3: kind}, 5, optimizer=ws.AdamW(lr=SCHEDULE), **settings)
        assert [result.skipped for result in results] == [False, False, True, False, False]
        losses, (steps, digest) = good[clip_norm]
        assert [(result.loss, result.grad_norm) for result in results if not result.skipped] == losses
        assert step_and_digest(tmp_path / "bad") == (5, digest)
        assert steps == 4

    @MODES
    def test_the_first_and_the_last(self, clip_norm: float | None, tmp_path: Path) -> None:
        constant = ws.AdamW(lr=1e-2)
        self.run(tmp_path / "bad", {1: "loss", 2: "loss", 4: "loss"}, 4, clip_norm=clip_norm, optimizer=constant)
        with open_engine(tmp_path / "good", Plain, clip_norm=clip_norm, optimizer=constant) as engine:
            engine.step(tokens(3), loss_fn)
        found, expected = step_and_digest(tmp_path / "bad"), step_and_digest(tmp_path / "good")
        assert found == (4, expected[1])

    @MODES
    def test_only_in_one_late_block(self, clip_norm: float | None, tmp_path: Path) -> None:
        """Without clipping, the blocks behind it were updated and written before its gradient was found."""

        def poisoned(model: Any, micro_batch: Tensor) -> Tensor:
            hook = model.embedding.register_forward_hook(lambda module, args, out: out * 1e38 * 1e38)
            try:
                return model(micro_batch) * 0 + model(micro_batch)
            finally:
                hook.remove()

        with open_engine(tmp_path / "bad", Plain, clip_norm=clip_norm, optimizer=ws.AdamW(lr=1e-2)) as engine:
            for step in (1, 2, 3):
                result = engine.step(tokens(step), poisoned if step == 2 else loss_fn)
                assert result.skipped is (step == 2)
        with open_engine(tmp_path / "good", Plain, clip_norm=clip_norm, optimizer=ws.AdamW(lr=1e-2)) as engine:
            for step in (1, 3):
                engine.step(tokens(step), loss_fn)
        assert step_and_digest(tmp_path / "bad")[1] == step_and_digest(tmp_path / "good")[1]

    @MODES
    def test_too_many_in_a_row_across_a_resume(self, clip_norm: float | None, tmp_path: Path) -> None:
        from weightstream.errors import NonFiniteError

        before = train(tmp_path / "store", [1], clip_norm=clip_norm)
        bad = {"weights": [1.0, float("nan"), 1.0]}
        with open_engine(tmp_path / "store", clip_norm=clip_norm, max_skipped_steps=2) as engine:
            assert engine.step(tokens(2), loss_fn, **bad).skipped
        with open_engine(tmp_path / "store", clip_norm=clip_norm, max_skipped_steps=2) as engine:
            assert engine.step(tokens(3), loss_fn, **bad).skipped
            with pytest.raises(NonFiniteError, match="3 steps in a row.*max_skipped_steps=2"):
                engine.step(tokens(4), loss_fn, **bad)
        assert step_and_digest(tmp_path / "store")[1] == before[1]

    def test_a_good_step_starts_the_count_anew(self, tmp_path: Path) -> None:
        bad: dict[int, Any] = dict.fromkeys((2, 3, 5, 6), "loss")
        self.run(tmp_path / "store", bad, 7, max_skipped_steps=2)


class TestCommitEvery:
    """Rarer commits cost a crash more, and nothing else."""

    @MODES
    @pytest.mark.parametrize("memory", [TIGHT, {"ram_tier": True}], ids=["tight", "plenty"])
    @pytest.mark.parametrize("every", [2, "1h"])
    def test_the_same_in_the_end(
        self, every: int | str, memory: dict[str, Any], clip_norm: float | None, tmp_path: Path, whole: Whole
    ) -> None:
        settings = {"clip_norm": clip_norm} | memory
        assert train(tmp_path / "store", [5], commit_every=every, **settings) == whole[clip_norm][5]
        assert train(tmp_path / "pieces", [2, 3], commit_every=every, **settings) == whole[clip_norm][5]

    @MODES
    def test_a_crash_finds_the_last_commit_whole(self, clip_norm: float | None, tmp_path: Path, whole: Whole) -> None:
        settings = {"clip_norm": clip_norm, "commit_every": 3}
        with open_engine(tmp_path / "store", **settings) as engine:
            for step in range(1, 9):
                engine.step(tokens(step), loss_fn)
                if engine.runtime.keeper.committing is not None:
                    engine.runtime.keeper.committing.result()
                shutil.copytree(tmp_path / "store", tmp_path / "crashed")  # what a crash would find
                found, digest = step_and_digest(tmp_path / "crashed")
                # the plan of the second step begins with a commit; with clipping a step is applied during the next one
                applied = step - (clip_norm is not None)
                assert found == (0 if step == 1 else 1 + 3 * ((applied - 1) // 3))
                assert found == 0 or (found, digest) == whole[clip_norm][found]
                shutil.rmtree(tmp_path / "crashed")
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][8]

    @MODES
    @pytest.mark.parametrize("kind", ["loss", float("nan")])
    def test_a_bad_step_goes_back_to_the_step_before(self, kind: Any, clip_norm: float | None, tmp_path: Path) -> None:
        settings = {"clip_norm": clip_norm, "optimizer": ws.AdamW(lr=1e-2)}
        TestNotFinite.run(tmp_path / "each", {3: kind}, 5, **settings)
        TestNotFinite.run(tmp_path / "store", {3: kind}, 5, commit_every=10, **settings)
        assert step_and_digest(tmp_path / "store") == step_and_digest(tmp_path / "each")

    @MODES
    def test_a_step_that_fails_costs_only_itself(self, clip_norm: float | None, tmp_path: Path, whole: Whole) -> None:
        def fails(model: nn.Module, micro_batch: Tensor) -> Tensor:
            raise ZeroDivisionError

        with open_engine(tmp_path / "store", clip_norm=clip_norm, commit_every=10) as engine:
            for step in (1, 2):
                engine.step(tokens(step), loss_fn)
            with pytest.raises(ZeroDivisionError):
                engine.step(tokens(3), fails)
            engine.step(tokens(3), loss_fn)
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][3]

    @pytest.mark.parametrize("every", [0, -1, "soon", "0s", "", 1.5])
    def test_what_is_no_interval(self, every: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="commit_every: expected"):
            open_engine(tmp_path / "store", commit_every=every)
        assert not (tmp_path / "store").exists()

    def test_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from weightstream.store import interval

        now = 100.0
        monkeypatch.setattr(interval.time, "monotonic", lambda: now)
        passed = interval.Interval("5 min")
        assert not passed.passed()
        now += 299
        assert not passed.passed()
        now += 1
        assert passed.passed()
        passed.restart()
        assert not passed.passed()


class TestMicroBatches:
    @MODES
    @pytest.mark.parametrize("tight", [False, True])
    def test_their_number_may_change_from_step_to_step(
        self, clip_norm: float | None, tight: bool, tmp_path: Path
    ) -> None:
        def run(store: Path, **settings: Any) -> tuple[int, str]:
            with open_engine(store, clip_norm=clip_norm, **settings) as engine:
                for step, count in enumerate([1, 4, 2, 11, 1], start=1):
                    engine.step(tokens(step, count), loss_fn)
            return step_and_digest(store)

        assert run(tmp_path / "tight", **(TIGHT if tight else {"ram_tier": True})) == run(tmp_path / "plenty")

    def test_what_a_recomputed_block_saves_is_gone_when_the_next_runs_also_while_its_size_is_measured(
        self, tmp_path: Path
    ) -> None:
        inner: list[StorageWeakRef] = []

        def build() -> nn.Module:
            model = Plain()
            for layer in model.layers:
                layer.up.register_forward_hook(
                    lambda _, inputs, output: inner.append(StorageWeakRef(output.untyped_storage()))
                )
            return model

        left: list[int] = []

        def counting(model: nn.Module, micro_batch: Tensor) -> Tensor:
            loss = loss_fn(model, micro_batch)
            left.append(sum(not saved.expired() for saved in inner))
            return loss

        with open_engine(tmp_path / "store", build, activations="recompute") as engine:
            engine.step(tokens(1), counting)
            engine.step(tokens(2), counting)
        assert len(inner) >= 4 * 3 * 2
        assert left == [0] * 6

    def test_none_is_refused(self, tmp_path: Path) -> None:
        with open_engine(tmp_path / "store") as engine:
            with pytest.raises(ConfigError, match="micro-batch"):
                engine.step([], loss_fn)
            with pytest.raises(ConfigError, match="3 micro-batches, but 1 weights"):
                engine.step(tokens(1), loss_fn, weights=[1.0])


def micro_batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("micro-batch")]


class TestErrors:
    """After an error of the user's own, in any place, the engine goes on as if that step had not been tried."""

    class OwnError(Exception):
        pass

    def fails(self, where: str, at: int) -> Callable[[nn.Module, Tensor], Tensor]:
        calls: list[int] = []

        def failing(model: nn.Module, micro_batch: Tensor) -> Tensor:
            calls.append(len(calls))
            if calls[-1] != at:
                return loss_fn(model, micro_batch)
            if where == "before":
                raise self.OwnError
            if where == "inside":
                handle = model.layers[2].register_forward_pre_hook(self._raise)  # type: ignore[index,union-attr]
                try:
                    return loss_fn(model, micro_batch)
                finally:
                    handle.remove()
            loss = loss_fn(model, micro_batch)
            if where == "after":
                raise self.OwnError
            return loss.sqrt().requires_grad_() + _FailsBackward.apply(loss)

        return failing

    def _raise(self, *_: Any) -> None:
        raise self.OwnError

    @MODES
    @pytest.mark.parametrize(("at", "tight"), [(0, False), (1, True), (2, False)], ids=["0", "1-tight", "2"])
    @pytest.mark.parametrize("where", ["before", "inside", "after", "backward"])
    def test_goes_on(
        self, where: str, at: int, tight: bool, clip_norm: float | None, tmp_path: Path, whole: Whole
    ) -> None:
        settings = {"clip_norm": clip_norm} | (TIGHT if tight else {})
        with open_engine(tmp_path / "store", **settings) as engine:
            engine.step(tokens(1), loss_fn)
            engine.step(tokens(2), loss_fn)
            with pytest.raises((self.OwnError, ZeroDivisionError)):
                engine.step(tokens(3), self.fails(where, at))
            assert micro_batch_threads() == []
            assert engine.step_count == 2
            engine.step(tokens(3), loss_fn)
            with pytest.raises((self.OwnError, ZeroDivisionError)):
                engine.step(tokens(4), self.fails(where, at))
            engine.commit()
        assert micro_batch_threads() == []
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][3]

    @MODES
    @pytest.mark.parametrize("at", [0, 1, 4])
    def test_what_cannot_be_read_costs_its_step_alone(
        self, at: int, clip_norm: float | None, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a fetch of the step on, none can be read: all blocks leave their slabs, and the next try has them anew."""
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            engine.step(tokens(1), loss_fn)
            engine.step(tokens(2), loss_fn)
            begun: list[int] = []

            def failing(how: Callable[..., Any]) -> Callable[..., Any]:
                def come(holding: Holding, block: int, *arguments: Any) -> Any:
                    begun.append(block)
                    if len(begun) <= at:
                        return how(holding, block, *arguments)
                    unread = new_future()
                    unread.set_exception(OSError(errno.EIO, "Input/output error"))
                    return {0: unread}

                return come

            with monkeypatch.context() as patch:
                for name in ("fetch", "serve"):
                    patch.setattr(Holding, name, failing(getattr(Holding, name)))
                with pytest.raises(OSError, match="Input/output error"):
                    engine.step(tokens(3), loss_fn)
            assert len(begun) > at
            assert [block for block in begun if engine.runtime.slabs.slab_of(block) is not None] == []
            assert [block for block in begun if engine.parameters.present(block)] == []
            engine.step(tokens(3), loss_fn)
            engine.commit()
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][3]


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ZeroDivisionError


class TestModule:
    """The streamed model for evaluation and generation gives what the resident one gives."""

    @staticmethod
    def llama() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def test_generates_what_the_resident_model_generates(self, tmp_path: Path) -> None:
        with open_engine(tmp_path / "store", self.llama, device_memory="256KiB") as engine:
            batch = {"input_ids": torch.randint(0, 64, (2, 12)), "labels": torch.randint(0, 64, (2, 12))}
            engine.step([batch])
            resident = self.llama().eval()
            resident.load_state_dict({name: t["param"] for name, t in engine.store.items()}, strict=False)
            prompts = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(3))
            options: dict[str, Any] = {
                "max_new_tokens": 12,
                "pad_token_id": 0,
                "attention_mask": torch.ones_like(prompts),
            }
            for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
                found = []
                with engine.module() as model:
                    assert not model.training
                    for one in (model, resident):
                        torch.manual_seed(7)
                        result = one.generate(  # type: ignore[operator]
                            prompts,
                            **options,
                            **sampling,
                            use_cache=True,
                            return_dict_in_generate=True,
                            output_logits=True,
                        )
                        found.append(result)
                assert torch.equal(found[0].sequences, found[1].sequences)
                for one, other in zip(found[0].logits, found[1].logits, strict=True):
                    assert torch.equal(one, other)
            assert engine.model.training
            assert not engine.model.config.use_cache  # training goes on without a cache
            engine.step([batch])

    @MODES
    def test_an_error_inside_leaves_an_engine_that_trains(
        self, clip_norm: float | None, tmp_path: Path, whole: Whole
    ) -> None:
        with open_engine(tmp_path / "store", clip_norm=clip_norm) as engine:
            engine.step(tokens(1), loss_fn)
            with pytest.raises(IndexError), engine.module() as model:
                model(torch.full((1, 3), VOCABULARY))
            engine.step(tokens(2), loss_fn)
        assert step_and_digest(tmp_path / "store") == whole[clip_norm][2]

    def test_a_model_is_not_called_outside(self, tmp_path: Path) -> None:
        from weightstream.errors import AuditError

        with open_engine(tmp_path / "store") as engine, pytest.raises(AuditError, match=r"engine\.module\(\)"):
            engine.model(tokens(1)[0])


class TestOtherCalls:
    """A model that calls other blocks than it did before is followed, in whatever memory there is."""

    @MODES
    @pytest.mark.parametrize("memory", [TIGHT, {}], ids=["tight", "plenty"])
    def test_layers_that_are_skipped_in_some_steps(
        self, memory: dict[str, Any], clip_norm: float | None, tmp_path: Path
    ) -> None:
        def run(store: Path, **settings: Any) -> tuple[int, str]:
            with open_engine(store, clip_norm=clip_norm, **settings) as engine:
                for step in range(1, 5):
                    engine.model.skip = frozenset({0, 1}) if step in (3, 4) else frozenset()  # type: ignore[assignment]
                    engine.step(tokens(step), loss_fn)
            return step_and_digest(store)

        assert run(tmp_path / "one", **memory) == run(tmp_path / "other", ram_tier=True)


class TestBrokenUpdates:
    """An optimizer that fails in the middle of a record: nothing of a half update may ever be committed."""

    @pytest.mark.parametrize("clip_norm", [None, 1e-3], ids=["no clip", "clip"])
    @pytest.mark.parametrize("at", [0, 3])
    def test_a_failed_update_is_done_once_or_not_at_all(
        self, at: int, clip_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        plain = ws.AdamW.update

        def interrupted(self: ws.AdamW, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            calls.append(kwargs["name"])
            if len(calls) == at + 1 + before:
                raise KeyboardInterrupt

        monkeypatch.setattr(ws.AdamW, "update", interrupted)
        before = 10**6
        settings = {"clip_norm": clip_norm}
        expected = each_step(tmp_path / "whole", 3, **settings)
        engine = open_engine(tmp_path / "store", **settings)
        engine.step(tokens(1), loss_fn)
        engine.step(tokens(2), loss_fn)
        before = len(calls)
        with pytest.raises(KeyboardInterrupt):
            engine.step(tokens(3), loss_fn)
        before = 10**6
        try:
            engine.close()
        except Exception:  # it may refuse to commit what is broken
            engine.store.close()
        step, digest = step_and_digest(tmp_path / "store")
        assert (step, digest) == expected[step]
        assert train(tmp_path / "store", [3 - step], **settings) == expected[3]


def step_and_damage(store: Path) -> tuple[int, int]:
    reader = ws.Store.open(store, writable=False)
    try:
        return reader.step, len(reader.verify())
    finally:
        reader.close()


class TestDamage:
    @MODES
    def test_a_damaged_state_is_named_before_its_update(
        self, clip_norm: float | None, tmp_path: Path, whole: Whole
    ) -> None:
        settings = {"clip_norm": clip_norm}
        train(tmp_path / "store", [2], **settings)
        reader = ws.Store.open(tmp_path / "store", writable=False)
        index = next(block.index for block in reader.blocks if block.name == "layers.2")
        layout, path = reader.layout(index), reader.versions.segment_path(index, reader.versions.records[index].newest)
        reader.close()
        place, content = layout.part("exp_avg_sq").offset, path.read_bytes()
        path.write_bytes(content[: place + 1] + bytes([content[place + 1] ^ 4]) + content[place + 2 :])
        with pytest.raises(DamagedRecordError, match=r"layers\.2.*version 2.*'exp_avg_sq'"):
            train(tmp_path / "store", [2], **settings)
        assert step_and_damage(tmp_path / "store") == (2, 1)
        path.write_bytes(content)
        assert train(tmp_path / "store", [1], **settings) == whole[clip_norm][3]


class TestPlaces:
    """What is at a path where an engine makes no store stays there."""

    def files(self, path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def test_somebody_elses_folder(self, tmp_path: Path) -> None:
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "thesis.txt").write_text("years of work")
        with pytest.raises(StoreError, match="found letters; give another path"):
            open_engine(tmp_path)
        with pytest.raises(StoreError, match="found letters; give another path"):
            open_engine(tmp_path, device_memory="1KiB", max_block_bytes=1)  # what else would be refused
        assert self.files(tmp_path) == {"letters/thesis.txt": b"years of work"}

    def test_a_store_that_lost_its_manifest(self, tmp_path: Path) -> None:
        train(tmp_path / "store", [1])
        (tmp_path / "store" / "manifest.sqlite").unlink()
        before = self.files(tmp_path)
        with pytest.raises(StoreError, match=r"manifest\.sqlite is missing; restore it from a copy"):
            open_engine(tmp_path / "store")
        assert self.files(tmp_path) == before

    def test_a_store_that_another_process_makes_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_engine(tmp_path / "store"):
            before = self.files(tmp_path)
            monkeypatch.setattr(ws.Store, "exists", lambda path: False)  # as it was when the other one looked
            with pytest.raises(StoreError, match="already holds a store"):
                open_engine(tmp_path / "store")
            monkeypatch.setattr("weightstream.engine.opening.require_new", lambda path: None)
            monkeypatch.setattr("weightstream.store.directory.require_new", lambda path: None)
            with pytest.raises(StoreError, match="is being written by process"):
                open_engine(tmp_path / "store")
            assert self.files(tmp_path) == before

    def test_what_was_begun_and_failed_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("weightstream.store.store.Manifest.create", full)
        with pytest.raises(StoreError, match="could not be made"):
            open_engine(tmp_path / "store")
        assert list(tmp_path.iterdir()) == []


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"device": "gpu"}, "device: expected one that this PyTorch can use here, such as 'cpu', found 'gpu'"),
            ({"device": "meta"}, "found 'meta': no numbers can be computed there"),
            ({"clip_norm": float("inf")}, "clip_norm: expected a positive finite number or None, found inf"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            open_engine(tmp_path / "store", **settings)
        assert not (tmp_path / "store").exists()

    def test_a_model_of_which_nothing_streams(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="nothing of the model Model streams.*leave a layer out of them"):
            open_engine(tmp_path / "store", block_rules={"*": "resident"})
        with pytest.raises(PlanError, match="nothing of the model LayerNorm streams.*without weightstream"):
            open_engine(tmp_path / "store", lambda: nn.LayerNorm(WIDTH))
