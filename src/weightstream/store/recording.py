"""Builds a model without its parameters, and records how its own code would have initialised them.

The model's code runs as it does for a model in memory: on the CPU, with no default device, since some libraries leave
initialisation out on the meta device. Only parameters differ: each moves to the meta device as a module registers it,
and passes for a real tensor until the model is built. So buffers are real and right, and at no time does more than
one parameter have memory, which for `torch.empty` is never touched.
"""

import contextlib
import math
import random
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from weightstream.errors import AuditError
from weightstream.store.recipes import ASSIGNS, Recipe, Step
from weightstream.store.recorder import Recorder
from weightstream.store.tracks import REMEDY, Draw, Track, region_of

Model = TypeVar("Model", bound=nn.Module)

# Messages name this many parameters; the same line of a model often concerns all its layers.
_NAMED = 5


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


EVERY_NAME: Container[str] = _Everything()


def record(build: Callable[[], Model], seed: int, *, given: Container[str] = ()) -> tuple[Model, dict[str, Recipe]]:
    """Call `build` and return its model, parameters on the meta device and buffers real, with a recipe per parameter.

    A tied parameter has one recipe, under the first of its names. `seed` is that of the store; here it serves buffers
    of random numbers, if the model has any, and the caller's own random state is left as it was. The dtype in which the
    model would make its parameters does not matter: recipes give fp32. Parameters named in `given` have values from
    elsewhere: they get no recipe and need none.

    Raises:
        AuditError: parameters that were never filled, or filled by what cannot be replayed, by name.
    """
    recorder = Recorder()
    with _seeded(seed), _registering(recorder), recorder, _Disguise(recorder), _truncated_normal_noted(recorder):
        model = build()
        if not isinstance(model, nn.Module):
            raise AuditError(f"build() must return a torch.nn.Module, found {type(model).__name__}")
        _move_the_rest(recorder, model)
    _check_buffers(recorder, model)
    return model, _recipes(recorder, dict(model.named_parameters()), given)


class _Disguise(TorchFunctionMode):
    """Lets parameters pass for real tensors while the model's code initialises them.

    Functions of torch.nn.init do nothing to a tensor that says it is on the meta device.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        owner = getattr(func, "__self__", None)
        if not self._recorder.paused and owner is not None:
            if owner is _IS_META and self._is_tracked(args[0]):
                return False
            if owner is _DEVICE and self._is_tracked(args[0]):
                return torch.device("cpu")
            if owner is _DATA and func.__name__ == "__set__" and _on_meta(args[0]) and not _on_meta(args[1]):
                # A tensor on the meta device takes only such for its data.
                with _paused(self._recorder):
                    return func(args[0], _as_meta(self._recorder, args[1]))
        return func(*args, **(kwargs or {}))

    def _is_tracked(self, tensor: Tensor) -> bool:
        return _on_meta(tensor) and self._recorder.tracks.find(tensor) is not None


# Descriptors, which a function mode sees as the owners of what it is asked for.
_IS_META: Any = torch.Tensor.is_meta
_DEVICE: Any = torch.Tensor.device
_DATA: Any = torch.Tensor.data


def _on_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


@contextlib.contextmanager
def _paused(recorder: Recorder) -> Iterator[None]:
    before, recorder.paused = recorder.paused, True
    try:
        yield
    finally:
        recorder.paused = before


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What the model draws for itself depends on `seed`; generators go on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _registering(recorder: Recorder) -> Iterator[None]:
    """Each parameter moves to the meta device as a module registers it."""

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if nn.parameter.is_lazy(parameter):
            raise AuditError(
                f"parameter {name!r} of a {type(module).__name__} has no shape before the first use; give its sizes"
            )
        with _paused(recorder), torch._C.DisableTorchFunction():
            fit = parameter.is_meta and parameter.is_contiguous() and region_of(parameter) is None
            moved = None if fit else _moved(recorder, parameter)
            track = recorder.tracks.find(parameter if moved is None else moved)
            if track is not None and track.label is None:
                track.label = f"parameter {name!r} of a {type(module).__name__}, shape {tuple(parameter.shape)}"
            return moved

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _moved(recorder: Recorder, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter on the meta device: the same object if that can be, since the model may hold it elsewhere too."""
    data = _as_meta(recorder, parameter)
    if type(parameter) is nn.Parameter:
        meta = nn.Parameter(data, requires_grad=parameter.requires_grad)
    else:
        meta = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    meta.__dict__.update(parameter.__dict__)
    try:
        torch.utils.swap_tensors(parameter, meta)  # type: ignore[no-untyped-call]
    except RuntimeError:  # something else points at it
        return meta
    return parameter


def _as_meta(recorder: Recorder, tensor: Tensor) -> Tensor:
    """A tensor like this one on the meta device, about which as much is known."""
    known = recorder.tracks.find(tensor)
    if known is not None and tensor.is_contiguous() and region_of(tensor) is None:
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        recorder.tracks.set(meta, known)
        return meta
    # A part of a tensor, one in another order, or data.
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    track = recorder.tracks.set(meta, Track())
    recorder.tracks.copy(meta, tensor.detach())
    if known is not None:
        known.heirs.append(track)
    return meta


