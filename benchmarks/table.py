"""The tables of the README and of `docs/120t.md`, made from `benchmarks/results/*.json`.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put each between the marker comments of its page

In the README's a pair of rows is one benchmark: weightstream and its control, run in turn on the same machine. Where there
is no result there is no row.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
RESULTS = TREE / "benchmarks" / "results"
BEGIN = "<!-- measured: made by benchmarks/table.py -->"
END = "<!-- end of measured -->"
TOKENS = (2048, 512, 128, 8192)  # of `step.py`; the README shows the first that was measured
HEAD = (
    "## Measured",
    "Masters and moments on disk alone, none of them kept in RAM between uses, beside controls that ran in turn; medians.",
    "",
    "| tokens per step | how | seconds per step (least to most) | peak memory of the process | checkpoint included |",
    "| ---: | --- | --- | ---: | --- |",
)
EVERY_STEP = "each step, durable"


def table(results: Path = RESULTS) -> str:
    """The table and what it was measured on, as Markdown; empty where nothing was measured."""
    rows, sources = [], []
    step = next((found for tokens in TOKENS if (found := _read(results / f"step-{tokens}.json"))), None)
    if step is not None:
        rows += [
            _row(step, "PyTorch, resident in memory", "resident_s", "resident_peak_rss_bytes", "none"),
            _row(step, "weightstream, streamed from disk", "streamed_s", "peak_rss_bytes", EVERY_STEP),
        ]
        sources.append(step)
    for tokens in (2048, 512):
        peer = _read(results / f"deepspeed-{tokens}.json")
        if peer is not None:
            name = f"{peer['peer'].replace('==', ' ')}, ZeRO-Infinity on the same disk"
            rows += [
                _row(peer, name, "peer_s", "peer_peak_rss_bytes", "none"),
                _row(peer, "weightstream, in turn with it", "streamed_s", "peak_rss_bytes", EVERY_STEP),
            ]
            sources.append(peer)
    if not rows:
        return ""
    return "\n".join([*HEAD, *rows, "", *_notes(sources)])


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _row(result: dict[str, Any], how: str, seconds: str, memory: str, checkpoint: str) -> str:
    least, most = result[f"{seconds}_spread"]
    return (
        f"| {result['tokens']:,} | {how} | {result[seconds]:.2f} ({least:.2f} to {most:.2f}) | "
        f"{result[memory] / 2**30:.2f} GiB | {checkpoint} |"
    )


def _notes(sources: list[dict[str, Any]]) -> Iterator[str]:
    for found in sources:
        yield (
            f"`{found['command']}`: {found['parameters'] / 1e6:.1f} M parameters, {found['layers']} layers of width "
            f"{found['width']}; {found['runs']} turns of each side; {_where(found)}"
        )
        yield ""


def _where(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; torch {versions['torch']}; "
        f"commit {found['commit']}, {found['date'][:10]}."
    )


def headline(results: Path = RESULTS) -> str:
    """What `headline.py` measured, as Markdown; empty where nothing was measured."""
    found = _read(results / "headline.json")
    if found is None:
        return ""
    rows = [
        "| experts per layer | parameters of experts | seconds per step (least to most) | peak memory of the process "
        "| loss on held-out files, nats per byte |",
        "| ---: | ---: | --- | ---: | ---: |",
        _family(found, found["experts"], "seconds_per_step", "peak_rss_bytes", "validation_loss"),
        *(
            _family(found, count, f"{name}_seconds_per_step", f"{name}_peak_rss_bytes", f"{name}_validation_loss")
            for name, count in (("small_family", found["small_experts"]), ("no_expert", 0))
        ),
        "",
        *_reached(found),
        "",
        *_by_experts(found),
        f"`{found['command']}`: {found['runs']} turns of each side; {_where(found)}",
    ]
    return "\n".join(rows)


def _family(found: dict[str, Any], experts: int, seconds: str, memory: str, loss: str) -> str:
    least, most = found[f"{seconds}_spread"]
    return (
        f"| {experts:,} | {found['layers'] * experts * found['expert_parameters']:,} | "
        f"{found[seconds]:.2f} ({least:.2f} to {most:.2f}) | {found[memory] / 2**30:.2f} GiB | {found[loss]:.3f} |"
    )


def _reached(found: dict[str, Any]) -> Iterator[str]:
    megabytes = {
        key: f"{found[key] / 1e6:,.0f} MB"
        for key in ("expert_bytes_read", "expert_bytes_written", "bytes_read", "bytes_written")
    }
    yield (
        f"In {found['steps']} steps of {found['tokens']:,} tokens {found['touched_experts']:,} different experts were "
        f"reached, {found['touched_parameters'] / 1e9:.2f} billion parameters. A step reaches "
        f"{found['touched_per_step']:,.0f}, of which {found['new_per_step']:,.0f} are new (medians). By the arithmetic it "
        f"then reads {megabytes['expert_bytes_read']} of experts and writes {megabytes['expert_bytes_written']}; the engine "
        f"counted {megabytes['bytes_read']} and {megabytes['bytes_written']}, all other parameters and compaction included."
    )
    yield (
        f"Files took {found['disk_bytes'] / 1e9:.1f} GB at most; the trained store opened in {found['open_s']:.2f} s. "
        f"Loss in training: {found['loss_first']:.2f} at first, {found['loss_last']:.2f} at last."
    )


def _by_experts(found: dict[str, Any]) -> Iterator[str]:
    if "seconds_by_experts" not in found:
        return
    yield "With as many experts reached in each:"
    yield ""
    yield "| experts per layer | reached in a step | seconds per step (least to most) | peak memory of the process |"
    yield "| ---: | ---: | --- | ---: |"
    for experts, seconds in found["seconds_by_experts"].items():
        least, most = found["seconds_by_experts_spread"][experts]
        yield (
            f"| {int(experts):,} | {found['touched_by_experts'][experts]:,.0f} | {seconds:.2f} ({least:.2f} to {most:.2f}) | "
            f"{found['rss_by_experts'][experts] / 2**30:.2f} GiB |"
        )
    yield ""


PAGES: dict[Path, Callable[[], str]] = {TREE / "README.md": table, TREE / "docs" / "120t.md": headline}


def placed(page: str, found: str) -> str:
    """A page's text with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the page has no place for the table: expected the comments {BEGIN} and {END}")
    inside = f"\n{found.strip()}\n" if found.strip() else "\n"
    return f"{before}{BEGIN}{inside}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into their pages")
    arguments = parser.parse_args()
    for page, made in PAGES.items():
        if arguments.write:
            page.write_text(placed(page.read_text(encoding="utf-8"), made()), encoding="utf-8")
        else:
            print(made())


if __name__ == "__main__":
    main()
