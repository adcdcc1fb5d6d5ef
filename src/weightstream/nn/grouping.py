"""Many small experts in few products: rows sorted by expert, experts with as many rows multiplied together.

Nothing is padded and nothing depends on who else is in a step: the products of a micro-batch follow from its own routing.
Every sum has one order: over a row's experts by choice, over an expert's rows by place in the micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "silu", "relu"]

_FORWARD: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="none"),
    "silu": torch.ops.aten.silu_backward,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}
ACTIVATIONS = tuple(_FORWARD)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Experts `first` to `stop` get `count` rows each, those from `row` on."""

    first: int
    stop: int
    row: int
    count: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + (self.stop - self.first) * self.count)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which rows go to which expert.

    `numbers` are the touched experts, (touched), by number of rows and then by number; `counts` are their rows. Row r of
    the products is assignment `order[r]`, that is token `order[r] // top_k`; assignment a is row `place[a]`.
    """

    numbers: Tensor
    counts: Tensor
    order: Tensor
    place: Tensor
    buckets: tuple[Bucket, ...]
    top_k: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What of it grows with rows and experts."""
        return self.numbers, self.counts, self.order, self.place

    def of(self, numbers: Tensor, counts: Tensor, order: Tensor, place: Tensor) -> "Grouping":
        """The same of these tensors."""
        return Grouping(numbers, counts, order, place, self.buckets, self.top_k)


def group(experts: Tensor) -> Grouping:
    """Sorts assignments, (tokens, top_k) of int64, by expert."""
    found, by_expert = torch.sort(experts.reshape(-1), stable=True)
    numbers, counts = torch.unique_consecutive(found, return_counts=True)
    starts = counts.cumsum(0) - counts
    counts, by_count = torch.sort(counts, stable=True)
    numbers, starts = numbers[by_count], starts[by_count]
    ends = counts.cumsum(0)
    within = torch.arange(found.numel(), device=found.device) - torch.repeat_interleave(ends - counts, counts)
    order = by_expert[torch.repeat_interleave(starts, counts) + within]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    buckets, first, row = [], 0, 0
    for count, members in zip(*(x.tolist() for x in torch.unique_consecutive(counts, return_counts=True)), strict=True):
        buckets.append(Bucket(first, first + members, row, count))
        first, row = first + members, row + members * count
    return Grouping(numbers, counts, order, place, tuple(buckets), experts.shape[1])


def forward(
    hidden: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, grouping: Grouping, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over each token's experts of gate times output; by plain operations, so that autograd may go through it.

    Args:
        hidden: (tokens, d_model). gates: (tokens, top_k).
        w_in: (touched, d_hidden, d_model), in order of `grouping.numbers`. w_out: (touched, d_model, d_hidden).

    Returns:
        The result, (tokens, d_model); what the activation was given, (rows, d_hidden); the experts' outputs in order of
        assignment, (tokens, top_k, d_model).
    """
    rows = hidden.index_select(0, grouping.order // grouping.top_k)
    given = _products(rows, w_in, grouping.buckets)
    outputs = _products(_FORWARD[activation](given), w_out, grouping.buckets)
    outputs = outputs.index_select(0, grouping.place).view(*gates.shape, -1)
    return _over_choices(outputs * gates.unsqueeze(-1)), given, outputs


def backward(
    grad: Tensor,
    hidden: Tensor,
    gates: Tensor,
    given: Tensor,
    outputs: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    grouping: Grouping,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `hidden`, `gates`, `w_in`, `w_out`, by the products that autograd would make of `forward`."""
    tokens = grouping.order // grouping.top_k
    gate_grad = (grad.unsqueeze(1) * outputs).sum(-1)
    output_grad = grad.index_select(0, tokens) * gates.reshape(-1).index_select(0, grouping.order).unsqueeze(-1)
    acted = _FORWARD[activation](given)
    w_out_grad = _outer(output_grad, acted, w_out, grouping.buckets)
    given_grad = _BACKWARD[activation](_products(output_grad, w_out.transpose(1, 2), grouping.buckets), given)
    w_in_grad = _outer(given_grad, hidden.index_select(0, tokens), w_in, grouping.buckets)
    row_grad = _products(given_grad, w_in.transpose(1, 2), grouping.buckets)
    hidden_grad = _over_choices(row_grad.index_select(0, grouping.place).view(*gates.shape, -1))
    return hidden_grad, gate_grad, w_in_grad, w_out_grad


def _products(rows: Tensor, weights: Tensor, buckets: Sequence[Bucket]) -> Tensor:
    """Each row times the transpose of its expert's matrix, (out, in): (rows, out)."""
    found = []
    for bucket in buckets:
        given = rows[bucket.rows].view(-1, bucket.count, rows.shape[1])
        found.append(torch.bmm(given, weights[bucket.experts].transpose(1, 2)).flatten(0, 1))
    return torch.cat(found)


def _outer(left: Tensor, right: Tensor, like: Tensor, buckets: Sequence[Bucket]) -> Tensor:
    """For each expert the sum over its rows of the outer products of left and right: (touched, left's, right's)."""
    out = torch.empty(like.shape, dtype=left.dtype, device=left.device)
    for bucket in buckets:
        lefts = left[bucket.rows].view(-1, bucket.count, left.shape[1])
        rights = right[bucket.rows].view(-1, bucket.count, right.shape[1])
        torch.bmm(lefts.transpose(1, 2), rights, out=out[bucket.experts])
    return out


def _over_choices(values: Tensor) -> Tensor:
    """The sum of (tokens, top_k, d) over top_k, one after another."""
    total = values[:, 0]
    for choice in range(1, values.shape[1]):
        total = total + values[:, choice]
    return total
