"""One compute thread: the models are so small that a second one only waits, and spins where the machine is shared."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products that repeat bit for bit


_TIED_ON_AMD = (
    "test_streamed_equals_resident[gpt2", "test_streamed_equals_resident[t5", "test_layers_that_are_split[gpt2",
    "test_layers_that_are_split[t5", "test_a_step_that_is_not_finite_is_skipped_alike[",
    "test_micro_batches_may_change_in_number_from_step_to_step",
)  # fmt: skip


def _on_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A known failure: tied models (GPT-2, T5) differ from the reference by a rounding of single gradients on an AMD
    processor (Zen 4), and are equal on an Intel one with the same versions; benchmarks/LOG.md has what is known."""
    if not _on_amd():
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.name.startswith(_TIED_ON_AMD):
            item.add_marker(pytest.mark.xfail(reason="tied models on AMD: see benchmarks/LOG.md", strict=False))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def kernels_that_repeat(request: pytest.FixtureRequest) -> Iterator[None]:
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
