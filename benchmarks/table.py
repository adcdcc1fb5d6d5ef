"""The README's table, made from `benchmarks/results/*.json`.

    python benchmarks/table.py            # print it
    python benchmarks/table.py --write    # put it between the README's marker comments

A pair of rows is one benchmark: weightstream and its control, run in turn on the same machine. Where there is no result
there is no row.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
RESULTS = TREE / "benchmarks" / "results"
README = TREE / "README.md"
BEGIN = "<!-- measured: made by benchmarks/table.py -->"
END = "<!-- end of measured -->"
TOKENS = (2048, 512, 128, 8192)  # of `step.py`; the README shows the first that was measured
HEAD = (
    "## Measured",
    "Everything on disk and nothing kept in RAM between uses, beside controls that ran in turn; medians.",
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
        machine, versions = found["machine"], found["versions"]
        yield (
            f"`{found['command']}`: {found['parameters'] / 1e6:.1f} M parameters, {found['layers']} layers of width "
            f"{found['width']}; {found['runs']} turns of each side; {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB; torch {versions['torch']}; commit {found['commit']}, "
            f"{found['date'][:10]}."
        )
        yield ""


def placed(readme: str, found: str) -> str:
    """The README's text with the table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md has no place for the table: expected the comments {BEGIN} and {END}")
    inside = f"\n{found.strip()}\n" if found.strip() else "\n"
    return f"{before}{BEGIN}{inside}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    if arguments.write:
        README.write_text(placed(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
