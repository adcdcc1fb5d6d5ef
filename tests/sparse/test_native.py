"""The compiled products: exact for any shape, same bits for any threads, and made anew wherever what is kept is of no use."""

import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sparse.exact import DTYPES, check, sides
from torch._subclasses.fake_tensor import FakeTensorMode

from weightstream.engine.multiplying import _structure_bytes
from weightstream.errors import ConfigError
from weightstream.sparse.kernels import Kernel, multiply, supports
from weightstream.sparse.native import compiling
from weightstream.sparse.native.compiling import FLAGS, THREADS, cache_folder, compiled
from weightstream.sparse.native.products import obstacle
from weightstream.sparse.structure import Structure
from weightstream.worker.expanding import Driven

CPU = torch.device("cpu")
BLOCKS = ((1, 1), (2, 3), (16, 16), (17, 19), (24, 40), (32, 32), (50, 16), (96, 48))
MACHINES = (("native", THREADS), ("haswell", THREADS), ("x86-64", ()))

pytestmark = pytest.mark.skipif(obstacle() is not None, reason="no C compiler")


@pytest.fixture
def threads() -> Iterator[None]:
    """Their number may be set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, and nothing is loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.cache_clear()
    yield cache_folder()
    compiled.cache_clear()


def kept_at_random(grid: tuple[int, int], density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), block=st.sampled_from(BLOCKS), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.integers(0, 150), density=st.sampled_from([0.0, 0.2, 0.6, 1.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    dtype: torch.dtype, block: tuple[int, int], grid: tuple[int, int], tokens: int, density: float, seed: int
) -> None:
    """Tails of every vector, tile and pair; lines without any block."""
    check(Structure(kept_at_random(grid, density, seed), block), "native", tokens, dtype, seed)


@pytest.mark.parametrize(("machine", "extra"), MACHINES, ids=str)
def test_any_machine(machine: str, extra: tuple[str, ...], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide vectors with products of pairs, narrower ones, the narrowest; with and without OpenMP. Panels and chunks of
    tokens, of which the last is cut short."""
    if machine != "native" and platform.machine() != "x86_64":
        pytest.skip("another kind of machine")
    if machine == "haswell" and not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("it has no AVX2")
    flags = (*(flag.replace("-march=native", f"-march={machine}") for flag in FLAGS), "-Wall", "-Wextra", "-Werror")
    monkeypatch.setattr(compiling, "FLAGS", (*flags, "-Wno-unused-parameter", "-Wno-unknown-pragmas"))
    monkeypatch.setattr(compiling, "THREADS", extra)
    assert compiled().library is not None, compiled().reason
    for dtype in DTYPES:
        for block, grid in (((32, 32), (5, 40)), ((18, 20), (4, 5)), ((1, 1), (40, 90))):
            check(Structure(kept_at_random(grid, 0.3), block), "native", 301, dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("tokens", [3, 260])
def test_same_bits_for_any_threads(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> None:
    """More threads than tiles of tokens, too; and one line that has most of the blocks."""
    kept = kept_at_random((40, 30) if block == (1, 1) else (9, 7), 0.2)
    kept[3] = True
    kept[:, 2] = True
    kept[5] = False
    structure = Structure(kept, block)
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(sides(structure, "native", tokens, dtype)[0])
    for other in found[1:]:
        assert all(torch.equal(found[0][what], other[what]) for what in found[0])


def test_tokens_that_do_not_lie_together() -> None:
    """A slice of wider rows, and the gradient of a sum, which is one number for all."""
    structure = Structure(kept_at_random((2, 3), 0.7), (16, 16))
    weight = torch.randn(structure.shape) * structure.mask()
    values = weight[structure.mask()].view(-1, 1).requires_grad_()
    wide = torch.randn(10, 2, 100)
    x = wide[..., 3:51].requires_grad_()
    y = multiply(x, values, None, structure, "native")
    torch.testing.assert_close(y, x @ weight.t())
    of_x, of_values = torch.autograd.grad(y.sum(), (x, values))
    torch.testing.assert_close(of_x, weight.sum(0).expand(10, 2, -1))
    dense = x.sum((0, 1)).expand(structure.shape)
    torch.testing.assert_close(of_values.view(-1), dense[structure.mask()])


@pytest.mark.parametrize("block", [(16, 16), (1, 1)], ids=str)
def test_values_that_do_not_lie_together(block: tuple[int, int]) -> None:
    """A column of a wider matrix; and the NaN that stands for a parameter that is not there: it is in every result."""
    structure = Structure(torch.ones(3, 2, dtype=torch.bool), block)
    values = torch.randn(structure.nnz, 2)[:, :1]
    x = torch.randn(20, structure.shape[1], requires_grad=True)
    y = multiply(x, values, None, structure, "native")
    dense = values.reshape(structure.shape[0] // block[0], block[0], structure.shape[1]).view(structure.shape)
    torch.testing.assert_close(y, x @ dense.t())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dense.sum(0).expand_as(x))
    absent = torch.full((1,), torch.nan).expand(structure.nnz, 1)
    y = multiply(x, absent, None, structure, "native")
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), x)[0].isnan().all()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_that_lie_nowhere_are_refused() -> None:
    """Reading them would end the process."""
    structure = Structure(torch.ones(2, 2, dtype=torch.bool), (16, 16))
    with pytest.raises(ConfigError, match="one dtype and device, found x .* on cpu and 1024 values of .* on meta"):
        multiply(torch.ones(2, 32), torch.ones(1024, 1, device="meta"), None, structure, "native")
    with FakeTensorMode(), pytest.raises(ConfigError, match="found a FakeTensor of .*2, 32.* that lies nowhere"):
        multiply(torch.ones(2, 32), torch.ones(1024, 1), None, structure, "native")
    check(structure, "native", 2, torch.float32)  # nothing of theirs was kept


