"""What a run's sparsity is: groups of parameters, each with an algorithm and its schedule. Pure functions of the step.

Version n of a record is what training step n leaves, steps counting from 1; version 0 is the initial one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, assert_never, get_args

from weightstream.errors import ConfigError

Algorithm = Literal["static", "gmp", "set", "rigl"]
Distribution = Literal["uniform", "erdos_renyi", "global"]
Curve = Literal["constant", "linear", "cubic", "cosine"]
Growth = Literal["gradient", "relative_gradient"]


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number that goes from `initial` to `final` between two steps and stays there.

    With p from 0 to 1 in between: `linear`; `cubic`, final + (initial - final)(1 - p)³ (Zhu and Gupta, "To prune, or not
    to prune", 2017, equation 1); `cosine`, final + (initial - final)(1 + cos πp)/2 (Evci et al., "Rigging the Lottery",
    ICML 2020, section 3, with final 0). `constant` is `initial` throughout.
    """

    curve: Curve
    initial: float
    final: float = 0.0

    def at(self, step: int, begin: int, end: int) -> float:
        """The value at `step`, exactly `initial` up to `begin` and exactly `final` from `end` on."""
        if self.curve == "constant" or step <= begin:
            return self.initial
        if step >= end:
            return self.final
        progress = (step - begin) / (end - begin)
        match self.curve:
            case "linear":
                left = 1.0 - progress
            case "cubic":
                left = (1.0 - progress) ** 3
            case "cosine":
                left = 0.5 * (1.0 + math.cos(math.pi * progress))
            case _:
                assert_never(self.curve)
        return self.final + (self.initial - self.final) * left


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityGroup:
    """Parameters whose name matches one of `patterns` (shell style), and how sparse they are.

    `sparsity` is the part of cells that do not exist, in [0, 1); 0 keeps the parameters dense. With `gmp` it may be a
    ramp from `begin` to `end`. Mask updates happen at steps `begin`, `begin` + `every`, …; before `end` for `set` and
    `rigl`, up to and including `end` for `gmp`, which so reaches its final sparsity exactly.

    Versions before `dense_until` and from `dense_from` on are dense.

    `algorithm`: `static`, masks stay; `gmp`, gradual magnitude pruning (Zhu and Gupta, 2017); `set`, the smallest are dropped
    and as many grown at random (Mocanu et al., Nature Communications 2018); `rigl`, grown by gradients (Evci et al., ICML
    2020). `distribution` shares zeros out among matrices: all alike, by their shape (Evci et al., section 3), or by one
    threshold of magnitudes over the group. `block` are rows and columns of a cell, in elements. `drop_fraction` is the part of
    what exists that `set` and `rigl` replace; a number falls to 0 along a cosine.

    Raises:
        ConfigError: settings that do not go together; the message says which.
    """

    patterns: tuple[str, ...]
    algorithm: Algorithm = "static"
    sparsity: float | Ramp = 0.9
    distribution: Distribution = "uniform"
    block: tuple[int, int] = (1, 1)
    drop_fraction: float | Ramp = 0.3
    grow_by: Growth = "gradient"
    """What `rigl` grows by: the gradient (Evci et al., 2020), or the gradient relative to its row and its column."""
    every: int = 100
    begin: int = 0
    end: int | None = None
    init: str | None = None
    """How masks begin: `random`; `magnitude`; `zeros`, given weights that are not zero exist; or the path of a safetensors
    file with masks by parameter name. None says nothing: at random, but not of weights that are given."""
    dense_until: int = 0
    dense_from: int | None = None
    include_all: bool = False
    """Also embeddings, norms and the head, which otherwise stay dense."""

    def __post_init__(self) -> None:
        self._require(bool(self.patterns) and all(self.patterns), "patterns", "name patterns such as '*.mlp.*'")
        self._require(self.algorithm in get_args(Algorithm), "algorithm", f"one of {', '.join(get_args(Algorithm))}")
        self._require(
            self.distribution in get_args(Distribution), "distribution", f"one of {', '.join(get_args(Distribution))}"
        )
        self._require(len(self.block) == 2 and min(self.block) >= 1, "block", "rows and columns, such as [32, 32]")
        self._require(self.grow_by in get_args(Growth), "grow_by", f"one of {', '.join(get_args(Growth))}")
        self._require(
            self.grow_by == "gradient" or self.algorithm == "rigl", "grow_by", f"gradient with {self.algorithm}"
        )
        for field in ("sparsity", "drop_fraction"):
            value = getattr(self, field)
            numbers = (value.initial, value.final) if isinstance(value, Ramp) else (value,)
            self._require(all(0 <= number < 1 for number in numbers), field, "at least 0 and below 1")
        self._require(self.every >= 1 and self.begin >= 0, "every and begin", "steps, at least 1 and at least 0")
        self._require(self.end is None or self.end > self.begin, "end", f"a step after begin ({self.begin})")
        self._require(
            self.algorithm == "static" or self.end is not None, "end", f"the step at which {self.algorithm} ends"
        )
        self._require(
            self.algorithm == "gmp" or not isinstance(self.sparsity, Ramp),
            "sparsity", f"a number with {self.algorithm}; schedules of sparsity go with algorithm: gmp",
        )  # fmt: skip
        ramp = self.sparsity if isinstance(self.sparsity, Ramp) and self.distribution == "global" else None
        self._require(
            ramp is None or ramp.curve == "constant" or ramp.initial <= ramp.final,
            "sparsity", "a schedule that rises with distribution: global, which only prunes",
        )  # fmt: skip
        self._require(
            ramp is None or ramp.initial == 0 or self.init == "magnitude",
            "init", "magnitude with distribution: global and gmp that begins sparse",
        )  # fmt: skip
        self._require(
            self.dense_until >= 0 and (self.dense_from is None or self.dense_from > self.dense_until),
            "dense_from", f"a step after dense_until ({self.dense_until})",
        )  # fmt: skip
        self._require(
            not self.masks_given or self.algorithm != "gmp",
            "init",
            "random or magnitude with gmp, which prunes by itself",
        )
        self._require(
            not self.masks_given or not self.dense_until,
            "init",
            "random or magnitude after a dense phase, since a given mask is that of the beginning",
        )

    def _require(self, holds: bool, field: str, expected: str) -> None:
        if not holds:
            found = " and ".join(repr(getattr(self, name)) for name in field.split(" and "))
            raise ConfigError(
                f"sparsity group {', '.join(self.patterns) or '(no pattern)'}: {field}: expected {expected}; found {found}"
            )

    @property
    def given(self) -> str | None:
        """The file of given masks."""
        return None if self.init in (None, "random", "magnitude", "zeros") else self.init

    @property
    def masks_given(self) -> bool:
        """Whether first masks say themselves how many cells exist: those of a file, or where given weights are not zero."""
        return self.given is not None or self.init == "zeros"

    @property
    def by_chance(self) -> bool:
        """Whether masks begin at random."""
        return self.init in (None, "random")

    @property
    def counted(self) -> bool:
        """Whether counts of cells follow from these settings; else masks say them, or a search finds them."""
        return not (self.masks_given or self.searched)

    @property
    def searched(self) -> bool:
        """Whether only a search over all pieces of the group tells how many cells each keeps: what is pruned by magnitude
        under `distribution: global`. What is chosen at random has its share of each piece, as with `uniform`."""
        return self.distribution == "global" and (self.algorithm == "gmp" or self.init == "magnitude")

    @property
    def settled(self) -> bool:
        """Whether counts of cells stay as they are in version 0."""
        return self.algorithm != "gmp" and self.dense_until == 0 and self.dense_from is None

    @property
    def last(self) -> int:
        """Where schedules end."""
        return self.end if self.end is not None else self.begin

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def sparse_at(self, version: int) -> bool:
        """Whether `version` is not one of the dense ones."""
        return self.dense_until <= version and (self.dense_from is None or version < self.dense_from)

    def sparsity_at(self, version: int) -> float:
        """The part of cells that does not exist in `version`: that of the latest mask update."""
        if not self.sparse_at(version):
            return 0.0
        if not isinstance(self.sparsity, Ramp):
            if self.algorithm == "gmp":
                return (
                    self.sparsity if version >= self.last else Ramp("cubic", 0.0, self.sparsity).at(*self._at(version))
                )
            return self.sparsity
        return self.sparsity.at(*self._at(version))

    def _at(self, version: int) -> tuple[int, int, int]:
        """The step of the latest mask update, and the ends of the schedule."""
        if version < self.last:
            version -= max(0, version - self.begin) % self.every
        return version, self.begin, self.last

    def drop_fraction_at(self, step: int) -> float:
        """The part of existing cells that the mask update of `step` drops."""
        fraction = self.drop_fraction
        ramp = fraction if isinstance(fraction, Ramp) else Ramp("cosine", fraction)
        return ramp.at(step, self.begin, self.last)

    def updates_at(self, step: int) -> bool:
        """Whether the schedule of `set` and `rigl` moves cells at `step`."""
        return (
            self.algorithm in ("set", "rigl")
            and self.sparse_at(step - 1)
            and self.sparse_at(step)
            and self.begin <= step < self.last
            and (step - self.begin) % self.every == 0
        )


