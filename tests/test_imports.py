"""The layout: packages point one way, nothing goes round in a circle, and no file has two subjects."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hyperopt"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
SCRIPTS = sorted(ROOT.glob("experiments/**/*.py"))


def test_packages_point_one_way_and_nothing_goes_round() -> None:
    """The contracts are in ``pyproject.toml``, under ``tool.importlinter``."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_needs_torch_optree_and_numpy_only() -> None:
    graph = grimp.build_graph("hyperopt", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)
    core = graph.find_descendants("hyperopt.core") | {"hyperopt.core"}
    outside = {found.partition(".")[0] for module in core for found in graph.find_modules_directly_imported_by(module)}
    drawing = {"matplotlib"}  # of a figure that is asked for, by ``compare_adjoints``
    assert outside - set(sys.stdlib_module_names) - drawing == {"hyperopt", "torch", "optree", "numpy"}


@pytest.mark.slow
def test_no_package_imports_the_compiler_and_nor_does_a_refused_config() -> None:
    """It takes as long to import as the rest of torch."""
    code = (
        "import sys, pkgutil, importlib, hyperopt\n"
        "names = [m.name for m in pkgutil.walk_packages(hyperopt.__path__, 'hyperopt.') if 'integrations' not in m.name]\n"
        "for name in names:\n"
        "    importlib.import_module(name) if '.plugins' not in name else None\n"
        "assert len(names) > 100\n"
        "from composing import composed\n"
        "from hyperopt.app.building import build\n"
        "try:\n"
        "    build(composed('optimizer.lr=0'))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout == "optimizer.lr=0 is not in (0, inf); change optimizer.lr\nFalse\n", done.stdout + done.stderr


def test_nothing_lies_beside_the_packages() -> None:
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "__init__.py", "py.typed", "README.md"}
    assert names == {"core", "spaces", "bilevel", "stn", "nn", "data", "integrations", "tasks", "app"}


def names_of_ours(path: Path) -> list[tuple[str, str]]:
    """Return what a file takes from modules of this package, wherever in the file: (module, name)."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "hyperopt"]
    return [(node.module or "", alias.name) for node in ours for alias in node.names]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_of_experiments_take_what_is_there(path: Path) -> None:
    """They run for minutes to hours, so nothing else here runs them."""
    missing = [(module, name) for module, name in names_of_ours(path) if not hasattr(importlib.import_module(module), name)]
    assert missing == []


def test_no_file_is_long() -> None:
    assert [path.name for path in MODULES if len(path.read_text().splitlines()) > 400] == []
