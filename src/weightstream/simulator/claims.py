"""`docs/claims.md`: the announcement's claims, each with what the simulation says. Every number is computed when it is written.

Simulated once per figure; the words around them are fixed, so that a change of the planner or the simulator shows as a
change of numbers in the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from weightstream.simulator.clusters import CLUSTERS
from weightstream.simulator.jobs import PROVISIONED_BYTES, Job
from weightstream.simulator.models import MODELS
from weightstream.simulator.outcomes import Failures, Outcome, Point, counts_to, curve, least_batch, run
from weightstream.simulator.validation import Row, validate
from weightstream.units import format_count, format_seconds

SYSTEMS = 192
BATCH = 1536
"""Sequences of 2,048 tokens: 3.1 million tokens, as GPT-3 175B had (Brown et al. 2020, table 2.1: 3.2 M), in equal parts."""
SEQUENCE = 2048
SCALED = ("gpt3-175b", "1t", "120t")
EXPERTS = "120t-moe"
ENOUGH = 0.95
TRILLION = 1e12

_COMPONENTS = (
    ("wafer (CS-2): computes one layer at a time and keeps activations",
     "worker: a rank that computes, in `worker/`", "weightstream fit --model llama-60m --workers 4"),
    ("MemoryX: parameters and optimizer state, updated there", "store: `store/`, owned by memory ranks",
     "weightstream fit CONFIG.yaml cluster.workers=4 cluster.memory=2"),
    ("SwarmX: broadcast down, sums up", "fabric: `fabric/`, over chains or trees",
     "weightstream fit CONFIG.yaml cluster.workers=4"),
    ("weight streaming: layer by layer, forward and back", "schedule: `schedule/`, executed and simulated alike",
     "weightstream plan CONFIG.yaml"),
    ("selectable sparsity", "sparse parameters: only non-zeros in records, on links and in updates, `sparse/`",
     "weightstream fit configs/sparse-60m.yaml"),
    ("push-button: model, systems, output, length", "four options and nothing else",
     "weightstream fit --model llama-60m --workers 192 --out runs/wide --steps 100"),
    ("the cluster that was announced, before it was built", "simulator: `simulator/`",
     "weightstream simulate --model 120t --cluster cs-2 --workers 192 --batch 1536"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scaled:
    """A model on 1 to 192 systems."""

    model: str
    points: Sequence[Point]
    most: Outcome
    enough: int | None


def gather() -> tuple[Sequence[Row], list[Scaled], Outcome]:
    """All that the page is made of: the validation's rows, the scaling of three models, and a step of one with experts."""
    jobs = {
        name: Job(model=MODELS[name], cluster=CLUSTERS["cs-2"], workers=SYSTEMS, batch=BATCH, sequence=SEQUENCE)
        for name in (*SCALED, EXPERTS)
    }
    return validate(), [_scaled(jobs[name]) for name in SCALED], run(jobs[EXPERTS])


def _scaled(job: Job) -> Scaled:
    most = run(job)
    return Scaled(job.model.name, curve(job, known=most), most, least_batch(job, ENOUGH, known=most))


def page() -> str:
    """The page as Markdown."""
    rows, scaled, experts = gather()
    by_name = {item.model: item for item in scaled}
    sections = (
        _head(), _components(), _scaling(scaled), _needs(by_name["120t"].most, experts, by_name["120t"].enough),
        _claims(by_name, experts), _validation(rows), _assumptions(),
    )  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _head() -> str:
    return (
        "# Claims\n\n"
        "What was announced in August 2021, and what a simulation of it says. This page is the output of\n"
        "`weightstream simulate --claims`; a test compares the two. Each step that is simulated is a `Schedule` of the\n"
        "planner that the runtime executes; the clusters and models are presets with their sources in\n"
        "`simulator/clusters.py` and `simulator/models.py`."
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in body)]
    return "\n".join(f"| {line} |" for line in lines)


def _components() -> str:
    body = [
        (announced, here, command if command == "–" else f"`{command}`") for announced, here, command in _COMPONENTS
    ]
    return "## From the announced cluster to this system\n\n" + _table(("announced", "here", "command"), body)


