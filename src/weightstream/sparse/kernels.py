"""y = x Wᵀ where only non-zeros of W exist: forward, the input's gradient, and the weight's gradient at non-zeros only.

Four kernels, all for fp32 and bf16; a dense W is formed by none of them:

- `native`: compiled on the machine that runs it, on a CPU, for blocks and single elements; nothing is gathered.
- `gathered`: rows of blocks that have equally many blocks are one batched product of their values with the gathered part
  of x. The input's gradient does the same by columns of blocks, the weight's for each row with the tokens as the sum.
- `bsr`: PyTorch's block-sparse product (MKL on a CPU, fp32 only; Triton on a GPU, bf16 only, since its fp32 is TF32);
  the weight's gradient is that of `gathered`.
- `csr`: for single elements on a CPU, PyTorch's compressed rows (MKL), computed in fp32.

Order of sums: every element of a result is one dot product over non-zeros in ascending order (y: columns of W; x's
gradient: rows of W; W's gradient: tokens), rounded once to the dtype; how that product is associated is the library's.
No element is ever added to by two threads, and nothing here looks at the number of threads. Where the library's product
of one shape does not depend on it, neither do these bits; the tests hold this for 1 and 2 threads. `native` sums as
products.c says, the same for any number of threads.

A NaN or an infinity of x is in the results that have a non-zero for it. Where a column of W has none, all results of that
token are NaN, as in a dense product, so that it is in some result for any W; and likewise with rows, in x's gradient.

Bound against exact arithmetic, for a dot product of n terms (Higham, Accuracy and Stability of Numerical Algorithms,
2nd ed., section 3.1): |error| ≤ γ(n) Σ|terms| + u |result|, where γ(n) = n·2⁻²⁴ / (1 - n·2⁻²⁴) and u = 2⁻⁸ for bf16, else 0.
As there, nothing underflows: a processor's dot products of bf16 take what is below 2⁻¹²⁶ for zero, also in torch.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightstream.errors import ConfigError
from weightstream.sparse.native import products as native
from weightstream.sparse.structure import Compressed, Lines, Structure, portions

Kernel = Literal["native", "gathered", "bsr", "csr"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

_GATHERED_BYTES = 4 << 20  # what is gathered at once: it should be in a cache when the product reads it


def supports(kernel: Kernel, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel can multiply by such blocks."""
    return obstacle(kernel, block, dtype, device) is None


def obstacle(kernel: Kernel, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel cannot multiply by such blocks; None if it can."""
    if not _multiplies(kernel, block, dtype, device):
        return f"'{kernel}' has no product of {dtype} with blocks of {block[0]}×{block[1]} on {device.type}"
    missing = native.obstacle() if kernel == "native" else None
    return None if missing is None else f"'native' needs a C compiler on every machine: {missing}; install one"


def _multiplies(kernel: Kernel, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    if kernel == "native":
        return device.type == "cpu"
    if kernel == "gathered":
        return min(block) > 1
    if kernel == "csr":
        return device.type == "cpu" and torch.backends.mkl.is_available()
    a, b = block
    if device.type == "cpu":
        return a == b > 1 and dtype == torch.float32 and torch.backends.mkl.is_available()
    # Triton's block products: powers of two from 16 on; its fp32 is TF32, which is not what was asked for
    return device.type == "cuda" and dtype == torch.bfloat16 and min(block) >= 16 and not (a & (a - 1) or b & (b - 1))


def multiply(x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure, kernel: Kernel) -> Tensor:
    """x Wᵀ + bias.

    Args:
        x: (…, columns of W).
        values: the non-zeros of W, (nnz, 1) or (nnz,), in row-major order of their dense positions; its gradient has
            the same shape.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the kernel cannot do this.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values, bias = x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    rows, columns = structure.shape
    alike = (x.dtype, x.device) == (values.dtype, values.device)
    if x.shape[-1] != columns or values.numel() != structure.nnz or not alike:
        raise ConfigError(
            f"sparse product with {structure}: expected x of (…, {columns}) and {structure.nnz} values of one dtype "
            f"and device, found x {tuple(x.shape)} of {x.dtype} on {x.device} and {values.numel()} values of "
            f"{values.dtype} on {values.device}; give the mask that the values have"
        )
    reason = obstacle(kernel, structure.block, x.dtype, x.device)
    if reason is not None:
        raise ConfigError(f"kernel {reason}, choose another one, or multiply densely")
    y: Tensor = _Product.apply(x.reshape(-1, columns), values, structure, kernel)
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], rows)


def prepare(structure: Structure, kernel: Kernel) -> None:
    """Finds now what products by a kernel ask of a structure, as far as one thread of the CPU can: that of `native`. Of others
    the first product finds it."""
    if kernel == "native":
        native.prepare(structure)


