"""Every public name is documented in full, its example runs, and it prints and completes well."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import rlcompleter
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperopt
from hyperopt.app.repro import preserved_global_state
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.policy import reset_warnings
from hyperopt.core.solvers.base import FixedPointSolver

NO_OBJECTS = ("__version__", "nn", "stn", "KINDS")
PACKAGES = (hyperopt, hyperopt.nn, hyperopt.stn)
NAMES = [f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__ if name not in NO_OBJECTS]


def public(name: str) -> Any:
    package, _, last = name.rpartition(".")
    return getattr(importlib.import_module(package), last)


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring by their headings; what comes before the first is the ``Summary``."""
    found = re.split(r"^(Args|Attributes|Returns|Raises|References?|Example):", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return {"Summary": found[0]} | dict(zip(found[1::2], found[2::2], strict=True))


def documented(found: dict[str, str]) -> set[str]:
    """The names that the sections of arguments and of attributes explain."""
    lines = re.findall(r"^ {4}([\w, ]+):", found.get("Args", "") + found.get("Attributes", ""), re.MULTILINE)
    return {name.strip() for line in lines for name in line.split(",")}


def parameters(thing: Any) -> set[str]:
    try:
        taken = inspect.signature(thing).parameters.values()
    except ValueError:  # an exception
        return set()
    return {each.name for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented_in_full(name: str) -> None:
    thing, found = public(name), sections(public(name))
    assert found["Summary"].split("\n")[0].endswith((".", ":")), "a summary is one sentence in the first line"
    assert ">>>" in found.get("Example", "")
    if not isinstance(thing, type):
        assert "Args" in found
        assert "Returns" in found or inspect.signature(thing).return_annotation == "None"
    elif not issubclass(thing, Exception) and thing is not hyperopt.Status:
        assert "Args" in found or "Attributes" in found or not parameters(thing)
    if thing is not hyperopt.Status:
        assert parameters(thing) - documented(found) == set()


METHODS = (FixedPointSolver, LinearSolver, Adjoint, hyperopt.Estimator)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_names_its_source(name: str) -> None:
    thing = public(name)
    if isinstance(thing, type) and issubclass(thing, METHODS) and thing is not hyperopt.Estimator:
        found = sections(thing)
        assert re.search(r"\d{4}", found.get("Reference", "") + found.get("References", "")), "a paper or book, and its year"


def methods(thing: type) -> Iterator[tuple[str, Any]]:
    for name, part in inspect.getmembers(thing):
        if not name.startswith("_") and (callable(part) or isinstance(part, property)):
            if str(getattr(part, "__module__", None) or getattr(part, "fget", None)).startswith("hyperopt"):
                yield name, part


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(public(name), type)])
def test_its_methods_have_a_summary(name: str) -> None:
    assert [method for method, part in methods(public(name)) if not inspect.getdoc(part)] == []


def example(name: str) -> dict[str, Any]:
    """Run the example of a public name; return the variables that it leaves."""
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(inspect.unwrap(public(name)), name, globs={})
    told: list[str] = []
    with preserved_global_state():
        torch.manual_seed(0)
        reset_warnings()
        torch.set_warn_always(True)  # a warning that torch gives once a process is an error in every example
        try:
            doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
        finally:
            torch.set_warn_always(False)
    assert not told, "".join(told)
    assert any(each.want for each in test.examples), "an example shows a result, so that it can fail"
    return test.globs


def shown(variables: dict[str, Any]) -> Iterator[Any]:
    """The objects of this package among the variables of an example, modules of torch aside, whose ``repr`` is torch's."""
    for value in variables.values():
        ours = type(value).__module__.startswith("hyperopt.")
        if ours and not isinstance(value, type | types.FunctionType | torch.nn.Module | torch.Tensor):
            yield value


@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs_and_what_it_makes_prints_in_a_line_or_two(name: str) -> None:
    for value in shown(example(name)):
        assert len(repr(value)) < 300
        assert "tensor(" not in repr(value) and " at 0x" not in repr(value)


