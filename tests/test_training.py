"""The training loop by itself, over an engine that trains a tiny model in memory: order, resume, stopping, records."""

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from weightstream.cluster import Cluster
from weightstream.data.dataset import DataConfig, Dataset, TokenizerConfig, prepare
from weightstream.errors import DataError, StoreMismatchError
from weightstream.training.display import Display, StepFacts
from weightstream.training.evaluation import evaluate, generate
from weightstream.training.loop import Outcome, Trainer
from weightstream.training.metrics import MetricsLog, read_metrics
from weightstream.training.settings import SnapshotConfig, TrainingConfig, ValidationConfig

VOCABULARY = 260


class TinyModel(nn.Module):
    """Predicts the next byte from this one: the interface of a causal language model, a thousandth of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> SimpleNamespace:
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits, past_key_values=None)


@dataclass
class FakeStore:
    """What is left when the engine goes away: the last commit, and snapshots as names."""

    path: str = "fake"
    step: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] | None = None
    held: dict[str, int] = field(default_factory=dict)

    def snapshot(self, name: str) -> None:
        self.held[name] = self.step

    def remove_snapshot(self, name: str) -> None:
        del self.held[name]

    def snapshots(self) -> dict[str, int]:
        return dict(self.held)


class FakeEngine:
    """Commits one step late, as the real one does when it clips. Alone."""

    cluster, rank, computes = Cluster(), 0, True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def __init__(self, store: FakeStore) -> None:
        torch.manual_seed(0)
        self.store, self.model = store, TinyModel()
        if store.weights is not None:
            self.model.load_state_dict(store.weights)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=5.0)
        self.step_count, self.progress = store.step, copy.deepcopy(store.progress)
        self.seen: list[list[int]] = []
        self.after_step = lambda step: None
        self._pending: FakeStore | None = None

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> SimpleNamespace:
        self.commit()
        loss = torch.stack([self.model(**mb).loss for mb in micro_batches]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step_count += 1
        self.seen += [mb["input_ids"].flatten().tolist() for mb in micro_batches]
        weights = copy.deepcopy(self.model.state_dict())
        self._pending = FakeStore("", self.step_count, copy.deepcopy(self.progress), weights)
        self.after_step(self.step_count)
        return SimpleNamespace(
            step=self.step_count, loss=loss.item(), grad_norm=None, lr=5.0, stalled_s=0.0, skipped=False,
            bytes=SimpleNamespace(read=10, written=20, bound=30), masks={}, experts={},
        )  # fmt: skip

    def commit(self) -> None:
        if self._pending is not None:
            new, self._pending = self._pending, None
            self.store.step, self.store.progress, self.store.weights = new.step, new.progress, new.weights

    def snapshot(self, name: str) -> None:
        self.commit()
        self.store.snapshot(name)

    def remove_snapshot(self, name: str) -> None:
        self.store.remove_snapshot(name)

    def snapshots(self) -> dict[str, int]:
        return self.store.snapshots()

    @contextlib.contextmanager
    def module(self) -> Iterator[TinyModel]:
        self.commit()
        yield self.model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number}: the quick brown fox jumps over the lazy dog\n" * 6)
    config = DataConfig(sources=(str(folder),), tokenizer=TokenizerConfig(size=VOCABULARY), validation_share=0.2)
    return prepare(config, folder / "data", base=folder)


def settings(**changes: Any) -> TrainingConfig:
    base = {"steps": 8, "micro_batches": 2, "micro_batch_size": 2, "sequence_length": 16, "tensorboard": False}
    return TrainingConfig.model_validate(base | changes)


def run(store: FakeStore, dataset: Dataset, folder: Path, config: TrainingConfig, after_step: Any = None) -> Outcome:
    engine = FakeEngine(store)
    run.engine = engine  # type: ignore[attr-defined]
    engine.after_step = after_step or engine.after_step
    display = Display(first_step=store.step, steps=config.steps, console=Console(file=io.StringIO()))
    trainer = Trainer(engine, dataset, config, seed=1)  # type: ignore[arg-type]
    with display, MetricsLog(folder, resumed_step=store.step, tensorboard=config.tensorboard) as metrics:
        return trainer.train(display, metrics)


def test_a_run_learns_and_reports(dataset: Dataset, tmp_path: Path) -> None:
    store = FakeStore()
    outcome = run(store, dataset, tmp_path, settings(steps=30, validation=ValidationConfig(every=10)))
    assert outcome.step == store.step == 30
    assert outcome.after is not None
    assert outcome.after.perplexity < 0.5 * outcome.before.perplexity
    assert outcome.tokens == 30 * 4 * 16
    assert (outcome.read_bytes, outcome.written_bytes, outcome.bound_bytes) == (300, 600, 900)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 31))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [0, 10, 20, 30]


def test_a_killed_run_goes_on_with_the_same_data_and_ends_equal(dataset: Dataset, tmp_path: Path) -> None:
    whole, pieces = FakeStore(), FakeStore()
    run(whole, dataset, tmp_path / "whole", settings())
    expected = run.engine.seen  # type: ignore[attr-defined]

    class KilledError(Exception):
        pass

    def kill_at(step: int) -> Any:
        def kill(now: int) -> None:
            if now == step:
                raise KilledError

        return kill

    for step in (3, 6):  # each loses the step in flight and, committing late, nothing before it
        with pytest.raises(KilledError):
            run(pieces, dataset, tmp_path / "pieces", settings(), kill_at(step))
        assert pieces.step == step - 1
    outcome = run(pieces, dataset, tmp_path / "pieces", settings())
    assert outcome.first_step == 5
    assert run.engine.seen == expected[2 * 5 :]  # type: ignore[attr-defined]
    assert whole.weights is not None
    assert pieces.weights is not None
    assert torch.equal(whole.weights["table.weight"], pieces.weights["table.weight"])
    lines = [
        [(line["kind"], line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "pieces")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_commits_and_says_so(
    dataset: Dataset, tmp_path: Path, number: signal.Signals
) -> None:
    store, before = FakeStore(), signal.getsignal(number)

    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    outcome = run(store, dataset, tmp_path, settings(), interrupt)
    assert outcome.stopped_by is number
    assert outcome.step == store.step == 3
    assert outcome.after is None
    assert signal.getsignal(number) is before
    assert run(store, dataset, tmp_path, settings()).step == 8


def test_a_signal_between_steps_stops_before_the_next_one(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Trainer._validate

    def interrupted(trainer: Trainer, when: str) -> Any:
        found = validate(trainer, when)
        if when == asked[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    store, asked = FakeStore(), []
    for when, step in (("before", 0), ("validation", 4)):
        asked.append(when)
        outcome = run(store, dataset, tmp_path, settings(validation=ValidationConfig(every=4)))
        assert (outcome.stopped_by, outcome.step) == (signal.SIGTERM, step)


def test_a_second_interrupt_stops_at_once(dataset: Dataset, tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    store = FakeStore()
    with pytest.raises(KeyboardInterrupt):
        run(store, dataset, tmp_path, settings(), interrupt)
    assert store.step == 2


def test_snapshots_are_kept_by_rule(dataset: Dataset, tmp_path: Path) -> None:
    store = FakeStore()
    rule = SnapshotConfig(every=2, keep_last=2, keep_best=True)
    run(store, dataset, tmp_path, settings(steps=9, snapshots=rule, validation=ValidationConfig(every=3)))
    assert sorted(store.held)[1:] == ["step-00000006", "step-00000008"]
    assert sorted(store.held)[0].startswith("best-00000009-")
    assert store.held["step-00000006"] == 6


def test_other_text_or_length_is_refused_with_both_values(dataset: Dataset, tmp_path: Path) -> None:
    store = FakeStore()
    run(store, dataset, tmp_path, settings(steps=2))
    with pytest.raises(StoreMismatchError, match="sequence_length 16, found 8"):
        run(store, dataset, tmp_path, settings(sequence_length=8))
    store.progress["data"] = "other"
    with pytest.raises(StoreMismatchError, match="with data other, found"):
        run(store, dataset, tmp_path, settings())


def test_fewer_tokens_than_a_batch_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 100000 are needed"):
        run(FakeStore(), dataset, tmp_path, settings(micro_batch_size=50_000))


def test_evaluation_weighs_by_tokens_and_takes_no_more_than_there_is(dataset: Dataset) -> None:
    engine: Any = FakeEngine(FakeStore())
    sequences = dataset.validation_sequences(16)
    whole = evaluate(engine, sequences, limit=10**6, size=3)
    assert whole.tokens == len(sequences) * 15
    assert evaluate(engine, sequences, limit=10**6, size=7).loss == pytest.approx(whole.loss, rel=1e-6)


def test_generation_stops_at_the_end_of_text_and_is_seeded(dataset: Dataset, tmp_path: Path) -> None:
    engine: Any = FakeEngine(FakeStore())
    prompts = ["the quick", "a"]
    one = generate(engine, dataset.tokenizer, prompts, tokens=6, temperature=1.0, seed=3)
    assert one == generate(engine, dataset.tokenizer, prompts, tokens=6, temperature=1.0, seed=3)
    with torch.no_grad():
        engine.model.table.weight[:, dataset.tokenizer.end_of_text] = 1e4
    assert generate(engine, dataset.tokenizer, prompts, tokens=6, temperature=0.0, seed=3) == ["", ""]
    with pytest.raises(DataError, match="prompt is empty"):
        generate(engine, dataset.tokenizer, ["x", ""], tokens=1, temperature=0.0, seed=0)


def test_metrics_survive_a_line_cut_short_and_go_to_tensorboard(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + '\n{"kind": "tr')
    with MetricsLog(tmp_path, resumed_step=1, tensorboard=True) as metrics:
        metrics.write("train", 2, loss=0.5)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def _facts(step: int) -> StepFacts:
    return StepFacts(
        step=step, loss=2.5, grad_norm=0.75, lr=3e-4, seconds=2.0, tokens=4096, stalled_s=0.5, read_bytes=3 << 20,
        written_bytes=1 << 20, bound_bytes=4 << 20, rss_bytes=512 << 20, skipped=False,
    )  # fmt: skip


def test_plain_lines_hold_the_facts_and_are_not_many() -> None:
    out = io.StringIO()
    with Display(first_step=0, steps=50, console=Console(file=out, soft_wrap=True)) as display:
        for step in range(1, 51):
            display.step(_facts(step))
        display.note("a [note]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # the first step, the last one, the note
    assert lines[0] == (
        "step 1/50  loss 2.5000  |grad| 0.75  lr 0.0003  2.0 K tokens/s  memory 512 MiB  moved 4.00 MiB (1.00x bound)"
        "  stalled 25%  1 min 38 s left"
    )
    assert lines[-1] == "a [note]"


def test_a_terminal_of_80_columns_gets_a_bar_and_all_facts() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24, color_system=None)
    with Display(first_step=0, steps=2, console=console) as display:
        display.step(_facts(1))
        display.note("a [note]")
    shown = out.getvalue()
    assert "━" in shown
    for expected in (
        "step 1/2",
        "loss 2.5000  |grad| 0.75",
        "moved 4.00 MiB (1.00x bound)  stalled 25%",
        "2.00 s left",
    ):
        assert expected in shown, shown
    assert "a [note]" in shown


@pytest.mark.parametrize("module", ["weightstream", "weightstream.commands.fit", "weightstream.store.glance"])
def test_what_only_starts_ranks_does_not_import_torch(module: str) -> None:
    """It takes a second; `fit` with several ranks is a launcher, which has no use for it."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
