"""Profiles as files: what is written is read, and everything else is refused with what to do."""

from pathlib import Path

import pytest
import tomli_w
from tests.machine.profiles import profile

from weightstream.errors import ConfigError
from weightstream.machine.profile import load_profile, this_machine


def test_round_trip(tmp_path: Path) -> None:
    here = profile(machine=this_machine())
    path = tmp_path / "new" / "profile.toml"
    here.save(path)
    said: list[str] = []
    assert load_profile(path, said.append) == here
    assert said == []
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.toml"]


def test_a_profile_from_before_sparse_products_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    profile(sparse=(), codec=None).save(path)
    text = path.read_text()
    path.write_text(text.replace("sparse = []\n", ""))
    assert path.read_text() != text
    assert load_profile(path).sparse == ()
    assert load_profile(path).codec is None


def test_rows_are_lines(tmp_path: Path) -> None:
    """As many lines as rows, however many figures each has."""
    profile().save(tmp_path / "p.toml")
    text = (tmp_path / "p.toml").read_text()
    assert '"nt bfloat16" = [1000000000.0, 1000000000.0,' in text
    assert len(text.splitlines()) < 160


def test_another_machine_is_warned_of(tmp_path: Path) -> None:
    profile().save(tmp_path / "p.toml")
    said: list[str] = []
    load_profile(tmp_path / "p.toml", said.append)
    (warning,) = said
    assert "processor abacus, here" in warning
    assert "torch 2.0, here" in warning


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "no TOML|Field required"),
        (lambda text: text.replace("threads = 1", "threads = 0"), "compute.0.threads: expected greater"),
        (lambda text: text.replace("cores", "kores"), "machine.cores: Field required"),
        (lambda text: "speed = 3\n" + text, "Extra inputs are not permitted"),
        (lambda text: text.replace("format = 1", "format = 2"), "format 2, this version reads 1"),
        (lambda text: text.replace("[16, 256]", "[256, 16]"), "product_sizes: .*ascending order"),
        (lambda text: text.replace("[16, 256]", "[16, 256, 512]"), "expected 27 figures, found 8"),
        (lambda text: text.replace("between_steps_s = 0.001", "between_steps_s = nan"), "between_steps_s"),
        (lambda text: text.replace("[0.01, 0.1, 1.0]", "[0.1, 0.01, 1.0]"), "sparse.0: .*densities in ascending order"),
        (lambda text: text.replace('"gathered"', '"scattered"'), "sparse.0.kernel"),
        (lambda text: "\x00" + text, "no TOML"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, change: object, said: str) -> None:
    path = tmp_path / "p.toml"
    profile().save(path)
    before = path.read_text()
    path.write_text(change(before))  # type: ignore[operator]
    assert path.read_text() != before
    with pytest.raises(ConfigError, match=said) as refused:
        load_profile(path)
    assert "weightstream calibrate" in str(refused.value)


def test_no_profile_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `weightstream calibrate` first"):
        load_profile(tmp_path / "absent.toml")
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe" + tomli_w.dumps({"format": 1}).encode())
    with pytest.raises(ConfigError, match="no TOML"):
        load_profile(tmp_path / "p.toml")


def test_the_nearest_number_of_threads() -> None:
    assert [profile().with_threads(threads).threads for threads in (1, 2, 8)] == [1, 2, 2]
