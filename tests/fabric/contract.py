"""The numerical contract's sums in its own words: recursive and slow, imports nothing of ours."""

from collections.abc import Sequence

from torch import Tensor


def groups_of(count: int, groups: int) -> list[range]:
    """Group g holds micro-batches `[g*M//G, (g+1)*M//G)`."""
    return [range(g * count // groups, (g + 1) * count // groups) for g in range(groups)]


def tree_text(low: int, high: int) -> str:
    if high - low == 1:
        return str(low)
    middle = (low + high) // 2
    return f"({tree_text(low, middle)}+{tree_text(middle, high)})"


def tree_sum(grads: Sequence[Tensor | None], groups: int) -> Tensor | None:
    """Inside a group in order of index, in fp32; across groups a binary tree; what is absent adds nothing."""

    def group(members: range) -> Tensor | None:
        total: Tensor | None = None
        for index in members:
            grad = grads[index]
            if grad is not None:
                total = grad.float() if total is None else total + grad
        return total

    def tree(low: int, high: int) -> Tensor | None:
        if high - low == 1:
            return sums[low]
        middle = (low + high) // 2
        left, right = tree(low, middle), tree(middle, high)
        if left is None or right is None:
            return right if left is None else left
        return left + right

    sums = [group(members) for members in groups_of(len(grads), groups)]
    return tree(0, groups)


def sum_over_uses(uses: Sequence[Sequence[Tensor | None]], groups: int) -> Tensor | None:
    """Per use the tree, then over uses in order of first use."""
    total: Tensor | None = None
    for grads in uses:
        value = tree_sum(grads, groups)
        if value is not None:
            total = value if total is None else total + value
    return total
