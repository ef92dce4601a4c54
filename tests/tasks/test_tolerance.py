"""Tolerances of the inner solves that follow the size of the hypergradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_equilibrium_task import no_check, sgd, task

from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.loop import rounding_floor
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.core.solvers.picard import Picard
from hyperopt.tasks.base import StepRecord
from hyperopt.tasks.equilibrium import EquilibriumTask
from hyperopt.tasks.tolerance import GradientTolerance


def test_it_is_proportional_to_the_hypergradient_and_never_above_the_setting() -> None:
    tolerance, solver = GradientTolerance(), Anderson(rtol=1e-2, window=3)
    found = []
    for norm in (2.0, 4.0, 1.0, 8.0, math.nan, 0.04):
        found.append(tolerance.apply(solver, torch.float64).rtol)
        tolerance.note(norm)
    assert found == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2 / 4, 1e-2, 1e-2])
    last = tolerance.apply(solver, torch.float64)
    assert last.rtol == pytest.approx(1e-2 * 0.04 / 8) and isinstance(last, Anderson) and last.window == 3


def test_it_stops_at_the_rounding_floor_and_leaves_a_smaller_setting_alone() -> None:
    tolerance = GradientTolerance()
    tolerance.note(1.0)
    tolerance.note(1e-30)
    assert tolerance.apply(Picard(rtol=1e-3), torch.float32).rtol == rounding_floor(torch.float32)
    assert tolerance.apply(Picard(rtol=1e-12), torch.float32).rtol == 1e-12


def test_hypergradients_of_zero_change_nothing() -> None:
    tolerance = GradientTolerance()
    tolerance.note(0.0)
    assert tolerance.factor == 1.0


def test_what_is_kept_is_all_there_is() -> None:
    tolerance, other = GradientTolerance(), GradientTolerance()
    tolerance.note(3.0)
    tolerance.note(1.0)
    other.load_state_dict(tolerance.state_dict())
    assert other.factor == tolerance.factor == pytest.approx(1 / 3)


def relative_errors(**settings: Any) -> tuple[list[float], list[float]]:
    """Relative errors of the hypergradients of 30 steps against those of tight solves at the same place, and the tolerances."""
    adjoint = Implicit(Neumann(rtol=1e-12, max_steps=2000))
    made = task(solver=Picard(rtol=1e-2), adjoint=adjoint, **settings)
    tight = task(solver=Picard(rtol=1e-13, max_steps=2000), adjoint=adjoint)
    optimizer, errors, tolerances = sgd(made), [], []
    for _ in range(30):
        tight.model.load_state_dict(made.model.state_dict())
        exact, _ = gradients(tight, sgd(tight, 0.0))
        found, record = gradients(made, optimizer)
        difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)))
        errors.append(difference / math.sqrt(sum(float(b.square().sum()) for b in exact)))
        tolerances.append(record.metrics.get("inner/rtol", 1e-2))
    return errors, tolerances


def gradients(of: EquilibriumTask, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], StepRecord]:
    """The hypergradient of a step."""
    found: list[torch.Tensor] = []
    return found, of.step(optimizer, lambda groups: found.extend(g.clone() for each in groups.values() for g in each))


@pytest.mark.slow
def test_the_relative_error_stays_where_a_fixed_tolerance_lets_it_grow() -> None:
    fixed, same = relative_errors()
    driven, tolerances = relative_errors(tolerance="gradient")
    assert set(same) == {1e-2} and min(tolerances) < 2e-3 and max(tolerances) == 1e-2
    assert max(driven[-10:]) < max(fixed[-10:]) / 3
    assert max(driven[-10:]) < 3 * max(driven[:10])


def test_the_solver_of_the_task_stays_what_it_was() -> None:
    made = task(solver=Picard(rtol=1e-2), tolerance="gradient")
    optimizer = sgd(made)
    for _ in range(3):
        made.step(optimizer, no_check)
    assert made.model.solver == Picard(rtol=1e-2)


def test_a_fixed_number_of_steps_has_no_tolerance_to_drive() -> None:
    with pytest.raises(ValueError, match=r"task.tolerance=gradient .* set solver.rtol above 0"):
        task(solver=Picard(rtol=0, atol=0), tolerance="gradient")
