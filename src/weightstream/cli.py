"""The command line. Results go to stdout, progress to stderr; what a person can put right ends with exit code 2."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from weightstream.errors import ConfigError, WeightstreamError

if TYPE_CHECKING:
    from rich.console import Console

    from weightstream.config import RunConfig

# Commands import what they need when they run: --help and wrong arguments do not wait for torch.
app = typer.Typer(
    name="weightstream",
    help="Train PyTorch models that do not fit in memory: weights stream from a store that is the checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at a store, check it, and move weights in and out.", no_args_is_help=True)
app.add_typer(store_app, name="store")
trace_app = typer.Typer(help="What the steps of a run did, and when.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")

Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or the folder that a run left.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.steps=100.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
SnapshotName = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="A folder, or an fsspec URL such as s3://bucket/name.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `fit` left, or is filling.")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or that of its run.")]


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
    from weightstream.ranks import place

    def read() -> "RunConfig":
        from weightstream.presets import push_button

        if model is not None:
            given = [str(source)] if source is not None else []
            return push_button(
                model, workers=workers or 1, out=out, steps=steps, overrides=[*given, *(overrides or ())]
            )
        if source is None or workers is not None or out is not None or steps is not None:
            raise ConfigError("fit: give a YAML file or a run's folder, or --model with --workers, --out and --steps")
        return _config(source, overrides)

    own = place()
    if own is not None:
        from weightstream.commands import fit_as_rank

        _leave(fit_as_rank(own, read, launched, as_json=as_json))
    config = read()
    if model is not None:
        _say(config.to_yaml())
    if config.cluster.roles.size > 1:
        from weightstream.commands import launch

        raise typer.Exit(launch(config, sys.argv[2:]))
    from weightstream.commands import fit_alone

    raise typer.Exit(fit_alone(config, _stderr(), _command_again(), as_json=as_json))


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
    config = _config(source, overrides)
    from weightstream.run import measure

    _print(
        measure(config, _say, sequences=sequences),
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
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained store; weights are fetched once per token for all of them."""
    config = _config(source, set_)
    from weightstream.run import complete

    _print(
        complete(config, _say, prompts, tokens=tokens, temperature=temperature, seed=seed),
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
    config = _config(source, overrides)
    from weightstream.run import plan as run_plan

    _print(run_plan(config, _say, profile), lambda found: str(found["text"]), as_json)


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

    found, lines = calibrate_here(out, disk, threads, _stderr())
    _print(found, lambda _: lines, as_json)


@app.command()
def simulate(
    source: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG|RUN]", help="A YAML file, or the folder that a run left.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Instead of a file: a preset such as gpt3-175b.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Such as cs-2, 8xh100 or this-machine.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many systems compute.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step, all systems together.")] = None,
    sequence: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence; by default the model's.")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Of the whole run, such as 1e12; by default 20 a parameter.")
    ] = None,
    clipping: Annotated[bool, typer.Option("--clipping", help="By the global norm: updates wait for it.")] = False,
    stragglers: Annotated[
        float, typer.Option(min=0, metavar="SPREAD", help="Each system is 1 + |normal(0, SPREAD)| times slower.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the stragglers.")] = 0,
    failures: Annotated[float, typer.Option(min=0, metavar="RATE", help="Per system and hour.")] = 0.0,
    recovery: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="After a failure.")] = 600.0,
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
    from weightstream import simulating

    if validate or claims:
        if claims:
            print(simulating.claims(), end="", flush=True)
        else:
            _print(simulating.validation(), simulating.validation_text, as_json)
        return
    given = [str(source)] if source is not None and model is not None else []
    if given or (model is not None and overrides):
        raise ConfigError(
            f"simulate --model {model}: takes no configuration besides, found {given + (overrides or [])}"
        )
    config = _config(source, overrides) if source is not None else None
    asked = simulating.Asked(
        model=model, cluster=cluster, workers=workers, batch=batch, sequence=sequence, tokens=tokens, clipping=clipping,
        stragglers=stragglers, failures_per_hour=failures, recovery_s=recovery, seed=seed, profile=profile,
        sparsity=sparsity, block=simulating.block_of(block), multiply=multiply,
    )  # fmt: skip
    found = simulating.simulated(asked, config, _say, html=html, trace=trace)
    _print(found, simulating.text, as_json)


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

        report = demonstration.run(_stderr(), out or demonstration.OUT, steps)
        _print(report, summary, as_json)
    else:
        if steps is not None or out is not None:
            raise ConfigError(f"demo {what}: --steps and --out are of `weightstream demo 120t` alone; leave them out")
        from weightstream import demo as resume
        from weightstream import demo_workers

        shown = resume if what == "resume" else demo_workers
        report = shown.run(_say)
        _print(report, shown.summary, as_json)
    if not report["equal"]:
        raise typer.Exit(1)


