"""What goes into a step and what comes out of it: micro-batches, their loss, target tokens and weights; and the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightstream.errors import ConfigError
from weightstream.families.tallying import TouchedFacts


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
    """One step: its loss, the norm of its gradient before clipping, and what it cost.

    `loss` is the sum of the micro-batches' losses by their weights: by default the mean over target tokens. `tokens` are
    these of all micro-batches, or rows where there are no labels; `lr` is the learning rate of this step. A `skipped` step
    had a gradient that was not finite, and changed nothing. `stalled_s` are those of its `elapsed_s` in which compute waited
    for bytes; `seconds` what each kind of operation took. `masks` say of each sparse parameter whose mask was changed during
    this step what it came to; with clipping that is the update that the step before it led to. `experts` say of each layer of
    experts what the step reached of it.
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


def loss_weights(tokens: Sequence[int], given: Sequence[float] | None) -> Sequence[float]:
    """What the loss of each micro-batch is multiplied by: what is given, or its share of the step's target tokens.

    Raises:
        ConfigError: there are none, or as many weights as micro-batches are not given.
    """
    if given is not None:
        if len(given) != len(tokens):
            raise ConfigError(f"engine.step: {len(tokens)} micro-batches, but {len(given)} weights")
        return given
    whole = sum(tokens)
    if not whole:
        raise ConfigError("engine.step: no micro-batch has a target token; give weights, or labels other than -100")
    return [each / whole for each in tokens]


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: PyTorch does not know it, or it is not to be had here.
    """
    try:
        device = torch.device(name)
        if device.type != "meta":  # which computes nothing
            torch.empty(1, device=device)
            return device
        reason = "no numbers can be computed there"
    except Exception as error:  # each kind of device raises another one
        reason = " ".join(str(error).splitlines()[:1])
    raise ConfigError(f"device: expected one that this PyTorch can use here, such as 'cpu', found {name!r}: {reason}")


def to_device(micro_batch: Any, device: torch.device) -> Any:
    """A micro-batch with its tensors on a device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), micro_batch)


def mask_facts(
    grown: Mapping[str, int], densities: Callable[[], Mapping[str, tuple[int, int]]]
) -> dict[str, MaskFacts]:
    """Of the parameters whose masks have changed, by how many of their elements came to exist.

    Args:
        densities: gives the non-zeros and the elements of each; asked only if there are any.
    """
    found = densities() if grown else {}
    return {name: MaskFacts(found[name][0] / found[name][1], grown[name] / found[name][0]) for name in sorted(grown)}
