"""The launcher over ranks that only count: losses, stops and refusals, and that nobody is left behind, ever."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.forks import Command

from weightstream.system.processes import children

FAKE = Path(__file__).with_name("fake_rank.py")
STARTER = """
import sys
from pathlib import Path
from weightstream.launch.launcher import Launch, Launcher
folder, ranks, restarts, port = Path(sys.argv[1]), *map(int, sys.argv[2:5])
def progress():
    try:
        return len((folder / "steps").read_text().split())
    except FileNotFoundError:
        return 0
launch = Launch(command=(sys.argv[5],), arguments=(str(folder), *sys.argv[6:]), ranks=ranks, address="127.0.0.1",
                port=port, threads=3, store=folder / "store", restarts=restarts)
sys.exit(Launcher(launch, lambda text: print(text, file=sys.stderr, flush=True), progress).run())
"""
_PATIENCE_S = 60.0


class Started:
    """A launcher in a process of its own, as a shell would start it; or `forked`, and so is all that it starts."""

    def __init__(
        self, folder: Path, steps: int, *faults: str, ranks: int = 2, restarts: int = 3, port: int = 0,
        forked: bool = True,
    ) -> None:  # fmt: skip
        self.folder = folder
        folder.mkdir(exist_ok=True)
        arguments = [str(folder), str(ranks), str(restarts), str(port), str(FAKE), str(steps), *faults]
        command = [sys.executable, "-c", STARTER, *arguments]
        environment = {**os.environ, "TMPDIR": str(folder)}  # where a killed launcher leaves its board
        self.process: Command | subprocess.Popen[str]
        if forked:
            self.process = Command(command, folder, environment)
        else:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; by then all that it started is gone."""
        out, err = self.process.communicate(timeout=_PATIENCE_S)
        self.nobody_left()
        return self.process.returncode, out, err

    def nobody_left(self) -> None:
        deadline_s = time.monotonic() + 5
        while alive := [pid for pid in self.pids() if _alive(pid)]:
            assert time.monotonic() < deadline_s, f"left behind: {alive}"
            time.sleep(0.02)

    def pids(self) -> list[int]:
        return [int(path.name.split("-")[2]) for path in self.folder.glob("pid-*")]

    def rank_pid(self, rank: int) -> int:
        return max(int(path.name.split("-")[2]) for path in self.folder.glob(f"pid-{rank}-*"))

    def until_step(self, step: int) -> None:
        self.until(lambda: self.steps() >= step)

    def steps(self) -> int:
        place = self.folder / "steps"
        return len(place.read_text().split()) if place.exists() else 0

    def until(self, happened: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.005)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ranks_run_and_the_first_one_reports(tmp_path: Path) -> None:
    run = Started(tmp_path, 5, ranks=3, forked=False)
    assert run.ended() == (0, "report\n", "")
    assert run.steps() == 5
    assert (tmp_path / "threads").read_text() == "3"
    assert len(run.pids()) == 3


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("die=0@3", "rank 0 was killed by SIGKILL (by a person, or by the system for want of memory)"),
        ("die=2@3", "rank 2 was killed by SIGKILL"),
        ("hang=1@3", "ended: waited 1 s for the others"),
        ("fail=1@3", "rank 1 ended: ValueError: broken"),
    ],
)
def test_a_lost_rank_is_named_and_all_go_on(tmp_path: Path, fault: str, cause: str) -> None:
    run = Started(tmp_path, 6, fault, ranks=3)
    code, out, err = run.ended()
    assert code == 0, err
    assert [int(line) for line in (tmp_path / "steps").read_text().split()] == list(range(1, 7))
    assert cause in err, err
    assert "(restart 1 of at most 3 without progress)" in err
    assert "resumed at step 3 after " in out
    assert out.endswith("report\n")


