"""What is known, while a model is built, of the numbers in each tensor's storage.

Notes go by storage, so views and aliases need no care: a step on a row of a matrix is a step on a region of its
storage. What the generator cannot replay blocks the storage with the reason, until something overwrites all of it.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weightstream.store.recipes import DRAWS, Operation, Region

# A tensor of data up to this size is kept in the recipe, number by number; it makes a few ten kilobytes of JSON.
LITERAL_ELEMENTS = 4096


class Draw:
    """The random numbers of one random operation. Reordered ones know from which they come."""

    def __init__(self, root: "Draw | None" = None) -> None:
        self.root: Draw = self if root is None else root


@dataclass
class Note:
    """A step on a storage: `Step` before parameters have names."""

    operation: Operation
    values: tuple[float, ...] = ()
    region: Region | None = None
    draw: Draw | None = None


@dataclass
class Track:
    """What is known of a storage: the steps that made its numbers, or why they cannot be replayed."""

    notes: list[Note] = field(default_factory=list)
    blocked: str | None = None
    label: str | None = None  # of the parameter it became
    unreal: bool = False  # the storage holds no numbers, although it is not on the meta device
    heirs: list["Track"] = field(default_factory=list)  # parameters that copied it and do not see later changes

    @property
    def random(self) -> bool:
        return self.blocked is not None or any(note.draw is not None for note in self.notes)


class Tracks:
    """The tracks of all storages that are alive; forgets those that are not."""

    def __init__(self) -> None:
        self._tracks: dict[int, tuple[StorageWeakRef, Track]] = {}
        self._purge_at = 4096

    def find(self, tensor: Tensor) -> Track | None:
        """What is known of the tensor's storage."""
        entry = self._tracks.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def set(self, tensor: Tensor, track: Track) -> Track:
        if len(self._tracks) >= self._purge_at:
            self._tracks = {key: entry for key, entry in self._tracks.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self._purge_at = max(4096, 2 * len(self._tracks))
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being given to another storage, but not the memory.
        self._tracks[storage._cdata] = (StorageWeakRef(storage), track)  # type: ignore[no-untyped-call]
        return track

    def forget(self, tensor: Tensor) -> None:
        """From here on the tensor is data like any other."""
        self._tracks.pop(tensor.untyped_storage()._cdata, None)

    def block(self, tensor: Tensor, reason: str) -> None:
        """From here on the numbers of the tensor's storage are unknown."""
        track = self.find(tensor) or self.set(tensor, Track())
        track.blocked = track.blocked or reason  # the first reason is the cause
        self.changed(track)

    def assign(self, target: Tensor, operation: Operation, values: tuple[float, ...] = ()) -> Note | None:
        """Note that all elements of `target` get values of their own; None if its elements overlap."""
        region, track = self.place(target)
        if track is None:
            return None
        note = Note(operation, values, region, Draw() if operation in DRAWS else None)
        self._overwrite(track, [note], region)
        return note

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Note that `source`, broadcast if need be, goes to `target`, in which the same element may lie elsewhere."""
        known = self.find(source)
        region, track = self.place(target)
        if track is None:
            self.block(target, f"copy_ to elements that overlap {where()}")
        elif known is None and not source.is_meta:
            self._literal(target, track, region, source)
        elif known is None:
            self.block(target, f"copy_ from a tensor on the meta device, made elsewhere {where()}")
        elif known.blocked is not None:
            self.block(target, known.blocked)
        else:
            notes = self._carried(known, source, target, region)
            if notes is None:
                self.block(target, f"copy_ of a part of a tensor, or of one that was filled in parts {where()}")
            else:
                self._overwrite(track, notes, region)

    def _literal(self, target: Tensor, track: Track, region: Region | None, source: Tensor) -> None:
        if source.numel() == 1:
            self._overwrite(track, [Note("fill", (float(source.item()),), region)], region)
        elif target.numel() > LITERAL_ELEMENTS:
            self.block(target, f"copy_ from a tensor of data of shape {tuple(source.shape)} {where()}")
        else:
            values = source.to(torch.float32).expand(target.shape).flatten()
            grid = torch.zeros(1, dtype=torch.int64)
            for size, stride in zip(target.shape, target.stride(), strict=True):
                grid = grid[..., None] + torch.arange(size) * stride
            order = grid.flatten().argsort()  # data lie in order of their place in the storage
            self._overwrite(track, [Note("literal", tuple(values[order].tolist()), region)], region)

    def _carried(self, known: Track, source: Tensor, target: Tensor, region: Region | None) -> list[Note] | None:
        """The notes of `source`, as notes on `target`; None where elements would need numbers of other elements."""
        dims = [(n, s) for n, s in zip(source.shape, source.stride(), strict=True) if n > 1]
        own = [(n, s) for n, s in zip(target.shape, target.stride(), strict=True) if n > 1]
        if region is None and dims == own and region_of(source) is None:
            return list(known.notes)
        if any(note.region is not None or note.operation == "literal" for note in known.notes):
            return None
        draws = {note.draw: Draw(note.draw.root) for note in known.notes if note.draw is not None}
        if draws and (source.shape != target.shape or overlaps(source)):
            return None  # elements that are equal would be drawn apart
        return [
            Note(note.operation, note.values, region, draws[note.draw] if note.draw is not None else None)
            for note in known.notes
        ]

    def number(self, value: Any) -> float | None:
        """A plain number, also one in a tensor that holds data."""
        if isinstance(value, bool | int | float):
            return float(value)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex():
            track = self.find(value)
            return None if track is not None and (track.random or track.unreal) else float(value.item())
        return None

    def place(self, target: Tensor) -> tuple[Region | None, Track | None]:
        """Where a view lies in its storage (None: everywhere) and what is known of that; no track if it overlaps."""
        track = self.find(target) or self.set(target, Track())
        if overlaps(target):
            return None, None
        return region_of(target), track

    def _overwrite(self, track: Track, notes: Iterable[Note], region: Region | None) -> None:
        if region is None:
            track.notes, track.blocked = list(notes), None
        else:
            track.notes = [note for note in track.notes if note.region != region] + list(notes)
        self.changed(track)

    def changed(self, track: Track) -> None:
        for heir in track.heirs:
            heir.blocked = f"a change through another view of its memory, after it was registered {where()}"


REMEDY = "import the weights instead of generating them, or initialise it with torch.nn.init functions"


def region_of(view: Tensor) -> Region | None:
    """Where a view without overlaps lies in its storage; None if it is all of it."""
    elements = view.untyped_storage().nbytes() // view.element_size()
    if view.numel() == elements:
        return None
    return Region.of(view.storage_offset(), view.shape, view.stride()) if view.numel() else Region(0, (0,), (1,))  # type: ignore[arg-type]


def overlaps(view: Tensor) -> bool:
    return view.numel() > 0 and Region.of(view.storage_offset(), view.shape, view.stride()) is None  # type: ignore[arg-type]


def where() -> str:
    """The line of the model's code that is running, for messages."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "contextlib") and not module.startswith("weightstream.store."):
            return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    return ""


def initialiser() -> str | None:
    """The function of torch.nn.init that is running, as the model's code called it."""
    names = [
        frame.f_code.co_name
        for frame in _frames()
        if frame.f_globals.get("__name__") == "torch.nn.init" and not frame.f_code.co_name.startswith("_")
    ]
    return names[-1] if names else None


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        if frame.f_back is None:
            return
        frame = frame.f_back
