"""The commands that are in no group, and the entry point."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from weightstream.cli import store, trace
from weightstream.cli.showing import AsJson, Overrides, RunFolder, Source, as_lines, config_of, on_stderr, say, show
from weightstream.errors import ConfigError, WeightstreamError

if TYPE_CHECKING:
    from weightstream.config.config import RunConfig

app = typer.Typer(
    name="weightstream",
    help="Train PyTorch models that do not fit in memory: weights stream from a store that is the checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store.app, name="store")
app.add_typer(trace.app, name="trace")


@app.command()
def fit(
    source: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG|RUN]", help="A YAML file, or the folder that a run left.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a file: a size such as llama-60m, or a model's folder.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many ranks compute, with --model.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, with --model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many, with --model.")] = None,
    launched: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Train; the same command again goes on where the last one stopped. With cluster.workers=N, on so many ranks."""
    from weightstream.launch.ranks import place

    def read() -> "RunConfig":
        from weightstream.config.presets import push_button

        if model is not None:
            given = [str(source)] if source is not None else []
            return push_button(
                model, workers=workers or 1, out=out, steps=steps, overrides=[*given, *(overrides or ())]
            )
        if source is None or workers is not None or out is not None or steps is not None:
            raise ConfigError("fit: give a YAML file or a run's folder, or --model with --workers, --out and --steps")
        return config_of(source, overrides)

    own = place()
    if own is not None:
        from weightstream.commands.fit import fit_as_rank

        _leave(fit_as_rank(own, read, launched, as_json=as_json))
    config = read()
    if model is not None:
        say(config.to_yaml())
    if config.cluster.roles.size > 1:
        from weightstream.commands.fit import launch

        raise typer.Exit(launch(config, sys.argv[2:]))
    from weightstream.commands.fit import fit_alone

    raise typer.Exit(fit_alone(config, on_stderr(), _command_again(), as_json=as_json))


def _leave(code: int) -> NoReturn:
    """End a rank, whose work is done, without taking the interpreter apart: threads of Gloo may still want it, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.command()
def evaluate(
    source: Source,
    overrides: Overrides = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="How many; by default as in training.")] = None,
    as_json: AsJson = False,
) -> None:
    """The loss and perplexity of a trained store on held-out text."""
    config = config_of(source, overrides)
    from weightstream.commands.run import measure

    show(
        measure(config, say, sequences=sequences),
        lambda found: (
            f"step {found['step']}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}, "
            f"{found['tokens']} tokens"
        ),
        as_json,
    )


@app.command()
def generate(
    source: Source,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Several at once cost little more than one.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=1e9, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1)] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained store; weights are fetched once per token for all of them."""
    config = config_of(source, set_)
    from weightstream.commands.run import complete

    show(
        complete(config, say, prompts, tokens=tokens, temperature=temperature, seed=seed),
        lambda found: "\n\n".join(sample["prompt"] + sample["continued"] for sample in found["samples"]),
        as_json,
    )