def _scaling(scaled: Sequence[Scaled]) -> str:
    counts = counts_to(SYSTEMS)
    head = ("model", *(f"{count}" for count in counts), f"batch for {ENOUGH:.0%} on {SYSTEMS}")
    body = []
    for item in scaled:
        of = {point.workers: f"{point.efficiency:.1%}" for point in item.points}
        efficiency = [of.get(count, "–") for count in counts]
        enough = (
            "none, doubling while it fits"
            if item.enough is None
            else f"{item.enough:,} ({item.enough // SYSTEMS} each)"
        )
        body.append((item.model, *efficiency, enough))
    return (
        f"## Scaling to {SYSTEMS} systems\n\n"
        f"Tokens per second and system against the fewest CS-2 that have room for it, with the same batch of {BATCH:,} ×\n"
        f"{SEQUENCE:,} tokens on any number of systems ({format_count(BATCH * SEQUENCE)} tokens; strong scaling), without\n"
        f"clipping. “–”: what goes from layer to layer does not fit so few wafers. The last column is\n"
        f"the smallest batch with which {SYSTEMS} systems compute for {ENOUGH:.0%} of a step. Weights are streamed at\n"
        f"the same rate whatever the number of systems, so what decides is how many tokens each of them has.\n\n"
        + _table(head, body)
    )


def _floor_s(found: Outcome) -> float:
    link = found.job.cluster.link
    assert link is not None
    return found.down_bytes / link.bytes_per_s


def _needs(dense: Outcome, experts: Outcome, enough: int | None) -> str:
    def column(found: Outcome, batch: str) -> tuple[str, ...]:
        model, blocks = found.job.model, found.prepared.facts.blocks
        days = found.hours(TRILLION) / 24
        return (
            f"{format_count(model.parameters)}, {model.layers} layers of width {model.width:,}",
            f"{found.prepared.blocks:,}, of at most {max(block.streamed_bytes for block in blocks) / 1e9:.2g} GB",
            f"{PROVISIONED_BYTES * model.parameters / 1e15:.2f} PB",
            format_seconds(_floor_s(found)), format_seconds(found.step_s), f"{found.compute_share:.1%}",
            f"{found.prepared.spilled:.0%}", batch, f"{days:,.0f} ({days / 365:,.1f} years)",
            f"{found.energy_kwh(TRILLION) / 1e6:,.1f} GWh",
        )  # fmt: skip

    dense_batch = "none fits" if enough is None else f"{enough:,} × {SEQUENCE:,}"
    # what it computes grows with the batch, what it streams does not
    times = ENOUGH / experts.compute_share
    experts_batch = f"over {times * BATCH:,.0f} × {SEQUENCE:,}, by proportion"
    names = (
        "parameters", "blocks", f"memory at {PROVISIONED_BYTES} B a parameter", "I/O floor per direction and step",
        f"step with a batch of {BATCH:,}", "computes", "activations that leave the wafer", f"batch for {ENOUGH:.0%}",
        "days per trillion tokens", "energy per trillion tokens",
    )  # fmt: skip
    body = list(zip(names, column(dense, dense_batch), column(experts, experts_batch), strict=True))
    dense_floor = format_seconds(_floor_s(dense))
    return (
        f"## What 120 trillion parameters need\n\n"
        f"On {SYSTEMS} CS-2. No shape was published; both are ours. A layer of the dense one does not fit a wafer of 40 GB\n"
        f"and is cut into blocks (two slabs and the gradient of a block may take 40% of it).\n\n"
        + _table(("", "120t, dense", "120t-moe"), body)
        + f"\n\n**The I/O floor is {dense_floor} per step and direction**, whatever the batch and the number of systems:\n"
        "that is how long 32 bits of each parameter take over 150 GB/s. More systems shorten the computing, never that.\n"
        "A smaller batch leaves the systems idle; a larger one takes longer."
    )


