"""One compute thread: the models are so small that a second one only waits, and spins where the machine is shared."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products that repeat bit for bit


@pytest.fixture(autouse=True)
def kernels_that_repeat(request: pytest.FixtureRequest, one_thread: None) -> Iterator[None]:
    """On an accelerator bits can only be compared where a kernel gives the same ones twice."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
