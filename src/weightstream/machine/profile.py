"""What a machine can do, as it was measured: a small file that the planner and the simulator read.

Rates are kept where they differ: matrix products by shape and by which operand is transposed, other kernels by size, all
of it by the number of threads. `weightstream calibrate` writes it; a profile of another machine is used with a warning.
"""

import math
import os
import platform
import re
import tomllib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import tomli_w
import torch
from pydantic import AfterValidator, Field, ValidationError, model_validator

from weightstream.errors import ConfigError
from weightstream.section import Section
from weightstream.sparse.choosing import Curve
from weightstream.system.hosts import cores

FORMAT = 1
DEFAULT_PATH = Path("~/.cache/weightstream/profile.toml")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"expected sizes of at least 1 in ascending order, found {list(sizes)}")
    return sizes


Sizes = Annotated[tuple[int, ...], AfterValidator(_ascending)]


class Machine(Section):
    """What is compared with the machine at hand."""

    processor: str
    cores: int = Field(ge=1)
    memory_bytes: int = Field(ge=1)
    torch: str


class Compute(Section):
    """Rates of one process that computes with so many threads."""

    threads: int = Field(ge=1)
    products: dict[str, tuple[Positive, ...]]
    """FLOP/s of matrix products by layout and dtype (`nt bfloat16`): over all m, n, k of `product_sizes`, k fastest."""
    attention: dict[str, tuple[Positive, ...]]
    """FLOP/s of scaled_dot_product by direction, mask and dtype (`attention causal bfloat16`), by `attention_lengths`;
    counted as if all keys were seen."""
    kernels: dict[str, tuple[Positive, ...]]
    """Seconds of a call of any other kernel by name and dtype (`mul bfloat16`), by `kernel_elements`."""
    sums: dict[str, Positive]
    """Seconds per element of a gradient: `copy` and `add` to an fp32 sum by dtype, `squares` for the norm."""
    optimizer: dict[str, Positive]
    """Seconds per parameter of an update by the optimizer's name, without what follows."""
    scale_s: Positive
    """Seconds per parameter: the clip coefficient times the gradient."""
    cast_s: dict[str, Positive]
    """Seconds per parameter: from the master to the copy that streams, by dtype."""
    checksum_bytes_per_s: Positive


class CodecRates(Section):
    """Non-zeros between a sparse block as it arrives and its slab, one thread, 16 bits each."""

    clear_bytes_per_s: Positive
    """Zeros into a slab."""
    expand_s: dict[int, Positive] = Field(min_length=1)
    """Seconds per non-zero to its place, by the width of the blocks that these come in."""
    gather_s: dict[int, Positive] = Field(min_length=1)
    """The same of a gradient, from its place."""
    decode_s: Positive
    """Per bit or gap of a mask, to find the places of what exists."""
    prepare_s: Positive | None = None
    """Per non-zero, to find from these places the rows and columns that the compiled kernel multiplies by; None without it."""


class DiskRates(Section):
    """Direct I/O in the store's own way, each direction alone."""

    read_bytes_per_s: Positive
    write_bytes_per_s: Positive
    together: Annotated[float, Field(ge=1, le=2)]
    """How much of both rates a mixture reaches: 1 as if one went after the other, 2 as if each were alone."""
    latency_s: NotNegative
    """From the request for a small record to its bytes."""
    sync_s: NotNegative
    """A small write, until it is on the medium."""


class LinkRates(Section):
    """Two processes of this machine, by way of the loopback interface."""

    broadcast_bytes_per_s: Positive
    reduce_bytes_per_s: Positive
    broadcast_cpu_s_per_byte: NotNegative
    reduce_cpu_s_per_byte: NotNegative
    """Processor time of one process, sender or receiver, per byte."""
    latency_s: NotNegative
    gather_s: NotNegative
    """Until all know what each of them says."""


class Executor(Section):
    """What the runtime itself needs, beyond the kernels that it runs."""

    operation_s: dict[str, NotNegative]
    """Seconds per operation by kind."""
    kernel_s: dict[str, NotNegative]
    """Seconds per kernel by direction, beyond a bare call: Python, autograd's graph, what is saved."""
    tensor_s: dict[str, NotNegative]
    """Seconds per tensor by kind: of a block's sum (`reduce`) and of its update."""
    in_a_step: dict[str, Positive] = Field(default_factory=dict)
    """How many times longer kernels (`forward`, `backward`; where activations are kept `forward kept`, `backward kept`) and
    updates (`update` with states on disk, `update in RAM`) take within a step than one by one: what they need comes from
    memory there, and the store works beside. 1 where it was not measured."""
    between_steps_s: NotNegative
    process_bytes: int = Field(ge=0)
    """Memory of a process that trains beyond what its plan allots and what it holds when it has imported everything:
    threads, tables of the libraries that compute, what allocators keep."""


