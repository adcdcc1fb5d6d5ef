"""Products with non-zeros by a kernel, held against exact ones in fp64 of the masked dense matrix."""

import torch
from torch import Tensor

from weightstream.sparse.kernels import Kernel, multiply
from weightstream.sparse.structure import Structure

DTYPES = (torch.float32, torch.bfloat16)


def bound(one: Tensor, other: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What kernels.py states: γ(n) Σ|terms| + u |result|, for the product one @ other in fp64."""
    n = one.shape[-1]
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    terms = one.abs() @ other.abs()
    return gamma * terms + rounding * (exact.abs() + gamma * terms)


def sides(
    structure: Structure, kernel: Kernel, tokens: int, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Forward and gradients by a kernel; and as fp64 factors, whose product is exact to what is compared."""
    generator = torch.Generator().manual_seed(seed)
    mask, device = structure.mask(), structure.device
    weight = torch.randn(structure.shape, generator=generator).to(dtype)
    x = torch.randn(tokens, structure.shape[1], generator=generator).to(dtype)
    grad = torch.randn(tokens, structure.shape[0], generator=generator).to(dtype)
    values = weight[mask].view(-1, 1).to(device).requires_grad_()
    here = x.to(device).requires_grad_()
    y = multiply(here, values, None, structure, kernel)
    y.backward(grad.to(device))
    assert here.grad is not None
    assert values.grad is not None
    assert values.grad.shape == values.shape
    found = {"y": y.detach().cpu(), "x": here.grad.cpu(), "w": values.grad.view(-1).cpu()}
    dense = (weight * mask).double()
    return found, {"y": (x.double(), dense.t()), "x": (grad.double(), dense), "w": (grad.double().t(), x.double())}


def check(structure: Structure, kernel: Kernel, tokens: int, dtype: torch.dtype, seed: int = 0) -> None:
    found, factors = sides(structure, kernel, tokens, dtype, seed)
    for what, (one, other) in factors.items():
        exact = one @ other
        most = bound(one, other, exact, dtype)
        if what == "w":
            exact, most = exact[structure.mask()], most[structure.mask()]
        assert found[what].dtype == dtype
        assert found[what].shape == exact.shape
        assert ((found[what].double() - exact).abs() <= most).all(), f"{kernel} {what} {dtype}"
