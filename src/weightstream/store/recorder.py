"""Watches every tensor operation while a model is built, and notes what each did to the floating-point tensors.

What it notes goes to `tracks.py`. Operations with plain numbers can be replayed, and whatever only moves numbers about.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightstream.errors import AuditError
from weightstream.store.recipes import DRAWS, Operation
from weightstream.store.tracks import REMEDY, Draw, Note, Track, Tracks, initialiser, region_of, where

# Random numbers for a tensor that will be a parameter are for nothing. Buffers of random numbers are not this large.
_DRAWN_FOR_REAL_ELEMENTS = 1 << 22
# From here on not even address space is asked for, since a parameter may exceed what the machine has.
_WITHOUT_MEMORY_ELEMENTS = 1 << 28

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


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what operations do to tensors; `paused` while weightstream itself is at work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self.tracks = Tracks()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked when the class is made. PyTorch would hide this mode from the compiler, and import that at its first use, which
        takes seconds; nothing compiles what it watches."""
        return False

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
                self.tracks.copy(target, bound["src"])
                return target if target.is_meta else func(*args, **kwargs)
        if isinstance(bound.get("out"), Tensor):
            return self._into(name, bound["out"], func, args, kwargs, bound)
        if _is_huge(bound) and (name in _EMPTIES or name in _FILLS or name in _RANDOMS):
            kwargs = kwargs | {"device": torch.device("meta"), "pin_memory": False}
        if name in _RANDOMS or func is torch.ops.aten.normal.float_float:
            return self._random(_RANDOMS.get(name, "normal"), func, args, kwargs, bound)
        out = self._run(name, func, args, kwargs)
        if isinstance(out, Tensor) and _is_float(out):
            if name in _EMPTIES:
                self.tracks.set(out, Track())
                return out
            if name in _FILLS:
                value = _FILLS[name]
                if value is None:
                    value = self.tracks.number(bound.get("fill_value", bound.get("s")))
                if value is not None:
                    self.tracks.set(out, Track([Note("fill", (value,))]))
                    return out
            if isinstance(target, Tensor) and self._derived(name, target, out, bound):
                return out
        if func is torch.ops.aten.view.dtype and isinstance(target, Tensor):
            self.tracks.block(target, f"a view as {bound['dtype']} {where()}")
        self._not_replayable(name, func, bound, out)
        return out

    def _in_place(self, name: str, target: Tensor, bound: dict[str, Any]) -> Note | None:
        """Note an in-place operation on `target`; None if it is none that can be replayed."""
        if self.tracks.find(target) is None and not target.is_meta and region_of(target) is not None:
            return None  # a part of a tensor of data
        if name == "zero":
            return self.tracks.assign(target, "fill", (0.0,))
        if name == "fill":
            value = self.tracks.number(bound["value"])
            return None if value is None else self.tracks.assign(target, "fill", (value,))
        if name == "normal":
            return self.tracks.assign(target, "normal", (float(bound["mean"]), float(bound["std"])))
        if name == "uniform":
            return self.tracks.assign(target, "uniform", (float(bound["from"]), float(bound["to"])))
        known = self.tracks.find(target)
        changes = self._changes(name, bound) if known is not None else None
        if known is None or not changes or known.blocked is not None:
            return None
        region, track = self.tracks.place(target)
        if track is None:
            return None
        for operation, values in changes:
            track.notes.append(Note(operation, values, region))
        self.tracks.changed(track)
        return track.notes[-1]

    def _derived(self, name: str, source: Tensor, out: Tensor, bound: dict[str, Any]) -> bool:
        """Note an operation that makes a new tensor from one known tensor and plain numbers."""
        swaps = name == "mul" or (name == "add" and bound.get("alpha") == 1)
        if swaps and self.tracks.find(source) is None and isinstance(bound.get("other"), Tensor):
            source, bound = bound["other"], bound | {"self": bound["other"], "other": source}
        known = self.tracks.find(source)
        if (
            known is None
            or known.blocked is not None
            or out.untyped_storage()._cdata == source.untyped_storage()._cdata
        ):
            return False
        copies = name in _COPIES or (name == "constant_pad_nd" and not any(bound["pad"]))
        changes = [] if copies else self._changes(name, bound)
        if changes is None or (source.shape != out.shape):
            return False
        track = self.tracks.set(out, Track(unreal=known.unreal))
        self.tracks.copy(out, source)
        track.notes.extend(Note(operation, values) for operation, values in changes)
        return True

    def _changes(self, name: str, bound: dict[str, Any]) -> list[tuple[Operation, tuple[float, ...]]] | None:
        """Arithmetic with plain numbers as steps."""
        if name in _PLAIN:
            return [(_PLAIN[name], ())]
        if name == "neg":
            return [("multiply", (-1.0,))]
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = (self.tracks.number(bound.get(key)) for key in ("min", "max"))
            return [("clamp", (-torch.inf if low is None else low, torch.inf if high is None else high))]
        other = self.tracks.number(bound.get("other"))
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
            self.tracks.set(out, track)
        return out

    def _into(self, name: str, out: Tensor, func: Any, args: Any, kwargs: Any, bound: dict[str, Any]) -> Any:
        """An operation with `out=`, which may be a view of a larger tensor."""
        result = self._run(name, func, args, kwargs)
        if name in _FILLS and (value := _FILLS[name] or self.tracks.number(bound.get("fill_value", 0))) is not None:
            self.tracks.assign(out, "fill", (value,))
        elif name == "eye":
            self.tracks.assign(out, "fill", (0.0,))
            self.tracks.assign(out.diagonal(), "fill", (1.0,))
        elif name in _RANDOMS:
            self.tracks.assign(out, _RANDOMS[name], (0.0, 1.0))
        else:
            self._not_replayable(name, func, bound, result)
        return result

    def _run(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            on_meta = [tensor for tensor in _tensors((args, kwargs)) if tensor.is_meta]
            if not on_meta:
                raise
            track = self.tracks.find(on_meta[0])
            raise AuditError(
                f"{(track.label if track else None) or 'a tensor on the meta device'}: its initialisation uses the "
                f"numbers in it ({name}) {where()}, and a model is built without its numbers; {REMEDY}"
            ) from error

    def _not_replayable(self, name: str, func: Any, bound: dict[str, Any], out: Any) -> None:
        """An operation that is not noted: what it wrote or made is data if it came from data, else unknown."""
        inputs = list(_tensors(bound))
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        unknown = seeded or any(
            tensor.is_meta or ((track := self.tracks.find(tensor)) is not None and (track.random or track.unreal))
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
        reason = f"{initialiser() or name} {where()}"
        for tensor in written:
            track = self.tracks.find(tensor)
            # A real tensor that was filled, and changed by data alone, is data itself.
            if not unknown and not tensor.is_meta and (track is None or (track.notes and track.label is None)):
                self.tracks.forget(tensor)
            else:
                self.tracks.block(tensor, reason)
        for tensor in _tensors(out):
            if unknown and self.tracks.find(tensor) is None:
                self.tracks.set(tensor, Track(blocked=reason))

    def _only_noted(self, note: Note, target: Tensor) -> bool:
        """Whether to spare the drawing of numbers, although `target` has memory for them."""
        track = self.tracks.find(target)
        if track is None or note.operation not in DRAWS or target.numel() <= _DRAWN_FOR_REAL_ELEMENTS:
            return False
        track.unreal = True
        return True


def _bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their name in the operation's schema, defaults included."""
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    return bound | kwargs


def _is_huge(bound: dict[str, Any]) -> bool:
    """Whether a factory is asked for a tensor that cannot be but a parameter."""
    like = bound.get("self")
    dtype = bound.get("dtype") or (like.dtype if isinstance(like, Tensor) else torch.get_default_dtype())
    return "size" in bound and dtype.is_floating_point and math.prod(bound["size"]) > _WITHOUT_MEMORY_ELEMENTS


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
