"""How fast non-zeros go to their places and back, and how fast these are found: what a sparse block costs beside its bytes."""

from functools import partial

import numpy as np
import torch

from weightstream.machine.kernels import Call, in_turn, seconds, significant
from weightstream.machine.profile import CodecRates
from weightstream.sparse.codec import Places, decoding_steps, encode_mask, expand, gather
from weightstream.sparse.grid import Grid
from weightstream.sparse.kernels import prepare, supports
from weightstream.sparse.masks import Mask
from weightstream.sparse.structure import Structure

WIDTHS = (1, 32)
_DENSITY = 0.1
_COLUMNS = 1024
_COPIES = 3  # tensors take turns: none finds its own in the cache


def codec_rates(elements: int) -> CodecRates:
    """Measured on tensors of about so many elements, at a density of a tenth."""
    rows = max(1, elements // _COLUMNS)
    dense = [torch.zeros(rows, _COLUMNS, dtype=torch.bfloat16) for _ in range(_COPIES)]
    clear_s = seconds(in_turn([partial(one.zero_) for one in dense], 1))
    expanding, gathering = {}, {}
    for width in WIDTHS:
        masks = [_mask(rows, width, seed) for seed in range(_COPIES)]
        places = [Places.of(mask) for mask in masks]
        values = [torch.ones(one.nonzeros, 1, dtype=torch.bfloat16) for one in places]
        nonzeros = sum(one.nonzeros for one in places) / _COPIES
        calls: list[Call] = [partial(expand, *each) for each in zip(values, places, dense, strict=True)]
        taken_s = seconds(in_turn(calls, 1))
        # what is left of a difference of two times is not allowed to vanish in their noise
        expanding[width] = significant(max(taken_s - clear_s, taken_s / 10) / nonzeros)
        calls = [partial(gather, *each) for each in zip(dense, places, values, strict=True)]
        gathering[width] = significant(seconds(in_turn(calls, 1)) / nonzeros)
    mask = _mask(rows, 1, 0)
    data = encode_mask(mask)
    found = seconds(lambda: Places.decoded(mask.grid, mask.count, data))
    return CodecRates(
        clear_bytes_per_s=significant(2 * rows * _COLUMNS / clear_s), expand_s=expanding, gather_s=gathering,
        decode_s=significant(found / decoding_steps(mask.grid.cells, mask.count)), prepare_s=_prepare_s(mask),
    )  # fmt: skip


def _prepare_s(mask: Mask) -> float | None:
    """Seconds of finding what the compiled kernel asks, for each non-zero."""
    if not supports("native", mask.grid.block, torch.float32, torch.device("cpu")):
        return None
    positions = torch.from_numpy(np.flatnonzero(mask.cells).astype(np.int32))
    shape = mask.grid.rows, mask.grid.columns
    taken_s = seconds(lambda: prepare(Structure.at(positions, shape, mask.grid.block), "native"))
    return significant(taken_s / mask.nonzeros)


def _mask(rows: int, width: int, seed: int) -> Mask:
    grid = Grid(rows, _COLUMNS, (1, width))
    cells = torch.rand(grid.cells, generator=torch.Generator().manual_seed(seed)) < _DENSITY
    cells[0] = True
    return Mask(grid, cells.numpy())


__all__ = ["WIDTHS", "codec_rates"]
