"""What may import what, read from the source: every import counts, those inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import accord

ROOT = Path(accord.__file__).parent

# From the bottom up; a module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "records", "atomic", "randomness", "phases", "metrics", "measures"),
    ("config",),
    ("guards",),
    ("losses",),
    ("data", "models"),
    ("rollout", "rewards"),
    ("training",),
    ("methods",),
    ("evaluation",),
    ("pipeline",),
    ("profiling",),
    ("loop",),
    ("demos",),
    ("cli", "api"),
)
# Beside the order: what these may import of Accord at all, besides themselves.
LEAVES = {
    "tasks": {"records", "errors", "randomness"},
    "report": {"errors", "records", "metrics", "measures", "config", "atomic"},
    "losses": set(),
    "measures": {"records", "errors", "randomness"},
    "guards": {"config"},
}
# Simulators and reports stand beside the order; these layers, and all above them, may use them.
MAY_USE = {"report": "methods", "tasks": "evaluation"}
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}


def imported_modules(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file whose package is `package`."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def complaint(importer: str, imported: str) -> str | None:
    """Why the package `importer` may not import the package `imported`, or None."""
    if importer == imported:
        return None
    if importer in LEAVES and imported not in LEAVES[importer]:
        return f"{importer} may import only {sorted(LEAVES[importer])}"
    if importer in MAY_USE:
        return None
    if imported in MAY_USE:
        above = MAY_USE[imported]
        return None if HEIGHT[importer] >= HEIGHT[above] else f"{imported} is for {above} and what lies above it"
    if imported not in HEIGHT:
        return f"{imported} has no place in the layers"
    return None if HEIGHT[imported] <= HEIGHT[importer] else f"{imported} lies above {importer}"


def violations(path: Path, root: Path) -> list[str]:
    parts = path.relative_to(root).with_suffix("").parts
    importer = parts[0]
    if importer == "__init__":
        return []  # the package itself hands out names of the top layer, lazily
    package = ".".join(("accord", *parts[:-1]))
    found: list[str] = []
    for line, name in imported_modules(path.read_text(encoding="utf-8"), package):
        if not name.startswith("accord."):
            continue
        imported = name.split(".")[1]
        reason = None if imported == "__version__" else complaint(importer, imported)
        if reason:
            found.append(f"{path.relative_to(root)}:{line} imports {name}: {reason}")
    return found


def test_every_package_has_a_place_in_the_layers() -> None:
    packages = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert packages - {"__init__"} == HEIGHT.keys() | MAY_USE.keys()


def test_modules_import_only_what_lies_below_them() -> None:
    assert [v for path in sorted(ROOT.rglob("*.py")) for v in violations(path, ROOT)] == []


@pytest.mark.parametrize(
    ("file", "source", "fine"),
    [
        ("losses/x.py", "from accord.config import Recipe", False),
        ("losses/x.py", "from accord.losses.kl import kl_k1", True),
        ("training/x.py", "def f():\n    import accord.methods.sft", False),
        ("training/x.py", "from accord import methods", False),
        ("training/x.py", "from ..methods import sft", False),
        ("methods/x.py", "from .sft import run_sft", True),
        ("methods/x.py", "from accord.report.stage import stage_report", True),
        ("training/x.py", "from accord.report.stage import stage_report", False),
        ("report/x.py", "from accord.training.loop import run_training", False),
        ("tasks/x.py", "from accord.metrics import check", False),
        ("data/x.py", "from accord.tasks.randomwalks import RandomWalks", False),
        ("cli/x.py", "from accord.demos.quickstart import run_quickstart", True),
        ("demos/x.py", "from accord.api import train", False),
    ],
)
def test_the_check_sees_what_is_wrong_and_lets_pass_what_is_right(
    tmp_path: Path, file: str, source: str, fine: bool
) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(source)
    assert (violations(path, tmp_path) == []) == fine
