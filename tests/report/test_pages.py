"""The page of a run, in a real browser, whatever state the run is in."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.report.browser import Browser, opened, started

from weightstream.errors import ConfigError
from weightstream.report.figures import Line, Section, Table, curve, page, timeline, utilisation
from weightstream.report.run_page import report, write_report
from weightstream.trace.files import FOLDER, PREDICTED, span_file, write_spans
from weightstream.trace.spans import Span

DRAWN = "[...document.querySelectorAll('.figure')].every(f => f.dataset.drawn)"
CONFIG = """
model: {preset: llama-60m}
training: {steps: 40, micro_batches: 4, micro_batch_size: 2, sequence_length: 64}
engine: {device: cpu, device_memory: 256MiB, host_memory: 1073741824, precision: bf16}
cluster: {workers: 1, memory: colocated}
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def train_line(step: int, loss: float = 3.0, *, skipped: bool = False) -> str:
    return json.dumps({
        "kind": "train", "step": step, "time": 1.7e9 + step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3,
        "tokens_per_s": 1000.0 + step, "seconds": 0.5, "stalled_s": 0.1, "read_bytes": 2 << 20, "written_bytes": 1 << 20,
        "bound_bytes": 3 << 20, "rss_bytes": 1 << 30, "skipped": skipped,
    })  # fmt: skip


def some_spans(step: int, rank: int = 0) -> list[Span]:
    spans = [Span(step, rank, "between", "compute", "between steps", 0.0, 0.01)]
    for block in range(4):
        at = 0.01 + block * 0.05
        spans += [
            Span(step, rank, "forward", "compute", f"Forward({block}, visit={block}, mb=0)", at, at + 0.04, 0, 0.01),
            Span(step, rank, "fetch", "read", f"Fetch({block} -> slab 0)", at - 0.03, at + 0.03, 1 << 20, 0.005),
            Span(step, rank, "load", "read", f"Load({block})", at - 0.01, at + 0.05, 2 << 20, 0.0),
            Span(step, rank, "write", "write", f"Write({block})", at + 0.02, at + 0.07, 2 << 20, 0.02),
        ]
    return [*spans, Span(step, rank, "commit", "manifest", "Commit() </script>", 0.2, 0.22)]


def whole(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG)
    lines = [json.dumps({"kind": "validation", "step": 0, "time": 1.7e9, "loss": 9.0, "perplexity": 8103.0})]
    lines += [train_line(step, 9.0 / step) for step in range(1, 41)]
    lines.append(json.dumps({"kind": "validation", "step": 40, "time": 1.8e9, "loss": 1.0, "perplexity": 2.7}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for rank in (0, 1):
        write_spans(span_file(run, rank), [*some_spans(3, rank), *some_spans(40, rank)])
    write_spans(run / FOLDER / PREDICTED, some_spans(2))


def killed(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG)
    (run / "metrics.jsonl").write_text("\n".join([*map(train_line, range(1, 6)), '{"kind": "train", "st']))
    write_spans(span_file(run, 0), some_spans(3))
    with span_file(run, 0).open("a") as file:
        file.write('{"step": 3, "rank": 0, "ki')


def one_step(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG)
    (run / "metrics.jsonl").write_text(train_line(1) + "\n")


def before_its_first_step(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG)


def skipped_steps(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG)
    lines = [train_line(step, float("nan") if step % 2 else 2.0, skipped=bool(step % 2)) for step in range(1, 9)]
    validation = json.dumps(
        {"kind": "validation", "step": 8, "time": 1.7e9, "loss": float("inf"), "perplexity": float("inf")}
    )
    (run / "metrics.jsonl").write_text("\n".join([*lines, validation]) + "\n")


@pytest.mark.parametrize(
    ("made", "figures"),
    [(whole, 9), (killed, 7), (one_step, 5), (before_its_first_step, 5), (skipped_steps, 5)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_page_draws_every_figure_without_an_error(
    made: Callable[[Path], None], figures: int, tmp_path: Path, browser: Browser
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    made(run)
    out = tmp_path / "page.html"
    write_report(run, out)
    with opened(out, browser):
        browser.until(DRAWN)
        assert browser.evaluate("document.querySelectorAll('.figure .main-svg').length") >= figures
        assert browser.evaluate("document.querySelectorAll('.figure').length") == figures
        empty = "[...document.querySelectorAll('.figure')].filter(f => f.getBoundingClientRect().height < 80).length"
        assert browser.evaluate(empty) == 0
        if made is whole:
            bars = "document.querySelectorAll('.figure .bars path').length"
            assert browser.evaluate(bars) > 2 * len(some_spans(3))
            assert browser.evaluate("document.querySelectorAll('.figure .scatterlayer .js-line').length") >= 9
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.errors == []
        assert browser.asked == [out.resolve().as_uri()]


def test_the_browser_hears_what_goes_wrong(tmp_path: Path, browser: Browser) -> None:
    """Else the test above could not fail."""
    out = tmp_path / "page.html"
    out.write_text("<html><script>console.error('one'); fetch('http://127.0.0.1:9/two'); none.three()</script></html>")
    with opened(out, browser):
        heard = {"error: ['one']": False, "none is not defined": False, "http://127.0.0.1:9/two": False}
        deadline = time.monotonic() + 20  # its events come when they come, in any order
        while not all(heard.values()) and time.monotonic() < deadline:
            browser.until("true")
            for word in heard:
                heard[word] = any(word in found for found in [*browser.errors, *browser.asked])
        assert heard == dict.fromkeys(heard, True), browser.errors


def test_a_page_of_any_figures_is_drawn(tmp_path: Path, browser: Browser) -> None:
    """As the pages of simulations are made."""
    lines = [Line("ideal", [1, 2, 4, 192], [1.0, 2.0, 4.0, 192.0], dash="dot"), Line("<b>", [1, 2], [1.0, None])]
    sections = [
        Section("Scaling", [curve(lines, x="systems", y="times one", log_x=True, log_y=True)]),
        Section("Resources", [utilisation({"compute": 0.9, "disk": 1.0}, limit="disk"), {"step": "3 s <&>"}]),
        Section(
            "A step", [timeline(some_spans(1), ranks={0: "system 0"}), Table(["what", "s"], [["a", "1"]])], wide=True
        ),
        Section("Nothing", [timeline([]), utilisation({}), curve([], x="", y="")]),
    ]
    out = tmp_path / "page.html"
    out.write_text(page("Simulated </title>", sections, subtitle="& more"), encoding="utf-8")
    with opened(out, browser):
        browser.until(DRAWN)
        assert browser.evaluate("document.title") == "Simulated </title>"
        assert browser.evaluate("document.querySelectorAll('.figure').length") == 6
        assert browser.errors == []


def test_a_long_step_is_drawn_with_few_bars() -> None:
    spans = [
        Span(1, 0, kind, "compute", f"{kind} {i}", i * 1e-4, (i + 1) * 1e-4)
        for i in range(40_000)
        for kind in [("forward", "backward")[i // 20_000]]
    ]
    figure = timeline(spans)
    drawn = {trace.name: list(zip(trace.base, trace.x, strict=True)) for trace in figure.data}
    assert sum(map(len, drawn.values())) < 20
    assert sum(length for bars in drawn.values() for _, length in bars) == pytest.approx(4.0)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run: expected config\.yaml"):
        report(tmp_path)
    with pytest.raises(ConfigError, match="no run at"):
        report(tmp_path / "nowhere")
