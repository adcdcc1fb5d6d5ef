"""The training loop: from where the store stands to the last step, or to the moment somebody asks to stop.

Everything that the loop needs to go on is in `engine.progress`, which the store commits with each step: where in the
order of the data it is, and what was measured before the first step. So a killed run needs nothing but its store.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.data.batches import Batches
from weightstream.data.dataset import Dataset
from weightstream.errors import StoreMismatchError
from weightstream.training.display import Display, StepFacts
from weightstream.training.evaluation import Evaluation, evaluate
from weightstream.training.memory import peak_rss_bytes, rss_bytes
from weightstream.training.metrics import MetricsLog
from weightstream.training.ranks import RankTalk, describe
from weightstream.training.settings import TrainingConfig
from weightstream.training.stopping import Stop, StopRequest

if TYPE_CHECKING:
    from weightstream.engine.engine import Engine
    from weightstream.engine.steps import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call of `train` did; byte counts are of this process, losses of the whole run."""

    first_step: int
    step: int
    stopped_by: signal.Signals | None
    before: Evaluation
    after: Evaluation | None
    tokens: int
    seconds: float
    stalled_s: float
    read_bytes: int
    written_bytes: int
    bound_bytes: int
    skipped_steps: int
    peak_rss_bytes: int


class Trainer:
    """Drives an engine over a dataset; one object per process and run."""

    display: Display
    metrics: MetricsLog

    def __init__(self, engine: "Engine", dataset: Dataset, config: TrainingConfig, *, seed: int) -> None:
        """Check that the store was trained on this text so far.

        Raises:
            StoreMismatchError: it was trained on other text, or with another sequence length.
            DataError: the text has too few tokens for one step, or for one sequence of validation.
        """
        self.engine, self.config = engine, config
        train = dataset.train_sequences(config.sequence_length, at_least=config.sequences_per_step)
        self.validation = dataset.validation_sequences(config.sequence_length)
        self.batches = Batches(
            sequences=train, order=dataset.order(train, seed), count=config.micro_batches, size=config.micro_batch_size
        )
        engine.progress["micro_batch_size"] = config.micro_batch_size  # for `micro_batch: auto`, wherever it goes on
        for key, found in (("data", dataset.digest), ("sequence_length", config.sequence_length)):
            expected = engine.progress.setdefault(key, found)
            if expected != found:
                raise StoreMismatchError(
                    f"store {engine.store.path} was trained so far with {key} {expected}, found {found}; give the same "
                    "text and settings, or another `out`"
                )

    def train(
        self,
        display: Display,
        metrics: MetricsLog,
        *,
        stop: Stop | None = None,
        stepped: Callable[[int], None] = lambda step: None,
    ) -> Outcome:
        """Go on to `config.steps`, or until Ctrl-C or SIGTERM; commits before it returns.

        With several ranks every one of them trains, and all stop after the same step.

        Args:
            stop: whether somebody asked to stop; default: this process listens to both signals.
            stepped: told of each step that was done.
        """
        self.display, self.metrics = display, metrics
        engine, first_step, began_s = self.engine, self.engine.step_count, time.monotonic()
        stalled_s, read, written, bound, skipped = 0.0, 0, 0, 0, 0
        after = None
        asked = stop or StopRequest(self.display.note)
        with asked.listening():
            self._talk = RankTalk(engine, lambda: asked.signal)
            before = self._before()
            self._talk.before_steps()
            while engine.step_count < self.config.steps and self._talk.stop is None:
                facts = self._step()
                stepped(facts.step)
                stalled_s += facts.stalled_s
                read, written = read + facts.read_bytes, written + facts.written_bytes
                bound, skipped = bound + facts.bound_bytes, skipped + facts.skipped
                self._watch(facts.step)
            engine.commit()
            if self._talk.stop is None:
                after = self._validate("after")
        return Outcome(
            first_step=first_step,
            step=engine.step_count,
            stopped_by=self._talk.stop,
            before=before,
            after=after,
            tokens=(engine.step_count - first_step) * self.config.tokens_per_step,
            seconds=time.monotonic() - began_s,
            stalled_s=stalled_s,
            read_bytes=read,
            written_bytes=written,
            bound_bytes=bound,
            skipped_steps=skipped,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _step(self) -> StepFacts:
        progress = self.engine.progress
        position = progress.get("sequences", 0)
        micro_batches = self.batches.at(position)
        progress["sequences"] = position + self.batches.sequences_per_step  # committed with the step that uses them
        began_s = time.monotonic()
        result: StepResult = self.engine.step(micro_batches)
        seconds, rss = time.monotonic() - began_s, rss_bytes()
        ranks = self._talk.after_step(result, seconds, rss)
        facts = StepFacts(
            step=result.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=seconds,
            tokens=self.config.tokens_per_step,
            stalled_s=result.stalled_s,
            read_bytes=result.bytes.read,
            written_bytes=result.bytes.written,
            bound_bytes=result.bytes.bound,
            rss_bytes=rss,
            skipped=result.skipped,
            ranks=describe(ranks, self.engine.cluster.compute_ranks.start) if ranks else "",
        )
        self.display.step(facts)
        self.metrics.write(
            "train",
            facts.step,
            loss=facts.loss,
            **({} if facts.grad_norm is None else {"grad_norm": facts.grad_norm}),
            lr=facts.lr,
            tokens_per_s=facts.tokens / facts.seconds,
            seconds=facts.seconds,
            stalled_s=facts.stalled_s,
            read_bytes=facts.read_bytes,
            written_bytes=facts.written_bytes,
            bound_bytes=facts.bound_bytes,
            rss_bytes=facts.rss_bytes,
            skipped=facts.skipped,
            **({} if not ranks else ranks[self.engine.rank].sent_figures()),
        )
        if result.experts:
            found = result.experts.values()
            self.metrics.write(
                "experts", facts.step, touched=sum(each.touched for each in found), new=sum(each.new for each in found),
                redirected=sum(each.redirected for each in found),
            )  # fmt: skip
        if result.masks:
            step = facts.step
            self.metrics.write("density", step, **{name: found.density for name, found in result.masks.items()})
            self.metrics.write("turnover", step, **{name: found.turnover for name, found in result.masks.items()})
        return facts

    def _watch(self, step: int) -> None:
        """Validation and snapshots that are due after this step; the last step is validated by `train`."""
        validation, snapshots = self.config.validation, self.config.snapshots
        if validation.every and step % validation.every == 0 and step < self.config.steps:
            self._validate("validation")
        if snapshots.every and step % snapshots.every == 0:
            self._snapshot("step", f"step-{step:08}", keep=snapshots.keep_last)

    def _keep_if_best(self, step: int, loss: float) -> None:
        # The name holds the loss, so that the snapshot itself says what the best so far is, whatever was killed when.
        losses = [float(name.rpartition("-")[2]) for name in self.engine.snapshots() if name.startswith("best-")]
        if loss < min(losses, default=float("inf")):
            self._snapshot("best", f"best-{step:08}-{loss:.6f}", keep=1)

    def _snapshot(self, kind: str, name: str, *, keep: int) -> None:
        engine = self.engine
        # A run that was killed may have taken it and then lost the steps after it.
        if name not in engine.snapshots():
            engine.snapshot(name)
        for older in sorted(name for name in engine.snapshots() if name.startswith(f"{kind}-"))[:-keep]:
            engine.remove_snapshot(older)

    def _before(self) -> Evaluation:
        """Validation before the first step, measured once in the life of a store."""
        progress = self.engine.progress
        if "before" not in progress:
            found = self._validate("before")
            progress["before"] = [found.loss, found.tokens]
        return Evaluation(*progress["before"])

    def _validate(self, when: str) -> Evaluation:
        rule, step = self.config.validation, self.engine.step_count
        size = rule.micro_batch_size or self.config.micro_batch_size
        found = evaluate(self.engine, self.validation, limit=rule.sequences, size=size)
        self.display.note(f"step {step}: {when}: loss {found.loss:.4f}, perplexity {found.perplexity:.2f}")
        self.metrics.write("validation", step, loss=found.loss, perplexity=found.perplexity)
        if self.config.snapshots.keep_best and step:
            self._keep_if_best(step, found.loss)
        return found
