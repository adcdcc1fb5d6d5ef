"""What an engine does for its model's layers of experts: memory for those that steps reach, which exist, what is told."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightstream.cluster import Cluster
from weightstream.experts.existence import Existence
from weightstream.experts.growing import Growing
from weightstream.experts.reaching import (
    GRADIENT_BYTES,
    ExpertBytes,
    ExpertSizes,
    Reached,
    StandIn,
    bytes_of,
    counted,
    expected,
    pool_of,
)
from weightstream.fabric.parcels import Direction, Parcels
from weightstream.fabric.ranks import Ranks
from weightstream.families.lending import AllLending, Borrowed, values_bytes
from weightstream.families.past import Past
from weightstream.families.tallying import TouchedFacts, Walking
from weightstream.families.touching import Touched, Touching, Wait
from weightstream.nn.attaching import blocks_of, check_places, known_beforehand, layers_of, places_of, tokens_in
from weightstream.nn.experts import StreamedExperts
from weightstream.nn.pool import Pool
from weightstream.store.compaction import check_share
from weightstream.store.families import Family
from weightstream.store.optimizers import Optimizer
from weightstream.store.store import Store
from weightstream.trace.recorder import Recorder
from weightstream.units import parse_bytes
from weightstream.worker.worker import Worker

_CROWD = 64  # fewer assignments than that may go to one expert by chance


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """A model's layers of experts by name, all names that each of them has, and what is asked for of them.

    `memory_bytes` are for all layers together; `pools` by pattern of their names.
    """

    layers: Mapping[str, StreamedExperts]
    places: Mapping[str, Sequence[str]]
    memory_bytes: int
    pools: Mapping[str, Pool]
    compaction_share: float

    @property
    def families(self) -> tuple[Family, ...]:
        """Of the store's records, in order of layers."""
        return tuple(layer.family(name) for name, layer in self.layers.items())

    def contract(self) -> dict[str, Any]:
        """What a resumed run may not change of them."""
        return {"experts": {name: layer.facts() for name, layer in self.layers.items()}} if self.layers else {}


def settings_of(
    model: nn.Module, memory: str | int, pools: Pool | Mapping[str, Pool] | None, compaction_share: float
) -> ExpertSettings:
    """The settings that a model's experts have from an engine's.

    Raises:
        ConfigError: they are not what they should be.
    """
    layers = layers_of(model)
    return ExpertSettings(
        layers, places_of(model, layers), parse_bytes(memory) if layers else 0,
        {"*": pools} if isinstance(pools, Pool) else dict(pools or {}), check_share(compaction_share),
    )  # fmt: skip


