"""Figures of plain data, and the page that holds them: one HTML file, which loads nothing.

`timeline`, `utilisation`, `curve` and `bars` give figures; `page` puts them, tables and text into sections.
"""

import html
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from weightstream.trace.perfetto import begins, lanes
from weightstream.trace.spans import RESOURCES, Span
from weightstream.units import format_bytes

COLOURS = {
    "forward": "#4c78a8", "backward": "#9c5fb5", "turn": "#d67195", "update": "#f2a93b", "reduce": "#e45756",
    "fetch": "#3fa796", "load": "#7fc97f", "write": "#b07f4f", "spill": "#8c96a8", "restore": "#5ab4d6",
    "evict": "#c9cdd3", "commit": "#6b6ecf", "between": "#d9dce1", "waits": "#eceef1",
}  # fmt: skip
"""By kind of operation; what is idle or waits is grey."""
PALETTE = ("#4c78a8", "#e45756", "#3fa796", "#f2a93b", "#9c5fb5", "#b07f4f", "#5ab4d6", "#d67195")
FINEST = 1500
"""Bars of the same kind are drawn as one where less than this part of the figure lies between them."""
_TOUCHING = 1e-9


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a curve; what is not finite leaves a gap. `dash` as in CSS: solid, dash, dot."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dash: str = "solid"
    markers: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text below a head; all columns but the first `words` are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


