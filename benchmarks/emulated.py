"""A model whose compute is only time: what it would take on a real device passes, and gradients of the real size come.

Engine, schedule, store, fabric and updates are those of any run. Bytes of a block and seconds of its compute are those of
the profile, both divided by one factor, so that a small machine can carry many ranks: bytes per second stay as they are.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import weightstream as ws
from weightstream.worker.worker import LossFunction, Worker


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A decoder layer and the device that computes it.

    Sizes of Llama 3 8B: The Llama 3 Herd of Models, arXiv 2407.21783, table 3. 400 TFLOP/s in bf16 are what the same
    paper reports for an H100 (table 4: 380 to 430). `tokens` are those of one worker in one step, its one micro-batch:
    16 Mi tokens, the largest batch of the same paper (section 3.4.1), over 8 workers.
    """

    hidden: int = 4096
    kv: int = 1024
    intermediate: int = 14336
    tokens: int = 2 << 20
    flops: float = 400e12

    @property
    def parameters(self) -> int:
        """Of one layer."""
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def forward_s(self) -> float:
        """Two operations a parameter and token (attention's own products left out: they make compute longer)."""
        return 2 * self.parameters * self.tokens / self.flops

    @property
    def backward_s(self) -> float:
        """Twice the forward, and the forward again, since activations are recomputed."""
        return 3 * self.forward_s


class Layer(nn.Module):
    """The parameters of a decoder layer, every width divided by `shrink`; never called."""

    def __init__(self, profile: Profile, shrink: int) -> None:
        super().__init__()
        width, kv, inner = profile.hidden // shrink, profile.kv // shrink, profile.intermediate // shrink
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norms = nn.Parameter(torch.ones(2 * width))


class Layers(nn.Module):
    """Nothing but decoder layers."""

    def __init__(self, profile: Profile, shrink: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(profile, shrink) for _ in range(layers))


def shrunk_parameters(profile: Profile, shrink: int) -> int:
    """Of one layer whose widths are divided by `shrink`."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Layer(profile, shrink).parameters())


class EmulatedWorker(Worker):
    """Waits instead of computing, and hands over constant gradients.

    `forward_s` and `backward_s` are of one micro-batch and one block.
    """

    forward_s = 0.0
    backward_s = 0.0
    turned = 0.0
    """When the last micro-batch had its loss (`time.perf_counter`)."""

    def begin(
        self,
        micro_batches: Mapping[int, Any],
        weights: Mapping[int, float],
        loss_fn: LossFunction,
        *,
        seed: int,
        step: int,
    ) -> None:
        self._tapes: dict[int, list[tuple[int, int]]] = {index: [] for index in micro_batches}
        self._turned: set[int] = set()
        self._calls = list(self._forwards)

    def wants(self, micro_batch: int) -> str | None:
        done = len(self._tapes[micro_batch])
        return self._calls[done] if micro_batch not in self._turned and done < len(self._calls) else None

    def top(self, micro_batch: int) -> tuple[int, int] | None:
        tape = self._tapes[micro_batch]
        return tape[-1] if tape else None

    def forward(self, visit: int, micro_batch: int, *, keep: bool) -> None:
        self._tapes[micro_batch].append((visit, self.block_of_module[self._calls[visit]]))
        time.sleep(self.forward_s)

    def turn(self, micro_batch: int) -> float:
        self._turned.add(micro_batch)
        self.turned = time.perf_counter()
        return 1.0

    def backward(self, visit: int, micro_batch: int) -> None:
        _, block = self._tapes[micro_batch].pop()
        time.sleep(self.backward_s)
        for name, parameter in self.parameters.of(block):
            self._sink(block, name, visit, micro_batch, _gradient(parameter))

    def spill(self, visit: int, micro_batch: int, *, to_disk: bool) -> None:
        """There are no activations."""

    def restore(self, visit: int, micro_batch: int) -> None:
        """There are no activations."""

    def end(self) -> None:
        """Nothing is kept."""


_gradients: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def _gradient(parameter: Tensor) -> Tensor:
    """The same small number everywhere, in the dtype in which the real gradient comes."""
    key = parameter.shape, parameter.dtype
    if key not in _gradients:
        _gradients[key] = torch.full(parameter.shape, 1e-3, dtype=parameter.dtype)
    return _gradients[key]


class EmulatedEngine(ws.Engine):
    """An engine whose worker waits so many seconds for each forward and backward."""

    def __init__(self, *args: Any, forward_s: float, backward_s: float, **kwargs: Any) -> None:
        self._seconds = forward_s, backward_s
        super().__init__(*args, **kwargs)

    def _make_worker(self) -> EmulatedWorker:
        worker = EmulatedWorker(self.model, self.store.blocks, self.parameters, self.device, self._gradient)
        worker.forward_s, worker.backward_s = self._seconds
        return worker
