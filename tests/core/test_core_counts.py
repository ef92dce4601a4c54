"""What a solve pays for: kernels, host reads, evaluations and memory, counted; a count is the same on every machine."""

from __future__ import annotations

import pytest
import torch
from core_reference import close
from counting import Counter, per_iteration

from hyperopt import RRE, Anderson, Broyden, Chord, LinearAnderson, Neumann, Newton, NewtonKrylov, Picard, Unrolled, fixed_point
from hyperopt.core.adjoints.base import Problem
from hyperopt.core.adjoints.unrolled import unroll
from hyperopt.core.memory import peak_memory
from hyperopt.core.operator import FunctionOperator
from hyperopt.core.solvers.iterate import iterate

pytestmark = pytest.mark.usefixtures("float64")

OWN = 3  # kernels of the map and of the product


def tanh_map(rows, dim, radius=0.7):
    """``phi(w) = tanh(w A + u)``, three kernels."""
    q = torch.linalg.qr(torch.randn(dim, dim))[0]
    A, u = q * torch.linspace(-radius, radius, dim) @ q.T, 0.3 * torch.randn(rows, dim)
    return lambda w: torch.tanh(w @ A + u)


def product(dim, radius=0.7):
    """``v -> M v`` with M symmetric, three kernels."""
    q = torch.linalg.qr(torch.randn(dim, dim))[0]
    A = q * torch.linspace(-radius, radius, dim) @ q.T
    return FunctionOperator(lambda v: (v @ A) * 1.0 + 0.0, symmetric=True)


FORWARD = [(Picard, 8, 0.5), (Anderson, 30, 0.5), (RRE, 20, 0.5), (Broyden, 45, 0.5)]
ADJOINT = [(Neumann, 8, 0.5), (LinearAnderson, 30, 0.5)]
SHAPES = [(1, 10), (32, 20), (1000, 20)]


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize(("kind", "kernels", "reads"), FORWARD)
def test_a_forward_solve_to_a_tolerance(kind, kernels, reads, rows, dim):
    phi, start = tanh_map(rows, dim), torch.zeros(rows, dim)
    with torch.no_grad():
        found = per_iteration(lambda: iterate(kind(), phi, start).stats)
    assert found[0] <= kernels and found[1] <= reads, found


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize(("kind", "kernels", "reads"), ADJOINT)
def test_an_adjoint_solve_to_a_tolerance(kind, kernels, reads, rows, dim):
    operator, b = product(dim), torch.randn(rows, dim)
    with torch.no_grad():
        found = per_iteration(lambda: kind().solve(operator, b).stats)
    assert found[0] <= kernels and found[1] <= reads, found


@pytest.mark.parametrize(("kind", "reads"), [(Newton, 2), (Chord, 2), (NewtonKrylov, 9)])
def test_methods_of_newton_read_the_residual_and_whether_a_system_is_singular(kind, reads):
    phi, start = tanh_map(32, 20), torch.zeros(32, 20)
    with torch.no_grad():
        found = per_iteration(lambda: iterate(kind(), phi, start).stats)
    assert found[1] <= reads, found


@pytest.mark.parametrize(("kind", "own"), [(Picard, 0), (RRE, 7), (Anderson, 15), (Broyden, 28)])
def test_a_fixed_number_of_steps_reads_nothing_and_adds_one_kernel_to_the_algebra(kind, own):
    phi, start = tanh_map(32, 20), torch.zeros(32, 20)
    with torch.no_grad():
        kernels, reads, names = per_iteration(lambda: iterate(kind(0.0, 0.0, 50), phi, start).stats)
    assert reads == 0 and kernels <= OWN + own + 1, names


@pytest.mark.cases(quick=10)
@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("radius", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_hardly_an_evaluation_more_than_looking_at_every_iteration(kind, radius, rows, dim):
    phi, start = tanh_map(rows, dim, radius), torch.zeros(rows, dim)
    solver = kind(1e-6, max_steps=1000)
    calls = []

    def counted(w):
        calls.append(w.detach())
        return phi(w)

    iterate(solver, counted, start)
    residuals = [torch.linalg.vector_norm(phi(w) - w, dim=1) for w in calls]
    met = [bool((r <= 1e-6 * torch.linalg.vector_norm(phi(w), dim=1)).all()) for r, w in zip(residuals, calls, strict=True)]
    least = met.index(True) + 1
    assert least <= len(calls) <= least + max(1, 0.05 * least)
    calls.clear()
    sol = fixed_point(counted, start, rows="batch", solver=solver)  # with the evaluation that the derivative needs
    assert sol.forward.evaluations == len(calls) <= least + max(1, 0.05 * least)


def test_the_counter_sees_kernels_and_reads():
    x = torch.ones(3)
    with Counter() as count:
        y = x.view(3, 1) * 2
        bool(y.sum() > 1)
        y.nonzero()
        (y + 1).tolist()
    assert (count.kernels, count.reads) == (5, 3), (count.names, count.reads)


def test_memory_of_a_solve_does_not_grow_with_its_rows_or_steps():
    rows, dim = 100_000, 8
    A = torch.randn(dim, dim, dtype=torch.float32)
    A *= 0.9 / torch.linalg.matrix_norm(A, 2)
    A.requires_grad_()
    u = torch.randn(rows, dim, dtype=torch.float32)
    state = u.numel() * u.element_size()
    start = torch.zeros_like(u)
    with peak_memory("cpu") as forward:
        sol = fixed_point(lambda w, A: torch.tanh(w @ A + u), start, (A,), solver=Picard(1e-5, max_steps=500))
    assert sol.forward.iterations.max() > 20
    assert forward.peak <= 6 * state, forward.peak / state
    loss = sol.value.square().mean()
    with peak_memory("cpu") as backward:
        loss.backward()
    assert A.grad is not None and torch.isfinite(A.grad).all()
    assert backward.peak <= 10 * state, backward.peak / state


def test_a_counted_solve_is_a_right_one():
    phi = tanh_map(5, 6)
    w = iterate(Anderson(1e-12), phi, torch.zeros(5, 6)).value
    close(phi(w), w, rtol=1e-10)


def test_unrolling_a_fixed_number_of_steps_reads_nothing():
    phi, start = tanh_map(4, 6), torch.zeros(4, 6)
    u = torch.zeros(4, 6, requires_grad=True)
    for solver in (Picard(0.0, 0.0, 12), Anderson(0.0, 0.0, 12), Broyden(0.0, 0.0, 12)):
        sol = fixed_point(lambda w, u: phi(w + u), start, (u,), solver=solver, adjoint=Unrolled())
        with Counter() as count:
            unroll(Problem(lambda w: phi(w), (), (), sol.layout, start, solver), start, 12, stop=False)
        assert count.reads == 0, (solver, count.names)
