"""A module imports only from the layers above its own, so that each part can be read, tested and replaced by itself."""

import ast
from pathlib import Path

import pytest

import weightstream

ROOT = Path(weightstream.__file__).parent

# One line per layer; a module may import from its own line and from those above it.
LAYERS = (
    ("errors", "units", "section", "system"),
    ("blocks", "cluster"),
    ("schedule",),
    ("trace",),
    ("sparse",),
    ("store",),
    ("fabric",),
    ("worker",),
    ("masking", "families", "runtime", "simulator"),
    ("engine", "experts", "nn"),
    ("data", "hub", "training", "report", "machine", "prediction"),
    ("config", "launch"),
    ("commands", "demo", "demo_120t", "cli"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PUBLIC = {"__init__", "__main__"}  # the face of the package: may import anything, and nothing may import it
SIMULATOR_MAY_NOT = {"store", "fabric", "worker"}
ABOVE_HUGGING_FACE = RANK["engine"]  # nothing above this line knows transformers

MODULES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def imports_of(path: Path) -> set[str]:
    """Full dotted names that a file imports, wherever in the file the import stands."""
    package = ("weightstream", *path.relative_to(ROOT).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    own = layer_of(path)
    if own in PUBLIC:
        return
    assert own in RANK, f"{path.name} is in no layer; add it to LAYERS where it belongs"
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("weightstream.")}
    too_low = sorted(name for name in used if name in RANK and RANK[name] > RANK[own])
    assert not too_low, f"{own} may import only from layers above its own, and imports {', '.join(too_low)}"
    if own == "simulator":
        assert not used & SIMULATOR_MAY_NOT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_stands_above_the_engine_knows_no_hugging_face(path: Path) -> None:
    if layer_of(path) in PUBLIC or RANK[layer_of(path)] >= ABOVE_HUGGING_FACE:
        return
    foreign = {name.split(".")[0] for name in imports_of(path)} & {"transformers", "tokenizers", "huggingface_hub"}
    assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_every_file_says_what_it_is() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in MODULES}
    missing = [
        str(path.relative_to(ROOT))
        for path, text in sources.items()
        if text.strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not missing
