"""``mode=check``: is the hypergradient of this experiment right, and what do other adjoints cost here?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hyperopt.adjoints.base import Adjoint
from hyperopt.adjoints.checkpointed import Checkpointed
from hyperopt.adjoints.implicit import Implicit
from hyperopt.adjoints.onestep import OneStep
from hyperopt.adjoints.phantom import Phantom
from hyperopt.adjoints.unrolled import Unrolled
from hyperopt.check import check_hypergradient, compare_adjoints
from hyperopt.files import write_json
from hyperopt.linsolve.anderson import LinearAnderson
from hyperopt.linsolve.bicgstab import BiCGStab
from hyperopt.linsolve.dense import Dense
from hyperopt.linsolve.gmres import GMRES
from hyperopt.linsolve.neumann import Neumann
from hyperopt.linsolve.normal_cg import NormalCG
from hyperopt.tasks.base import HypergradientError, Task


def adjoints(own: Adjoint) -> dict[str, Adjoint]:
    """Return the task's own adjoint and, each at its own defaults, those that any map and solver can have."""
    solvers = {
        "neumann": Neumann(),
        "anderson": LinearAnderson(),
        "gmres": GMRES(),
        "bicgstab": BiCGStab(),
        "normal_cg": NormalCG(),
        "dense": Dense(),
    }
    implicit = {name: Implicit(solver, policy="ignore") for name, solver in solvers.items()}
    others = {"one_step": OneStep(), "phantom": Phantom(), "unrolled": Unrolled(), "checkpointed": Checkpointed()}
    return {"this experiment's": own, **implicit, **others}


def check(task: Task, out: Path) -> float:
    """Check a task that is set up: print two tables, write ``check.json`` and ``figures/adjoints.png``.

    Returns:
        The largest relative error over the references.

    Raises:
        HypergradientError: the hypergradient does not agree with them.
        NotImplementedError: the task offers no ``objective``.
    """
    solver, adjoint = getattr(task, "solver", None), getattr(task, "adjoint", None) or Implicit()
    found = check_hypergradient(task.objective, task.groups(), solver=solver, adjoint=adjoint)
    print(found)
    compared = compare_adjoints(task.objective, task.groups(), adjoints(adjoint), solver=solver)
    print(f"\n{compared}")
    rows = {"against": [asdict(row) for row in found.rows], "adjoints": [asdict(row) for row in compared.rows]}
    write_json(out / "check.json", {"passed": found.passed, "tolerance": found.tolerance, "norm": found.norm, **rows})
    (out / "figures").mkdir(exist_ok=True)
    compared.figure().savefig(out / "figures" / "adjoints.png", dpi=120)
    if not found.passed:
        raise HypergradientError(f"the hypergradient does not pass its check; see {out / 'check.json'}, solver and adjoint")
    return max(row.error for row in found.rows if row.error == row.error)
