"""`training`: how long, in which portions, and what is watched on the way."""

from typing import Literal

from pydantic import Field

from weightstream.section import Section


class ValidationConfig(Section):
    """`training.validation`: the loss on held-out text, before the first step, every so many steps, and at the end."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates only before the first and after the last step."""
    sequences: int = Field(default=64, ge=1)
    """How many sequences it takes, or all there are if fewer; always the same ones."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per forward pass; by default as many as in training. More stream the weights less often."""


class SnapshotConfig(Section):
    """`training.snapshots`: which steps stay readable after training has gone past them."""

    every: int = Field(default=0, ge=0)
    """Steps between snapshots; 0 takes none but the best."""
    keep_last: int = Field(default=2, ge=1)
    """How many of them stay; an older one is dropped, and its room used again."""
    keep_best: bool = False
    """Also keep the one with the lowest validation loss."""


class SampleConfig(Section):
    """`training.sample`: text that the trained model continues at the end."""

    prompts: tuple[str, ...] = ()
    tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""


class TrainingConfig(Section):
    """`training`: a step is `micro_batches` of `micro_batch_size` sequences of `sequence_length` tokens."""

    steps: int = Field(default=1000, ge=1)
    micro_batches: int = Field(default=4, ge=1, le=1 << 20)
    micro_batch_size: int = Field(default=4, ge=1)
    micro_batch: Literal["given", "auto"] = "given"
    """auto: a step keeps its `micro_batches` times `micro_batch_size` sequences, divided as suits the machine."""
    sequence_length: int = Field(default=512, ge=2)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """The global gradient norm above which gradients are scaled down; null never does."""
    validation: ValidationConfig = ValidationConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    sample: SampleConfig = SampleConfig()
    tensorboard: bool = True
    """Write TensorBoard events beside the JSON lines."""

    @property
    def sequences_per_step(self) -> int:
        return self.micro_batches * self.micro_batch_size

    @property
    def most_micro_batches(self) -> int:
        """How many micro-batches a step may have."""
        return self.sequences_per_step if self.micro_batch == "auto" else self.micro_batches

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length
