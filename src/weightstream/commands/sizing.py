"""`training.micro_batch: auto`: into how many micro-batches the sequences of a step are divided.

A step has the same sequences in the same order however they are divided. Every size that divides them evenly is rehearsed,
from small to large, until one does not fit; of those that fit the fastest is taken where this machine was measured, else
the largest, since it streams the same bytes for fewer operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightstream.config.architectures import architecture, vocabulary_of
from weightstream.config.config import RunConfig
from weightstream.engine.engine import DTYPES, Engine
from weightstream.errors import PlanError
from weightstream.machine.profile import Profile
from weightstream.prediction.census import Census
from weightstream.prediction.predicting import Prediction, predict
from weightstream.store.glance import glance
from weightstream.system.hosts import cores
from weightstream.training.settings import TrainingConfig
from weightstream.units import format_bytes

KEY = "micro_batch_size"
"""In a store's progress: the size that its steps had, which goes where the store goes."""
_FAR = 2
"""What a size needs is taken to grow with it; one that would need so many times the device's memory is not rehearsed."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """A size that fits, and how long a step of such micro-batches is predicted to take."""

    size: int
    micro_batches: int
    seconds_per_step: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The size that was taken, and all that fit; none were tried where the store says what its steps had."""

    size: int
    micro_batches: int
    tried: tuple[Fitting, ...] = ()

    def describe(self) -> str:
        """One line for a person."""
        taken = f"micro_batch: auto      {self.micro_batches} micro-batches of {self.size} sequences"
        if not self.tried:
            return f"{taken}, as the store's steps had"
        if any(each.seconds_per_step is None for each in self.tried):
            return f"{taken}: the largest that fits; `weightstream calibrate` finds the fastest"
        all_of_them = ", ".join(f"{each.size}: {each.seconds_per_step:.3g} s" for each in self.tried)
        return f"{taken}: the fastest that fits (seconds per step by size: {all_of_them})"


def micro_batch_of(training: TrainingConfig, size: int | None = None) -> dict[str, Tensor]:
    """A micro-batch as a run has them, of any tokens."""
    ids = torch.zeros((size or training.micro_batch_size, training.sequence_length), dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def rehearse_step(engine: Engine, config: RunConfig, size: int | None = None) -> None:
    """One micro-batch of a run, so that the plan knows its activations, and refuses steps that do not fit on its cluster.

    Args:
        size: of micro-batches into which a step's sequences are divided; by default as configured.

    Raises:
        PlanError: they do not fit; before the micro-batch is made where not even its logits do.
    """
    training, settings, roles = config.training, config.engine, config.cluster.roles
    size = size or training.micro_batch_size
    count = training.sequences_per_step // size
    roles.check(count, settings.reduction_groups)
    found, _ = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    logits_bytes = size * training.sequence_length * vocabulary_of(found) * DTYPES[settings.precision].itemsize
    if logits_bytes > settings.device_memory:
        raise PlanError(
            f"device_memory={format_bytes(settings.device_memory)} is too small: the logits of one micro-batch of {size} x "
            f"{training.sequence_length} tokens take {format_bytes(logits_bytes)}; give more, or take smaller micro-batches"
        )
    share = roles.largest_share(count, settings.reduction_groups)
    engine.rehearse(micro_batch_of(training, size), micro_batches=share)
    engine.experts.measured(count)  # which all ranks reach together
    engine.outlook.planned_for(roles, count)


def predicted_step(
    engine: Engine,
    config: RunConfig,
    profile: Profile,
    *,
    size: int,
    micro_batches: int,
    step: int | None = None,
    census: Census | None = None,
) -> Prediction:
    """A steady step of the run that a configuration describes, on its cluster, with the ranks that it has on one host.

    Args:
        step: of training, which says how sparse the model is; by default as it is now.
        census: of one of its micro-batches, where it is known already.

    Raises:
        PlanError: it does not fit.
    """
    cluster = config.cluster.roles
    return predict(
        engine, micro_batch_of(config.training, size), profile, micro_batches=micro_batches, cluster=cluster,
        threads=config.engine.threads_per_worker or (None if cluster.size == 1 else max(1, cores() // cluster.size)),
        step=step, census=census,
    )  # fmt: skip


def sizes(config: RunConfig) -> list[int]:
    """All sizes that divide a step's sequences and leave no worker without any, ascending.

    Raises:
        PlanError: even micro-batches of one sequence leave a worker without any.
    """
    whole, groups, roles = config.training.sequences_per_step, config.engine.reduction_groups, config.cluster.roles
    roles.check(whole, groups)
    found = []
    for size in (size for size in range(1, whole + 1) if whole % size == 0):
        try:
            roles.check(whole // size, groups)
        except PlanError:
            continue
        found.append(size)
    return found


def choose(engine: Engine, config: RunConfig, profile: Profile | None) -> Choice:
    """The division that suits the engine's budgets, tried on it.

    Raises:
        PlanError: not even the smallest fits; the message names the smallest budget with which it does.
    """
    tried: list[Fitting] = []
    for size in sizes(config):
        if tried and _far_too_large(engine, size / tried[-1].size):
            break
        try:
            tried.append(_rehearsed(engine, config, profile, size))
        except PlanError:
            if not tried:
                raise
            break
    best = fastest(tried)
    return Choice(best.size, best.micro_batches, tuple(tried))


def fastest(tried: Sequence[Fitting]) -> Fitting:
    """The least seconds; among equals, and where none are known, the largest."""
    return min(tried, key=lambda each: (each.seconds_per_step or 0.0, -each.size))


def _rehearsed(engine: Engine, config: RunConfig, profile: Profile | None, size: int) -> Fitting:
    count = config.training.sequences_per_step // size
    rehearse_step(engine, config, size)
    if profile is None:
        return Fitting(size, count, None)
    found = predicted_step(engine, config, profile, size=size, micro_batches=count)
    return Fitting(size, count, found.seconds_per_step)


def _far_too_large(engine: Engine, times: float) -> bool:
    facts = engine.runtime.facts
    return facts.workspace_bytes * times > _FAR * facts.device_memory


def trained_with(store: Path, config: RunConfig) -> Choice | None:
    """What the steps of a store had so far; None where there are none yet, or a step has other sequences now."""
    found = glance(store)
    size = None if found is None else found.progress.get(KEY)
    whole = config.training.sequences_per_step
    return Choice(size, whole // size) if size and whole % size == 0 else None


def divided(config: RunConfig, choice: Choice) -> RunConfig:
    """The configuration with the division written into it, so that whoever reads it need not choose again."""
    training = config.training.model_copy(
        update={"micro_batch": "given", "micro_batches": choice.micro_batches, "micro_batch_size": choice.size}
    )
    return config.model_copy(update={"training": training})
