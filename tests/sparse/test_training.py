"""Sparse training from end to end equals masked dense training in memory, in every bit."""

from pathlib import Path

import pytest
import torch
from tests.sparse.masked import CASES, Reference, assert_equal_to, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("case", "clip_norm", "precision"),
    [
        ("static", None, "fp32"), ("static", 0.5, "bf16"), ("set", 0.5, "fp32"), ("rigl", None, "fp32"),
        ("rigl", 0.5, "bf16"), ("relative_rigl", 0.5, "bf16"), ("gmp", 0.5, "fp32"), ("gmp", None, "bf16"),
        ("phases", 0.5, "fp32"), ("global_gmp", 0.5, "fp32"), ("global_gmp", None, "bf16"), ("global_rigl", None, "fp32"),
    ],
)  # fmt: skip
def test_equals_masked_dense_training(case: str, clip_norm: float | None, precision: str, tmp_path: Path) -> None:
    """30 steps, over several mask updates: losses, norms, masks, weights and moments."""
    sparsity, rules = CASES[case]
    reference = Reference(rules, clip_norm, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    found = train(tmp_path / "store", sparsity, [30], clip_norm=clip_norm, precision=precision)
    assert found == [reference.step(step) for step in range(1, 31)]
    assert_equal_to(reference, tmp_path / "store")
