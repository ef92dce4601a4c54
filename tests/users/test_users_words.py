"""Words of the place: the library's messages speak of arguments and classes, and the command line adds its keys."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hyperopt
from hyperopt.app import errors as messages
from hyperopt.app.options import choices, own

PACKAGE = Path(hyperopt.__file__).parent
KEY = re.compile(r"\b(?:adjoint|inner|solver|task|dataset|trainer|precision)(?:=[a-z]|\.[a-z])")
"""A key of a config, or an option of a group."""
PLACES = ("core", "bilevel", "nn", "stn")
NOT_YET: tuple[str, ...] = ()


def raised(path: Path) -> list[str]:
    """The text of every string that is raised, returned or kept for a message in a file; docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


@pytest.mark.parametrize("place", PLACES)
def test_no_message_of_the_library_names_a_key(place):
    named = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in (PACKAGE / place).rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in NOT_YET
        for text in raised(path)
        if KEY.search(text)
    }
    assert not named


def test_every_method_that_a_message_may_name_has_a_key():
    options = {option.partition("/")[2] for option in own() if option.partition("/")[0] in ("solver", "adjoint", "inner")}
    told = {key.partition("=")[2].partition(" ")[0] for key in choices().values()}
    assert options <= told
    for name in set(choices()) - {"float64"}:
        assert hasattr(hyperopt, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lower step_size=5 of GradientDescent", "GradientDescent is inner=gradient_descent (its arguments are keys of inner)"),
        ("use CG, or lower it", "CG is adjoint=cg (its arguments are keys of adjoint.linear_solver)"),
        ("compute in float64", "float64 is precision=float64"),
        ("use NewtonKrylov", "NewtonKrylov is solver=newton_krylov (its arguments are keys of solver)"),
        ("Lower step_size=2 of SOBA", "SOBA is adjoint=soba (its arguments are keys of adjoint)"),
    ],
)
def test_the_command_line_adds_the_key(text, told):
    found = messages.explain(hyperopt.SolveError(text), choices())
    assert found == f"{text}\non the command line: {told}"
    assert messages.explain(hyperopt.SolveError(text)) == text


def test_a_message_that_names_no_method_is_left_as_it_is():
    assert messages.explain(hyperopt.SolveError("the Newtonian CGS"), choices()) == "the Newtonian CGS"
