"""Calls of the compiled products on torch's tensors, contiguous ones, with the threads that torch computes with."""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.sparse.native.compiling import compiled
from weightstream.sparse.structure import Structure

_LEAST_BLOCK = 16  # smaller blocks fill vectors badly: multiplied as single elements they are faster
_LANES, _PANEL_BYTES = 16, 512 << 10  # of the widest vectors; of tokens that are packed at once
_WIDEST = 4 * 4 * _LANES  # bytes of a panel of tokens for each column

_FLAG, _SIZE, _PLACE = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "ws_elements": (_PLACE, _PLACE, _SIZE, _SIZE, _SIZE, _PLACE, _PLACE),
    "ws_turned": (_PLACE, _PLACE, _SIZE, _SIZE, _PLACE, _PLACE, _PLACE),
    "ws_blocks_product": (
        _FLAG, _FLAG, _SIZE, _PLACE, _SIZE, _PLACE, _PLACE, _SIZE, _SIZE, _SIZE, _SIZE, _PLACE, _PLACE, _PLACE, _PLACE, _FLAG,
    ),
    "ws_blocks_gradient": (
        _FLAG, _SIZE, _PLACE, _SIZE, _PLACE, _SIZE, _PLACE, _SIZE, _SIZE, _SIZE, _SIZE, _PLACE, _PLACE, _FLAG,
    ),
    "ws_elements_product": (
        _FLAG, _SIZE, _PLACE, _SIZE, _SIZE, _PLACE, _SIZE, _PLACE, _PLACE, _PLACE, _PLACE, _FLAG,
    ),
    "ws_elements_gradient": (
        _FLAG, _SIZE, _PLACE, _SIZE, _PLACE, _SIZE, _PLACE, _SIZE, _SIZE, _PLACE, _PLACE, _FLAG,
    ),
}  # fmt: skip


def obstacle() -> str | None:
    """Why there are no compiled products on this machine; None if there are."""
    found = compiled()
    return None if found.library else found.reason


def _library() -> ctypes.CDLL:
    found = compiled()
    if found.library is None:
        raise ConfigError(f"kernel 'native': {found.reason}; install a C compiler, or choose another kernel")
    return _typed(found.library)


@cache
def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def forward(x: Tensor, values: Tensor, structure: Structure) -> Tensor:
    """x Wᵀ, x of (tokens, columns)."""
    return _product(x, values, structure, forward=True)


def input_gradient(grad: Tensor, values: Tensor, structure: Structure) -> Tensor:
    """grad W, grad of (tokens, rows)."""
    return _product(grad, values, structure, forward=False)


