"""Values that are given instead of made: a new store takes them as version 0, one record at a time.

A parameter whose values are given has no recipe. So a store whose import was cut short says so, and importing again
completes it; it can never pass for a whole one with random values in it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from weightstream.blocks import Unit
from weightstream.errors import StoreError
from weightstream.store.initial import generate_range
from weightstream.store.layout import TensorSpec
from weightstream.store.segments import RecordBuffer

if TYPE_CHECKING:
    from weightstream.store.store import Store


def unfilled(store: "Store") -> list[Unit]:
    """Units that have neither been written nor recipes for all their parameters."""
    return [
        unit
        for unit in store.units
        if store.versions.records[unit.index].newest.slot is None
        and any(parameter.name not in store.recipes for parameter in unit.parameters)
    ]


def fill(store: "Store", values: Mapping[str, Tensor]) -> None:
    """Write version 0 of every unfilled unit and publish them all in one commit.

    `values` is asked for one parameter at a time, each once, unit by unit; what it lacks begins by its recipe. Any
    floating-point dtype becomes fp32. One record is in memory beside one value.

    Raises:
        StoreError: a value is missing or of no parameter, or has another shape than its parameter.
    """
    known = {parameter.name for block in store.blocks for parameter in block.parameters}
    if unknown := sorted(values.keys() - known):
        raise StoreError(
            f"store '{store.path}': values are given for {len(unknown)} parameter(s) that the model does not have, "
            f"such as {unknown[0]!r}; give values of this model, those of a tied parameter under its first name"
        )
    units = unfilled(store)
    if not units:
        return
    missing = [
        parameter.name
        for unit in units
        for parameter in unit.parameters
        if parameter.name not in values and parameter.name not in store.recipes
    ]
    if missing:
        raise StoreError(
            f"store '{store.path}': its import was not completed, {len(missing)} parameter(s) have no values, such as "
            f"{missing[0]!r}; import again into it, or remove it"
        )
    buffer = RecordBuffer(max(store.layout(unit.index).image_nbytes for unit in units))
    value: Tensor | None = None  # of a tensor whose panels come one after another; else none is kept
    try:
        for unit in units:
            layout = store.layout(unit.index)
            buffer.bind(layout)
            for part in layout.parts:
                if part.name not in ("copy", "param"):
                    for state in buffer.tensors(part.name).values():
                        state.zero_()
            masters = buffer.tensors("param")
            for spec in layout.part("param").tensors:
                if spec.name in values:
                    if value is None:
                        value = values[spec.name]
                    _take(store, spec, value, masters[spec.name])
                    value = None if spec.last else value
                else:
                    _generate(store, spec, masters[spec.name])
            if layout.has("copy"):
                for name, copy in buffer.tensors("copy").items():
                    copy.copy_(masters[name])
            store.write(unit.index, buffer, 0, 0).result()
    finally:
        buffer.close()
    store.commit(0, {}).result()


def _take(store: "Store", spec: TensorSpec, value: Tensor, master: Tensor) -> None:
    if value.shape != spec.whole_shape or not value.is_floating_point():
        raise StoreError(
            f"store '{store.path}': parameter {spec.name!r} has shape {spec.whole_shape}, the values given are of shape "
            f"{tuple(value.shape)} in {value.dtype}; give values of the same model"
        )
    master.copy_((value if spec.rows is None else value[spec.row : spec.row + spec.shape[0]]).detach())


def _generate(store: "Store", spec: TensorSpec, master: Tensor) -> None:
    start = spec.first_element
    recipe = store.recipes[spec.name]
    generate_range(recipe, store.seed, spec.name, spec.whole_shape, start, start + master.numel(), master.view(-1))
