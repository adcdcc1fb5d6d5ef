"""A configuration becomes a run: text, model and engine are put together, and what was asked for is reported.

Each function here is a command without its printing; what it returns is what `--json` prints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from weightstream.commands.engines import Say, chosen_of, engine_of, profile_of, temporary, weights_of
from weightstream.commands.outcome import report_of
from weightstream.commands.preflight import require_memory, require_same_text, store_exists
from weightstream.commands.sizing import Choice, divided, micro_batch_of, rehearse_step
from weightstream.config.architectures import architecture, vocabulary_of
from weightstream.config.config import RunConfig
from weightstream.data.dataset import Dataset, prepare, tokenizer_of
from weightstream.data.tokenizer import Tokenizer
from weightstream.engine.engine import Engine
from weightstream.errors import StoreError, StoreMismatchError
from weightstream.launch.ranks import ALONE, RunRanks
from weightstream.prediction.predicting import predict
from weightstream.store.directory import require_new
from weightstream.store.glance import glance
from weightstream.system.hosts import free_memory_bytes
from weightstream.trace.spans import Span
from weightstream.training.display import Display
from weightstream.training.evaluation import evaluate, generate
from weightstream.training.loop import Trainer
from weightstream.training.metrics import MetricsLog
from weightstream.training.tracing import Tracing
from weightstream.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True, slots=True)
class Run:
    """An open engine and the text that belongs to it."""

    config: RunConfig
    engine: Engine
    dataset: Dataset


@contextmanager
def opened(config: RunConfig, say: Say, *, create: bool, ranks: RunRanks = ALONE) -> Iterator[Run]:
    """Prepare the text, make or reopen the store, and close it in the end. With several ranks, on each of them.

    What can be refused is refused before anything is kept: first the optimizer, the model's keys and the budgets, then
    the text and its tokens.

    Raises:
        StoreError: there is no store, and `create` is false.
        WeightstreamError: anything else that is wrong with the configuration, the text or the store.
    """
    exists = store_exists(config, ranks)
    if not exists:
        if not create:
            raise StoreError(
                f"no store at {config.store}; train one first with `weightstream fit`, or give its run's folder"
            )
        ranks.first(lambda: require_new(config.store))
        ranks.first(lambda: _try(config, rehearse=False))
    config = _divided(config, ranks, say)
    weights = ranks.together(lambda: weights_of(config, say))
    began_s, training = time.monotonic(), config.training

    def model_of(tokenizer: Tokenizer) -> tuple[Any, Callable[[], nn.Module]]:
        return architecture(config.model, vocabulary=tokenizer.size, end_of_text=tokenizer.end_of_text)

    def check(dataset: Dataset) -> None:
        vocabulary = vocabulary_of(model_of(dataset.tokenizer)[0])
        for side in (dataset.train, dataset.validation):
            side.check_vocabulary(vocabulary)
        dataset.train_sequences(training.sequence_length, at_least=training.sequences_per_step)
        dataset.validation_sequences(training.sequence_length)
        if exists:
            _require_trained_on(config, dataset, training=create)
        else:
            _try(config, rehearse=True)

    def prepared(check: Callable[[Dataset], None]) -> Dataset:
        return prepare(config.data, config.out / "data", base=Path.cwd(), check=check)

    dataset = ranks.first(lambda: prepared(check))
    # Where another rank of this host has prepared it, it is only opened.
    dataset = ranks.together(lambda: dataset or prepared(lambda dataset: None))
    require_same_text(dataset, ranks)
    say(_describe(dataset, time.monotonic() - began_s))
    _, build = model_of(dataset.tokenizer)
    free_bytes = free_memory_bytes()
    with engine_of(config, config.store, build, say, weights, ranks) as engine:
        require_memory(engine, free_bytes, ranks)
        yield Run(config, engine, dataset)


def _require_trained_on(config: RunConfig, dataset: Dataset, *, training: bool) -> None:
    """Refuse text that a store was not trained on, before anything is kept of it; to evaluate and generate any will do whose
    tokenizer is given, since one that is trained on it would be another one than the store's.

    Raises:
        StoreMismatchError: naming the tokenizer to give, if it is still there.
    """
    found = glance(config.store)
    trained_on = None if found is None else found.progress.get("data")
    if trained_on in (None, dataset.digest) or not (training or config.data.tokenizer.path is None):
        return
    message = f"store {config.store} was trained so far with data {trained_on}, found {dataset.digest}; "
    if training:
        raise StoreMismatchError(f"{message}give the same text and settings, or another `out`")
    file = tokenizer_of(config.out / "data", trained_on) or "the tokenizer.json of its text"
    raise StoreMismatchError(f"{message}give the same text and settings, or for other text data.tokenizer.path={file}")


def _try(config: RunConfig, *, rehearse: bool) -> None:
    """Whether an engine as the run would have it works at all, and has room for what one rank computes."""
    with temporary(config) as engine:
        if rehearse:
            rehearse_step(engine, config)


def _divided(config: RunConfig, ranks: RunRanks, say: Say) -> RunConfig:
    """The configuration with the micro-batches that `micro_batch: auto` means: those of the store's steps, else what the
    first rank chooses, before a store is made."""
    if config.training.micro_batch != "auto":
        return config
    chosen = ranks.first(lambda: chosen_of(config, None, say) if ranks.speaks else None)
    size, count, line = ranks.gather(
        None if chosen is None else [chosen.size, chosen.micro_batches, chosen.describe()]
    )[0]
    say(line)
    return divided(config, Choice(size, count))


Predict = Callable[[Run, Say], Sequence[Span] | None]
"""The spans of a run's steps as they are predicted; None where nothing can be."""


