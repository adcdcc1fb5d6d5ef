"""`weightstream trace`: what the steps of a run did."""

from pathlib import Path
from typing import Annotated

import typer

from weightstream.cli.showing import AsJson, RunFolder, as_lines, show

app = typer.Typer(help="What the steps of a run did, and when.", no_args_is_help=True)


@app.command("export")
def trace_export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file; by default RUN/trace.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the traced steps for ui.perfetto.dev: a process per rank, a track per resource."""
    from weightstream.commands.fit import export_trace

    show(export_trace(run, out or run / "trace.json"), as_lines, as_json)


@app.command("diff")
def trace_diff(run: RunFolder, as_json: AsJson = False) -> None:
    """Predicted against measured: seconds and bytes of a step by kind of operation and resource."""
    from weightstream.commands.fit import trace_comparison
    from weightstream.trace.compare import text_of

    found = trace_comparison(run)
    show(found.to_json(), lambda _: text_of(found), as_json)
