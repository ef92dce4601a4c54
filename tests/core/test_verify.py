"""``check_hypergradient`` and ``compare_adjoints``: right gradients pass, wrong ones do not, by as much as closed forms say."""

import math

import pytest
import torch

from hyperopt import Anderson, Implicit, Neumann, OneStep, Picard, Unrolled, check_hypergradient, compare_adjoints, fixed_point
from hyperopt.core.memory import peak_memory

# torch's own first use of forward mode scripts its decompositions.
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
]


class Problem:
    """``w = tanh(w A + b)``, four rows, and the loss ``sum w^2 + |b|^2``: it depends on b directly too."""

    def __init__(self, q: float = 0.8, linear: bool = False) -> None:
        m = torch.randn(3, 3)
        self.A = (q * m / torch.linalg.matrix_norm(m, 2)).requires_grad_()
        self.b, self.unused = torch.randn(4, 3, requires_grad=True), torch.ones(2, requires_grad=True)
        self.act = (lambda z: z) if linear else torch.tanh
        self.groups = {"A": [self.A], "rest": [self.b, self.unused]}

    def __call__(self, solver, adjoint):
        sol = fixed_point(lambda w: self.act(w @ self.A + self.b), torch.zeros(4, 3), solver=solver, adjoint=adjoint)
        return (sol.value**2).sum() + self.b.square().sum(), sol


@pytest.mark.parametrize("solver", [Picard(1e-10, max_steps=500), Anderson(1e-10)])
def test_a_right_hypergradient_passes(solver):
    problem = Problem()
    before = [t.detach().clone() for t in problem.groups["rest"]]
    found = check_hypergradient(problem, problem.groups, solver=solver, adjoint=Implicit(Neumann(1e-10, max_steps=500)))
    assert found.passed and [row.name for row in found.rows] == ["finite differences", "dense", "unrolled"]
    assert max(row.error for row in found.rows) < 1e-7 and all(row.cosine > 1 - 1e-12 for row in found.rows)
    assert "passed" in str(found) and len(str(found).splitlines()) == 5
    for tensor, old in zip(problem.groups["rest"], before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=1e-14)


def test_wrong_hypergradients_fail_by_as_much_as_they_are_wrong():
    problem = Problem()
    few = check_hypergradient(problem, problem.groups, solver=Picard(1e-12, max_steps=500), adjoint=Implicit(Neumann(0, 0, 1)))
    assert not few.passed and "FAILED" in str(few)
    errors = [row.error for row in few.rows]
    assert min(errors) > 1e-3 and max(errors[1:]) / min(errors[1:]) - 1 < 1e-6
    # One-step: v = g, so the part through w is J_b^T g in place of J_b^T (I - J^T)^-1 g.
    linear = Problem(linear=True)
    found = check_hypergradient(linear, [linear.b], solver=Picard(1e-13, max_steps=999), adjoint=OneStep())
    inverse = torch.linalg.inv(torch.eye(3) - linear.A.detach())
    w = linear.b.detach() @ inverse
    exact, one_step = 2 * w @ inverse.T + 2 * linear.b.detach(), 2 * w + 2 * linear.b.detach()
    want = float((one_step - exact).norm() / exact.norm())
    assert found.rows[1].error == pytest.approx(want, rel=1e-9)


def test_a_reference_that_cannot_be_had_is_said():
    class Wide(Problem):
        def __call__(self, solver, adjoint):
            sol = fixed_point(lambda w: 0.5 * torch.cos(w) + self.b[0, 0], torch.zeros(1, 40_000), solver=solver, adjoint=adjoint)
            return sol.value.mean(), sol

    problem = Wide()
    found = check_hypergradient(problem, [problem.b], directions=1)
    dense = found.rows[1]
    assert math.isnan(dense.error) and "not available" in dense.note and found.passed


def test_adjoints_compared():
    problem = Problem(0.9)
    adjoints = {f"neumann-{k}": Implicit(Neumann(0, 0, k)) for k in (2, 8, 32)}
    found = compare_adjoints(problem, problem.groups, {**adjoints, "unrolled": Unrolled()}, solver=Picard(1e-12, max_steps=999))
    errors = [row.error for row in found.rows]
    assert errors[0] > errors[1] > errors[2] and max(errors[2:]) < 1e-8
    assert [row.vjps for row in found.rows] == [3, 9, 33, 0]
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in found.rows)
    assert len(str(found).splitlines()) == 5 and "neumann-8" in str(found)
    assert found.rows[3].peak_bytes > 1.5 * found.rows[0].peak_bytes  # the whole history is kept
    assert len(found.figure().axes[0].texts) == 4


def test_a_failed_solve_is_in_the_note():
    problem = Problem(0.99, linear=True)
    adjoint = Implicit(Neumann(1e-12, max_steps=3), policy="ignore")
    row = compare_adjoints(problem, problem.groups, {"short": adjoint}, solver=Picard(1e-12, max_steps=9999)).rows[0]
    assert "adjoint: " in row.note and row.error > 1e-3


def test_bad_input():
    problem = Problem()
    with pytest.raises(ValueError, match="no hyperparameters"):
        check_hypergradient(problem, [])
    with pytest.raises(ValueError, match=r"hyperparameter 1, of shape \(4, 3\), is not a leaf"):
        check_hypergradient(problem, [problem.A, 2 * problem.b])
    with pytest.raises(ValueError, match=r"shape \(4, 3\); it must be a scalar"):
        check_hypergradient(lambda solver, adjoint: (problem(solver, adjoint)[1].value, problem(solver, adjoint)[1]), [problem.b])
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_adjoints(problem, [problem.b], {})


def test_peak_memory_counts_what_is_alive_at_once():
    with peak_memory("cpu") as memory:
        x = torch.zeros(1000)
        for _ in range(10):
            x = x + 1  # two at once
        x.add_(1).view(10, 100)  # nothing new
    assert memory.peak == 2 * 8000
