"""Watches every tensor operation while a model is built, and notes what each did to the floating-point tensors.

Notes go by storage, so views and aliases need no care: a step on a row of a matrix is a step on a region of its
storage. What the generator cannot replay blocks the tensor with the reason, until something overwrites all of it.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightstream.errors import AuditError
from weightstream.store.recipes import DRAWS, Operation, Region

# A tensor of data up to this size is kept in the recipe, number by number; it makes a few ten kilobytes of JSON.
LITERAL_ELEMENTS = 4096
# Random numbers for a tensor that will be a parameter are for nothing. Buffers of random numbers are not this large.
_DRAWN_FOR_REAL_ELEMENTS = 1 << 22

_FILLS: dict[str, float | None] = {
    "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0,
    "full": None, "full_like": None, "new_full": None, "scalar_tensor": None,
}  # fmt: skip
_EMPTIES = frozenset({"empty", "empty_strided", "empty_like", "empty_permuted", "new_empty", "new_empty_strided"})
_RANDOMS: dict[str, Operation] = {"randn": "normal", "randn_like": "normal", "rand": "uniform", "rand_like": "uniform"}
_COPIES = frozenset({"clone", "_to_copy", "lift_fresh_copy", "positive"})
_PLAIN: dict[str, Operation] = {
    "erfinv": "erfinv", "log": "log", "sqrt": "sqrt", "abs": "absolute", "reciprocal": "reciprocal"
}  # fmt: skip


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


class Recorder(TorchDispatchMode):
    """Notes what operations do to tensors; `paused` while weightstream itself is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._tracks: dict[int, tuple[StorageWeakRef, Track]] = {}
        self._purge_at = 4096

    def find(self, tensor: Tensor) -> Track | None:
        """What is known of the tensor's storage."""
        entry = self._tracks.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def set(self, tensor: Tensor, track: Track) -> Track:
        if len(self._tracks) >= self._purge_at:
            self._tracks = {key: entry for key, entry in self._tracks.items() if not entry[0].expired()}
            self._purge_at = max(4096, 2 * len(self._tracks))
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being given to another storage, but not the memory.
        self._tracks[storage._cdata] = (StorageWeakRef(storage), track)
        return track

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what this does itself is no business of any mode
            return func(*args, **(kwargs or {})) if self.paused else self._watch(func, args, kwargs or {})

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, bound = func._schema.name.removeprefix("aten::"), _bind(func, args, kwargs)
        target = bound.get("self")
        if name.endswith("_") and isinstance(target, Tensor) and _is_float(target):
            note = self._in_place(name.removesuffix("_"), target, bound)
            if note is not None:
                if target.is_meta or self._only_noted(note, target):
                    return target
                return func(*args, **kwargs)
            if name == "copy_" and isinstance(bound["src"], Tensor):
                self.copy(target, bound["src"])
                return target if target.is_meta else func(*args, **kwargs)
        if name == "eye" and isinstance(bound.get("out"), Tensor):
            return self._eye(bound["out"], func, args, kwargs)
        if name in _RANDOMS or func is torch.ops.aten.normal.float_float:
            return self._random(_RANDOMS.get(name, "normal"), func, args, kwargs, bound)
        out = self._run(name, func, args, kwargs)
        if isinstance(out, Tensor) and _is_float(out):
            if name in _EMPTIES:
                self.set(out, Track())
                return out
            if name in _FILLS:
                value = _FILLS[name]
                if value is None:
                    value = self._number(bound.get("fill_value", bound.get("s")))
                if value is not None:
                    self.set(out, Track([Note("fill", (value,))]))
                    return out
            if isinstance(target, Tensor) and self._derived(name, target, out, bound):
                return out
        self._not_replayable(name, func, bound, out)
        return out

    def block(self, tensor: Tensor, reason: str) -> None:
        """From here on the numbers of the tensor's storage are unknown."""
        track = self.find(tensor) or self.set(tensor, Track())
        track.blocked = reason
        self._tell_heirs(track)

    def assign(self, target: Tensor, operation: Operation, values: tuple[float, ...] = ()) -> Note | None:
        """Note that all elements of `target` get values of their own; None if its elements overlap."""
        region, track = self._place(target)
        if track is None:
            return None
        note = Note(operation, values, region, Draw() if operation in DRAWS else None)
        self._overwrite(track, [note], region)
        return note

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Note that `source`, broadcast if need be, goes to `target`, in which the same element may lie elsewhere."""
        known = self.find(source)
        region, track = self._place(target)
        if track is None:
            self.block(target, f"copy_ to elements that overlap {_where()}")
        elif known is None and not source.is_meta:
            self._literal(target, track, region, source)
        elif known is None:
            self.block(target, f"copy_ from a tensor on the meta device, made elsewhere {_where()}")
        elif known.blocked is not None:
            self.block(target, known.blocked)
        else:
            notes = self._carried(known, source, target, region)
            if notes is None:
                self.block(target, f"copy_ of a part of a tensor, or of one that was filled in parts {_where()}")
            else:
                self._overwrite(track, notes, region)

    def _literal(self, target: Tensor, track: Track, region: Region | None, source: Tensor) -> None:
        if source.numel() == 1:
            self._overwrite(track, [Note("fill", (float(source.item()),), region)], region)
        elif target.numel() > LITERAL_ELEMENTS:
            self.block(target, f"copy_ from a tensor of data of shape {tuple(source.shape)} {_where()}")
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
        if draws and source.shape != target.shape:
            return None
        return [
            Note(note.operation, note.values, region, draws[note.draw] if note.draw is not None else None)
            for note in known.notes
        ]

    def _in_place(self, name: str, target: Tensor, bound: dict[str, Any]) -> Note | None:
        """Note an in-place operation on `target`; None if it is none that can be replayed."""
        if name == "zero":
            return self.assign(target, "fill", (0.0,))
        if name == "fill":
            value = self._number(bound["value"])
            return None if value is None else self.assign(target, "fill", (value,))
        if name == "normal":
            return self.assign(target, "normal", (float(bound["mean"]), float(bound["std"])))
        if name == "uniform":
            return self.assign(target, "uniform", (float(bound["from"]), float(bound["to"])))
        known = self.find(target)
        changes = self._changes(name, bound) if known is not None else None
        if known is None or not changes or known.blocked is not None:
            return None
        region, track = self._place(target)
        if track is None:
            return None
        for operation, values in changes:
            track.notes.append(Note(operation, values, region))
        self._tell_heirs(track)
        return track.notes[-1]

    def _derived(self, name: str, source: Tensor, out: Tensor, bound: dict[str, Any]) -> bool:
        """Note an operation that makes a new tensor from one known tensor and plain numbers."""
        swaps = name == "mul" or (name == "add" and bound.get("alpha") == 1)
        if swaps and self.find(source) is None and isinstance(bound.get("other"), Tensor):
            source, bound = bound["other"], bound | {"self": bound["other"], "other": source}
        known = self.find(source)
        if (
            known is None
            or known.blocked is not None
            or out.untyped_storage()._cdata == source.untyped_storage()._cdata
        ):
            return False
        changes = [] if name in _COPIES else self._changes(name, bound)
        if changes is None or (source.shape != out.shape):
            return False
        track = self.set(out, Track(unreal=known.unreal))
        self.copy(out, source)
        track.notes.extend(Note(operation, values) for operation, values in changes)
        return True

    def _changes(self, name: str, bound: dict[str, Any]) -> list[tuple[Operation, tuple[float, ...]]] | None:
        """Arithmetic with plain numbers as steps."""
        if name in _PLAIN:
            return [(_PLAIN[name], ())]
        if name == "neg":
            return [("multiply", (-1.0,))]
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = (self._number(bound.get(key)) for key in ("min", "max"))
            return [("clamp", (-torch.inf if low is None else low, torch.inf if high is None else high))]
        other = self._number(bound.get("other"))
        if other is None or bound.get("rounding_mode") is not None:
            return None
        alpha = float(bound.get("alpha", 1))
        match name:
            case "mul":
                return [("multiply", (other,))]
            case "div":
                return [("divide", (other,))]
            case "add":
                return [("add", (other * alpha,))]
            case "sub":
                return [("add", (-other * alpha,))]
            case "rsub":
                return [("multiply", (-alpha,)), ("add", (other,))]
        return None

    def _random(self, operation: Operation, func: Any, args: Any, kwargs: Any, bound: dict[str, Any]) -> Tensor:
        mean, std = bound.get("mean", 0.0), bound.get("std", 1.0)
        values = (0.0, 1.0) if operation == "uniform" else (float(mean), float(std))
        numel = torch.Size(bound["size"]).numel() if "size" in bound else bound["self"].numel()
        large = numel > _DRAWN_FOR_REAL_ELEMENTS
        if large and "size" in bound:
            options = {key: kwargs[key] for key in ("dtype", "layout", "device") if kwargs.get(key) is not None}
            out = torch.empty(bound["size"], **options)
        else:
            out = func(*args, **kwargs)
        track = Track([Note(operation, values, None, Draw())], unreal=large)
        if _is_float(out):
            self.set(out, track)
        return out

    def _eye(self, out: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        func(*args, **kwargs)
        self.assign(out, "fill", (0.0,))
        self.assign(out.diagonal(), "fill", (1.0,))
        return out

    def _run(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            on_meta = [tensor for tensor in _tensors((args, kwargs)) if tensor.is_meta]
            if not on_meta:
                raise
            track = self.find(on_meta[0])
            raise AuditError(
                f"{(track.label if track else None) or 'a tensor on the meta device'}: its initialisation uses the "
                f"numbers in it ({name}) {_where()}, and a model is built without its numbers; {REMEDY}"
            ) from error

    def _not_replayable(self, name: str, func: Any, bound: dict[str, Any], out: Any) -> None:
        """An operation that is not noted: what it wrote or made is data if it came from data, else unknown."""
        inputs = list(_tensors(bound))
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        unknown = seeded or any(
            tensor.is_meta or ((track := self.find(tensor)) is not None and (track.random or track.unreal))
            for tensor in inputs
        )
        written = [
            tensor
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(bound.get(argument.name))
        ]
        if not unknown and not written:
            return
        reason = f"{_initialiser() or name} {_where()}"
        for tensor in written:
            track = self.find(tensor)
            # A real tensor that was filled, and changed by data alone, is data itself.
            if not unknown and not tensor.is_meta and (track is None or (track.notes and track.label is None)):
                self._tracks.pop(tensor.untyped_storage()._cdata, None)
            else:
                self.block(tensor, reason)
        for tensor in _tensors(out):
            if unknown and self.find(tensor) is None:
                self.set(tensor, Track(blocked=reason))

    def _number(self, value: Any) -> float | None:
        """A plain number, also one in a tensor that holds data."""
        if isinstance(value, bool | int | float):
            return float(value)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex():
            track = self.find(value)
            return None if track is not None and (track.random or track.unreal) else float(value.item())
        return None

    def _place(self, target: Tensor) -> tuple[Region | None, Track | None]:
        """Where a view lies in its storage (None: everywhere) and what is known of that; no track if it overlaps."""
        track = self.find(target) or self.set(target, Track())
        if _overlaps(target):
            return None, None
        return region_of(target), track

    def _overwrite(self, track: Track, notes: Iterable[Note], region: Region | None) -> None:
        if region is None:
            track.notes, track.blocked = list(notes), None
        else:
            track.notes = [note for note in track.notes if note.region != region] + list(notes)
        self._tell_heirs(track)

    def _only_noted(self, note: Note, target: Tensor) -> bool:
        """Whether to spare the drawing of numbers, although `target` has memory for them."""
        track = self.find(target)
        if track is None or note.operation not in DRAWS or target.numel() <= _DRAWN_FOR_REAL_ELEMENTS:
            return False
        track.unreal = True
        return True

    def _tell_heirs(self, track: Track) -> None:
        for heir in track.heirs:
            heir.blocked = f"a change through another view of its memory, after it was registered {_where()}"


REMEDY = "import the weights instead of generating them, or initialise it with torch.nn.init functions"


def region_of(view: Tensor) -> Region | None:
    """Where a view without overlaps lies in its storage; None if it is all of it."""
    elements = view.untyped_storage().nbytes() // view.element_size()
    if view.numel() == elements:
        return None
    return Region.of(view.storage_offset(), view.shape, view.stride()) if view.numel() else Region(0, (0,), (1,))


def _overlaps(view: Tensor) -> bool:
    return view.numel() > 0 and Region.of(view.storage_offset(), view.shape, view.stride()) is None


def _where() -> str:
    """The line of the model's code that is running, for messages."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "contextlib") and not module.startswith("weightstream.store."):
            return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    return ""


def _initialiser() -> str | None:
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


def _bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their name in the operation's schema, defaults included."""
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    return bound | kwargs


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
