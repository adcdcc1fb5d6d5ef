"""A small decoder on bytes whose layers have experts without end: what `weightstream demo 120t` trains, and
`benchmarks/headline.py` measures.

A layer is attention and a layer of experts (`weightstream.nn.StreamedExperts`), to which a hash of the last four bytes
leads: there are as many texts of four bytes as experts in a layer, 256**4. The text is that of Python's standard library,
with whole files held out. A step's text is a function of the step alone, so that all who train it train on the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightstream.data.documents import STDLIB, Document, find_documents, split_documents
from weightstream.errors import ConfigError
from weightstream.nn import HashRouter, StreamedExperts

BYTES = 256
HEAD_WIDTH = 64
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-3, 0.1, 1.0
HELD_OUT = 0.02
TEXTS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Bytewise:
    """The model's size, and one step's tokens in `micro_batches` of equal size.

    `experts` are those of each layer, to which a hash of the last `context` bytes leads; 0: layers have attention alone.

    Raises:
        ConfigError: sizes that do not go together.
    """

    layers: int = 2
    width: int = 256
    hidden: int = 28
    experts: int = 256**4
    context: int = 4
    tokens: int = 1024
    micro_batches: int = 2
    length: int = 256

    def __post_init__(self) -> None:
        if self.width % HEAD_WIDTH:
            raise ConfigError(
                f"width must be a multiple of {HEAD_WIDTH}, that of an attention head, found {self.width}"
            )
        if self.tokens % (self.micro_batches * self.length):
            raise ConfigError(
                f"tokens must be a multiple of {self.micro_batches} micro-batches of sequences of {self.length}, found "
                f"{self.tokens}"
            )

    def build(self) -> "Decoder":
        return Decoder(self)

    def experts_of(self, layer: int) -> StreamedExperts:
        """A layer's experts."""
        return StreamedExperts(self.width, self.hidden, self.experts, 1, self.router(layer))

    def router(self, layer: int) -> HashRouter:
        """What leads to the experts of a layer."""
        return HashRouter(self.context, seed=layer)

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

    def reached(self, text: Tensor, steps: Iterable[int]) -> list[list[Tensor]]:
        """The experts that each of these steps will reach, without repeats, by layer: the router knows them beforehand."""
        found = []
        for step in steps:
            batches = self.batches(text, step)
            routed = [
                [self.router(layer).beforehand(batch["input_ids"], self.experts, 1).flatten() for batch in batches]
                for layer in range(self.layers)
            ]
            found.append([torch.cat(numbers).unique() for numbers in routed])
        return found

    def _micro_batches(self, rows: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        size = self.tokens // self.length // self.micro_batches
        found = [torch.stack(list(rows[first : first + size])).long() for first in range(0, len(rows), size)]
        return [{"input_ids": ids, "labels": ids} for ids in found]


class Layer(nn.Module):
    def __init__(self, workload: Bytewise, index: int) -> None:
        super().__init__()
        width = workload.width
        self.heads = width // HEAD_WIDTH
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.experts: StreamedExperts | None = None
        if workload.experts:
            self.experts_norm = nn.LayerNorm(width)
            self.experts = workload.experts_of(index)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
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
    """Nats per byte."""
    return model(**micro_batch)  # type: ignore[no-any-return]


def write_text(folder: Path) -> None:
    """The text as bytes in two files, `TEXTS`; those that are there are whole and stay."""
    if all((folder / name).is_file() for name in TEXTS):
        return
    split = split_documents(find_documents([STDLIB], base=folder), HELD_OUT)
    for name, documents in zip(TEXTS, (split.train, split.validation), strict=True):
        partial = folder / f"{name}.partial"
        partial.write_bytes(b"".join(map(_bytes_of, documents)))
        partial.replace(folder / name)


def _bytes_of(document: Document) -> bytes:
    return "".join(document.pieces()).encode()


def read_text(folder: Path, name: str) -> Tensor:
    """A text as a tensor of bytes, read from disk as it is used."""
    return torch.from_numpy(np.memmap(folder / name, dtype=np.uint8, mode="c"))
