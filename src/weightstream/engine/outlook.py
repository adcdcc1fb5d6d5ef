"""The facts of an engine's steps: of those that it takes, and of any other, on any cluster and at any step of training.

Plans follow from them. What the model calls, and what its activations need, is learned from the steps themselves.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightstream.blocks import call_order
from weightstream.cluster import Cluster
from weightstream.engine.multiplying import structures
from weightstream.engine.planning import Budgets, Division, Measured, divide, facts_of, owners_of
from weightstream.fabric.ranks import Ranks
from weightstream.masking.masking import Masking
from weightstream.runtime.runtime import StepOutcome
from weightstream.schedule.allotment import Allotment, Facts, allot
from weightstream.schedule.cost import BlockFacts, StepBytes
from weightstream.schedule.flows import disk_bound
from weightstream.schedule.operations import Visit
from weightstream.store.block_bytes import NEVER_SPARSE, Largest
from weightstream.store.owned import Holding
from weightstream.store.sparsity import Sparsity
from weightstream.worker.expanding import Driven
from weightstream.worker.worker import Worker


class Outlook:
    """What an engine knows of its steps.

    Args:
        holding: what this rank owns; and how sparse each unit is at present, on all ranks.
        driven: the parameters that kernels multiply by.
        largest: how sparse versions may be: in the engine's own plans there is room for all of them.
    """

    def __init__(
        self,
        holding: Holding,
        ranks: Ranks,
        worker: Worker,
        budgets: Budgets,
        *,
        masking: Masking | None,
        driven: Mapping[str, Driven],
        largest: Largest,
        threads: int,
    ) -> None:
        self._holding, self._store, self._budgets = holding, holding.store, budgets
        self._ranks, self._worker = ranks, worker
        self._masking, self._driven, self._largest, self._threads = masking, driven, largest, threads
        order = [module for _, module in call_order(worker.model, self._store.blocks)]
        self.visits = tuple(Visit(worker.block_of_module[m], m) for m in order if m in worker.block_of_module)
        self.known = ranks.alone
        """Whether the model's calls are known: guessed ones are tried on one rank only."""
        self.measured: Measured | None = None
        """Of activations; None before a step has shown it."""
        self._division = self._divide(ranks.cluster)
        self._reckoned: tuple[dict[int, Sparsity], tuple[BlockFacts, ...]] | None = None

    # what steps show

    def learn(self, outcome: StepOutcome) -> None:
        """Takes what a step has shown into the facts of the next one."""
        if outcome.uniform and outcome.visits != self.visits:
            self.visits, self.measured = outcome.visits, None
        self.known |= outcome.uniform
        if self._worker.measuring and outcome.uniform:
            self.measured = self._most_measured(len(outcome.visits))
            self._worker.measuring = False

    def _most_measured(self, visits: int) -> Measured | None:
        """What the step has shown of activations, of the rank that needed most of each."""
        own: list[Any] | None = None
        if self._ranks.computes:
            measured = self._worker.measured
            boundary = [measured.boundary_bytes.get(visit, 0) for visit in range(visits)]
            boundary[-1] = max(boundary)
            kept = [measured.kept_bytes.get(visit, 0) for visit in range(visits)]
            workspace = max(2 * max(kept), kept[-1] + measured.loss_bytes)
            own = [boundary, kept, measured.lasting_bytes, workspace]
        found = [each for each in self._ranks.gather(own) if each is not None]
        boundaries, kepts, lasting, workspaces = zip(*found, strict=True)
        return Measured(
            tuple(map(max, zip(*boundaries, strict=True))), tuple(map(max, zip(*kepts, strict=True))),
            max(lasting), max(workspaces),
        )  # fmt: skip

    # facts

    def facts(self, micro_batches: int) -> Facts:
        """Those of a step of so many micro-batches, with room for what is sparse at any time."""
        return self._facts(micro_batches, self._division)

    def planned_for(self, cluster: Cluster, micro_batches: int) -> tuple[Facts, Allotment]:
        """What steps of so many micro-batches would be planned as, on a cluster of any size; nothing changes.

        Raises:
            PlanError: they do not fit; the message names the smallest budget that does.
        """
        cluster.check(micro_batches, self._budgets.reduction_groups)
        facts = self._facts(micro_batches, self._divide(cluster))
        return facts, allot(facts)

    def facts_of_rank(self, rank: int, cluster: Cluster, micro_batches: int) -> Facts:
        """The facts of such steps with the bytes that this rank owns, where a plan has the most that any does."""
        return self._facts(micro_batches, self._divide(cluster, rank))

    def sparsity_at(self, step: int | None = None) -> dict[int, Sparsity]:
        """How sparse each unit is that may be, when a training step begins; by default as they are now."""
        if self._masking is None:
            return {}
        return dict(self._holding.sparsity) if step is None else self._masking.expected(step - 1)

    def facts_at(self, cluster: Cluster, micro_batches: int, step: int | None = None, *, whole: bool = False) -> Facts:
        """The facts of one training step on a cluster, with the bytes that blocks and gradients have then; those of
        `planned_for` have room for every step.

        Args:
            step: by default any one with what is sparse as it is now, in which no dense gradient is summed.
            whole: the bytes of whole blocks, whoever owns them.
        """
        largest = NEVER_SPARSE
        if self._masking is not None:
            now = self.sparsity_at(step)
            dense = frozenset() if step is None else self._masking.whole(step)
            rows = {(unit, p.name): p.row for unit in now for p in self._store.units[unit].parameters}
            gradients = {
                unit: tuple(piece for piece in found if (piece.name, rows[unit, piece.name]) not in dense)
                for unit, found in now.items()
            }
            largest = Largest({unit: (found,) for unit, found in now.items()}, gradients)
        return self._facts(micro_batches, self._divide(Cluster() if whole else cluster, sparse=largest))

    def bytes_bound(self, facts: Facts, allotment: Allotment) -> StepBytes:
        """The least that a steady step of such facts must move between host and disk under an allotment, and with what is
        sparse as it is now."""
        if self._masking is not None:
            facts = replace(facts, blocks=self._blocks_now(facts.micro_batches))
        return disk_bound(facts, allotment)

    def _blocks_now(self, micro_batches: int) -> tuple[BlockFacts, ...]:
        """The bytes of blocks as sparse as they are now; reckoned anew only when that has changed."""
        sparsity = self._holding.sparsity
        if self._reckoned is None or self._reckoned[0] != sparsity:
            largest = Largest({unit: (found,) for unit, found in sparsity.items()}, sparsity)
            division = self._divide(self._ranks.cluster, sparse=largest)
            self._reckoned = dict(sparsity), self._facts(micro_batches, division).blocks
        return self._reckoned[1]

    def _divide(self, cluster: Cluster, of: int | None = None, *, sparse: Largest | None = None) -> Division:
        return divide(
            self._store, cluster, owners_of(self._store, cluster), self._budgets.reduction_groups,
            sparse=self._largest if sparse is None else sparse, masking=self._masking, of=of, driven=self._driven,
        )  # fmt: skip

    def _facts(self, micro_batches: int, division: Division) -> Facts:
        blocks = self._store.blocks
        return facts_of(
            blocks, division.records, self._budgets, visits=self.visits, uses=self._worker.uses(self.visits),
            micro_batches=micro_batches, measured=self.measured, division=division,
            structures=structures(blocks, self._driven, self._threads),
        )  # fmt: skip
