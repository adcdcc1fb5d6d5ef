"""The page of a run: read from its folder, whether it is over, still going, or was killed."""

import datetime
from collections.abc import Mapping, Sequence
from math import exp, isfinite
from pathlib import Path
from typing import Any

import yaml

from weightstream.errors import ConfigError
from weightstream.report.figures import (
    Line,
    Section,
    Table,
    bars,
    curve,
    page,
    preformatted,
    timeline,
    utilisation,
)
from weightstream.trace.compare import NOT_PREDICTED, Comparison, compared
from weightstream.trace.files import Trace, read_trace
from weightstream.trace.spans import RESOURCES
from weightstream.training.metrics import read_metrics
from weightstream.units import GIB, format_bytes, format_count, format_seconds, parse_bytes

MOST_POINTS = 4000
"""Of longer runs only so many steps are drawn, evenly spaced."""

Step = Mapping[str, Any]


def write_report(run: Path, out: Path) -> dict[str, Any]:
    """Write a run's page.

    Raises:
        ConfigError: there is no run, or nothing of it yet.
    """
    found = report(run)
    out.write_text(found, encoding="utf-8")
    return {"report": str(out), "bytes": out.stat().st_size}


def report(run: Path) -> str:
    """A run's page as HTML."""
    trace = read_trace(run)
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    config = _config(run)
    if not lines and not config:
        raise ConfigError(f"{run} is no run: expected config.yaml and metrics.jsonl, which `weightstream fit` writes")
    steps = [line for line in lines if line.get("kind") == "train"]
    validations = [line for line in lines if line.get("kind") == "validation"]
    comparison = compared(trace)
    sections = [Section("Run", [_facts(config, steps, validations), _settings(run)], wide=True)]
    several = (_value(config, "cluster", "workers") or 1) != 1 or _value(config, "cluster", "memory") not in (
        None,
        "colocated",
    )
    drawn = steps[:: len(steps) // MOST_POINTS + 1]
    sections += [
        _loss(drawn, validations),
        _speed(drawn),
        _memory(drawn, config),
        _bytes(drawn, several=several),
        _stalls(drawn),
        *_masks_and_experts(lines),
    ]
    sections += [_utilisation(comparison), *_timelines(trace), _comparison(comparison)]
    return page(f"weightstream: {run.resolve().name}", sections, subtitle=_standing(config, steps, validations))


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return found if isinstance(found, dict) else {}


def _settings(run: Path) -> str:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else "the run has none yet"
    return preformatted("config.yaml", text)


def _value(config: Mapping[str, Any], *keys: str) -> Any:
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _standing(config: Mapping[str, Any], steps: Sequence[Step], validations: Sequence[Step]) -> str:
    planned = _value(config, "training", "steps")
    done = steps[-1]["step"] if steps else 0
    of = f" of {planned}" if planned else ""
    last = max((line["time"] for line in (*steps, *validations)), default=None)

    when = "" if last is None else f", last written {datetime.datetime.fromtimestamp(last):%Y-%m-%d %H:%M:%S}"
    over = "" if not planned or done >= planned else "; it is going on, or was stopped"
    return f"step {done}{of}{when}{over}"


def _facts(config: Mapping[str, Any], steps: Sequence[Step], validations: Sequence[Step]) -> dict[str, str]:
    training, engine = _value(config, "training") or {}, _value(config, "engine") or {}
    model = _value(config, "model") or {}
    found = {"model": ", ".join(f"{key} {value}" for key, value in model.items() if value and value is not True)}
    if training:
        found["a step"] = (
            f"{training.get('micro_batches')} micro-batches of {training.get('micro_batch_size')} sequences of "
            f"{training.get('sequence_length')} tokens"
        )
    if engine:
        found["memory given"] = (
            f"device {_bytes_text(engine.get('device_memory'))}, host {_bytes_text(engine.get('host_memory'))}, "
            f"{engine.get('precision')}"
        )
    cluster = _value(config, "cluster") or {}
    if cluster:
        found["cluster"] = f"{cluster.get('workers')} worker(s), memory {cluster.get('memory')}"
    counted = [step for step in steps if step.get("seconds")]
    if counted:
        seconds = sum(step["seconds"] for step in counted)
        tokens = sum(step["tokens_per_s"] * step["seconds"] for step in counted)
        stalled = sum(step["stalled_s"] for step in counted)
        moved, bound = (sum(_moved(step) for step in counted), sum(step["bound_bytes"] for step in counted))
        found |= {
            "trained": f"{format_count(tokens)} tokens in {format_seconds(seconds)}, {format_count(tokens / seconds)}/s",
            "waited": f"{format_seconds(stalled)} for bytes ({stalled / seconds:.1%})",
            "moved": f"{format_bytes(moved)}"
            + (f", {moved / bound:.3f} times the bound of steady steps" if bound else ""),
            "memory used": f"{format_bytes(max(step['rss_bytes'] for step in counted))} at most, of the whole process",
        }
        if skipped := sum(bool(step.get("skipped")) for step in steps):
            found["skipped"] = f"{skipped} steps whose gradients were not finite"
    if validations:
        last = validations[-1]
        found["validation"] = f"loss {last['loss']:.4f} at step {last['step']}, perplexity {_perplexity(last['loss'])}"
    return {key: value for key, value in found.items() if value}


def _perplexity(loss: float) -> str:
    return f"{exp(loss):.4g}" if isfinite(loss) and loss < 50 else "beyond counting"


def _bytes_text(value: Any) -> str:
    return format_bytes(parse_bytes(value)) if value is not None else "?"


def _moved(step: Step) -> int:
    return int(step["read_bytes"] + step["written_bytes"])


def _line(name: str, steps: Sequence[Step], value: Any, **style: Any) -> Line:
    return Line(name, [step["step"] for step in steps], [value(step) for step in steps], **style)


def _loss(steps: Sequence[Step], validations: Sequence[Step]) -> Section:
    lines = [
        _line("training", steps, lambda step: step["loss"]),
        _line("validation", validations, lambda line: line["loss"], markers=True),
    ]
    return Section("Loss", [curve(lines, x="step", y="nats per token")])


def _speed(steps: Sequence[Step]) -> Section:
    return Section("Throughput", [
        curve([_line("tokens/s", steps, lambda step: step["tokens_per_s"])], x="step", y="tokens per second",
              from_zero=True)
    ])  # fmt: skip


def _memory(steps: Sequence[Step], config: Mapping[str, Any]) -> Section:
    lines = [_line("the whole process", steps, lambda step: step["rss_bytes"] / GIB)]
    engine = _value(config, "engine") or {}
    on_cpu = engine.get("device", "cpu") == "cpu"
    given = [engine.get("host_memory"), engine.get("device_memory") if on_cpu else None]
    budget = sum(parse_bytes(value) for value in given if value is not None)
    if budget and steps:
        name = "device_memory + host_memory" if on_cpu else "host_memory"
        lines.append(_line(name, steps, lambda step: budget / GIB, dash="dash"))
    text = "The process has libraries and the interpreter beside what its budgets bound."
    return Section("Memory", [curve(lines, x="step", y="GiB", from_zero=True), text])


def _bytes(steps: Sequence[Step], *, several: bool) -> Section:
    title = "Bytes between host and disk, of the first rank" if several else "Bytes between host and disk"
    return Section(title, [
        curve([
            _line("read", steps, lambda step: step["read_bytes"] / GIB),
            _line("written", steps, lambda step: step["written_bytes"] / GIB),
            _line("both", steps, lambda step: _moved(step) / GIB),
            _line("lower bound of both", steps, lambda step: step["bound_bytes"] / GIB, dash="dash"),
        ], x="step", y="GiB per step", from_zero=True)
    ])  # fmt: skip


def _stalls(steps: Sequence[Step]) -> Section:
    return Section("Seconds of a step, and those in which compute waited", [
        curve([
            _line("step", steps, lambda step: step["seconds"]),
            _line("waited", steps, lambda step: step["stalled_s"]),
        ], x="step", y="seconds", from_zero=True)
    ])  # fmt: skip


def _masks_and_experts(lines: Sequence[Step]) -> list[Section]:
    """How masks of sparse parameters changed, and how many experts steps reached; nothing where there was none of it."""
    found = []
    for kind, title, axis in (
        ("density", "Part of each sparse parameter that exists", "density"),
        ("turnover", "Part of what exists that a mask update made", "turnover"),
        ("experts", "Experts that a step reached", "experts"),
    ):
        points = [line for line in lines if line.get("kind") == kind]
        names = sorted({name for line in points for name in line} - {"kind", "step", "time"})
        drawn = [_line(name, [p for p in points if name in p], lambda line, name=name: line[name]) for name in names]
        if drawn:
            found.append(Section(title, [curve(drawn, x="step", y=axis, from_zero=True)]))
    return found


def _utilisation(comparison: Comparison | None) -> Section:
    title = "How busy each resource is, in a step on average"
    if comparison is None or not comparison.step_s:
        return Section(title, [_NO_TRACE])
    busy: dict[str, float] = {}
    for row in comparison.rows:
        if row.kind == "between":
            continue
        busy[row.resource] = busy.get(row.resource, 0.0) + row.measured.seconds
    order = [*(name for name in RESOURCES if name in busy), *(name for name in busy if name not in RESOURCES)]
    return Section(title, [utilisation({name: busy[name] / comparison.step_s for name in order})])


_NO_TRACE = "There is no trace of this run yet: fit writes it at its third step and at the end."


def _timelines(trace: Trace) -> list[Section]:
    """The last traced step, and a predicted one."""
    if not trace.spans:
        return [Section("Timeline of a step", [_NO_TRACE], wide=True)]
    last = max(span.step for span in trace.spans)
    text = "Drag to zoom in, double-click to see all again; a click in the legend hides a kind."
    found = [
        Section(f"Timeline of step {last}", [text, timeline([s for s in trace.spans if s.step == last])], wide=True)
    ]
    if trace.predicted:
        found.append(Section("Timeline of a step as it was predicted", [timeline(trace.predicted)], wide=True))
    return found


def _comparison(comparison: Comparison | None) -> Section:
    title = "Predicted against measured, per step"
    if comparison is None:
        return Section(title, [_NO_TRACE], wide=True)
    predicted = comparison.predicted_s is not None
    head = ["operation", "resource", "measured s", *(["predicted s", "ratio"] if predicted else []), "count", "bytes"]
    rows = []
    for row in comparison.rows:
        both = [f"{row.measured.seconds:.4f}"]
        if predicted:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            both += [f"{row.predicted.seconds:.4f}" if row.predicted else "", ratio]
        nbytes = format_bytes(round(row.measured.nbytes)) if row.measured.nbytes else ""
        rows.append([row.kind, row.resource, *both, f"{row.measured.count:.0f}", nbytes])
    whole = ["step", "", f"{comparison.step_s:.4f}"]
    if comparison.predicted_s is not None:
        whole += [f"{comparison.predicted_s:.4f}", f"{comparison.predicted_s / comparison.step_s:.2f}"]
    parts: list[Any] = [Table(head, [*rows, [*whole, "", ""]], words=2)]
    if predicted:
        names = [f"{row.kind} ({row.resource})" for row in comparison.rows]
        figure = bars({
            "measured": dict(zip(names, [row.measured.seconds for row in comparison.rows], strict=True)),
            "predicted": dict(
                zip(names, [row.predicted.seconds if row.predicted else 0.0 for row in comparison.rows], strict=True)
            ),
        }, y="seconds per step")  # fmt: skip
        parts.insert(0, figure)
    else:
        parts.append(NOT_PREDICTED)
    steps = f"Averages of {comparison.steps} steps." if comparison.steps > 1 else "Of one step."
    return Section(title, [steps, *parts], wide=True)
