"""Traces in a run's folder: written, torn, compared, and in the form that Perfetto reads."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.errors import ConfigError
from weightstream.trace.compare import NOT_PREDICTED, compare, compared, text_of
from weightstream.trace.files import FOLDER, PREDICTED, read_spans, read_trace, span_file, write_spans, write_totals
from weightstream.trace.perfetto import events, export, lanes
from weightstream.trace.recorder import WARM_UP_STEPS, Recorder
from weightstream.trace.spans import Span, shares, totals
from weightstream.training.tracing import TRACED_STEP, Tracing


def span(kind: str, resource: str, begin_s: float, end_s: float, **others: Any) -> Span:
    facts: dict[str, Any] = {"step": 1, "rank": 0, "what": f"{kind}()"} | others
    return Span(kind=kind, resource=resource, begin_s=begin_s, end_s=end_s, **facts)


MEASURED = [
    span("forward", "compute", 0.0, 2.0, waited_s=0.5),
    span("load", "read", 0.0, 2.0, nbytes=100, waited_s=1.0),
    span("fetch", "read", 1.0, 3.0, nbytes=50),
    span("forward", "compute", 0.0, 4.0, step=2),
    span("load", "read", -1.0, 1.0, nbytes=100, step=2),
]
PREDICTED_SPANS = [span("forward", "compute", 0.0, 3.0, step=9), span("update", "optimizer", 0.0, 1.0, step=9)]


def test_spans_come_back_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = span_file(tmp_path, 0)
    write_spans(path, MEASURED)
    assert read_spans(path) == MEASURED
    whole = path.read_text()
    for length in range(len(whole) - 1, len(whole) - 60, -7):
        path.write_text(whole[:length])
        found = read_spans(path)
        assert found == MEASURED[: len(found)]
        assert len(found) >= len(MEASURED) - 1
    path.write_text("{}\n" + whole)
    with pytest.raises(ConfigError, match=r"rank-0\.jsonl, line 1: expected a span"):
        read_spans(path)


def test_each_side_is_compared_per_step(tmp_path: Path) -> None:
    rows = {(row.kind, row.resource): row for row in compare(PREDICTED_SPANS, MEASURED)}
    forward, load = rows["forward", "compute"], rows["load", "read"]
    assert (forward.measured.count, forward.measured.seconds, forward.measured.waited_s) == (1.0, 2.75, 0.25)
    assert forward.predicted is not None
    assert forward.predicted.seconds == 3.0
    assert forward.ratio == pytest.approx(3 / 2.75)
    # from 1 to 2 load and fetch share the disk: half a second each; in the second step load has it for itself
    assert load.measured.seconds == pytest.approx((0.5 + 2.0) / 2)
    assert load.measured.nbytes == 100
    assert load.ratio == 0.0
    assert rows["update", "optimizer"].measured.count == 0
    assert rows["update", "optimizer"].ratio is None


def test_a_run_without_a_prediction_says_so(tmp_path: Path) -> None:
    assert compared(read_trace(tmp_path)) is None
    write_spans(span_file(tmp_path, 0), MEASURED)
    found = compared(read_trace(tmp_path))
    assert found is not None
    assert (found.steps, found.step_s, found.predicted_s) == (2, 3.5, None)
    assert NOT_PREDICTED in text_of(found)
    assert found.to_json()["note"] == NOT_PREDICTED
    assert all(row.predicted is None for row in found.rows)


def test_only_ranks_that_were_predicted_are_compared_with_it(tmp_path: Path) -> None:
    for rank, seconds in ((0, 1.0), (1, 50.0)):
        write_spans(span_file(tmp_path, rank), [span("forward", "compute", 0.0, seconds, rank=rank)])
    write_spans(tmp_path / FOLDER / PREDICTED, PREDICTED_SPANS)
    found = compared(read_trace(tmp_path))
    assert found is not None
    assert (found.step_s, found.predicted_s) == (1.0, 3.0)
    assert next(row for row in found.rows if row.kind == "forward").ratio == 3.0
    assert "3.00" in text_of(found)
    assert NOT_PREDICTED not in text_of(found)


def recorded(recorder: Recorder, steps: int) -> None:
    for step in range(recorder._now.number + 1, recorder._now.number + 1 + steps):
        recorder.begin(step)
        recorder.log.note("states", 0, "read", recorder._now.began_s, recorder._now.began_s + step, step)
        recorder.end()


def test_a_run_keeps_its_third_and_its_last_step_and_what_all_came_to(tmp_path: Path) -> None:
    recorder = Recorder(2, [0])
    recorder._first_s -= 1e6  # time enough for totals of every step
    write_spans(span_file(tmp_path, 7), MEASURED)  # an earlier process had more ranks
    own = [replace(each, rank=2) for each in PREDICTED_SPANS]
    with Tracing(tmp_path, recorder, speaks=True, predict=lambda: [*MEASURED, *PREDICTED_SPANS, *own]) as tracing:
        for step in range(1, 6):
            recorded(recorder, 1)
            tracing.stepped()
            assert span_file(tmp_path, 2).exists() == (step >= TRACED_STEP)
    found = read_trace(tmp_path)
    assert [each.step for each in found.spans if each.resource == "read"] == [3, 5]
    assert {each.rank for each in found.spans} == {2}
    assert found.predicted == tuple(own)  # what other ranks do is not compared with this one
    assert found.measured[2].steps == 5 - WARM_UP_STEPS
    assert found.measured[2].totals["load", "read"].nbytes == 3 + 4 + 5
    assert found.measured[2].totals["load", "read"].seconds == pytest.approx(3 + 4 + 5)


def test_a_run_of_one_step_is_traced(tmp_path: Path) -> None:
    recorder = Recorder(0, [0])
    with Tracing(tmp_path, recorder, speaks=True, predict=None) as tracing:
        recorded(recorder, 1)
        tracing.stepped()
        found = tracing.comparison()
    assert found is not None
    assert found.steps == 1
    assert compared(read_trace(tmp_path)) == found
    write_totals(tmp_path, recorder)
    (tmp_path / FOLDER / "totals-0.json").write_text("{")
    with pytest.raises(ConfigError, match=r"totals-0\.json"):
        read_trace(tmp_path)


intervals = st.lists(st.tuples(st.integers(-5, 50), st.integers(0, 20), st.sampled_from("abc")), max_size=20)


@given(intervals)
def test_shares_add_up_to_the_time_that_anything_was_busy(drawn: list[tuple[int, int, str]]) -> None:
    busy = [(float(begin), float(begin + length), kind) for begin, length, kind in drawn]
    moments = {moment for begin, end, _ in busy for moment in range(int(begin), int(end))}
    found = shares(busy)
    assert sum(found.values()) == pytest.approx(len(moments))
    for kind, seconds in found.items():
        own = {m for begin, end, each in busy if each == kind for m in range(int(begin), int(end))}
        assert seconds <= len(own) + 1e-9


@given(intervals)
def test_on_one_lane_nothing_overlaps(drawn: list[tuple[int, int, str]]) -> None:
    spans = [span(kind, "read", float(begin), float(begin + length)) for begin, length, kind in drawn]
    found = lanes(spans)
    assert sorted(map(id, spans)) == sorted(id(each) for _, each in found)
    for lane in {lane for lane, _ in found}:
        own = [each for at, each in found if at == lane]
        assert all(one.end_s <= other.begin_s for one, other in pairwise(own))
    most = max((sum(s.begin_s <= m < s.end_s for s in spans) for m in range(-5, 71)), default=0)
    if all(length for _, length, _ in drawn):
        assert len({lane for lane, _ in found}) == most


def test_perfetto_gets_a_process_per_rank_and_a_thread_per_resource(tmp_path: Path) -> None:
    measured = [*MEASURED, span("forward", "compute", 0.0, 1.0, rank=1), span("new", "elsewhere", 0.0, 1.0)]
    export(tmp_path / "trace.json", measured, PREDICTED_SPANS)
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["traceEvents"] == events(measured, PREDICTED_SPANS)
    complete = [event for event in found["traceEvents"] if event["ph"] == "X"]
    metadata = [event for event in found["traceEvents"] if event["ph"] == "M"]
    assert found["traceEvents"][: len(metadata)] == metadata
    assert len(complete) + len(metadata) == len(found["traceEvents"])
    processes = {event["pid"]: event["args"]["name"] for event in metadata if event["name"] == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in metadata if event["name"] == "thread_name"
    }
    assert list(processes.values()) == ["rank 0", "rank 1", "predicted, rank 0"]
    assert {threads[0, tid] for pid, tid in threads if pid == 0} == {"step", "compute", "read", "read 2", "elsewhere"}
    assert all((event["pid"], event["tid"]) in threads for event in complete)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in complete)
    (load, later) = (event for event in complete if event["cat"] == "load")
    assert (cut(load["ts"]), cut(load["dur"])) == (10**9, 10**9)
    assert (load["args"]["bytes"], load["args"]["waited_ms"]) == (100, 1000)
    assert cut(later["ts"]) == 3 * 10**9  # the second step begins with it, where the first one ends
    waits = next(event for event in complete if event["name"] == "waits")
    whole = next(event for event in complete if event["cat"] == "forward" and event["tid"] == waits["tid"])
    assert (waits["ts"], cut(waits["dur"])) == (whole["ts"], 5 * 10**8)


def cut(microseconds: float) -> int:
    """Whole nanoseconds, as Perfetto reads a number."""
    return int(microseconds * 1000)


def check_format(text: str) -> int:
    """What the Trace Event Format asks for, and Perfetto, which does not show slices that overlap on a thread in part.

    Returns:
        How many slices there are.
    """

    def none_such(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    trace = json.loads(text, parse_constant=none_such)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named: set[tuple[str, int, int]] = set()
    threads: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for place, event in enumerate(trace["traceEvents"]):
        assert isinstance(event["name"], str)
        assert event["name"]
        assert all(type(event[key]) is int and 0 <= event[key] < 2**31 for key in ("pid", "tid"))
        if event["ph"] == "M":
            kind = {"process_name": str, "thread_name": str, "process_sort_index": int, "thread_sort_index": int}
            (value,) = event["args"].values()
            assert type(value) is kind[event["name"]]
            name = event["name"], event["pid"], event["tid"]
            assert name not in named, "one name each"
            named.add(name)
        else:
            assert event["ph"] == "X"
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            slices = threads.setdefault((event["pid"], event["tid"]), [])
            slices.append((cut(event["ts"]), place, cut(event["ts"]) + cut(event["dur"])))
    for pid, tid in threads:
        assert {("process_name", pid, 0), ("thread_name", pid, tid)} <= named
    for slices in threads.values():
        around: list[int] = []  # the ends of those that a slice lies within
        for begin, _, end in sorted(slices):  # of two that begin together the first in the file is the outer one
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1], "slices nest"
            around.append(end)
    return sum(map(len, threads.values()))


moments = st.floats(0, 1e-3) | st.integers(0, 40).map(lambda tenths: tenths / 10)


@given(st.lists(st.tuples(moments, moments, moments, st.sampled_from(["compute", "read", "write"])), max_size=30))
def test_any_trace_is_one_that_perfetto_shows_whole(drawn: list[tuple[float, float, float, str]]) -> None:
    """One thing at a time on compute, which may follow at once; anything on other resources."""
    spans, at = [], {1: 0.0, 2: 0.0}
    for place, (begin_s, length_s, waited_s, resource) in enumerate(drawn):
        step = 1 + (place >= len(drawn) // 2)
        if resource == "compute":
            begin_s, at[step] = at[step], at[step] + length_s
        facts = {"step": step, "waited_s": min(waited_s, length_s), "rank": place % 2 if resource != "compute" else 0}
        spans.append(span("forward", resource, begin_s, begin_s + length_s, **facts))
    waits = sum(each.resource == "compute" and each.waited_s > 0 for each in spans)
    ranks = [{each.step for each in spans if each.rank == rank} for rank in (0, 1)]
    found = check_format(json.dumps({"traceEvents": events(spans, spans), "displayTimeUnit": "ms"}))
    assert found == 2 * (len(spans) + waits + sum(map(len, ranks)))


def test_numbers_that_are_cut_off_and_slices_that_cross_are_found() -> None:
    export_of = {"displayTimeUnit": "ms", "traceEvents": events([span("forward", "compute", 0.0, 0.3)])}
    crossing = {"ph": "X", "name": "x", "pid": 0, "tid": 1000, "ts": 1e5, "dur": 1e6, "args": {}}
    for wrong in (crossing, crossing | {"dur": float("nan")}, crossing | {"tid": 7, "dur": 0}, crossing | {"ph": "B"}):
        changed = export_of | {"traceEvents": [*export_of["traceEvents"], wrong]}
        with pytest.raises((AssertionError, KeyError)):
            check_format(json.dumps(changed))


def test_totals_of_nothing() -> None:
    assert totals([]) == {}
    assert compare([], []) == []
