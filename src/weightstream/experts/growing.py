"""How many experts exist, how many a step may add, and whether there is room for them: decided when a step begins.

All of it follows from what the steps before have written, and from the tokens of the step as a whole: from nothing that
depends on micro-batches, workers, or when a commit ends. What is counted is committed with each step, so that a run that
was killed decides as it did before.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from weightstream.errors import ConfigError, PlanError
from weightstream.experts.existence import Existence, Numbers
from weightstream.fabric.packed import gradient_bytes
from weightstream.families.tallying import TouchedFacts
from weightstream.families.touching import Door
from weightstream.nn.experts import StreamedExperts
from weightstream.nn.pool import Pool
from weightstream.units import format_bytes

RECENT_STEPS = 64
"""Over about so many steps the rate of growth is the mean."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What a step may reach of a layer at most: experts, and those of them that do not exist yet."""

    experts: int
    new: int


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one layer: experts that exist, how many a step has added lately, the mean of so many steps, the limit at which its
    pool closed, how often the last step called the layer for each micro-batch, 0 before the first one; and how many
    different ones a step has reached lately, and by how many assignments."""

    written: int
    rate: float = 0.0
    steps: int = 0
    closed: int | str | None = None
    calls: int = 0
    reached: float = 0.0
    drawn: float = 0.0

    def after(self, added: int, facts: TouchedFacts | None, calls: int) -> "Counted":
        """After one more step; plain means at first, in which older steps then count less and less."""
        steps = min(self.steps + 1, RECENT_STEPS)
        reached, drawn = (facts.touched, facts.assignments) if facts is not None else (0, 0)
        return replace(
            self, written=self.written + added, rate=self.rate + (added - self.rate) / steps, steps=steps, calls=calls,
            reached=self.reached + (reached - self.reached) / steps, drawn=self.drawn + (drawn - self.drawn) / steps,
        )  # fmt: skip

    def to_json(self) -> list[Any]:
        return [self.written, self.rate, self.steps, self.closed, self.calls, self.reached, self.drawn]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> "Counted":
        return cls(*data)


@dataclass(frozen=True, slots=True)
class LayerGrowth:
    """How a layer grows.

    `most_per_step` are the experts that a step may reach, as far as its tokens are known (after a step or a rehearsal);
    `held` those that `experts_memory` has room for, each in `slot_bytes`; `new_per_step` is the mean of the last steps, 0
    once its pool is closed; `reached_per_step` and `drawn_per_step` the same of all that they reached, and of assignments.
    `assignments` are the most of a step, as far as one was seen, `calls` how often a micro-batch calls the layer; the
    gradient of one expert takes `gradient_bytes`.
    """

    experts: int
    written: int
    record_bytes: int
    loaded_bytes: int
    slot_bytes: int
    most_per_step: int | None
    held: int
    new_per_step: float | None
    reached_per_step: float | None
    drawn_per_step: float
    assignments: int | None
    calls: int
    gradient_bytes: int

    def gradients_at_most(self, partial_sums: int) -> int | None:
        """Bytes of gradients that a step holds at a time, where so many partial sums are alive at once: an expert has what one
        micro-batch gives, these sums, and one for each other call; none that no assignment led to."""
        if self.assignments is None:
            return None
        return round(self.gradients_of(self.assignments, self.experts, partial_sums))

    def gradients_of(self, given: float, reached: float, partial_sums: int) -> float:
        """The same of a step whose micro-batches give so many gradients, each apart, of so many different experts."""
        return min(given, reached * (partial_sums + max(self.calls, 1))) * self.gradient_bytes


@dataclass(frozen=True, slots=True)
class PoolGrowth:
    """A pool: how much of it is used, in experts or bytes, and how many steps are left at the rate of the last ones; None
    where that is not seen yet (`unseen`), and where it is never full."""

    pool: Pool
    layers: tuple[str, ...]
    used: int
    closed: bool
    unseen: bool
    steps_left: int | None


@dataclass(slots=True)
class _Limit:
    """One pool and the layers that share it."""

    pattern: str
    pool: Pool
    layers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "experts_pool" if self.pattern == "*" else f"experts_pool['{self.pattern}']"


class Growing:
    """Counts the experts of an engine's layers, and holds them to its pools.

    Args:
        layers, doors: the layers by name, and through which they reach their experts.
        existence: which of these exist.
        pools: by pattern of layer names, the first that matches counts; layers with one pattern share a pool.
        kept: what `to_json` gave with the last commit.
        calls: how often the last step called a layer for each micro-batch; before there was one, a guess.
        several: there are several ranks, which all call the same methods; else `log` is all that is told.
    """

    def __init__(
        self,
        layers: Mapping[str, StreamedExperts],
        doors: Mapping[str, Door],
        existence: Existence,
        pools: Mapping[str, Pool],
        kept: Mapping[str, Any],
        calls: Callable[[str], int],
        log: Callable[[str], None],
        *,
        several: bool,
    ) -> None:
        self._layers, self._doors, self._existence, self._calls, self._log = layers, doors, existence, calls, log
        self._several, self._limits = several, _limits(layers, pools)
        counts = {} if all(name in kept for name in layers) else existence.count()
        self._counted = {
            name: Counted.from_json(kept[name]) if name in kept else Counted(counts[name]) for name in layers
        }
        pool_of = {name: limit.pool for limit in self._limits for name in limit.layers}
        for name, counted in self._counted.items():
            if counted.closed is not None and not _still(counted.closed, pool_of.get(name)):
                self._counted[name] = replace(counted, closed=None)
        self._now = dict(self._counted)  # with what the step under way has closed
        self._assignments: dict[str, int] = {}
        self._warned: set[str] = set()

    # steps

    def outside(self) -> None:
        """No step is under way: nothing comes to exist, and layers whose pools are full are as in steps."""
        self._now = dict(self._counted)
        self._open_gates({}, {})

    def begin(self, expected: Mapping[str, Sequence[int]], tokens: int | None) -> dict[str, list[int]]:
        """A step begins; gives the experts that it will reach, as far as they are known.

        Args:
            expected: by layer, the experts that its tokens lead to, of layers of which that is known.
            tokens: how many there are in the step; None if that is not known.

        Raises:
            PlanError: it could reach more than there is room for, on disk or in memory.
        """
        self._now = dict(self._counted)
        every, all_tokens = expected, tokens
        if self._several and self._limits:
            every, all_tokens = self._existence.together(expected, tokens)
        if self._limits:
            written = self._existence.written(every)
            for limit in self._limits:
                self._hold(limit, every, written, all_tokens)
            self._open_gates(every, written)
        found = {name: sorted({*self._doors[name].existing(numbers)}) for name, numbers in expected.items()}
        for name in () if self._several else self._layers:
            self._check_memory(name, found.get(name), tokens)
        return found

    def agree(self, added: Mapping[str, int]) -> dict[str, int]:
        """What the step adds on all ranks. Refuses one that has come to more new experts than was to be expected of it, before
        any is written.

        Raises:
            PlanError: they exceed a pool.
        """
        added = self._existence.sum(added) if self._several else dict(added)
        for limit in self._limits:
            after = self._used(limit, added)
            if after > limit.pool.most and any(added.get(name) for name in limit.layers):
                raise PlanError(
                    f"{limit}: the step reached experts that do not follow from its input_ids, {_figure(limit.pool, after)} "
                    f"would exist, {_figure(limit.pool, limit.pool.most)} may; give a larger pool, or the layers the "
                    f"input_ids of the micro-batch; nothing was changed"
                )
        return added

    def took(self, added: Mapping[str, int], facts: Mapping[str, TouchedFacts]) -> None:
        """The step counts; it has written so many new experts, and reached these."""
        self._counted = self._after(added, facts)

    def measured(self, assignments: Mapping[str, int]) -> None:
        """A step has been seen to make so many assignments in each layer."""
        for name, found in assignments.items():
            self._assignments[name] = max(found, self._assignments.get(name, 0))

    def to_json(self, added: Mapping[str, int], facts: Mapping[str, TouchedFacts]) -> dict[str, Any]:
        """What is committed with a step that has written so many new experts, and reached these."""
        return {name: found.to_json() for name, found in self._after(added, facts).items()}

    def made(self, added: Mapping[str, int], commit: Callable[[dict[str, Any]], None]) -> None:
        """This rank has written so many new experts outside of steps; `commit` is given what is committed with them."""
        every = self._existence.sum(added) if self._several else added
        counted = {
            name: replace(found, written=found.written + every.get(name, 0)) for name, found in self._counted.items()
        }
        commit({name: found.to_json() for name, found in counted.items()})
        self._counted = counted

    def _after(self, added: Mapping[str, int], facts: Mapping[str, TouchedFacts]) -> dict[str, Counted]:
        return {
            name: found.after(added.get(name, 0), facts.get(name), self._calls(name))
            for name, found in self._now.items()
        }

    def _hold(
        self, limit: _Limit, expected: Numbers, written: Mapping[str, Collection[int]], tokens: int | None
    ) -> None:
        if all(self._now[name].closed is not None for name in limit.layers):
            return
        if tokens is None:
            raise ConfigError(
                f"{limit}: expected micro-batches that are dicts with input_ids, from which it follows what a step may "
                f"reach, found others; give them so, or no pool"
            )
        new = {
            name: len(expected[name]) - len(written[name]) if name in expected else self._could_reach(name, tokens).new
            for name in limit.layers
        }
        used, after = self._used(limit, {}), self._used(limit, new)
        if after <= limit.pool.most or not any(new.values()):  # a pool may have been made smaller than what exists
            return
        adds = f"{sum(new.values()):,} experts" + ("" if limit.pool.counts else f" of {format_bytes(after - used)}")
        full = (
            f"{limit}: {_figure(limit.pool, used)} of {_figure(limit.pool, limit.pool.most)} exist, the step of "
            f"{tokens:,} tokens may add {adds}"
        )
        if limit.pool.when_full == "refuse":
            raise PlanError(
                f"{full}; give a larger pool, fewer tokens to a step, or Pool(…, when_full='existing'), which routes to "
                f"experts that exist; nothing was changed"
            )
        empty = [name for name in limit.layers if not self._now[name].written]
        if empty:
            raise PlanError(
                f"{full}, and layer '{empty[0]}' has none to route to; give a larger pool; nothing was changed"
            )
        self._log(f"{full}: from now on tokens go to experts that exist")
        for name in limit.layers:
            self._now[name] = replace(self._now[name], closed=limit.pool.limit)

    def _could_reach(self, name: str, tokens: int) -> Reach:
        """What a step of so many tokens may reach of a layer whose experts are not known beforehand.

        The calls are those that were committed: what this process has seen of them, one that goes on in its place has not.
        """
        layer = self._layers[name]
        calls = self._counted[name].calls or self._calls(name)
        experts = min(tokens * layer.top_k * calls, layer.experts)
        return Reach(experts, min(experts, layer.experts - self._counted[name].written))

    def _check_memory(self, name: str, expected: Sequence[int] | None, tokens: int | None) -> None:
        sizes = self._existence.sizes[name]
        if expected is not None:
            if len(expected) > sizes.capacity:
                raise PlanError(
                    f"layer '{name}': the step reaches {len(expected):,} experts, there is memory for {sizes.capacity:,} of "
                    f"{format_bytes(sizes.slot_bytes)}; give {self._memory_for(len(expected))} (experts_memory), or fewer "
                    f"tokens to a step; nothing was changed"
                )
        elif tokens is not None and name not in self._warned:
            most = self._could_reach(name, tokens).experts
            if most > sizes.capacity:
                self._warned.add(name)
                self._log(
                    f"layer '{name}': a step of {tokens:,} tokens may reach up to {most:,} experts, there is memory for "
                    f"{sizes.capacity:,}; one that reaches more is refused when it does: {self._memory_for(most)} "
                    f"(experts_memory) hold all"
                )

    def _memory_for(self, records: int) -> str:
        """The `experts_memory` that holds so many records of each layer: it is divided alike."""
        largest = max(sizes.slot_bytes for sizes in self._existence.sizes.values())
        return format_bytes(len(self._layers) * records * largest)

    def _open_gates(self, expected: Numbers, written: Mapping[str, Collection[int]]) -> None:
        """Closed layers reach what exists, or the next that does."""
        closed = [name for name, counted in self._now.items() if counted.closed is not None]
        missing = {name: sorted({*expected[name]} - {*written[name]}) for name in closed if name in expected}
        instead = self._existence.next_written(missing) if missing else {}
        for name, door in self._doors.items():
            if name in closed:
                door.gate({number: number for number in written.get(name, ())} | instead.get(name, {}))
            else:
                door.gate(None)

    def _used(self, limit: _Limit, added: Mapping[str, int]) -> int:
        return sum(
            (self._counted[name].written + added.get(name, 0)) * self._weight(limit, name) for name in limit.layers
        )

    def _weight(self, limit: _Limit, name: str) -> int:
        return 1 if limit.pool.counts else self._existence.sizes[name].record_bytes

    # looking

    @property
    def layers(self) -> dict[str, LayerGrowth]:
        """How each layer grows."""
        return {name: self._growth(name) for name in self._layers}

    def _growth(self, name: str) -> LayerGrowth:
        sizes, counted, layer = self._existence.sizes[name], self._counted[name], self._layers[name]
        most = self._assignments.get(name)
        rate = None if not counted.steps else 0.0 if counted.closed is not None else counted.rate
        return LayerGrowth(
            layer.experts, counted.written, sizes.record_bytes, sizes.loaded_bytes, sizes.slot_bytes,
            None if most is None else min(most, layer.experts), sizes.capacity, rate, counted.reached or None, counted.drawn,
            most, counted.calls or self._calls(name), gradient_bytes(layer.family(name).numel),
        )  # fmt: skip

    @property
    def pools(self) -> list[PoolGrowth]:
        """How full each pool is."""
        found = []
        for limit in self._limits:
            used = self._used(limit, {})
            rate = sum((self._growth(name).new_per_step or 0.0) * self._weight(limit, name) for name in limit.layers)
            counted = [self._counted[name] for name in limit.layers]
            closed = all(each.closed is not None for each in counted)
            left = None if closed or not rate else max(0, int((limit.pool.most - used) / rate))
            unseen = not any(each.steps for each in counted)
            found.append(PoolGrowth(limit.pool, tuple(limit.layers), used, closed, unseen, left))
        return found


def _limits(layers: Mapping[str, StreamedExperts], pools: Mapping[str, Pool]) -> list[_Limit]:
    limits = {pattern: _Limit(pattern, pool) for pattern, pool in pools.items()}
    for name, layer in layers.items():
        pattern = next((pattern for pattern in pools if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        if layer.untouched == "dense":
            raise ConfigError(
                f"layer '{name}': untouched='dense' changes experts that no step reaches, so that no pool can hold it; "
                f"use untouched='frozen', or leave it out of experts_pool"
            )
        limits[pattern].layers.append(name)
    unused = [pattern for pattern, limit in limits.items() if not limit.layers]
    if unused:
        known = ", ".join(layers) or "none"
        raise ConfigError(f"experts_pool: no layer of experts is called '{unused[0]}'; the model's are: {known}")
    return list(limits.values())


def _still(closed: int | str, pool: Pool | None) -> bool:
    """Whether a layer whose pool closed at that limit is closed with this one, too; without one it is open."""
    if pool is None:
        return False
    before = Pool(closed)
    return pool.when_full == "existing" and before.counts == pool.counts and pool.most <= before.most


def _figure(pool: Pool, value: int) -> str:
    return f"{value:,} experts" if pool.counts else format_bytes(value)
