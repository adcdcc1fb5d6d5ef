"""From the `model` section to a transformers configuration, or a factory, and from that to a function that builds it."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from weightstream.config.config import ModelConfig
from weightstream.config.factories import FactoryModel, from_factory
from weightstream.errors import ConfigError, WeightstreamError, did_you_mean

# Accepted by transformers, though the configuration classes do not list them.
_ALSO_KNOWN = {"rope_theta", "rope_scaling", "attn_implementation", "dtype"}


def architecture(
    config: ModelConfig, *, vocabulary: int, end_of_text: int | None
) -> tuple[Any, Callable[[], nn.Module]]:
    """The transformers configuration and a function that builds the model, for the engine to call on the meta device; of a
    model with a factory, a `FactoryModel` in its place.

    `vocabulary` and `end_of_text` are the tokenizer's; they hold where the section does not say otherwise.

    Raises:
        ConfigError: an unknown model type, architecture or key, a value that the configuration refuses, an unreadable
            folder, a model that is no causal language model, or a factory that is none.
    """
    if config.factory is not None:
        return from_factory(config, vocabulary=vocabulary)
    import transformers

    model_class = None
    if config.architecture is not None:
        model_class = getattr(transformers, config.architecture, None)
        if model_class is None or getattr(model_class, "config_class", None) is None:
            raise ConfigError(
                f"model.architecture: transformers {transformers.__version__} has no model {config.architecture!r}"
                f"{did_you_mean(config.architecture, dir(transformers))}"
            )
    found = _from_folder(config) if config.path else _from_keys(config, model_class, vocabulary, end_of_text)
    if model_class is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"model: {found.model_type} has no causal language model in transformers; `fit` trains those only, "
                "weightstream.Engine trains any"
            )

    def build() -> nn.Module:
        try:
            return transformers.AutoModelForCausalLM.from_config(found) if model_class is None else model_class(found)
        except WeightstreamError:
            raise
        except Exception as error:  # whatever a model makes of values that its configuration let pass
            raise ConfigError(
                f"model: {found.model_type} cannot be built with these values: {type(error).__name__}: "
                f"{_first_line(error)}"
            ) from error

    return found, build


def vocabulary_of(found: Any) -> int:
    """Rows of the embedding."""
    if isinstance(found, FactoryModel):
        return found.vocab_size
    return int(found.get_text_config().vocab_size)


def _from_folder(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    assert config.path is not None
    folder = config.path.expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {folder} has no config.json; give a folder that save_pretrained wrote")
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ConfigError(f"model.path: {folder}/config.json cannot be read: {_first_line(error)}") from None
    _check_keys(type(found), config.settings)
    found.update(config.settings)
    return found


def _from_keys(config: ModelConfig, model_class: Any, vocabulary: int, end_of_text: int | None) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_class is not None:
        config_class = model_class.config_class
    elif config.model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[config.model_type]
    else:
        raise ConfigError(
            f"model.model_type: transformers has no {config.model_type!r}"
            f"{did_you_mean(str(config.model_type), list(CONFIG_MAPPING.keys()))}"
        )
    _check_keys(config_class, config.settings)
    own = {"vocab_size": vocabulary, "eos_token_id": end_of_text, "bos_token_id": end_of_text, "pad_token_id": None}
    try:
        return config_class(**{**own, **config.settings})
    except Exception as error:  # a huggingface_hub validation error, or what the class itself raises
        raise ConfigError(f"model: {config_class.__name__} refuses these values: {_first_line(error)}") from None


def _check_keys(config_class: Any, settings: dict[str, Any]) -> None:
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {}), *_ALSO_KNOWN}
    if is_dataclass(config_class):
        known.update(field.name for field in fields(config_class))
    for key in settings:
        if key not in known:
            public = sorted(name for name in known if not name.startswith("_"))
            hint = did_you_mean(key, public) or f"; known: {', '.join(public)}"
            raise ConfigError(f"model.{key}: unknown key of {config_class.__name__}{hint}")


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])
