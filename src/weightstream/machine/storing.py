"""How fast the store's work is: direct I/O as the store does it, updates, sums of gradients, checksums, copies."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from weightstream.fabric.reduction import BlockSum, add_squares
from weightstream.machine.kernels import DTYPES, Call, in_turn, name_of, product, seconds, significant
from weightstream.machine.profile import DiskRates
from weightstream.store.checksums import checksums
from weightstream.store.device import Device
from weightstream.store.optimizers import SGD, Adafactor, AdamW, Lion, Optimizer
from weightstream.store.segments import AlignedBuffer
from weightstream.store.tiers import CHUNK_BYTES, Disk

OPTIMIZERS: tuple[Optimizer, ...] = (AdamW(), SGD(), Lion(), Adafactor())
_ROWS = 1024
_TURNS = 16
"""So many tensors take turns that none of them is in a cache when its turn comes, where one is 16 MiB."""


def updates(parameters: int) -> Iterator[tuple[str, float]]:
    """Seconds per parameter of each optimizer, on tensors that are not in the cache."""
    columns = max(1, parameters // 4 // _ROWS)
    shape = (_ROWS, columns)
    for optimizer in OPTIMIZERS:
        records = [_record(optimizer, shape) for _ in range(_TURNS)]

        def step(records: Any = records, optimizer: Optimizer = optimizer) -> None:
            for master, grad, states in records:
                optimizer.update(master, grad, states, name="weight", step=1, count=2)

        taken = seconds(step)
        yield type(optimizer).__name__, significant(taken / (_TURNS * _ROWS * columns))


def _record(optimizer: Optimizer, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    states = {name: torch.rand(size, dtype=dtype) for name, (dtype, size) in optimizer.states(shape).items()}
    return torch.randn(shape), torch.randn(shape) * 1e-3, states


def scale_and_cast(parameters: int) -> tuple[float, dict[str, float]]:
    """Seconds per parameter: the clip coefficient times the gradient; the copy that streams, by dtype."""
    masters = [torch.randn(parameters) for _ in range(_TURNS)]
    casts = {}
    for dtype in DTYPES:
        copies = [torch.empty(parameters, dtype=dtype) for _ in masters]
        calls: list[Call] = [partial(copy.copy_, master) for copy, master in zip(copies, masters, strict=True)]
        casts[name_of(dtype)] = significant(seconds(in_turn(calls, 1)) / parameters)
    scaling = in_turn([partial(grad.mul_, 0.999) for grad in masters], 1)
    return significant(seconds(scaling) / parameters), casts


def sums(parameters: int) -> Iterator[tuple[str, float]]:
    """Seconds per element of a block's sum: the first gradient, each further one, and the squares."""
    target = torch.zeros(parameters)
    for dtype in DTYPES:
        grads = [torch.randn(parameters).to(dtype) for _ in range(4)]

        def total(count: int, grads: Any = grads) -> None:
            found = BlockSum(
                {"weight": target}, lambda slot, name: torch.empty_like(target),
                micro_batches=count, groups=8, held=count,
            )  # fmt: skip
            for index in range(count):
                found.add("weight", 0, index, grads[index])
            found.close()

        squares = seconds(lambda: add_squares(0.0, target)) / parameters
        one, four = (seconds(partial(total, count)) / parameters for count in (1, 4))
        yield f"add {name_of(dtype)}", significant(max((four - one) / 3, one / 20))
        yield f"copy {name_of(dtype)}", significant(max(one - squares, one / 10))
    yield "squares", significant(squares)


def checksum_rate(nbytes: int) -> float:
    """Bytes per second of checksums by all threads, of records that are not in the cache."""
    buffers = [AlignedBuffer(nbytes) for _ in range(4)]
    for buffer in buffers:
        buffer.tensor(torch.uint8, 0, (nbytes,)).random_(256)
    calls: list[Call] = [partial(checksums, [buffer.view], CHUNK_BYTES) for buffer in buffers]
    try:
        return significant(nbytes / seconds(in_turn(calls, 1)))
    finally:
        calls.clear()
        for buffer in buffers:
            buffer.close()