def weight_gradient(grad: Tensor, x: Tensor, structure: Structure) -> Tensor:
    """gradᵀ x at the non-zeros of W, (nnz,)."""
    (rows, columns), (a, b) = structure.shape, structure.block
    found = grad.new_empty(structure.nnz)
    tokens = (_narrow(grad), grad.shape[0], _place(grad), rows, _place(x), columns, found.data_ptr())
    lines = _lines(structure)
    at = (lines.row_starts.data_ptr(), lines.columns.data_ptr(), torch.get_num_threads())
    if as_elements(structure.block):
        _done(_library().ws_elements_gradient(*tokens, rows, columns, *at))
    else:
        _done(_library().ws_blocks_gradient(*tokens, rows // a, columns // b, a, b, *at))
    return found


def as_elements(block: tuple[int, int]) -> bool:
    """Whether such blocks are multiplied as the elements that they consist of."""
    return min(block) < _LEAST_BLOCK


def workspace_bytes(shape: tuple[int, int], block: tuple[int, int], nonzeros: int, threads: int) -> int:
    """What one of these products needs at most beside its operands and its result: by the widest vectors of products.c."""
    rows, columns = shape
    widest, both = max(shape), rows + columns
    if as_elements(block):
        return 4 * nonzeros + max(threads * _WIDEST * widest, 2 * _WIDEST * both)
    a, b = (-(-size // _LANES) * _LANES for size in block)
    panels, chunks = threads * max(_PANEL_BYTES, 2 * 4 * 12 * widest), 2 * max(_PANEL_BYTES, 2 * 4 * 32 * both)
    return 4 * nonzeros * a * b // (block[0] * block[1]) + max(panels, chunks)


def _product(tokens: Tensor, values: Tensor, structure: Structure, *, forward: bool) -> Tensor:
    (rows, columns), (a, b) = structure.shape, structure.block
    found = tokens.new_empty(tokens.shape[0], rows if forward else columns)
    begin, weights = (tokens.shape[0], _place(tokens), tokens.shape[1]), _place(values)
    lines = _lines(structure)
    by = lines.by_row if forward else lines.by_column
    threads = torch.get_num_threads()
    if as_elements(structure.block):
        _done(_library().ws_elements_product(
            _narrow(tokens), *begin, tokens.shape[1], found.data_ptr(), found.shape[1], weights, *by, threads,
        ))  # fmt: skip
    else:
        _done(_library().ws_blocks_product(
            _narrow(tokens), forward, *begin, found.data_ptr(), weights, rows // a, columns // b, a, b,
            lines.row_starts.data_ptr(), *by, threads,
        ))  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """W by rows and by columns: of its blocks, or of the elements that these consist of."""

    row_starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    numbers: Tensor

    @property
    def by_row(self) -> tuple[int, int, None]:
        """Starts, columns, and no numbers, as these are in order."""
        return self.row_starts.data_ptr(), self.columns.data_ptr(), None

    @property
    def by_column(self) -> tuple[int, int, int]:
        """Starts, rows and numbers."""
        return self.column_starts.data_ptr(), self.rows.data_ptr(), self.numbers.data_ptr()


def prepare(structure: Structure) -> None:
    """Finds now, by one thread, all that products ask of a structure; else the first of them does."""
    _lines(structure)


def lines_bytes(shape: tuple[int, int], block: tuple[int, int], nonzeros: int) -> int:
    """What a structure takes that is prepared, exactly."""
    (rows, columns), (a, b) = shape, block
    count = nonzeros // (a * b)
    own = 4 * (rows // a + 1 + count)
    if not as_elements(block):
        return own + 4 * (columns // b + 1 + 2 * count)
    spread = 0 if block == (1, 1) else 4 * (rows + 1 + nonzeros)
    return own + spread + 4 * (columns + 1 + 2 * nonzeros)


def held_bytes(structure: Structure) -> int:
    """What a structure takes that is prepared, by what it holds; 0 if it is not."""
    lines: _Lines | None = structure.prepared.get("native")
    if lines is None:
        return 0
    found = (
        structure.row_starts, structure.columns, lines.row_starts, lines.columns, lines.column_starts, lines.rows,
        lines.numbers,
    )  # fmt: skip
    return sum({each.data_ptr(): each.nbytes for each in found if each.numel()}.values())


def _lines(structure: Structure) -> _Lines:
    lines: _Lines | None = structure.prepared.get("native")
    if lines is None:
        lines = structure.prepared["native"] = _found_lines(structure)
    return lines


def _found_lines(structure: Structure) -> _Lines:
    spread = as_elements(structure.block) and structure.block != (1, 1)
    count = structure.nnz if spread else structure.count
    if count >= 1 << 31:
        raise ConfigError(
            f"kernel 'native' on {structure}: expected less than 2³¹ of them; cut the matrix, or choose another"
        )
    (all_rows, all_columns), (height, width) = structure.shape, structure.block
    row_starts, columns = structure.row_starts, structure.columns
    if spread:
        row_starts, columns = _empty(all_rows + 1), _empty(count)
        _library().ws_elements(
            structure.row_starts.data_ptr(), structure.columns.data_ptr(), all_rows // height, height, width,
            row_starts.data_ptr(), columns.data_ptr(),
        )  # fmt: skip
    else:
        all_rows, all_columns = all_rows // height, all_columns // width
    column_starts, rows, numbers = _empty(all_columns + 1), _empty(count), _empty(count)
    _done(_library().ws_turned(
        row_starts.data_ptr(), columns.data_ptr(), all_rows, all_columns,
        column_starts.data_ptr(), rows.data_ptr(), numbers.data_ptr(),
    ))  # fmt: skip
    return _Lines(row_starts, columns, column_starts, rows, numbers)


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device="cpu")


def _place(tensor: Tensor) -> int:
    """Where its elements lie, one after another.

    Raises:
        ConfigError: nowhere, as that of a FakeTensor.
    """
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ConfigError(
            f"kernel 'native': expected tensors that lie in memory, found a {type(tensor).__name__} of "
            f"{tuple(tensor.shape)} that lies nowhere; give real ones, or expand the weight where a model is traced"
        )
    return place


def _narrow(tokens: Tensor) -> int:
    return int(tokens.dtype == torch.bfloat16)


def _done(code: int) -> None:
    if code:
        raise MemoryError(
            "kernel 'native': no memory for the tokens and weights that it packs; give it smaller micro-batches"
        )


__all__ = [
    "as_elements", "forward", "held_bytes", "input_gradient", "lines_bytes", "obstacle", "prepare", "weight_gradient",
    "workspace_bytes",
]  # fmt: skip