@pytest.mark.parametrize("block", [(16, 16), (1, 1)], ids=str)
def test_masks_of_bytes_and_other_default_devices(block: tuple[int, int]) -> None:
    """Memory is asked for where the library can write, and as much as is written: what is not zero is there."""
    kept = torch.tensor([[2, 0, 255], [0, 0, 0], [1, 7, 128]], dtype=torch.uint8)
    structure = Structure(kept.view(torch.bool), block)
    dense = torch.randn(structure.shape) * Structure(kept != 0, block).mask()
    x = torch.randn(5, structure.shape[1])
    with torch.device("meta"):
        y = multiply(x, dense[dense != 0], None, structure, "native")
    torch.testing.assert_close(y, x @ dense.t())


@pytest.mark.parametrize("kernel", ["native", "csr"])
@pytest.mark.parametrize("block", [(32, 32), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_what_is_found_out_about_a_mask_is_planned_for(kernel: Kernel, block: tuple[int, int], density: float) -> None:
    if not supports(kernel, block, torch.float32, CPU):
        pytest.skip("no MKL")
    structure = Structure(kept_at_random((320 // block[0], 640 // block[1]), density), block)
    check(structure, kernel, 3, torch.float32)
    module = torch.nn.Linear(640, 320)
    assert held(structure) <= _structure_bytes(Driven(module, kernel, block, structure.nnz)) + 16 * (640 + 320)


def held(one: object) -> int:
    """Bytes of the tensors that an object holds."""
    if isinstance(one, torch.Tensor):
        return one.nbytes
    if isinstance(one, dict | tuple | list):
        return sum(held(part) for part in (one.values() if isinstance(one, dict) else one))
    if is_dataclass(one):
        return sum(held(getattr(one, field.name)) for field in fields(one))
    if isinstance(one, Structure):
        return held({name: part for name, part in vars(one).items() if part is not one})
    return 0


class TestWhatIsKept:
    """With a library that is made faster."""

    @pytest.fixture(autouse=True)
    def small(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        source = tmp_path / "small.c"
        source.write_text("int answer(void) { return 42; }\n")
        monkeypatch.setattr(compiling, "SOURCE", source)
        return source

    def test_is_loaded_by_the_next_process(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert answered()
        compiled.cache_clear()
        monkeypatch.setattr(compiling, "_compile", _never)
        assert answered()

    def test_is_another_one_of_another_source(self, cache: Path, small: Path) -> None:
        assert answered()
        small.write_text("int answer(void) { return 43; }\n")
        compiled.cache_clear()
        assert not answered()
        assert len(list(cache.iterdir())) == 2

    @pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
    def test_is_made_anew_if_it_is_damaged(self, damage: str, cache: Path, small: Path) -> None:
        """Seen by another process, since this one goes on with what it has loaded."""
        assert subprocess.run(loading(small), timeout=120).returncode == 42
        (library,) = cache.iterdir()
        whole = library.read_bytes()
        at = len(whole) // 3
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        library.write_bytes({"cut": whole[: len(whole) // 2], "changed": changed, "empty": b""}[damage])
        assert subprocess.run(loading(small), timeout=120).returncode == 42
        assert [path.name for path in cache.iterdir()] == [library.name]
        content = library.read_bytes()
        assert hashlib.sha256(content[:-32]).digest() == content[-32:]

    def test_may_be_made_by_several_at_once(self, cache: Path, small: Path) -> None:
        processes = [subprocess.Popen(loading(small)) for _ in range(3)]
        assert [process.wait(timeout=120) for process in processes] == [42, 42, 42]
        assert len(list(cache.iterdir())) == 1

    def test_is_not_needed(self, cache: Path) -> None:
        """A file is where the folder should be: the library is made for this process."""
        cache.parent.mkdir(parents=True)
        cache.write_text("no folder")
        assert answered()

    def test_is_not_needed_where_the_disk_is_full(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A compiler that finds no room says so in its own words; copying what it has made elsewhere fails as copying does."""
        real = next(found for name in compiling.COMPILERS if (found := shutil.which(name)))
        compiler = tmp_path / "bin" / "cc"
        compiler.parent.mkdir()
        compiler.write_text(
            f'#!/bin/sh\ncase "$*" in *{cache}*) echo "final link failed: No space left on device" >&2; exit 1;; esac\n'
            f'exec {real} "$@"\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(compiler.parent), prepend=os.pathsep)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfile", full)
        assert answered()
        assert list(cache.iterdir()) == []

    def test_is_not_needed_by_users_without_a_home(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a container that runs under a number nobody knows."""
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        with pytest.raises(OSError, match="home"):
            cache_folder()
        assert answered()

    def test_is_not_believed_where_others_can_write(self, cache: Path, small: Path) -> None:
        """A library that is whole, and another one: it would run with this user's rights."""
        assert subprocess.run(loading(small), timeout=120).returncode == 42
        (library,) = cache.iterdir()
        source = small.read_text()
        small.write_text(source.replace("42", "43"))
        compiling._compile(next(filter(shutil.which, compiling.COMPILERS)), FLAGS, library)
        small.write_text(source)
        assert subprocess.run(loading(small), timeout=120).returncode == 43
        for mode in (0o770, 0o707):
            cache.chmod(mode)
            assert subprocess.run(loading(small), timeout=120).returncode == 42

    @pytest.mark.parametrize(
        ("mode", "believed"),
        [(0o755, True), (0o1777, True), (0o770, True), (0o777, False), (0o707, False)],
        ids=["one's own", "sticky", "one's own group's", "everyone's", "others'"],
    )
    def test_is_not_believed_where_others_can_put_another_folder(
        self, mode: int, *, believed: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One above it counts, too, but for the group that is this user's alone, and where only owners rename."""
        assert answered()
        cache.parents[1].chmod(mode)
        monkeypatch.setattr(compiling, "_is_own_group", lambda number: number == os.getegid())
        compiled.cache_clear()
        made = []
        monkeypatch.setattr(
            compiling, "_compile", lambda *told, compile=compiling._compile: made.append(compile(*told))
        )
        assert answered()
        assert (not made) == believed


class TestWithoutACompiler:
    def test_there_is_no_such_kernel(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not supports("native", (32, 32), torch.float32, CPU)
        structure = Structure(torch.ones(1, 1, dtype=torch.bool), (2, 2))
        with pytest.raises(
            ConfigError, match="'native' needs a C compiler .* no C compiler is on the PATH.*install one"
        ):
            multiply(torch.ones(1, 2), torch.ones(4, 1), None, structure, "native")
        assert supports("gathered", (32, 32), torch.float32, CPU)

    def test_one_that_fails_is_quoted(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho 'fatal error: no such processor' >&2\n[ \"$1\" = --version ]\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not supports("native", (32, 32), torch.float32, CPU)
        assert "no such processor" in (obstacle() or "")
        assert [path for path in cache.rglob("*") if path.is_file()] == []


def answered() -> bool:
    found = compiled()
    assert found.library is not None, found.reason
    return bool(found.library.answer() == 42)


def loading(source: Path) -> list[str]:
    """A process that loads the library of this source, and ends with its answer."""
    code = """
import sys
from pathlib import Path
from weightstream.sparse.native import compiling
compiling.SOURCE = Path(sys.argv[1])
sys.exit(compiling.compiled().library.answer())
"""
    return [sys.executable, "-c", code, str(source)]


def _never(*_: object) -> None:
    raise AssertionError("what is there is whole")
