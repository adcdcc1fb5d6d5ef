"""Compiles the products, once for each machine, compiler and version of the source; later processes load what is there.

A library is named after all that it depends on, and ends with the SHA-256 of its own bytes: one that is cut short or damaged is
never loaded, but made anew. It is put in its place as a whole, so that any number of processes may make it at once.
"""

import ctypes
import grp
import hashlib
import os
import platform
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("products.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fno-fast-math", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=default",
)  # fmt: skip
THREADS = ("-fopenmp",)
"""Threads are those of torch's own pool, wherever torch has loaded its OpenMP for all to see."""

_TIMEOUT_S = 120.0
_DIGEST_BYTES = hashlib.sha256().digest_size
_CPU_FACTS = ("model name", "flags", "Features", "CPU part")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@cache
def compiled() -> Compiled:
    """The products of this machine; the first time in a process that takes a compiler's seconds, if nobody else has.

    Threads that ask at once may each make it: what they find is the same.
    """
    reason = f"no C compiler is on the PATH, expected one of {', '.join(COMPILERS)}"
    for compiler in dict.fromkeys(found for name in COMPILERS if (found := shutil.which(name))):
        for flags in (FLAGS + THREADS, FLAGS):
            try:
                return Compiled(_load(compiler, flags))
            except (OSError, subprocess.SubprocessError) as error:
                reason = f"{compiler} made no library that can be loaded: {_said(error)}"
    return Compiled(None, reason)


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of the user's cache, made if need be; where nothing can be kept there, one that is made for this process.

    Raises:
        OSError: it cannot be loaded, or nothing can be written anywhere.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    name = f"products-{_key(compiler, flags)}.so"
    path: Path | None = None
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder.resolve())
        path = folder / name
        if _is_whole(path):
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="weightstream-native-") as made_in:
        made = Path(made_in) / name  # not in the cache: a compiler does not say whether that is full
        _compile(compiler, flags, made)
        if path is not None:
            with suppress(OSError):
                _keep(made, path)
                return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(made))  # what is loaded needs no name any more


def cache_folder() -> Path:
    """Where libraries are kept.

    Raises:
        FileNotFoundError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "weightstream" / "native"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def _check_private(folder: Path) -> None:
    """What lies there is run, and anyone can make a library that is whole.

    Raises:
        PermissionError: others can put a library there, or another folder in the place of one on the way there.
    """
    for place in (folder, *folder.parents):
        about, others = place.stat(), stat.S_IWOTH
        if place == folder or not _is_own_group(about.st_gid):
            others |= stat.S_IWGRP
        renamed_by_owners = place != folder and about.st_mode & stat.S_ISVTX  # what is in it, as in /tmp
        if about.st_uid not in (0, os.geteuid()) or (about.st_mode & others and not renamed_by_owners):
            raise PermissionError(f"'{place}' may be written by others")


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's alone, as many systems give each one of the same name."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and not {*group.gr_mem} - {user.pw_name}


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S).stdout
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    facts = [*sources, " ".join(flags).encode(), compiler.encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(fact).digest() for fact in facts)).hexdigest()[:32]


def _processor() -> str:
    """What `-march=native` goes by."""
    facts = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for wanted in _CPU_FACTS:
        facts += [line for line in lines if line.startswith(wanted)][:1]
    return "\n".join(facts)


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """A whole library, in a folder that nobody else uses."""
    subprocess.run(
        [compiler, *flags, "-o", str(path), str(SOURCE)], capture_output=True, check=True, timeout=_TIMEOUT_S
    )
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _keep(made: Path, path: Path) -> None:
    """Puts a library in its place, as a whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        shutil.copyfile(made, whole)
        whole.chmod(0o700)
        whole.replace(path)


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        return next(
            (line for line in lines if "error" in line), lines[-1] if lines else f"it ended with {error.returncode}"
        )
    return str(error)


__all__ = ["COMPILERS", "FLAGS", "SOURCE", "THREADS", "Compiled", "cache_folder", "compiled"]
