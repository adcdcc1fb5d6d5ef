"""Values that are given instead of made: a new store takes them as version 0, one record at a time.

A parameter whose values are given has no recipe. So a store whose import was cut short says so, and importing again
completes it; it can never pass for a whole one with random values in it. The same holds for a mask that is given; it comes
from the values (by magnitude, or where they are not zero), or from masks beside them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightstream.blocks import Unit
from weightstream.errors import StoreError
from weightstream.sparse.masks import magnitude_mask
from weightstream.store.initial import generate_range
from weightstream.store.layout import MASK, RecordLayout, TensorSpec
from weightstream.store.masks import bits_from, dense_of, grid_of, put_bits, random_bits, touched_bits
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import DENSE, SparsePiece, Sparsity

if TYPE_CHECKING:
    from weightstream.store.store import Store


Masks = Callable[[TensorSpec, Tensor], Tensor | None]
"""Which positions of a piece are kept, as bool, from where the piece lies in its tensor and its fp32 values; None where it
does not say."""


def masks_given(masks: Mapping[str, Tensor]) -> Masks:
    """By name, of the whole tensor; anything but zero is kept."""

    def of(spec: TensorSpec, values: Tensor) -> Tensor | None:
        mask = masks.get(spec.name)
        if mask is None:
            return None
        if mask.shape != spec.whole_shape:
            raise StoreError(
                f"mask of {spec.name!r}: expected shape {spec.whole_shape}, found {tuple(mask.shape)}; give the mask of that "
                "parameter"
            )
        return (mask if spec.rows is None else mask[spec.row : spec.row + values.shape[0]]) != 0

    return of


def masks_of_zeros(spec: TensorSpec, values: Tensor) -> Tensor:
    """Of a masked checkpoint: a block is kept if any of its values is not zero."""
    return dense_of(spec, touched_bits(spec, values != 0))


def masks_by_magnitude(density: Mapping[str, float]) -> Masks:
    """Of each piece this share of its blocks, rounded to the nearest count: those with the largest sums of magnitudes, the
    first of equal ones."""

    def of(spec: TensorSpec, values: Tensor) -> Tensor | None:
        if spec.name not in density:
            return None
        grid = grid_of(spec)
        return magnitude_mask(grid, round(density[spec.name] * grid.cells), values).dense(spec.piece_shape)

    return of


def unfilled(store: "Store") -> list[Unit]:
    """Units that have not been written, and have not for all their parameters recipes, and rules for their masks."""
    given = {name for name, mask in store.masks.items() if mask.rule == "given"}
    return [
        unit
        for unit in store.units
        if store.versions.records[unit.index].newest.slot is None
        and any(parameter.name not in store.recipes or parameter.name in given for parameter in unit.parameters)
    ]


def fill(store: "Store", values: Mapping[str, Tensor], masks: Masks | None = None) -> None:
    """Write version 0 of every unfilled unit and publish them all in one commit.

    `values` is asked for one parameter at a time, each once, unit by unit; what it lacks begins by its recipe. Any
    floating-point dtype becomes fp32. One record is in memory beside one value.

    Args:
        masks: of sparse parameters whose masks are given.

    Raises:
        StoreError: a value or a mask is missing or of no parameter, or has another shape than its parameter.
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
    dense_layouts = [store.layout_of(unit.index, DENSE) for unit in units]
    buffer = RecordBuffer(max(layout.image_nbytes for layout in dense_layouts))
    value: Tensor | None = None  # of a tensor whose panels come one after another; else none is kept
    try:
        for unit in units:
            kept: dict[str, Tensor] = {}
            layout = store.layout_of(unit.index, DENSE)
            varies = store.layouts.varies(unit.index)
            if not varies:
                buffer = _bound(buffer, layout)
            dense = {spec.name: torch.empty(spec.shape) for spec in layout.part("param").tensors if varies}
            dense = dense or buffer.tensors("param")
            for spec in layout.part("param").tensors:
                master = dense[spec.name]
                value = _begin(store, spec, values, value, master)
                mask = _mask(store, unit, spec, master, masks)
                if mask is not None:
                    kept[spec.name] = mask
            if varies:
                layout = store.layout_of(unit.index, _sparsity(store, unit, kept))
                buffer = _bound(buffer, layout)
            for part in layout.parts:
                if part.name not in ("copy", "param", MASK):
                    for state in buffer.tensors(part.name).values():
                        state.zero_()
            masters = buffer.tensors("param")
            for name, master in dense.items() if varies else ():
                masters[name].copy_(master[kept[name]].reshape(-1, 1) if name in kept else master)
            for spec in layout.part(MASK).tensors if kept else ():
                put_bits(spec, bits_from(spec, kept[spec.name]), buffer.tensors(MASK)[spec.name])
            if layout.has("copy"):
                for name, copy in buffer.tensors("copy").items():
                    copy.copy_(masters[name])
            store.write(unit.index, buffer, 0, 0).result()
    finally:
        buffer.close()
    store.commit(0, {}).result()


