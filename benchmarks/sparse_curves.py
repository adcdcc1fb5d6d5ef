"""The table and the plots of how well sparse training trains, from the result of `sparse_quality.py`.

    python benchmarks/sparse_curves.py            # print the table
    python benchmarks/sparse_curves.py --write    # put it into docs/sparsity.md, and draw

The plots are a page that loads nothing, and, where matplotlib is installed, a picture.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from weightstream.report.figures import Line, Section, Table, curve, page

TREE = Path(__file__).resolve().parent.parent
RESULTS = TREE / "benchmarks" / "results"
NAME = "sparse_quality"
DOCUMENT = TREE / "docs" / "sparsity.md"
BEGIN = "<!-- measured: made by benchmarks/sparse_curves.py -->"
END = "<!-- end of measured -->"
MANY = 20
"""Points of a curve from which on they are not marked."""
ALGORITHMS = {
    "dense": "dense",
    "static": "static, 90%",
    "set": "SET, 90%",
    "rigl": "RigL, 90%",
    "rigl_relative": "RigL by relative gradients, 90%",
    "gmp": "GMP, to 80%",
    "spdf": "SPDF, 75% then dense",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/sparsity.md, and draw")
    arguments = parser.parse_args()
    result = kept()
    if arguments.write:
        DOCUMENT.write_text(placed(DOCUMENT.read_text(encoding="utf-8"), table(result)), encoding="utf-8")
        draw(result, RESULTS)
    else:
        print(table(result))


def kept() -> dict[str, Any]:
    """The result that `sparse_quality.py` left."""
    return dict(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8")))


def table(result: dict[str, Any]) -> str:
    """Losses, expectations, and what it was measured on, as Markdown."""
    seeds = range(result["trained"][-1]["seed"] + 1)
    lines = [
        f"| training | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | above dense |",
        f"| --- |{' ---: |' * (len(seeds) + 2)}",
    ]
    losses, dense = result["loss"], result["loss"]["dense"]["mean"]
    for algorithm, what in ALGORITHMS.items():
        each = " | ".join(f"{loss:.3f}" for loss in losses[algorithm]["by_seed"])
        lines.append(
            f"| {what} | {each} | {losses[algorithm]['mean']:.3f} | {losses[algorithm]['mean'] - dense:+.3f} |"
        )
    lines += ["", "| expected | held | by (nats) | by seed |", "| --- | --- | ---: | --- |"]
    for found in result["order"]:
        each = ", ".join(f"{margin:+.3f}" for margin in found["by_seed"])
        lines.append(f"| {found['expected']} | {'yes' if found['held'] else 'no'} | {found['by']:+.3f} | {each} |")
    return "\n".join([*lines, "", _note(result)])


def _note(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    commits = sorted({run["commit"] for run in result["trained"]})
    return (
        f"`{result['command']}`: held-out loss in nats per token after {result['steps']} steps of "
        f"{result['sequences'] * result['length']:,} tokens; {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['layers']} layers of width {result['width']}, {result['vocabulary']:,} tokens; AdamW at {result['lr']:g}; "
        f"{machine['cpu']}, torch {versions['torch']}; commit {', '.join(commits)}, {result['date'][:10]}."
    )


def placed(document: str, found: str) -> str:
    """The document with the table between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOCUMENT.name} has no place for the table: expected the comments {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


def draw(result: dict[str, Any], folder: Path) -> None:
    """The plots as one page that loads nothing, and, where matplotlib is installed, as a picture."""
    plots = plots_of(result)
    losses = result["loss"]
    seeds = [f"seed {seed}" for seed in range(len(losses["dense"]["by_seed"]))]
    rows = [
        (what, *(f"{loss:.4f}" for loss in (losses[name]["mean"], *losses[name]["by_seed"])))
        for name, what in ALGORITHMS.items()
    ]
    sections = [Section("Held-out loss at the end", [Table(("training", "mean", *seeds), rows)], wide=True)]
    for plot in plots:
        lines = [Line(ALGORITHMS[name], x, y, markers=len(x) < MANY) for name, (x, y) in plot.curves.items()]
        figure = curve(lines, x="step", y=plot.unit, from_zero=plot.unit == "part")
        sections.append(Section(plot.title, [figure], wide=plot.wide))
    text = page("How well sparse training trains", sections, subtitle=_note(result).replace("`", ""))
    (folder / f"{NAME}.html").write_text(text, encoding="utf-8")
    _picture([plot for plot in plots if plot.wide], folder / f"{NAME}.svg")


@dataclass(frozen=True, slots=True)
class Plot:
    """By algorithm: steps, and what was found there, the mean over seeds."""

    title: str
    unit: str
    curves: dict[str, tuple[list[int], list[float]]]
    wide: bool = False


def plots_of(result: dict[str, Any]) -> list[Plot]:
    """Held-out losses begin with the first evaluation after step 0: before it all are alike."""
    runs = result["trained"]
    held_out = {name: (x[1:], y[1:]) for name, (x, y) in averaged(runs, "validation").items()}
    dense = held_out["dense"][1]
    above = {name: (x, [one - other for one, other in zip(y, dense, strict=True)]) for name, (x, y) in held_out.items()}
    return [
        Plot("Loss on held-out text", "nats per token", held_out, wide=True),
        Plot("Loss on held-out text, above that of the dense model", "nats per token", above, wide=True),
        Plot("Training loss", "nats per token", averaged(runs, "train")),
        Plot("Part of the layers' matrices that exists, after each change", "part", averaged(runs, "density")),
        Plot("Part of what exists that is new, at each change", "part", averaged(runs, "turnover")),
    ]


def averaged(runs: Sequence[dict[str, Any]], kind: str) -> dict[str, tuple[list[int], list[float]]]:
    """By algorithm: steps, and the mean over seeds; algorithms without such points are left out."""
    found = {}
    for algorithm in ALGORITHMS:
        curves = [run[kind] for run in runs if run["algorithm"] == algorithm]
        points = list(zip(*curves, strict=True))
        if points:
            steps = [point[0][0] for point in points]
            found[algorithm] = (steps, [mean(value for _, value in point) for point in points])
    return found


def _picture(plots: Sequence[Plot], path: Path) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.rcParams["svg.hashsalt"] = NAME  # the same result gives the same file
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, plot in zip(figure.subplots(1, len(plots)), plots, strict=True):
        for name, (x, y) in plot.curves.items():
            axes.plot(x, y, marker="o", markersize=3, label=ALGORITHMS[name])
        axes.set(xlabel="step", ylabel=plot.unit)
        axes.set_title(plot.title, fontsize=10)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
