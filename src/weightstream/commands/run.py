"""A configuration becomes a run: text, model and engine are put together, and what was asked for is reported.

Each function here is a command without its printing; what it returns is what `--json` prints.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from weightstream.commands.preflight import require_memory, require_same_text, store_exists
from weightstream.commands.sizing import (
    Choice,
    choose,
    divided,
    micro_batch_of,
    predicted_step,
    rehearse_step,
    trained_with,
)
from weightstream.config.architectures import architecture, vocabulary_of
from weightstream.config.config import RunConfig
from weightstream.data.dataset import Dataset, prepare, tokenizer_of
from weightstream.data.tokenizer import Tokenizer
from weightstream.engine.engine import Engine
from weightstream.engine.multiplying import AutoKernels
from weightstream.engine.plan_text import experts_moved, flows_now, plan_text, reach_of
from weightstream.errors import StoreError, StoreMismatchError
from weightstream.hub import initial_values
from weightstream.launch.ranks import ALONE, RunRanks
from weightstream.machine.profile import DEFAULT_PATH, Profile, load_profile
from weightstream.machine.sparsity import auto_kernels
from weightstream.nn import Pool
from weightstream.prediction.predicting import Stretch, census_of, commonest, predict, prediction_text, stretches
from weightstream.sparse.kernels import Kernel
from weightstream.store.directory import require_new
from weightstream.store.glance import glance
from weightstream.store.optimizers import Optimizer
from weightstream.store.store import Store
from weightstream.system.hosts import free_memory_bytes
from weightstream.trace.compare import Comparison, text_of
from weightstream.trace.spans import Span
from weightstream.training.display import Display
from weightstream.training.evaluation import evaluate, generate
from weightstream.training.loop import Outcome, Trainer
from weightstream.training.metrics import MetricsLog
from weightstream.training.tracing import Tracing
from weightstream.units import format_bytes, format_count, format_seconds

Say = Callable[[str], None]

_LEAST_SHOWN = 0.005
"""The summary leaves out what takes a smaller part of a step."""


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
        ranks.first(lambda: _try(config, ranks, rehearse=False))
    config = _divided(config, ranks, say)
    weights = ranks.together(lambda: _weights(config, say))
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
            _try(config, ranks, rehearse=True)

    def prepared(check: Callable[[Dataset], None]) -> Dataset:
        return prepare(config.data, config.out / "data", base=Path.cwd(), check=check)

    dataset = ranks.first(lambda: prepared(check))
    # Where another rank of this host has prepared it, it is only opened.
    dataset = ranks.together(lambda: dataset or prepared(lambda dataset: None))
    require_same_text(dataset, ranks)
    say(_describe(dataset, time.monotonic() - began_s))
    _, build = model_of(dataset.tokenizer)
    free_bytes = free_memory_bytes()
    with _engine(config, config.store, build, say, weights, ranks) as engine:
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


def _try(config: RunConfig, ranks: RunRanks, *, rehearse: bool) -> None:
    """Whether an engine as the run would have it works at all, and has room for what one rank computes."""
    with _temporary(config) as engine:
        if rehearse:
            rehearse_step(engine, config)


@contextmanager
def _temporary(config: RunConfig, say: Say | None = None) -> Iterator[Engine]:
    """An engine as the run would have it, before there is any text: its store is a temporary one beside the run's own.

    The tokenizer is taken to have all the tokens that were asked for. Weights are not read, and masks that would follow from
    them are random ones: of as many non-zeros, or where only weights tell how many, of the share that the group asks for;
    `kernels: auto` takes none of these then, as the run's own store does not know their density when it chooses.
    """
    settings = config.sparsity.settings(config.training.steps)

    def uncounted(name: str) -> bool:
        group = settings.group_of(name)
        return group is not None and not group.counted and group.given is None

    groups = [
        group.model_copy(update={"init": "random"})
        if group.init in ("magnitude", "zeros") and group.algorithm != "gmp"
        else group
        for group in config.sparsity.groups
    ]
    sparsity = config.sparsity.model_copy(update={"groups": tuple(groups)})
    config = config.model_copy(update={"sparsity": sparsity})
    _, build = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    near = next(folder for folder in config.store.absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".weightstream-plan-", dir=near) as folder:
        engine = _engine(config, Path(folder) / "store", build, say, unlike=uncounted)
        try:
            yield engine
        finally:
            engine.close()


def _unsettled(config: RunConfig) -> list[str]:
    """What a plan does not know of sparse parameters."""
    groups = config.sparsity.settings(config.training.steps).groups
    return [
        f"masks of {', '.join(group.patterns)}: how many non-zeros each parameter has is found from the weights when the "
        f"store is made; planned here as {1 - group.sparsity_at(0):.0%} of each"
        for group in groups
        if group.settled and not group.counted and group.given is None
    ]


def _divided(config: RunConfig, ranks: RunRanks, say: Say) -> RunConfig:
    """The configuration with the micro-batches that `micro_batch: auto` means: those of the store's steps, else what the
    first rank chooses, before a store is made."""
    if config.training.micro_batch != "auto":
        return config
    chosen = ranks.first(lambda: _chosen(config, None, say) if ranks.speaks else None)
    size, count, line = ranks.gather(
        None if chosen is None else [chosen.size, chosen.micro_batches, chosen.describe()]
    )[0]
    say(line)
    return divided(config, Choice(size, count))


def _chosen(config: RunConfig, profile: Path | None, say: Say) -> Choice:
    found = trained_with(config.store, config)
    if found is not None:
        return found
    with _temporary(config) as engine:
        return choose(engine, config, _profile(profile, say))


def _engine(
    config: RunConfig,
    store: Path,
    build: Callable[[], nn.Module],
    say: Say | None,
    initial: Mapping[str, Tensor] | None = None,
    ranks: RunRanks = ALONE,
    unlike: Callable[[str], bool] | None = None,
) -> Engine:
    optimizer = Optimizer.from_json(config.optimizer.to_json(config.training.steps))
    settings = engine_settings(config, say or (lambda text: None))
    if unlike is not None and isinstance(settings["kernels"], AutoKernels):
        settings["kernels"] = replace(settings["kernels"], unlike=unlike)
    threads = threads_of(config)
    if ranks.links is not None:  # the first rank has the store, and hosts may differ in cores
        threads = ranks.gather(threads or torch.get_num_threads())[0]
    settings["threads_per_worker"] = threads
    return Engine(
        build, store, optimizer, log=say, initial=initial, cluster=ranks.cluster, links=ranks.links, **settings
    )


def threads_of(config: RunConfig) -> int | None:
    """Threads of each rank: as configured, else as the store was made with, which decide bits."""
    if config.engine.threads_per_worker is not None:
        return config.engine.threads_per_worker
    found = glance(config.store)
    return None if found is None else found.contract.get("numerics", {}).get("threads_per_worker")


def engine_settings(config: RunConfig, say: Say = lambda text: None) -> dict[str, Any]:
    """The keywords of `Engine` that a configuration gives."""
    settings = config.engine
    return {
        "clip_norm": config.training.clip_norm,
        "precision": settings.precision,
        "device": settings.device,
        "device_memory": settings.device_memory,
        "host_memory": settings.host_memory,
        "seed": config.seed,
        "reduction_groups": settings.reduction_groups,
        "threads_per_worker": settings.threads_per_worker,
        "max_block_bytes": settings.max_block_bytes,
        "panel_elements": settings.panel_elements,
        "block_rules": settings.block_rules,
        "activations": settings.activations,
        "prefetch": settings.prefetch,
        "ram_tier": settings.ram_tier,
        "max_skipped_steps": settings.max_skipped_steps,
        "commit_every": settings.commit_every,
        "allow_other_numerics": settings.allow_other_numerics,
        "sparsity": config.sparsity.settings(config.training.steps),
        "kernels": _kernels(config, say),
        "experts_memory": settings.experts_memory,
        "experts_pool": {pool.pattern: Pool(pool.limit, pool.when_full) for pool in settings.experts_pool} or None,
        "compaction_share": settings.compaction_share,
    }


def _kernels(config: RunConfig, say: Say) -> Mapping[str, Kernel] | AutoKernels:
    """Which products are by kernels; `auto` by this machine's profile, if it was ever measured."""
    kernels = config.sparsity.kernels
    if kernels != "auto":
        return kernels
    training = config.training
    return auto_kernels(tokens=training.micro_batch_size * training.sequence_length, warn=say)


