"""One step as a schedule: the operations of a plan whose memory is allotted (`allotment.py`). A pure function."""

from weightstream.schedule.allotment import RESTORE_AHEAD, Allotment, Facts, stations_of
from weightstream.schedule.operations import (
    Backward,
    Commit,
    Evict,
    Fetch,
    Forward,
    Load,
    Operation,
    Reduce,
    Restore,
    Schedule,
    Spill,
    Turn,
    Update,
    Write,
)


def build(
    facts: Facts,
    allotment: Allotment,
    *,
    pending: frozenset[int] = frozenset(),
    loaded: tuple[int, ...] = (),
) -> Schedule:
    """Lays out one step.

    Args:
        pending: blocks that enter with a staged gradient, to be updated just before they are served.
        loaded: blocks whose records the step before has already begun to load, in order.
    """
    return _Builder(facts, allotment, pending, loaded).build()


class _Builder:
    def __init__(self, facts: Facts, allotment: Allotment, pending: frozenset[int], loaded: tuple[int, ...]) -> None:
        self.facts, self.allotment, self.pending, self.loaded = facts, allotment, pending, loaded
        self.operations: list[Operation] = []
        self.stations = stations_of(facts.visits)
        forward = [station.block for station in self.stations]
        self.access = forward + forward[-2::-1]
        self.free = list(range(allotment.slabs))[::-1]
        self.slab_of: dict[int, int] = {}
        self.updated: set[int] = set()
        self.to_load: list[int] = []
        self.reduced: list[int] = []
        self.residents = [block.index for block in facts.blocks if block.resident]
        self.loaded_streaming = [index for index in loaded if index not in self.residents]

    def build(self) -> Schedule:
        facts, emit = self.facts, self.operations.append
        order = self.residents + [station.block for station in self.stations] + [block.index for block in facts.blocks]
        update_order = list(dict.fromkeys(index for index in order if index in self.pending))
        self._load_first([index for index in update_order if index not in self.loaded], len(self.loaded_streaming))
        for position, index in enumerate(self.residents):
            self._update(index, self.allotment.slabs + position)
        for position, station in enumerate(self.stations):
            self._serve(position)
            if position == len(self.stations) - 2:
                continue  # it goes with the last one
            if position == len(self.stations) - 1:
                for index in update_order:  # the sweep: what the forward did not fetch
                    self._update(index)
                if self.pending:
                    emit(Commit())
                self._turn()
            else:
                for visit in station.visits:
                    self._forward(visit, station.block)
        next_loads = self._backward_pass(update_order)
        if not facts.deferred and self._trained():
            emit(Commit())
        return Schedule(
            tuple(self.operations), facts.visits, facts.micro_batches, self.allotment.slabs,
            self.allotment.record_buffers, self.pending, self.loaded, tuple(next_loads),
        )  # fmt: skip

    def _trained(self) -> list[int]:
        return [block.index for block in self.facts.blocks if block.trainable]

    def _load_first(self, order: list[int], taken: int) -> None:
        """The loads that need wait for nothing: resident blocks have buffers of their own, the others share what there
        is, of which so many are taken."""
        self.operations += [Load(index) for index in order if index in self.residents]
        self.to_load = [index for index in order if index not in self.residents]
        for _ in range(max(0, self.allotment.record_buffers - taken)):
            self._load_next()

    def _load_next(self) -> None:
        if self.to_load:
            self.operations.append(Load(self.to_load.pop(0)))

    def _update(self, block: int, slab: int | None = None) -> None:
        """Update, then the streamed copy to its slab, then the write: the copy must not wait for the disk."""
        if block not in self.pending or block in self.updated:
            if slab is not None:
                self.operations.append(Fetch(block, slab))
            return
        self.updated.add(block)
        self.operations.append(Update(block))
        if slab is not None:
            self.operations.append(Fetch(block, slab))
        self.operations.append(Write(block))
        self._load_after(block)

    def _load_after(self, block: int) -> None:
        """The next record into the buffer that this block's write gives back."""
        if block not in self.residents:
            self._load_next()

    def _serve(self, position: int) -> None:
        """Makes the block at `position` of the access sequence present, and fetches ahead while slabs are free."""
        last = min(position + self.facts.prefetch, len(self.access) - 1)
        for ahead in range(position, last + 1):
            block = self.access[ahead]
            if block in self.slab_of:
                continue
            alone = self.facts.share is None
            if alone and ahead > position and block in self.pending and block not in self.updated:
                break  # its copy comes out of its update, which computes: not before its turn
                # (with several ranks its way to all of them is longer than its update, and begins as early as it can)
            slab = self._slab(set(self.access[position : ahead + 1]), ahead)
            if slab is None:
                break
            self.slab_of[block] = slab
            self._update(block, slab)

    def _slab(self, needed: set[int], ahead: int) -> int | None:
        if self.free:
            return self.free.pop()
        distance = {
            block: next((i for i in range(ahead, len(self.access)) if self.access[i] == block), len(self.access))
            for block in self.slab_of
            if block not in needed
        }
        if not distance:
            return None
        victim = max(distance, key=lambda block: distance[block])  # Belady: farthest next use
        slab = self.slab_of.pop(victim)
        self.operations.append(Evict(victim, slab))
        return slab

    def _forward(self, visit: int, block: int) -> None:
        for micro_batch in range(self.facts.micro_batches):
            self._forward_one(visit, block, micro_batch)

    def _forward_one(self, visit: int, block: int, micro_batch: int) -> None:
        self.operations.append(Forward(visit, block, micro_batch))
        last = visit == len(self.facts.visits) - 1
        if self.allotment.boundaries[visit] != "device" and not last and visit not in self.allotment.keep:
            self.operations.append(Spill(visit, micro_batch))

    def _turn(self) -> None:
        """Each micro-batch through the last two blocks and the loss, and back through the last visit, before the next.

        What lies behind the last block but one (a final norm, say) is larger than any boundary between two layers, and
        cannot be spilled: this way only one micro-batch has it at a time.
        """
        last = len(self.facts.visits) - 1
        for micro_batch in range(self.facts.micro_batches):
            for station in self.stations[-2:]:
                for visit in station.visits:
                    self._forward_one(visit, station.block, micro_batch)
            self.operations.append(Turn(micro_batch))
            self.operations.append(Backward(last, self.stations[-1].block, micro_batch))

    def _backward_pass(self, update_order: list[int]) -> list[int]:
        facts, emit = self.facts, self.operations.append
        count = len(self.stations)
        trained = set(self._trained())
        first_visit = {station.block: position for position, station in reversed(list(enumerate(self.stations)))}
        next_loads: list[int] = []
        spacing = 1
        if facts.deferred:
            served = dict.fromkeys(station.block for station in self.stations if station.block in trained)
            next_loads = [index for index in self.residents if index in trained]
            next_loads += list(served)[: self.allotment.record_buffers]
            spacing = max(1, count // (len(next_loads) + 1))
        else:
            # in the order in which they will be reduced: at a block's first visit, the last one of the way back
            order = [*sorted(first_visit, key=lambda index: -first_visit[index]), *self.residents]
            self._load_first([index for index in order if index in trained], 0)
        restores = [
            (visit, micro_batch)
            for position in reversed(range(count))
            for visit in reversed(self.stations[position].visits)
            if self.allotment.boundaries[visit] != "device"
            and visit != len(facts.visits) - 1
            and visit not in self.allotment.keep
            for micro_batch in range(facts.micro_batches)
        ]
        turn_of = {pair: turn for turn, pair in enumerate(restores)}
        waiting = list(next_loads)
        restored = 0
        for step, position in enumerate(reversed(range(count))):
            station = self.stations[position]
            self._serve(count - 1 + step)
            if waiting and (step + 1) % spacing == 0:
                emit(Load(waiting.pop(0)))
            for visit in reversed(station.visits):
                if visit == len(facts.visits) - 1:
                    continue  # done at the turn
                for micro_batch in range(facts.micro_batches):
                    target = turn_of.get((visit, micro_batch), -RESTORE_AHEAD) + RESTORE_AHEAD
                    while restored < min(target, len(restores)):
                        emit(Restore(*restores[restored]))
                        restored += 1
                    emit(Backward(visit, station.block, micro_batch))
            if first_visit[station.block] == position and station.block in trained:
                self._reduce(station.block)
        for block in facts.blocks:
            if block.resident and block.trainable:
                self._reduce(block.index)
        self._update_reduced(0)
        for index in waiting:
            emit(Load(index))
        return next_loads

    def _reduce(self, block: int) -> None:
        self.operations.append(Reduce(block))
        if not self.facts.deferred:
            self.reduced.append(block)
            # a sum over ranks takes its time: meanwhile the next block goes back
            self._update_reduced(0 if self.facts.share is None else 1)

    def _update_reduced(self, left: int) -> None:
        """Without clipping: the updates of blocks whose gradient is complete, but for the last ones."""
        while len(self.reduced) > left:
            block = self.reduced.pop(0)
            self.operations += [Update(block), Write(block)]
            self._load_after(block)
