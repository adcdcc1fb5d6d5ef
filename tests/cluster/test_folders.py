"""Folders of a launcher: gone when it ends, and when it was killed, gone with the next one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weightstream.system import folders
from weightstream.system.folders import memory_folder, temporary_folder

HOLDER = """
import sys, time, tempfile
from pathlib import Path
from weightstream.system import folders
tempfile.tempdir, folders._MEMORY = sys.argv[1], Path(sys.argv[1])
with folders.temporary_folder("kept-") as board, folders.memory_folder(Path(sys.argv[2])) as memory:
    (memory / "part").touch()
    print(board, memory, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    parent = tmp_path / "parent"
    parent.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(parent))
    monkeypatch.setattr(folders, "_MEMORY", parent)
    return parent


def held(parent: Path, store: Path) -> "tuple[subprocess.Popen[str], Path, Path]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(parent), str(store)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    board, memory = map(Path, process.stdout.readline().split())
    return process, board, memory


def killed(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_both_are_removed_at_the_end(parent: Path, tmp_path: Path) -> None:
    with temporary_folder("kept-") as board, memory_folder(tmp_path / "store") as memory:
        assert memory is not None
        assert memory.stat().st_mode & 0o077 == 0
        assert {board, memory} == set(parent.iterdir())
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    process, board, memory = held(parent, tmp_path / "store")
    with temporary_folder("kept-"), memory_folder(tmp_path / "other"), memory_folder(tmp_path / "store") as second:
        assert board.is_dir(), "its process is alive"
        assert memory.is_dir()
        assert second is None, "another process has it"
    killed(process)
    with temporary_folder("kept-"), memory_folder(tmp_path / "other"):
        assert not board.exists()
        assert (memory / "part").exists(), "its store may go on"
    with memory_folder(tmp_path / "store") as found:
        assert found == memory
        assert (memory / "part").exists(), "and finds it"


def test_memory_of_a_store_that_is_gone_is_removed(parent: Path, tmp_path: Path) -> None:
    process, _, memory = held(parent, tmp_path / "gone")
    killed(process)
    with memory_folder(tmp_path / "store"):
        assert not memory.exists()


def test_a_link_in_its_place_is_left_alone(parent: Path, tmp_path: Path) -> None:
    with memory_folder(tmp_path / "store") as folder:
        assert folder is not None
        name = folder.name
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").touch()
    (parent / name).symlink_to(target)
    with memory_folder(tmp_path / "store") as folder:
        assert folder is None
    assert (target / "file").exists()