def _weights(config: RunConfig, say: Say) -> Mapping[str, Tensor] | None:
    """The weights of the model's folder, if a new store is to begin with them."""
    folder = config.model.path
    if folder is None or not config.model.weights:
        return None
    _, build = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    found = initial_values(folder.expanduser(), build, config.store)
    if found is not None:
        say(f"training starts from the {len(found)} tensors of {folder}")
    return found


Predict = Callable[[Run, Say], Sequence[Span] | None]
"""The spans of a run's steps as they are predicted; None where nothing can be."""


def predicted_spans(run: Run, say: Say, path: Path | None = None) -> Sequence[Span] | None:
    """A step of an open run on the virtual clock, where this machine has been measured. Never ends the run itself.

    Args:
        path: of the profile; by default where `weightstream calibrate` leaves it, if it did.
    """
    config = run.config
    try:
        profile = _profile(path, say)
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
        return _report(run, outcome, samples, compared) if ranks.speaks else None


def plan(config: RunConfig, say: Say, profile: Path | None = None) -> dict[str, Any]:
    """What a run would use, found out without the text and without leaving anything behind; and, where this machine has
    been measured, how long it would take."""
    chosen = _chosen(config, profile, say) if config.training.micro_batch == "auto" else None
    config = config if chosen is None else divided(config, chosen)
    with _temporary(config, say) as engine:
        rehearse_step(engine, config)
        cluster, micro_batches = config.cluster.roles, config.training.micro_batches
        pieces = _predicted(engine, config, say, profile)
        step = commonest(pieces).step if pieces else None
        whose: dict[str, Any] = {"cluster": cluster, "micro_batches": micro_batches, "step": step}
        _, allotment = engine.outlook.planned_for(cluster, micro_batches)
        flows, (own, dense) = flows_now(engine, **whose), reach_of(engine)
        experts = experts_moved(engine, cluster, micro_batches)
        disk_bytes = shutil.disk_usage(engine.store.path).total
        each = config.training.micro_batch_size * config.training.sequence_length
        told = "seconds per step  not known: run `weightstream calibrate` first"
        if pieces:
            told = prediction_text(pieces, tokens_per_micro_batch=each, disk_bytes=disk_bytes)
        return {
            "text": "\n".join(
                [
                    plan_text(engine, **whose),
                    *_unsettled(config),
                    *([] if chosen is None else [chosen.describe()]),
                    told,
                ]
            ),
            "micro_batches": micro_batches,
            "micro_batch_size": config.training.micro_batch_size,
            "prefetch": config.engine.prefetch,
            "predicted": _figures(pieces, each),
            "parameters": sum(block.numel for block in engine.store.blocks),
            "state_bytes": _state_bytes(engine.store),
            "device_bytes": allotment.device_bytes,
            "host_bytes": allotment.host_bytes,
            "read_bytes_per_step": flows.disk_read.planned,
            "written_bytes_per_step": flows.disk_written.planned,
            "moved_per_step": flows.to_json(),
            "experts_per_step": None if experts is None else experts.to_json(),
            "room_parameters": {"disk": own.disk, "ram": own.ram},
            "room_parameters_dense": None if dense is None else {"disk": dense.disk, "ram": dense.ram},
            "kernels": engine.kernels,
            "blocks": [
                {
                    "name": block.name,
                    "parameters": block.numel,
                    "resident": block.resident,
                    "trainable": block.trainable,
                }
                for block in engine.store.blocks
            ],
        }


