"""The demonstration, part by part.

A byte-level decoder with two layers of 256**4 experts (`bytewise.py`) is trained out of a store by child processes. In the
middle of it they are killed with SIGKILL, three times, at random moments, and started again. Then the same steps are
taken once more without kills, in a branch of the snapshot from before the first of them: both digests must be equal. At
the end the trained store is branched for two learning rates.

This process never imports PyTorch: what its children did is in their messages, and in a file of metrics beside each store.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from weightstream.demo_120t.child import Child
from weightstream.demo_120t.progress import KILLS, Facts, Progress
from weightstream.demo_120t.summary import HEADING, moved_over_least, row
from weightstream.errors import PlanError, WeightstreamError
from weightstream.training.metrics import read_metrics
from weightstream.units import format_bytes, format_seconds

OUT = Path("runs/demo-120t")
OTHER_RATES = (5e-4, 4e-3)  # beside `bytewise.LEARNING_RATE`
BRANCH_STEPS = 4
MAIN, AGAIN = "killed", "again"
BEFORE, TRAINED = "before the kills", "trained"
PARTS = 7
_OTHER_BYTES = 512 << 20
"""Text, all parameters but experts, a file of dead bytes and a commit."""


def run(console: Console, out: Path = OUT, steps: int | None = None, sizes: Mapping[str, int] | None = None) -> Facts:
    """The demonstration, or what is left of it.

    Args:
        out: its folder, some gigabytes; what is done there is not done again.
        steps: of the run that is killed; by default 24, or as many as were begun there.
        sizes: other sizes of the model (`bytewise.Bytewise`).

    Raises:
        ConfigError: too few steps, or a folder that holds something else.
        PlanError: the disk has no room for what the steps will reach.
        WeightstreamError: a process failed; its own words are in the message.
    """
    folder = out.absolute()
    return _Demonstration(console, folder, Progress.begun(folder, steps, dict(sizes or {}))).run()


class _Demonstration:
    def __init__(self, console: Console, folder: Path, progress: Progress) -> None:
        self.console, self.folder, self.progress = console, folder, progress
        self._since_s = time.monotonic()
        self._number = 0  # of the part

    def run(self) -> Facts:
        steps, before = self.progress.steps, self.progress.before
        if done := len(self.progress.done):
            self._say(f"going on in {self.folder}, where {done} parts of {PARTS} are done", "bold")
        self._part("text", "text, and what its steps will reach", self._look_ahead)
        self._part("trained", f"a new store, {before} steps", partial(self._train, MAIN, before, hold=BEFORE))
        self._part(
            "killed", f"on to step {steps}, killed with SIGKILL {KILLS} times at random moments",
            partial(self._train, MAIN, steps, hold=TRAINED, digest=True, killed=True),
        )  # fmt: skip
        self._part(
            "again", f"steps {before + 1} to {steps} once more and never killed, in a branch of '{BEFORE}'", self._again
        )
        self._part("branched", f"the trained store branched for {len(OTHER_RATES)} learning rates", self._branched)
        for rate in OTHER_RATES:
            work = partial(self._train, branch_name(rate), steps + BRANCH_STEPS, lr=rate)
            self._part(branch_name(rate), f"{BRANCH_STEPS} steps at a learning rate of {rate:g}", work)
        return self._report()

    def _part(self, name: str, title: str, work: Callable[[], Facts]) -> None:
        """Does one part, unless it is done, and notes what it came to."""
        self._number += 1
        if name in self.progress.done:
            return
        self._say(f"{self._number}/{PARTS}  {title}", "bold")
        self.progress.done[name] = work()
        self._save()

    def _save(self) -> None:
        now_s = time.monotonic()
        self.progress.seconds += now_s - self._since_s
        self._since_s = now_s
        self.progress.disk_bytes = max(self.progress.disk_bytes, disk_bytes(self.folder))
        self.progress.save(self.folder)

    # parts

    def _look_ahead(self) -> Facts:
        """What the steps will reach is known beforehand, and so is whether the disk has room for it."""
        steps = self.progress.steps
        ahead = self._ask("look_ahead", self.folder, self.progress.sizes, steps + BRANCH_STEPS)
        most = room_bytes(ahead, before=self.progress.before, steps=steps)
        free = shutil.disk_usage(self.folder).free
        different, each = ahead["different"][steps], format_bytes(ahead["record_bytes"])
        self._say(
            f"{different:,} different experts in {steps} steps, {each} each; all files at most {format_bytes(most)}"
        )
        if most > free:
            raise PlanError(
                f"demo 120t: {steps} steps need up to {format_bytes(most)}, the disk of '{self.folder}' has "
                f"{format_bytes(free)} free; give fewer --steps, or an --out on another disk"
            )
        return ahead | {"most_bytes": most}

    def _train(
        self,
        store: str,
        until: int,
        *,
        lr: float | None = None,
        hold: str | None = None,
        digest: bool = False,
        killed: bool = False,
    ) -> Facts:
        """Trains a store until a step, in as many processes as it takes."""
        self._say(HEADING, "dim")
        settings: Facts = {"sizes": self.progress.sizes, "until": until, "snapshot": hold, "digest": digest, "lr": lr}
        while True:
            left = self.progress.planned[len(self.progress.kills) :] if killed else []
            with Child("train", self.folder, store, **settings) as child:
                for kind, facts in child.messages():
                    self._seen(kind, facts)
                    if kind == "done":
                        return facts
                    if left and kind in ("opened", "step") and facts["step"] >= left[0][0]:
                        found = self._kill(child, facts["step"], left[0][1])
                        if found is not None:
                            return found
                        break
                else:
                    raise WeightstreamError(f"a process of the demo ended by itself, with exit code {child.code}")

    def _kill(self, child: Child, step: int, part: float) -> Facts | None:
        """Kills a process after a part of the step that it is in; what it came to, if it had done all before."""
        wait_s = part * median(line["seconds"] for line in self._metrics(MAIN))
        time.sleep(wait_s)
        child.kill()
        for kind, facts in child.messages():  # said before it was killed
            self._seen(kind, facts)
            if kind == "done":
                return facts
            step = facts.get("step", step)
        self.progress.kills.append({"after_step": step, "waited_s": wait_s, "part": part})
        self._save()
        self._say(f"SIGKILL {wait_s:.2f} s later, with step {step} as the last that was finished", "bold red")
        return None

    def _again(self) -> Facts:
        """The steps in which it was killed, in one go."""
        self._ask("branch", self.folder, MAIN, BEFORE, [AGAIN])
        return self._train(AGAIN, self.progress.steps, digest=True)

    def _branched(self) -> Facts:
        shutil.rmtree(self.folder / AGAIN, ignore_errors=True)  # its digest is known
        self._ask("let_go", self.folder, MAIN, BEFORE)
        held = disk_bytes(self.folder)
        found = self._ask("branch", self.folder, MAIN, TRAINED, [branch_name(rate) for rate in OTHER_RATES])
        found |= {"store_bytes": held, "more_bytes": disk_bytes(self.folder) - held}
        self._say(
            f"{len(OTHER_RATES)} branches in {format_seconds(found['seconds'])}; {format_bytes(found['more_bytes'])} more "
            f"beside the {format_bytes(held)} that they share"
        )
        return found

    # children

    def _ask(self, function: str, *arguments: Any) -> Facts:
        """What a process came to that is not meant to be killed."""
        with Child(function, *arguments) as child:
            for kind, facts in child.messages():
                self._seen(kind, facts)
                if kind == "done":
                    return facts
            raise WeightstreamError(f"a process of the demo ended by itself, with exit code {child.code}")

    def _seen(self, kind: str, facts: Facts) -> None:
        if kind == "opened":
            opened = f"store opened in {facts['seconds']:.2f} s, at step {facts['step']}"
            self._say(f"process {facts['pid']}: {opened}", "green")
        elif kind == "step":
            self._say(row(facts))
            self.progress.disk_bytes = max(self.progress.disk_bytes, disk_bytes(self.folder))
        elif kind == "note":
            self._say(facts["text"], "yellow")

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))

    # what it came to

    def _metrics(self, store: str) -> list[Facts]:
        return read_metrics(self.folder / f"{store}.jsonl")

    def _report(self) -> Facts:
        progress, steps = self.progress, self._metrics(MAIN)
        done = progress.done
        branches = {f"{rate:g}": [line["loss"] for line in self._metrics(branch_name(rate))] for rate in OTHER_RATES}
        return {
            "equal": done["killed"]["digest"] == done["again"]["digest"],
            "digest_killed": done["killed"]["digest"],
            "digest_not_killed": done["again"]["digest"],
            "steps": progress.steps,
            "killed_after_step": [kill["after_step"] for kill in progress.kills],
            "compared_from_step": progress.before + 1,
            **done["killed"]["model"],
            "different_experts": done["killed"]["different"],
            "losses": [line["loss"] for line in steps],
            "losses_by_rate": branches,
            **{
                f"{name}_per_step": median(line[name] for line in steps)
                for name in ("touched", "new", "seconds", "read", "written")
            },
            "read_bytes": sum(line["read"] for line in steps),
            "written_bytes": sum(line["written"] for line in steps),
            "moved_over_least": median(moved_over_least(line) for line in steps if not line["first"]),
            "peak_rss_bytes": max(line["rss"] for line in steps),
            "disk_bytes": progress.disk_bytes,
            "branch_seconds": done["branched"]["seconds"],
            "branch_bytes": done["branched"]["more_bytes"],
            "dense": done["killed"]["dense"],
            "seconds": progress.seconds,
            "folder": str(self.folder),
        }


def branch_name(rate: float) -> str:
    """The store of a learning rate."""
    return f"lr {rate:g}"


def disk_bytes(folder: Path) -> int:
    """What the files below a folder take; those with several names count once."""
    found: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                status = Path(where, name).lstat()
            except FileNotFoundError:  # of a store at work
                continue
            found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(found.values())


def room_bytes(ahead: Facts, *, before: int, steps: int) -> int:
    """The most that the files of a demonstration will take, given what its steps reach (`training.look_ahead`).

    Nothing takes more than what is ever written: a record for each expert that a step reaches, in the run, in the control
    from its snapshot on and in the branches, and what compaction copies of these (`store/compaction.py`).
    """
    reached = ahead["reached"]
    again = reached[steps] - reached[before]
    branches = len(OTHER_RATES) * (reached[steps + BRANCH_STEPS] - reached[steps])
    records = (1 + ahead["compaction_share"]) * (reached[steps] + again + branches)
    return int(records * ahead["record_bytes"]) + _OTHER_BYTES
