"""Values that are given instead of made: a new store takes them as version 0, one record at a time.

A parameter whose values are given has no recipe. So a store whose import was cut short says so, and importing again
completes it; it can never pass for a whole one with random values in it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from weightstream.blocks import Block
from weightstream.errors import StoreError
from weightstream.store.initial import generate
from weightstream.store.segments import RecordBuffer

if TYPE_CHECKING:
    from weightstream.store.store import Store


def unfilled(store: "Store") -> list[Block]:
    """Blocks that have neither been written nor recipes for all their parameters."""
    return [
        block
        for block in store.blocks
        if store.versions.records[block.index].newest.slot is None
        and any(parameter.name not in store.recipes for parameter in block.parameters)
    ]


def fill(store: "Store", values: Mapping[str, Tensor]) -> None:
    """Write version 0 of every unfilled block and publish them all in one commit.

    `values` is asked for one parameter at a time, each once, block by block; what it lacks begins by its recipe. Any
    floating-point dtype becomes fp32. One record is in memory.

    Raises:
        StoreError: a value is missing or of no parameter, or has another shape than its parameter.
    """
    known = {parameter.name for block in store.blocks for parameter in block.parameters}
    if unknown := sorted(values.keys() - known):
        raise StoreError(
            f"store '{store.path}': values are given for {len(unknown)} parameter(s) that the model does not have, "
            f"such as {unknown[0]!r}; give values of this model, those of a tied parameter under its first name"
        )
    blocks = unfilled(store)
    if not blocks:
        return
    missing = [
        parameter.name
        for block in blocks
        for parameter in block.parameters
        if parameter.name not in values and parameter.name not in store.recipes
    ]
    if missing:
        raise StoreError(
            f"store '{store.path}': its import was not completed, {len(missing)} parameter(s) have no values, such as "
            f"{missing[0]!r}; import again into it, or remove it"
        )
    buffer = RecordBuffer(max(store.layout(block.index).image_nbytes for block in blocks))
    try:
        for block in blocks:
            layout = store.layout(block.index)
            buffer.bind(layout)
            for part in layout.parts:
                if part.name not in ("copy", "param"):
                    for state in buffer.tensors(part.name).values():
                        state.zero_()
            for name, master in buffer.tensors("param").items():
                if name in values:
                    _take(store, name, values[name], master)
                else:
                    generate(store.recipes[name], seed=store.seed, name=name, shape=master.shape, out=master)
            if layout.has("copy"):
                for name, copy in buffer.tensors("copy").items():
                    copy.copy_(buffer.tensors("param")[name])
            store.write(block.index, buffer, 0, 0).result()
    finally:
        buffer.close()
    store.commit(0, {}).result()


def _take(store: "Store", name: str, value: Tensor, master: Tensor) -> None:
    if value.shape != master.shape or not value.is_floating_point():
        raise StoreError(
            f"store '{store.path}': parameter {name!r} has shape {tuple(master.shape)}, the values given are of shape "
            f"{tuple(value.shape)} in {value.dtype}; give values of the same model"
        )
    master.copy_(value.detach())
