"""The documents are held to the code: examples run, commands, files and keys that they name exist.

Every block marked `python` runs, those of one page in order and in one namespace, in an empty folder. Commands in `sh`
blocks are looked up, not run.
"""

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


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
        names = names[: 2 if names[:1] == ["store"] else 1]
        shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, f"{page.name} names a command that does not exist: {command}"
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{page.name}: {command!r}: no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|toml|sh))`", text):
        found = any((root / name).is_file() for root in (SOURCES, ROOT))
        assert found or name in ("config.yaml",), f"{page.name} names {name}, which does not exist"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"
    outside = re.search(r"(?<![\w.])/(?:home|root|work|tmp|usr)/", text)
    assert outside is None, f"{page.name} holds a path of a machine"


def test_every_key_of_the_configuration_is_described_and_no_other() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", text, re.MULTILINE))
    fields = dict(_keys(RunConfig))
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


def test_the_configuration_shown_is_valid(tmp_path: Path) -> None:
    for number, (_, text) in enumerate(fenced(ROOT / "docs" / "configuration.md", "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load_config(path)


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_the_measured_table_is_that_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert table.placed(text, table.PAGES[page]()) == text, "run: python benchmarks/table.py --write"


def test_the_table_of_sparse_training_is_that_of_the_result() -> None:
    document = sparse_curves.DOCUMENT.read_text(encoding="utf-8")
    shown = sparse_curves.placed(document, sparse_curves.table(sparse_curves.kept()))
    assert shown == document, "run: python benchmarks/sparse_curves.py --write"
