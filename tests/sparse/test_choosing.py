"""The choice between dense and sparse products, from curves made by hand."""

import pytest
from pydantic import ValidationError

from weightstream.sparse.choosing import Curve, Piece, choose, crossover, speedup_of
from weightstream.sparse.kernels import Kernel


def curve(
    kernel: Kernel, *speedups: float, block: tuple[int, int] = (32, 32), tokens: int = 512, **more: object
) -> Curve:
    fields = {"dtype": "float32", "threads": 1, "densities": (0.01, 0.1, 1.0)} | more
    return Curve.model_validate({"kernel": kernel, "block": block, "tokens": tokens, "speedups": speedups} | fields)


def piece(density: float, block: tuple[int, int] = (32, 32), **more: object) -> Piece:
    return Piece(**{"block": block, "density": density, "dtype": "float32", "tokens": 512, "threads": 1} | more)  # type: ignore[arg-type]


def test_the_crossover_is_where_the_speedup_falls_to_one() -> None:
    assert crossover((0.01, 0.1, 1.0), (100.0, 10.0, 0.1)) == pytest.approx(10**-0.5)
    assert crossover((0.01, 0.1), (1.0, 2.0)) is None
    assert crossover((0.01, 0.1), (3.0, 2.0)) == 0.1
    assert crossover((0.01, 0.1, 1.0), (4.0, 0.25, 8.0)) == pytest.approx(
        10**-1.5
    )  # a kernel that wins again is not trusted


def test_speedups_between_measured_densities() -> None:
    one = curve("gathered", 100.0, 10.0, 0.1)
    assert one.speedup(10**-1.5) == pytest.approx(10**1.5)
    assert one.speedup(0.0) == 100.0
    assert curve("gathered", 8.0, 4.0, densities=(0.01, 0.1)).speedup(0.2) == 0.0
    assert one.prepared_speedup(10**-1.5) == one.speedup(10**-1.5)
    apart = curve("native", 8.0, 4.0, densities=(0.01, 0.1), prepared_speedups=(20.0, 10.0))
    assert apart.speedup(0.1) == 4.0
    assert [apart.prepared_speedup(density) for density in (0.001, 0.1, 0.2)] == [20.0, 10.0, 10.0]
    assert speedup_of([apart], "native", piece(0.2)) == 10.0


@pytest.mark.parametrize(
    ("what", "chosen"),
    [
        (piece(0.05), "gathered"),
        (piece(0.5), "gathered"),
        (piece(0.7), "dense"),
        (piece(0.005, (1, 1)), "csr"),
        (piece(0.05, (1, 1)), "dense"),
        (piece(0.005, (16, 16)), "csr"),  # smaller than what was measured for blocks, and elements divide everything
        (piece(0.05, (64, 96)), "gathered"),
        (piece(0.05, (64, 48)), "dense"),
        (piece(0.05, dtype="bfloat16"), "dense"),
        (piece(0.05, device="cuda"), "dense"),
        (piece(0.05, tokens=16), "bsr"),  # of this kernel there is one curve
        (piece(0.05, tokens=100), "gathered"),
    ],
)
def test_the_fastest_below_its_crossover(what: Piece, chosen: str) -> None:
    curves = [
        curve("gathered", 50.0, 8.0, 0.5), curve("gathered", 0.9, 0.5, 0.1, tokens=16), curve("bsr", 20.0, 6.0, 0.5),
        curve("csr", 4.0, 0.25, 0.1, block=(1, 1)),
    ]  # fmt: skip
    assert choose(curves, what) == choose(curves[::-1], what) == chosen


def test_nothing_measured_is_dense() -> None:
    assert choose([], piece(0.01)) == "dense"


def test_curves_that_are_none() -> None:
    with pytest.raises(ValidationError, match="ascending"):
        curve("csr", 1.0, 1.0, 1.0, densities=(0.1, 0.01, 1.0))
    with pytest.raises(ValidationError, match="expected 3 speedups"):
        curve("csr", 1.0)
    with pytest.raises(ValidationError, match="expected 3 speedups, one per density, found 2"):
        curve("native", 3.0, 2.0, 1.0, prepared_speedups=(3.0, 2.0))