def test_losses_with_progress_in_between_are_no_reason_to_give_up(tmp_path: Path) -> None:
    run = Started(tmp_path, 4, "die=0@2", "die=1@3", "die=0@4", restarts=1)
    code, out, err = run.ended()
    assert code == 0, err
    assert err.count("restart 1 of at most 1") == 3
    assert out.count("resumed at step") == 3


def test_losses_without_progress_are(tmp_path: Path) -> None:
    run = Started(tmp_path, 4, "again_die=1@2", restarts=1)
    code, _, err = run.ended()
    assert code == 1
    assert "given up after 1 restarts without progress" in err
    assert run.steps() == 1


@pytest.mark.parametrize(
    ("fault", "said"), [("refuse=1@2", "rank 1: the disk is full"), ("refuse_all=all@2", "all say no")]
)
def test_a_refusal_is_said_once_and_final(tmp_path: Path, fault: str, said: str) -> None:
    assert Started(tmp_path, 4, fault).ended() == (2, "", f"weightstream: {said}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_ranks_after_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    run = Started(tmp_path, 10_000)
    run.until_step(3)
    run.process.send_signal(number)
    code, out, err = run.ended()
    assert (code, out, err) == (128 + number, "", "")
    done = run.steps()
    again = Started(tmp_path, done + 2)
    assert again.ended() == (0, "report\n", "")
    assert [int(line) for line in (tmp_path / "steps").read_text().split()] == list(range(1, done + 3))


def test_a_stop_before_the_ranks_train_is_at_once(tmp_path: Path) -> None:
    run = Started(tmp_path, 10_000, forked=False)  # forked ranks could train already when the signal comes
    run.until(lambda: bool(children(run.process.pid)))
    run.process.send_signal(signal.SIGINT)
    began_s = time.monotonic()
    code, _, err = run.ended()
    assert code == 130
    assert time.monotonic() - began_s < 5
    assert "SIGINT: stopped at once" in err


def test_a_second_stop_is_at_once(tmp_path: Path) -> None:
    run = Started(tmp_path, 10_000)
    run.until_step(2)
    os.kill(run.rank_pid(0), signal.SIGSTOP)  # the step will not end
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    began_s = time.monotonic()
    code, _, err = run.ended()
    assert code == 130
    assert time.monotonic() - began_s < 5
    assert "stopped at once" in err


@pytest.mark.parametrize("when", ["starting", "training", "hanging"])
def test_a_killed_launcher_leaves_nobody(tmp_path: Path, when: str) -> None:
    run = Started(tmp_path, 10_000, forked=when != "starting")  # an agent that is still importing
    if when == "starting":
        run.until(lambda: bool(children(run.process.pid)))
    else:
        run.until_step(2)
    agents = children(run.process.pid)
    if when == "hanging":
        os.kill(run.rank_pid(1), signal.SIGSTOP)
        os.kill(agents[0].pid, signal.SIGSTOP)
    run.process.kill()
    run.process.communicate()
    run.nobody_left()
    deadline_s = time.monotonic() + 5
    while any(agent.alive for agent in agents):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    done = run.steps()
    again = Started(tmp_path, done + 1)
    assert again.ended()[0] == 0


def test_a_killed_agent_is_a_loss_like_another(tmp_path: Path) -> None:
    run = Started(tmp_path, 200)
    run.until_step(2)
    (agent,) = children(run.process.pid)
    agent.kill()
    code, _, err = run.ended()
    assert code == 0
    assert "the ranks' launcher ended before them" in err


def test_the_rendezvous_listens_on_loopback_only(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = Started(tmp_path, 10_000, port=port)
    run.until_step(1)
    listening = {
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }
    assert listening in ({f"0100007F:{port:04X}"}, {f"0000000000000000FFFF00000100007F:{port:04X}"})
    run.process.send_signal(signal.SIGTERM)
    assert run.ended()[0] == 143


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = Started(tmp_path, 2, port=taken.getsockname()[1]).ended()
    assert code == 2
    assert err.startswith("weightstream: the rendezvous cannot listen on 127.0.0.1, port ")
    assert len(err.splitlines()) == 1
