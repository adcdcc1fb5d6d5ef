"""Measures the machine in front of us, in under two minutes, into a profile.

Nothing that will be predicted is run: kernels one by one, the disk, the link, and toys of the runtime's own overheads.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count as count_from
from pathlib import Path

import torch

from weightstream.machine import kernels, sharing, sparsity, storing
from weightstream.machine.codec import codec_rates
from weightstream.machine.executing import executor
from weightstream.machine.kernels import significant
from weightstream.machine.profile import Compute, Contention, Profile, this_machine
from weightstream.machine.steady import Steadiness, watched
from weightstream.prediction.costing import Tables, update_alone_s
from weightstream.schedule.cost import BlockFacts
from weightstream.sparse.choosing import Curve
from weightstream.worker.allocator import keep_memory

Step = Callable[[str, float], None]
"""Told what begins, and how much of the whole is done (0 to 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured. The default takes a minute or two; tests take less."""

    product_sizes: tuple[int, ...] = kernels.PRODUCT_SIZES
    attention_lengths: tuple[int, ...] = kernels.ATTENTION_LENGTHS
    kernel_elements: tuple[int, ...] = kernels.KERNEL_ELEMENTS
    repeats: int = 5
    parameters: int = 4 << 20
    file_bytes: int = 16 << 20
    files: int = 8
    link_bytes: int = 16 << 20
    rank_round_s: float = 0.3
    executor_steps: int = 15
    sparse_shape: tuple[int, int] = sparsity.SHAPE
    sparse_tokens: tuple[int, ...] = sparsity.TOKENS
    sparse_densities: tuple[float, ...] = sparsity.DENSITIES
    processes: bool = True
    patience_s: float = 10.0
    """How long is measured again what was measured while the machine was not at its best, all times together."""


def _silent(what: str, done: float) -> None:
    """Nobody wants to know."""


def calibrate(
    folder: Path,
    *,
    threads: int | None = None,
    effort: Effort | None = None,
    step: Step = _silent,
    steadiness: Steadiness | None = None,
) -> Profile:
    """Measures everything.

    Args:
        folder: on the disk that stores will be on; left as it was.
        steadiness: who knows this machine at its best already; its patience is used.
    """
    effort = effort or Effort()
    threads = threads or torch.get_num_threads()
    keep_memory()  # results lie in memory that is kept, as in the runtime
    folder.mkdir(parents=True, exist_ok=True)
    steadiness = steadiness or Steadiness(effort.patience_s)
    with (
        tempfile.TemporaryDirectory(prefix=".weightstream-calibrate-", dir=folder) as name,
        _threads(),
        watched(steadiness),
    ):
        profile = _calibrate(Path(name), threads, effort, step, steadiness)
    apart = {"threads_apart": significant(steadiness.times), "threads_apart_share": significant(steadiness.share)}
    return profile.model_copy(update={"contention": profile.contention.model_copy(update=apart)})


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calibrate(folder: Path, threads: int, effort: Effort, step: Step, steadiness: Steadiness) -> Profile:
    compute: list[Compute] = []
    sparse: list[Curve] = []
    for number, count in enumerate(sorted({1, threads})):
        torch.set_num_threads(count)
        within = partial(_within, step, 0.35 * number)
        compute.append(_compute(count, effort, within, steadiness))
        sparse.extend(_sparse(count, effort, within))
    torch.set_num_threads(threads)
    step("copies in memory", 0.7)
    memory_bytes_per_s = storing.memory_rate(effort.file_bytes)
    codec = codec_rates(effort.parameters)
    step("the disk", 0.72)
    probe = storing.DiskProbe(folder / "disk", file_bytes=effort.file_bytes, files=effort.files)
    try:
        disk = probe.rates()
        step("compute beside the disk", 0.78)
        io_compute_s_per_byte = probe.compute_per_byte()
    finally:
        probe.close()
    step("the runtime's own overheads", 0.82)
    tables = Tables(
        compute[-1], effort.product_sizes, effort.attention_lengths, kernels.ATTENTION_WIDTH, effort.kernel_elements
    )

    def update_s(block: BlockFacts, in_ram: bool) -> float:
        return update_alone_s(
            compute[-1], block, "AdamW", dtype="bfloat16", clipped=True,
            memory_bytes_per_s=memory_bytes_per_s if in_ram else None,
        )  # fmt: skip

    attempt = count_from(0)
    overheads = steadiness.at_best(
        lambda: executor(
            folder / f"toys-{next(attempt)}", tables.seconds, update_s, steps=effort.executor_steps, threads=threads
        )
    )
    link, ranks = None, {}
    if effort.processes:
        step("processes that share cores", 0.88)
        ranks = sharing.slowdowns(threads, effort.rank_round_s)
        step("the link between processes", 0.95)
        link = sharing.link(effort.link_bytes)
    step("done", 1.0)
    return Profile(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), machine=this_machine(),
        product_sizes=effort.product_sizes, attention_lengths=effort.attention_lengths,
        attention_width=kernels.ATTENTION_WIDTH, kernel_elements=effort.kernel_elements, compute=tuple(compute),
        memory_bytes_per_s=memory_bytes_per_s, disk=disk, link=link, executor=overheads,
        contention=Contention(io_compute_s_per_byte=io_compute_s_per_byte, ranks=ranks), sparse=tuple(sparse),
        codec=codec,
    )  # fmt: skip


def _within(step: Step, begin: float, what: str, part: float) -> None:
    step(what, begin + 0.35 * part)


def _compute(threads: int, effort: Effort, step: Step, steadiness: Steadiness) -> Compute:
    on = _on(threads)
    step(f"matrix products {on}", 0.0)
    products = dict(kernels.products(effort.product_sizes, effort.repeats))

    def rest() -> Compute:
        step(f"attention {on}", 0.6)
        attention = dict(kernels.attention(effort.attention_lengths))
        step(f"other kernels {on}", 0.7)
        others = dict(kernels.others(effort.kernel_elements, effort.repeats))
        step(f"sums and updates {on}", 0.85)
        scale_s, cast_s = storing.scale_and_cast(effort.parameters)
        return Compute(
            threads=threads, products=products, attention=attention, kernels=others,
            sums=dict(storing.sums(effort.parameters // 4)), optimizer=dict(storing.updates(effort.parameters)),
            scale_s=scale_s, cast_s=cast_s, checksum_bytes_per_s=storing.checksum_rate(4 * effort.file_bytes),
        )  # fmt: skip

    return steadiness.at_best(rest)


def _sparse(threads: int, effort: Effort, step: Step) -> Iterator[Curve]:
    step(f"sparse products {_on(threads)}", 0.93)
    return sparsity.curves(
        threads, shape=effort.sparse_shape, all_tokens=effort.sparse_tokens, densities=effort.sparse_densities,
        repeats=min(3, effort.repeats),
    )  # fmt: skip


def _on(threads: int) -> str:
    return f"with {threads} thread{'s' if threads > 1 else ''}"


__all__ = ["Effort", "calibrate"]
