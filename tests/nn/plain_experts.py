"""The oracle: a mixture of experts in plain PyTorch, all experts resident, one product per expert and token group.

It imports nothing of weightstream. Experts are (experts, …) tensors; whoever compares gives the first values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden, ids) to experts and gates, (tokens, top_k) both."""


class PlainExperts(nn.Module):
    """Each expert is a pair of parameters; each is multiplied by the rows of all its tokens at once."""

    def __init__(self, w_in: Tensor, w_out: Tensor, route: Route) -> None:
        super().__init__()
        self.w_in = nn.ParameterList(nn.Parameter(w.clone()) for w in w_in)
        self.w_out = nn.ParameterList(nn.Parameter(w.clone()) for w in w_out)
        self.route = route

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        numbers, gates = self.route(hidden, ids)
        tokens, top_k = hidden.flatten(0, -2), numbers.shape[1]
        assigned = numbers.flatten()
        rows = tokens.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
        outputs, places = [], []
        for number in torch.unique(assigned).tolist():
            place = (assigned == number).nonzero().flatten()
            places.append(place)
            outputs.append(F.linear(F.gelu(F.linear(rows[place], self.w_in[number])), self.w_out[number]))
        order = torch.cat(places)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        scaled = torch.cat(outputs)[inverse].view(-1, top_k, tokens.shape[1]) * gates.unsqueeze(-1)
        return scaled.sum(1).view(hidden.shape)


def tree_sum(leaves: list[Tensor | None]) -> Tensor | None:
    """Groups added in a binary tree; None where there is nothing to add."""
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    left, right = tree_sum(leaves[:middle]), tree_sum(leaves[middle:])
    if left is None or right is None:
        return left if right is None else right
    return left + right


class PlainTraining:
    """AdamW over micro-batches with clipping, resident, by `torch.optim`.

    Of the parameters whose names begin with one of `dense`, those that no token reached get gradients of zeros; others
    get none, so that `torch.optim` leaves them and their step count alone: lazy AdamW.
    """

    def __init__(
        self, model: nn.Module, name_of: Callable[[str], str], *, lr: float, clip_norm: float | None, groups: int,
        dense: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.model, self.clip_norm, self.groups, self.dense = model, clip_norm, groups, dense
        named = {name_of(name): parameter for name, parameter in model.named_parameters()}
        self.named = dict(sorted(named.items()))
        decayed = [p for p in self.named.values() if p.dim() > 1]
        others = [p for p in self.named.values() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=lr, fused=True
        )

    def step(self, micro_batches: list[dict[str, Tensor]]) -> tuple[float, float]:
        """Loss, and norm before clipping."""
        found: dict[str, list[Tensor | None]] = {name: [None] * self.groups for name in self.named}
        tokens = [batch["labels"][:, 1:].numel() for batch in micro_batches]
        total = 0.0
        for index, batch in enumerate(micro_batches):
            weight = tokens[index] / sum(tokens)
            loss = self.model(batch["input_ids"], batch["labels"])
            total += weight * float(loss.detach())
            (loss * weight).backward()
            group = next(g for g in range(self.groups) if (g + 1) * len(micro_batches) // self.groups > index)
            for name, parameter in self.named.items():
                if parameter.grad is not None:
                    before = found[name][group]
                    found[name][group] = parameter.grad if before is None else before + parameter.grad
                    parameter.grad = None
        square = 0.0
        for name, parameter in self.named.items():
            parameter.grad = tree_sum(found[name])
            if parameter.grad is None and name.startswith(self.dense):
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                wide = parameter.grad.flatten().double()
                square += torch.dot(wide, wide).item()
        norm = square**0.5
        if self.clip_norm is not None and (coefficient := self.clip_norm / (norm + 1e-6)) < 1.0:
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm
