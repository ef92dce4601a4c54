"""Rows that are solved cost nothing more, backward as forward: same gradients, fewer products, and never those of another map."""

import pytest
import torch
from core_reference import close

from hyperopt import GMRES, Dense, Implicit, LinearAnderson, Neumann, Newton, Picard, fixed_point
from hyperopt.nn.equilibrium import TanhAffine


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Counted(torch.nn.Module):
    """``tanh(scale_i (w_i A)) + x_i``, each row contracting at its own rate; counts the rows of its calls and of its products."""

    def __init__(self, n=5):
        super().__init__()
        self.A = torch.nn.Parameter(torch.linalg.qr(torch.randn(n, n))[0])
        self.calls, self.products = [], []

    def forward(self, w, x, scale):
        self.calls.append(len(w))
        if w.requires_grad:
            w.register_hook(lambda g: self.products.append(len(g)))
        return torch.tanh(scale * (w @ self.A)) + x


def problem():
    phi = Counted()
    x = torch.randn(8, 5, requires_grad=True)
    scale = torch.tensor([0.05] * 6 + [0.5, 0.9])[:, None].requires_grad_()
    return phi, x, scale


def gradients(phi, x, scale, adjoint, row_args=(0, 1), between=None):
    sol = fixed_point(phi, torch.zeros(8, 5), (x, scale), row_args=row_args, solver=Picard(1e-12, max_steps=500), adjoint=adjoint)
    calls = len(phi.calls)
    phi.products.clear()
    if between:
        between()
    return sol, torch.autograd.grad((sol.value**3).sum(), [x, scale, phi.A]), phi.calls[calls:]


@pytest.mark.parametrize("linear", [Neumann(1e-11, max_steps=500), LinearAnderson(1e-11)], ids=lambda linear: linear.name)
def test_solved_rows_are_not_multiplied_any_more(linear):
    made = problem()
    want, exact, none = gradients(*made, Implicit(linear), row_args=())
    all_rows = sum(made[0].products)
    got, found, calls = gradients(*made, Implicit(linear))
    for a, b in zip(found, exact, strict=True):
        close(a, b, rtol=1e-9, atol=1e-11)
    assert none == [] and 0 < len(calls) <= 3 and max(calls) < 8  # one call a drop, of the rows that are left
    assert got.adjoint is not None and want.adjoint is not None
    assert got.adjoint.evaluations == len(calls) and want.adjoint.evaluations == 0
    assert sum(made[0].products) < 0.6 * all_rows
    close(got.adjoint.iterations, want.adjoint.iterations)


def test_a_map_that_is_another_one_by_then_is_not_called_for_the_gradient():
    """The parameters of the solve count, as they do without row_args, where backward never calls the map."""
    made = problem()
    _, exact, _ = gradients(*made, Implicit(Neumann(1e-11, max_steps=500)), row_args=())
    phi = made[0]
    kept = phi.A

    def swap():
        phi.A = torch.nn.Parameter(torch.zeros(5, 5))

    sol = fixed_point(phi, torch.zeros(8, 5), made[1:], row_args=(0, 1), solver=Picard(1e-12, max_steps=500))
    swap()
    found = torch.autograd.grad((sol.value**3).sum(), [*made[1:], kept])
    for a, b in zip(found, exact, strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)
    assert sol.adjoint is not None and len(phi.products) >= sol.adjoint.vjps - 1


@pytest.mark.parametrize("fallback", [Dense(), GMRES(1e-11)], ids=lambda linear: linear.name)
@pytest.mark.parametrize("closed", [False, True])
def test_a_fallback_works_on_the_rows_that_failed(fallback, closed):
    torch.manual_seed(1)
    A, u = 0.8 * torch.linalg.qr(torch.randn(5, 5))[0], torch.randn(8, 5)
    u[:6] += 4 * u[:6].sign()  # saturated: these rows are solved at once
    A, u = A.requires_grad_(), u.requires_grad_()
    phi = TanhAffine() if closed else lambda w, u, A: torch.tanh(w @ A + u)
    results = []
    for adjoint in (Implicit(Dense()), Implicit(Neumann(1e-11, max_steps=12), policy="fallback", fallback=[fallback])):
        sol = fixed_point(phi, torch.zeros(8, 5), (u, A), row_args=(0,), solver=Newton(1e-13), adjoint=adjoint)
        results.append((sol.adjoint, sol, torch.autograd.grad((sol.value**3).sum(), [u, A])))
    (_, _, want), (_, sol, got) = results
    for a, b in zip(got, want, strict=True):
        close(a, b, rtol=1e-8, atol=1e-10)
    stats = sol.adjoint
    assert stats.method == fallback.name and stats.fallbacks == ("Neumann",) and not stats.status.failed
    assert stats.row_status.shape == (8,) and int((stats.iterations > 12).sum()) <= 3


def test_rows_that_depend_on_each_other_are_not_taken_apart():
    x = torch.randn(4, 3, requires_grad=True)
    phi = lambda w, x: 0.5 * torch.tanh(w - w.mean(0)) + x  # noqa: E731
    sol = fixed_point(phi, torch.zeros(4, 3), (x,), rows="joint", row_args=(), solver=Picard(1e-12, max_steps=200))
    (got,) = torch.autograd.grad(sol.value.square().sum(), x)
    unrolled = x.detach().requires_grad_()
    w = torch.zeros(4, 3)
    for _ in range(100):
        w = phi(w, unrolled)
    close(got, torch.autograd.grad(w.square().sum(), unrolled)[0], rtol=1e-4)