def memory_rate(nbytes: int) -> float:
    """Bytes per second of a copy in memory, between places that are not in the cache, as a block goes to its slab."""
    sources, targets = ([AlignedBuffer(nbytes) for _ in range(4)] for _ in range(2))
    pairs = [
        (one.tensor(torch.uint8, 0, (nbytes,)), other.tensor(torch.uint8, 0, (nbytes,)))
        for one, other in zip(sources, targets, strict=True)
    ]
    for pair in pairs:
        for tensor in pair:
            tensor.fill_(1)  # memory that was never touched is not there yet
    calls: list[Call] = [partial(target.copy_, source) for source, target in pairs]
    try:
        return significant(nbytes / seconds(in_turn(calls, 1)))
    finally:
        calls.clear()
        pairs.clear()
        for buffer in sources + targets:
            buffer.close()


class DiskProbe:
    """Files of a record's size in a folder of its own, read and overwritten as the store reads and writes records."""

    def __init__(self, folder: Path, *, file_bytes: int = 16 << 20, files: int = 8) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file_bytes = file_bytes
        device = Device()
        device.probe(folder)
        self.disk = Disk(device=device)
        self.sources = [folder / f"read-{number}" for number in range(files)]
        self.targets = [folder / f"write-{number}" for number in range(files)]
        self._buffers = [AlignedBuffer(file_bytes) for _ in range(2 * files)]
        for buffer in self._buffers:
            buffer.tensor(torch.uint8, 0, (file_bytes,)).random_(256)
        for _ in range(2):  # the second time files are overwritten, as in a steady step
            for future in self.write(self.sources) + self.write(self.targets):
                future.result()

    def read(self) -> "list[Future[list[int]]]":
        pairs = zip(self.sources, self._buffers, strict=False)
        return [self.disk.read(path, [(0, buffer.view)], "states", digest=False) for path, buffer in pairs]

    def write(self, paths: list[Path] | None = None) -> "list[Future[list[int]]]":
        own = self._buffers[len(self.targets) :]
        pairs = zip(self.targets if paths is None else paths, own, strict=True)
        return [
            self.disk.write(path, [(0, buffer.view)], "image", allocate_bytes=self.file_bytes, digest=False)
            for path, buffer in pairs
        ]

    @property
    def nbytes(self) -> int:
        """What one round moves in one direction."""
        return self.file_bytes * len(self.targets)

    def rates(self, rounds: int = 3) -> DiskRates:
        read_s, write_s, both_s = [], [], []
        for _ in range(rounds):
            read_s.append(_until(self.read()))
            write_s.append(_until(self.write()))
            both_s.append(_until(self.read() + self.write()))
        return DiskRates(
            read_bytes_per_s=significant(self.nbytes / median(read_s)),
            write_bytes_per_s=significant(self.nbytes / median(write_s)),
            together=significant(min(2.0, max(1.0, (median(read_s) + median(write_s)) / median(both_s)))),
            latency_s=significant(median(self._small_reads())), sync_s=significant(median(self._small_writes())),
        )  # fmt: skip

    def _small_reads(self) -> list[float]:
        view = self._buffers[0].view[:4096]
        return [_until([self.disk.read(self.sources[0], [(0, view)], "copy", digest=True)]) for _ in range(21)]

    def _small_writes(self) -> list[float]:
        view, path = self._buffers[0].view[:4096], self.targets[0]
        return [_until([self.disk.write(path, [(0, view)], "image", allocate_bytes=4096)]) for _ in range(11)]

    def compute_per_byte(self, rounds: int = 5) -> float:
        """Seconds that compute takes longer, per byte that is read or written meanwhile."""
        work = _layer_like()
        once = seconds(work)
        count = max(1, round(0.05 / once))
        found = []
        for _ in range(rounds):
            alone = _loop(work, count)
            moved, moving = 2 * self.nbytes, self.read() + self.write()
            beside, calls = 0.0, 0
            while not all(future.done() for future in moving):
                beside += _loop(work, 1)
                calls += 1
            for future in moving:
                future.result()
            found.append((beside - calls * alone / count) / moved)
        return significant(max(0.0, median(found)))

    def close(self) -> None:
        self.disk.close()
        for buffer in self._buffers:
            buffer.close()
        for path in self.sources + self.targets:
            path.unlink(missing_ok=True)


def _layer_like() -> Call:
    """A product and kernels beside it, as in a layer: what all threads do together waits for the slowest each time."""
    multiply, wide = product("nt", torch.bfloat16, 256, 512, 512), torch.rand(1 << 17)

    def call() -> None:
        multiply()
        for _ in range(4):
            wide.mul(2.0)

    return call


def _until(futures: "list[Future[Any]]") -> float:
    started = time.perf_counter()
    for future in futures:
        future.result()
    return time.perf_counter() - started


def _loop(work: Any, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - started
