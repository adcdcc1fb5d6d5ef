"""What `headline.py` trains, `weightstream.demo_120t.bytewise`, as a side (`turns.py`).

python benchmarks/bytewise.py --store runs/x --experts 4294967296 --steps 3       # alone: seconds, loss, what was reached
"""

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from turns import serve

import weightstream as ws
from weightstream.demo_120t.bytewise import (
    CLIP_NORM,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Bytewise,
    loss_fn,
    read_text,
    write_text,
)
from weightstream.errors import ConfigError
from weightstream.nn import HashRouter


@dataclass(frozen=True, kw_only=True)
class Measured(Bytewise):
    """The model as command-line arguments.

    With `reaches`, text leads to so many experts only, which are spread over the family: then families of all sizes are
    reached alike.
    """

    reaches: int = 0

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, *without: str) -> None:
        for field in fields(cls):
            if field.name not in without:
                parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        try:
            return cls(**{field.name: getattr(arguments, field.name, field.default) for field in fields(cls)})
        except ConfigError as error:
            raise SystemExit(str(error)) from None

    def arguments(self) -> list[str]:
        """The command-line arguments that make this workload again in another process."""
        return [
            text
            for field in fields(self)
            for text in (f"--{field.name.replace('_', '-')}", str(getattr(self, field.name)))
        ]

    def router(self, layer: int) -> HashRouter:
        return SpreadRouter(self.reaches, self.context, seed=layer) if self.reaches else super().router(layer)


class SpreadRouter(HashRouter):
    """A hash that leads to `reaches` experts only, spread evenly over however many there are."""

    def __init__(self, reaches: int, tokens: int, seed: int) -> None:
        super().__init__(tokens, seed)
        self.reaches = reaches

    def check(self, d_model: int, experts: int, top_k: int) -> None:
        if not top_k <= self.reaches <= experts:
            raise ConfigError(f"SpreadRouter: expected {top_k} to {experts:,} experts to reach, found {self.reaches:,}")

    def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Tensor:
        return super().beforehand(ids, self.reaches, top_k) * (experts // self.reaches)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"reached": self.reaches}


class BytewiseSide:
    """One engine on a new store, which is removed at the end."""

    def __init__(self, workload: Measured, arguments: argparse.Namespace) -> None:
        self.workload, self.arguments, self.store = workload, arguments, Path(arguments.store)
        if self.store.exists():
            raise SystemExit(f"{self.store} exists; give a new folder")
        self.text, self.held_out = (read_text(arguments.text, name) for name in ("train", "held_out"))
        self.engine, self.created_s = self.open()
        self.losses: list[float] = []
        self.new = 0  # experts reached for the first time, that is, different ones reached so far

    def open(self) -> tuple[ws.Engine, float]:
        """The engine, and the seconds that it took to open."""
        arguments, started = self.arguments, time.perf_counter()
        engine = ws.Engine(
            self.workload.build,
            self.store,
            ws.AdamW(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
            clip_norm=CLIP_NORM,
            device_memory=arguments.device_memory,
            host_memory=arguments.host_memory,
            experts_memory=arguments.experts_memory,
            threads_per_worker=arguments.threads,
            log=lambda text: print(text, file=sys.stderr),
        )
        return engine, time.perf_counter() - started

    def step(self) -> dict[str, Any]:
        result = self.engine.step(self.workload.batches(self.text, len(self.losses) + 1), loss_fn)
        self.losses.append(result.loss)
        new = sum(facts.new for facts in result.experts.values())
        self.new += new
        return {
            "loss": result.loss,
            "touched": sum(facts.touched for facts in result.experts.values()),
            "new": new,
            "read": result.bytes.read,
            "written": result.bytes.written,
            "stalled_s": result.stalled_s,
            "seconds": dict(result.seconds),
        }

    def close(self) -> dict[str, Any]:
        """Losses so far and on held-out text, experts reached, and how long the store then takes to open."""
        found = {"created_s": self.created_s, "losses": self.losses, "touched_experts": self.new}
        if self.arguments.sequences:
            found["validation_loss"] = self.validation_loss()
        self.engine.close()
        engine, found["open_s"] = self.open()
        engine.close()
        shutil.rmtree(self.store)
        return found

    def validation_loss(self) -> float:
        with self.engine.module() as model:
            batches = self.workload.held_out(self.held_out, self.arguments.sequences)
            losses = [(float(loss_fn(model, batch)), batch["labels"][:, 1:].numel()) for batch in batches]
        return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device-memory", default="256MiB")
    parser.add_argument("--host-memory", default="256MiB")
    parser.add_argument("--experts-memory", default="768MiB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sequences", type=int, default=32, help="of held-out text; 0: no validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--text", type=Path, help="folder of the text's files; default: made anew beside the store")
    Measured.add_arguments(parser)
    add_settings(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="answer commands on standard input (see turns.py)")
    arguments = parser.parse_args()
    workload = Measured.of(arguments)
    if arguments.text is None:
        arguments.text = Path(f"{arguments.store}-text")
        arguments.text.mkdir(parents=True)
        write_text(arguments.text)
    if arguments.serve:
        serve(lambda: BytewiseSide(workload, arguments))
        return
    side = BytewiseSide(workload, arguments)
    print(f"{workload.parameter_count():,} parameters, opened in {side.created_s:.3f} s")
    for number in range(arguments.steps):
        started = time.perf_counter()
        facts = side.step()
        print(f"step {number + 1} {time.perf_counter() - started:.3f} s  {facts}")
    print(side.close())


if __name__ == "__main__":
    main()
