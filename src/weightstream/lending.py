"""Records of families on several ranks: owners read, update and write them; who computes borrows values, and gives gradients.

A record's number says which memory rank owns it (`cluster.owner_of`). What micro-batches are known to reach is asked for
when a step begins, so that owners read ahead. Everything else goes by *rounds*, in which all ranks meet: a layer whose
values are not here yet begins one, and so does a rank whose micro-batches are through a block (`leave`), until nobody
wants anything any more. So a rank that waits for values finds all others in a round, or on their way to one.

Gradients are added where they were made, down to the largest subtrees of the contract's tree, and at their owner in the
order of that tree (`touching.over_groups`): the bits are those of one rank.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from weightstream.cluster import Cluster, owner_of
from weightstream.errors import AuditError, PlanError
from weightstream.fabric.parcels import Parcels, Sizes
from weightstream.store.families import Family
from weightstream.store.layout import RecordLayout
from weightstream.touching import Arena, Gradients, Packed, Sums, Touched, TouchedFacts, redirected
from weightstream.units import format_bytes

_NONE = torch.empty(0, dtype=torch.int64)


class Borrowed:
    """The values of one family that this rank's micro-batches need in a step; what a layer asks its weights of.

    Args:
        own: the records that this rank owns; None if it owns none at all.
        nbytes: memory for values, whoever owns them.
        owners: how many ranks own the family's records.
        walking: the use (visit) and micro-batch that is computed now; None outside of steps.
    """

    def __init__(
        self,
        family: Family,
        own: Touched | None,
        *,
        nbytes: int,
        owners: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: int,
        walking: Callable[[], tuple[int, int] | None],
    ) -> None:
        self.family, self.own, self.dtype, self.owners = family, own, dtype, owners
        self._device, self._walking = device, walking
        self._nbytes, self._capacity = nbytes, nbytes // (family.numel * dtype.itemsize)
        self.gradients_here = Gradients(groups)
        self.reached: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._instead: Mapping[int, int] | None = None
        self._redirected: dict[tuple[int, int], int] = {}
        self.asked: dict[int, Tensor] = {}  # by owner: numbers that are to come when this rank needs them
        self.promised: dict[int, Tensor] = {}  # by rank that computes: the same of others
        self.fetch: Callable[[Borrowed, Tensor], None] = _refuse
        """Brings these numbers here; those that were asked for come too."""
        self._forget()

    def _forget(self) -> None:
        self._numbers, self._values = _NONE, self._room(0)  # there may be more room than numbers
        self._found, self._places = _NONE, _NONE  # numbers in order, and where each lies

    def _room(self, records: int) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for dtype, shape in self.sizes(records, self.dtype)]

    # for the layer

    def gate(self, instead: Mapping[int, int] | None) -> None:
        """From now on only records that exist are reached, of these numbers what they lead to; None: all are."""
        self._instead = instead

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """The records that are reached for these.

        Raises:
            PlanError: it was not found out, when the step began, what exists for one of them.
        """
        instead = self._instead
        if instead is None:
            return list(numbers)
        unknown = next((number for number in numbers if number not in instead), None)
        if unknown is not None:
            raise PlanError(
                f"family {self.family.name!r}: its pool is full, and on several ranks it must follow from a step's input_ids "
                f"what it reaches, found record {unknown} that does not; run on one rank, or with a larger pool"
            )
        return [instead[number] for number in numbers]

    def routed(self, numbers: Tensor) -> Tensor:
        """The records that these assignments of a micro-batch go to."""
        if self._instead is None:
            return numbers
        result = redirected(numbers, self.existing)
        if (walking := self._walking()) is not None:
            self._redirected[walking] = int((result != numbers).sum())
        return result

    def weights(self, numbers: Tensor, counts: Tensor) -> list[Tensor]:
        wanted, walking = numbers.cpu(), self._walking()
        missing = wanted[~self._here(wanted)]
        if missing.numel():
            if walking is None and self._numbers.numel() + missing.numel() > self._capacity:
                self._forget()  # outside of steps nothing but these is wanted
                missing = wanted
            self.fetch(self, missing)
        if walking is not None:
            self.reached[walking] = wanted, counts.cpu()
        places = self._places[torch.searchsorted(self._found, wanted)]
        return [values.index_select(0, places).to(self._device) for values in self._values]

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        walking = self._walking()
        assert walking is not None, "gradients are made in steps"
        self.gradients_here.add(*walking, numbers, gradients)

    def _here(self, numbers: Tensor) -> Tensor:
        """Which of these are here."""
        if not self._found.numel():
            return torch.zeros(numbers.shape, dtype=torch.bool)
        place = torch.searchsorted(self._found, numbers).clamp_(max=self._found.numel() - 1)
        return self._found[place] == numbers

    @property
    def redirected(self) -> int:
        """How often a record was meant in the step that may not come to exist."""
        return sum(self._redirected.values())

    # for all ranks

    def by_owner(self, numbers: Tensor) -> dict[int, Tensor]:
        """Numbers by the rank that owns them; each rank has its place, also where there are none."""
        return {owner: numbers[owner_of(numbers, self.owners) == owner] for owner in range(self.owners)}

    def require_room(self, numbers: Tensor) -> None:
        """Before these are brought.

        Raises:
            PlanError: this rank's micro-batches reach more than fit.
        """
        total = self._numbers.numel() + numbers.numel()
        if total > self._capacity:
            raise PlanError(
                f"family {self.family.name!r}: the micro-batches of a rank reach {total:,} records or more, there is memory "
                f"for the values of {self._capacity:,} in {format_bytes(self._nbytes)}; give more (experts_memory), or fewer "
                f"tokens to a step"
            )

    def arrive(self, numbers: Sequence[Tensor], values: Sequence[Sequence[Tensor]]) -> None:
        """Takes in what came from one rank after another."""
        end = self._numbers.numel()
        every = torch.cat([self._numbers, *numbers])
        if every.numel() > self._values[0].shape[0]:
            # not much more than what is there each time, where a few come with every micro-batch
            room = self._room(max(every.numel(), min(2 * end, self._capacity)))
            for larger, old in zip(room, self._values, strict=True):
                larger[:end] = old[:end]
            self._values = room
        for come in values:
            start, end = end, end + come[0].shape[0]
            for mine, new in zip(self._values, come, strict=True):
                mine[start:end] = new
        self._numbers = every
        self._found, self._places = torch.sort(every)

    def sizes(self, count: int, dtype: torch.dtype) -> Sizes:
        """Of so many records, packed."""
        return [(dtype, (count, *parameter.shape)) for parameter in self.family.parameters]

    def drop(self) -> None:
        self._forget()
        self.gradients_here.clear()
        self.reached.clear()
        self._redirected.clear()
        self.asked, self.promised = {}, {}


def values_bytes(family: Family, layout: RecordLayout, dtype: torch.dtype, nbytes: int) -> int:
    """What of a rank's memory is for values that its micro-batches need, where it owns records as well: as many as it has
    records."""
    values = family.numel * dtype.itemsize
    return nbytes * values // (values + Arena.slot_bytes(layout))


def _refuse(borrowed: Borrowed, numbers: Tensor) -> None:
    raise AssertionError(f"family {borrowed.family.name!r} is lent by nobody")


class AllLending:
    """What several ranks do together with the records of families, as one of them: see `touching.Lending`.

    Args:
        families: by the name of their layer; each rank has the same ones in the same order.
        blocks: those that these layers lie in.
        standing_still: entered while this rank waits for others though it computes.
    """

    def __init__(
        self,
        parcels: Parcels,
        cluster: Cluster,
        families: Mapping[str, Borrowed],
        blocks: Collection[int],
        *,
        groups: int,
        standing_still: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.parcels, self.families = parcels, families
        self._names = {id(family): name for name, family in families.items()}
        self.blocks = frozenset(blocks)
        self._share = cluster.groups_of(parcels.rank, groups)
        self._ranks, self._owners = range(cluster.size), range(len(cluster.memory_ranks))
        self._standing_still, self._micro_batches = standing_still, 0
        self._open: Counter[int] = Counter()  # visits of blocks that were entered and not left
        for family in families.values():
            family.fetch = self._fetch

    # a step begins

    def begin(self, micro_batches: int, expected: Mapping[str, Sequence[int]]) -> None:
        """Asks the owners for what is expected here, and begins to read what others expect of this rank."""
        self._micro_batches = micro_batches
        self._open.clear()
        given: dict[int, list[Tensor]] = defaultdict(list)
        counts: list[list[int]] = []  # by family and owner
        for name, family in self.families.items():
            family.drop()
            numbers = torch.tensor(expected.get(name, ()), dtype=torch.int64)
            family.require_room(numbers)
            family.asked = family.by_owner(numbers)
            counts.append([each.numel() for each in family.asked.values()])
            for owner, each in family.asked.items():
                given[owner].append(each)
        told = self.parcels.tell(counts)
        if not any(count for by_family in told for by_owner in by_family for count in by_owner):
            return
        here = self.parcels.rank
        sizes = {r: [(torch.int64, (by_owner[here],)) for by_owner in told[r]] for r in self._ranks if self._is_owner}
        received = self.parcels.hand(given, sizes, "down")
        for position, family in enumerate(self.families.values()):
            family.promised = {rank: tensors[position] for rank, tensors in received.items()}
            _expect(family, family.promised.values())

    @property
    def _is_owner(self) -> bool:
        return self.parcels.rank in self._owners

    # rounds

    def enter(self, block: int) -> None:
        """Micro-batches are about to go through a block; `leave` follows."""
        if block in self.blocks:
            self._open[block] += 1

    def leave(self, block: int) -> None:
        """This rank's micro-batches are through a visit of a block: serves the others until theirs are."""
        if block in self.blocks:
            self._open[block] -= 1
            while self._round(None, _NONE):
                pass

    def _fetch(self, family: Borrowed, numbers: Tensor) -> None:
        """Brings what was asked for of a family when the step began, and then those of these numbers that are not among it.

        Raises:
            AuditError: on the way back, where other ranks need not come to a round.
        """
        if not self._open.total():
            raise AuditError(
                f"family {family.family.name!r}: backward reaches records that forward did not, such as {int(numbers[0])}; a "
                f"router must choose the same experts whenever it is given the same"
            )
        asked = [each for each in family.asked.values() if each.numel()]
        more = numbers[~torch.isin(numbers, torch.cat(asked))] if asked else numbers
        with self._standing_still():
            self._round(family, more)

    def _round(self, wants: Borrowed | None, numbers: Tensor) -> bool:
        """All ranks meet; who wants values gets them. Gives whether anyone wanted any."""
        wanted, more, coming, expected = None, dict[int, Tensor](), dict[int, Tensor](), dict[int, Sizes]()
        if wants is not None:
            wants.require_room(torch.cat([numbers, *wants.asked.values()]))
            more = wants.by_owner(numbers)
            wanted = [self._names[id(wants)], [each.numel() for each in more.values()]]
            coming = {owner: torch.cat([wants.asked.get(owner, _NONE), each]) for owner, each in more.items()}
            expected = {owner: wants.sizes(each.numel(), wants.dtype) for owner, each in coming.items()}
        wanting = {rank: each for rank, each in enumerate(self.parcels.tell(wanted)) if each is not None}
        if not wanting:
            return False
        received = self.parcels.hand(self._asked_for(wanting, more), expected, "down")
        if wants is not None:
            wants.asked = {}
            wants.arrive([coming[owner] for owner in received], list(received.values()))
        return True

    def _asked_for(self, wanting: Mapping[int, Any], more: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
        """The values that this rank owns, by the rank that wants them.

        Args:
            wanting: what each such rank said: a family's name, and by owner how many numbers it asks for now.
            more: by owner, what this rank asks for now.
        """
        sizes: dict[int, Sizes] = {}
        if self._is_owner:
            sizes = {rank: [(torch.int64, (counts[self.parcels.rank],))] for rank, (_, counts) in wanting.items()}
        asking = self.parcels.hand({owner: [each] for owner, each in more.items()}, sizes, "down")
        lent: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for rank, (numbers,) in asking.items():
            name = wanting[rank][0]
            lent[name][rank] = torch.cat([self.families[name].promised.pop(rank, _NONE), numbers])
        found = {}
        for name, by_rank in lent.items():
            _expect(self.families[name], by_rank.values())  # in one go, before any is waited for
            found.update({rank: _values(self.families[name], numbers) for rank, numbers in by_rank.items()})
        return found

    # the end of backward

    def collect(self) -> tuple[dict[str, Sums], dict[str, TouchedFacts]]:
        """Partial sums go to the owners. Gives by name what this rank is to sum up, and what all ranks have reached."""
        given: dict[int, list[Tensor]] = defaultdict(list)
        # by family and owner: how many are reached, and of each sum use, node and number of records
        told = self.parcels.tell([self._pack(family, given) for family in self.families.values()])
        sizes: dict[int, Sizes] = {}
        if self._is_owner:
            sizes = {rank: self._sizes_from(told[rank]) for rank in self._ranks}
        received = {rank: iter(tensors) for rank, tensors in self.parcels.hand(given, sizes, "up").items()}
        sums: dict[str, Sums] = {}
        for position, (name, family) in enumerate(self.families.items()):
            sums[name] = {}
            for rank, tensors in received.items():
                own = told[rank][position][self.parcels.rank]
                assert family.own is not None, "only owners are given gradients"
                numbers, counts = next(tensors), next(tensors)
                if numbers.numel():
                    family.own.reached((rank, 0), numbers, counts)
                for use, low, high, _ in own[1]:
                    packed = Packed(next(tensors), [next(tensors) for _ in family.family.parameters])
                    sums[name].setdefault(use, {})[low, high] = packed
        return sums, self._facts()

    def _pack(self, family: Borrowed, given: dict[int, list[Tensor]]) -> list[tuple[int, list[list[int]]]]:
        """Adds what goes to each owner to its parcel; gives what is in it."""
        found = family.reached.values()
        every = torch.cat([_NONE, *(numbers for numbers, _ in found)])
        every_count = torch.cat([_NONE, *(counts for _, counts in found)])
        numbers, place = torch.unique(every, return_inverse=True)
        counts = torch.zeros(numbers.numel(), dtype=torch.int64).index_add_(0, place, every_count)
        sums = family.gradients_here.partial_sums(self._micro_batches, self._share)
        said = []
        for owner in self._owners:
            own = owner_of(numbers, family.owners) == owner
            given[owner] += [numbers[own], counts[own]]
            parts = []
            for use, nodes in sums.items():
                for (low, high), packed in nodes.items():
                    mine = owner_of(packed.numbers, family.owners) == owner
                    part = packed if bool(mine.all()) else packed.of(mine)
                    if part.numbers.numel():
                        given[owner] += [part.numbers, *part.tensors]
                        parts.append([use, low, high, part.numbers.numel()])
            said.append((int(own.sum()), parts))
        return said

    def _sizes_from(self, told: Sequence[Sequence[tuple[int, list[list[int]]]]]) -> Sizes:
        """What comes from a rank that said this."""
        sizes: list[tuple[torch.dtype, Sequence[int]]] = []
        for family, by_owner in zip(self.families.values(), told, strict=True):
            count, parts = by_owner[self.parcels.rank]
            sizes += 2 * [(torch.int64, (count,))]
            for _, _, _, records in parts:
                sizes += [(torch.int64, (records,)), *family.sizes(records, torch.float32)]
        return sizes

    def _facts(self) -> dict[str, TouchedFacts]:
        own = [family.own.facts if family.own is not None else None for family in self.families.values()]
        elsewhere = [family.redirected for family in self.families.values()]
        told = self.parcels.tell([[f and (f.touched, f.new, f.assignments, f.most) for f in own], elsewhere])
        found = {}
        for position, name in enumerate(self.families):
            parts = [facts[position] for facts, _ in told if facts[position] is not None]
            if parts:
                touched, new, assignments, most = zip(*parts, strict=True)
                redirected = sum(each[position] for _, each in told)
                found[name] = TouchedFacts(sum(touched), sum(new), sum(assignments), max(most), redirected)
        return found

    def drop(self) -> None:
        for family in self.families.values():
            family.drop()


def _expect(family: Borrowed, numbers: Iterable[Tensor]) -> None:
    """Begins to read what others ask for of this rank's records."""
    wanted = torch.unique(torch.cat([_NONE, *numbers])).tolist()
    if wanted:
        assert family.own is not None, "only owners are asked"
        family.own.expect(wanted)


def _values(family: Borrowed, numbers: Tensor) -> list[Tensor]:
    if not numbers.numel():
        return [torch.empty(shape, dtype=dtype) for dtype, shape in family.sizes(0, family.dtype)]
    assert family.own is not None, "only owners are asked"
    return family.own.packed(numbers.tolist())