Part: TypeAlias = go.Figure | Table | Mapping[str, str] | str
"""What a section may hold: a figure, a table, facts by name, or a paragraph."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    parts: Sequence[Part]
    wide: bool = False


def curve(
    lines: Iterable[Line], *, x: str, y: str, log_x: bool = False, log_y: bool = False, from_zero: bool = False
) -> go.Figure:
    """Curves over a common axis.

    Args:
        x, y: what the axes are called, with units.
        from_zero: the vertical axis begins at 0.
    """
    figure = go.Figure()
    for number, line in enumerate(lines):
        values = [value if value is not None and isfinite(value) else None for value in line.y]
        single = sum(value is not None for value in values) < 2
        figure.add_trace(go.Scatter(
            x=list(line.x), y=values, name=line.name, mode="lines+markers" if line.markers or single else "lines",
            line={"dash": line.dash, "width": 2, "color": PALETTE[number % len(PALETTE)]}, marker={"size": 6},
        ))  # fmt: skip
    _lay_out(figure, x, y)
    figure.update_layout(hovermode="x unified")
    if log_x:
        figure.update_xaxes(type="log")
    if log_y:
        figure.update_yaxes(type="log")
    elif from_zero:
        figure.update_yaxes(rangemode="tozero")
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str) -> go.Figure:
    """Bars side by side: one group of them by name, one colour for each name within all groups."""
    figure = go.Figure()
    for number, (name, values) in enumerate(groups.items()):
        figure.add_trace(go.Bar(
            name=name, x=list(values), y=list(values.values()), marker={"color": PALETTE[number % len(PALETTE)]},
        ))  # fmt: skip
    _lay_out(figure, "", y)
    figure.update_layout(barmode="group", bargap=0.3)
    return figure


def utilisation(shares: Mapping[str, float], *, limit: str | None = None) -> go.Figure:
    """How busy each resource is, as a part of 1.

    Args:
        limit: the resource that the step waits for, drawn in another colour.
    """
    names = list(shares)[::-1]
    figure = go.Figure(go.Bar(
        x=[shares[name] for name in names], y=names, orientation="h",
        text=[f"{shares[name]:.0%}" for name in names], textposition="outside", cliponaxis=False,
        marker={"color": [PALETTE[1] if name == limit else PALETTE[0] for name in names]},
    ))  # fmt: skip
    _lay_out(figure, "", "")
    figure.update_xaxes(tickformat=".0%", range=[0, max(1.0, *shares.values()) * 1.08] if shares else None)
    figure.update_layout(height=90 + 34 * max(1, len(names)), showlegend=False)
    return figure


def timeline(spans: Sequence[Span], *, ranks: Mapping[int, str] | None = None) -> go.Figure:
    """A step: each resource of each rank is a track, each operation a bar; the legend hides and shows kinds.

    Args:
        spans: of one step.
        ranks: what ranks are called; by default by number, and not at all where there is one.
    """
    names = dict(ranks or {})
    several = len({span.rank for span in spans}) > 1
    tracks: dict[tuple[int, str], list[Span]] = defaultdict(list)
    for span in spans:
        tracks[span.rank, span.resource].append(span)
    order = [*RESOURCES, *sorted({span.resource for span in spans} - set(RESOURCES))]
    whole = max((span.end_s for span in spans), default=0.0) - min((begins(span) for span in spans), default=0.0)
    drawn: dict[str, list[_Bar]] = defaultdict(list)
    labels: list[str] = []
    for rank in sorted({span.rank for span in spans}):
        prefix = f"{names.get(rank, f'rank {rank}')} · " if several or rank in names else ""
        for resource in order:
            own = lanes(tracks.get((rank, resource), ()))
            for lane in sorted({lane for lane, _ in own}):
                label = prefix + (resource if not lane else f"{resource} {lane + 1}")
                labels.append(label)
                for bar in _bars_of([span for at, span in own if at == lane], label, whole / FINEST):
                    drawn[bar.kind].append(bar)
    figure = go.Figure()
    known = {kind: number for number, kind in enumerate(COLOURS)}
    for number, kind in enumerate(sorted(drawn, key=lambda kind: known.get(kind, len(known)))):
        own_bars = drawn[kind]
        figure.add_trace(go.Bar(
            name=kind, orientation="h", base=[bar.begin_s for bar in own_bars],
            x=[bar.end_s - bar.begin_s for bar in own_bars], y=[bar.track for bar in own_bars],
            marker={"color": COLOURS.get(kind, PALETTE[number % len(PALETTE)]), "line": {"width": 0}},
            customdata=[bar.text for bar in own_bars], hovertemplate="%{customdata}<extra></extra>",
        ))  # fmt: skip
    _lay_out(figure, "seconds since the step began", "")
    figure.update_layout(
        barmode="overlay", bargap=0.18, height=130 + 34 * max(3, len(labels)), hovermode="closest", dragmode="zoom",
    )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1], fixedrange=True, showgrid=False)
    return figure


@dataclass(slots=True)
class _Bar:
    kind: str
    track: str
    begin_s: float
    end_s: float
    text: str = ""
    first: Span | None = None
    count: int = 1
    nbytes: int = 0


def _bars_of(spans: Iterable[Span], track: str, finest_s: float) -> list[_Bar]:
    """Bars of one lane: neighbours of a kind that nobody could tell apart are one; waiting compute is a bar of its own."""
    found: list[_Bar] = []
    waits: list[_Bar] = []
    for span in spans:
        begin_s = begins(span)
        last = found[-1] if found else None
        small = span.end_s - begin_s < finest_s
        if last and last.kind == span.kind and small and begin_s - last.end_s < finest_s:
            last.end_s, last.count, last.nbytes = max(last.end_s, span.end_s), last.count + 1, last.nbytes + span.nbytes
        else:
            found.append(_Bar(span.kind, track, begin_s, span.end_s, first=span, nbytes=span.nbytes))
        if span.resource == "compute" and span.waited_s > max(finest_s / 2, _TOUCHING):
            text = f"{html.escape(span.what)} waits {span.waited_s * 1e3:.3g} ms"
            waits.append(_Bar("waits", track, begin_s, begin_s + span.waited_s, text))
    for bar in found:
        assert bar.first is not None
        name = html.escape(bar.first.what) + (f" and {bar.count - 1} more" if bar.count > 1 else "")
        moved = f"<br>{format_bytes(bar.nbytes)}" if bar.nbytes else ""
        waited = bar.first.waited_s if bar.count == 1 else 0.0
        after = f"<br>waited {waited * 1e3:.3g} ms" if waited else ""
        bar.text = f"{name}<br>{(bar.end_s - bar.begin_s) * 1e3:.4g} ms from {bar.begin_s:.4f} s on{moved}{after}"
    return [*found, *waits]


def _lay_out(figure: go.Figure, x: str, y: str) -> None:
    axis = {"gridcolor": "#eceef1", "zerolinecolor": "#d5d9df", "linecolor": "#d5d9df", "automargin": True}
    figure.update_layout(
        template="none", height=300, margin={"l": 56, "r": 18, "t": 14, "b": 44}, font={"family": FONT, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="#ffffff", colorway=list(PALETTE),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, xaxis={**axis, "title": {"text": x}},
        yaxis={**axis, "title": {"text": y}}, hoverlabel={"font": {"family": FONT}},
    )  # fmt: skip


FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1f2733; font: 14px/1.5 FONT; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 0 0 10px; }
header p { margin: 0 0 20px; color: #5a6573; }
.sections { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 16px 18px; min-width: 0; }
section.wide { grid-column: 1 / -1; }
@media (max-width: 900px) { .sections { grid-template-columns: 1fr; } }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 0; }
dt { color: #5a6573; } dd { margin: 0; overflow-wrap: anywhere; }
section.wide dl { grid-template-columns: repeat(2, max-content minmax(0, 1fr)); }
@media (max-width: 900px) { section.wide dl { grid-template-columns: max-content minmax(0, 1fr); } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #5a6573; border-bottom: 1px solid #d5d9df; padding: 4px 10px; }
td { border-bottom: 1px solid #eef0f3; padding: 3px 10px; } .n { text-align: right; }
.scroll { overflow-x: auto; } .figure { width: 100%; } p { margin: 0 0 8px; }
pre { margin: 0; overflow-x: auto; font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: #5a6573; }
""".replace("FONT", FONT)
_DRAW = """
for (const holder of document.querySelectorAll(".figure")) {
  const data = JSON.parse(document.getElementById(holder.dataset.of).textContent);
  Plotly.newPlot(holder, data.data, data.layout, {responsive: true, displayModeBar: false})
    .then(() => { holder.dataset.drawn = "yes"; });
}
"""


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """One HTML page with plotly.js inside it; sections stand side by side, wide ones below each other."""
    body: list[str] = []
    count = 0
    for section in sections:
        inner = []
        for part in section.parts:
            inner.append(_part(part, f"figure-{count}"))
            count += isinstance(part, go.Figure)
        wide = ' class="wide"' if section.wide else ""
        body.append(f"<section{wide}><h2>{html.escape(section.title)}</h2>{''.join(inner)}</section>")
    script = f"<script>{get_plotlyjs()}</script><script>{_DRAW}</script>" if count else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>"
        f'<div class="sections">{"".join(body)}</div></main>{script}</body></html>\n'
    )


def preformatted(name: str, text: str) -> str:
    """A part of a section that opens on demand: text as it is."""
    return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"


def _part(part: Part, name: str) -> str:
    match part:
        case go.Figure():
            # "</" would end the script that holds it
            data = json.dumps(_plain(part.to_plotly_json())).replace("</", "<\\/")
            height = part.layout.height or 300
            return (
                f'<script type="application/json" id="{name}">{data}</script>'
                f'<div class="figure" data-of="{name}" style="height:{height:.0f}px"></div>'
            )
        case Table():
            return _table(part)
        case str():
            return part if part.startswith("<details>") else f"<p>{html.escape(part)}</p>"
        case _:
            facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in part.items())
            return f"<dl>{facts}</dl>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if number < table.words else ' class="n"' for number in range(len(cells))]
        inner = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{inner}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table><thead>{row(table.head, "th")}</thead><tbody>{rows}</tbody></table></div>'


def _plain(value: Any) -> Any:
    """What JSON can hold: no number that is none."""
    match value:
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case float():
            return value if isfinite(value) else None
        case _:
            return value
