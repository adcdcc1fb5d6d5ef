"""What belongs to a model beside its weights: configuration, generation settings, tokenizer files.

A store that was imported keeps them in a folder of its own, so that it can be opened and exported by itself.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from weightstream.errors import ConfigError, StoreError

FOLDER = "hugging_face"
"""Within the store."""

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of a quantized model.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"'{folder}' has no config.json; give a folder that save_pretrained wrote")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ConfigError(f"'{folder / 'config.json'}' cannot be read: {' '.join(str(error).split())[:300]}") from None
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"'{folder}' holds a quantized model, which has no floating-point parameters to train; load it "
            "dequantized with from_pretrained and import it from memory"
        )
    return config


def model_class(config: Any) -> Any:
    """The class that a configuration names, else its causal language model.

    Raises:
        ConfigError: transformers has no such class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:
            raise ConfigError(
                f"config.json names the class {name!r}, which transformers {transformers.__version__} does not have; "
                "import it from memory, with build="
            )
        return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    raise ConfigError(f'config.json ({type(config).__name__}) names no class; add "architectures": ["…"] to it')


def build_from(config: Any) -> Callable[[], nn.Module]:
    """A function that builds the model of a configuration, each time from a copy: engines change theirs."""
    found = model_class(config)

    def build() -> nn.Module:
        return found(copy.deepcopy(config))  # type: ignore[no-any-return]

    return build


def stored_config(store: Path | str) -> Any:
    """The configuration that a store was imported with.

    Raises:
        StoreError: it was not imported, or from a model without a configuration.
    """
    folder = Path(store) / FOLDER
    if not (folder / "config.json").is_file():
        raise StoreError(f"store '{store}' has no configuration with it (it was not imported); give one as config=")
    return read_config(folder)


def builder(store: Path | str) -> Callable[[], nn.Module]:
    """What to give to an `Engine` as the model of an imported store."""
    return build_from(stored_config(store))


def keep(store: Path, config: Any, source: Path | None, model: Any = None, tokenizer: Any = None) -> None:
    """Put configuration and companions, from a folder or from memory, beside the records, all at once or not at all."""
    made = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=store))
    try:
        if config is not None:
            config.save_pretrained(made)
        if source is not None:
            copy_companions(source, made)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        made.chmod(0o755)
        made.rename(store / FOLDER)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copy what of `COMPANIONS` there is."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
