"""Imports point one way: a module imports from layers below its own, or from its own layer."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hyperopt"
# Bottom first. A name stands for a module or a whole package; the settings, free of torch, lie below everything.
LAYERS = [
    ("core.text", "core.checks", "core.operator", "core.solvers.settings", "core.linear.settings", "core.adjoints.settings"),
    ("core.precision",),
    ("core.tree", "core.state"),
    ("core.status",),
    ("core.policy", "core.captured", "core.memory", "core.rowwise", "core.graph_modes"),
    ("core.draws", "core.jacobian", "core.legacy"),
    ("core.contents", "core.streams"),
    ("core.places",),
    ("core.purity", "core.replay"),
    ("core.distributed",),
    ("core.process",),
    ("core.loop",),
    ("core.solvers",),
    ("core.linear",),
    ("core.solvers.newton_krylov", "core.solvers.forward"),  # a linear system in every step, and the fallback to it
    ("core.differentiate", "core.adjoints"),
    ("core.diagnose",),
    ("core.fixed_point", "core.certificate", "core.verify"),
    (
        "bilevel.settings",
        "bilevel.single_loop_settings",
        "data.errors",
        "data.settings",
        "nn.settings",
        "stn.settings",
        "stn.classifier_settings",
        "tasks.settings",
        "space_settings",
        "train_settings",
        "resolvers",
        "messages",
        "lazy",
    ),
    ("files", "reading", "tensor_files", "rows", "experiment"),
    ("directory", "workers"),
    ("reporting",),
    ("spaces",),
    ("hyperparameters",),
    ("nn", "data", "optim"),
    ("regularise",),
    ("stn.declare", "stn.draw"),
    ("stn.space", "stn.response"),
    ("stn.layer", "stn.dual"),
    ("stn.products", "stn.norm", "stn.recurrent", "stn.attention", "stn.dropout", "stn.guards"),
    ("stn.kinds",),
    ("stn.network", "stn.row_dropout"),
    ("stn.classifiers",),
    ("stn",),
    ("bilevel.batches", "bilevel.loaders"),
    ("bilevel.problem", "bilevel.estimate"),
    ("bilevel.evaluation", "bilevel.tied"),
    ("bilevel.curvature", "bilevel.estimator"),
    ("bilevel.step_map",),
    ("bilevel.inner",),
    ("bilevel",),
    ("tasks",),
    ("schema",),
    ("config", "guard", "events", "track", "repro", "loop_state", "checkpoint"),
    ("report", "checking", "exporting", "resume"),
    ("run",),
    ("launch",),
    ("sweep",),
    ("preflight",),
    ("command",),
    ("cli",),
]


def layer(module: str) -> int:
    """Return the layer of ``hyperopt.<module>``: that of its longest listed prefix."""
    places = [(name, k) for k, names in enumerate(LAYERS) for name in names]
    found = [(len(name), k) for name, k in places if f"{module}.".startswith(f"{name}.")]
    assert found, f"hyperopt.{module} is in no layer: put it into LAYERS"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, wherever in the file, those for type checking left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hyperopt"):
            base = (node.module or "").removeprefix("hyperopt").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                is_module = (PACKAGE / f"{name.replace('.', '/')}.py").exists() or (PACKAGE / name.replace(".", "/")).is_dir()
                found.add(name if is_module else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {""}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    upward = sorted(module for module in imports(path) if layer(module) > layer(name))
    assert upward == []


def names_of_ours(path: Path) -> list[tuple[str, str]]:
    """Return what a file takes from modules of this package, wherever in the file: (module, name)."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "hyperopt"]
    return [(node.module or "", alias.name) for node in ours for alias in node.names]


SCRIPTS = sorted(PACKAGE.parent.glob("experiments/**/*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_of_experiments_take_what_is_there(path: Path) -> None:
    """They run for minutes to hours, so nothing else here runs them."""
    missing = [(module, name) for module, name in names_of_ours(path) if not hasattr(importlib.import_module(module), name)]
    assert missing == []


def test_no_file_is_long() -> None:
    assert [path.name for path in MODULES if len(path.read_text().splitlines()) > 400] == []