def test_objects_that_hold_large_tensors_print_in_a_line() -> None:
    many = torch.full((1000,), 0.5)
    start = {"x": torch.ones(1000, 3), "y": torch.ones(1000, 2)}
    solution = hyperopt.fixed_point(lambda w: {name: 0.5 * value + 1 for name, value in w.items()}, start)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (w - lam).square().sum(), lambda w, lam, batch: w.sum(), hyperopt.Minibatches(many, 10)
    )
    bilevel = hyperopt.Bilevel(problem, many.clone())
    estimate = bilevel.step(many)
    things = [
        solution,
        solution.forward,
        problem,
        problem.inner_batches,
        bilevel,
        estimate,
        estimate.choice,
        estimate.certificate,
    ]
    things += [hyperopt.diagnose(torch.cos, torch.ones(1000, 2)), hyperopt.Constants(0.5, 1.0, many, many)]
    things += [hyperopt.Functional(torch.nn.Linear(100, 100)), hyperopt.SparseRows(torch.eye(100).to_sparse())]
    draw = hyperopt.stn.HyperSpace({f"decay{i}": hyperopt.stn.Positive(1e-3) for i in range(20)}).draw(1000)
    things += [draw, draw.h, hyperopt.stn.TunedSchedule(("a",), (1,) * 1000, ((0.0,),) * 1000, ((1.0,),) * 1000)]
    things += [
        hyperopt.Real(many),
        hyperopt.Positive(many.tolist()),
        hyperopt.Composite(lambda w, lam, batch: w, lambda z, w, lam, batch: z),
    ]
    things += [hyperopt.MatrixOperator(torch.eye(100)), hyperopt.GradientMap(problem, hyperopt.GradientDescent())]
    for thing in things:
        assert len(repr(thing)) < 300 and repr(thing).startswith(type(thing).__name__ + "("), repr(thing)
        assert "tensor(" not in repr(thing) and "\n" not in repr(thing)
    assert "float32[1000, 3]" in repr(solution) and "0.5" not in repr(problem)


@pytest.mark.parametrize("name", NAMES)
def test_its_signature_shows_types_and_not_strings(name: str) -> None:
    thing = public(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [part for _, part in methods(thing) if inspect.isroutine(part)] if isinstance(thing, type) else []
    for part in [thing, *parts]:
        try:
            signature = inspect.signature(part)
        except ValueError:
            continue
        annotations = [each.annotation for each in signature.parameters.values()] + [signature.return_annotation]
        assert not [each for each in annotations if isinstance(each, str) and repr(each) != str(each)]


def test_names_complete() -> None:
    completer = rlcompleter.Completer({"hyperopt": hyperopt})
    matches = [completer.complete("hyperopt.Bil", i) for i in range(3)]
    assert [match.rstrip("(") for match in matches if match] == ["hyperopt.Bilevel", "hyperopt.BilevelProblem"]
    for package in PACKAGES:
        assert set(package.__all__) <= set(dir(package))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_the_callback_for_a_trainer_is_documented_in_full(library: str) -> None:
    pytest.importorskip(library, reason="it is in the extra trainers")
    name = f"hyperopt.integrations.{library}.TunerCallback"
    assert {"Args", "Attributes", "Raises", "Reference", "Example"} <= set(sections(public(name)))
    assert parameters(public(name)) - documented(sections(public(name))) == set()
    (test,) = doctest.DocTestFinder(recurse=False).find(public(name), name, globs={})
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 0


@pytest.mark.slow
def test_the_pages_of_the_api_reference_have_every_name(tmp_path: Path) -> None:
    """As ``python -m pdoc --math hyperopt`` makes them; a warning is an error here."""
    pdoc = pytest.importorskip("pdoc", reason="pdoc is in the extra docs")
    pdoc.render.configure(math=True)
    pdoc.pdoc("hyperopt", output_directory=tmp_path)
    pages = {
        name: (tmp_path / f"{name.replace('.', '/')}.html").read_text() for name in ("hyperopt", "hyperopt.nn", "hyperopt.stn")
    }
    missing = [name for name in NAMES if f'id="{name.rpartition(".")[2]}"' not in pages[name.rpartition(".")[0]]]
    assert missing == []
    assert "MathJax" in pages["hyperopt"]
