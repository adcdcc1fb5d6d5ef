"""The public API: an engine that trains a model out of a store, within the memory that it is given."""

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from weightstream.blocks import Block, Rule
from weightstream.cluster import Cluster
from weightstream.engine.captures import SideOutputs, find_side_outputs
from weightstream.engine.multiplying import AutoKernels, chosen, driven
from weightstream.engine.opening import Wanted, contract_of, opened, sparsity_now
from weightstream.engine.outlook import Outlook
from weightstream.engine.planning import Budgets, owners_of, same_buffers
from weightstream.engine.steps import (
    MaskFacts,
    MovedBytes,
    StepResult,
    default_loss,
    loss_weights,
    mask_facts,
    target_tokens,
    to_device,
    usable_device,
)
from weightstream.errors import ConfigError, NonFiniteError, StoreError
from weightstream.experts.experts import Experts, settings_of
from weightstream.fabric.links import Links
from weightstream.fabric.peers import Alone, Peers
from weightstream.fabric.ranks import Ranks
from weightstream.fabric.staging import Staging
from weightstream.fabric.together import SUMS_TRAVELLING, Together
from weightstream.masking.masking import Masking
from weightstream.masking.remasking import Remasking
from weightstream.nn.pool import Pool
from weightstream.runtime.keeping import Keeper
from weightstream.runtime.runtime import Runtime, StepOutcome
from weightstream.runtime.streaming import StreamedModel, follow, without_cache
from weightstream.schedule.allotment import Activations, Allotment, Facts, allot
from weightstream.schedule.cost import StepBytes
from weightstream.schedule.operations import Schedule, Visit
from weightstream.schedule.planner import build
from weightstream.schedule.verify import verify
from weightstream.sparse.choosing import CHOSEN_KERNELS
from weightstream.sparse.kernels import Kernel
from weightstream.sparse.pieces import dense_by_default
from weightstream.sparse.settings import Sparsity
from weightstream.store.block_bytes import NEVER_SPARSE
from weightstream.store.compaction import SHARE
from weightstream.store.glance import glance
from weightstream.store.interval import Interval
from weightstream.store.layout import Precision
from weightstream.store.optimizers import Optimizer
from weightstream.store.owned import Holding
from weightstream.store.recording import EVERY_NAME, record
from weightstream.store.store import Store
from weightstream.trace.recorder import Recorder
from weightstream.units import parse_bytes
from weightstream.worker.allocator import Ceiling, give_back, keep_memory
from weightstream.worker.audit import check_model
from weightstream.worker.expanding import Driven
from weightstream.worker.slabs import Parameters
from weightstream.worker.worker import LossFunction, Worker