def predicted_spans(run: Run, say: Say, path: Path | None = None) -> Sequence[Span] | None:
    """A step of an open run on the virtual clock, where this machine has been measured. Never ends the run itself.

    Args:
        path: of the profile; by default where `weightstream calibrate` leaves it, if it did.
    """
    config = run.config
    try:
        profile = profile_of(path, say)
        if profile is None:
            return None
        micro_batches = config.training.micro_batches
        found = predict(
            run.engine, micro_batch_of(config.training), profile, micro_batches=micro_batches, keep_spans=True
        )
    except Exception as error:  # whatever a model does that the census does not know: training goes on
        say(f"no prediction: {error}")
        return None
    return found.simulation.spans


def fit(
    config: RunConfig, console: Console, ranks: RunRanks = ALONE, predict: Predict | None = None
) -> dict[str, Any] | None:
    """Train to `training.steps`, from wherever the store stands; the result says what happened, on the first rank.

    Args:
        predict: called once, on the first rank, after the first step.
    """
    say = _sayer(console)
    with opened(config, say, create=True, ranks=ranks) as run:
        config, engine = run.config, run.engine
        trainer = Trainer(engine, run.dataset, config.training, seed=config.seed)
        if ranks.speaks:
            (config.out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        if engine.step_count:
            say(_going_on(engine.step_count, config.training.steps))
        with (
            Display(first_step=engine.step_count, steps=config.training.steps, console=console) as display,
            MetricsLog(
                config.out, resumed_step=engine.step_count, tensorboard=config.training.tensorboard and ranks.speaks,
                name="metrics.jsonl" if ranks.speaks else f"metrics/rank-{ranks.rank}.jsonl",
            ) as metrics,
            Tracing(
                config.out, engine.recorder, speaks=ranks.speaks,
                predict=None if predict is None else lambda: predict(run, say),
            ) as tracing,
        ):  # fmt: skip

            def stepped(step: int) -> None:
                tracing.stepped()
                ranks.stepped(step, say)

            outcome = trainer.train(display, metrics, stop=ranks.stop(display.note), stepped=stepped)
            compared = tracing.comparison()
        sample = config.training.sample
        continued: list[str] = []
        if outcome.stopped_by is None and sample.prompts:
            continued = generate(
                engine, run.dataset.tokenizer, sample.prompts,
                tokens=sample.tokens, temperature=sample.temperature, seed=config.seed,
            )  # fmt: skip
        samples = [{"prompt": p, "continued": c} for p, c in zip(sample.prompts, continued, strict=False)]
        return report_of(config, engine, outcome, samples, compared) if ranks.speaks else None


def measure(config: RunConfig, say: Say, *, sequences: int | None) -> dict[str, Any]:
    """The validation loss of a trained store."""
    with opened(config, say, create=False) as run:
        rule, training = run.config.training.validation, run.config.training
        found = evaluate(
            run.engine,
            run.dataset.validation_sequences(training.sequence_length),
            limit=sequences or rule.sequences,
            size=rule.micro_batch_size or training.micro_batch_size,
        )
        return {
            "step": run.engine.step_count,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "tokens": found.tokens,
        }


def complete(
    config: RunConfig, say: Say, prompts: Sequence[str], *, tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Text that a trained store continues."""
    with opened(config, say, create=False) as run:
        began_s = time.monotonic()
        continued = generate(
            run.engine, run.dataset.tokenizer, prompts, tokens=tokens, temperature=temperature, seed=seed
        )
        return {
            "step": run.engine.step_count,
            "seconds": time.monotonic() - began_s,
            "samples": [{"prompt": p, "continued": c} for p, c in zip(prompts, continued, strict=True)],
        }


def _going_on(step: int, steps: int) -> str:
    if step < steps:
        return f"going on from step {step} of {steps}"
    return f"nothing to train: the store is at step {step}, and training.steps is {steps}"


def _describe(dataset: Dataset, seconds: float) -> str:
    train, validation = dataset.train.facts, dataset.validation.facts
    return (
        f"text: {format_bytes(train.text_bytes)} in {train.documents} documents, {format_count(train.tokens)} tokens; "
        f"{validation.documents} documents, {format_count(validation.tokens)} tokens held out; "
        f"tokenizer of {dataset.tokenizer.size} ({format_seconds(seconds)})"
    )


def _sayer(console: Console) -> Say:
    return lambda text: console.print(text, markup=False, highlight=False)
