"""`weightstream calibrate`: progress while it measures, and what it found in a few lines."""

import errno
import os
import time
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from weightstream.errors import ConfigError
from weightstream.machine.calibrate import Effort, calibrate
from weightstream.machine.profile import DEFAULT_PATH, Contention, Profile
from weightstream.units import format_bytes

BUSY = 0.05


def busy_share(seconds: float = 0.5) -> float:
    """How much of all cores is in use while this process sleeps; 0 where the system does not tell."""
    before = _ticks()
    time.sleep(seconds)
    busy, total = (after - earlier for after, earlier in zip(_ticks(), before, strict=True))
    return busy / total if total else 0.0


def _ticks() -> tuple[int, int]:
    try:
        values = [int(value) for value in Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(values) - values[3] - values[4], sum(values)  # without idling, and waiting for the disk


def calibrate_here(
    out: Path | None, disk: Path, threads: int | None, console: Console, effort: Effort | None = None
) -> tuple[dict[str, Any], str]:
    """Measures this machine and keeps the profile: it as JSON, and as text.

    Raises:
        ConfigError: there is no place for it, or no folder to measure the disk in; found before anything is measured.
    """
    path = (out or DEFAULT_PATH).expanduser()
    _require_place(path)
    if disk.exists() and not disk.is_dir():
        raise ConfigError(f"--disk {disk}: expected a folder on the disk that stores will be on, found a file")
    others = busy_share()
    if others > BUSY:
        console.print(
            f"other processes use {others:.0%} of this machine: what is measured now will be of no use; stop them first",
            markup=False,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("calibrate", total=1.0)
        profile = calibrate(
            disk, threads=threads, effort=effort,
            step=lambda what, part: progress.update(task, description=what, completed=part),
        )  # fmt: skip
    profile.save(path)
    return {"profile": str(path)} | profile.model_dump(mode="json"), profile_text(profile, path)


def _require_place(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"a profile cannot be kept at {path}: {error.strerror}; give another file by --out") from None


def profile_text(profile: Profile, path: Path) -> str:
    """The few figures that say most."""
    lines = [f"{profile.machine.processor}, {profile.machine.cores} cores, torch {profile.machine.torch}"]
    for compute in profile.compute:
        best = {dtype: max(max(row) for key, row in compute.products.items() if key.endswith(dtype))
                for dtype in ("bfloat16", "float32")}  # fmt: skip
        fast = f"{best['bfloat16'] / 1e9:.0f} GFLOP/s bf16, {best['float32'] / 1e9:.0f} fp32"
        updates = 1 / compute.optimizer["AdamW"] / 1e9
        lines.append(f"{compute.threads} threads    up to {fast}; AdamW {updates:.2f} G parameters/s")
    disk, link, executor = profile.disk, profile.link, profile.executor
    lines += [
        f"memory       {format_bytes(profile.memory_bytes_per_s)}/s copied",
        f"disk         read {format_bytes(disk.read_bytes_per_s)}/s, write {format_bytes(disk.write_bytes_per_s)}/s; both "
        f"at once {disk.together:.2f} of them",
    ]
    if link is not None:
        lines.append(
            f"link         down {format_bytes(link.broadcast_bytes_per_s)}/s, up {format_bytes(link.reduce_bytes_per_s)}/s, "
            f"{link.latency_s * 1e6:.0f} us"
        )
    slower = ", ".join(f"{key} {value:.2f}" for key, value in profile.contention.ranks.items())
    lines += [
        f"sparse       {one.kernel} {one.block[0]}×{one.block[1]} {one.dtype}, {one.tokens} tokens, {one.threads} threads: "
        + ("never faster than dense" if one.crossover is None else f"faster below {one.crossover:.1%}")
        for one in profile.sparse
        if one.threads == profile.compute[-1].threads
    ]
    lines += [
        f"overheads    forward {executor.operation_s['forward'] * 1e6:.0f} us, backward "
        f"{executor.operation_s['backward'] * 1e6:.0f} us, and {executor.kernel_s['forward'] * 1e6:.1f} us a kernel",
        f"ranks        times slower side by side: {slower or 'not measured'}",
        *_apart(profile.contention),
        f"kept as {path}",
    ]
    return "\n".join(lines)


def _apart(contention: Contention) -> list[str]:
    if not contention.threads_apart_share:
        return []
    return [
        f"disturbed    {contention.threads_apart_share:.0%} of the time: small kernels then took up to "
        f"{contention.threads_apart:.2f} times as long (a host moves this machine's processors, or others work on them). "
        "Figures are of the rest; steps in such times take longer than predicted"
    ]