class Experts:
    """The layers of experts of a model while an engine trains it, on one rank; it need not have any.

    `touching` is what serves them in a step, `growing` counts them and holds them to their pools. With several ranks all
    call the same methods in the same order.

    Args:
        calls: how many blocks that hold a layer the last step called for each micro-batch; before there was one, a guess.
        groups: the reduction groups of a step.
        kept: what `to_json` gave with the last commit.
        wait: for the store, as the runtime does it.
        log: what a person is told.

    Raises:
        ConfigError: a layer is in no block that streams, or pools and layers do not go together.
        PlanError: the memory is too small for one expert.
    """

    def __init__(
        self,
        settings: ExpertSettings,
        store: Store,
        ranks: Ranks,
        worker: Worker,
        recorder: Recorder,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype,
        groups: int,
        calls: Callable[[str], int],
        kept: Mapping[str, Any],
        wait: Wait,
        log: Callable[[str], None],
    ) -> None:
        check_places(settings.places, store.blocks)
        self._layers, self._places, self.memory_bytes = settings.layers, settings.places, settings.memory_bytes
        self._store, self._ranks, self._worker, self._recorder = store, ranks, worker, recorder
        self._dtype, self._groups, self._wait, self._log = dtype, groups, wait, log
        self._member = ranks.rank, len(ranks.cluster.memory_ranks)
        self._past = Past.from_json(kept.get("past", {}))
        self._past.goes_on(store.step + 1, optimizer)
        self._crowded: set[str] = set()
        self._parcels: Parcels | None = None  # in which experts go from rank to rank
        self._following, self._micro_batches = False, 0
        self._draws: dict[str, float] = {}  # by layer, assignments of a micro-batch of the last step
        self.touching = self._make_touching()
        self.growing = self._make_growing(settings.pools, kept.get("experts", {}), calls)
        self.touching.agree = self.growing.agree
        self._share = settings.compaction_share
        if self._layers and ranks.owns:
            store.compaction_share = settings.compaction_share

    # what serves them

    def _make_touching(self) -> Touching:
        """The memory of experts, from which their layers take weights."""
        if self._ranks.alone:
            own = {name: self._touched(name, self._layer_bytes) for name in self._layers}
            for name, layer in self._layers.items():
                layer.attach(own[name])
            return Touching(own)
        own, lent = {}, {}
        for name, layer in self._layers.items():
            family, nbytes = layer.family(name), self._bytes_for_values(name)
            if self._ranks.owns:
                own[name] = self._touched(name, self._layer_bytes - nbytes)
            lent[name] = Borrowed(
                family, own.get(name), nbytes=nbytes, owners=len(self._ranks.cluster.memory_ranks),
                dtype=self._dtype, device=self._worker.device, groups=self._groups, walking=self._walking,
            )  # fmt: skip
            layer.attach(lent[name])
        return Touching(own, self._lending(lent) if lent else None)

    @property
    def _layer_bytes(self) -> int:
        """What one layer has of the memory for experts."""
        return self.memory_bytes // len(self._layers)

    def _bytes_for_values(self, name: str) -> int:
        """What of a layer's memory is for values, on one of several ranks; the rest is for records that it owns."""
        if not (self._ranks.owns and self._ranks.computes):
            return self._layer_bytes if self._ranks.computes else 0
        family = self._layers[name].family(name)
        layout = self._store.layout(self._store.index(family.name, family.count - 1))
        return values_bytes(family, layout, self._dtype, self._layer_bytes)

    def _touched(self, name: str, nbytes: int) -> Touched:
        """The records of a layer's experts that this rank owns."""
        layer = self._layers[name]
        family = layer.family(name)
        return Touched(
            self._store, self._store.index(family.name, 0), family, nbytes=nbytes, dtype=self._dtype,
            device=self._worker.device, groups=self._groups, wait=self._wait, walking=self._walking,
            member=self._member, replayed=self._past.at if layer.untouched == "dense" else None,
        )  # fmt: skip

    def _lending(self, families: Mapping[str, Borrowed]) -> AllLending:
        """What all ranks do together with these."""
        links = self._ranks.links
        assert links is not None, "one rank has nobody to lend to"
        self._parcels = Parcels(links.add_records(), self._recorder.log)
        return AllLending(
            self._parcels, self._ranks.cluster, families, blocks_of(self._places, self._store.blocks),
            groups=self._groups, standing_still=self._standing_still,
        )  # fmt: skip

    def _walking(self) -> Walking | None:
        """What is computed now; None outside of steps."""
        if self._following or self._worker.outside is not None:
            return None
        return Walking(*self._worker.walking, self._worker.going_back)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """This rank waits for others though it computes: one that shares its process may use the random state meanwhile."""
        state = self._worker.generators.state()
        with self._ranks.waiting():
            yield
        self._worker.generators.restore(state)

    def _make_growing(self, pools: Mapping[str, Pool], kept: Mapping[str, Any], calls: Callable[[str], int]) -> Growing:
        """How many experts there are and may be."""
        own, lent = self.touching.families, self.touching.lending
        existence = Existence(
            {name: layer.experts for name, layer in self._layers.items()}, own,
            self._ranks.gather if self._layers else _alone, self._member,
        )  # fmt: skip
        return Growing(
            self._layers, own if lent is None else lent.families, existence, pools, kept,
            lambda name: max(calls(name), self._calls_seen(name)), self._log, several=lent is not None,
        )  # fmt: skip

    def _calls_seen(self, name: str) -> int:
        """How often the last step called a layer for a micro-batch, as far as it had tokens; a block may do so repeatedly."""
        found = self.touching.facts.get(name)
        return 0 if found is None else found.calls

    # steps

    def begin(self, micro_batches: int, own: Iterable[Any], count: int) -> None:
        """Begins to read the experts that a step is known to reach.

        Args:
            own: this rank's micro-batches.
            count: optimizer steps before this one.

        Raises:
            PlanError: there is no room for them.
        """
        own, self._micro_batches = list(own), micro_batches
        expected = self.growing.begin(known_beforehand(self._layers, own), tokens_in(own))
        self.touching.begin(micro_batches, count, expected)

    def outside(self, count: int) -> None:
        """The model is run outside of steps, after so many optimizer steps: no expert comes to exist."""
        self.growing.outside()
        self.touching.begin(0, count, {})

    @contextmanager
    def following(self) -> Iterator[None]:
        """Meanwhile this rank computes nothing, and serves those that run the model."""
        self._following = True
        try:
            yield
        finally:
            self._following = False
            self.touching.drop()

    def took(self, step: int, *, finite: bool) -> None:
        """A step has been taken; it counts unless its gradients were not finite."""
        if not finite:
            self._past.skipped.append(step)
        self.growing.took(self._added(finite), self._facts(finite))
        self.measured()
        self._warn_of_crowds()

    def measured(self, times: int = 1) -> None:
        """Steps may come to so many times the assignments of the one that was just seen."""
        for name, found in self.touching.facts.items():
            self._draws[name] = found.assignments / self._micro_batches
        self.growing.measured({name: times * found.assignments for name, found in self.touching.facts.items()})

    def to_json(self, step: int, *, finite: bool) -> dict[str, Any]:
        """What is committed with a step."""
        own: dict[str, Any] = {}
        if any(layer.untouched == "dense" for layer in self._layers.values()):
            own["past"] = self._past.to_json(() if finite else (step,))
        if self._layers:
            own["experts"] = self.growing.to_json(self._added(finite), self._facts(finite))
        return own

    def _added(self, finite: bool) -> Mapping[str, int]:
        """The experts that the step under way has brought into existence, if it counts."""
        return self.touching.added if finite else {}

    def _facts(self, finite: bool) -> Mapping[str, TouchedFacts]:
        """What it has reached, if it counts."""
        return self.touching.facts if finite else {}

    def make_up(self, count: int, commit: Callable[[dict[str, Any]], None]) -> None:
        """Brings all experts of layers with `untouched="dense"` to the present step, after so many optimizer steps; `commit` is
        given what is to be committed with them."""
        self.outside(count)
        before = {name: family.first_written for name, family in self.touching.families.items()}
        for writing in self.touching.make_up():
            self._wait(writing)
        made = {name: family.first_written - before[name] for name, family in self.touching.families.items()}
        self.growing.made(made, lambda counted: commit({"experts": counted}))

    # what steps come to

    def expected(self, micro_batches: int, cluster: Cluster) -> dict[str, Reached]:
        """What steps of so many micro-batches, like those of the last one, are expected to reach on a cluster, as the last
        steps have shown it, or by even chance; of what that is not seen it is taken that all exist. Empty before there was
        a step or a rehearsal."""
        if len(self._draws) < len(self._layers):
            return {}
        found = {}
        for name, layer in self._layers.items():
            growth = self.growing.layers[name]
            reached = growth.reached_per_step
            found[name] = expected(
                layer, self._draws[name], micro_batches, cluster, self._groups, pool=self._pool(name),
                new_share=(growth.new_per_step or 0.0) / reached if reached else 0.0,
            )  # fmt: skip
        return found

    def _pool(self, name: str) -> float:
        """From how many experts of a layer tokens draw, if all of these are alike."""
        layer, growth = self._layers[name], self.growing.layers[name]
        if growth.reached_per_step is None:
            return float(layer.experts)
        return pool_of(growth.reached_per_step, growth.drawn_per_step, layer.top_k, layer.experts)

    def numel(self, name: str) -> int:
        """Parameters of one expert of a layer."""
        return self._layers[name].numel

    def held_bytes(self, reached: Mapping[str, Reached], owners: int, micro_batches: int, partial_sums: int) -> int:
        """What a rank holds at most for a step that reaches these: records, with those of the step before while they are
        written, within their memory; and gradients of its micro-batches, with so many partial sums at once."""
        growth = self.growing.layers
        records = sum(2 * each.touched / owners * growth[name].slot_bytes for name, each in reached.items())
        gradients = sum(
            growth[name].gradients_of(micro_batches * each.each, each.touched, partial_sums)
            for name, each in reached.items()
        )
        return round(min(records, self.memory_bytes) + gradients)

    @property
    def blocks(self) -> dict[str, frozenset[int]]:
        """The blocks that each layer lies in."""
        return {name: blocks_of({name: places}, self._store.blocks) for name, places in self._places.items()}

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Meanwhile layers compute with zeros, and their tokens go to experts by even chance, as `expected` has it: no record
        is read, and no gradient kept."""
        before = {
            name: layer.attach(StandIn(layer, self._pool(name), self._dtype)) for name, layer in self._layers.items()
        }
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer.attach(before[name])

    def counted(self, micro_batches: Sequence[Any], cluster: Cluster) -> dict[str, Reached]:
        """What a step of these micro-batches reaches next, on a cluster, of layers of which it follows from their
        `input_ids` and which no pool has closed. One rank alone can tell it."""
        known = known_beforehand(self._layers, micro_batches)
        written = {name: self.touching.families[name].written(numbers) for name, numbers in known.items()}
        return counted(self._layers, micro_batches, written, cluster, self._groups)

    def bytes_of(self, reached: Mapping[str, Reached]) -> ExpertBytes:
        """What a step that reaches these moves."""
        sizes = {
            name: ExpertSizes(
                own.record_bytes, own.loaded_bytes, self._layers[name].numel * self._dtype.itemsize,
                self._layers[name].numel * GRADIENT_BYTES,
            )
            for name, own in self.growing.layers.items()
        }  # fmt: skip
        return bytes_of(reached, sizes, self._share)

    # what is told

    def _warn_of_crowds(self) -> None:
        """Says once of each layer whose router sends more than half of what it routes to one expert."""
        for name, facts in self.touching.facts.items():
            if name not in self._crowded and facts.assignments >= _CROWD and 2 * facts.most > facts.assignments:
                self._crowded.add(name)
                self._log(
                    f"layer '{name}': one expert of {self._layers[name].experts:,} got {facts.most:,} of {facts.assignments:,} "
                    f"assignments, the step reached {facts.touched:,}; look at the token ids or hash more tokens, or balance "
                    f"the router"
                )

    def sent(self, direction: Direction) -> Counter[int]:
        """Bytes that went from this rank to others."""
        return Counter() if self._parcels is None else self._parcels.sent[direction]


def _alone(value: Any) -> list[Any]:
    return [value]
