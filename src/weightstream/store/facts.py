"""Blocks and their units as rows of the manifest: what of a model a store keeps, as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightstream.blocks import Block, Parameter, Unit
from weightstream.store.recipes import Recipe
from weightstream.store.sparsity import InitialMask

Row = tuple[int, str, dict[str, Any]]
"""Index, name and facts of a block."""

SPARSE = "sparse"
"""Among the facts of a block that has sparse parameters: how each one's mask begins."""


def block_rows(
    blocks: Sequence[Block],
    units: Sequence[Unit],
    recipes: Mapping[str, Recipe],
    masks: Mapping[str, InitialMask] | None = None,
) -> list[Row]:
    """A row for each block. How it is cut is written down, so that a store stays as it is if the rule changes."""
    masks = masks or {}
    members: list[list[Unit]] = [[] for _ in blocks]
    for unit in units:
        members[unit.block].append(unit)
    return [
        (
            block.index,
            block.name,
            {
                "parameters": [
                    {"name": parameter.name, "shape": list(parameter.shape), "trainable": parameter.trainable}
                    for parameter in block.parameters
                ],
                "units": [
                    {"name": unit.name, "parameters": [_piece(parameter) for parameter in unit.parameters]}
                    for unit in members[block.index]
                ],
                "modules": list(block.modules),
                "resident": block.resident,
                "recipes": {
                    parameter.name: recipes[parameter.name].to_json()
                    for parameter in block.parameters
                    if parameter.name in recipes
                },
                **_sparse(block, masks),
            },
        )
        for block in blocks
    ]


def masks_of(rows: Sequence[Row]) -> dict[str, InitialMask]:
    """How the masks of sparse parameters begin; none in a store that has only dense ones."""
    return {name: InitialMask.from_json(mask) for _, _, facts in rows for name, mask in facts.get(SPARSE, {}).items()}


def blocks_of(rows: Sequence[Row]) -> tuple[Block, ...]:
    """The blocks that rows of the manifest describe."""
    return tuple(
        Block(index, name, tuple(_parameters(facts).values()), tuple(facts["modules"]), facts["resident"])
        for index, name, facts in rows
    )


def units_of(rows: Sequence[Row]) -> tuple[Unit, ...]:
    """The units of these blocks, in order."""
    units: list[Unit] = []
    for index, _, facts in rows:
        whole = _parameters(facts)
        for unit in facts["units"]:
            parameters = tuple(_of_piece(whole, *piece) for piece in unit["parameters"])
            units.append(Unit(len(units), index, unit["name"], parameters))
    return tuple(units)


def _sparse(block: Block, masks: Mapping[str, InitialMask]) -> dict[str, Any]:
    found = {p.name: masks[p.name].to_json() for p in block.parameters if p.name in masks}
    return {SPARSE: found} if found else {}


def _parameters(facts: Mapping[str, Any]) -> dict[str, Parameter]:
    return {
        fact["name"]: Parameter(fact["name"], tuple(fact["shape"]), fact["trainable"]) for fact in facts["parameters"]
    }


def _piece(parameter: Parameter) -> list[Any]:
    """The name of a whole tensor; with first row and rows, of a panel."""
    return [parameter.name] if parameter.rows is None else [parameter.name, parameter.row, parameter.shape[0]]


def _of_piece(whole: Mapping[str, Parameter], name: str, row: int | None = None, height: int = 0) -> Parameter:
    found = whole[name]
    if row is None:
        return found
    return replace(found, shape=(height, *found.shape[1:]), row=row, rows=found.shape[0])
