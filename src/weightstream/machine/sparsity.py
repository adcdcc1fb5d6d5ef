"""How sparse products compare with the dense one: forward and both gradients of one layer, by density.

The dense side is the product alone, on a weight that lies there whole; what expanding non-zeros and gathering gradients
would cost it is left out. A kernel's side finds out anew where its non-zeros are at each fetch, as a worker does that has no
room to keep this, and computes nothing meanwhile. So a kernel that wins here wins there too. What it takes where that is
kept, or found beside other work, is measured apart, for predictions.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightstream.engine.multiplying import AutoKernels
from weightstream.machine.kernels import Call, in_turn, name_of, seconds, significant
from weightstream.machine.profile import DEFAULT_PATH, load_profile
from weightstream.sparse.choosing import Curve
from weightstream.sparse.codec import decode_cells, encode_mask
from weightstream.sparse.grid import Grid
from weightstream.sparse.kernels import Kernel, multiply, prepare, supports
from weightstream.sparse.masks import Mask
from weightstream.sparse.structure import Structure

SHAPE = (1024, 1024)
TOKENS = (128, 512)
DENSITIES = (0.01, 0.03, 0.1, 0.2, 0.4)
# `bsr` on a CPU is `gathered` with a slower forward: benchmarks/sparse_kernels.py has its curve
MEASURED: tuple[tuple[Kernel, tuple[int, int]], ...] = (
    ("native", (16, 16)), ("native", (32, 32)), ("native", (1, 1)), ("gathered", (32, 32)), ("csr", (1, 1)),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)
_LOST = 0.5  # a kernel that is so much slower is not measured at higher densities
_COPIES = 4  # weights take turns: no layer finds its own in the cache


def structure(
    shape: tuple[int, int], block: tuple[int, int], density: float, *, seed: int = 0, device: str = "cpu"
) -> Structure:
    """Blocks at random, as many as the density says, at least one."""
    grid = (shape[0] // block[0], shape[1] // block[1])
    total = grid[0] * grid[1]
    kept = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    kept[order[: max(1, round(density * total))]] = True
    return Structure(kept.view(grid), block, device)


def dense_layer(shape: tuple[int, int], dtype: torch.dtype, tokens: int, *, device: str = "cpu") -> Call:
    """Forward and both gradients of y = x Wᵀ."""

    def make() -> Call:
        weight = torch.randn(shape, device=device).to(dtype).requires_grad_()
        x, grad = _operands(shape, dtype, tokens, device)
        return lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad)

    return in_turn([make() for _ in range(_COPIES)], _COPIES)


def sparse_layer(
    kernel: Kernel, structures: list[Structure], dtype: torch.dtype, tokens: int, *, fetched: bool = False
) -> Call:
    """The same of W at its non-zeros. What is prepared once per mask is prepared; `fetched`: in each call it is found from the
    mask's bytes, for forward and for backward, as wherever a block is fetched for both."""

    def make(one: Structure) -> Call:
        mask = Mask(Grid(*one.shape, one.block), one.kept().view(-1).numpy())
        data, count = encode_mask(mask), mask.count

        def found() -> Structure:
            cells = torch.from_numpy(decode_cells(mask.grid, count, data))
            there = Structure.at(cells, one.shape, one.block, one.device)
            prepare(there, kernel)
            return there

        values = torch.randn(one.nnz, 1, device=one.device).to(dtype).requires_grad_()
        x, grad = _operands(one.shape, dtype, tokens, str(one.device))

        def call() -> object:
            y = multiply(x, values, None, found() if fetched else one, kernel)
            if fetched:  # again, for as little a product as there is
                multiply(x[:1], values.detach(), None, found(), kernel)
            return torch.autograd.grad(y, (x, values), grad)

        return call

    calls = [make(one) for one in structures]
    for call in calls:
        call()
    return in_turn(calls, len(calls))


def _operands(shape: tuple[int, int], dtype: torch.dtype, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, shape[1], device=device).to(dtype).requires_grad_()
    return x, torch.randn(tokens, shape[0], device=device).to(dtype)


def curves(
    threads: int,
    *,
    shape: tuple[int, int] = SHAPE,
    all_tokens: tuple[int, ...] = TOKENS,
    densities: tuple[float, ...] = DENSITIES,
    repeats: int = 3,
) -> Iterator[Curve]:
    """On the CPU, with the threads that are set."""
    for kernel, block in MEASURED:
        patterns = [[structure(shape, block, density, seed=seed) for seed in range(2)] for density in densities]
        for dtype in DTYPES:
            if not supports(kernel, block, dtype, torch.device("cpu")):
                continue
            for tokens in all_tokens:
                dense_s = seconds(dense_layer(shape, dtype, tokens), repeats=repeats)
                speedups: list[float] = []
                prepared: list[float] = []
                for both in patterns:
                    taken_s = seconds(sparse_layer(kernel, both, dtype, tokens, fetched=True), repeats=repeats)
                    speedups.append(significant(dense_s / taken_s))
                    if kernel == "native":
                        taken_s = seconds(sparse_layer(kernel, both, dtype, tokens), repeats=repeats)
                        prepared.append(significant(dense_s / taken_s))
                    if speedups[-1] < _LOST:
                        break
                yield Curve(
                    kernel=kernel, dtype=name_of(dtype), block=block, tokens=tokens, threads=threads,
                    densities=densities[: len(speedups)], speedups=tuple(speedups), prepared_speedups=tuple(prepared),
                )  # fmt: skip


def auto_kernels(
    *, tokens: int, profile: Path | None = None, warn: Callable[[str], None] = lambda text: None
) -> AutoKernels:
    """For `Engine(kernels=...)`: each sparse parameter by the kernel that this machine was measured to be fastest with.

    Args:
        tokens: of one micro-batch.
        profile: what `weightstream calibrate` wrote; by default where it does so. None there, or one from before such
            products were measured: all is expanded and multiplied densely.
        warn: told where the profile is of another machine.

    Raises (when a store is made):
        ConfigError: the profile cannot be read.
    """
    path = (profile or DEFAULT_PATH).expanduser()

    def found() -> Sequence[Curve]:
        return load_profile(path, warn).sparse if path.exists() else ()

    return AutoKernels(tokens=tokens, curves=found)


__all__ = ["DENSITIES", "auto_kernels", "curves", "dense_layer", "sparse_layer", "structure"]
