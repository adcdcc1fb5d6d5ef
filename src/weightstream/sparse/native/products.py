"""Calls of the compiled products on torch's tensors, contiguous ones, with the threads that torch computes with."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from weightstream.errors import ConfigError
from weightstream.sparse.native.compiling import compiled
from weightstream.sparse.structure import Compressed, Structure

_LEAST_BLOCK = 16  # smaller blocks fill vectors badly: multiplied as single elements they are faster

_FLAG, _SIZE, _PLACE = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
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
    own = _as_multiplied(structure)
    (rows, columns), (a, b), by_row = own.shape, own.block, own.rows_in_order
    found = grad.new_empty(own.nnz)
    tokens = (_narrow(grad), grad.shape[0], grad.data_ptr(), rows, x.data_ptr(), columns, found.data_ptr())
    at = (by_row.starts.data_ptr(), by_row.columns.data_ptr(), torch.get_num_threads())
    if own.block == (1, 1):
        _done(_library().ws_elements_gradient(*tokens, rows, columns, *at))
    else:
        _done(_library().ws_blocks_gradient(*tokens, rows // a, columns // b, a, b, *at))
    return found


def _product(tokens: Tensor, values: Tensor, structure: Structure, *, forward: bool) -> Tensor:
    own = _as_multiplied(structure)
    (rows, columns), (a, b), by_row = own.shape, own.block, own.rows_in_order
    lines = by_row if forward else own.columns_in_order
    found = tokens.new_empty(tokens.shape[0], rows if forward else columns)
    begin = (tokens.shape[0], tokens.data_ptr(), tokens.shape[1])
    threads = torch.get_num_threads()
    if own.block == (1, 1):
        numbers = None if forward else lines.order.data_ptr()
        _done(_library().ws_elements_product(
            _narrow(tokens), *begin, tokens.shape[1], found.data_ptr(), found.shape[1], values.data_ptr(), *_at(lines),
            numbers, threads,
        ))  # fmt: skip
    else:
        _done(_library().ws_blocks_product(
            _narrow(tokens), forward, *begin, found.data_ptr(), values.data_ptr(), rows // a, columns // b, a, b,
            by_row.starts.data_ptr(), *_at(lines), lines.order.data_ptr(), threads,
        ))  # fmt: skip
    return found


def _as_multiplied(structure: Structure) -> Structure:
    return structure if min(structure.block) >= _LEAST_BLOCK else structure.elements


def _narrow(tokens: Tensor) -> int:
    return int(tokens.dtype == torch.bfloat16)


def _at(lines: Compressed) -> tuple[int, int]:
    return lines.starts.data_ptr(), lines.columns.data_ptr()


def _done(code: int) -> None:
    if code:
        raise MemoryError(
            "kernel 'native': no memory for the tokens and weights that it packs; give it smaller micro-batches"
        )


__all__ = ["forward", "input_gradient", "obstacle", "weight_gradient"]
