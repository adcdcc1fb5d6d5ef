"""Which records a store has: units of blocks one by one, and families of any number of records from one template.

A family is one row of the catalogue: a template and an arithmetic range of numbers. What is asked about one of its
records is computed from these, so that nothing grows with `count`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from weightstream.blocks import Block, Parameter, Unit
from weightstream.errors import StoreError
from weightstream.store.initial import Recipe
from weightstream.store.layout import HasStates, Precision, RecordLayout, record_layout
from weightstream.store.sparsity import DENSE, InitialMask, Sparsity, check_piece, initial_sparsities

NUMBER = "{}"
"""Stands for a record's number in the names of a template."""
_LAYOUTS_KEPT = 1024


@dataclass(frozen=True)
class Family:
    """`count` records that differ in their number alone, which counts from 0.

    `name` and the names of `parameters` hold `{}` once, where the number goes. `recipes` maps the parameters' names (as
    in the template) to how they begin; every one needs a recipe, and so a record that was never updated takes no space.

    Raises:
        StoreError: a name without `{}`, no records, no numbers in them, or a parameter without a recipe.
    """

    name: str
    count: int
    parameters: tuple[Parameter, ...]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for text in (self.name, *(parameter.name for parameter in self.parameters)):
            if text.count(NUMBER) != 1:
                raise StoreError(f"family {self.name!r}: expected {NUMBER} once in {text!r}, for the record's number")
        if self.count < 1 or not self.parameters:
            raise StoreError(f"family {self.name!r}: expected records and parameters, found {self.count} records")
        if not self.numel:
            raise StoreError(f"family {self.name!r}: expected parameters with numbers in them, found empty ones")
        missing = [parameter.name for parameter in self.parameters if parameter.name not in self.recipes]
        if missing:
            raise StoreError(f"family {self.name!r}: parameter {missing[0]!r} has no recipe; give it one")

    @property
    def numel(self) -> int:
        """Numbers in one record."""
        return sum(parameter.numel for parameter in self.parameters)

    def block(self, index: int, number: int) -> Block:
        """The record of that number, as block `index`."""
        parameters = tuple(
            Parameter(parameter.name.replace(NUMBER, str(number)), parameter.shape, parameter.trainable)
            for parameter in self.parameters
        )
        return Block(index, self.name.replace(NUMBER, str(number)), parameters, ())

    def number_of(self, parameter: str) -> int | None:
        """The number of the record that has a parameter of this name; None if none has."""
        for pattern, _ in self.patterns:
            match = pattern.fullmatch(parameter)
            if match is not None and int(match.group(1)) < self.count:
                return int(match.group(1))
        return None

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], Recipe]]:
        """What the names of each parameter look like, with its recipe."""
        return [
            (re.compile(r"(0|[1-9]\d*)".join(map(re.escape, name.split(NUMBER)))), recipe)
            for name, recipe in self.recipes.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Parameters and recipes as JSON; `from_json` reads it."""
        return {
            "parameters": [
                {"name": parameter.name, "shape": list(parameter.shape), "trainable": parameter.trainable}
                for parameter in self.parameters
            ],
            "recipes": {name: recipe.to_json() for name, recipe in self.recipes.items()},
        }

    @classmethod
    def from_json(cls, name: str, count: int, facts: Mapping[str, Any]) -> "Family":
        """The family that `to_json` wrote, under this name and with so many records."""
        parameters = tuple(Parameter(p["name"], tuple(p["shape"]), p["trainable"]) for p in facts["parameters"])
        recipes = {key: Recipe.from_json(recipe) for key, recipe in facts["recipes"].items()}
        return cls(name, count, parameters, recipes)


class _Template:
    """Layouts of a family's records: all are that of the last one, whose header is the longest, under other names."""

    def __init__(self, family: Family, precision: Precision, optimizer: HasStates) -> None:
        self.family = family
        self.last = record_layout(family.block(0, family.count - 1), precision, optimizer)
        number = str(family.count - 1)
        self._names = {p.name.replace(NUMBER, number): p.name for p in family.parameters}

    def name(self, number: int) -> str:
        return self.family.name.replace(NUMBER, str(number))

    def layout(self, number: int) -> RecordLayout:
        text = str(number)
        return self.last.renamed(self.name(number), {o: n.replace(NUMBER, text) for o, n in self._names.items()})


class Layouts:
    """Layouts by index: of the units, and of any family's records, which follow them in order of family.

    Those of units with sparse parameters depend on the version (`of`); under its index alone one has that of version 0.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        families: Sequence[Family],
        precision: Precision,
        optimizer: HasStates,
        masks: Mapping[str, InitialMask] | None = None,
    ) -> None:
        self._members_of, self._precision, self._optimizer = units, precision, optimizer
        self._masks = dict(masks or {})
        self._varying = {u.index for u in units for p in u.parameters if p.name in self._masks}
        self._dense = [record_layout(unit, precision, optimizer) for unit in units]
        self._sparse = lru_cache(max(_LAYOUTS_KEPT, 4 * len(units)))(self._made_sparse)
        self._initial = initial_sparsities(units, self._masks)
        self._units = [self.of(index, sparsity) for index, sparsity in enumerate(self._initial)]
        self._families: list[tuple[int, Family]] = []
        first = len(units)
        for family in families:
            self._families.append((first, family))
            first += family.count
        self.count = first
        self._templates = [_Template(family, precision, optimizer) for family in families]
        self._of_member = lru_cache(_LAYOUTS_KEPT)(self._made)

    @property
    def units(self) -> list[RecordLayout]:
        """Those of the units."""
        return self._units

    def __getitem__(self, index: int) -> RecordLayout:
        return self._units[index] if 0 <= index < len(self._units) else self._of_member(index)

    def of(self, index: int, sparsity: Sparsity) -> RecordLayout:
        """The layout of a record's versions that are so sparse; the same object for a while.

        Raises:
            StoreError: it cannot be so sparse, or the store was made without masks for these parameters.
        """
        if sparsity:
            return self._sparse(index, sparsity)
        return self._dense[index] if 0 <= index < len(self._dense) else self[index]

    def _made_sparse(self, index: int, sparsity: Sparsity) -> RecordLayout:
        if not 0 <= index < len(self._dense):
            raise StoreError(
                f"record {index} is one of a family or of nothing; only units of blocks have sparse parameters"
            )
        unit = self._members_of[index]
        parameters = {parameter.name: parameter for parameter in unit.parameters}
        for piece in sparsity:
            mask = self._masks.get(piece.name)
            if piece.name not in parameters or mask is None or mask.block != piece.block:
                known = ", ".join(f"{n} in {self._masks[n].block}" for n in parameters if n in self._masks) or "none"
                raise StoreError(
                    f"block {unit.name!r}: the store was not made with a sparse parameter {piece.name!r} in blocks of "
                    f"{piece.block}; its sparse parameters there are: {known}; give masks when the store is made"
                )
            check_piece(parameters[piece.name], piece)
        places = [list(parameters).index(piece.name) for piece in sparsity]
        if places != sorted(set(places)):
            raise StoreError(
                f"block {unit.name!r}: expected its sparse parameters once each, in order, found {sparsity}"
            )
        return record_layout(unit, self._precision, self._optimizer, sparsity)

    def initial(self, index: int) -> Sparsity:
        """The sparsity of a record at version 0, as far as a rule gives it."""
        return self._initial[index] if 0 <= index < len(self._initial) else DENSE

    def varies(self, index: int) -> bool:
        """Whether versions of this record may have other layouts."""
        return index in self._varying

    @property
    def masks(self) -> Mapping[str, InitialMask]:
        """How each sparse parameter's mask begins."""
        return self._masks

    def _made(self, index: int) -> RecordLayout:
        template, number = self._place(index)
        return template.layout(number)

    def _place(self, index: int) -> tuple["_Template", int]:
        """The template of a family's record, and its number."""
        for (first, family), template in zip(self._families, self._templates, strict=True):
            if first <= index < first + family.count:
                return template, index - first
        raise IndexError(f"record {index}: the store has records 0 to {self.count - 1}")

    def parts_nbytes(self, index: int) -> int:
        """Bytes of a record's parts; for a family's record without making its layout."""
        return (self._units[index] if index < len(self._units) else self._place(index)[0].last).parts_nbytes

    def fits(self, index: int, layout: RecordLayout) -> bool:
        """Whether this is a layout of that record."""
        if index < len(self._units):
            return layout == self.of(index, layout.sparsity)
        template, number = self._place(index)
        return (layout.block, layout.image_nbytes) == (template.name(number), template.last.image_nbytes)

    def family_rows(self) -> list[tuple[int, str, int, dict[str, Any]]]:
        """First index, name, number of records and template of each family, as the manifest keeps them."""
        return [(first, family.name, family.count, family.to_json()) for first, family in self._families]

    @property
    def families(self) -> list[tuple[int, Family]]:
        """Each family with the index of its first record."""
        return self._families

    def is_member(self, index: int) -> bool:
        """Whether a record is one of a family."""
        return index >= len(self._units)

    def number(self, index: int) -> int:
        """The number that a family's record has in its family.

        Raises:
            IndexError: there is none.
        """
        return self._place(index)[1]

    def member(self, index: int) -> Block:
        """The record of a family that has this index.

        Raises:
            IndexError: there is none.
        """
        template, number = self._place(index)
        return template.family.block(index, number)

    def owner(self, parameter: str) -> int | None:
        """The index of the family's record that has a parameter of this name; None if none has."""
        for first, family in self._families:
            number = family.number_of(parameter)
            if number is not None:
                return first + number
        return None

    def index(self, family: str, number: int) -> int:
        """The index of a family's record.

        Raises:
            KeyError: no such family, or no such number in it.
        """
        for first, found in self._families:
            if found.name == family and 0 <= number < found.count:
                return first + number
        known = ", ".join(f"{found.name!r} with {found.count} records" for _, found in self._families) or "none"
        raise KeyError(f"no record {number} of family {family!r}; the families are {known}")


class Recipes(Mapping[str, Recipe]):
    """How each parameter begins, by name; that of a family's record by the pattern of the template."""

    def __init__(self, own: Mapping[str, Recipe], families: Sequence[Family]) -> None:
        self._own, self._families = own, families

    def __getitem__(self, name: str) -> Recipe:
        if name in self._own:
            return self._own[name]
        for family in self._families:
            if family.number_of(name) is not None:
                return next(recipe for pattern, recipe in family.patterns if pattern.fullmatch(name))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
