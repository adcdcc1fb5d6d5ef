"""`weightstream simulate`: a job out of names or a configuration, its simulated step, and what follows for a run."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from weightstream.blocks import Parameter, Unit
from weightstream.config.config import RunConfig
from weightstream.errors import ConfigError
from weightstream.machine.as_cluster import cluster_of
from weightstream.machine.profile import load_profile
from weightstream.masking.first_masks import given_counts
from weightstream.report.figures import Line, Section, page, preformatted, timeline, utilisation
from weightstream.report.figures import curve as figure_of
from weightstream.simulator.clusters import CLUSTERS, THIS_MACHINE, ClusterPreset, cluster_named
from weightstream.simulator.jobs import Job
from weightstream.simulator.models import ModelShape, SparseShape, model_named
from weightstream.simulator.outcomes import Failures, Outcome, curve, run, stragglers
from weightstream.simulator.validation import Row, calibrate_efficiency, validate
from weightstream.sparse.choosing import Piece, choose, speedup_of
from weightstream.sparse.kernels import KERNELS
from weightstream.sparse.pieces import dense_by_default, kept_cells, sparse_pieces
from weightstream.trace.perfetto import export
from weightstream.units import format_bytes, format_count, format_seconds

TOKENS_PER_PARAMETER = 20
"""Of a run whose length is not given (Hoffmann et al. 2022, arXiv:2203.15556)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a person gave on the command line; None where nothing was given."""

    model: str | None = None
    cluster: str | None = None
    workers: int | None = None
    batch: float | None = None
    sequence: int | None = None
    tokens: float | None = None
    clipping: bool = False
    stragglers: float = 0.0
    failures_per_hour: float = 0.0
    recovery_s: float = 600.0
    seed: int = 0
    profile: Path | None = None
    sparsity: float | None = None
    block: tuple[int, int] = (1, 1)
    multiply: Literal["dense", "nonzeros"] = "dense"


Say = Callable[[str], None]


def job_of(asked: Asked, config: RunConfig | None, say: Say = lambda text: None) -> Job:
    """The job that is meant.

    Raises:
        ConfigError: an unknown name, or something that is missing.
        PlanError: more systems than the cluster can have.
    """
    if (config is None) == (asked.model is None):
        raise ConfigError(
            "simulate: give a YAML file or a run's folder, or --model with --cluster, --workers and --batch"
        )
    model = shape_of(config) if config is not None else model_named(str(asked.model))
    cluster = _cluster(asked, config, say)
    workers = asked.workers or (config.cluster.workers if config is not None else 1)
    cluster.check(workers)
    batch = asked.batch or (config.training.sequences_per_step if config is not None else None)
    if batch is None:
        raise ConfigError(
            f"simulate --model {model.name}: expected --batch, the sequences of a step; give --batch {8 * workers}"
        )
    sequence = asked.sequence or (config.training.sequence_length if config is not None else model.sequence)
    clipping = asked.clipping or (config is not None and config.training.clip_norm is not None)
    slowdown = stragglers(workers, asked.stragglers, asked.seed) if asked.stragglers > 0 else {}
    return Job(
        model=model,
        cluster=cluster,
        workers=workers,
        batch=batch,
        sequence=sequence,
        clipping=clipping,
        slowdown=slowdown,
        sparse=sparse_shape(asked, config, cluster, say),
    )


def block_of(text: str) -> tuple[int, int]:
    """`32x32` as rows and columns.

    Raises:
        ConfigError: something else.
    """
    rows, _, columns = text.lower().replace("×", "x").partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ConfigError(f"--block {text}: expected rows and columns of at least 1, such as 32x32")
    return int(rows), int(columns)


def sparse_shape(asked: Asked, config: RunConfig | None, cluster: ClusterPreset, say: Say) -> SparseShape | None:
    """How sparse the layers are: as given, else as the configuration's groups have them where they are sparsest.

    Raises:
        ConfigError: a sparsity outside [0, 1), or settings that do not fit the model.
    """
    if asked.sparsity is not None and not 0 <= asked.sparsity < 1:
        raise ConfigError(f"--sparsity {asked.sparsity:g}: expected at least 0 and below 1, the part that is zero")
    if asked.sparsity is None and (asked.block != (1, 1) or (asked.multiply == "nonzeros" and config is None)):
        raise ConfigError(
            "--block and --multiply say how a model is sparse, and nothing says that it is; give --sparsity 0.9"
        )
    found: SparseShape | None = None
    if asked.sparsity is not None:
        found = SparseShape(
            density=1 - asked.sparsity, block=asked.block, says="every matrix of every layer is so sparse"
        )
    elif config is not None and config.sparsity.groups:
        found = _configured(config)
    if found is None or found.density >= 1:
        return None
    multiplied = asked.multiply == "nonzeros" or (config is not None and bool(config.sparsity.kernels))
    return _multiplied(found, cluster, asked, say) if multiplied else found


def _configured(config: RunConfig) -> SparseShape | None:
    """The layers of a configuration as sparse as they become."""
    from weightstream.config.architectures import architecture

    _, build = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    with torch.device("meta"):
        model = build()
    parameters = [Parameter(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    settings, steps = config.sparsity.settings(config.training.steps), config.training.steps
    heads = dense_by_default(model)
    given = given_counts(settings, [Unit(0, 0, "model", tuple(parameters))], heads)
    pieces = sparse_pieces(settings, parameters, dense=heads, given_counts=given)
    if not pieces:
        return None

    def kept(version: int) -> int:
        found = 0
        for piece in pieces:
            cells = piece.count(version)
            if cells is None:  # of zeros that nobody has looked at nothing is known
                likely = kept_cells(piece.grid.cells, piece.group.sparsity_at(version))
                cells = likely if piece.group.searched else piece.grid.cells
            found += cells * piece.grid.cell_elements
        return found

    marks = {0, steps} | {v for p in pieces for v in (p.group.dense_until, p.group.last, (p.group.dense_from or 1) - 1)}
    sparsest = min((version for version in marks if 0 <= version <= steps), key=kept)
    elements = sum(piece.grid.elements for piece in pieces)
    layers = sum(p.numel for p in parameters if p.name not in heads and len(p.shape) > 1)
    block: Counter[tuple[int, int]] = Counter()
    for piece in pieces:
        block[piece.grid.block] += piece.grid.elements
    return SparseShape(
        density=kept(sparsest) / elements, block=block.most_common(1)[0][0], share=min(1.0, elements / layers),
        says=f"{len(pieces)} parameters as sparse as after step {sparsest}, spread evenly over all layers",
    )  # fmt: skip


def _multiplied(found: SparseShape, cluster: ClusterPreset, asked: Asked, say: Say) -> SparseShape:
    """What products by non-zeros gain: as measured on this machine, elsewhere as much as there are fewer of them."""
    if cluster.name != THIS_MACHINE:
        return replace(
            found, speedup=1 / found.density,
            says=f"{found.says}; unverified: only non-zeros are multiplied, at the efficiency of dense products",
        )  # fmt: skip
    curves = load_profile(asked.profile, lambda text: None).sparse
    piece = Piece(block=found.block, density=found.density, dtype="bfloat16", tokens=512, threads=1)
    chosen = choose(curves, piece)
    kernel = next((kernel for kernel in KERNELS if kernel == chosen), None)
    if kernel is None:
        say("no kernel was measured to be faster at this density and block: products are dense")
        return found
    speedup = speedup_of(curves, kernel, piece) or 1.0
    return replace(found, speedup=speedup, says=f"{found.says}; '{kernel}' measured {speedup:.3g} times as fast")


def _cluster(asked: Asked, config: RunConfig | None, say: Say) -> ClusterPreset:
    """The preset that is named; for a configuration this machine, if none is."""
    if asked.cluster == THIS_MACHINE or (asked.cluster is None and config is not None):
        return cluster_of(
            load_profile(asked.profile, say), disk_bytes=shutil.disk_usage(_near(config)).free,
            device_memory=None if config is None else config.engine.device_memory,
            host_memory=None if config is None else config.engine.host_memory,
        )  # fmt: skip
    if asked.cluster is None:
        raise ConfigError(f"simulate: expected --cluster, one of {', '.join([*CLUSTERS, THIS_MACHINE])}")
    return cluster_named(asked.cluster)


def _near(config: RunConfig | None) -> Path:
    """A folder on the disk that the records would be on."""
    place = Path() if config is None else config.store
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())


def shape_of(config: RunConfig) -> ModelShape:
    """The shape of a configuration's model, by the names that transformers gives its sizes.

    Raises:
        ConfigError: the model is no decoder of equal layers with these sizes.
    """
    from weightstream.config.architectures import architecture, vocabulary_of

    if config.model.factory is not None:
        raise ConfigError(
            f"model.factory: {config.model.factory} is known by its code, and a simulation of clusters goes by the sizes of a "
            f"decoder; `weightstream plan` predicts its steps on a machine that was measured, --model takes a preset"
        )
    whole, _ = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    found = whole.get_text_config()

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if getattr(found, name, None) is not None:
                return int(getattr(found, name))
        if default is None:
            raise ConfigError(
                f"model {found.model_type}: expected a decoder with {' or '.join(names)}, which its configuration has not; "
                f"give --model with a preset instead"
            )
        return default

    width, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    gated = getattr(found, "intermediate_size", None) is not None and found.model_type != "gpt_neox"
    return ModelShape(
        name=str(found.model_type), named=0.0, layers=size("num_hidden_layers", "n_layer"), width=width, heads=heads,
        kv_heads=size("num_key_value_heads", default=heads), head_width=size("head_dim", default=width // heads),
        intermediate=size("intermediate_size", "n_inner", default=4 * width), vocabulary=vocabulary_of(whole),
        sequence=config.training.sequence_length, gated=gated,
        experts=size("num_local_experts", "num_experts", default=1),
        experts_per_token=size("num_experts_per_tok", default=1),
        tied=bool(getattr(found, "tie_word_embeddings", False)),
        source="the configuration", unverified="counted by its sizes, as a decoder of equal layers",
    )  # fmt: skip


def simulated(
    asked: Asked,
    config: RunConfig | None,
    say: Say = lambda text: None,
    *,
    html: Path | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """What `--json` prints; also writes the page and the trace, where they are asked for."""
    found, outcome = report(asked, config, say, keep_spans=html is not None or trace is not None)
    if trace is not None:
        export(trace, (), outcome.spans)
    if html is not None:
        html.write_text(_page(found, outcome), encoding="utf-8")
    return found


def _page(found: Mapping[str, Any], outcome: Outcome) -> str:
    """One HTML file that loads nothing: the step, what is busy in it, and the curve."""
    last = max((span.step for span in outcome.spans), default=0)
    path = {
        f"{kind} on the critical path": format_seconds(seconds) for kind, seconds in found["critical_path_s"].items()
    }
    points = found["scaling"]
    lines = [
        Line("simulated", [p["workers"] for p in points], [p["tokens_per_s"] for p in points], markers=True),
        Line(
            "in proportion", [p["workers"] for p in points],
            [points[0]["tokens_per_s"] / points[0]["workers"] * p["workers"] for p in points], dash="dot",
        ),
    ]  # fmt: skip
    sections = (
        Section("Resources", (utilisation(found["utilisation"], limit=found["binds"]),)),
        Section(
            "Scaling", (figure_of(lines, x=f"{outcome.job.cluster.system}s", y="tokens/s", log_x=True, log_y=True),)
        ),
        Section("A step", (timeline([span for span in outcome.spans if span.step == last]),), wide=True),
        Section("Figures", (path, preformatted("all of it", text(found))), wide=True),
    )
    title = f"{found['model']} on {found['workers']} × {found['cluster']}"
    return page(title, sections, subtitle=f"simulated: batch {found['batch']:g} × {found['sequence']} tokens")


def claims() -> str:
    """`docs/claims.md`, with every number computed anew."""
    from weightstream.simulator.claims import page as page_of_claims

    return page_of_claims()


def report(
    asked: Asked, config: RunConfig | None, say: Say = lambda text: None, *, keep_spans: bool = False
) -> tuple[dict[str, Any], Outcome]:
    """What `--json` prints, and the outcome itself."""
    job = job_of(asked, config, say)
    found = run(job, keep_spans=keep_spans)
    points = curve(job, known=found)
    tokens = asked.tokens or TOKENS_PER_PARAMETER * job.model.parameters
    failures = Failures(asked.failures_per_hour, asked.recovery_s)
    goodput = failures.goodput(found.step_s, job.workers, steps_lost=2 if job.clipping else 1)
    hours = found.hours(tokens) / goodput if goodput > 0 else float("inf")
    plan = found.prepared
    return {
        "model": job.model.name, "parameters": job.model.parameters, "cluster": job.cluster.name, "workers": job.workers,
        "batch": job.batch, "sequence": job.sequence, "clipping": job.clipping, "micro_batches_each": plan.each,
        "blocks": plan.blocks, "device_bytes": plan.allotment.device_bytes, "spilled": plan.spilled,
        "step_s": found.step_s, "samples_per_s": found.samples_per_s, "tokens_per_s": found.tokens_per_s,
        "compute_share": found.compute_share, "utilisation": found.utilisation, "binds": found.binds,
        "critical_path_s": dict(found.critical_path),
        "down_bytes": found.down_bytes, "up_bytes": found.up_bytes, "read_bytes": found.read_bytes,
        "written_bytes": found.written_bytes, "scaling": [asdict(point) for point in points],
        "nonzeros": job.nonzeros, "sparsity": None if job.sparse is None else asdict(job.sparse),
        "store_bytes": job.needed_bytes, "room_parameters": job.reachable,
        "room_parameters_dense": None if job.sparse is None else replace(job, sparse=None).reachable,
        "tokens": tokens, "goodput": goodput, "hours": hours, "energy_kwh": hours * found.watts / 1000,
        "simulated": {"layers": found.layers, "of_layers": job.model.layers},
        "rests_on": _rests_on(job, found),
    }, found  # fmt: skip


def _rests_on(job: Job, found: Outcome) -> list[str]:
    lines = [job.cluster.describe(), f"model: {job.model.source}"]
    lines += [f"source: {source}" for source in job.cluster.sources]
    if found.layers < job.model.layers:
        spilled = found.prepared.spilled
        how = (
            "exact, since all of them are alike"
            if spilled in (0.0, 1.0)
            else f"to about 1%, since {spilled:.0%} of activations leave the device, in whole layers"
        )
        lines.append(
            f"{found.layers} of {job.model.layers} layers were simulated, and half of that; each further one adds as much: "
            f"{how}"
        )
    if found.prepared.layers < job.model.layers:
        lines.append(
            f"{found.prepared.blocks} blocks were planned from {found.prepared.layers} of {job.model.layers} layers, with "
            "memory divided for all of them: it may spill a little more than a plan of every block would"
        )
    if job.sparse is not None:
        lines.append(f"sparse: {job.sparse.says}; expanding them on the device takes no time")
    if not job.slowdown:
        lines.append("systems that do the same at the same time are simulated once")
    lines += [f"unverified: {what}" for what in (job.model.unverified, *job.cluster.unverified) if what]
    return lines


def text(found: Mapping[str, Any]) -> str:
    """The report as a person reads it."""
    path = sorted(found["critical_path_s"].items(), key=lambda pair: -pair[1])
    lines = [
        f"{found['model']} ({format_count(found['parameters'])} parameters) on {found['workers']} × {found['cluster']}, batch "
        f"{found['batch']:g} × {found['sequence']}",
        f"step              {format_seconds(found['step_s'])}: {found['samples_per_s']:.4g} samples/s, "
        f"{format_count(found['tokens_per_s'])} tokens/s; {found['binds']} binds",
        f"computes          {found['compute_share']:.1%} of the step; micro-batches of a system: {found['micro_batches_each']}",
        "utilisation       " + ", ".join(f"{key} {share:.1%}" for key, share in found["utilisation"].items()),
        "critical path     " + ", ".join(f"{key} {format_seconds(seconds)}" for key, seconds in path if seconds > 0),
        f"link of a system  {format_bytes(found['down_bytes'])} down, {format_bytes(found['up_bytes'])} up a step",
        f"device memory     {format_bytes(found['device_bytes'])}; {found['spilled']:.0%} of activations leave it",
        *_sparse_lines(found),
        f"store             {format_bytes(found['store_bytes'])}; it has room for a model like this of "
        f"{format_count(found['room_parameters'])} parameters"
        + (
            ""
            if found["room_parameters_dense"] is None
            else f" ({format_count(found['room_parameters_dense'])} were it dense)"
        ),
        f"run               {format_count(found['tokens'])} tokens: {found['hours']:.4g} h, {found['energy_kwh']:.4g} kWh"
        + (f"; goodput {found['goodput']:.2%} with failures" if found["goodput"] < 1 else ""),
        "",
        f"{'workers':>7}  {'step':>12}  {'tokens/s':>10}  {'efficiency':>10}  binds",
    ]
    lines += [
        f"{point['workers']:>7}  {format_seconds(point['step_s']):>12}  {format_count(point['tokens_per_s']):>10}  "
        f"{point['efficiency']:>10.1%}  {point['binds']}"
        for point in found["scaling"]
    ]
    return "\n".join([*lines, "", *found["rests_on"]])


def _sparse_lines(found: Mapping[str, Any]) -> list[str]:
    shape = found["sparsity"]
    if shape is None:
        return []
    rows, columns = shape["block"]
    products = "dense" if shape["speedup"] == 1 else f"{shape['speedup']:.3g} times as fast"
    return [
        f"sparse            {format_count(found['nonzeros'])} parameters exist: {shape['density']:.3g} of {shape['share']:.0%} "
        f"of each layer, in blocks of {rows}×{columns}; products {products}"
    ]


def _store_line(found: Mapping[str, Any]) -> str:
    dense = found["room_parameters_dense"]
    against = "" if dense is None else f" ({format_count(dense)} were it dense)"
    return (
        f"store             {format_bytes(found['store_bytes'])}; there is room for a model like this of "
        f"{format_count(found['room_parameters'])} parameters{against}"
    )


def validation() -> dict[str, Any]:
    """The table of published figures."""
    rows: Sequence[Row] = validate()
    efficiency = calibrate_efficiency()
    return {
        "efficiency": efficiency, "passed": sum(row.passes for row in rows), "rows": [row.to_json() for row in rows]
    }  # fmt: skip


def validation_text(found: Mapping[str, Any]) -> str:
    """The table as a person reads it."""
    width = max(len(row["name"]) for row in found["rows"])
    lines = [
        f"efficiency inside a layer, calibrated on the first row alone: {found['efficiency']:.1%} of dense peak, recomputation "
        f"counted",
        f"{'':{width}}  {'published':>10}  {'predicted':>10}  tolerance",
    ]
    for row in found["rows"]:
        verdict = "calibrates" if row["calibrates"] else "pass" if row["pass"] else f"FAIL {row['reason']}"
        lines.append(
            f"{row['name']:{width}}  {row['published']:>10.4g}  {row['predicted']:>10.4g}  {row['tolerance']:>9.0%}  {verdict}"
        )
    return "\n".join([*lines, f"{found['passed']} of {len(found['rows'])} rows pass"])