@app.command()
def plan(
    source: Source,
    overrides: Overrides = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `calibrate` wrote; ~/.cache/weightstream/profile.toml by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a run would use and take: blocks, memory, bytes and seconds per step; nothing is created."""
    config = config_of(source, overrides)
    from weightstream.commands.plan import plan as run_plan

    show(run_plan(config, say, profile), lambda found: str(found["text"]), as_json)


@app.command()
def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="Where the profile goes; ~/.cache/weightstream/profile.toml by default.")
    ] = None,
    disk: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder on the disk that stores will be on.")] = Path(),
    threads: Annotated[int | None, typer.Option(min=1, help="Of each rank, as in engine.threads_per_worker.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, in under two minutes, for what `plan` and `simulate` predict."""
    from weightstream.machine.reporting import calibrate_here

    found, lines = calibrate_here(out, disk, threads, on_stderr())
    show(found, lambda _: lines, as_json)


@app.command()
def simulate(
    source: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG|RUN]", help="A YAML file, or the folder that a run left.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Instead of a file: a preset such as gpt3-175b.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Such as cs-2, 8xh100 or this-machine.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many systems compute.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="Sequences of a step, all systems together.")
    ] = None,
    sequence: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence; by default the model's.")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, max=1e30, help="Of the whole run, such as 1e12; by default 20 a parameter.")
    ] = None,
    clipping: Annotated[bool, typer.Option("--clipping", help="By the global norm: updates wait for it.")] = False,
    stragglers: Annotated[
        float,
        typer.Option(min=0, max=1e6, metavar="SPREAD", help="Each system is 1 + |normal(0, SPREAD)| times slower."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of the stragglers.")] = 0,
    failures: Annotated[float, typer.Option(min=0, max=1e6, metavar="RATE", help="Per system and hour.")] = 0.0,
    recovery: Annotated[float, typer.Option(min=0, max=1e9, metavar="SECONDS", help="After a failure.")] = 600.0,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of this-machine; ~/.cache/weightstream/profile.toml by default."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the step's operations for Perfetto.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(metavar="PART", help="Zeros in every matrix of the layers, such as 0.9.")
    ] = None,
    block: Annotated[str, typer.Option(metavar="RxC", help="What is zero or not together, with --sparsity.")] = "1x1",
    multiply: Annotated[
        Literal["dense", "nonzeros"], typer.Option(help="What products of sparse matrices compute.")
    ] = "dense",
    validate: Annotated[bool, typer.Option("--validate", help="Predict published figures.")] = False,
    claims: Annotated[bool, typer.Option("--claims", help="Print docs/claims.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """A step on a virtual clock: seconds, throughput, what binds, scaling, and what a run would take."""
    from weightstream.commands import simulating

    if validate or claims:
        if claims:
            print(simulating.claims(), end="", flush=True)
        else:
            show(simulating.validation(), simulating.validation_text, as_json)
        return
    given = [str(source)] if source is not None and model is not None else []
    if given or (model is not None and overrides):
        raise ConfigError(
            f"simulate --model {model}: takes no configuration besides, found {given + (overrides or [])}"
        )
    config = config_of(source, overrides) if source is not None else None
    asked = simulating.Asked(
        model=model, cluster=cluster, workers=workers, batch=batch, sequence=sequence, tokens=tokens, clipping=clipping,
        stragglers=stragglers, failures_per_hour=failures, recovery_s=recovery, seed=seed, profile=profile,
        sparsity=sparsity, block=simulating.block_of(block), multiply=multiply,
    )  # fmt: skip
    found = simulating.simulated(asked, config, say, html=html, trace=trace)
    show(found, simulating.text, as_json)


@app.command()
def demo(
    what: Annotated[
        Literal["resume", "workers", "120t"],
        typer.Argument(
            help="A run that is killed, workers of which one is, or 123 trillion parameters (minutes, 7 GB)."
        ),
    ] = "resume",
    steps: Annotated[int | None, typer.Option(min=1, help="Of 120t: fewer take less time and disk.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of 120t: its folder, where it also goes on; default: runs/demo-120t.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One minute, offline: train, kill in mid-step, go on, and compare with a run that was never interrupted."""
    if what == "120t":
        from weightstream.demo_120t import demonstration
        from weightstream.demo_120t.summary import summary

        report = demonstration.run(on_stderr(), out or demonstration.OUT, steps)
        show(report, summary, as_json)
    else:
        if steps is not None or out is not None:
            raise ConfigError(f"demo {what}: --steps and --out are of `weightstream demo 120t` alone; leave them out")
        from weightstream.demo import resume, workers

        shown = resume if what == "resume" else workers
        report = shown.run(say)
        show(report, shown.summary, as_json)
    if not report["equal"]:
        raise typer.Exit(1)


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The page; by default RUN/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that needs nothing else: loss, throughput, memory, bytes, stalls, the timeline of a step."""
    from weightstream.report.run_page import write_report

    show(write_report(run, out or run / "report.html"), as_lines, as_json)


def _command_again() -> str:
    import shlex

    return shlex.join(sys.argv[1:])


def main() -> NoReturn:
    """The entry point: errors that a person can put right are one screen on stderr and exit code 2."""
    try:
        app()
    except WeightstreamError as error:
        _fail(str(error))
    except OSError as error:
        # A full disk or a folder that may not be written is the person's to put right; anything else is ours.
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"weightstream: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