def _move_the_rest(recorder: Recorder, model: nn.Module) -> None:
    """Parameters that came into the model without being registered."""
    with _paused(recorder), torch._C.DisableTorchFunction():
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    if id(parameter) not in moved:
                        moved[id(parameter)] = _moved(recorder, parameter)
                    module._parameters[name] = moved[id(parameter)]


@contextlib.contextmanager
def _truncated_normal_noted(recorder: Recorder) -> Iterator[None]:
    """PyTorch draws truncated normal values by rejection, which depends on the numbers; noted by its parameters."""
    original = nn.init._no_grad_trunc_normal_

    def noted(tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None) -> Tensor:
        with _paused(recorder), torch._C.DisableTorchFunction():
            cdfs = (0.5 * math.erfc((mean - bound) / (std * math.sqrt(2.0))) for bound in (a, b))
            # Rounded, because the last bits of erfc differ between C libraries.
            low, high = (round(cdf * 2**40) / 2**40 for cdf in cdfs)
            recorder.tracks.assign(tensor, "truncated_normal", (mean, std, a, b, low, high))
            return tensor if tensor.is_meta else original(tensor, mean, std, a, b, generator)

    nn.init._no_grad_trunc_normal_ = noted
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = original


def _check_buffers(recorder: Recorder, model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        track = recorder.tracks.find(buffer)
        if buffer.is_meta and track is not None and track.blocked is not None:
            raise AuditError(
                f"buffer {name!r} of shape {tuple(buffer.shape)} is computed from a parameter's numbers "
                f"({track.blocked}), and a model is built without them; compute it in forward"
            )
        if buffer.is_meta or (track is not None and track.unreal):
            raise AuditError(
                f"buffer {name!r} of shape {tuple(buffer.shape)} has no numbers; build() must make buffers on the CPU: "
                "leave torch.device('meta') out of it (weightstream sees to parameters), and compute large buffers of "
                "random numbers in forward"
            )


def _recipes(recorder: Recorder, parameters: dict[str, nn.Parameter], given: Container[str]) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    problems: dict[str, str] = {}
    names: dict[int, str] = {}  # of tracks
    owners: dict[Draw, tuple[str, int]] = {}
    roots: dict[Draw, tuple[Draw, str]] = {}
    for name, parameter in parameters.items():
        track = recorder.tracks.find(parameter)
        problem = _problem(track, parameter)
        if track is not None and problem is None and names.setdefault(id(track), name) != name:
            problem = (
                f"shares its memory with {names[id(track)]!r}; tie them by assigning one Parameter to both modules"
            )
        elif name in given:
            problem = None if parameter.is_floating_point() else problem
        if problem is None and name in given:
            continue
        if problem is not None or track is None:
            problems[name] = problem or "was not made by build()"
            continue
        steps, own = [], 0
        for note in track.notes:
            owner, number = name, 0
            if note.draw is not None:
                if note.draw not in owners:
                    owners[note.draw] = (name, own)
                    own += 1
                owner, number = owners[note.draw]
                draw, other = roots.setdefault(note.draw.root, (note.draw, name))
                if draw is not note.draw:
                    problems[name] = f"holds random values of {other!r} in another order; {REMEDY}"
            steps.append(Step(note.operation, note.values, note.region, number, None if owner == name else owner))
        recipes[name] = Recipe(tuple(steps))
    if problems:
        shown = "\n".join(f"  {name}: {problem}" for name, problem in list(problems.items())[:_NAMED])
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise AuditError(f"the initialisation of {len(problems)} parameter(s) cannot be replayed:\n{shown}{more}")
    return recipes


def _problem(track: Track | None, parameter: nn.Parameter) -> str | None:
    """Why the parameter's first values cannot be made; None if they can."""
    if not parameter.is_floating_point():
        return f"is of {parameter.dtype}; only floating-point parameters stream: make it a buffer"
    if track is None:
        return "was made outside of build(); make the model inside, or import its weights"
    if track.blocked is not None:
        return f"{track.blocked} cannot be replayed; {REMEDY}"
    if not _covered(track, parameter.numel()):
        return f"was never filled, at least in part (torch.empty); {REMEDY}"
    return None


def _covered(track: Track, elements: int) -> bool:
    """Whether every element was assigned a value, and had one before anything was computed from it."""
    assigned = np.zeros(0, dtype=bool)
    for note in track.notes:
        if note.operation in ASSIGNS:
            if note.region is None:
                return True
            if not assigned.size:
                assigned = np.zeros(elements, dtype=bool)
            view = np.lib.stride_tricks.as_strided(
                assigned[note.region.offset :], note.region.sizes, note.region.strides
            )
            view[...] = True
    return elements == 0 or bool(assigned.size and assigned.all())
