"""`model.factory`: a function or class of one's own that builds the model, found by the name that the configuration gives."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from weightstream.config.config import ModelConfig
from weightstream.errors import ConfigError, did_you_mean

VOCABULARY = "vocab_size"
"""The argument by which a factory learns how many tokens there are."""


@dataclass(frozen=True, slots=True)
class FactoryModel:
    """What is known of such a model before it is built; it stands where others have a transformers configuration."""

    factory: str
    vocab_size: int


def from_factory(config: ModelConfig, *, vocabulary: int) -> tuple[FactoryModel, Callable[[], nn.Module]]:
    """The model that the section's factory makes of its other keys.

    Args:
        vocabulary: the tokenizer's, which holds where the section does not say otherwise.

    Raises:
        ConfigError: there is no such function, it does not take these keys, or what it makes is no module.
    """
    place = config.factory
    assert place is not None
    function = _found(place)
    settings = {VOCABULARY: vocabulary, **config.settings}
    _check_arguments(place, function, settings)
    if not isinstance(settings[VOCABULARY], int):
        raise ConfigError(f"model.{VOCABULARY}: expected a number of tokens, found {settings[VOCABULARY]!r}")

    def build() -> nn.Module:
        made = function(**settings)
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"model.factory: {place} returned {type(made).__name__}, expected a torch.nn.Module; return the model"
            )
        return made

    return FactoryModel(place, settings[VOCABULARY]), build


def _found(place: str) -> Callable[..., Any]:
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise ConfigError(
            f"model.factory: expected 'module:function' or 'file.py:function', found {place!r}; name the function or class "
            f"that builds the model behind a colon"
        )
    module = _loaded(Path(where).expanduser()) if where.endswith(".py") else _imported(where)
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"model.factory: {where} has no function or class {name!r}{_known(name, own)}")
    return found  # type: ignore[no-any-return]


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"model.factory: module {name!r} cannot be imported: {error}; install it, put its folder into PYTHONPATH, or name "
            f"a file: path/to/file.py:function"
        ) from None


def _loaded(file: Path) -> ModuleType:
    """The module that a file is, by itself; anew each time, as it may have been edited."""
    if not file.is_file():
        raise ConfigError(
            f"model.factory: no file {file} in {Path.cwd()}, where relative paths start; correct the path"
        )
    name = f"weightstream_factory_{file.stem}"
    spec = spec_from_file_location(name, file)
    assert spec is not None, "its name ends in .py"
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's code does
        raise ConfigError(f"model.factory: {file} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _check_arguments(place: str, function: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Refuses keys that the function does not take, and a function that lacks some.

    Raises:
        ConfigError: naming the first of them.
    """
    parameters = inspect.signature(function).parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        takes += settings
    for key in settings:
        if key not in takes:
            if key == VOCABULARY:
                raise ConfigError(
                    f"model.factory: {place} takes no {VOCABULARY}, by which it learns how many tokens there are; give it that "
                    f"argument"
                )
            raise ConfigError(f"model.{key}: {place} has no such argument{_known(key, takes)}")
    missing = [p.name for p in parameters if p.name in takes and p.default is p.empty and p.name not in settings]
    if missing:
        raise ConfigError(f"model.{missing[0]}: missing; {place} must be given {', '.join(missing)}")


def _known(name: str, known: list[str]) -> str:
    return did_you_mean(name, known) or f"; known: {', '.join(sorted(known)) or 'none'}"
