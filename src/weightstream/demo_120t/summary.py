"""What the demonstration prints: a line for each step, and at the end what it came to, in words that claim no more."""

from statistics import fmean
from textwrap import fill
from typing import Any

from weightstream.units import format_bytes, format_count, format_seconds

HEADING = "  step    loss  experts      new    so far       read    written  /least     memory  seconds"
_LAST = 5  # steps whose mean loss counts as the last
_DISK_BYTES_PER_S = 1e9
_DAY_S = 86_400
_WIDTH = 100


def row(step: dict[str, Any]) -> str:
    """One step: loss; experts reached, new ones among them, different ones so far; bytes, and how many times the least."""
    return (
        f"{step['step']:>6}  {step['loss']:.4f}  {step['touched']:>7,}  {step['new']:>7,}  {step['different']:>8,}  "
        f"{format_bytes(step['read']):>9}  {format_bytes(step['written']):>9}  {moved_over_least(step):>6.2f}  "
        f"{format_bytes(step['rss']):>9}  {step['seconds']:>7.2f}"
    )


def moved_over_least(step: dict[str, Any]) -> float:
    """What a step moved between host and disk, over the least that it could have been."""
    return float((step["read"] + step["written"]) / step["least"])


def summary(report: dict[str, Any]) -> str:
    """What the demonstration showed, and what not."""
    trained = report["different_experts"] * report["expert_parameters"]
    lines = {
        "digest, killed": report["digest_killed"],
        "digest, not killed": report["digest_not_killed"],
        "": "equal, bit for bit" if report["equal"] else "NOT EQUAL",
        "killed": f"after steps {', '.join(map(str, report['killed_after_step']))}; not killed: steps "
        f"{report['compared_from_step']} to {report['steps']} in one go, from a snapshot that both begin with",
        "parameters": f"{report['parameters']:,}: {report['layers']} layers of {report['experts']:,} experts of "
        f"{report['expert_parameters']:,} each",
        "ever trained": f"{report['different_experts']:,} experts, {format_count(trained)} parameters: one in "
        f"{report['parameters'] / trained:,.0f}; the seed defines the others, which take no bytes",
        "loss": f"{report['losses'][0]:.2f} nats per byte at first, {fmean(report['losses'][-_LAST:]):.2f} at last (mean of "
        f"{_LAST} steps of {report['tokens']:,} bytes)",
        "a step": f"{report['touched_per_step']:,.0f} experts, {report['new_per_step']:,.0f} of them new; "
        f"{format_bytes(report['read_per_step'])} read, {format_bytes(report['written_per_step'])} written; "
        f"{report['seconds_per_step']:.2f} s (medians)",
        "bytes": f"{report['moved_over_least']:.2f} times the lower bound of a step (median, but for each process's first)",
        "memory": f"{format_bytes(report['peak_rss_bytes'])} at most, of a whole process",
        "disk": f"{format_bytes(report['disk_bytes'])} at most, in {report['folder']}, which stays until you remove it",
        "branched": f"{len(report['losses_by_rate'])} branches in {format_seconds(report['branch_seconds'])}, for "
        f"{format_bytes(report['branch_bytes'])}: they share the trained store's files",
        **{
            f"  lr {rate}": f"loss {' '.join(f'{loss:.3f}' for loss in losses)}, from step {report['steps'] + 1} on"
            for rate, losses in report["losses_by_rate"].items()
        },
        "all of it": format_seconds(report["seconds"]),
    }
    width = max(map(len, lines)) + 2
    shown = [f"{key:{width}}{text}" for key, text in lines.items()]
    return "\n".join(["", *shown, *("\n" + fill(text, _WIDTH) for text in _claim(report))])


def _claim(report: dict[str, Any]) -> list[str]:
    """In words that claim no more than was shown."""
    parameters, dense = f"{report['parameters'] / 1e12:.0f} trillion", report["dense"]
    nbytes = dense["read_bytes"] + dense["written_bytes"]
    return [
        f"What this shows: capacity, exactness, and a cost that goes by what a step reaches. Steps on real text were planned, "
        f"taken and committed in a space of {parameters} parameters; what was killed {len(report['killed_after_step'])} times "
        f"has the bits of what was not; how many experts there are is in none of the bytes that a step moves.",
        f"What it does not show: quality. The hash that leads to experts learns nothing, most of those reached were reached "
        f"once or twice, and all others were never trained: what they are follows from the seed. {parameters} is a capacity, "
        f"not knowledge.",
        f"Training all of them densely would need {dense['state_bytes'] / 1e15:.1f} PB for masters and moments. A step would "
        f"move {nbytes / 1e15:.1f} PB at least, which takes {nbytes / _DISK_BYTES_PER_S / _DAY_S:,.0f} days at 1 GB/s, and "
        f"compute {dense['flop'] / 1e15:,.0f} PFLOP for the same {report['tokens']:,} bytes of text.",
    ]