def prepared_bytes(shape: tuple[int, int], block: tuple[int, int], nonzeros: int, kernel: Kernel) -> int | None:
    """What a structure of so many non-zeros takes that is prepared for a kernel, exactly; None where that depends on where they
    are."""
    return native.lines_bytes(shape, block, nonzeros) if kernel == "native" else None


def held_bytes(structure: Structure) -> int:
    """What a structure takes that was prepared; 0 if it was not."""
    return native.held_bytes(structure)


class _Product(torch.autograd.Function):
    """x (tokens × columns) times the transposed W; both are saved as they are, so that weights in slabs stay there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, structure: Structure, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.structure, ctx.kernel = structure, kernel
        y = _FORWARD[kernel](x.contiguous(), _flat(values), structure)
        return y if structure.fills_columns else _not_finite_as(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values = ctx.saved_tensors
        structure, kernel = ctx.structure, ctx.kernel
        of_x = of_values = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            of_x = _INPUT_GRADIENT[kernel](grad, _flat(values), structure)
            of_x = of_x if structure.fills_rows else _not_finite_as(grad, of_x)
        if ctx.needs_input_grad[1]:
            of_values = _WEIGHT_GRADIENT[kernel](grad, x.contiguous(), structure).view(values.shape)
        return of_x, of_values, None, None


def _not_finite_as(tokens: Tensor, found: Tensor) -> Tensor:
    """NaN for tokens with a NaN or an infinity, as a dense product has it, where 0 · NaN is NaN: where a line of W is empty, it
    could else be in no result at all."""
    if not tokens.numel():
        return found
    if tokens.device.type == "cpu" and tokens.sum().isfinite():  # one pass, where nobody waits for it
        return found
    least, most = tokens.aminmax(dim=1)
    return found.masked_fill_(~(least.isfinite() & most.isfinite())[:, None], torch.nan)


def _flat(values: Tensor) -> Tensor:
    """One after another in memory: those of a column, or one number that stands for all, are copied."""
    return values.reshape(-1).contiguous()


# gathered


def _rows(values: Tensor, structure: Structure) -> list[Tensor]:
    """Values by group of `by_row`, each (n, a, k·b); they are copied only where rows are out of order."""
    a, b = structure.block
    order = structure.row_order
    if order != sorted(order):
        parts = values.split(structure.row_values)
        values = torch.cat([parts[row] for row in order])
    found, begin = [], 0
    for group in structure.by_row:
        n, k = group.others.shape
        found.append(values[begin : begin + n * a * k * b].view(n, a, k * b))
        begin += n * a * k * b
    return found


def _blocks(values: Tensor, structure: Structure) -> Tensor:
    """Values as (blocks, a, b), numbered as in `by_row`."""
    a, b = structure.block
    groups = [one.view(one.shape[0], a, -1, b).transpose(1, 2).reshape(-1, a, b) for one in _rows(values, structure)]
    return torch.cat(groups) if groups else values.view(0, a, b)


def _at_once(group: Lines, size: int, tokens: Tensor) -> Iterable[slice]:
    """Lines of a group whose gathered parts, `size` columns of `tokens` for each block, fit together."""
    each = group.others.shape[1] * size * tokens.shape[0] * tokens.itemsize
    return portions(group.lines.numel(), _GATHERED_BYTES // max(1, each))


def _gather(tokens: Tensor, blocks: Tensor, size: int) -> Tensor:
    """The blocks of columns of `tokens` that lines need, blocks (n, k): (n, tokens, k·size), strided.

    Pieces of rows are copied as they lie; a transposed x would be gathered faster, but transposing takes longer.
    """
    n, k = blocks.shape
    found = tokens.view(tokens.shape[0], tokens.shape[1] // size, size).index_select(1, blocks.reshape(-1))
    return found.view(tokens.shape[0], n, k * size).transpose(0, 1)


def _room(tokens: Tensor, groups: tuple[Lines, ...], columns: int, size: int) -> Tensor:
    """For results, (tokens, lines, size): zero where lines are empty."""
    shape = (tokens.shape[0], columns // size, size)
    written = sum(group.lines.numel() for group in groups)
    return tokens.new_empty(shape) if written == shape[1] else tokens.new_zeros(shape)


def _gathered_forward(x: Tensor, values: Tensor, structure: Structure) -> Tensor:
    a, b = structure.block
    y = _room(x, structure.by_row, structure.shape[0], a)
    for group, weights in zip(structure.by_row, _rows(values, structure), strict=True):
        for part in _at_once(group, b, x):
            found = torch.bmm(_gather(x, group.others[part], b), weights[part].transpose(1, 2))
            y.index_copy_(1, group.lines[part], found.transpose(0, 1))
    return y.view(x.shape[0], structure.shape[0])


def _gathered_input_gradient(grad: Tensor, values: Tensor, structure: Structure) -> Tensor:
    a, b = structure.block
    blocks = _blocks(values, structure)
    of_x = _room(grad, structure.by_column, structure.shape[1], b)
    for group in structure.by_column:
        for part in _at_once(group, a, grad):
            places = group.places[part]
            weights = blocks.index_select(0, places.reshape(-1)).view(places.shape[0], -1, b)  # (n, k·a, b)
            found = torch.bmm(_gather(grad, group.others[part], a), weights)
            of_x.index_copy_(1, group.lines[part], found.transpose(0, 1))
    return of_x.view(grad.shape[0], structure.shape[1])


def _gathered_weight_gradient(grad: Tensor, x: Tensor, structure: Structure) -> Tensor:
    a, b = structure.block
    found: list[Tensor] = []  # by row of blocks, in the order of `by_row`
    for group in structure.by_row:
        for part in _at_once(group, b, x):
            outputs = _gather(grad, group.lines[part, None], a)
            grads = torch.bmm(outputs.transpose(1, 2), _gather(x, group.others[part], b))
            found += grads.view(grads.shape[0], -1).unbind(0)
    in_order = [one for _, one in sorted(zip(structure.row_order, found, strict=True), key=lambda pair: pair[0])]
    return torch.cat(in_order) if in_order else grad.new_empty(0)


# PyTorch's compressed formats


@cache
def _accept_beta() -> None:
    """PyTorch says once per process that these formats are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        torch.eye(2).to_sparse_csr()
        torch.eye(2).to_sparse_bsr((1, 1))


