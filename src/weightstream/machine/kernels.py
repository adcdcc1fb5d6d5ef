"""How fast kernels are: matrix products by shape, attention by length, everything else by size.

Each figure is the median of several, of calls as the runtime makes them: results in fresh memory, weights that are not in
the cache, and so many threads as a rank has.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from weightstream.machine.steady import look

aten = torch.ops.aten
Call = Callable[[], Any]

PRODUCT_SIZES = (32, 128, 512, 2048)
ATTENTION_LENGTHS = (64, 128, 256, 512, 1024)
ATTENTION_WIDTH = 64
KERNEL_ELEMENTS = (1 << 12, 1 << 15, 1 << 18, 1 << 21)
DTYPES = (torch.bfloat16, torch.float32)
_COLD_BYTES = 64 << 20  # weights take turns in so much memory: more than most caches hold
_APART_BYTES = (
    24 << 20
)  # what other kernels work on takes turns in so much: results do not lie where they were used last
_COLUMNS = 4096


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(call: Call, *, repeats: int = 5, least_s: float = 1e-3) -> float:
    """The median over `repeats` rounds of calls that last at least `least_s`, after one that does not count."""
    look()
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    if first < least_s:
        started = time.perf_counter()
        call()
        first = min(first, time.perf_counter() - started)
    count = max(1, min(1000, round(least_s / max(first, 1e-7))))
    rounds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - started) / count)
    return median(rounds)


def significant(value: float) -> float:
    """Four digits: what is measured is not known better."""
    return float(f"{value:.4g}")


def in_turn(calls: list[Call], kept: int) -> Call:
    """One call after another; the latest results stay, so that the next ones come to lie elsewhere."""
    results: deque[Any] = deque(maxlen=kept)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        results.append(calls[turn]())

    return call


def product(layout: str, dtype: torch.dtype, m: int, n: int, k: int) -> Call:
    """`nt` is a layer's forward (tokens × in, out × in transposed), `nn` its input's gradient, `tn` its weight's."""
    copies = max(1, min(8, _COLD_BYTES // ((n * k + m * k) * dtype.itemsize)))

    def operands() -> tuple[Tensor, Tensor]:
        one = torch.randn((k, m) if layout == "tn" else (m, k)).to(dtype)
        other = torch.randn((n, k) if layout == "nt" else (k, n)).to(dtype)
        return one.t() if layout == "tn" else one, other.t() if layout == "nt" else other

    pairs = [operands() for _ in range(copies)]
    return in_turn([partial(aten.mm, one, other) for one, other in pairs], 4)


def products(sizes: tuple[int, ...] = PRODUCT_SIZES, repeats: int = 5) -> Iterator[tuple[str, tuple[float, ...]]]:
    """FLOP/s by layout and dtype, over all m, n, k."""
    for dtype in DTYPES:
        for layout in ("nt", "nn", "tn"):
            row = []
            for m in sizes:
                for n in sizes:
                    for k in sizes:
                        large = m * n * k >= 1 << 30
                        taken = seconds(product(layout, dtype, m, n, k), repeats=3 if large else repeats)
                        row.append(significant(2 * m * n * k / taken))
            yield f"{layout} {name_of(dtype)}", tuple(row)


def attention(lengths: tuple[int, ...] = ATTENTION_LENGTHS) -> Iterator[tuple[str, tuple[float, ...]]]:
    """FLOP/s of attention over sequences of each length, as if each token saw all: two products forward, five back."""
    flash, back = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    width = ATTENTION_WIDTH
    for dtype in DTYPES:
        for causal in (True, False):
            ahead, behind = [], []
            for length in lengths:
                heads = max(4, 2048 // length)
                q, k, v, grad = (torch.randn(1, length, heads, width).to(dtype).transpose(1, 2) for _ in range(4))
                out, lse = flash(q, k, v, 0.0, causal)
                work = 4 * heads * length * length * width
                ahead.append(significant(work / seconds(in_turn([partial(flash, q, k, v, 0.0, causal)], 4))))
                taken = seconds(in_turn([partial(back, grad, q, k, v, out, lse, 0.0, causal)], 4))
                behind.append(significant(2.5 * work / taken))
            mask = "causal" if causal else "full"
            yield f"attention {mask} {name_of(dtype)}", tuple(ahead)
            yield f"attention_backward {mask} {name_of(dtype)}", tuple(behind)


def others(sizes: tuple[int, ...] = KERNEL_ELEMENTS, repeats: int = 5) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Seconds per call of all other kernels, by size."""
    names = [(key, dtype) for dtype in DTYPES for key in _calls(dtype, sizes[0])]
    for key, dtype in names:
        row = []
        for size in sizes:
            copies = max(2, min(64, _APART_BYTES // (3 * size * dtype.itemsize)))
            make = _calls(dtype, size)[key]
            row.append(significant(seconds(in_turn([make() for _ in range(copies)], copies), repeats=repeats)))
        yield key, tuple(row)


def _calls(dtype: torch.dtype, size: int) -> Mapping[str, Callable[[], Call]]:
    """By `name dtype`, what makes a call on so many elements, of a few thousand columns at most."""
    columns = min(size, _COLUMNS)
    shape, row = (size // columns, columns), (columns,)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    kind = name_of(dtype)

    def x(like: torch.dtype = dtype) -> Tensor:
        return torch.rand(shape).to(like)

    def strided() -> Tensor:
        """Half of each row, as rotary embeddings take it."""
        return torch.rand(size // 64, 2, 64).to(dtype)[:, 0]

    def unary(op: Any, *rest: Any) -> Callable[[], Call]:
        def make() -> Call:
            a = x()
            return lambda: op(a, *rest)

        return make

    def binary(op: Any, *rest: Any) -> Callable[[], Call]:
        def make() -> Call:
            a, b = x(), x()
            return lambda: op(a, b, *rest)

        return make

    def to_other() -> Call:
        a = x()
        return lambda: a.to(other)

    def cat() -> Call:
        a, b = strided(), strided()
        return lambda: aten.cat([a[: a.shape[0] // 2], b[: b.shape[0] // 2]], -1)

    def neg() -> Call:
        a = strided()
        return lambda: aten.neg(a)

    def clone() -> Call:
        heads = max(1, size // 4096)
        a = torch.rand(heads, 64, 64).to(dtype).transpose(0, 1)
        return lambda: aten.clone(a, memory_format=torch.contiguous_format)

    def summed() -> Call:
        a = x()
        return lambda: aten.sum(a, [0], True)

    def slice_backward() -> Call:
        a = torch.rand(max(1, size // 64), 32).to(dtype)
        return lambda: aten.slice_backward(a, [a.shape[0], 64], 1, 0, 32, 1)

    def softmax(op: Any) -> Callable[[], Call]:
        return unary(op, -1, False)

    def softmax_back(op: Any) -> Callable[[], Call]:
        return binary(op, -1, dtype)

    def nll(back: bool) -> Callable[[], Call]:
        def make() -> Call:
            a, target = x(), torch.zeros(shape[0], dtype=torch.long)
            if not back:
                return lambda: aten.nll_loss_forward(a, target, None, 1, -100)
            one = torch.ones((), dtype=dtype)
            return lambda: aten.nll_loss_backward(one, a, target, None, 1, -100, one)

        return make

    def embedding() -> Call:
        width = min(size, 512)
        weight, ids = torch.rand(4096, width).to(dtype), torch.randint(4096, (max(1, size // width),))
        return lambda: aten.embedding(weight, ids)

    def embedding_back() -> Call:
        width = min(size, 512)
        rows = max(1, size // width)
        tokens = 256
        a, ids = torch.rand(tokens, width).to(dtype), torch.randint(rows, (tokens,))
        return lambda: aten.embedding_dense_backward(a, ids, rows, -1, False)

    def layer_norm(back: bool) -> Callable[[], Call]:
        def make() -> Call:
            a, weight, bias = x(), torch.ones(row, dtype=dtype), torch.zeros(row, dtype=dtype)
            if not back:
                return lambda: aten.native_layer_norm(a, row, weight, bias, 1e-5)
            _, mean, rstd = aten.native_layer_norm(a, row, weight, bias, 1e-5)
            return lambda: aten.native_layer_norm_backward(a, a, row, mean, rstd, weight, bias, [True, True, True])

        return make

    def index() -> Call:
        a = torch.rand(max(1, size // 512), min(size, 512)).to(dtype)
        ids = torch.randint(a.shape[0], (a.shape[0],))
        return lambda: aten.index(a, [ids])

    def index_put() -> Call:
        a = torch.zeros(max(1, size // 512), min(size, 512), dtype=dtype)
        ids, values = torch.randint(a.shape[0], (a.shape[0],)), torch.rand(a.shape).to(dtype)
        return lambda: aten.index_put(a, [ids], values, True)

    def broadcast_mul() -> Call:
        a, weight = x(), torch.rand(row).to(dtype)
        return lambda: aten.mul(a, weight)

    def made(op: Any) -> Callable[[], Call]:
        def make() -> Call:
            a = x()
            return lambda: op(a)

        return make

    return {
        f"mul {kind}": binary(aten.mul), f"add {kind}": binary(aten.add), f"add_ {kind}": binary(aten.add_),
        f"div {kind}": unary(aten.div, 3.0), f"pow {kind}": unary(aten.pow, 2), f"mean {kind}": unary(aten.mean, [-1], True),
        f"rsqrt {kind}": unary(aten.rsqrt), f"neg {kind}": neg, f"cat {kind}": cat, f"clone {kind}": clone,
        f"silu {kind}": unary(aten.silu), f"silu_backward {kind}": binary(aten.silu_backward),
        f"gelu {kind}": unary(aten.gelu), f"gelu_backward {kind}": binary(aten.gelu_backward),
        f"tanh {kind}": unary(aten.tanh), f"relu {kind}": unary(aten.relu), f"sum {kind}": summed,
        f"slice_backward {kind}": slice_backward, f"_softmax {kind}": softmax(aten._softmax),
        f"_softmax_backward_data {kind}": softmax_back(aten._softmax_backward_data),
        f"_log_softmax {kind}": softmax(aten._log_softmax),
        f"_log_softmax_backward_data {kind}": softmax_back(aten._log_softmax_backward_data),
        f"nll_loss_forward {kind}": nll(False), f"nll_loss_backward {kind}": nll(True),
        f"embedding {kind}": embedding, f"embedding_dense_backward {kind}": embedding_back,
        f"native_layer_norm {kind}": layer_norm(False), f"native_layer_norm_backward {kind}": layer_norm(True),
        f"native_dropout {kind}": unary(aten.native_dropout, 0.1, True), f"bernoulli_ {kind}": unary(aten.bernoulli_, 0.9),
        f"index {kind}": index, f"index_put {kind}": index_put, f"new_zeros {kind}": made(aten.zeros_like),
        f"_to_copy {kind}>{name_of(other)}": to_other,
    }  # fmt: skip