@trace_app.command("export")
def trace_export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file; by default RUN/trace.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the traced steps for ui.perfetto.dev: a process per rank, a track per resource."""
    from weightstream.commands import export_trace

    _print(export_trace(run, out or run / "trace.json"), _lines, as_json)


@trace_app.command("diff")
def trace_diff(run: RunFolder, as_json: AsJson = False) -> None:
    """Predicted against measured: seconds and bytes of a step by kind of operation and resource."""
    from weightstream.commands import trace_comparison
    from weightstream.trace.compare import text_of

    found = trace_comparison(run)
    _print(found.to_json(), lambda _: text_of(found), as_json)


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The page; by default RUN/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that needs nothing else: loss, throughput, memory, bytes, stalls, the timeline of a step."""
    from weightstream.report.run_page import write_report

    _print(write_report(run, out or run / "report.html"), _lines, as_json)


@store_app.command("info")
def store_info(
    store: StorePath,
    tbw: Annotated[
        float | None, typer.Option(min=0, metavar="TB", help="Terabytes written that the disk is rated for.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sizes, versions, tiers, space by snapshot, and how long the disk will stand it."""
    from weightstream.store.figures import describe

    with _open(store) as opened:
        _print(opened.info(tbw_bytes=None if tbw is None else tbw * 1e12), describe, as_json)


@store_app.command("digest")
def store_digest(store: StorePath, as_json: AsJson = False) -> None:
    """A SHA-256 over every committed tensor, by which two runs are told equal."""
    with _open(store) as opened:
        _print({"digest": opened.digest(), "step": opened.step}, lambda found: str(found["digest"]), as_json)


@store_app.command("verify")
def store_verify(
    store: StorePath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make anew what can be; else go back to the newest snapshot that is whole.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read everything and compare it with its checksums; exit code 1 if anything is damaged."""
    with _open(store, writable=repair, accept_damage=True) as opened:
        done = opened.repair() if repair else []
        damage = opened.verify()
        whole = f"{opened.path}: whole at step {opened.step}"
    _print({"repaired": done, "damage": damage}, lambda _: "\n".join([*done, *damage] or [whole]), as_json)
    if damage:
        raise typer.Exit(1)


@store_app.command("snapshot")
def store_snapshot(
    store: StorePath,
    name: SnapshotName,
    delete: Annotated[bool, typer.Option("--delete", help="Give it up, and free what it alone held.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold the last commit under a name: one row, no data is copied."""
    with _open(store, writable=True) as opened:
        if delete:
            found = {"deleted": name, "freed_bytes": opened.remove_snapshot(name)}
        else:
            opened.snapshot(name)
            found = {"snapshot": name, "step": opened.step}
    _print(found, _lines, as_json)


@store_app.command("snapshots")
def store_snapshots(store: StorePath, as_json: AsJson = False) -> None:
    """Each snapshot with its step and the bytes that it alone holds."""
    with _open(store) as opened:
        found = opened.info()["snapshots"]
    _print(found, _snapshot_lines, as_json)


@store_app.command("restore")
def store_restore(
    store: StorePath,
    name: SnapshotName,
    discard: Annotated[bool, typer.Option("--discard", help="Though no snapshot holds the last commit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Go back to what a snapshot holds; no data is copied, and `fit` goes on from there."""
    with _open(store, writable=True) as opened:
        before = opened.step
        opened.restore(name, discard=discard)
        found = {"restored": name, "step_before": before, "step": opened.step}
    _print(found, _lines, as_json)


@store_app.command("branch")
def store_branch(
    store: StorePath,
    name: SnapshotName,
    new: Annotated[Path, typer.Argument(metavar="NEW_STORE", help="A new folder, on the same file system.")],
    as_json: AsJson = False,
) -> None:
    """Make a new store of a snapshot; both share its files, and each may go on by itself."""
    with _open(store) as opened:
        opened.branch(name, new)
    _print({"branch": str(new), "snapshot": name}, _lines, as_json)


@store_app.command("import")
def store_import(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A safetensors folder, or a GGUF file.")],
    source: Source,
    overrides: Overrides = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Which weights of sparse parameters exist: zeros (those that are not zero), magnitude (the largest), "
            "random, or a safetensors file of masks, such as `store export --masks` writes."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run's store of given weights, one tensor at a time; `fit` then trains it."""
    config = _config(source, overrides)
    from weightstream.transfer import import_weights

    _print(import_weights(config, weights, masks), _lines, as_json)


@store_app.command("export")
def store_export(
    store: StorePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, for from_pretrained.")],
    config: Annotated[Path | None, typer.Option(help="A folder with config.json; by default the store's own.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Masters are fp32.")] = "fp32",
    optimizer_state: Annotated[bool, typer.Option("--optimizer-state", help="In a file beside the weights.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Of sparse parameters, in a file beside the weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write config.json, safetensors and tokenizer as transformers reads them, one tensor at a time."""
    from weightstream.transfer import export_weights

    found = export_weights(store, out, folder=config, dtype=dtype, optimizer_state=optimizer_state, masks=masks)
    _print(found, _lines, as_json)


@store_app.command("diff")
def store_diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A store's folder, or that of its run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Compare two stores tensor by tensor; exit code 1 if they differ."""
    from weightstream.store.difference import difference

    with _open(a) as first, _open(b) as second:
        found = difference(first, second)
    lines = found.pop("lines")
    _print(found, lambda found: "\n".join([*lines, found["summary"]]), as_json)
    if not found["equal"]:
        raise typer.Exit(1)


@store_app.command("push")
def store_push(
    store: StorePath,
    target: Target,
    replace: Annotated[
        bool, typer.Option("--replace", help="Though the target holds a later step of this store, which is lost.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a directory or bucket to the last commit: only what changed is sent, and it can be interrupted."""
    from weightstream.store.push import push

    _print(push(_inner(store), target, replace=replace, say=_say), _lines, as_json)


@store_app.command("pull")
def store_pull(
    target: Target,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A new folder, such as RUN/store.")],
    as_json: AsJson = False,
) -> None:
    """Make a store of what was pushed, with every checksum compared; it can be interrupted."""
    from weightstream.store.pull import pull

    _print(pull(target, store, say=_say), _lines, as_json)


def _config(source: Path, overrides: list[str] | None) -> "RunConfig":
    from weightstream.config import load_config

    return load_config(source, overrides or ())


def _inner(path: Path) -> Path:
    inner = path / "store"
    return inner if (inner / "manifest.sqlite").exists() else path


def _open(path: Path, *, writable: bool = False, accept_damage: bool = False) -> Any:
    from weightstream.store.store import Store

    return Store.open(_inner(path), writable=writable, accept_damage=accept_damage)


def _stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(found: dict[str, Any], describe: Any, as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else describe(found), flush=True)


def _lines(found: dict[str, Any]) -> str:
    width = max(map(len, found), default=0)
    return "\n".join(f"{key:{width}}  {value}" for key, value in found.items())


def _snapshot_lines(found: dict[str, Any]) -> str:
    from weightstream.units import format_bytes

    width = max(map(len, found), default=0)
    lines = [f"{name:{width}}  step {s['step']}, alone {format_bytes(s['own_bytes'])}" for name, s in found.items()]
    return "\n".join(lines) or "no snapshots"


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
