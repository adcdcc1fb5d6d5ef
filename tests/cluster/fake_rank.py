"""A rank that only counts: `python fake_rank.py --launched BOARD FOLDER STEPS [what=rank@step …]`.

Each step takes 20 ms, and is committed by rank 0 as a line of FOLDER/steps. `what` is one of: die (SIGKILL), hang
(SIGSTOP; where that is to happen the others give up after a second), fail (an exception), refuse, refuse_all. It happens
once: FOLDER/done-… is left.
"""

import os
import signal
import sys
import time
from pathlib import Path

from weightstream.errors import RefusedError, StoreError
from weightstream.launch.board import Board
from weightstream.launch.ranks import Place, as_rank, place


def main() -> int:
    option, board_folder, folder, steps, *faults = sys.argv[1:]
    assert option == "--launched"
    own = place()
    assert own is not None
    (Path(folder) / f"pid-{own.rank}-{os.getpid()}").touch()
    board = Board(Path(board_folder))
    return as_rank(own, board, lambda: work(own, board, Path(folder), int(steps), faults))


def work(own: Place, board: Board, folder: Path, steps: int, faults: list[str]) -> int:
    (folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])
    committed = folder / "steps"
    # A busy machine starts ranks seconds apart: no reason to give up, unless giving up is what a test is about.
    patience_s = 1.0 if any(fault.startswith("hang") for fault in faults) else 30.0
    first = len(committed.read_text().split()) if committed.exists() else 0
    if own.rank == 0:
        (folder / "stop").unlink(missing_ok=True)
        board.say_training()
    for step in range(first + 1, steps + 1):
        time.sleep(0.02)
        for fault in faults:
            what, _, where = fault.partition("=")
            if where == f"{own.rank}@{step}" or (what == "refuse_all" and where == f"all@{step}"):
                happen(what, folder / f"done-{fault.replace('=', '-')}")
        meet(folder, own, step, patience_s)  # only what all ranks have done is committed
        if own.rank == 0:
            with committed.open("a") as file:
                file.write(f"{step}\n")
            if loss := board.say_trains_again(step):
                print(f"resumed at step {loss.step} after {loss.seconds:.2f} s: {loss.cause}", flush=True)
            if number := board.stop_asked():
                (folder / "stop").write_text(str(number.value))
        meet(folder, own, step + 0.5, patience_s)
        if (folder / "stop").exists():
            return 128 + int((folder / "stop").read_text())
    if own.rank == 0:
        print("report", flush=True)
    return 0


def meet(folder: Path, own: Place, step: float, patience_s: float) -> None:
    """A barrier of files, in a folder of this start: that of the agent's process."""
    here = folder / f"meet-{os.getppid()}-{step}"
    here.mkdir(exist_ok=True)
    (here / str(own.rank)).touch()
    deadline_s = time.monotonic() + patience_s
    while len(list(here.iterdir())) < own.size:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {patience_s:g} s for the others")
        time.sleep(0.002)


def happen(what: str, mark: Path) -> None:
    if "again" not in what and mark.exists():
        return
    mark.touch()
    match what.removeprefix("again_"):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "fail":
            raise ValueError("broken")
        case "refuse":
            raise StoreError("the disk is full")
        case "refuse_all":
            raise RefusedError("all say no")


if __name__ == "__main__":
    sys.exit(main())
