"""`store import` and `store export`: what the command line knows of a run, put before what moves the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from weightstream.commands.engines import engine_settings
from weightstream.config.architectures import architecture
from weightstream.config.config import RunConfig, load_config
from weightstream.data.dataset import tokenizer_of
from weightstream.data.tokenizer import Tokenizer, load_tokenizer
from weightstream.errors import ConfigError, StoreError
from weightstream.hub import export_store, import_directory, import_model, load_gguf
from weightstream.hub.pretrained import FOLDER, read_config
from weightstream.sparse.settings import Sparsity
from weightstream.store.directory import require_store
from weightstream.store.glance import glance
from weightstream.store.optimizers import Optimizer
from weightstream.store.store import Store


def import_weights(config: RunConfig, source: Path, masks: str | None = None) -> dict[str, Any]:
    """Make a run's store of a safetensors folder or a GGUF file; `fit` with the same configuration trains it.

    Args:
        masks: how masks of sparse parameters begin, where the configuration does not say it: one of the words of
            `sparsity.groups.init`, or a safetensors file.

    Raises:
        ConfigError: the configuration says it for all groups, or has none.
    """
    optimizer = Optimizer.from_json(config.optimizer.to_json(config.training.steps))
    settings = engine_settings(config)
    if masks is not None:
        settings["sparsity"] = _beginning(settings["sparsity"], masks)
    if source.suffix == ".gguf":
        model, tokenizer = load_gguf(source)
        return import_model(model, config.store, optimizer, tokenizer=tokenizer, **settings)
    return import_directory(source, config.store, optimizer, **settings)


def _beginning(sparsity: Sparsity, masks: str) -> Sparsity:
    if all(group.init is not None or group.sparsity == 0.0 for group in sparsity.groups):
        found = "every group of sparsity says init, or stays dense" if sparsity.groups else "sparsity has no groups"
        raise ConfigError(f"--masks {masks}: {found} in the configuration; correct it, or leave out --masks")
    return Sparsity(
        tuple(group if group.init or group.sparsity == 0.0 else replace(group, init=masks) for group in sparsity.groups)
    )


def export_weights(
    store: Path,
    out: Path,
    *,
    folder: Path | None,
    dtype: Literal["fp32", "bf16"],
    optimizer_state: bool,
    masks: bool = False,
) -> dict[str, Any]:
    """Write a store, or that of a run, as a folder for `from_pretrained`.

    The configuration comes from `folder`, else from the import, else from the run.
    """
    inner = store / "store" if Store.exists(store / "store") else store
    require_store(inner)
    run = inner.parent
    config = tokenizer = None
    if folder is not None:
        config = read_config(folder)
    elif not (inner / FOLDER).is_dir():
        if not (run / "config.yaml").is_file() or inner.name != "store":
            raise StoreError(
                f"store '{inner}' has no configuration with it: it was neither imported nor trained by `weightstream "
                "fit`; give a folder with config.json by --config"
            )
        settings = load_config(run)
        own = load_tokenizer(_tokenizer_file(run, inner))
        if settings.model.factory is not None:
            raise ConfigError(
                f"store '{inner}' holds a model that {settings.model.factory} builds, and an export is for models of "
                f"transformers; read its tensors with weightstream.Store.open(…).items(), or give a folder with config.json "
                f"by --config"
            )
        config, _ = architecture(settings.model, vocabulary=own.size, end_of_text=own.end_of_text)
        tokenizer = _for_transformers(own)
    return export_store(
        inner, out, config=config, tokenizer=tokenizer, companions=folder, dtype=dtype, optimizer_state=optimizer_state,
        masks=masks,
    )  # fmt: skip


def _tokenizer_file(run: Path, store: Path) -> Path:
    """The tokenizer of the text that the store was trained on; before its first step that of the run's last preparation."""
    found = glance(store)
    trained_on = None if found is None else found.progress.get("data")
    file = None if trained_on is None else tokenizer_of(run / "data", trained_on)
    if file is not None:
        return file
    note = run / "data" / "prepared.json"
    try:
        return note.parent / str(json.loads(note.read_text(encoding="utf-8"))["place"]) / "tokenizer.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"'{note}', which leads to the run's tokenizer, cannot be read: {error}; give --config"
        ) from None


def _for_transformers(tokenizer: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.inner.id_to_token(tokenizer.end_of_text)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, eos_token=end, bos_token=end)
