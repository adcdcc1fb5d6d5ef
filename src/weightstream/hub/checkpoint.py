"""A safetensors directory as parameters by name, read one tensor at a time; checked against the model before any is."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightstream.errors import StoreError, StoreMismatchError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MASKS = "masks.safetensors"
"""Bool tensors beside the weights, under the names of sparse parameters."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMED = 5  # names of each kind in a message
_COMPARED_ROWS_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor of a checkpoint lies."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Mapping[str, Tensor]):
    """Parameters by the model's own (first) names. Each access reads the tensor anew; nothing is kept.

    Raises:
        StoreError: files are missing or cannot be read.
        StoreMismatchError: names, shapes, dtypes or buffers are not the model's.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        self._places = _matched(folder, stored_tensors(folder), model)

    def __getitem__(self, name: str) -> Tensor:
        return read(self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MasksBeside(Mapping[str, Tensor]):
    """Masks by parameter name; each access reads one anew."""

    def __init__(self, places: Mapping[str, Stored]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        return read(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def masks_beside(folder: Path) -> MasksBeside | None:
    """The masks of a folder that was exported with them; None if there are none.

    Raises:
        StoreError: they cannot be read.
    """
    path = folder / MASKS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
            return MasksBeside(
                {key: Stored(path, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            )
    except (SafetensorError, OSError) as error:
        raise StoreError(f"'{path}' cannot be read: {error}; restore it, or import without masks") from None


def read(place: Stored) -> Tensor:
    """One tensor. The file is opened for it alone: pages of a mapping that stays open would count as ours."""
    with safe_open(place.file, "pt") as file:
        return file.get_tensor(place.key)  # type: ignore[no-any-return]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from the headers of its files."""
    found: dict[str, Stored] = {}
    index = folder / INDEX
    listed: dict[str, str] = _weight_map(index) if index.is_file() else {}
    for path in _files(folder, listed):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    if key in found:
                        raise StoreError(f"'{folder}': tensor {key!r} is in {found[key].file.name} and in {path.name}")
                    part = file.get_slice(key)
                    found[key] = Stored(path, key, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"'{path}' cannot be read: {error}; fetch or copy it again") from None
    for key, name in listed.items():
        if key not in found or found[key].file.name != name:
            raise StoreError(f"'{index}' says that tensor {key!r} is in {name}, which does not have it")
    return found


def _files(folder: Path, listed: Mapping[str, str]) -> list[Path]:
    names = sorted(set(listed.values())) or [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if listed:
        raise StoreError(f"'{folder}' lacks {', '.join(missing[:_NAMED])}, which {INDEX} names; fetch or copy it again")
    others = sorted(path.name for path in folder.iterdir())[:_NAMED] if folder.is_dir() else ["nothing"]
    raise StoreError(
        f"'{folder}': expected {SINGLE} or {INDEX}, found {', '.join(others)}; weights in another form: load them with "
        "from_pretrained and import them from memory"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(name).name == name for name in found.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"'{index}' cannot be read: {error!r}; fetch or copy it again") from None
    if not plain:
        raise StoreError(f"'{index}' names files outside of its folder; expected plain file names")
    return dict(found)


def _matched(folder: Path, stored: Mapping[str, Stored], model: nn.Module) -> dict[str, Stored]:
    """First name of each parameter → its tensor, if the checkpoint is one of this model."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = persistent_buffers(model)
    found: dict[str, list[Stored]] = {}
    unexpected, problems = [], []
    rename = _renaming(model)
    for key, place in stored.items():
        name = next((name for name in _spellings(key, model, rename) if name in names or name in buffers), None)
        if name in names:
            # The first name leads, whatever the order in the files.
            found.setdefault(names[name], []).insert(0 if name == names[name] else 1, place)
        elif name is not None:
            problems += _buffer_problem(name, read(place), buffers[name])
        elif not _ignored(key, model):
            unexpected.append(key)
    missing = [name for name in first.values() if name not in found]
    for name, parameter in model.named_parameters():
        if name not in found:
            continue
        leader, *aliases = found[name]
        if leader.shape != tuple(parameter.shape):
            problems.append(f"{name}: shape {leader.shape} in the checkpoint, {tuple(parameter.shape)} in the model")
        elif leader.dtype not in _FLOATS:
            problems.append(f"{name}: {leader.dtype} in the checkpoint, expected one of {', '.join(sorted(_FLOATS))}")
        problems += [
            f"{name}: tied in the model, but {leader.key} and {alias.key} differ in the checkpoint"
            for alias in aliases
            if not _equal(leader, alias)
        ]
    if missing or unexpected or problems:
        lines = [
            *_some("missing in the checkpoint", missing),
            *_some("not of this model", unexpected),
            *problems[:_NAMED],
            *([f"and {len(problems) - _NAMED} more such"] if len(problems) > _NAMED else []),
        ]
        raise StoreMismatchError(
            f"'{folder}' is not a checkpoint of {type(model).__name__} as its config.json has it:\n  "
            + "\n  ".join(lines)
            + "\ncorrect config.json, or load it with from_pretrained and import it from memory"
        )
    return {name: places[0] for name, places in found.items()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict has beside parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name not in parameters and isinstance(value, Tensor)}


def buffer_problems(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """A store keeps parameters alone; buffers must be as the model's code makes them."""
    buffers = persistent_buffers(model)
    return [line for name in buffers if name in values for line in _buffer_problem(name, values[name], buffers[name])]


def _buffer_problem(name: str, given: Tensor, made: Tensor) -> list[str]:
    if given.shape == made.shape and torch.equal(given.to(made.dtype), made):
        return []
    return [f"{name}: a buffer that differs from what the model's code makes; a store keeps parameters alone"]


def _spellings(key: str, model: nn.Module, rename: Callable[[str], str]) -> list[str]:
    """What a tensor may be called in the model.

    A checkpoint of the bare model lacks the prefix that a head's model puts before it, and the other way round.
    """
    prefix = getattr(model, "base_model_prefix", "")
    keys = dict.fromkeys((key, rename(key)))
    if prefix:
        return [name for key in keys for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))]
    return list(keys)


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """Names in files → names in the model, where transformers has changed a model's names since its checkpoints.

    Renaming alone: tensors that are split or stacked on their way (experts) are refused as not of this model.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:  # before transformers kept such a table
        return str
    if not hasattr(model, "base_model_prefix"):
        return str
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return lambda key: str(apply_renamings(key, renamings))


def _ignored(key: str, model: nn.Module) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)


def _equal(one: Stored, other: Stored) -> bool:
    """Compared in pieces, so that no two whole tensors are in memory."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.shape:
        return torch.equal(read(one), read(other))
    with safe_open(one.file, "pt") as left, safe_open(other.file, "pt") as right:
        mine, theirs = left.get_slice(one.key), right.get_slice(other.key)
        row_bytes = max(1, 8 * torch.Size(one.shape[1:]).numel())
        step = max(1, _COMPARED_ROWS_BYTES // row_bytes)
        return all(
            torch.equal(mine[start : start + step], theirs[start : start + step])
            for start in range(0, one.shape[0], step)
        )


def _some(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{what}: {', '.join(sorted(names)[:_NAMED])}{more}"]
