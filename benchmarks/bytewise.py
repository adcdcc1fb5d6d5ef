"""What `headline.py` trains: a small decoder on bytes whose layers have experts without end; and it as a side (`turns.py`).

A layer is attention and a layer of experts (`weightstream.nn.StreamedExperts`), to which a hash of the last four bytes
leads: there are as many texts of four bytes as experts in a layer, 256**4. The text is that of Python's standard library,
with whole files held out. A step's text is a function of the step alone, so that all sides train on the same.

python benchmarks/bytewise.py --store runs/x --experts 4294967296 --steps 3       # alone: seconds, loss, what was reached
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import serve

import weightstream as ws
from weightstream.data.documents import STDLIB, Document, find_documents, split_documents
from weightstream.errors import ConfigError
from weightstream.nn import HashRouter, StreamedExperts

BYTES = 256
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-3, 0.1, 1.0
HELD_OUT = 0.02


@dataclass(frozen=True, kw_only=True)
class Bytewise:
    """The model's size, and one step's tokens in `micro_batches` of equal size.

    `experts` are those of each layer, to which a hash of the last `context` bytes leads; 0: layers have attention alone.
    With `reached`, text leads to so many of them only, which are spread over the family: then families of all sizes are
    reached alike.
    """

    layers: int = 2
    width: int = 256
    hidden: int = 28
    experts: int = 256**4
    context: int = 4
    reached: int = 0
    tokens: int = 1024
    micro_batches: int = 2
    length: int = 256

    def __post_init__(self) -> None:
        if self.width % 64:
            raise SystemExit(f"--width must be a multiple of 64 (the width of an attention head), found {self.width}")
        if self.tokens % (self.micro_batches * self.length):
            raise SystemExit(
                f"--tokens must be a multiple of {self.micro_batches} micro-batches of sequences of {self.length}, found "
                f"{self.tokens}"
            )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, *without: str) -> None:
        for field in fields(cls):
            if field.name not in without:
                parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)

    @classmethod
    def of(cls, arguments: argparse.Namespace, **others: int) -> Self:
        given = {field.name: getattr(arguments, field.name, field.default) for field in fields(cls)}
        return cls(**(given | others))

    def arguments(self) -> list[str]:
        """The command-line arguments that make this workload again in another process."""
        return [
            text
            for field in fields(self)
            for text in (f"--{field.name.replace('_', '-')}", str(getattr(self, field.name)))
        ]

    def build(self) -> "Decoder":
        return Decoder(self)

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return 2 * self.width * self.hidden

    def parameter_count(self) -> int:
        with torch.device("meta"):
            resident = sum(parameter.numel() for parameter in self.build().parameters())
        return resident + self.layers * self.experts * self.expert_parameters

    def batches(self, text: Tensor, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of one step: places in the text drawn uniformly, a function of the step alone."""
        generator = torch.Generator().manual_seed(step)
        rows = self.tokens // self.length
        starts = torch.randint(text.numel() - self.length + 1, (rows,), generator=generator).tolist()
        return self._micro_batches([text[start : start + self.length] for start in starts])

    def held_out(self, text: Tensor, sequences: int) -> list[dict[str, Tensor]]:
        """Sequences spread evenly over a text."""
        count = min(sequences, text.numel() // self.length)
        starts = [index * (text.numel() - self.length) // max(count - 1, 1) for index in range(count)]
        return self._micro_batches([text[start : start + self.length] for start in starts])

    def _micro_batches(self, rows: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        size = self.tokens // self.length // self.micro_batches
        found = [torch.stack(list(rows[first : first + size])).long() for first in range(0, len(rows), size)]
        return [{"input_ids": ids, "labels": ids} for ids in found]


class SpreadRouter(HashRouter):
    """A hash that leads to `reached` experts only, spread evenly over however many there are."""

    def __init__(self, reached: int, tokens: int, seed: int) -> None:
        super().__init__(tokens, seed)
        self.reached = reached

    def check(self, d_model: int, experts: int, top_k: int) -> None:
        if not top_k <= self.reached <= experts:
            raise ConfigError(f"SpreadRouter: expected {top_k} to {experts:,} experts to reach, found {self.reached:,}")

    def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Tensor:
        return super().beforehand(ids, self.reached, top_k) * (experts // self.reached)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"reached": self.reached}


class Layer(nn.Module):
    def __init__(self, workload: Bytewise, index: int) -> None:
        super().__init__()
        width = workload.width
        self.heads = width // 64
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.experts: StreamedExperts | None = None
        if workload.experts:
            self.experts_norm = nn.LayerNorm(width)
            router = HashRouter(workload.context, seed=index)
            if workload.reached:
                router = SpreadRouter(workload.reached, workload.context, seed=index)
            self.experts = StreamedExperts(width, workload.hidden, workload.experts, 1, router)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x if self.experts is None else x + self.experts(self.experts_norm(x), input_ids)


class Decoder(nn.Module):
    def __init__(self, workload: Bytewise) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, workload.width)
        self.layers = nn.ModuleList(Layer(workload, index) for index in range(workload.layers))
        self.norm = nn.LayerNorm(workload.width)
        self.head = nn.Linear(workload.width, BYTES, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return F.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_fn(model: nn.Module, micro_batch: dict[str, Tensor]) -> Tensor:
    return model(**micro_batch)


def write_text(folder: Path) -> None:
    """The text as bytes in two files: `train`, `held_out`."""
    split = split_documents(find_documents([STDLIB], base=folder), HELD_OUT)
    for name, documents in (("train", split.train), ("held_out", split.validation)):
        (folder / name).write_bytes(b"".join(map(_bytes_of, documents)))


def _bytes_of(document: Document) -> bytes:
    return "".join(document.pieces()).encode()


def read_text(folder: Path, name: str) -> Tensor:
    """A text as a tensor of bytes, read from disk as it is used."""
    return torch.from_numpy(np.memmap(folder / name, dtype=np.uint8, mode="c"))


class BytewiseSide:
    """One engine on a new store, which is removed at the end."""

    def __init__(self, workload: Bytewise, arguments: argparse.Namespace) -> None:
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
    Bytewise.add_arguments(parser)
    add_settings(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="answer commands on standard input (see turns.py)")
    arguments = parser.parse_args()
    workload = Bytewise.of(arguments)
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
