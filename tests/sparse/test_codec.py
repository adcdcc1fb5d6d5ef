"""Masks and non-zeros come back as they went, in as many bytes as counts alone say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstream.errors import ConfigError, DamagedRecordError
from weightstream.sparse.codec import Places, decode_mask, encode_mask, expand, gather, mask_form
from weightstream.sparse.grid import Grid
from weightstream.sparse.masks import Mask, given_mask, largest, random_keys, smallest


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    block = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (3, 2)]))
    grid = Grid.of((draw(st.integers(1, 40)) * block[0], draw(st.integers(1, 60)) * block[1]), block)
    density = draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    cells = generator.random(grid.cells) < density
    cells[draw(st.integers(0, grid.cells - 1))] = True
    return Mask(grid, cells)


@given(masks(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0, 1, 32]))
@settings(max_examples=150, deadline=None)
def test_what_is_written_comes_back(mask: Mask, dtype: torch.dtype, before: int) -> None:
    form, nbytes = mask_form(mask.grid.cells, mask.count)
    data = encode_mask(mask)
    assert data.nbytes == nbytes <= -(-mask.grid.cells // 8)
    assert (nbytes == 0) == (form == "full")
    assert decode_mask(mask.grid, mask.count, data) == mask

    places = Places.decoded(mask.grid, mask.count, data)
    assert torch.equal(places.segments, Places.of(mask).segments)
    assert places.segments.dtype == torch.int32
    values = torch.randn(mask.nonzeros, 1).to(dtype)
    shape = (mask.grid.rows, mask.grid.columns)
    slab = torch.full((before + mask.grid.elements + 32,), float("nan"), dtype=dtype)
    out = slab[before:-32].view(shape)
    expand(values, places, out)
    expected = torch.zeros(shape, dtype=dtype)
    expected[mask.dense(shape)] = values.view(-1)
    assert torch.equal(out, expected)
    assert slab[:before].isnan().all()
    assert slab[-32:].isnan().all()
    back = torch.empty_like(values)
    gather(out, places, back)
    assert torch.equal(back, values)


@pytest.mark.parametrize("most", [255, 65535])
def test_gaps_longer_than_a_number_holds(most: int) -> None:
    """Runs of missing cells of exactly one, two numbers' length, and one less and more."""
    places = np.cumsum([most - 1, most, most + 1, 2 * most, 2 * most + 1, 1]) + np.arange(6)
    grid = Grid.of((1, int(places[-1]) + 3 * most))
    cells = np.zeros(grid.cells, np.bool_)
    cells[places] = True
    mask = Mask(grid, cells)
    assert mask_form(grid.cells, mask.count)[0].startswith("gaps")
    assert decode_mask(grid, 6, encode_mask(mask)) == mask
    assert np.array_equal(Places.decoded(grid, 6, encode_mask(mask)).segments, places)


def test_damaged_masks_are_refused() -> None:
    mask = Mask(Grid.of((10, 100)), np.arange(1000) % 3 == 0)
    data = encode_mask(mask)
    with pytest.raises(DamagedRecordError, match="expected 125 bytes"):
        decode_mask(mask.grid, mask.count, data[:-1])
    data[5] ^= 1
    beyond = Mask(Grid.of((10, 100)), np.arange(1000) % 20 == 19)
    gaps = encode_mask(beyond)
    gaps[0] += 1
    for grid, count, damaged, message in (
        (mask.grid, mask.count, data, "cells that exist"), (beyond.grid, beyond.count, gaps, "beyond the last"),
        (beyond.grid, beyond.count, np.full_like(gaps, 255), "cells that exist, found 0"),
    ):  # fmt: skip
        with pytest.raises(DamagedRecordError, match=message):
            decode_mask(grid, count, damaged)
        with pytest.raises(DamagedRecordError, match=message):
            Places.decoded(grid, count, damaged)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_of_equal_keys_the_lower_index_wins(numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(numbers)))
    keys = np.array(numbers, np.uint32)
    order = sorted(range(len(numbers)), key=lambda index: (numbers[index], index))
    assert set(np.flatnonzero(smallest(keys, count))) == set(order[:count])
    order = sorted(range(len(numbers)), key=lambda index: (-numbers[index], index))
    assert set(np.flatnonzero(largest(keys, count))) == set(order[:count])


def test_random_keys_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = random_keys(3, "a.weight", 7, 0, 1000)
    parts = [random_keys(3, "a.weight", 7, start, 125) for start in range(0, 1000, 125)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, random_keys(3, "a.weight", 8, 0, 1000))


def test_blocks_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks of 4×4 do not divide 10×8"):
        Grid.of((10, 8), (4, 4), name="w")
    with pytest.raises(ConfigError, match="do not divide 6×8"):
        Grid.of((2, 6, 8), (4, 4), name="experts")  # 12 rows in all, but a block would reach into the next matrix
    grid = Grid.of((4, 4), (2, 2))
    with pytest.raises(ConfigError, match=r"expected shape \(4, 4\), found \(4, 5\)"):
        given_mask(grid, torch.ones(4, 5), (4, 4), name="w")
    partly = torch.zeros(4, 4)
    partly[2, 3] = 1
    with pytest.raises(ConfigError, match="block row 1, block column 1 is kept in part"):
        given_mask(grid, partly, (4, 4), name="w")
