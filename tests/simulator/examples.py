"""Machines and durations, by hand and at random, for the facts that `tests/schedule/examples.py` makes."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from tests.schedule.examples import facts, smallest

from weightstream.cluster import Cluster
from weightstream.schedule.allotment import Allotment, Facts, allot
from weightstream.schedule.reduction import subtrees
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Disk, Hardware, Link
from weightstream.units import MIB

TICK = 1 / 64  # seconds are multiples of it, so that sums of them have no rounding


def durations(some: Facts, *, scale: float = 1.0, **settings: Any) -> Durations:
    """Every forward takes a second, its way back three; updates and sums take a fraction."""
    visits, blocks = len(some.visits), len(some.blocks)
    chosen: dict[str, Any] = {
        "forward": (scale,) * visits, "recompute": (scale,) * visits, "backward": (2 * scale,) * visits,
        "turn": scale / 2, "update": (scale / 4,) * blocks, "reduce": (scale / 8,) * blocks,
    }  # fmt: skip
    return Durations(**chosen | settings)


def among(some: Facts, cluster: Cluster) -> Facts:
    """The same model with its work divided."""
    if cluster.size == 1:
        return replace(some, share=None, share_groups=None, sum_buffers=0)
    groups = some.reduction_groups
    shares = [cluster.groups_of(rank, groups) for rank in cluster.compute_ranks]
    return replace(
        some,
        share=cluster.largest_share(some.micro_batches, groups),
        share_groups=max(len(share) for share in shares),
        sum_buffers=2 * max(len(subtrees(groups, share)) for share in shares),
    )


@dataclass(frozen=True)
class Case:
    """All that a simulation is given."""

    facts: Facts
    allotment: Allotment
    durations: Durations
    hardware: Hardware


@st.composite
def cases(draw: st.DrawFn, *, quiet: bool = False, alone: bool = False) -> Case:
    """Any model, machine and division of work, under tight budgets or wide ones.

    Args:
        quiet: nothing is shared: every rank has a host and cores of its own, and no disk.
        alone: there is but one rank.
    """
    some = draw(facts())
    most = min(4, some.micro_batches, some.reduction_groups)
    workers = 1 if alone else draw(st.integers(1, most))
    apart = not alone and draw(st.booleans())
    cluster = Cluster(workers, draw(st.integers(1, 2)) if apart else "colocated")
    if any(not cluster.share(rank, some.micro_batches, some.reduction_groups) for rank in cluster.compute_ranks):
        cluster = Cluster(1, cluster.memory)
    some = among(some, cluster)
    if draw(st.booleans()):
        some = replace(
            some,
            device_memory=smallest(some, "device_memory") + draw(st.integers(0, 2 * MIB)),
            host_memory=smallest(some, "host_memory") + draw(st.integers(0, 2 * MIB)),
        )
    seconds = st.integers(0, 64).map(lambda ticks: ticks * TICK)

    def each(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(seconds, min_size=count, max_size=count)))

    visits, blocks = len(some.visits), len(some.blocks)
    chosen = Durations(
        forward=each(visits), recompute=each(visits), backward=each(visits), turn=draw(seconds),
        update=each(blocks), reduce=each(blocks), expand=each(blocks) if not quiet and draw(st.booleans()) else (),
        between_steps=draw(seconds),
        overhead=dict.fromkeys(draw(st.sets(st.sampled_from(["forward", "load", "fetch", "evict", "commit"]))), TICK),
    )  # fmt: skip
    rates = st.sampled_from([2.0**power for power in range(10, 22)])
    settings: dict[str, Any] = {"hosts": tuple(range(cluster.size)), "updates_beside": draw(st.booleans())}
    if cluster.size > 1:
        settings["link"] = Link(bytes_per_s=draw(rates), fan_out=draw(st.integers(1, 2)))
    if not quiet:
        settings["hosts"] = tuple(draw(st.integers(0, 1)) for _ in range(cluster.size))
        settings["cores_per_host"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
        settings["memory_bytes_per_s"] = draw(st.sampled_from([float("inf"), 2.0**20]))
        settings["io_compute_s_per_byte"] = draw(st.sampled_from([0.0, 2.0**-20]))
        settings["slowdown"] = {0: 1.0 + draw(st.integers(0, 2)) / 2}
        if draw(st.booleans()):
            settings["disk"] = Disk(
                read_bytes_per_s=draw(rates), write_bytes_per_s=draw(rates),
                together=draw(st.sampled_from([1.0, 1.5, 2.0])), latency_s=draw(st.sampled_from([0.0, TICK])),
            )  # fmt: skip
    return Case(some, allot(some), chosen, Hardware(cluster=cluster, **settings))