@dataclass(frozen=True, slots=True)
class Sparsity:
    """All groups; the first that matches a parameter counts."""

    groups: tuple[SparsityGroup, ...] = ()

    def group_of(self, name: str) -> SparsityGroup | None:
        """The first group that matches a parameter of this name; None if none does."""
        return next((group for group in self.groups if group.matches(name)), None)

    def saying(self, made: Mapping[str, Any] | None) -> "Sparsity":
        """The same with how masks begin where a group does not say it: as the store was made with, else at random.

        Args:
            made: `to_json` of the settings that a store was made with, if there is one.
        """
        found = made.get("groups", ()) if made is not None else ()
        said = [group.get("init") for group in found] if len(found) == len(self.groups) else [None] * len(self.groups)
        return Sparsity(
            tuple(
                replace(group, init=init or "random") if group.init is None else group
                for group, init in zip(self.groups, said, strict=True)
            )
        )

    def to_json(self) -> dict[str, Any]:
        """`{"groups": [{"patterns": …, "algorithm": "rigl", …}]}`; `from_json` reads it.

        `grow_by` stands there where it is not the gradient itself, so that stores from before it go on.
        """
        groups = [asdict(group) for group in self.groups]
        return {
            "groups": [
                {key: value for key, value in fields.items() if (key, value) != ("grow_by", "gradient")}
                for fields in groups
            ]
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Sparsity":
        """The settings that `to_json` wrote.

        Raises:
            ConfigError: fields that a group does not have or may not hold.
        """
        return Sparsity(tuple(_group(fields) for fields in data.get("groups", ())))


def _group(fields: Mapping[str, Any]) -> SparsityGroup:
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            values[key] = Ramp(**value)
        else:
            values[key] = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    try:
        return SparsityGroup(**values)
    except TypeError as error:
        raise ConfigError(f"sparsity group: {error}; its fields are those of SparsityGroup") from None
