"""Masks in records, and what follows from them: where non-zeros lie, dense tensors, how masks begin.

A mask has one bit for each cell of a piece (`sparse.grid`), written as its counts say (`sparse.codec`). Values are kept in
row-major order of the dense positions, whatever the blocks.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.sparse.codec import Indices, Places, decode_cells, decode_mask, encode_mask
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Bools, Mask, random_mask, some_and_every
from weightstream.store.layout import TensorSpec

_SELECTIONS_KEPT = 16


def grid_of(spec: TensorSpec) -> Grid:
    """The cells of a sparse piece."""
    piece, shape = spec.sparse
    return Grid.of(shape, piece.block, name=spec.name)


def bits_of(spec: TensorSpec, mask: Tensor) -> Bools:
    """One bit for each cell, from the mask's tensor in its record.

    Raises:
        DamagedRecordError: it is no mask with the number of ones that its version has.
    """
    return mask_of(spec, mask).cells


def mask_of(spec: TensorSpec, mask: Tensor) -> Mask:
    """The mask that a record has, from its tensor there.

    Raises:
        DamagedRecordError: it is no mask with the number of ones that its version has.
    """
    return decode_mask(grid_of(spec), spec.sparse[0].ones, mask.numpy())


def places_of(spec: TensorSpec, mask: Tensor) -> Places:
    """Where the non-zeros of a sparse piece are, from the mask's tensor in its record.

    Raises:
        DamagedRecordError: it is no mask with the number of ones that its version has.
    """
    return Places.decoded(grid_of(spec), spec.sparse[0].ones, mask.numpy())


def cells_of(spec: TensorSpec, mask: Tensor) -> Indices:
    """The numbers of the cells of a sparse piece that exist, in order, from the mask's tensor in its record.

    Raises:
        DamagedRecordError: it is no mask with the number of ones that its version has.
    """
    return decode_cells(grid_of(spec), spec.sparse[0].ones, mask.numpy())


def put_bits(spec: TensorSpec, bits: Bools, mask: Tensor) -> None:
    """The reverse: write a mask to its tensor in a record."""
    ones = int(np.count_nonzero(bits))
    if bits.size != grid_of(spec).cells or ones != spec.sparse[0].ones:
        raise ValueError(
            f"mask of {spec.name!r}: expected {grid_of(spec).cells} bits with {spec.sparse[0].ones} ones, found "
            f"{bits.size} with {ones}"
        )
    mask.numpy()[:] = encode_mask(Mask(grid_of(spec), bits))


def dense_of(spec: TensorSpec, bits: Bools) -> Tensor:
    """Which positions of the piece are kept: a bool tensor of its dense shape."""
    return Mask(grid_of(spec), bits).dense(spec.piece_shape)


def touched_bits(spec: TensorSpec, dense: Tensor) -> Bools:
    """The cells of which any position is set in a dense bool tensor of the piece's shape."""
    some, _ = some_and_every(grid_of(spec), dense)
    return some.reshape(-1)


def bits_from(spec: TensorSpec, dense: Tensor) -> Bools:
    """The bits of a dense bool mask of the piece's shape.

    Raises:
        ValueError: a block is kept in part.
    """
    some, every = some_and_every(grid_of(spec), dense)
    if (some != every).any():
        high, wide = spec.sparse[0].block
        raise ValueError(
            f"mask of {spec.name!r}: expected blocks of {high} x {wide} kept or dropped whole, found one in part"
        )
    return some.reshape(-1)


def expanded(values: Tensor, dense_mask: Tensor) -> Tensor:
    """Values at the kept positions, zeros elsewhere."""
    found = torch.zeros(dense_mask.shape, dtype=values.dtype)
    found[dense_mask] = values.reshape(-1)
    return found


def random_bits(seed: int, spec: TensorSpec) -> Bools:
    """The mask of a piece that begins at random: its cells are numbered as those of the whole tensor."""
    grid = grid_of(spec)
    packed = _random_bits(seed, spec.name, grid, spec.first_element // grid.cell_elements, spec.sparse[0].ones)
    return np.unpackbits(packed, count=grid.cells, bitorder="little").view(np.bool_)


@lru_cache(_SELECTIONS_KEPT)  # a record's parts are made one by one, and each needs it
def _random_bits(seed: int, name: str, grid: Grid, first: int, ones: int) -> NDArray[np.uint8]:
    return np.packbits(random_mask(grid, ones, seed=seed, name=name, first_cell=first).cells, bitorder="little")
