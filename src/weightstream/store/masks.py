"""Masks as bits, and what follows from them: where non-zeros lie, dense tensors, random choices.

A mask has one bit for each block of a piece (`sparsity.py`), row by row of blocks. As a bitmap eight are one byte, the
first in the lowest bit; as indices the kept blocks' numbers are int32, in order. Values are kept in row-major order of
the dense positions, whatever the blocks.
"""

from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightstream.store.layout import TensorSpec
from weightstream.store.random_numbers import BLOCK_ELEMENTS, Words
from weightstream.store.sparsity import cells_of, form_of

Bits = NDArray[np.bool_]

_SELECTIONS_KEPT = 16


def bits_of(spec: TensorSpec, mask: Tensor) -> Bits:
    """One bit for each block, from the mask's tensor in its record.

    Raises:
        ValueError: it has not the number of ones that its version has, or indices that are out of order or range.
    """
    piece, shape = spec.sparse
    cells, raw = cells_of(shape, piece.block), mask.numpy()
    if form_of(shape, piece) == "bitmap":
        every = np.unpackbits(raw, bitorder="little").view(np.bool_)
        bits, beyond = every[:cells], int(every[cells:].sum())
    else:
        if raw.size and (raw[0] < 0 or raw[-1] >= cells or bool((np.diff(raw) <= 0).any())):
            raise ValueError(f"expected indices in order from 0 to {cells - 1}, found others")
        bits, beyond = np.zeros(cells, dtype=np.bool_), 0
        bits[raw] = True
    ones = int(np.count_nonzero(bits))
    if ones != piece.ones or beyond:
        raise ValueError(f"expected {piece.ones} ones among {cells} bits, found {ones}, and {beyond} behind the last")
    return bits


def put_bits(spec: TensorSpec, bits: Bits, mask: Tensor) -> None:
    """The reverse: write a mask to its tensor in a record."""
    piece, shape = spec.sparse
    ones = int(np.count_nonzero(bits))
    if bits.size != cells_of(shape, piece.block) or ones != piece.ones:
        raise ValueError(
            f"mask of {spec.name!r}: expected {cells_of(shape, piece.block)} bits with {piece.ones} ones, found "
            f"{bits.size} with {ones}"
        )
    if form_of(shape, piece) == "bitmap":
        mask.numpy()[:] = np.packbits(bits, bitorder="little")
    else:
        mask.numpy()[:] = np.flatnonzero(bits)


def dense_of(spec: TensorSpec, bits: Bits) -> Tensor:
    """Which positions of the piece are kept: a bool tensor of its dense shape."""
    piece, shape = spec.sparse
    high, wide = piece.block
    if (high, wide) == (1, 1):
        return torch.from_numpy(bits).reshape(shape)
    grid = bits.reshape(shape[0] // high, -1)
    return torch.from_numpy(np.repeat(np.repeat(grid, high, axis=0), wide, axis=1)).reshape(shape)


def bits_from(spec: TensorSpec, dense: Tensor) -> Bits:
    """The bits of a dense bool mask of the piece's shape.

    Raises:
        ValueError: a block is kept in part.
    """
    piece, shape = spec.sparse
    high, wide = piece.block
    flat: Bits = dense.detach().reshape(-1).numpy()
    if (high, wide) == (1, 1):
        return flat
    blocks = flat.reshape(shape[0] // high, high, -1, wide)
    kept: Bits = np.any(blocks, axis=(1, 3))
    if not np.array_equal(kept, blocks.all(axis=(1, 3))):
        raise ValueError(
            f"mask of {spec.name!r}: expected blocks of {high} x {wide} kept or dropped whole, found one in part"
        )
    return kept.reshape(-1)


def expanded(values: Tensor, dense_mask: Tensor) -> Tensor:
    """Values at the kept positions, zeros elsewhere."""
    found = torch.zeros(dense_mask.shape, dtype=values.dtype)
    found[dense_mask] = values.reshape(-1)
    return found


def random_bits(seed: int, spec: TensorSpec) -> Bits:
    """The mask of a piece that begins at random; see `_random_bits`."""
    piece, shape = spec.sparse
    first = spec.first_element // prod(piece.block)
    packed = _random_bits(seed, spec.name, first, cells_of(shape, piece.block), piece.ones)
    return np.unpackbits(packed, count=cells_of(shape, piece.block), bitorder="little").view(np.bool_)


@lru_cache(_SELECTIONS_KEPT)  # a record's parts are made one by one, each needs it
def _random_bits(seed: int, name: str, first: int, cells: int, ones: int) -> NDArray[np.uint8]:
    """The blocks from `first` on with the smallest random numbers of (seed, name, index), the lower index first of equal
    ones; packed."""
    skipped = first % BLOCK_ELEMENTS
    words = Words(seed, f"{name}\0mask", 0).take(first - skipped, skipped + cells)[skipped:]
    bits = np.zeros(cells, dtype=np.bool_)
    if ones:
        last = np.partition(words, ones - 1)[ones - 1]
        bits[words < last] = True
        missing = ones - int(np.count_nonzero(bits))
        bits[np.flatnonzero(words == last)[:missing]] = True
    return np.packbits(bits, bitorder="little")
