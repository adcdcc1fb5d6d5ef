"""Products with non-zeros only, against exact ones in fp64 of the masked dense matrix."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.sparse.exact import DTYPES, check, sides

from weightstream.errors import ConfigError
from weightstream.sparse.kernels import KERNELS, Kernel, multiply, supports
from weightstream.sparse.structure import Structure

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS), dtype=st.sampled_from(DTYPES), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.sampled_from([(1, 1), (2, 2), (4, 4), (2, 8), (32, 32)]), tokens=st.integers(0, 9),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_pattern(
    kernel: Kernel,
    dtype: torch.dtype,
    grid: tuple[int, int],
    block: tuple[int, int],
    tokens: int,
    density: float,
    seed: int,
) -> None:
    """Rows and columns without any block, full ones, all counts between; and an expert that got no token."""
    if not supports(kernel, block, dtype, CPU):
        block = (4, 4)
    if not supports(kernel, block, dtype, CPU):
        dtype = torch.float32
    assume(supports(kernel, block, dtype, CPU))
    kept = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    check(Structure(kept, block), kernel, tokens, dtype, seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer(kernel: Kernel, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough that products are split among threads, and what is gathered is gathered in portions."""
    if not supports(kernel, (32, 32), dtype, torch.device(device)):
        pytest.skip(f"no {kernel} for {dtype} on {device}")
    monkeypatch.setattr("weightstream.sparse.kernels._GATHERED_BYTES", 1 << 17)
    kept = torch.rand(12, 20, generator=torch.Generator().manual_seed(1)) < 0.2
    check(Structure(kept, (32, 32), device), kernel, 130, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_threads_or_runs(kernel: Kernel, dtype: torch.dtype) -> None:
    if not supports(kernel, (32, 32), dtype, CPU):
        pytest.skip(f"no {kernel} for {dtype}")
    kept = torch.rand(16, 16, generator=torch.Generator().manual_seed(2)) < 0.15
    structure = Structure(kept, (32, 32))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(sides(structure, kernel, 256, dtype)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][what], other[what]) for what in found[0])


def test_bias_leading_dimensions_and_what_needs_no_gradient() -> None:
    structure = Structure(torch.tensor([[True, False], [True, True]]), (2, 2))
    values = torch.arange(12.0).view(-1, 1)
    dense = torch.zeros(4, 4)
    dense[structure.mask()] = values.view(-1)
    x, bias = torch.randn(2, 3, 4), torch.randn(4, requires_grad=True)
    y = multiply(x, values, bias, structure, "gathered")
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 6.0))
    assert values.grad is None


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_is_never_lost(kernel: Kernel, block: tuple[int, int], found: float) -> None:
    """Also not in a column without a non-zero, or in the gradient of a row without one: as in a dense product."""
    if not supports(kernel, block, torch.float32, CPU):
        pytest.skip(f"no {kernel} for {block}")
    structure = Structure(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool), block)
    values = torch.ones(structure.nnz, 1, requires_grad=True)
    weight = structure.mask().float()
    for column in range(0, structure.shape[1], block[1]):
        x = torch.ones(4, structure.shape[1])
        x[2, column] = found
        y = multiply(x, values, None, structure, kernel)
        dense = x @ weight.t()
        assert torch.equal(y[[0, 1, 3]], dense[[0, 1, 3]])
        assert y[2].isnan().all() if column == block[1] else not y[2].isfinite().all()
    for row in range(0, structure.shape[0], block[0]):
        x = torch.ones(4, structure.shape[1], requires_grad=True)
        grad = torch.ones(4, structure.shape[0])
        grad[1, row] = found
        (of_x,) = torch.autograd.grad(multiply(x, values, None, structure, kernel), x, grad)
        dense = grad @ weight
        assert torch.equal(of_x[[0, 2, 3]], dense[[0, 2, 3]])
        assert of_x[1].isnan().all() if row == block[0] else not of_x[1].isfinite().all()


def test_masks_as_numbers_are_the_same() -> None:
    kept = torch.rand(6, 5) < 0.5
    by_number = Structure.at(kept.view(-1).nonzero().view(-1), (24, 10), (4, 2))
    assert torch.equal(by_number.mask(), Structure(kept, (4, 2)).mask())
    assert (by_number.count, by_number.nnz) == (int(kept.sum()), 8 * int(kept.sum()))


def test_what_does_not_fit_is_refused() -> None:
    structure = Structure(torch.ones(2, 2, dtype=torch.bool), (2, 2))
    with pytest.raises(ConfigError, match="expected x of .*, 4. and 16 values .*found x .*3.*15 values"):
        multiply(torch.ones(2, 3), torch.ones(15, 1), None, structure, "gathered")
    with pytest.raises(ConfigError, match="no product of torch.bfloat16 with blocks of 2×2"):
        multiply(torch.ones(2, 4).bfloat16(), torch.ones(16, 1).bfloat16(), None, structure, "bsr")
    with pytest.raises(ConfigError, match="do not divide"):
        Structure.at(torch.tensor([0]), (5, 4), (2, 2))
    with pytest.raises(ConfigError, match="expected numbers of 0 to 3, found 4 to 4"):
        Structure.at(torch.tensor([4]), (4, 4), (2, 2))
    with pytest.raises(ConfigError, match="expected one bool per block"):
        Structure(torch.ones(2, 2), (2, 2))
