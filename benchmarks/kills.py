"""SIGKILL at random moments of a training run: how many finished steps it costs, and whether the run ends the same.

    python benchmarks/kills.py --kills 200 --json

A small Llama trains on the standard library's text. Its processes are killed one after another, each at a random moment
of its life: reading the text, opening the store, some steps, closing. The next process goes on from what it finds. What
is killed is `weightstream.commands.run.fit` on the disk at `--scratch` (`killed.py` says how, and why this is a killed
command). First and last piece of the killed run, and the whole of the undisturbed one, are the command `weightstream fit`
itself. A process is told to train `--piece` steps beyond where the run stands, so every kill meets a running process; one that
ended before its moment counts as no kill.

Keys: `kills`, `lost_steps_max` (steps that a process had finished and the next one did not find; promised: at most 2
with clipping, 1 without), `lost_steps` (how many kills cost so many), `digest_equal` (against the undisturbed run),
`verified` and `damage` (`store verify` after every `--verify-every`th kill), `fell_in` (what the main thread did),
`fell_during` (what other threads did), `before_opening` (kills of processes that had not opened the store yet).
The exit code is 1 if the promise is broken.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import killed
from results import SCRATCH, provenance, write
from scratch import scratch

from weightstream.config.config import RunConfig, check_config

PROMISED_LOSS = {True: 2, False: 1}  # steps at most, with clipping and without
_PATIENCE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--piece", type=int, default=8, help="steps that a process is told to train")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--verify-every", type=int, default=10, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder on the disk for the stores")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    arguments = parser.parse_args()
    with scratch(arguments.scratch, "kills") as folder:
        result = {"benchmark": "kills"} | experiment(arguments, folder)
    name = "kills" + ("-no-clip" if arguments.no_clip else "")
    write(name, result | provenance(arguments.kills), as_json=arguments.json, record=not arguments.no_record)
    if broken := [what for what, holds in promises(result).items() if not holds]:
        raise SystemExit(f"the promise is broken: {', '.join(broken)}")


def promises(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold, by name."""
    return {
        "lost_steps_max": result["lost_steps_max"] <= result["promised_loss"],
        "digest_equal": result["digest_equal"],
        "damage": not result["damage"],
    }


