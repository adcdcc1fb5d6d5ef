"""What a run came to: as `--json` prints it, and as a person reads it."""

from math import isfinite
from typing import Any

from weightstream.config.config import RunConfig
from weightstream.engine.engine import Engine
from weightstream.store.store import Store
from weightstream.trace.compare import Comparison, text_of
from weightstream.training.loop import Outcome
from weightstream.units import format_bytes, format_count, format_seconds

_LEAST_SHOWN = 0.005
"""The summary leaves out what takes a smaller part of a step."""


def report_of(
    config: RunConfig, engine: Engine, outcome: Outcome, samples: list[dict[str, str]], compared: Comparison | None
) -> dict[str, Any]:
    """What `fit --json` prints."""
    info = engine.store.info()
    before, after = outcome.before, outcome.after
    moved = outcome.read_bytes + outcome.written_bytes
    return {
        "step": outcome.step,
        "steps": config.training.steps,
        "stopped_by": outcome.stopped_by.name if outcome.stopped_by else None,
        "parameters": info["parameters"],
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity if after else None,
        "loss_before": before.loss,
        "loss_after": after.loss if after else None,
        "samples": samples,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "stalled_s": outcome.stalled_s,
        "skipped_steps": outcome.skipped_steps,
        "kernels": engine.kernels,
        "state_bytes": state_bytes(engine.store),
        "device_memory_bytes": config.engine.device_memory,
        "host_memory_bytes": config.engine.host_memory,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "read_bytes": outcome.read_bytes,
        "written_bytes": outcome.written_bytes,
        "bound_bytes": outcome.bound_bytes,
        "moved_over_bound": moved / outcome.bound_bytes if outcome.bound_bytes else None,
        "store": str(config.store),
        "trace": compared and compared.to_json() | {"text": text_of(compared, least=_LEAST_SHOWN)},
    }


def state_bytes(store: Store) -> int:
    """Masters and moments; not the copy that streams, which is made from them."""
    return sum(part.nbytes for layout in store.layouts.units for part in layout.parts if part.name != "copy")


def summary(report: dict[str, Any]) -> str:
    """The report of `fit` as a person reads it."""
    steps = f"{report['step']} of {max(report['step'], report['steps'])} steps"
    lines = [f"{steps}, {format_count(report['parameters'])} parameters"]
    after, before = report["perplexity_after"], report["perplexity_before"]
    if after is not None:
        lines.append(f"perplexity   {_plain(before)} before, {_plain(after)} after, on held-out text")
    if report["tokens"]:
        seconds, stalled = report["seconds"], report["stalled_s"] / report["seconds"]
        speed = format_count(report["tokens"] / seconds)
        lines.append(
            f"trained      {format_count(report['tokens'])} tokens in {format_seconds(seconds)}, {speed} tokens/s"
        )
        lines.append(f"waited       {format_seconds(report['stalled_s'])} for the store ({stalled:.1%})")
        lines.append(
            f"moved        {format_bytes(report['read_bytes'])} read, {format_bytes(report['written_bytes'])} written, "
            f"{report['moved_over_bound'] or 0:.3f} times the lower bound of steady steps"
        )
    times = report["state_bytes"] / report["device_memory_bytes"]
    lines += [
        f"state        {format_bytes(report['state_bytes'])} of masters and moments, {times:.1f} times device_memory "
        f"({format_bytes(report['device_memory_bytes'])})",
        f"memory       {format_bytes(report['peak_rss_bytes'])} at most, of the whole process",
        f"store        {report['store']}, committed at step {report['step']}",
    ]
    if report["skipped_steps"]:
        lines.append(f"skipped      {report['skipped_steps']} steps whose gradients were not finite")
    if report["trace"]:
        lines += ["", report["trace"]["text"]]
    for sample in report["samples"]:
        lines += ["", f"sample, after {sample['prompt']!r}:", *(f"    {line}" for line in _shown(sample))]
    return "\n".join(lines)


def _shown(sample: dict[str, str]) -> list[str]:
    return (sample["prompt"] + sample["continued"]).splitlines()


def _plain(number: float) -> str:
    return f"{number:.2f}" if isfinite(number) and number < 1e6 else f"{number:.3g}"
