"""What a step costs at most on limited links, by arithmetic: bytes over the busiest link, forward and backward apart.

The two cannot overlap: no gradient is there before the loss. Bytes are those of the fabric's own routes and plans.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from emulated import Layers, Profile

from weightstream.blocks import Unit, cut, split
from weightstream.cluster import Cluster
from weightstream.fabric.trees import Hand, broadcast_route, reduce_plan


@dataclass(frozen=True)
class Traffic:
    """Of one step, in bytes: over the busiest direction of any rank's link in the forward and in the backward; and what
    the memory rank sends in all."""

    forward: int
    backward: int
    egress: int


def traffic(
    profile: Profile, shrink: int, layers: int, *, cluster: Cluster, groups: int, panel_elements: int, slabs: int
) -> Traffic:
    """With one memory rank, which owns everything; the last `slabs` blocks of the forward are not fetched again."""
    with torch.device("meta"):
        blocks = split(Layers(profile, shrink, layers))
    units = cut(blocks, panel_elements=panel_elements, panels=True)
    again = [unit for unit in units if unit.block < layers - slabs]
    forward, backward = _sent_down(cluster, units), _sent_down(cluster, again) + _sent_up(cluster, groups, units)
    egress = _sent_down(cluster, [*units, *again])["out", 0]
    return Traffic(max(forward.values()), max(backward.values()), egress)


Links = Counter[tuple[str, int]]
"""Bytes by direction and rank."""


def _sent_down(cluster: Cluster, units: Iterable[Unit]) -> Links:
    found: Links = Counter()
    for unit in units:
        for rank in range(cluster.size):
            for target in broadcast_route(cluster, rank, 0, unit.index).targets:
                found["out", rank] += _whole_pages(2 * unit.numel)
                found["in", target] += _whole_pages(2 * unit.numel)
    return found


def _sent_up(cluster: Cluster, groups: int, units: Iterable[Unit]) -> Links:
    found: Links = Counter()
    for unit in units:
        for rank, steps in reduce_plan(cluster, groups, 0, unit.index).items():
            for step in steps:
                if isinstance(step, Hand):
                    found["out", rank] += _whole_pages(4 * unit.numel)
                    found["in", step.to] += _whole_pages(4 * unit.numel)
    return found


def _whole_pages(nbytes: int) -> int:
    """A unit's part of a slab or gradient image ends with a page."""
    return -(-nbytes // 4096) * 4096