T = TypeVar("T")
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Engine:
    """Trains one model whose parameters and optimizer state live in a store.

    Args:
        model: builds the model; called on the meta device, so it never exists as a whole.
        store: directory of the store; created, or reopened at its last commit.
        optimizer: one of `AdamW`, `SGD`, `Lion`, `Adafactor`, `Torch(cls, …)`.
        clip_norm: global L2 norm to clip to; updates then wait for the norm and overlap the next forward, exactly.
        precision: what streams and computes; masters, moments and sums are fp32.
        device: a device that PyTorch knows, on which blocks are computed.
        device_memory: for slabs, gradient sums and activations; in bytes, or as text such as "512MiB", as all memory here.
        host_memory: for record buffers, staged gradients, spilled activations and what stays in RAM.
        seed: of initial values and of all randomness in steps; may not change on resume.
        reduction_groups: in how many groups micro-batches are summed; fixed when the store is made.
        threads_per_worker: compute threads (default: PyTorch's); recorded in the store, since bits depend on them.
        max_block_bytes: bound on a block's streamed bytes; default: as small as `device_memory` asks for.
        block_rules: `{pattern of module names: "block" | "split" | "resident"}`, over the rules that split a model; this
            and `max_block_bytes` are fixed when the store is made.
        panel_elements: size of the units that a block is stored in, and of the panels that a larger tensor is cut into
            if the optimizer is elementwise (default 8 Mi elements); fixed when the store is made.
        activations: `"keep"`, `"recompute"`, or `"auto"`: keep what fits.
        prefetch: how many blocks ahead are fetched, at least 1.
        ram_tier: whether records may stay in RAM between uses, within `host_memory`.
        max_skipped_steps: how many steps in a row may have gradients that are not finite.
        commit_every: steps from one commit to the next, or a time such as `"30s"`; meanwhile the last commit stays whole.
        allow_other_numerics: go on, with other bits, under another PyTorch version, kind of device or number of threads than
            those of the store.
        log: told what a person should know, such as that a step was skipped, a line each.
        initial: values by parameter name for a new store, asked for one at a time; what it lacks begins as the model's
            code says. Of no effect on a store that is whole.
        cluster: who computes and who owns records, where this process is one rank of several; every rank makes the same
            calls of an engine. The result has the same bits for any number of ranks.
        links: this rank's connections to the others (`fabric.distributed.connect`).
        sparsity: which parameters are sparse, and how; fixed when the store is made. What `initial` gives is made sparse only
            as a group's `init` says; groups that do not say it are as the store was made with.
        kernels: by pattern of names, which of them are not expanded but multiplied by a kernel; or `auto_kernels(…)`: those
            with which a kernel was measured to be faster. Fixed when the store is made, since it decides the order of sums.
        experts_memory: bytes, beside `host_memory`, for the experts that one step reaches (`nn.StreamedExperts`), with
            their optimizer states, and for those of the step before while they are written. With several ranks each has
            so much, for experts that it owns and for values of those that it computes with.
        experts_pool: how many experts may come to exist (`nn.Pool`), of all layers together; or by pattern of layer names.
        compaction_share: bytes that compaction may write for each byte of experts that steps write. Dead bytes on disk are
            at most one over it times the live ones.

    Raises:
        ConfigError: settings that do not go together, or weights given to sparse parameters without a word on their masks.
        PlanError: a budget is too small; the message names the smallest that works.
        StoreError: the store cannot be opened; `StoreMismatchError`: it holds another model or other fixed settings.
        AuditError: the model would train wrong.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        store: str | os.PathLike[str],
        optimizer: Optimizer,
        *,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        device: str = "cpu",
        device_memory: str | int = "1GiB",
        host_memory: str | int = "4GiB",
        seed: int = 0,
        reduction_groups: int = 8,
        threads_per_worker: int | None = None,
        max_block_bytes: str | int | None = None,
        block_rules: Mapping[str, Rule] | None = None,
        panel_elements: int | None = None,
        activations: Activations = "auto",
        prefetch: int = 2,
        ram_tier: bool = True,
        max_skipped_steps: int = 10,
        commit_every: int | str = 1,
        allow_other_numerics: bool = False,
        log: Callable[[str], None] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        cluster: Cluster | None = None,
        links: Links | None = None,
        sparsity: Sparsity | None = None,
        kernels: Mapping[str, Kernel] | AutoKernels | None = None,
        experts_memory: str | int = "1GiB",
        experts_pool: Pool | Mapping[str, Pool] | None = None,
        compaction_share: float = SHARE,
    ) -> None:
        if precision not in DTYPES:
            raise ConfigError(f"precision: expected 'bf16' or 'fp32', found {precision!r}")
        if clip_norm is not None and not 0 < clip_norm < inf:
            raise ConfigError(f"clip_norm: expected a positive finite number or None, found {clip_norm!r}")
        if reduction_groups < 1 or prefetch < 1:
            raise ConfigError(f"reduction_groups={reduction_groups}, prefetch={prefetch}: expected at least 1 each")
        if panel_elements is not None and panel_elements < 1:
            raise ConfigError(f"panel_elements: expected at least 1 element or None, found {panel_elements!r}")
        sparsity = sparsity if sparsity is not None and sparsity.groups else None
        if sparsity is not None and not optimizer.elementwise:
            raise ConfigError(
                f"sparsity: expected an optimizer that treats elements one by one, such as AdamW, SGD or Lion, found "
                f"{type(optimizer).__name__}; give one of them, or leave sparsity out"
            )
        self._interval = Interval(commit_every)
        self._log = log or (lambda text: None)
        self._closed = False
        if isinstance(kernels, str):
            raise ConfigError(
                f"kernels: expected {{pattern: kernel}}, or ws.auto_kernels(tokens=…) for what `weightstream calibrate` has "
                f"measured, found {kernels!r}"
            )
        auto = kernels if isinstance(kernels, AutoKernels) else None
        self._kernels: Mapping[str, Kernel] = (
            {} if kernels is None or isinstance(kernels, AutoKernels) else dict(kernels)
        )
        self.device = usable_device(device)
        self.threads = threads_per_worker or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.optimizer, self.clip_norm, self.precision, self.seed = optimizer, clip_norm, precision, seed
        self.max_skipped_steps = max_skipped_steps
        self._budgets = Budgets(
            device_memory=parse_bytes(device_memory), host_memory=parse_bytes(host_memory),
            reduction_groups=reduction_groups, deferred=clip_norm is not None,
            host_is_device=self.device.type == "cpu", activations=activations, prefetch=prefetch, ram_tier=ram_tier,
        )  # fmt: skip
        self.ranks = Ranks(cluster, links)
        path = Path(store)
        exists = self.ranks.gather(Store.exists(path))[0]
        asked = sparsity
        if sparsity is not None:
            made = glance(path) if self.ranks.rank == 0 else None
            sparsity = sparsity.saying(self.ranks.gather(made and made.contract.get("sparsity"))[0])
        with self.ranks.computing():
            self.model, recipes = record(model, seed, given=EVERY_NAME if exists else initial or ())
        gc.collect()  # what the model's code made and dropped is gone before memory is kept for reuse
        if self.device.type == "cpu":
            keep_memory()
        self._expert_settings = settings_of(self.model, experts_memory, experts_pool, compaction_share)
        on_host = self._budgets.device_memory if self._budgets.host_is_device else 0
        self._ceiling = Ceiling(self._budgets.host_memory + on_host + self._expert_settings.memory_bytes)
        self.model.train()
        check_model(self.model)
        contract = contract_of(
            self.model, optimizer=optimizer, device=self.device, precision=precision, seed=seed,
            reduction_groups=reduction_groups, clip_norm=clip_norm, threads=self.threads,
            **({"sparsity": sparsity.to_json()} if sparsity else {}),
            **({"kernels": self._kernels or "auto"} if self._kernels or auto else {}),
            **self._expert_settings.contract(),
        )  # fmt: skip
        self._wanted = wanted = Wanted(
            path=path, optimizer=optimizer, precision=precision, budgets=self._budgets, contract=contract,
            element_bytes=DTYPES[precision].itemsize,
            max_block_bytes=None if max_block_bytes is None else parse_bytes(max_block_bytes), rules=block_rules,
            panel_elements=panel_elements, allow_other_numerics=allow_other_numerics,
            sparsity=sparsity, asked=asked, dense=dense_by_default(self.model),
            kernels=self._kernels, choose_kernels=None if auto is None else partial(self._chosen, auto),
            families=self._expert_settings.families,
        )  # fmt: skip
        with opened(wanted, self.model, recipes, initial or {}, self.ranks, exists=exists) as self.store:
            if auto is not None:
                self._kernels = self.store.contract[CHOSEN_KERNELS]
            self._start()

    def _chosen(self, auto: AutoKernels, blocks: Sequence[Block], masking: Masking | None) -> Mapping[str, Kernel]:
        """The choice of kernels for a new store."""
        return chosen(
            self.model, blocks, masking, auto, DTYPES[self.precision], self.device, self.threads, warn=self._log
        )

    def _start(self) -> None:
        cluster = self.ranks.cluster
        self.owner = owners_of(self.store, cluster)
        owned = [unit for unit, rank in enumerate(self.owner) if rank == self.ranks.rank]
        now = sparsity_now(self.store, owned, self.ranks)
        self.masking = self._wanted.masking(self.store.units, now)
        self._remasking = None if self.masking is None else Remasking(self.masking)
        dtype = DTYPES[self.precision]
        self._driven = driven(self.model, self.store.blocks, self.masking, self._kernels, dtype, self.device)
        nonzeros = {name: each.nonzeros for name, each in self._driven.items()}
        self.parameters = Parameters(self.model, self.store.blocks, self.device, dtype, nonzeros)
        self.model.to(self.device)
        self.worker = self._make_worker()
        largest = None if self.masking is None else self.masking.largest(now)
        self.holding = Holding(self.store, owned, largest, now, self._driven)
        self.outlook = Outlook(
            self.holding, self.ranks, self.worker, self._budgets,
            masking=self.masking, driven=self._driven, largest=largest or NEVER_SPARSE, threads=self.threads,
        )  # fmt: skip
        self._restore_cache = without_cache(self.model)
        self.step_count = self.store.step
        self.progress: dict[str, Any] = {k: v for k, v in self.store.progress.items() if k != "(engine)"}
        own = self.store.progress.get("(engine)", {})
        self.skipped_steps: int = own.get("skipped", 0)
        self._skipped_in_a_row: int = own.get("skipped_in_a_row", 0)
        self.recorder = Recorder(self.ranks.rank, [unit.block for unit in self.store.units])
        self.store.watch(self.recorder.log)
        self.experts = Experts(
            self._expert_settings, self.store, self.ranks, self.worker, self.recorder, self.optimizer,
            dtype=dtype, groups=self._budgets.reduction_groups, calls=self._calls, kept=own, wait=self._wait,
            log=self._log,
        )  # fmt: skip
        self.growing = self.experts.growing
        self._used_in: tuple[tuple[Visit, ...], dict[str, list[int]]] = ((), {})
        self._schedules: dict[Any, Schedule] = {}
        self._next_loads: tuple[int, ...] = ()
        facts = self.outlook.facts(cluster.workers)
        self.runtime = self._runtime(facts, allot(facts))
        self.store.before_look, self.store.attached = self._before_look, True

    def _make_worker(self) -> Worker:
        """What computes; benchmarks of all the rest put an emulated one in its place."""
        side_outputs: SideOutputs | None = find_side_outputs(self.model)
        return Worker(
            self.model, self.store.blocks, self.parameters, self.device, self._gradient, side_outputs, self._driven
        )

    def _calls(self, layer: str) -> int:
        """How often the last step called a layer of experts for each micro-batch; before there was one, a guess."""
        made = zip(self.runtime.visits, self.runtime.members, strict=True)
        visits: list[tuple[Visit, Iterable[int]]] = list(made) or [(visit, (0,)) for visit in self.outlook.visits]
        places = self._expert_settings.places[layer]
        called = Counter(
            micro_batch
            for visit, members in visits
            if any(place.startswith(f"{visit.module}.") for place in places)
            for micro_batch in members
        )
        return max(called.values(), default=1)

    def _wait(self, future: "Future[T]") -> T:
        """Waits as the present runtime does, which counts the time."""
        return self.runtime.wait(future)

    def _runtime(self, facts: Facts, allotment: Allotment) -> Runtime:
        """The buffers of an allotment, and what works in them."""
        store: Any = self.store
        common: dict[str, Any] = {
            "partial_sums": allotment.partial_sums, "held_gradients": allotment.held_gradients, "device": self.device,
            "wait": self._wait,
        }  # fmt: skip
        staging = Staging(
            store, self.holding.staged, in_ram=allotment.staged_in_ram, ring=allotment.gradient_buffers,
            immediate=not facts.deferred, image_now=self.holding.staged_now, **common,
        )  # fmt: skip
        keeper = Keeper(
            self.holding, facts, allotment, staging, self._interval, self._wait, self._remasking,
            self.experts.touching, self.clip_norm,
        )  # fmt: skip
        peers: Peers = Alone(staging, facts.reduction_groups)
        if self.ranks.links is not None:
            ring = SUMS_TRAVELLING if self.ranks.computes else 0
            sums = Staging(
                store, self.holding.gradients, in_ram=frozenset(), ring=ring, immediate=True,
                image_now=self.holding.gradients_now, **common,
            )  # fmt: skip
            peers = Together(
                self.ranks.links, self.ranks.cluster, self.holding, self.owner,
                sums=sums, staging=staging, groups=facts.reduction_groups, uses=self._uses,
                log=self.recorder.log,
            )  # fmt: skip
        return Runtime(
            keeper, self.worker, self.parameters, facts, allotment, self._ceiling,
            scratch=store, peers=peers, computing=self.ranks.computing, recorder=self.recorder, driven=self._driven,
        )  # fmt: skip

    def _uses(self, block: int, name: str) -> list[int]:
        """The visits of this step that use a parameter."""
        visits = tuple(self.runtime.visits)
        if visits != self._used_in[0]:
            self._used_in = visits, self.worker.uses(visits)
        return self._used_in[1].get(name, [])

    def _before_look(self) -> None:
        """Whoever looks at the store sees it at `step_count`."""
        if self.ranks.alone:
            self.commit()
        elif self.runtime.keeper.pending:
            raise StoreError(
                f"store '{self.store.path}': the last step is not committed yet; call engine.commit() on every rank first"
            )

    def _gradient(self, block: int, name: str, use: int, micro_batch: int, grad: Tensor) -> None:
        self.runtime.gradient(block, name, use, micro_batch, grad)

    # planning

    @property
    def multiplied(self) -> Mapping[str, Driven]:
        """By name the sparse parameters that kernels multiply by; all others are expanded."""
        return self._driven

    def _plan(self, micro_batches: int) -> Schedule:
        """The schedule of the next step; memory is allotted anew when the facts have changed."""
        facts = self.outlook.facts(micro_batches)
        if facts != self.runtime.facts:
            allotment = allot(facts)
            self._schedules.clear()
            if same_buffers(allotment, self.runtime.allotment) and facts.visits == self.runtime.facts.visits:
                self.runtime.facts, self.runtime.allotment = facts, allotment
            else:
                self._next_loads = ()
                give_back()  # activations of other sizes come
                self.runtime.close()
                self.runtime = self._runtime(facts, allotment)
        keeper = self.runtime.keeper
        pending = keeper.pending
        loaded = tuple(block for block in self._next_loads if block in pending and keeper.is_loaded(block))
        keeper.keep_loaded(loaded)
        key = (pending, loaded)
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = build(facts, self.runtime.allotment, pending=pending, loaded=loaded)
            verify(schedule, facts, self.runtime.allotment)
            self._schedules[key] = schedule
        return schedule

    @property
    def allotment(self) -> Allotment:
        """Who has which memory at present."""
        return self.runtime.allotment

    # training

    def step(
        self,
        micro_batches: Sequence[Any],
        loss_fn: LossFunction = default_loss,
        *,
        weights: Sequence[float] | None = None,
    ) -> StepResult:
        """One optimizer step over all micro-batches.

        Args:
            micro_batches: whatever `loss_fn` takes; tensors are moved to the device.
            loss_fn: `(model, micro_batch) -> scalar tensor`, the mean over the micro-batch's target tokens.
            weights: what each loss is multiplied by, one for each micro-batch; default: its share of the step's target tokens.

        Raises:
            ConfigError: no micro-batches, none with a target token, or not as many weights.
            PlanError: a step of so many micro-batches does not fit, or leaves a worker without any.
            StoreError: bytes could not be read or written; the store is at its last commit.
            AuditError: the model would train wrong; nothing was changed.
            NonFiniteError: too many steps in a row had gradients that are not finite.
        """
        if not micro_batches:
            raise ConfigError("engine.step: expected at least one micro-batch, found none")
        count = len(micro_batches)
        self.ranks.cluster.check(count, self._budgets.reduction_groups)
        own = {index: micro_batches[index] for index in self.share(count)}
        tokens = self._tokens(own)
        weights = loss_weights(tokens, weights)
        if self.runtime.keeper.broken:
            self.commit()  # says why it cannot
        start = time.perf_counter()
        self.recorder.begin(self.step_count + 1)
        if self.device.type != "cpu":
            own = {index: to_device(micro_batch, self.device) for index, micro_batch in own.items()}
        schedule = self._plan(count)
        number = self.step_count + 1
        self.worker.measuring = self.outlook.measured is None
        self.experts.begin(count, own.values(), self._updates)
        try:
            outcome = self.runtime.step(
                schedule if self.outlook.known else None, own, dict(enumerate(weights)), loss_fn,
                count=count, seed=self.seed, step=number, progress=self._progress_after,
            )  # fmt: skip
            self._next_loads = schedule.loads_next if self.outlook.known else ()
            self.outlook.learn(outcome)
        except BaseException:
            self.runtime.keeper.not_told(number)
            raise
        self.step_count = number
        norm = outcome.norm
        self.experts.took(number, finite=outcome.finite)
        self._count_skipped(outcome, number)
        loss = sum(weight * value for weight, value in zip(weights, outcome.losses.values(), strict=True))
        moved = self._moved()
        elapsed = time.perf_counter() - start
        return StepResult(
            step=number, loss=loss, grad_norm=norm, lr=self.optimizer.lr_at(number), tokens=sum(tokens),
            elapsed_s=elapsed, stalled_s=outcome.stalled_s, bytes=moved, skipped=not outcome.finite,
            seconds=dict(outcome.seconds), masks=mask_facts(outcome.grown, self.densities),
            experts=dict(self.experts.touching.facts),
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """This process among those of the cluster; 0 if it is alone."""
        return self.ranks.rank

    @property
    def cluster(self) -> Cluster:
        """Who computes, and who owns records."""
        return self.ranks.cluster

    @property
    def computes(self) -> bool:
        """Whether this rank computes micro-batches."""
        return self.ranks.computes

    def sent_bytes(self) -> dict[int, tuple[int, int]]:
        """What this rank has sent so far, by the rank that it went to: of weights, of gradients."""
        links = self.ranks.links
        if links is None:
            return {}
        down, up = Counter(links.down.traffic.sent), Counter(links.up.traffic.sent)
        down.update(self.experts.sent("down"))
        up.update(self.experts.sent("up"))
        return {rank: (down.get(rank, 0), up.get(rank, 0)) for rank in sorted(down.keys() | up.keys())}

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, in order of rank; every rank calls it."""
        return self.ranks.gather(value)

    def share(self, count: int) -> range:
        """Which of a step's `count` micro-batches this rank computes: all of them, if it is alone."""
        if self.ranks.alone:
            return range(count)
        return self.ranks.cluster.share(self.ranks.rank, count, self._budgets.reduction_groups)

    def _tokens(self, own: Mapping[int, Any]) -> list[int]:
        """The target tokens of every micro-batch of a step."""
        causal = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        counted = [(index, target_tokens(micro_batch, causal=causal)) for index, micro_batch in own.items()]
        found = dict(map(tuple, (pair for counts in self.ranks.gather(counted) for pair in counts)))
        return [found[index] for index in range(len(found))]

    def rehearse(self, micro_batch: Any, loss_fn: LossFunction = default_loss, *, micro_batches: int = 1) -> None:
        """Runs one micro-batch without any update, learns what it needs, and plans steps of `micro_batches` like it.

        After it `plan`, `allotment` and `bytes_bound` are those of a steady step. What waits is committed; else nothing in the
        store changes.

        Raises:
            PlanError: such steps do not fit; the message names the smallest budget that does.
            AuditError: the model would train wrong.
        """
        self.commit()
        if self.device.type != "cpu":
            micro_batch = to_device(micro_batch, self.device)
        schedule = self._plan(1)
        self.worker.measuring = True
        self.experts.begin(1, [micro_batch], self._updates)
        outcome = self.runtime.step(
            schedule, {0: micro_batch}, {0: 1.0}, loss_fn, count=1, seed=self.seed, step=self.step_count + 1,
            progress=self._progress_after, rehearsal=True,
        )  # fmt: skip
        self.outlook.learn(outcome)
        self.experts.measured(micro_batches)
        self._plan(micro_batches)
        self.recorder.forget()

    @property
    def _updates(self) -> int:
        """How many optimizer steps there were."""
        return self.step_count - self.skipped_steps

    def _progress_after(self, finite: bool) -> dict[str, Any]:
        """What is committed with a step: the caller's progress, how many steps were skipped, what experts there are."""
        own = self._skipped_after(finite) | self.experts.to_json(self.step_count + 1, finite=finite)
        return {**self.progress, "(engine)": own}

    def _skipped_after(self, finite: bool) -> dict[str, Any]:
        """How many steps were skipped, with one more step."""
        return {
            "skipped": self.skipped_steps + (not finite),
            "skipped_in_a_row": 0 if finite else self._skipped_in_a_row + 1,
        }

    def _count_skipped(self, outcome: StepOutcome, number: int) -> None:
        found = self._skipped_after(outcome.finite)
        self.skipped_steps, self._skipped_in_a_row = found["skipped"], found["skipped_in_a_row"]
        if outcome.finite:
            return
        self._log(f"step {number} skipped: the gradient of {outcome.first_bad} is not finite")
        if self._skipped_in_a_row > self.max_skipped_steps:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} steps in a row had gradients that are not finite, at step {number} first in "
                f"{outcome.first_bad}; the store holds the last good state: lower the learning rate or look at the data, "
                f"then run again (limit: max_skipped_steps={self.max_skipped_steps})"
            )

    def _moved(self) -> MovedBytes:
        read, written = self.recorder.end()
        bound = self.bytes_bound().total + self.experts.touching.least_bytes
        return MovedBytes(read, written, bound, self.recorder.moved("compaction"))

    def bytes_bound(self) -> StepBytes:
        """The least that a steady step must move between host and disk under the present allotment, and with what is sparse
        as it is now; without experts, of which each step tells its own."""
        return self.outlook.bytes_bound(self.runtime.facts, self.runtime.allotment)

    def nonzeros(self) -> tuple[int, int]:
        """How many non-zeros the sparse parameters have at present, and how many elements."""
        found = self.densities()
        return sum(nonzeros for nonzeros, _ in found.values()), sum(elements for _, elements in found.values())

    @property
    def kernels(self) -> dict[str, Kernel]:
        """By name, the parameters that kernels multiply by; the other sparse ones are expanded and multiplied densely."""
        return {name: each.kernel for name, each in self._driven.items()}

    def densities(self) -> dict[str, tuple[int, int]]:
        """The same by name of each parameter that may be sparse."""
        return {} if self.masking is None else self.masking.densities(self.holding.sparsity)

    # looking, and leaving

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        """The model for evaluation and generation: weights stream, no gradients, eval mode, caches allowed.

        With several ranks every one of them enters, and those that compute (`computes`) make the same calls; a rank that
        only owns records serves them before it gets the model, and must not call it.
        """
        self.commit()
        with self.recorder.paused():  # what is moved outside of steps is not counted in the next one
            yield from self._streamed()

    def _streamed(self) -> Iterator[nn.Module]:
        self.experts.outside(self._updates)
        touching = self.experts.touching
        if not self.ranks.computes:
            with self.experts.following():
                follow(self.holding, self.runtime.peers, self.runtime.slabs, touching)
            yield self.model
            return
        streamed = StreamedModel(
            self.holding, self.runtime.peers, self.worker, self.parameters,
            self.runtime.slabs, self.runtime.allotment.slabs, self._driven, self.runtime.places, touching,
        )  # fmt: skip
        self._restore_cache()
        self.model.eval()
        self.worker.outside = streamed.call
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.worker.outside = None
            touching.drop()
            self._restore_cache = without_cache(self.model)
            self.model.train()
            streamed.close()

    def commit(self) -> None:
        """Applies what waits and commits; afterwards the store is at `step_count`. With several ranks, on all of them.

        Raises:
            StoreError: bytes could not be written; the last commit is whole.
        """
        self.runtime.drain()
        self._next_loads = ()

    def make_up_experts(self) -> None:
        """Brings all experts of layers with `untouched="dense"` to the present step, and commits: for small families, as it
        reads and writes each of them. Otherwise an expert makes up for missed steps when it is next reached."""
        self.commit()

        def commit(facts: dict[str, Any]) -> None:
            own = self.store.progress.get("(engine)", {}) | facts
            self.store.commit(self.step_count, {**self.store.progress, "(engine)": own}).result()

        try:
            self.experts.make_up(self._updates, commit)
        except BaseException:
            self.runtime.keeper.undo_writes()
            self.experts.touching.undone()
            raise

    def snapshot(self, name: str) -> None:
        """Holds the present state under a name: commits, then one row. With several ranks all of them call it.

        Raises:
            StoreError: the name is taken, or no text.
        """
        self.commit()
        if self.ranks.owns:
            self.store.snapshot(name)
        self.gather(None)  # nobody goes on before all have it

    def remove_snapshot(self, name: str) -> None:
        """Gives up a snapshot; with several ranks all of them call it."""
        if self.ranks.owns:
            self.store.remove_snapshot(name)
        self.gather(None)

    def snapshots(self) -> dict[str, int]:
        """Name of each snapshot → training step that it holds; with several ranks all of them call it."""
        found: dict[str, int] = self.gather(self.store.snapshots() if self.ranks.rank == 0 else None)[0]
        return found

    @property
    def plan(self) -> str:
        """The plan as text: blocks, memory, bytes."""
        from weightstream.engine.plan_text import plan_text

        return plan_text(self)

    def close(self) -> None:
        """Flushes, commits and lets the store go."""
        if self._closed:
            return
        self._closed = True
        try:
            self.runtime.close()
        finally:
            self.experts.touching.close()
            self.store.before_look, self.store.attached = lambda: None, False
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.ranks.alone:
            self.abandon()
        else:
            self.close()

    def abandon(self) -> None:
        """Leaves at the last commit, without waiting for other ranks: one of them, or this one, cannot go on."""
        if not self._closed:
            self._closed = True
            self.store.before_look, self.store.attached = lambda: None, False
            self.store.close()


__all__ = ["Engine", "MaskFacts", "MovedBytes", "StepResult"]
