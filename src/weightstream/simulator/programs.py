"""Each rank's own operations, and which hosts do the very same, so that one of them stands for all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightstream.schedule.operations import Backward, Forward, Operation, Restore, Schedule, Spill, Turn
from weightstream.simulator.hardware import Hardware

_OF_A_MICRO_BATCH = (Forward, Backward, Turn, Spill, Restore)


@dataclass(frozen=True, slots=True)
class Program:
    """What one rank does of a schedule: what all ranks do, and between it what it does for its own micro-batches.

    `own` has, with each of its operations, how many of the common ones come before it.
    """

    common: Sequence[Operation]
    own: Sequence[tuple[int, Operation]]

    def __iter__(self) -> Iterator[Operation]:
        done = 0
        for before, operation in self.own:
            yield from self.common[done:before]
            done = before
            yield operation
        yield from self.common[done:]

    def likeness(self, first: int) -> tuple[tuple[int, type, int, int], ...]:
        """The same for two ranks whose programs differ only in the numbers of their micro-batches, from `first` on."""
        return tuple(
            (before, type(op), -1 if isinstance(op, Turn) else op.visit, op.micro_batch - first)
            for before, op in self.own
            if isinstance(op, _OF_A_MICRO_BATCH)
        )


def programs(schedule: Schedule, shares: Mapping[int, range]) -> dict[int, Program]:
    """By rank. Every operation is looked at once, however many ranks there are."""
    rank_of = {micro_batch: rank for rank, share in shares.items() for micro_batch in share}
    common: list[Operation] = []
    own: dict[int, list[tuple[int, Operation]]] = {rank: [] for rank in shares}
    for operation in schedule.operations:
        if isinstance(operation, _OF_A_MICRO_BATCH):
            own[rank_of[operation.micro_batch]].append((len(common), operation))
        else:
            common.append(operation)
    return {rank: Program(common, own[rank]) for rank in shares}


def representatives(
    hardware: Hardware, shares: Mapping[int, range], steps: Callable[[int], Sequence[Program]]
) -> tuple[int, ...]:
    """The ranks of one host of each kind.

    Hosts are alike if their ranks are: the same role, the same slowness, and the same operations in every step.
    """
    memory = hardware.cluster.memory_ranks
    ranks_of: dict[int, list[int]] = {}
    for rank, host in enumerate(hardware.hosts):
        ranks_of.setdefault(host, []).append(rank)
    seen: dict[object, int] = {}
    for host, ranks in ranks_of.items():
        likeness = tuple(
            sorted(
                (
                    rank in memory,
                    hardware.slowdown.get(rank, 1.0),
                    tuple(hash(program.likeness(shares[rank].start)) for program in steps(rank)),
                )
                for rank in ranks
            )
        )
        seen.setdefault(likeness, host)
    chosen = set(seen.values())
    return tuple(rank for rank, host in enumerate(hardware.hosts) if host in chosen)
