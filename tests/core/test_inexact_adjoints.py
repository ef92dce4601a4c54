"""The adjoints that leave terms out on purpose: what they compute, what it costs, and where they become exact."""

import pytest
import torch
from core_reference import Counted, close, newton, square

from hyperopt import Anderson, Implicit, Neumann, OneStep, Phantom, Picard, Status, fixed_point
from hyperopt.nn.equilibrium import TanhAffine

pytestmark = pytest.mark.usefixtures("float64")

SOLVER = Picard(1e-14, max_steps=500)


def problem(rows=4, n=3, q=0.6):
    m = torch.randn(n, n)
    return (m * (q / torch.linalg.matrix_norm(m, 2))).requires_grad_(), torch.randn(rows, n).requires_grad_()


def gradients(adjoint, m, b, q=0.6, **more):
    phi = Counted(lambda w: torch.tanh(w @ m + b))
    sol = fixed_point(phi, torch.zeros(4, 3), solver=SOLVER, adjoint=adjoint, policy="raise", **more)
    calls = phi.calls
    got = torch.autograd.grad(square(sol.value), [m, b])
    assert phi.calls == calls == sol.forward.evaluations and sol.adjoint is not None
    return sol, sol.adjoint, got


def test_one_step_is_the_derivative_of_the_last_step_alone():
    m, b = problem()
    sol, adjoint, got = gradients(OneStep(), m, b)
    at = newton(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3)).detach()
    want = torch.autograd.grad(square(torch.tanh(at @ m + b)), [m, b])
    for x, y in zip(got, want, strict=True):
        close(x, y)
    assert (adjoint.vjps, adjoint.status) == (1, Status.fixed_steps)
    close(sol.v, torch.autograd.grad(square(x := at.requires_grad_()), x)[0])


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_phantom_is_the_derivative_of_damped_steps_from_the_solution(steps, damping):
    m, b = problem()
    _, adjoint, got = gradients(Phantom(steps, damping), m, b)
    w = newton(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3)).detach()
    for _ in range(steps):
        w = (1 - damping) * w + damping * torch.tanh(w @ m + b)
    for x, y in zip(got, torch.autograd.grad(square(w), [m, b]), strict=True):
        close(x, y)
    assert (adjoint.vjps, adjoint.status) == (steps, Status.fixed_steps)


def test_where_they_meet_the_others():
    m, b = problem()
    one = gradients(OneStep(), m, b)[2]
    for x, y in zip(one, gradients(Phantom(1, 1.0), m, b)[2], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(gradients(Phantom(4, 1.0), m, b)[2], gradients(Implicit(Neumann(0, 0, 3)), m, b)[2], strict=True):
        close(x, y)
    exact = gradients(Implicit(Neumann(1e-14, max_steps=500)), m, b)[2]
    for x, y in zip(gradients(Phantom(400, 0.5), m, b)[2], exact, strict=True):
        close(x, y, rtol=1e-9)
    assert not torch.allclose(one[0], exact[0], rtol=1e-2)


def test_damping_solves_what_the_plain_series_cannot():
    b = torch.ones(1, 1, requires_grad=True)
    for adjoint, want in ((Phantom(200, 0.4), 1 / 2.5), (Implicit(Neumann(0, 0, 20), policy="ignore"), None)):
        sol = fixed_point(lambda w: -1.5 * w + b, torch.zeros(1, 1), solver=Anderson(1e-13), adjoint=adjoint)
        got = float(torch.autograd.grad(sol.value.sum(), b)[0])
        assert got == pytest.approx(want, rel=1e-10) if want else abs(got) > 100


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom(3)])
def test_the_residual_is_that_of_the_iterate_before(adjoint):
    m, b = problem()
    sol, stats, _ = gradients(adjoint, m, b)
    at = sol.value.detach().requires_grad_()
    g = torch.autograd.grad(square(sol.value), sol.value)[0]
    v = torch.zeros_like(g)
    for _ in range(getattr(adjoint, "steps", 1)):
        residual = torch.autograd.grad(torch.tanh(at @ m + b), at, v)[0] + g - v
        v = v + getattr(adjoint, "damping", 1.0) * residual
    close(stats.residual, residual.norm(dim=1) / g.norm(dim=1))
    close(sol.v, v)


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom(3)])
def test_trees_and_a_closed_form_cell(adjoint):
    m, b = problem()
    want = gradients(adjoint, m, b)[2]
    tree = fixed_point(lambda w: {"x": torch.tanh(w["x"] @ m + b)}, {"x": torch.zeros(4, 3)}, solver=SOLVER, adjoint=adjoint)
    cell = fixed_point(TanhAffine(), torch.zeros(4, 3), (b, m), solver=SOLVER, adjoint=adjoint)
    for value in (tree.value["x"], cell.value):
        for x, y in zip(torch.autograd.grad(square(value), [m, b]), want, strict=True):
            close(x, y)
