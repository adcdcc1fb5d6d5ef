"""`weightstream store`: what is done with stores as such."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from weightstream.cli.showing import AsJson, Overrides, Source, as_lines, config_of, say, show

app = typer.Typer(help="Look at a store, check it, and move weights in and out.", no_args_is_help=True)

SnapshotName = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="A folder, or an fsspec URL such as s3://bucket/name.")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or that of its run.")]


@app.command("info")
def store_info(
    store: StorePath,
    tbw: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, metavar="TB", help="Terabytes written that the disk is rated for."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sizes, versions, tiers, space by snapshot, and how long the disk will stand it."""
    from weightstream.store.figures import describe

    with _open(store) as opened:
        show(opened.info(tbw_bytes=None if tbw is None else tbw * 1e12), describe, as_json)


@app.command("digest")
def store_digest(store: StorePath, as_json: AsJson = False) -> None:
    """A SHA-256 over every committed tensor, by which two runs are told equal."""
    with _open(store) as opened:
        show({"digest": opened.digest(), "step": opened.step}, lambda found: str(found["digest"]), as_json)


@app.command("verify")
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
    show({"repaired": done, "damage": damage}, lambda _: "\n".join([*done, *damage] or [whole]), as_json)
    if damage:
        raise typer.Exit(1)


@app.command("snapshot")
def store_snapshot(
    store: StorePath,
    name: SnapshotName,
    delete: Annotated[bool, typer.Option("--delete", help="Give it up, and free what it alone held.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold the last commit under a name: one row, no data is copied."""
    with _open(store, writable=True, accept_damage=delete) as opened:  # which may be all that is wrong with the store
        if delete:
            found = {"deleted": name, "freed_bytes": opened.remove_snapshot(name)}
        else:
            opened.snapshot(name)
            found = {"snapshot": name, "step": opened.step}
    show(found, as_lines, as_json)


@app.command("snapshots")
def store_snapshots(store: StorePath, as_json: AsJson = False) -> None:
    """Each snapshot with its step and the bytes that it alone holds."""
    with _open(store, accept_damage=True) as opened:
        found = opened.info()["snapshots"]
    show(found, _snapshot_lines, as_json)


@app.command("restore")
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
    show(found, as_lines, as_json)


@app.command("branch")
def store_branch(
    store: StorePath,
    name: SnapshotName,
    new: Annotated[Path, typer.Argument(metavar="NEW_STORE", help="A new folder, on the same file system.")],
    as_json: AsJson = False,
) -> None:
    """Make a new store of a snapshot; both share its files, and each may go on by itself."""
    with _open(store) as opened:
        opened.branch(name, new)
    show({"branch": str(new), "snapshot": name}, as_lines, as_json)


@app.command("import")
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
    config = config_of(source, overrides)
    from weightstream.commands.transfer import import_weights

    show(import_weights(config, weights, masks), as_lines, as_json)


@app.command("export")
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
    from weightstream.commands.transfer import export_weights

    found = export_weights(store, out, folder=config, dtype=dtype, optimizer_state=optimizer_state, masks=masks)
    show(found, as_lines, as_json)


@app.command("diff")
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
    show(found, lambda found: "\n".join([*lines, found["summary"]]), as_json)
    if not found["equal"]:
        raise typer.Exit(1)


@app.command("push")
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

    show(push(_inner(store), target, replace=replace, say=say), as_lines, as_json)


@app.command("pull")
def store_pull(
    target: Target,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A new folder, such as RUN/store.")],
    as_json: AsJson = False,
) -> None:
    """Make a store of what was pushed, with every checksum compared; it can be interrupted."""
    from weightstream.store.pull import pull

    show(pull(target, store, say=say), as_lines, as_json)


def _inner(path: Path) -> Path:
    inner = path / "store"
    return inner if (inner / "manifest.sqlite").exists() else path


def _open(path: Path, *, writable: bool = False, accept_damage: bool = False) -> Any:
    from weightstream.store.store import Store

    return Store.open(_inner(path), writable=writable, accept_damage=accept_damage)


def _snapshot_lines(found: dict[str, Any]) -> str:
    from weightstream.units import format_bytes

    width = max(map(len, found), default=0)
    lines = [f"{name:{width}}  step {s['step']}, alone {format_bytes(s['own_bytes'])}" for name, s in found.items()]
    return "\n".join(lines) or "no snapshots"
