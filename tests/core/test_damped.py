"""The damped adjoint: against the closed form, its limit without damping, and where the plain system cannot be solved."""

import pytest
import torch
from core_reference import close, newton, square

from hyperopt import (
    CG,
    GMRES,
    MINRES,
    BilevelProblem,
    Damped,
    Implicit,
    InexactError,
    Neumann,
    Picard,
    Status,
    fixed_point,
    hypergradient,
)

pytestmark = pytest.mark.usefixtures("float64")


def solved(adjoint, m, b):
    sol = fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3), solver=Picard(1e-14, max_steps=500), adjoint=adjoint)
    return sol, torch.autograd.grad(square(sol.value), [m, b])


def closed_form(damping, m, b):
    """``v = ((1 + damping) I - J^T)^{-1} g`` of each row, and the gradients that it gives."""
    w = newton(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3)).detach()
    slope = 1 - w**2
    jacobian = slope[:, :, None] * m.detach().mT  # d phi_i / d w_j of each row
    g = torch.autograd.grad(square(x := w.clone().requires_grad_()), x)[0]
    v = torch.linalg.solve((1 + damping) * torch.eye(3) - jacobian.mT, g)
    return w, g, jacobian, v, torch.autograd.grad(torch.tanh(w @ m + b), [m, b], v)


@pytest.mark.parametrize("damping", [1e-9, 0.05, 2.0])
@pytest.mark.parametrize("solver", [GMRES(1e-13), Neumann(1e-13, max_steps=500)], ids=lambda solver: type(solver).__name__)
def test_the_closed_form(solver, damping):
    m = torch.randn(3, 3)
    m, b = (0.6 * m / torch.linalg.matrix_norm(m, 2)).requires_grad_(), torch.randn(4, 3, requires_grad=True)
    sol, got = solved(Damped(damping, solver), m, b)
    _, g, jacobian, v, want = closed_form(damping, m, b)
    close(sol.v, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)
    left = g - v + (jacobian.mT @ v[:, :, None])[:, :, 0]
    assert sol.adjoint is not None
    close(sol.adjoint.residual, left.norm(dim=1) / g.norm(dim=1), atol=1e-12)
    assert sol.adjoint.status == Status.converged
    exact = solved(Implicit(GMRES(1e-13)), m, b)[1]
    assert torch.allclose(got[0], exact[0], rtol=1e-7) == (damping < 1e-8)


def test_a_second_derivative_is_refused():
    a = torch.tensor(0.3, requires_grad=True)
    value = fixed_point(lambda w: torch.tanh(a * w + 1), torch.zeros(1, 1), adjoint=Damped()).value.sum()
    with pytest.raises(InexactError, match="Damped is never exact"):
        torch.autograd.grad(value, a, create_graph=True)


@pytest.mark.parametrize("solver", [CG(1e-13), MINRES(1e-13), GMRES(1e-13)], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("least", [0.5, 0.0, -0.02])
def test_a_trained_problem_has_the_hessian_with_damping(solver, least):
    eigenvalues = torch.tensor([3.0, 1.0, least])
    q = torch.linalg.qr(torch.randn(3, 3))[0]
    hessian, target = (q * eigenvalues) @ q.T, torch.randn(3)
    problem = BilevelProblem(
        inner_loss=lambda w, lam, batch: w @ hessian @ w / 2 - lam @ w,
        outer_loss=lambda w, lam, batch: (w - target).square().sum() / 2,
    )
    w, lam = torch.randn(3), torch.randn(3)
    found = hypergradient(problem, w, lam, adjoint=Damped(0.1, solver))
    close(found.grad, torch.linalg.solve(hessian + 0.1 * torch.eye(3), w - target))
    assert found.status == Status.converged


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="damping"):
        Damped(0.0)
    with pytest.raises(ValueError, match="policy"):
        Damped(policy="fallback")
    with pytest.raises(TypeError, match="linear_solver"):
        Damped(linear_solver="cg")  # pyright: ignore[reportArgumentType]
