"""What commands have in common: arguments, where results and progress go, and how they look."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightstream.units import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from weightstream.config.config import RunConfig

Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or the folder that a run left.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.steps=100.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `fit` left, or is filling.")]


def config_of(source: Path, overrides: list[str] | None) -> "RunConfig":
    """The settings in a file or in a run's folder, with `key=value` over them."""
    from weightstream.config.config import load_config

    return load_config(source, overrides or ())


def on_stderr() -> "Console":
    """Where progress is shown."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def show(found: dict[str, Any], describe: Any, as_json: bool) -> None:
    """A command's result, as a person reads it or as JSON."""
    print(json_text(found) if as_json else describe(found), flush=True)


def as_lines(found: dict[str, Any]) -> str:
    """A result as names and values in two columns."""
    width = max(map(len, found), default=0)
    return "\n".join(f"{key:{width}}  {value}" for key, value in found.items())
