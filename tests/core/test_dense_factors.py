"""Factors that are kept: their solves differentiate to every order, and unrolled Newton with a closed form is unrolled Newton."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_reference import close
from torch.autograd import gradcheck, gradgradcheck

from hyperopt import Chord, Dense, Implicit, Neumann, Newton, Picard, Unrolled, fixed_point
from hyperopt.core.newton.dense_jacobian import FactoredSolve, factor, solve
from hyperopt.core.policy import reset_warnings
from hyperopt.core.solvers.point import Cost, Point
from hyperopt.nn.equilibrium import TanhAffine


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at the first torch.func.jvp of a process
@pytest.mark.parametrize("transpose", [False, True])
def test_a_solve_with_kept_factors_differentiates_to_every_order(transpose):
    system = (torch.randn(3, 4, 4) + 4 * torch.eye(4)).requires_grad_()
    r = torch.randn(3, 4, requires_grad=True)

    def solved(system, r):
        with torch.no_grad():
            lu, pivots, _ = torch.linalg.lu_factor_ex(system)
        return FactoredSolve.apply(system, lu, pivots, r, transpose)

    def plain(system, r):
        return torch.linalg.solve(system.mT if transpose else system, r[..., None])[..., 0]

    close(solved(system, r), plain(system, r))
    assert gradcheck(solved, (system, r)) and gradgradcheck(solved, (system, r))
    moves = torch.randn_like(system), torch.randn_like(r)
    for a, b in zip(*(torch.func.jvp(f, (system.detach(), r.detach()), moves) for f in (solved, plain)), strict=True):
        close(a, b)


def factored(J) -> Any:
    """What ``factor`` makes of a point with these Jacobians."""
    at: Any = SimpleNamespace(jacobian=lambda: J)
    return factor(at)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grads", [False, True])
def test_an_entry_that_is_not_finite_breaks_its_row_wherever_it_stands(value, grads):
    J = 0.3 * torch.randn(10, 3, 3)
    for k in range(9):
        J[k, k // 3, k % 3] = value
    with torch.set_grad_enabled(grads):
        factors, broken = factored(J)
    assert broken.tolist() == [True] * 9 + [False]
    r = torch.randn(10, 3)
    close(solve(factors, r)[9], torch.linalg.solve(torch.eye(3) - J[9], r[9]))
    close(solve(factors, r)[:9], r[:9])  # the factors of the identity


def test_rows_that_are_large_and_regular_do_not_break():
    J = torch.stack([torch.eye(2) - torch.diag(torch.tensor([s, -s])) for s in (1e-10, 1.0, 1e300)])
    assert factored(J)[1] is None
    assert factored(torch.eye(2).expand(2, 2, 2))[1].tolist() == [True, True]


def test_factors_of_some_rows():
    J = 0.3 * torch.randn(5, 3, 3)
    J[3] = torch.eye(3)
    at = Point(lambda w: torch.einsum("ijk,ik->ij", J, w), torch.randn(5, 3), Cost(), graph=True)
    with torch.no_grad():
        factors, singular = factor(at, torch.tensor([1, 3]))
        assert factors.system is None and singular is not None and singular.tolist() == [False, True]
        r = torch.randn(2, 3)
        close(solve(factors, r)[0], torch.linalg.solve(torch.eye(3) - J[1], r[0]))
        close(solve(factors, r, transpose=True)[0], torch.linalg.solve(torch.eye(3) - J[1].T, r[0]))


class Plain(torch.nn.Module):
    """The same map without its closed form."""

    def forward(self, w, u, A):
        return TanhAffine()(w, u, A)


def unrolled(phi, solver, rows=6, n=5):
    generator = torch.Generator().manual_seed(3)
    A = (1.1 * torch.linalg.qr(torch.randn(n, n, generator=generator))[0]).requires_grad_()
    u = torch.randn(rows, n, generator=generator)
    u[:2] *= 5  # solved some steps before the others
    u.requires_grad_()
    sol = fixed_point(phi, torch.zeros(rows, n), (u, A), row_args=(0,), solver=solver, adjoint=Unrolled())
    first = torch.autograd.grad((sol.value**3).sum(), [u, A], create_graph=True)
    second = torch.autograd.grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), [u, A])
    return sol, [*first, *second]


@pytest.mark.parametrize("solver", [Newton(1e-12), Newton(0, 0, 4), Chord(1e-10)], ids=repr)
def test_unrolling_takes_a_closed_form_that_may_be_differentiated(solver):
    (closed, found), (by_autograd, want) = (unrolled(phi, solver) for phi in (TanhAffine(), Plain()))
    close(closed.value, by_autograd.value, rtol=1e-12)
    for a, b in zip(found, want, strict=True):
        close(a, b, rtol=1e-9, atol=1e-11)
    assert closed.forward.vjps == 0 < by_autograd.forward.vjps
    assert closed.forward.evaluations <= by_autograd.forward.evaluations
    close(closed.forward.iterations, by_autograd.forward.iterations)


def test_unrolled_newton_is_the_implicit_gradient_at_its_limit():
    _, (u_bar, A_bar, *_) = unrolled(TanhAffine(), Newton(1e-14))
    generator = torch.Generator().manual_seed(3)
    A = (1.1 * torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]).requires_grad_()
    u = torch.randn(6, 5, generator=generator)
    u[:2] *= 5
    u.requires_grad_()
    value = fixed_point(TanhAffine(), torch.zeros(6, 5), (u, A), solver=Newton(1e-14), adjoint=Implicit(Dense())).value
    for a, b in zip((u_bar, A_bar), torch.autograd.grad((value**3).sum(), [u, A]), strict=True):
        close(a, b, rtol=1e-9, atol=1e-11)


def test_a_dense_adjoint_takes_the_closed_form():
    stats = []
    for phi in (TanhAffine(), Plain()):
        A, u = 0.9 * torch.linalg.qr(torch.randn(4, 4))[0], torch.randn(3, 4, requires_grad=True)
        sol = fixed_point(phi, torch.zeros(3, 4), (u, A), solver=Newton(1e-12), adjoint=Implicit(Dense()))
        sol.value.sum().backward()
        stats.append(sol.adjoint)
    assert [s.status.name for s in stats] == ["converged", "converged"]
    assert stats[0].vjps == stats[1].vjps - 4  # the products that make a matrix of 4 columns


def test_a_switch_is_a_warning_once_a_run(caplog):
    reset_warnings()
    adjoint = Implicit(Neumann(1e-12, max_steps=2), policy="fallback", fallback=[Dense()])
    with caplog.at_level(logging.DEBUG, "hyperopt"):
        for _ in range(3):
            x = torch.ones(1, 2, requires_grad=True)
            sol = fixed_point(lambda w, x: 0.5 * torch.tanh(w) + x, torch.zeros(1, 2), (x,), solver=Picard(), adjoint=adjoint)
            sol.value.sum().backward()
    levels = [record.levelname for record in caplog.records if "falling back to Dense" in record.getMessage()]
    assert levels == ["WARNING", "DEBUG", "DEBUG"]
