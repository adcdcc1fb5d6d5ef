"""Calibration with sizes so small that it takes seconds: what it gives is whole, and nothing is left behind."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from weightstream.errors import ConfigError
from weightstream.machine.calibrate import Effort
from weightstream.machine.kernels import name_of
from weightstream.machine.profile import load_profile
from weightstream.machine.reporting import calibrate_here
from weightstream.machine.sparsity import DTYPES, MEASURED
from weightstream.sparse.kernels import supports

TINY = Effort(
    product_sizes=(8, 32), attention_lengths=(16, 32), kernel_elements=(512, 4096), repeats=1, parameters=1 << 14,
    file_bytes=1 << 16, files=2, link_bytes=1 << 16, rank_round_s=0.01, executor_steps=2,
    sparse_shape=(64, 64), sparse_tokens=(8,), sparse_densities=(0.1, 0.5), patience_s=0.0,
)  # fmt: skip


@pytest.mark.slow
def test_everything_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    said: list[str] = []
    disk = tmp_path / "disk"
    found, text = calibrate_here(tmp_path / "p.toml", disk, 1, Console(quiet=True), TINY)
    profile = load_profile(tmp_path / "p.toml", said.append)
    assert said == []
    assert list(disk.iterdir()) == []
    assert json.loads(json.dumps(found))["profile"] == str(tmp_path / "p.toml")
    assert "AdamW" in text
    (compute,) = profile.compute
    assert set(compute.optimizer) == {"AdamW", "SGD", "Lion", "Adafactor"}
    rows = [row for name, row in compute.kernels.items() if name.startswith("_log_softmax ")]
    assert rows
    assert all(len(row) == len(TINY.kernel_elements) and min(row) > 0 for row in rows)
    assert profile.link is not None
    assert profile.codec is not None
    assert set(profile.codec.expand_s) == set(profile.codec.gather_s) == {1, 32}
    assert (profile.codec.prepare_s is not None) == supports("native", (1, 1), torch.float32, torch.device("cpu"))
    assert all(bool(one.prepared_speedups) == (one.kernel == "native") for one in profile.sparse)
    assert set(profile.contention.ranks) == {"2x1", "4x1"}
    assert {"forward", "backward", "turn", "update", "reduce", "load", "write", "begin"} <= set(
        profile.executor.operation_s
    )
    assert {(one.kernel, one.dtype) for one in profile.sparse} == {
        (kernel, name_of(dtype))
        for kernel, block in MEASURED
        for dtype in DTYPES
        if supports(kernel, block, dtype, torch.device("cpu"))
    }
    assert "gathered 32×32 float32, 8 tokens" in text


def test_where_nothing_can_be_kept_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightstream.machine.reporting.calibrate", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    console = Console(quiet=True)
    for out in (tmp_path, tmp_path / "file" / "p.toml"):
        with pytest.raises(ConfigError, match="a profile cannot be kept at .*; give another file by --out"):
            calibrate_here(out, tmp_path, 1, console, TINY)
    with pytest.raises(ConfigError, match="expected a folder on the disk that stores will be on, found a file"):
        calibrate_here(tmp_path / "p.toml", tmp_path / "file", 1, console, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