def _profile(path: Path | None, say: Say) -> Profile | None:
    """That one, which must be there; or the one of this machine, if it was ever measured."""
    if path is None and not DEFAULT_PATH.expanduser().exists():
        return None
    return load_profile(path or DEFAULT_PATH, say)


def _predicted(engine: Engine, config: RunConfig, say: Say, path: Path | None) -> list[Stretch]:
    """The run as it is predicted; nothing without a profile."""
    profile = _profile(path, say)
    if profile is None:
        return []
    training, census = config.training, census_of(engine, micro_batch_of(config.training))
    return stretches(
        engine,
        training.steps,
        lambda step: predicted_step(
            engine, config, profile, size=training.micro_batch_size, micro_batches=training.micro_batches, step=step,
            census=census,
        ),
    )  # fmt: skip


def _figures(pieces: Sequence[Stretch], tokens_per_micro_batch: int) -> dict[str, Any] | None:
    if not pieces:
        return None
    found = commonest(pieces).found
    return {
        "seconds_per_step": found.seconds_per_step,
        "binds": found.binds,
        "compute_s": found.compute_s,
        "optimizer_s": found.optimizer_s,
        "disk_s": found.disk_s,
        "link_s": found.link_s,
        "compute_bound_tokens_per_step": found.compute_bound_micro_batches() * tokens_per_micro_batch,
        "run_s": sum(piece.found.seconds_per_step * piece.steps for piece in pieces),
        "run_written_bytes": sum(piece.found.written_bytes * piece.steps for piece in pieces),
        "steps_like": [
            {"step": piece.step, "steps": piece.steps, "seconds_per_step": piece.found.seconds_per_step}
            for piece in pieces
        ],
    }


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


