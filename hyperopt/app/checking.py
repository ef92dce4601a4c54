"""``mode=check``: checks the hypergradient of an experiment, and compares the cost of other adjoints."""

from __future__ import annotations

import io
import math
from dataclasses import asdict

from hydra.utils import get_class

from hyperopt.app.files import write_json
from hyperopt.app.options import targets
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.verify import check_hypergradient, compare_adjoints
from hyperopt.tasks.base import HypergradientError, Task

SINGLE_LOOP = ("soba", "saba", "stocbio", "f2sa", "v_pbgd")  # methods without an adjoint of a fixed point
# Adjoints that choose among others, or need a symmetric map, a solver that keeps an inverse, or a trained problem.
PARTICULAR = ("auto", "cg", "nystrom", "shine", "t1t2", "finite_difference", *SINGLE_LOOP)


def adjoints(own: Adjoint) -> dict[str, Adjoint]:
    """Return the task's own adjoint, and with default values the options that work for any map and solver."""
    found = {"this experiment's": own}
    for name, (target, *inside) in targets("adjoint").items():
        if name not in PARTICULAR:
            made = get_class(target)
            found[name] = made(get_class(inside[0])(), policy="ignore") if inside and issubclass(made, Implicit) else made()
    return found


def check(task: Task, run: RunDirectory) -> float:
    """Check a task that is set up: print two tables, write ``check.json`` and ``figures/adjoints.png``.

    Returns:
        The largest relative error over the references.

    Raises:
        HypergradientError: the hypergradient does not agree with the references.
        NotImplementedError: the task has no ``objective``, or its adjoint is not one of a fixed point.
    """
    solver, adjoint = getattr(task, "solver", None), getattr(task, "adjoint", None) or Implicit()
    if not isinstance(adjoint, Adjoint):
        raise NotImplementedError(
            f"mode=check is about the adjoint of a fixed point; {type(adjoint).__name__} trains the model itself and is right "
            "only in its limit. Use adjoint=auto"
        )
    found = check_hypergradient(task.objective, task.groups(), solver=solver, adjoint=adjoint)
    print(found)
    compared = compare_adjoints(task.objective, task.groups(), adjoints(adjoint), solver=solver)
    print(f"\n{compared}")
    rows = {"against": [asdict(row) for row in found.rows], "adjoints": [asdict(row) for row in compared.rows]}
    write_json(run.verified, {"passed": found.passed, "tolerance": found.tolerance, "norm": found.norm, **rows})
    image = io.BytesIO()
    compared.figure().savefig(image, format="png", dpi=120)
    run.write_figure("adjoints.png", image.getvalue())
    if not found.passed:
        raise HypergradientError(f"the hypergradient does not pass its check; see {run.verified}, solver and adjoint")
    return max(row.error for row in found.rows if not math.isnan(row.error))