class Contention(Section):
    """How those that share the machine slow one another."""

    io_compute_s_per_byte: NotNegative
    """What a byte read or written takes from compute that goes on beside it."""
    ranks: dict[str, Positive]
    """How many times slower each of several processes computes than one alone (`2x1`: 2 processes of 1 thread)."""
    threads_apart: float = Field(default=1.0, ge=1.0)
    """How many times longer small kernels took at most when a host had put the machine's threads far from one another."""
    threads_apart_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """The part of the time in which it had."""


class Profile(Section):
    """All that `weightstream calibrate` has measured."""

    format: int = FORMAT
    measured_at: str
    machine: Machine
    product_sizes: Sizes
    attention_lengths: Sizes
    attention_width: int = Field(ge=1)
    kernel_elements: Sizes
    compute: tuple[Compute, ...] = Field(min_length=1)
    memory_bytes_per_s: Positive
    disk: DiskRates
    link: LinkRates | None = None
    executor: Executor
    contention: Contention
    codec: CodecRates | None = None
    """None in a profile from before it was measured: then non-zeros are taken to move as fast as copies in memory."""
    sparse: tuple[Curve, ...] = ()
    """Sparse products beside the dense one; none in a profile from before they were measured: then all is dense."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this version reads {FORMAT}")
        for compute in self.compute:
            for what, table, length in (
                ("products", compute.products, len(self.product_sizes) ** 3),
                ("attention", compute.attention, len(self.attention_lengths)),
                ("kernels", compute.kernels, len(self.kernel_elements)),
            ):
                for name, row in table.items():
                    if len(row) != length:
                        raise ValueError(
                            f"compute with {compute.threads} threads, {what} '{name}': expected {length} figures, "
                            f"found {len(row)}"
                        )
        return self

    def with_threads(self, threads: int) -> Compute:
        """The rates for so many threads, or for the number nearest to it."""
        return min(self.compute, key=lambda one: (abs(math.log(one.threads / threads)), one.threads))

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_text(_one_line_a_row(tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))), "utf-8")
        beside.replace(path)


def this_machine() -> Machine:
    """What is compared: the processor, its cores, memory, and the library that computes."""
    return Machine(
        processor=_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        torch=str(torch.__version__),
    )


def load_profile(path: Path | None = None, warn: Callable[[str], None] = lambda text: None) -> Profile:
    """Read a profile; what differs from the machine at hand is warned of.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = (path or DEFAULT_PATH).expanduser()
    try:
        profile = Profile.model_validate(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"no profile of this machine at {path}: run `weightstream calibrate` first") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path} is no TOML ({error}): run `weightstream calibrate` anew") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        said = first["msg"].replace("Input should be", "expected")
        found = f", found {first['input']!r}" if isinstance(first["input"], str | int | float) else ""
        raise ConfigError(f"profile {path}: {where}: {said}{found}; run `weightstream calibrate` anew") from None
    differing = differences(profile.machine, this_machine())
    if differing:
        warn(f"profile {path} is of another machine ({'; '.join(differing)}): what it predicts may be far off here")
    return profile


def differences(profiled: Machine, here: Machine) -> list[str]:
    """In words; memory may differ a little, since kernels keep some for themselves."""
    found: list[str] = []
    pairs: Mapping[str, tuple[object, object]] = {
        "processor": (profiled.processor, here.processor),
        "cores": (profiled.cores, here.cores),
        "torch": (profiled.torch, here.torch),
    }
    for what, (then, now) in pairs.items():
        if then != now:
            found.append(f"{what} {then}, here {now}")
    if abs(profiled.memory_bytes / here.memory_bytes - 1) > 0.1:
        found.append(f"memory {profiled.memory_bytes} bytes, here {here.memory_bytes}")
    return found


def _line(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _one_line_a_row(text: str) -> str:
    """Rows of numbers on one line each: so the file stays as long as it has rows."""
    return re.sub(
        r"\[\n((?:\s+[-+0-9.e]+,\n)+)\]", lambda found: "[" + ", ".join(found[1].replace(",", " ").split()) + "]", text
    )