def _report(run: Run, outcome: Outcome, samples: list[dict[str, str]], compared: Comparison | None) -> dict[str, Any]:
    config, info = run.config, run.engine.store.info()
    before, after = outcome.before, outcome.after
    moved = outcome.read_bytes + outcome.written_bytes
    return {
        "step": outcome.step,
        "steps": config.training.steps,
        "stopped_by": outcome.stopped_by.name if outcome.stopped_by else None,
        "parameters": info["parameters"],
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity if after else None,
        "loss_before": before.loss,
        "loss_after": after.loss if after else None,
        "samples": samples,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "stalled_s": outcome.stalled_s,
        "skipped_steps": outcome.skipped_steps,
        "kernels": run.engine.kernels,
        "state_bytes": _state_bytes(run.engine.store),
        "device_memory_bytes": config.engine.device_memory,
        "host_memory_bytes": config.engine.host_memory,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "read_bytes": outcome.read_bytes,
        "written_bytes": outcome.written_bytes,
        "bound_bytes": outcome.bound_bytes,
        "moved_over_bound": moved / outcome.bound_bytes if outcome.bound_bytes else None,
        "store": str(config.store),
        "trace": compared and compared.to_json() | {"text": text_of(compared, least=_LEAST_SHOWN)},
    }


def _state_bytes(store: Store) -> int:
    """Masters and moments; not the copy that streams, which is made from them."""
    return sum(part.nbytes for layout in store.layouts.units for part in layout.parts if part.name != "copy")


def summary(report: dict[str, Any]) -> str:
    """The report of `fit` as a person reads it."""
    steps = f"{report['step']} of {max(report['step'], report['steps'])} steps"
    lines = [f"{steps}, {format_count(report['parameters'])} parameters"]
    after, before = report["perplexity_after"], report["perplexity_before"]
    if after is not None:
        lines.append(f"perplexity   {_plain(before)} before, {_plain(after)} after, on held-out text")
    if report["tokens"]:
        seconds, stalled = report["seconds"], report["stalled_s"] / report["seconds"]
        speed = format_count(report["tokens"] / seconds)
        lines.append(
            f"trained      {format_count(report['tokens'])} tokens in {format_seconds(seconds)}, {speed} tokens/s"
        )
        lines.append(f"waited       {format_seconds(report['stalled_s'])} for the store ({stalled:.1%})")
        lines.append(
            f"moved        {format_bytes(report['read_bytes'])} read, {format_bytes(report['written_bytes'])} written, "
            f"{report['moved_over_bound'] or 0:.3f} times the lower bound of steady steps"
        )
    times = report["state_bytes"] / report["device_memory_bytes"]
    lines += [
        f"state        {format_bytes(report['state_bytes'])} of masters and moments, {times:.1f} times device_memory "
        f"({format_bytes(report['device_memory_bytes'])})",
        f"memory       {format_bytes(report['peak_rss_bytes'])} at most, of the whole process",
        f"store        {report['store']}, committed at step {report['step']}",
    ]
    if report["skipped_steps"]:
        lines.append(f"skipped      {report['skipped_steps']} steps whose gradients were not finite")
    if report["trace"]:
        lines += ["", report["trace"]["text"]]
    for sample in report["samples"]:
        lines += ["", f"sample, after {sample['prompt']!r}:", *(f"    {line}" for line in _shown(sample))]
    return "\n".join(lines)


def _shown(sample: dict[str, str]) -> list[str]:
    return (sample["prompt"] + sample["continued"]).splitlines()


def _plain(number: float) -> str:
    return f"{number:.2f}" if isfinite(number) and number < 1e6 else f"{number:.3g}"


def _describe(dataset: Dataset, seconds: float) -> str:
    train, validation = dataset.train.facts, dataset.validation.facts
    return (
        f"text: {format_bytes(train.text_bytes)} in {train.documents} documents, {format_count(train.tokens)} tokens; "
        f"{validation.documents} documents, {format_count(validation.tokens)} tokens held out; "
        f"tokenizer of {dataset.tokenizer.size} ({format_seconds(seconds)})"
    )


def _sayer(console: Console) -> Say:
    return lambda text: console.print(text, markup=False, highlight=False)