def experiment(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill, go on, and compare with a run that nobody disturbed."""
    began_s = time.perf_counter()
    run = KilledRun(arguments, folder)
    run.stands = run.command(run.folder, arguments.piece)  # prepares the text and makes the store
    span_s = median(run.piece() for _ in range(3))
    moments, killing_s = random.Random(arguments.seed), time.perf_counter()
    verified, damaged = 0, []
    while len(run.kills) < arguments.kills:
        before = len(run.kills)
        run.piece(moments.uniform(0.0, span_s))
        if len(run.kills) > before and len(run.kills) % arguments.verify_every == 0:
            verified += 1
            damaged += run.damage()
            done = f"{len(run.kills)}/{arguments.kills} kills, at step {run.stands}, most lost {run.most_lost()}"
            print(f"{done}, {time.perf_counter() - killing_s:.0f} s", file=sys.stderr)
    killing_s = time.perf_counter() - killing_s
    run.piece()  # finds what the last kill left
    steps = run.command(run.folder, run.stands + arguments.piece)
    whole_s = time.perf_counter()
    run.command(folder / "whole", steps)
    whole_s = time.perf_counter() - whole_s
    damaged += run.damage()
    digests = [run.digest(path) for path in (folder / "whole", run.folder)]
    opened = [kill for kill in run.kills if kill.stood is not None]
    return {
        "kills": len(run.kills), "lost_steps_max": run.most_lost(), "digest_equal": digests[0] == digests[1],
        "promised_loss": PROMISED_LOSS[not arguments.no_clip], "clipped": not arguments.no_clip,
        "lost_steps": _sorted(Counter(str(kill.lost) for kill in opened)),
        "before_opening": len(run.kills) - len(opened),
        "fell_in": _sorted(Counter(kill.phase for kill in run.kills)),
        "fell_during": _sorted(Counter(name for kill in run.kills for name in kill.during)),
        "verified": verified + 1, "damage": damaged, "steps": steps, "ended_before_their_moment": run.ended,
        "layers": arguments.layers, "width": arguments.width, "piece_steps": arguments.piece,
        "piece_s": span_s, "killing_s": killing_s, "undisturbed_s": whole_s,
        "seconds": time.perf_counter() - began_s, "seed": arguments.seed,
        "digest": digests[1], "digest_undisturbed": digests[0],
    }  # fmt: skip


@dataclass
class Kill:
    """One kill: what the process was doing, and the last step that it had found or finished (None: not open yet)."""

    phase: str
    during: tuple[str, ...]
    stood: int | None
    lost: int = 0


class KilledRun:
    """A run whose processes are killed. `stands` is the last step that one of them had finished."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.log = arguments, folder / "killed", folder / "killed.log"
        killed.check_alone(self.log)
        self.stands, self.ended = 0, 0
        self.kills: list[Kill] = []
        self._unanswered: list[Kill] = []  # no process has opened the store since

    def piece(self, kill_after_s: float | None = None) -> float:
        """One process, to its end or to its kill; the seconds that it lived."""
        config = self._config(self.folder, self.stands + self.arguments.piece)
        began_s = time.perf_counter()
        fork = killed.Fork(lambda seen: killed.fit(config, seen), self.log)
        code = fork.end(_PATIENCE_S if kill_after_s is None else kill_after_s)
        seconds, seen = time.perf_counter() - began_s, fork.seen
        if code not in (0, -signal.SIGKILL) or (code and kill_after_s is None):
            raise SystemExit(f"a process of the killed run ended with code {code}; its last words:\n{self._words()}")
        opened = seen.opened >= 0
        if opened:
            for kill in self._unanswered:
                kill.lost = max(0, kill.stood - seen.opened)
            self._unanswered.clear()
            self.stands = max(seen.opened, seen.finished)
        if code:
            kill = Kill(killed.PHASES[seen.phase], seen.during, self.stands if opened else None)
            self.kills.append(kill)
            self._unanswered += [kill] if opened else []
        elif kill_after_s is not None:
            self.ended += 1
        return seconds

    def most_lost(self) -> int:
        return max((kill.lost for kill in self.kills), default=0)

    def damage(self) -> list[str]:
        """What `store verify` finds now, as a reader beside the run would."""
        log = self.folder / "verify.log"
        log.unlink(missing_ok=True)
        if killed.Fork(lambda _: killed.verify(self.folder / "store"), log).end(_PATIENCE_S) == 0:
            return []
        return [f"after kill {len(self.kills)}: {line}" for line in log.read_text().splitlines()[-15:]]

    def command(self, out: Path, steps: int) -> int:
        """The command `weightstream fit`, to this step."""
        out.mkdir(exist_ok=True)
        file = out / "kills.yaml"
        file.write_text(self._config(out, steps).to_yaml(), encoding="utf-8")
        return int(self._weightstream("fit", file)["step"])

    def digest(self, out: Path) -> str:
        return str(self._weightstream("store", "digest", out)["digest"])

    def _weightstream(self, *arguments: str | Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "weightstream", *map(str, arguments), "--json"]
        with self.log.open("a") as log:
            process = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}; its last words:\n{self._words()}")
        return dict(json.loads(process.stdout))

    def _words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def _config(self, out: Path, steps: int) -> RunConfig:
        """The learning rate is constant: it must not depend on where a process is told to stop."""
        stdlib, width = Path(sysconfig.get_path("stdlib")), self.arguments.width
        return check_config(
            {
                "model": {
                    "model_type": "llama",
                    "hidden_size": width,
                    "intermediate_size": width * 11 // 4,
                    "num_hidden_layers": self.arguments.layers,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 32,
                },
                "data": {
                    "sources": [str(stdlib / name) for name in ("asyncio", "json", "email")],
                    "tokenizer": {"size": 1024},
                },
                "optimizer": {"lr": 1e-3, "schedule": "constant"},
                "training": {
                    "steps": steps,
                    "micro_batches": 2,
                    "micro_batch_size": 1,
                    "sequence_length": 32,
                    "clip_norm": None if self.arguments.no_clip else 1.0,
                    "validation": {"sequences": 2},
                    "snapshots": {"every": 10},
                    "tensorboard": False,
                },
                "engine": {
                    "reduction_groups": 2,
                    "threads_per_worker": 1,
                    "device_memory": "16MiB",
                    "host_memory": "64MiB",
                    "ram_tier": False,
                },
                "out": str(out),
            },
            source="kills",
        )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(counts.most_common())


if __name__ == "__main__":
    main()
