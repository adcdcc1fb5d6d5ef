"""A trace in the Trace Event Format, which ui.perfetto.dev and chrome://tracing read.

One process per rank, one thread per resource; where a resource works for several operations at once, one more thread for
each. Steps follow one another as they were numbered, without the time that passed between those that were traced.

Source: Trace Event Format, Google, section "Event Descriptions" (`X` complete events and `M` metadata; microseconds).
"""

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from weightstream.trace.spans import RESOURCES, Span, extent

PREDICTED_PID = 100_000
"""Predicted ranks are processes from here on."""


def lanes(spans: Iterable[Span]) -> list[tuple[int, Span]]:
    """Each span of one track with the first lane that is free when its resource begins with it."""
    found: list[tuple[int, Span]] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    count = 0
    for span in sorted(spans, key=lambda s: (begins(s), s.end_s)):
        while busy and busy[0][0] <= begins(span):
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, count = count, count + 1
        heapq.heappush(busy, (span.end_s, lane))
        found.append((lane, span))
    return found


def begins(span: Span) -> float:
    """Where a span is drawn from: compute that waits stands still, what waits for a disk or a link is not on it yet."""
    return span.begin_s if span.resource == "compute" else span.begin_s + span.waited_s


def events(measured: Sequence[Span], predicted: Sequence[Span] = ()) -> list[dict[str, Any]]:
    """All events of a trace: metadata first."""
    found: list[dict[str, Any]] = []
    for spans, first, word in ((measured, 0, "rank"), (predicted, PREDICTED_PID, "predicted, rank")):
        starts = _starts(spans)
        by_rank: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_rank[span.rank].append(span)
        for rank, own in sorted(by_rank.items()):
            pid = first + rank
            found += [_named("process_name", pid, 0, f"{word} {rank}"), _sorted("process_sort_index", pid, 0, pid)]
            found += _of_rank(pid, own, starts)
    return sorted(found, key=lambda event: event["ph"] != "M")


def export(path: Path, measured: Sequence[Span], predicted: Sequence[Span] = ()) -> None:
    """Write the JSON object form of a trace."""
    found = {"traceEvents": events(measured, predicted), "displayTimeUnit": "ms"}
    path.write_text(json.dumps(found), encoding="utf-8")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _starts(spans: Sequence[Span]) -> dict[int, int]:
    """Where each step's zero lies on the common time, in nanoseconds."""
    by_step: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_step[span.step].append(span)
    starts, at = dict[int, int](), 0
    for step, own in sorted(by_step.items()):
        begin, end = map(_ns, extent(own))
        starts[step] = at - begin
        at += end - begin
    return starts


def _of_rank(pid: int, spans: Sequence[Span], starts: dict[int, int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [_named("thread_name", pid, 0, "step"), _sorted("thread_sort_index", pid, 0, 0)]
    for step in sorted({span.step for span in spans}):
        begin, end = (starts[step] + _ns(time_s) for time_s in extent(span for span in spans if span.step == step))
        found.append(_complete(f"step {step}", "step", pid, 0, (begin, end), {"step": step}))
    resources = [*RESOURCES, *sorted({span.resource for span in spans} - set(RESOURCES))]
    for number, resource in enumerate(resources, start=1):
        by_step: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if span.resource == resource:
                by_step[span.step].append(span)
        used = 0
        for step, own in by_step.items():
            for lane, span in lanes(own):
                used = max(used, lane + 1)
                found += _events_of(span, pid, number * 1000 + lane, starts[step])
        for lane in range(used):
            tid = number * 1000 + lane
            name = resource if not lane else f"{resource} {lane + 1}"
            found += [_named("thread_name", pid, tid, name), _sorted("thread_sort_index", pid, tid, tid)]
    return found


def _events_of(span: Span, pid: int, tid: int, start: int) -> list[dict[str, Any]]:
    args = {"step": span.step, "bytes": span.nbytes, "waited_ms": span.waited_s * 1e3, "kind": span.kind}
    begin, end = start + _ns(begins(span)), start + _ns(span.end_s)
    found = [_complete(span.what, span.kind, pid, tid, (begin, end), args)]
    if span.resource == "compute" and span.waited_s > 0:
        works = min(begin + _ns(span.waited_s), end)
        found.append(_complete("waits", "wait", pid, tid, (begin, works), {"for": span.what}))
    return found


def _complete(
    name: str, category: str, pid: int, tid: int, times: tuple[int, int], args: dict[str, Any]
) -> dict[str, Any]:
    begin, end = times
    return {
        "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid,
        "ts": _microseconds(begin), "dur": _microseconds(max(0, end - begin)), "args": args,
    }  # fmt: skip


def _microseconds(whole_ns: int) -> float:
    """Readers keep whole nanoseconds and cut off the rest, and what overlaps by one of them is not shown: a quarter more, and
    none is cut off too much."""
    return (whole_ns + 0.25) / 1000


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted(what: str, pid: int, tid: int, place: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"sort_index": place}}
