"""Safetensors files written as their tensors come, one at a time: the header is known before the first of them."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from weightstream.store.layout import DTYPE_NAMES
from weightstream.store.segments import bytes_of


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to come."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """One file; `tensors` gives them in the order of `entries`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.nbytes]
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets
        }  # fmt: skip
        offset = offsets[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text), b" ")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tuple(tensor.shape) == entry.shape
            file.write(bytes_of(tensor.to(entry.dtype)))
        file.flush()
        os.fsync(file.fileno())


def shards(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Cut in order, none above the bound unless a single tensor is."""
    found: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if found[-1] and filled + entry.nbytes > max_shard_bytes:
            found.append([])
            filled = 0
        found[-1].append(entry)
        filled += entry.nbytes
    return found
