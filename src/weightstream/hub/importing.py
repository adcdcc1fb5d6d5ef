"""Weights into a new store: from a safetensors directory, or from a model in memory.

An `Engine` makes the store, so that what a resumed run may not change is there as that run will have it: open it later
with the same settings and `builder(store)`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightstream.engine.engine import Engine
from weightstream.errors import ConfigError, StoreError, StoreMismatchError
from weightstream.hub.checkpoint import INDEX, SINGLE, Checkpoint, buffer_problems
from weightstream.hub.pretrained import FOLDER, build_from, keep, read_config
from weightstream.store.given import unfilled
from weightstream.store.optimizers import Optimizer
from weightstream.store.recording import EVERY_NAME, record
from weightstream.store.store import Store


def import_directory(source: str | Path, store: str | Path, optimizer: Optimizer, **settings: Any) -> dict[str, Any]:
    """Make a store of a folder with config.json and safetensors files, one tensor at a time.

    Tokenizer and generation settings are kept with it. An import that was interrupted is completed by the same call.

    Args:
        settings: further keywords of `Engine`; a run on this store must have the same where they may not change.

    Raises:
        ConfigError: config.json is missing, or of no known model.
        StoreMismatchError: tensors are missing, unexpected, of another shape or dtype; by name.
        StoreError: files cannot be read, or there is a store already.
    """
    source, path = Path(source), Path(store)
    _require_new(path)
    config = read_config(source)
    build = build_from(config)
    skeleton, _ = record(build, settings.get("seed", 0), given=EVERY_NAME)
    config.architectures = [type(skeleton).__name__]
    values = Checkpoint(source, skeleton)
    del skeleton
    return _import(build, path, optimizer, values, settings, lambda: keep(path, config, source))


def import_model(
    model: nn.Module,
    store: str | Path,
    optimizer: Optimizer,
    *,
    build: Callable[[], nn.Module] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Make a store of a model in memory, such as `from_pretrained` returns; parameters become fp32 masters.

    Args:
        build: makes an equal model without its weights; by default from its transformers configuration.
        tokenizer: kept with the store, for `export_store`.
        settings: further keywords of `Engine`; a run on this store must have the same where they may not change.

    Raises:
        ConfigError: it has no configuration and `build` is not given.
        StoreMismatchError: `build` makes another model, or it has buffers that were changed.
        StoreError: there is a store already.
    """
    path = Path(store)
    _require_new(path)
    config = _plain_config(model)
    if build is None:
        if config is None:
            raise ConfigError(f"a {type(model).__name__} has no transformers configuration; give build=")
        build = build_from(config)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _check_same(model, record(build, settings.get("seed", 0), given=EVERY_NAME)[0])
    return _import(build, path, optimizer, values, settings, lambda: keep(path, config, None, model, tokenizer))


def initial_values(
    folder: str | Path, build: Callable[[], nn.Module], store: str | Path
) -> Mapping[str, Tensor] | None:
    """The safetensors of a folder as `Engine(initial=...)`; None if the store is whole, or the folder has none.

    Raises:
        StoreMismatchError: they are not those of the model that `build` makes.
        StoreError: files cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return None
    if Store.exists(store):
        with Store.open(store, writable=False) as found:
            if not unfilled(found):
                return None
    return Checkpoint(folder, record(build, 0, given=EVERY_NAME)[0])


def load_gguf(file: str | Path) -> tuple[Any, Any]:
    """A GGUF file as a model in memory, dequantized to fp32, and its tokenizer.

    Raises:
        ConfigError: it cannot be read, or what reading needs is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"'{file}': no such file; give a GGUF file")
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ConfigError(
            f"'{file}' cannot be read as GGUF: {' '.join(str(error).split())[:300]}; reading GGUF needs "
            "pip install 'weightstream[gguf]'"
        ) from error


def _import(
    build: Callable[[], nn.Module],
    path: Path,
    optimizer: Optimizer,
    values: Mapping[str, Tensor],
    settings: dict[str, Any],
    keep_companions: Callable[[], None],
) -> dict[str, Any]:
    with Engine(build, path, optimizer, initial=values, **settings) as engine:
        keep_companions()
        return {
            "store": str(path),
            "parameters": sum(block.numel for block in engine.store.blocks),
            "tensors": len(values),
            "blocks": len(engine.store.blocks),
            "step": engine.store.step,
        }


def _require_new(path: Path) -> None:
    """A store whose import was interrupted counts as new."""
    if not Store.exists(path):
        return
    with Store.open(path, writable=False) as found:
        # Recipes show that it was not imported; the folder is the last thing that an import makes.
        begun = not found.step and (unfilled(found) or not (found.recipes or (path / FOLDER).exists()))
    if not begun:
        raise StoreError(f"'{path}' already holds a store; weights are imported into a new one: give another path")


def _plain_config(model: nn.Module) -> Any:
    """The model's configuration without what only says how it was loaded."""
    import copy

    config = copy.deepcopy(getattr(model, "config", None))
    if config is None or not hasattr(config, "save_pretrained"):
        return None
    if hasattr(config, "quantization_config"):
        # What is left after dequantization, as from GGUF; parameters that are still quantized are refused by dtype.
        del config.quantization_config
    config.architectures = [type(model).__name__]
    return config


def _check_same(model: nn.Module, built: nn.Module) -> None:
    mine = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    problems = [
        f"{name}: {mine.get(name, 'not')} in the model given, {theirs.get(name, 'not')} in the one that build() makes"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    problems += [
        f"{name}: {parameter.dtype} on {parameter.device}, expected floating-point numbers in memory"
        for name, parameter in model.named_parameters()
        if parameter.is_meta or not parameter.is_floating_point()
    ]
    problems += buffer_problems(built, dict(model.named_buffers()))
    if problems:
        raise StoreMismatchError(
            f"this {type(model).__name__} cannot be imported:\n  "
            + "\n  ".join(problems[:5])
            + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
            + "\ngive the model as it was loaded, and build= that makes an equal one"
        )
