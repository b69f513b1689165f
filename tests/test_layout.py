"""Imports point one way: from the application to pruning to what lies on disk, and downwards inside each package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate

import pytest

import search

ROOT = Path(__file__).resolve().parents[1]
# Each package with its folders and modules, the lowest first: what stands later may import what stands before it. A new
# folder is listed here.
LAYERS = {
    "supernet": (
        *("errors", "system", "space", "candidates", "encodings", "cache", "manifest", "unit_file", "uses", "store"),
        *("models", "admin", "__main__"),
    ),
    "local_prune": ("statistics", "regression", "pruner", "text", "methods", "walk", "identity", "estimate"),
    "search": (
        *("errors", "paths", "values", "inputs", "budgets", "evaluation", "strategies", "evaluate", "report"),
        *("export", "trackers", "run", "cli", "__main__"),
    ),
}
PACKAGES = tuple(LAYERS)
FOLDERS = sorted(file.parent for package in PACKAGES for file in (ROOT / package).glob("*/__init__.py"))


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it: in functions, and for types alone, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not used here"
            # `from local_prune import walk` imports a module of the package.
            yield from (
                [f"{node.module}.{name.name}" for name in node.names] if node.module in LAYERS else [str(node.module)]
            )
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def place(module: str) -> tuple[int, int] | None:
    """How high a module stands: its package, and its folder in that; None for modules that are not ours."""
    package, _, rest = module.partition(".")
    if package not in LAYERS:
        return None
    room = rest.partition(".")[0]
    layers = LAYERS[package]
    return PACKAGES.index(package), layers.index(room) if room in layers else -1  # the package itself holds nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(package: str) -> None:
    upwards = []
    for file in sorted((ROOT / package).rglob("*.py")):
        own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        here = place(own.removesuffix(".__init__"))
        assert here is not None
        upwards += [f"{own} imports {other}" for other in imported(file) if (place(other) or (-1, -1)) > here]
    assert upwards == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_and_module_has_its_place(package: str) -> None:
    there = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__"} == set(LAYERS[package])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_every_folder_says_what_lives_there_and_what_may_import_it(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert re.search(r"\b[Mm]ay import\b", said), "what it may import"
    assert len(re.findall(r"[.:;](?:\s|$)", said)) >= 2


def test_the_public_names_are_there() -> None:
    names = re.findall(r"^- `([\w.]+)`", search.__doc__ or "", flags=re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if locate(name) is None] == []