def first_values(
    store: "Store", values: Mapping[str, Tensor], names: Collection[str]
) -> Iterator[tuple[TensorSpec, Tensor]]:
    """The values that pieces of these parameters have before any mask, in order, as `fill` takes them; fp32, each in memory
    of its own."""
    value: Tensor | None = None
    for unit in store.units:
        for spec in store.layout_of(unit.index, DENSE).part("param").tensors:
            if spec.name in names:
                master = torch.empty(spec.shape)
                value = _begin(store, spec, values, value, master)
                yield spec, master


def _begin(
    store: "Store", spec: TensorSpec, values: Mapping[str, Tensor], value: Tensor | None, master: Tensor
) -> Tensor | None:
    """Puts the values of a piece into `master`: given ones, else by its recipe. `value` is that of a tensor whose panels
    come one after another, as this returned it for the panel before."""
    if spec.name not in values:
        _generate(store, spec, master)
        return None
    if value is None:
        value = values[spec.name]
    _take(store, spec, value, master)
    return None if spec.last else value


def _bound(buffer: RecordBuffer, layout: RecordLayout) -> RecordBuffer:
    """The buffer, or a larger one, bound to a layout."""
    if layout.image_nbytes > buffer.capacity_bytes:
        buffer.close()
        buffer = RecordBuffer(layout.image_nbytes)
    buffer.bind(layout)
    return buffer


def _mask(store: "Store", unit: Unit, spec: TensorSpec, master: Tensor, masks: Masks | None) -> Tensor | None:
    """Which positions of a piece are kept at first; None where all are."""
    rule = store.masks.get(spec.name)
    if rule is None or rule.rule == "dense":
        return None
    if rule.rule == "random":
        sparse = store.layouts.of(unit.index, store.layouts.initial(unit.index)).spec("param", spec.name)
        assert sparse is not None, "it has masters"
        return dense_of(sparse, random_bits(store.seed, sparse))
    piece = replace(spec, piece=SparsePiece(spec.name, 0, rule.block), dense_shape=spec.shape)
    found = masks(piece, master) if masks is not None else None
    if found is None:
        raise StoreError(
            f"store '{store.path}': parameter {spec.name!r} is sparse and its mask is to be given; say where it comes from: "
            "masks beside the values, their zeros, or their magnitude"
        )
    if found.shape != spec.shape or found.dtype != torch.bool:
        raise StoreError(
            f"store '{store.path}': mask of {spec.name!r}: expected bool of shape {spec.shape}, found {found.dtype} of shape "
            f"{tuple(found.shape)}; give the mask of that parameter"
        )
    try:
        bits_from(piece, found)
    except ValueError as error:
        raise StoreError(
            f"store '{store.path}': {error}; give a mask made for such blocks, or make the store with blocks of 1 x 1"
        ) from None
    return found


def _sparsity(store: "Store", unit: Unit, kept: Mapping[str, Tensor]) -> Sparsity:
    names = [parameter.name for parameter in unit.parameters if parameter.name in kept]
    return tuple(SparsePiece(name, int(kept[name].sum()), store.masks[name].block) for name in names)


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
