"""A store's weights into a folder that `from_pretrained` loads, one tensor at a time."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weightstream.errors import ConfigError, StoreError, StoreMismatchError
from weightstream.hub.checkpoint import INDEX, MASKS, SINGLE, persistent_buffers
from weightstream.hub.pretrained import FOLDER, build_from, copy_companions, stored_config
from weightstream.hub.writing import Entry, shards, write_file
from weightstream.store.layout import DTYPE_NAMES, MASK
from weightstream.store.recording import EVERY_NAME, record
from weightstream.store.store import Store
from weightstream.store.whole import parameters
from weightstream.store.whole import tensors as stored_tensors
from weightstream.units import parse_bytes

OPTIMIZER = "optimizer.safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_store(
    store: str | Path | Store,
    out: str | Path,
    *,
    config: Any = None,
    tokenizer: Any = None,
    companions: str | Path | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    max_shard_bytes: str | int = "5GiB",
    optimizer_state: bool = False,
    masks: bool = False,
) -> dict[str, Any]:
    """Write config.json, safetensors files and what else belongs to the model into a new folder.

    The last commit is exported; a store that an engine holds can be exported beside it, by path, after
    `engine.commit()`. The folder appears when it is complete.

    Args:
        config: the transformers configuration; by default the one that the store was imported with.
        tokenizer: saved with it; by default the files that were imported.
        companions: a folder to copy generation settings and tokenizer files from.
        dtype: of the weights; masters are fp32, so `fp32` loses nothing.
        optimizer_state: write the optimizer's states to optimizer.safetensors, as `<state>/<parameter>`; those of sparse
            parameters are dense, with zeros elsewhere, as weights always are.
        masks: write the masks of sparse parameters to masks.safetensors, as bool tensors of their shapes; import takes it.

    Raises:
        ConfigError: `out` holds something, an unknown dtype, or no configuration for the model.
        StoreMismatchError: the configuration is of another model.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}")
    opened = store if isinstance(store, Store) else Store.open(store, writable=False)
    try:
        target = Path(out)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"'{target}' exists and is not empty; export into a new folder")
        config = copy.deepcopy(config) if config is not None else stored_config(opened.path)
        model, _ = record(build_from(config), opened.seed, given=EVERY_NAME)
        _check_model(opened, {name: tuple(p.shape) for name, p in model.named_parameters()})
        config.architectures, config.dtype = [type(model).__name__], _DTYPES[dtype]
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
        try:
            config.save_pretrained(made)
            for folder in (opened.path / FOLDER, companions):
                if folder is not None:
                    copy_companions(Path(folder), made)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            names = _write_weights(
                opened, made, _DTYPES[dtype], parse_bytes(max_shard_bytes), persistent_buffers(model)
            )
            if optimizer_state:
                _write_states(opened, made)
            if masks:
                _write_masks(opened, made)
            made.chmod(0o755)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        files = sorted(path for path in target.iterdir())
        return {
            "out": str(target),
            "step": opened.step,
            "dtype": dtype,
            "shards": names,
            "files": [path.name for path in files],
            "bytes": sum(path.stat().st_size for path in files),
        }
    finally:
        if opened is not store:
            opened.close()


def _check_model(store: Store, wanted: dict[str, tuple[int, ...]]) -> None:
    held = {parameter.name: parameter.shape for block in store.blocks for parameter in block.parameters}
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise StoreMismatchError(
                f"store '{store.path}' holds {held.get(name, 'no')} as {name!r}, the configuration's model "
                f"{wanted.get(name, 'none')}; give the configuration that the store was trained with"
            )


def _write_weights(
    store: Store, folder: Path, dtype: torch.dtype, max_shard_bytes: int, buffers: dict[str, Tensor]
) -> list[str]:
    held = [Entry(spec.name, dtype, spec.whole_shape) for spec in parameters(store, "param")]
    own = [Entry(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()]
    found = shards([*held, *own], max_shard_bytes)
    single = len(found) == 1
    names = [SINGLE] if single else [f"model-{i:05}-of-{len(found):05}.safetensors" for i in range(1, len(found) + 1)]

    def tensors() -> Iterator[Tensor]:
        yield from stored_tensors(store, "param")
        for buffer in buffers.values():
            yield buffer.detach().contiguous()

    source = tensors()
    for name, entries in zip(names, found, strict=True):
        write_file(folder / name, entries, (next(source) for _ in entries), {})
    if not single:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entries in found for entry in entries)},
            "weight_map": {entry.key: name for name, entries in zip(names, found, strict=True) for entry in entries},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return names


def _write_states(store: Store, folder: Path) -> None:
    """Optimizer states in their own dtypes; the metadata has the optimizer and each parameter's count of steps."""
    every = dict.fromkeys(part.name for unit in store.units for part in store.layout(unit.index).states)
    parts = [name for name in every if name not in ("param", MASK)]
    entries = [
        Entry(f"{name}/{spec.name}", spec.dtype, spec.whole_shape) for name in parts for spec in parameters(store, name)
    ]
    counts = {
        p.name: store.optimizer_steps(unit.index) if p.trainable else 0 for unit in store.units for p in unit.parameters
    }
    metadata = {
        "step": str(store.step),
        "optimizer": json.dumps(store.optimizer.to_json()),
        "optimizer_steps": json.dumps(counts),
    }
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise StoreError(f"optimizer state {entry.key!r} is {entry.dtype}, which safetensors does not know")
    source = (tensor for name in parts for tensor in stored_tensors(store, name))
    write_file(folder / OPTIMIZER, entries, source, metadata)


def _write_masks(store: Store, folder: Path) -> None:
    entries = [Entry(spec.name, spec.dtype, spec.whole_shape) for spec in parameters(store, MASK)]
    write_file(folder / MASKS, entries, stored_tensors(store, MASK), {"step": str(store.step)})