def _compressed(compressed: Compressed, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Indices come from `Structure`, so nothing of them is checked again."""
    _accept_beta()
    layout = torch.sparse_csr if values.dim() == 1 else torch.sparse_bsr
    return torch.sparse_compressed_tensor(
        compressed.starts, compressed.columns, values, size=shape, layout=layout, check_invariants=False
    )


def _bsr_forward(x: Tensor, values: Tensor, structure: Structure) -> Tensor:
    at = structure.rows_compressed
    blocks = _blocks(values, structure).index_select(0, at.order)
    y: Tensor = _compressed(at, blocks, structure.shape) @ x.t().contiguous()
    return y.t().contiguous()


def _bsr_input_gradient(grad: Tensor, values: Tensor, structure: Structure) -> Tensor:
    at, (rows, columns) = structure.columns_compressed, structure.shape
    blocks = _blocks(values, structure).index_select(0, at.order).transpose(1, 2).contiguous()
    of_x: Tensor = _compressed(at, blocks, (columns, rows)) @ grad.t().contiguous()
    return of_x.t().contiguous()


def _turned(tokens: Tensor) -> Tensor:
    """(columns × tokens), fp32."""
    return tokens.t().to(torch.float32, memory_format=torch.contiguous_format)


def _csr_forward(x: Tensor, values: Tensor, structure: Structure) -> Tensor:
    matrix = _compressed(structure.elements.rows_compressed, values.float(), structure.shape)
    y: Tensor = matrix @ _turned(x)
    return y.t().to(x.dtype, memory_format=torch.contiguous_format)


def _csr_input_gradient(grad: Tensor, values: Tensor, structure: Structure) -> Tensor:
    at, (rows, columns) = structure.elements.columns_compressed, structure.shape
    of_x: Tensor = _compressed(at, values.index_select(0, at.order).float(), (columns, rows)) @ _turned(grad)
    return of_x.t().to(grad.dtype, memory_format=torch.contiguous_format)


def _csr_weight_gradient(grad: Tensor, x: Tensor, structure: Structure) -> Tensor:
    at = structure.elements.rows_compressed
    places = _compressed(at, x.new_zeros(structure.nnz, dtype=torch.float32), structure.shape)
    found: Tensor = torch.sparse.sampled_addmm(places, _turned(grad), _turned(x).t(), beta=0.0)
    return found.values().to(grad.dtype)


_Call = Callable[[Tensor, Tensor, Structure], Tensor]
_FORWARD: dict[Kernel, _Call] = {
    "native": native.forward,
    "gathered": _gathered_forward,
    "bsr": _bsr_forward,
    "csr": _csr_forward,
}
_INPUT_GRADIENT: dict[Kernel, _Call] = {
    "native": native.input_gradient,
    "gathered": _gathered_input_gradient,
    "bsr": _bsr_input_gradient,
    "csr": _csr_input_gradient,
}
_WEIGHT_GRADIENT: dict[Kernel, _Call] = {
    "native": native.weight_gradient,
    "gathered": _gathered_weight_gradient,
    "bsr": _gathered_weight_gradient,
    "csr": _csr_weight_gradient,
}

__all__ = ["KERNELS", "Kernel", "held_bytes", "multiply", "obstacle", "prepare", "prepared_bytes", "supports"]
