"""Who sends what to whom, as data: routes of a broadcast, and plans of a sum in the contract's order.

Both are the same on every rank, and rotate with the number of the unit, so that every rank's links carry the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from weightstream.cluster import Cluster

Node = tuple[int, int]
"""The groups [low, high) whose sum a node of the contract's tree is."""

CHAIN_BELOW = 8
"""With fewer receivers a chain is as fast as a tree, or faster (benchmarks/fabric.py)."""


@dataclass(frozen=True, slots=True)
class Route:
    """One rank's place on the way of a unit: from whom it comes, to whom it goes on, and how many links lie before it."""

    source: int | None
    targets: tuple[int, ...]
    hops: int = 0


@lru_cache(maxsize=4096)
def broadcast_route(cluster: Cluster, rank: int, owner: int, rotation: int, chain_below: int = CHAIN_BELOW) -> Route:
    """The owner sends each byte once, however many receive it.

    A chain over the compute ranks for few of them: every link carries each byte once. Above, a binary tree below the
    first receiver, whose depth grows with the logarithm of their number.
    """
    others = [receiver for receiver in cluster.compute_ranks if receiver != owner]
    order = others[rotation % len(others) :] + others[: rotation % len(others)] if others else []
    if rank == owner:
        return Route(None, tuple(order[:1]))
    if rank not in order:
        return Route(None, ())
    place = order.index(rank)
    if len(order) < chain_below:
        source, hops = place - 1, place + 1
        targets = [place + 1]
    else:
        source, hops = (place - 1) // 2, (place + 1).bit_length()
        targets = [2 * place + 1, 2 * place + 2]
    onward = tuple(order[target] for target in targets if target < len(order))
    return Route(order[source] if place else owner, onward, hops)


@dataclass(frozen=True, slots=True)
class Merge:
    """The sum of a sibling comes from another rank and is added to the own: `own` becomes `parent`."""

    own: Node
    other: Node
    source: int
    parent: Node


@dataclass(frozen=True, slots=True)
class Join:
    """Two sums of this rank, whose share reaches across the middle of a node, become their parent."""

    own: Node
    other: Node
    parent: Node


@dataclass(frozen=True, slots=True)
class Hand:
    """A sum goes to another rank, which merges it, or owns it."""

    node: Node
    to: int


@dataclass(frozen=True, slots=True)
class Take:
    """The finished sum comes to its owner, who computes nothing."""

    node: Node
    source: int


Step = Merge | Join | Hand | Take


@lru_cache(maxsize=4096)
def reduce_plan(cluster: Cluster, groups: int, owner: int, rotation: int) -> Mapping[int, Sequence[Step]]:
    """What each rank does, in order, so that the sum over all groups comes to `owner`.

    Sums are those of `schedule.reduction.tree(groups)`. A node is merged where the owner's own sum is, else on the
    rank that stands for it (one of the compute ranks, by rotation, if the owner does not compute), else on the left.
    Every rank sends each of its sums once, and the owner gets each byte once if it does not compute.
    """
    ranks = cluster.compute_ranks
    top = owner if owner in ranks else ranks[rotation % len(ranks)]
    rank_of = {group: rank for rank in ranks for group in cluster.groups_of(rank, groups)}
    steps: dict[int, list[Step]] = {rank: [] for rank in {*ranks, owner}}

    def place(low: int, high: int) -> int:
        """The rank that has the sum of these groups once its steps so far are done."""
        if rank_of[low] == rank_of[high - 1]:  # shares are contiguous: one of the sums that the rank comes with
            return rank_of[low]
        middle = (low + high) // 2
        left, right = place(low, middle), place(middle, high)
        if left == right:
            steps[left].append(Join((low, middle), (middle, high), (low, high)))
            return left
        holder, giver, own, other = left, right, (low, middle), (middle, high)
        if right == top:
            holder, giver, own, other = right, left, other, own
        steps[giver].append(Hand(other, holder))
        steps[holder].append(Merge(own, other, giver, (low, high)))
        return holder

    holder = place(0, groups)
    if holder != owner:
        steps[holder].append(Hand((0, groups), owner))
        steps[owner].append(Take((0, groups), holder))
    return steps
