"""`sparsity`: which parameters are sparse, how sparse, and how their masks change."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from weightstream.section import Section
from weightstream.sparse.settings import Algorithm, Curve, Distribution, Growth, Ramp, Sparsity, SparsityGroup

LAST_UPDATE = 0.75
"""Part of training after which masks stay, unless `end` says otherwise: as in Evci et al., ICML 2020, section 4.1."""


class RampConfig(Section):
    """A number that changes between `begin` and `end`."""

    schedule: Curve = "cubic"
    initial: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.0, ge=0, lt=1)

    def ramp(self) -> Ramp:
        return Ramp(self.schedule, self.initial, self.final)


class SparsityGroupConfig(Section):
    """One entry of `sparsity.groups`: parameters by name; the first group that matches counts.

    Parameters with one dimension, embeddings, norms and the head stay dense.
    """

    patterns: tuple[str, ...] = Field(min_length=1)
    """Names such as `*.mlp.*`."""
    algorithm: Algorithm = "static"
    sparsity: float | RampConfig = 0.9
    """The part that is zero, at least 0 and below 1; 0 keeps these parameters dense. With gmp also a schedule."""
    distribution: Distribution = "uniform"
    block: tuple[int, int] = (1, 1)
    """Rows and columns that are zero or not together."""
    drop_fraction: float | RampConfig = 0.3
    """The part of what exists that set and rigl replace; a number falls to 0 along a cosine."""
    grow_by: Growth = "gradient"
    """What rigl grows by: the gradient, or the gradient relative to its row and its column."""
    every: int = Field(default=100, ge=1)
    """Steps from one mask update to the next."""
    begin: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, ge=1)
    """The step at which mask updates end; by default at three quarters of training."""
    init: Literal["random", "magnitude", "zeros"] | Path | None = None
    """How the first mask is chosen, or a safetensors file with a mask by parameter name; at random if weights are not given."""
    dense_until: int = Field(default=0, ge=0)
    """The step after which these parameters become sparse."""
    dense_from: int | None = Field(default=None, ge=1)
    """The step after which they are dense again."""
    include_all: bool = False
    """Also embeddings, norms and the head."""

    def group(self, training_steps: int) -> SparsityGroup:
        """
        Raises:
            ConfigError: values that do not go together.
        """
        return SparsityGroup(
            patterns=self.patterns,
            algorithm=self.algorithm,
            sparsity=self.sparsity.ramp() if isinstance(self.sparsity, RampConfig) else self.sparsity,
            distribution=self.distribution,
            block=self.block,
            drop_fraction=self.drop_fraction.ramp()
            if isinstance(self.drop_fraction, RampConfig)
            else self.drop_fraction,
            grow_by=self.grow_by,
            every=self.every,
            begin=self.begin,
            end=self._end(training_steps),
            init=None if self.init is None else str(self.init),
            dense_until=self.dense_until,
            dense_from=self.dense_from,
            include_all=self.include_all,
        )

    def _end(self, training_steps: int) -> int | None:
        if self.end is not None or self.algorithm == "static":
            return self.end
        return max(1, int(LAST_UPDATE * training_steps))


class SparsityConfig(Section):
    """`sparsity`: groups of sparse parameters; without any the model is dense."""

    groups: tuple[SparsityGroupConfig, ...] = ()
    kernels: Literal["auto"] | dict[str, Literal["native", "gathered", "bsr", "csr"]] = Field(default_factory=dict)
    """By pattern of names, the first that matches, which of these parameters are not expanded but multiplied by a kernel.
    auto: those with which `weightstream calibrate` measured a kernel to be faster, decided when the store is made."""

    def settings(self, training_steps: int) -> Sparsity:
        """
        Raises:
            ConfigError: values that do not go together.
        """
        return Sparsity(tuple(group.group(training_steps) for group in self.groups))
