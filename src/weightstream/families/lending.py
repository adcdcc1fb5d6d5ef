"""Records of families on several ranks: owners read, update and write them; who computes borrows values, and gives gradients.

A record's number says which memory rank owns it (`cluster.owner_of`). What micro-batches are known to reach is asked for
when a step begins, so that owners read ahead. Everything else goes by *rounds*, in which all ranks meet: a layer whose
values are not here yet begins one, and so does a rank whose micro-batches are through a block (`leave`), until nobody
wants anything any more. So a rank that waits for values finds all others in a round, or on their way to one.

Gradients are added where they were made, down to the largest subtrees of the contract's tree, and at their owner in the
order of that tree (`fabric/packed.py`): the bits are those of one rank.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from weightstream.cluster import Cluster, owner_of
from weightstream.errors import AuditError, PlanError
from weightstream.fabric.packed import Gradients, Packed, Sums
from weightstream.fabric.parcels import Parcels, Sizes
from weightstream.families.tallying import Gate, Tally, TouchedFacts, Walking
from weightstream.families.touching import Touched
from weightstream.store.arena import Arena
from weightstream.store.families import Family
from weightstream.store.layout import RecordLayout
from weightstream.store.segments import AlignedBuffer
from weightstream.units import format_bytes

_NONE = torch.empty(0, dtype=torch.int64)


class _ValueMemory:
    """Memory for the values of so many records, a tensor (records, *shape) for each parameter: no more is ever taken, and
    none is resident until it is used."""

    def __init__(self, family: Family, records: int, dtype: torch.dtype) -> None:
        self._memory = AlignedBuffer(records * family.numel * dtype.itemsize)
        self.tensors: list[Tensor] = []
        offset = 0
        for parameter in family.parameters:
            self.tensors.append(self._memory.tensor(dtype, offset, (records, *parameter.shape)))
            offset += self.tensors[-1].nbytes

    def rows(self, start: int, stop: int) -> list[Tensor]:
        return [tensor[start:stop] for tensor in self.tensors]

    def close(self) -> None:
        self.tensors = []
        self._memory.close()


class Borrowed:
    """The values of one family that this rank's micro-batches need in a step; what a layer asks its weights of.

    Args:
        own: the records that this rank owns; None if it owns none at all.
        nbytes: memory for values, whoever owns them.
        owners: how many ranks own the family's records.
        walking: what is computed now; None outside of steps.
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
        walking: Callable[[], Walking | None],
    ) -> None:
        self.family, self.own, self.dtype, self.owners = family, own, dtype, owners
        self._device, self._walking = device, walking
        self._nbytes, self._capacity = nbytes, nbytes // (family.numel * dtype.itemsize)
        self._values = _ValueMemory(family, min(family.count, self._capacity), dtype)
        self.gradients_here = Gradients(groups)
        self.reached = Tally()
        self._gate = Gate(self._not_known, 0)
        self.asked: dict[int, Tensor] = {}  # by owner: numbers that are to come when this rank needs them
        self.promised: dict[int, Tensor] = {}  # by rank that computes: the same of others
        self.fetch: Callable[[Borrowed, Tensor], None] = _refuse
        """Brings these numbers here; those that were asked for come too."""
        self._forget()

    def _forget(self) -> None:
        self._numbers = _NONE  # whose values lie one after another
        self._found, self._places = _NONE, _NONE  # numbers in order, and where each lies

    # for the layer

    def gate(self, instead: Mapping[int, int] | None) -> None:
        """From now on only records that exist are reached, of these numbers what they lead to; None: all are."""
        self._gate.set(instead)

    def existing(self, numbers: Sequence[int]) -> list[int]:
        """The records that are reached for these.

        Raises:
            PlanError: it was not found out, when the step began, what exists for one of them.
        """
        return self._gate.existing(numbers)

    def _not_known(self, numbers: Sequence[int]) -> dict[int, int]:
        raise PlanError(
            f"family {self.family.name!r}: its pool is full, and on several ranks it must follow from a step's input_ids "
            f"what it reaches, found record {numbers[0]} that does not; run on one rank, or with a larger pool"
        )

    def routed(self, numbers: Tensor) -> Tensor:
        """The records that these assignments of a micro-batch go to."""
        result = self._gate.routed(numbers)
        if result is not numbers:
            self.reached.sent_elsewhere(self._walking(), int((result != numbers).sum()))
        return result

    def weights(self, numbers: Tensor, counts: Tensor) -> list[Tensor]:
        wanted, walking = numbers.cpu(), self._walking()
        missing = wanted[~self._here(wanted)]
        if missing.numel():
            if walking is None and self._numbers.numel() + missing.numel() > self._capacity:
                self._forget()  # outside of steps nothing but these is wanted
                missing = wanted
            self.fetch(self, missing)
        self.reached.called(walking, wanted, counts)
        places = self._places[torch.searchsorted(self._found, wanted)]
        return [values.index_select(0, places).to(self._device) for values in self._values.tensors]

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        walking = self._walking()
        assert walking is not None, "gradients are made in steps"
        self.gradients_here.add(walking.use, walking.micro_batch, numbers, gradients)

    def _here(self, numbers: Tensor) -> Tensor:
        """Which of these are here."""
        if not self._found.numel():
            return torch.zeros(numbers.shape, dtype=torch.bool)
        place = torch.searchsorted(self._found, numbers).clamp_(max=self._found.numel() - 1)
        return self._found[place] == numbers

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

    def room(self, records: Sequence[int]) -> list[list[Tensor]]:
        """Where the values of so many more records go, from one rank after another."""
        ends = list(accumulate(records, initial=self._numbers.numel()))
        return [self._values.rows(start, stop) for start, stop in pairwise(ends)]

    def arrived(self, numbers: Sequence[Tensor]) -> None:
        """The values of these records are there, in that order."""
        self._numbers = torch.cat([self._numbers, *numbers])
        self._found, self._places = torch.sort(self._numbers)

    def sizes(self, count: int, dtype: torch.dtype) -> Sizes:
        """Of so many records, packed."""
        return [(dtype, (count, *parameter.shape)) for parameter in self.family.parameters]

    def drop(self) -> None:
        self._forget()
        self.gradients_here.clear()
        self.reached.clear()
        self.asked, self.promised = {}, {}

    def close(self) -> None:
        self.drop()
        self._values.close()


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
        self._standing_still = standing_still
        self._open: Counter[int] = Counter()  # visits of blocks that were entered and not left
        for family in families.values():
            family.fetch = self._fetch

    # a step begins

    def begin(self, micro_batches: int, expected: Mapping[str, Sequence[int]]) -> None:
        """Asks the owners for what is expected here, and begins to read what others expect of this rank."""
        self._open.clear()
        given: dict[int, list[Tensor]] = defaultdict(list)
        counts: list[list[int]] = []  # by family and owner
        for name, family in self.families.items():
            family.drop()
            family.gradients_here.begin(micro_batches, self._share)
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
        wanted, more, coming, room = None, dict[int, Tensor](), dict[int, Tensor](), dict[int, list[Tensor]]()
        if wants is not None:
            wants.require_room(torch.cat([numbers, *wants.asked.values()]))
            more = wants.by_owner(numbers)
            wanted = [self._names[id(wants)], [each.numel() for each in more.values()]]
            coming = {owner: torch.cat([wants.asked.get(owner, _NONE), each]) for owner, each in more.items()}
            room = dict(zip(coming, wants.room([each.numel() for each in coming.values()]), strict=True))
        wanting = {rank: each for rank, each in enumerate(self.parcels.tell(wanted)) if each is not None}
        if not wanting:
            return False
        self.parcels.hand_into(room, self._asked_for(wanting, more), "down")
        if wants is not None:
            wants.asked = {}
            wants.arrived(list(coming.values()))
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
            if family.own is not None:
                family.own.reached.clear()  # of a rehearsal sums are closed twice
            for rank, tensors in received.items():
                own = told[rank][position][self.parcels.rank]
                assert family.own is not None, "only owners are given gradients"
                family.own.reached.add(next(tensors), next(tensors))
                for use, low, high, _ in own[1]:
                    packed = Packed(next(tensors), [next(tensors) for _ in family.family.parameters])
                    sums[name].setdefault(use, {})[low, high] = packed
        return sums, self._facts()

    def _pack(self, family: Borrowed, given: dict[int, list[Tensor]]) -> list[tuple[int, list[list[int]]]]:
        """Adds what goes to each owner to its parcel; gives what is in it."""
        numbers, counts = family.reached.numbers, family.reached.counts
        said: list[tuple[int, list[list[int]]]] = []
        for owner in self._owners:
            own = owner_of(numbers, family.owners) == owner
            given[owner] += [numbers[own], counts[own]]
            said.append((int(own.sum()), []))
        for use, nodes in family.gradients_here.partial_sums().items():
            for low, high in list(nodes):
                packed = nodes.pop((low, high))  # only one of them is there twice
                for owner in self._owners:
                    mine = owner_of(packed.numbers, family.owners) == owner
                    part = packed if bool(mine.all()) else packed.of(mine)
                    if part.numbers.numel():
                        given[owner] += [part.numbers, *part.tensors]
                        said[owner][1].append([use, low, high, part.numbers.numel()])
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
        here = [(family.reached.redirected, family.reached.calls) for family in self.families.values()]
        told = self.parcels.tell([[f and (f.touched, f.new, f.assignments, f.most) for f in own], here])
        found = {}
        for position, name in enumerate(self.families):
            parts = [facts[position] for facts, _ in told if facts[position] is not None]
            if parts:
                touched, new, assignments, most = zip(*parts, strict=True)
                redirected, calls = zip(*(each[position] for _, each in told), strict=True)
                found[name] = TouchedFacts(
                    sum(touched), sum(new), sum(assignments), max(most), sum(redirected), max(calls)
                )
        return found

    def through(self, use: int, micro_batch: int) -> None:
        """One of this rank's micro-batches is back through a visit."""
        for family in self.families.values():
            family.gradients_here.through(use, micro_batch)

    def drop(self) -> None:
        for family in self.families.values():
            family.drop()

    def close(self) -> None:
        for family in self.families.values():
            family.close()


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
