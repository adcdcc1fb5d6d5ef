"""The documents are held to the code: examples run, commands, files and keys that they name exist.

Every block marked `python` runs, those of one page in order and in one namespace, in an empty folder. Commands in `sh`
blocks are looked up, not run.
"""

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import weightstream
from benchmarks import sparse_curves, table
from weightstream.cli import app
from weightstream.config.config import RunConfig, _keys, load_config

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(weightstream.__file__).parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
KEYS = dict(_keys(RunConfig))
RESULTS = ROOT / "benchmarks" / "results"


def fenced(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each block of these languages."""
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line.removeprefix("```").strip(), number, []
        else:
            if language in languages:
                yield start, "\n".join(lines) + "\n"
            language = None
    assert language is None, f"{page.name}: the block at line {start} does not end"


@pytest.mark.parametrize("page", [page for page in PAGES if any(fenced(page, "python"))], ids=lambda page: page.name)
@pytest.mark.usefixtures("one_thread")
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in fenced(page, "python"):
        # Empty lines in front, so that a traceback has the page's own line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # noqa: S102


def test_the_example_on_the_first_screen_is_short() -> None:
    ((_, code),) = fenced(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 15


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = [line for _, code in fenced(page, "sh", "") for line in code.splitlines()]
    commands += re.findall(r"`(weightstream [^`]+)`", text)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join([*commands, text]), re.MULTILINE):
        assert target in targets, f"{page.name} names `make {target}`"
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:1] != ["weightstream"]:
            continue
        names = [word for word in words[1:3] if re.fullmatch("[a-z]+", word)]
        names = names[: 2 if names[:1] in (["store"], ["trace"]) else 1]
        shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, f"{page.name} names a command that does not exist: {command}"
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{page.name}: {command!r}: no option {option}"
        for key in re.findall(r"(?<=\s)([a-z_.]+)=(?!value)", command):
            assert key in KEYS, f"{page.name}: {command!r}: no key {key}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_of_benchmarks_exist(page: Path) -> None:
    folder = ROOT / "benchmarks"
    for command in re.findall(r"`(python benchmarks/[^`]+)`", page.read_text(encoding="utf-8")):
        _, name, *words = shlex.split(command)
        script = ROOT / name
        text = script.read_text(encoding="utf-8")
        for module in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
            beside = folder / f"{module}.py"
            text += beside.read_text(encoding="utf-8") if beside.is_file() else ""
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert f'"{option}"' in text, f"{page.name}: {command!r}: no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|toml|sh))`", text):
        found = any((root / name).is_file() for root in (SOURCES, ROOT, page.parent))
        assert found or name in ("config.yaml", "utils.py"), f"{page.name} names {name}, which does not exist"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"
    outside = re.search(r"(?<![\w.])/(?:home|root|work|tmp|usr)/", text)
    assert outside is None, f"{page.name} holds a path of a machine"


def test_files_that_sources_name_exist() -> None:
    sources = [path for folder in ("src", "benchmarks", "tests", "configs") for path in (ROOT / folder).rglob("*.py")]
    known = [f"/{path.relative_to(ROOT)}" for path in sources]
    for path in sources:
        for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py)`", path.read_text(encoding="utf-8")):
            found = any(one.endswith(f"/{name}") for one in known)
            assert found or name == "path/to/file.py", f"{path.relative_to(ROOT)} names {name}, which does not exist"


def test_the_pages_about_the_source_name_all_of_it() -> None:
    modules = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("[!_]*.py")}
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {module for module in modules if f"`{module}`" not in architecture} == set()
    top = {re.sub("/.*", "/", module) for module in modules}
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {name for name in top if f"`{name}`" not in contributing} == set()


@pytest.mark.parametrize("name", weightstream.__all__)
def test_public_names_say_what_they_are(name: str) -> None:
    found = getattr(weightstream, name)
    assert inspect.getdoc(found)
    for method, value in vars(found).items() if inspect.isclass(found) else ():
        if inspect.isfunction(value) and not method.startswith("_"):
            assert inspect.getdoc(getattr(found, method)), f"{name}.{method} has no docstring"


def test_every_argument_of_the_engine_is_described() -> None:
    said = inspect.getdoc(weightstream.Engine) or ""
    for argument in inspect.signature(weightstream.Engine).parameters:
        assert f"\n    {argument}: " in said, f"Engine: {argument} is not described"


def test_every_key_of_the_configuration_is_described_and_no_other() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", text, re.MULTILINE))
    fields = KEYS
    leaves = {key for key in fields if not any(other.startswith(f"{key}.") for other in fields)}
    either = {
        "optimizer.groups",
        "engine.experts_pool",
        "sparsity.groups.sparsity",
        "sparsity.groups.drop_fraction",
    }  # described as a whole, too
    assert described.keys() - either == leaves
    for key, default in described.items():
        if shown := re.fullmatch(r"`([^`\[]+)`", default.strip()):
            field = fields[key]
            if field.is_required() or shown[1] in fields:
                continue
            expected = {"true": True, "false": False}.get(shown[1], shown[1])
            found = field.default
            same = float(expected) == found if isinstance(found, float) else str(found) == str(expected)
            assert same, f"{key}: described as {shown[1]}, the default is {found}"


def test_the_configurations_shown_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    for page in PAGES:
        for _, text in fenced(page, "yaml"):
            path.write_text(text, encoding="utf-8")
            load_config(path)
    for path in (ROOT / "configs").glob("*.yaml"):
        load_config(path)


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_the_measured_table_is_that_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert table.placed(text, table.PAGES[page]()) == text, "run: python benchmarks/table.py --write"


def test_figures_in_sentences_are_those_of_the_results() -> None:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    times = [f"{1 / results[f'step-{tokens}']['ratio']:.2f}" for tokens in (2048, 512, 128)]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{times[0]} times as long with 2,048 tokens, {times[1]} times with 512, {times[2]} times with 128" in readme
    assert f"a step takes [{results['headline']['seconds_per_step']:.1f} s]" in readme
    log = (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    headings = "\n".join(line for line in log.splitlines() if line.startswith("## "))
    predicted, store = results["prediction"], results["store"]
    limited = results["scaling-limited"]["limited_link_ratio"]
    for heading in (
        f"seconds {predicted['step_error_median']:.1%} off in the median and {predicted['step_error_p90']:.1%} at the 90th",
        f"{results['headline']['seconds_per_step']:.2f} s a step",
        f"{results['scaling']['efficiency']['8']:.2f} at 8 workers",
        "limited link: " + "{2:.2f}, {1:.2f} and {0:.2f}".format(*limited.values()),
        f"{results['kills']['kills']} kills, at most {['no', 'one'][results['kills']['lost_steps_max']]} step each",
        f"reads {store['read_ratio']:.2f}, writes {store['write_ratio']:.2f}, "
        f"writes to new files {store['write_new_ratio']:.2f}",
        f"{results['step-2048']['ratio']:.2f} of resident at 2,048 tokens",
        f"{results['faults']['faults']} of six kinds",
        f"{results['sparse-disk-500MB']['disk_bound_speedup']:.1f} times as fast where the disk binds, "
        f"{results['sparse']['disk_bound_speedup']:.1f} to {results['sparse']['disk_bound_block_speedup']:.0f} where",
    ):
        assert heading in headings, f"benchmarks/LOG.md has no heading with {heading!r}"


def test_the_table_of_sparse_training_is_that_of_the_result() -> None:
    document = sparse_curves.DOCUMENT.read_text(encoding="utf-8")
    shown = sparse_curves.placed(document, sparse_curves.table(sparse_curves.kept()))
    assert shown == document, "run: python benchmarks/sparse_curves.py --write"
