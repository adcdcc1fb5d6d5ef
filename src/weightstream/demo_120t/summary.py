"""What the demonstration prints: a line for each step, and at the end what it came to, in words that claim no more."""

from statistics import fmean, median
from typing import Any

from weightstream.units import format_bytes, format_count, format_seconds

HEADING = "  step    loss  experts      new    so far       read    written  /least     memory  seconds"
_LAST = 5  # steps whose mean loss counts as the last
_DISK_BYTES_PER_S = 1e9
_DAY_S = 86_400


def row(step: dict[str, Any]) -> str:
    """One step: loss; experts reached, new ones among them, different ones so far; bytes, and how many times the least."""
    moved = (step["read"] + step["written"]) / step["least"]
    return (
        f"{step['step']:>6}  {step['loss']:.4f}  {step['touched']:>7,}  {step['new']:>7,}  {step['different']:>8,}  "
        f"{format_bytes(step['read']):>9}  {format_bytes(step['written']):>9}  {moved:>6.2f}  {format_bytes(step['rss']):>9}  "
        f"{step['seconds']:>7.2f}"
    )


def summary(report: dict[str, Any]) -> str:
    """What the demonstration showed, and what not."""
    trained = report["different_experts"] * report["expert_parameters"]
    moved, dense = report["read_bytes"] + report["written_bytes"], report["dense"]
    dense_bytes = dense["read_bytes"] + dense["written_bytes"]
    kills = report["killed_after_step"]
    lines = {
        "digest, killed": report["digest_killed"],
        "digest, never killed": report["digest_never_killed"],
        "": f"{_verdict(report)}: steps {report['compared_from_step']} to {report['steps']}, killed in the course of them after "
        f"{', '.join(map(str, kills))}, and made again in one go from the same snapshot",
        "parameters": f"{report['parameters']:,}: {report['layers']} layers of {report['experts']:,} experts of "
        f"{report['expert_parameters']:,} each",
        "ever trained": f"{report['different_experts']:,} experts, {format_count(trained)} parameters: one in "
        f"{report['parameters'] / trained:,.0f}; the others are defined by the seed and take no bytes",
        "loss": f"{report['losses'][0]:.2f} nats per byte at first, {fmean(report['losses'][-_LAST:]):.2f} at last "
        f"(mean of {_LAST} steps of {report['tokens']:,} bytes)",
        "a step": f"{report['touched_per_step']:,.0f} experts, {report['new_per_step']:,.0f} of them new; read "
        f"{format_bytes(report['read_per_step'])}, written {format_bytes(report['written_per_step'])}; "
        f"{report['seconds_per_step']:.2f} s (medians)",
        "bytes moved": f"{format_bytes(moved)}, {moved / report['least_bytes']:.2f} times the least of the steps that count",
        "memory": f"{format_bytes(report['peak_rss_bytes'])} at most, of a whole process",
        "disk": f"{format_bytes(report['disk_bytes'])} at most, in {report['folder']}",
        **_branches(report),
        "all of it": format_seconds(report["seconds"]),
    }
    width = max(map(len, lines)) + 2
    shown = "\n".join(f"{key:{width}}{text}" for key, text in lines.items())
    return f"""
{shown}

What this shows: capacity, exactness, and a cost that goes by what a step reaches. Real steps on real text were planned,
taken and committed in a space of {report["parameters"] / 1e12:.0f} trillion parameters; a run that was killed {len(kills)} times has the bits of
one that was not; and nothing that a step reads, writes or computes depends on how many experts there are.

What it does not show: quality. The hash that leads to experts learns nothing, most of those reached were reached once or
twice, and all others were never trained: what they are follows from the seed. {report["parameters"] / 1e12:.0f} trillion is a capacity, not knowledge.

Dense training of it would need {dense["state_bytes"] / 1e15:.1f} PB for masters and moments. Each step would read and write
{dense_bytes / 1e15:.1f} PB, {dense_bytes / _DISK_BYTES_PER_S / _DAY_S:.0f} days at 1 GB/s, and compute {dense["flop"] / 1e15:,.0f} PFLOP for the same {report["tokens"]:,} bytes of text."""


def _verdict(report: dict[str, Any]) -> str:
    return "equal, bit for bit" if report["equal"] else "NOT EQUAL"


def _branches(report: dict[str, Any]) -> dict[str, str]:
    losses = report["losses_by_rate"]
    found = {
        f"lr {rate}": f"loss {' '.join(f'{loss:.3f}' for loss in each)}, from step {report['steps'] + 1} on"
        for rate, each in losses.items()
    }
    made = f"{len(losses)} branches in {format_seconds(report['branch_seconds'])}, of {format_bytes(report['branch_bytes'])}"
    return {"branched": f"{made}; they share the files of the trained store"} | found
