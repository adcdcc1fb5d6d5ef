"""The fixed order in which gradients are summed, as arithmetic on indices.

Micro-batches form contiguous groups; inside a group gradients add up in order of index, across groups in one binary
tree, whatever worker computed them. Nothing here touches a tensor: the planner sizes memory with it, the fabric sums.
"""

from functools import lru_cache


def group_of(micro_batch: int, micro_batches: int, groups: int) -> int:
    """The group that holds a micro-batch: group `g` has indices `[g*M//G, (g+1)*M//G)`."""
    group = micro_batch * groups // micro_batches
    while (group + 1) * micro_batches // groups <= micro_batch:
        group += 1
    return group


@lru_cache
def tree(groups: int) -> tuple[tuple[int, int, int], ...]:
    """Inner nodes `(low, middle, high)` of the binary tree over `[0, groups)`, children before parents."""
    nodes: list[tuple[int, int, int]] = []

    def walk(low: int, high: int) -> None:
        if high - low < 2:
            return
        middle = (low + high) // 2
        walk(low, middle)
        walk(middle, high)
        nodes.append((low, middle, high))

    walk(0, groups)
    return tuple(nodes)


@lru_cache
def partial_sums(micro_batches: int, groups: int) -> int:
    """How many partial sums are alive at once, at most, when micro-batches arrive in order of index."""
    alive: dict[tuple[int, int], bool] = {}
    most, done = 0, 0
    nodes = tree(groups)
    for micro_batch in range(micro_batches):
        group = group_of(micro_batch, micro_batches, groups)
        while done < len(nodes) and nodes[done][2] <= group:
            low, middle, high = nodes[done]
            left, right = alive.pop((low, middle), False), alive.pop((middle, high), False)
            if left or right:
                alive[low, high] = True
            done += 1
        alive[group, group + 1] = True
        most = max(most, len(alive))
    return most


@lru_cache
def subtrees(groups: int, share: range) -> tuple[tuple[int, int], ...]:
    """The fewest nodes of the tree over `[0, groups)` that together are the groups of `share`, in order."""
    if not share:
        return ()

    def within(low: int, high: int) -> tuple[tuple[int, int], ...]:
        if high <= share.start or low >= share.stop:
            return ()
        if share.start <= low and high <= share.stop:
            return ((low, high),)
        middle = (low + high) // 2
        return within(low, middle) + within(middle, high)

    return within(0, groups)
