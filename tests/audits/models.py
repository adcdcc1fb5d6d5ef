"""A small well-behaved model, and variants each of which does one thing that streaming cannot do right."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY = 16, 40


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """`model(tokens)` is a scalar loss. Variants overwrite `layer` or a method; `bad` turns their misbehaviour on."""

    layer: Callable[[], nn.Module] = Layer

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(type(self).layer() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.layers:
            module.bad = bad

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.run(self.embedding(tokens)))
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class AttentionLayer(Layer):
    """torch's own attention reads `out_proj.weight` instead of calling `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return super().forward(x)


class SplitAttention(Model):
    layer = AttentionLayer


class HeadWeight(Model):
    """Computes the logits with the head's weight, without the head."""

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.bad:
            return super().forward(tokens)
        x = self.norm(self.run(self.embedding(tokens)))
        return F.cross_entropy(F.linear(x, self.head.weight)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class NeighbourLayer(Layer):
    """Uses a parameter of another layer."""

    neighbour: "list[Layer]"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.neighbour[0].norm.weight if self.bad else x)


class Neighbours(Model):
    layer = NeighbourLayer

    def __init__(self, bad: bool) -> None:
        super().__init__(bad)
        for index, layer in enumerate(self.layers):
            layer.neighbour = [self.layers[index - 1]]  # in a list, so that it is no submodule


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = ctx.saved_tensors
        return grad, (grad * x).sum((0, 1))


class OutsideGradient(Model):
    """A custom function gives a layer's parameter a gradient between blocks, where no torch function shows it."""

    def run(self, x: Tensor) -> Tensor:
        if self.bad:
            x = _Times.apply(x, self.layers[1].norm.weight)
        return super().run(x)


class InPlaceLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            x += 1.0
        return super().forward(x)


class InPlace(Model):
    layer = InPlaceLayer


class MaskLayer(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.bad and mask is not None:
            mask.mul_(0.5)
        return super().forward(x if mask is None else x * mask)


class InPlaceMask(Model):
    """Changes an input that needs no gradient; plain PyTorch has nothing against it."""

    layer = MaskLayer

    def run(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class ChangedLater(Model):
    """An input of a block is changed in place between blocks, after the block has used it."""

    def run(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x)
        x = self.layers[0](x * mask)
        scale = mask[..., :1]
        for layer in self.layers[1:]:
            x = layer(x * scale) if not self.bad else self._changed(layer, x)
        return x

    @staticmethod
    def _changed(layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        x.add_(1.0)
        return y + x


class KeepingLayer(Layer):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(self.norm(x))
        if self.bad:
            self.kept = inner.square().mean()
        return x + self.down(F.gelu(inner))


class KeptOnModule(Model):
    layer = KeepingLayer

    def forward(self, tokens: Tensor) -> Tensor:
        loss = super().forward(tokens)
        return loss + sum(layer.kept for layer in self.layers) if self.bad else loss


class AppendingLayer(Layer):
    collected: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(self.norm(x))
        if self.bad:
            self.collected.append(inner)
        return x + self.down(F.gelu(inner))


class KeptInList(Model):
    layer = AppendingLayer

    def forward(self, tokens: Tensor) -> Tensor:
        collected: list[Tensor] = []
        for layer in self.layers:
            layer.collected = collected
        loss = super().forward(tokens)
        return loss + sum(inner.square().mean() for inner in collected)


class Cache:
    """What a mutable cache looks like: blocks write to it, later blocks or calls read it."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []

    def update(self, keys: Tensor) -> Tensor:
        self.keys.append(keys)
        return torch.stack(self.keys).mean(0)

    def get_seq_length(self) -> int:
        return len(self.keys)


class CachedLayer(Layer):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return super().forward(x if cache is None else cache.update(x))


class MutableCache(Model):
    layer = CachedLayer

    def run(self, x: Tensor) -> Tensor:
        cache = Cache() if self.bad else None
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x


class CountingLayer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            self.passes += 1
        return super().forward(x)


class ChangedBuffer(Model):
    layer = CountingLayer


class AveragingLayer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 1))
        return super().forward(x)


class ReplacedBuffer(Model):
    layer = AveragingLayer


class BatchNormLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.statistics(x.transpose(1, 2)).transpose(1, 2))


class BatchNorm(Model):
    layer = BatchNormLayer

    def __init__(self, bad: bool) -> None:
        super().__init__(bad)
        for layer in self.layers:
            layer.statistics = nn.BatchNorm1d(WIDTH)
            layer.statistics.train(bad)


class UnreplayableLayer(Layer):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.up.weight.div_(self.up.weight.norm())


class Unreplayable(Model):
    layer = UnreplayableLayer


class NotScalar(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        loss = super().forward(tokens)
        return loss.expand(2) if self.bad else loss


class NoGradient(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        loss = super().forward(tokens)
        return loss.detach() if self.bad else loss
