"""What goes into a step and what comes out of it: the loss of a micro-batch, its target tokens, and the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightstream.touching import TouchedFacts


@dataclass(frozen=True, slots=True)
class MovedBytes:
    """Bytes between host and disk in one step, beside the least that it could have been."""

    read: int
    written: int
    bound: int
    compaction: int = 0
    """Those of them that were read and written to copy records of families out of mostly dead files."""

    @property
    def total(self) -> int:
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """One sparse parameter after a change of its mask: the part that exists, and how much of that is new."""

    density: float
    turnover: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step: mean loss over target tokens, norm before clipping, and what it cost.

    `stalled_s` are the seconds that compute waited for bytes; `seconds` what each kind of operation took. `masks` say of
    each sparse parameter whose mask was changed during this step what it came to; with clipping that is the update that
    the step before it led to. `experts` say of each layer of experts what the step reached of it.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    elapsed_s: float
    stalled_s: float
    bytes: MovedBytes
    skipped: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, MaskFacts] = field(default_factory=dict)
    experts: Mapping[str, TouchedFacts] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s


def default_loss(model: nn.Module, micro_batch: Any) -> Tensor:
    """The loss that a transformers model returns for a micro-batch that is a dict of its arguments."""
    return model(**micro_batch).loss  # type: ignore[no-any-return]


def target_tokens(micro_batch: Any, *, causal: bool = True) -> int:
    """How many tokens of a micro-batch are predicted: labels that are not -100, less the first where inputs are shifted.

    Inputs without labels count their rows. `causal=False` for encoder-decoders, whose labels are not shifted.
    """
    if isinstance(micro_batch, Mapping) and isinstance(labels := micro_batch.get("labels"), Tensor):
        inputs = micro_batch.get("input_ids")
        shifted = causal and labels.ndim == 2 and isinstance(inputs, Tensor) and inputs.shape == labels.shape
        if labels.is_floating_point():
            return labels.numel()
        return int((labels[:, 1:] if shifted else labels).ne(-100).sum())
    leaves = torch.utils._pytree.tree_leaves(micro_batch)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    return 1 if first is None or first.ndim == 0 else int(first.shape[0])
