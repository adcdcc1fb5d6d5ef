"""Random state travels with a micro-batch: what it draws does not depend on what others drew in between."""

import hashlib
import random

import numpy as np
import torch

from weightstream.worker.generators import Generators, seed_of


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand()), torch.randn(()).item(), random.gauss(0, 1)]


def test_the_seed_is_the_contracts() -> None:
    digest = hashlib.sha256(b"3,7,2").digest()
    assert seed_of(3, 7, 2) == int.from_bytes(digest[:8], "little") >> 1
    assert 0 <= seed_of(0, 0, 0) < 2**63
    assert len({seed_of(s, n, i) for s in range(5) for n in range(5) for i in range(5)}) == 125


def test_seed_state_and_restore() -> None:
    generators = Generators(torch.device("cpu"))
    generators.seed(5)
    start = generators.state()
    first, middle, second = draw(), generators.state(), draw()
    assert first != second
    generators.seed(6)
    draw()
    generators.restore(middle)
    assert draw() == second
    generators.restore(start)
    assert draw() + draw() == first + second
    generators.seed(5)
    assert draw() == first


def test_same_sees_every_generator() -> None:
    generators = Generators(torch.device("cpu"))
    generators.seed(5)
    before = generators.state()
    assert generators.same(before, generators.state())
    for drawn in (lambda: torch.rand(1), random.random, np.random.rand):
        generators.restore(before)
        drawn()
        assert not generators.same(before, generators.state())