def _claims(by_name: dict[str, Scaled], experts: Outcome) -> str:
    dense = by_name["120t"]
    job = dense.most.job
    failing = Failures(rate_per_hour=1e-4, recovery_s=600)
    goodput = failing.goodput(dense.most.step_s, SYSTEMS)
    wide = {name: item.points[-1].efficiency for name, item in by_name.items()}
    each = {name: "none fits" if item.enough is None else f"{item.enough:,}" for name, item in by_name.items()}
    shares = {name: item.most.compute_share for name, item in by_name.items()} | {EXPERTS: experts.compute_share}
    days = dense.most.hours(TRILLION) / 24
    updates = job.update_s
    claims = (
        ("“120 trillion parameters” on one cluster",
         f"{PROVISIONED_BYTES * job.model.parameters / 1e15:.2f} PB of memory hold them, as announced (2.4 PB). A step of "
         f"{format_count(job.tokens)} tokens takes {format_seconds(dense.most.step_s)} on {SYSTEMS} systems, a trillion tokens "
         f"{days / 365:,.0f} years.",
         "efficiency inside a layer as on GPT-J 6B; dense; 16 bits per weight on the way down, fp32 gradients",
         "that it be trained on far fewer tokens than its parameters ask for, or that few of them meet a token (experts, "
         "sparsity), or that systems become much faster. Holding it is one thing, training it another."),
        ("near-linear scaling to 192 systems",
         "efficiency on 192 against the fewest that have room for the same batch: "
         + ", ".join(f"{name} {share:.1%}" for name, share in wide.items())
         + "; 95% needs batches of " + ", ".join(f"{name} {text}" for name, text in each.items()) + ".",
         f"batch {BATCH:,} × {SEQUENCE:,}; no stragglers; SwarmX at line rate with 2 µs a hop",
         "a batch that is large enough. What each system has to compute must take longer than streaming the weights past it; "
         "a model with experts computes less for each weight, and needs a batch to match."),
        ("weights of a layer are fetched before the layer before it ends, so that streaming costs nothing",
         f"of a step on {SYSTEMS} systems, the share that is not computing: "
         + ", ".join(f"{name} {1 - share:.1%}" for name, share in shares.items()) + ".",
         "three slabs on the wafer; the first layer of a step is the one that is waited for",
         f"as above; and 40 GB must hold two blocks, a gradient and the activations. Of the activations between blocks, "
         f"{by_name['gpt3-175b'].most.prepared.spilled:.0%} (gpt3-175b), {by_name['1t'].most.prepared.spilled:.0%} (1t) and "
         f"{dense.most.prepared.spilled:.0%} (120t) do not fit at these batches, and would have to leave the wafer."),
        ("one MemoryX feeds any number of systems, and updates all parameters",
         f"it sends each byte once whatever the number. Updating 120 trillion parameters at 4 TB/s takes "
         f"{format_seconds(updates)}, beside the computing of a step of {format_seconds(dense.most.step_s)}.",
         "4 TB/s, known only as quoted by others; 30 bytes of memory traffic a parameter",
         "the trees of SwarmX must broadcast and add at line rate. If 4 TB/s are of its largest unit, smaller ones take "
         "longer."),
        ("a model trains on 1 to 192 systems with no change of software",
         "the schedule is the same but for who computes which micro-batch; here the trained bits are the same as well.",
         "reduction groups fixed at 192 when the store is made",
         "nothing: this is measured, not simulated (tests compare runs with different numbers of workers)."),
        ("selectable sparsity: only what is not zero is sent and computed",
         "not simulated at this size. Here sparse parameters are stored, sent, summed and updated by their non-zeros, and "
         "the trained bits are those of masked dense training (tests).", "–",
         "that the model learns as well with them, which is a matter of training, and that processors gain by them, which "
         "these do below a measured density only."),
        ("15 kW a system",
         f"{SYSTEMS} systems draw {dense.most.watts / 1e6:.2f} MW: {dense.most.energy_kwh(TRILLION) / 1e6:,.1f} GWh for a "
         f"trillion tokens through the dense model.",
         "the systems alone, always at full power", "MemoryX, SwarmX and cooling come on top."),
        ("it does not depend on all parts being well (not claimed)",
         f"with {failing.rate_per_hour:g} failures an hour and system and {failing.recovery_s / 60:.0f} minutes to recover, "
         f"{goodput:.1%} of the time ends in committed steps of the dense model on {SYSTEMS} systems.",
         "the step in flight is lost; Daly 2006, equation 13. The rate is an example, none was published",
         "with steps of hours, one would commit within a step, or make them smaller."),
    )  # fmt: skip
    body = [
        f"### {number}. {claim}\n\n- **The simulation:** {says}\n- **Assumed:** {assumes}\n"
        f"- **What would have to hold:** {holds}"
        for number, (claim, says, assumes, holds) in enumerate(claims, 1)
    ]
    return "## Claim by claim\n\n" + "\n\n".join(body)


def _validation(rows: Sequence[Row]) -> str:
    body = [
        (
            row.figure.name, f"{row.figure.published:.3g}", f"{row.predicted:.3g}", f"{row.figure.tolerance:.0%}",
            "calibrates" if row.figure.calibrates else "pass" if row.passes else f"**fail**: {row.reason}", row.figure.assumes,
        )
        for row in rows
    ]  # fmt: skip
    head = ("published figure", "published", "predicted", "tolerance", "", "assumed")
    return (
        "## Published figures\n\n"
        "`weightstream simulate --validate`. The efficiency inside a layer comes from the first row alone; the others are\n"
        "predicted with it, and stay as they come out.\n\n" + _table(head, body)
    )


def _assumptions() -> str:
    cluster = CLUSTERS["cs-2"]
    lines = [f"- {source}" for source in cluster.sources]
    lines += [f"- unverified: {what}" for what in cluster.unverified]
    return f"## What all of it rests on\n\n{cluster.describe()}\n\n" + "\n".join(lines)
