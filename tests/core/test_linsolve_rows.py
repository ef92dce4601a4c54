"""Rows that depend on each other: no linear solver, and no chain of them, calls a solution of single rows converged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_reference import close

from hyperopt import (
    CG,
    GMRES,
    MINRES,
    Anderson,
    BiCGStab,
    Dense,
    Implicit,
    LinearAnderson,
    Neumann,
    NormalCG,
    Picard,
    SolveError,
    fixed_point,
)
from hyperopt.core.linear.fallback import solve_chain
from hyperopt.core.operator import FunctionOperator, LinearOperator
from hyperopt.core.status import Status

pytestmark = pytest.mark.usefixtures("float64")

METHODS: dict[str, Callable[..., Any]] = {
    "neumann": Neumann,
    "linear anderson": LinearAnderson,
    "cg": CG,
    "minres": MINRES,
    "bicgstab": BiCGStab,
    "gmres": GMRES,
    "normal cg": NormalCG,
    "dense": Dense,
}
ROWS, DIM = 8, 4
PATH = torch.diag(torch.full((ROWS - 1,), 0.5, dtype=torch.float64), 1)  # row i waits for row i + 1


def symmetric(n: int, seed: int) -> torch.Tensor:
    """A symmetric matrix of norm 1 with positive entries."""
    m = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (m + m.T) / torch.linalg.matrix_norm(m + m.T, 2)


def graph(seed: int, strength: float) -> FunctionOperator:
    """``v -> own v W + strength P v``: rows of different stiffness and a graph over them."""
    own, W, P = torch.linspace(0.05, 0.9, ROWS)[:, None] * (1 - strength), symmetric(DIM, seed), symmetric(ROWS, seed + 1)
    return FunctionOperator(lambda v: own * (v @ W) + 0.9 * strength * (P @ v), symmetric=True)


def path() -> FunctionOperator:
    """``v -> PATH v``."""
    return FunctionOperator(lambda v: PATH @ v, lambda v: PATH.T @ v)


def right_hand_side(kind: str) -> torch.Tensor:
    """Of rows that are alike, of very different sizes, or without a part in the outer loss."""
    b = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    if kind == "sizes":
        b *= torch.logspace(-6, 0, ROWS)[:, None]
    if kind == "zeros":
        b[:-2] = 0
    return b


def solution(op: LinearOperator, b: torch.Tensor) -> torch.Tensor:
    """Of all rows together, by a dense solve."""
    eye = torch.eye(b.numel()).view(b.numel(), *b.shape)
    matrix = torch.stack([op.complement(e).flatten() for e in eye], dim=1)
    return torch.linalg.solve(matrix, b.flatten()).view_as(b)


def right_or_told(found: Any, sizes: torch.Tensor, op: LinearOperator, b: torch.Tensor, rtol: float) -> None:
    """A value that is said to be converged has the residual that it is said to have, and is right."""
    residual = torch.linalg.vector_norm(op.complement(found.value) - b, dim=1)
    good = found.stats.row_status <= Status.fixed_steps
    if bool(good.all()):
        assert float((residual / sizes.clamp(min=1e-300)).max()) <= 5 * rtol
        close(found.value, solution(op, b), rtol=1e4 * rtol, atol=1e3 * rtol * float(b.abs().max()))


@pytest.mark.cases(quick=7, slow=50, among={"strength": [0.3]})
@pytest.mark.parametrize(("rtol", "relative_to"), [(1e-3, "row"), (1e-8, "row"), (1e-8, "batch")])
@pytest.mark.parametrize("kind", ["alike", "sizes", "zeros"])
@pytest.mark.parametrize("strength", [0.02, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_over_the_rows_is_solved_or_told(name, strength, kind, rtol, relative_to):
    for seed in range(3):
        op, b = graph(seed, strength), right_hand_side(kind)
        solver = METHODS[name](rtol=rtol, max_steps=300, relative_to=relative_to)
        right_or_told(solver.solve(op, b), solver.sizes(b), op, b, rtol)


@pytest.mark.parametrize("name", METHODS)
def test_rows_without_a_right_hand_side_that_others_lead_to_are_told(name):
    """The rows that wait have the residual 0 at 0, until the row that they wait for has moved."""
    b = torch.zeros(ROWS, 1)
    b[-1] = 1.0
    found = METHODS[name](rtol=1e-8, max_steps=300).solve(path(), b)
    if found.stats.status == Status.converged:
        assert name == "neumann"  # it moves all rows on
        close(found.value, solution(path(), b), rtol=1e-7)
    if name in ("gmres", "dense", "bicgstab", "minres", "normal cg"):
        assert Status.coupled_rows in found.stats.row_status.tolist()


@pytest.mark.parametrize("name", ["cg", "minres", "bicgstab", "gmres", "normal cg", "dense"])
def test_a_fixed_number_of_steps_reports_the_residual_of_such_rows(name):
    b = torch.zeros(ROWS, 1)
    b[-1] = 1.0
    found = METHODS[name](rtol=0, atol=0, max_steps=3).solve(path(), b)
    left = torch.linalg.vector_norm(found.value - PATH @ found.value - b, dim=1)
    told = found.stats.row_status > Status.fixed_steps
    assert bool(told[left > 1e-6 + 2 * found.stats.residual].all()) and bool(told.any())


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
@pytest.mark.parametrize("name", METHODS)
def test_a_start_at_the_solution_of_single_rows_is_not_taken_for_one(name, scale):
    """Some rows are solved at the start, and no more when the others have moved."""
    op, b = graph(1, 0.3), scale * right_hand_side("alike")
    start = solution(op, b)
    start[-1] = 0  # the others lose what they have from this one
    found = METHODS[name](rtol=1e-8, max_steps=300).solve(op, b, start)
    if not found.stats.status.failed:
        close(found.value / scale, solution(op, b) / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_independent_are_never_told_to_be_coupled(name):
    W = torch.stack([symmetric(DIM, seed) * radius for seed, radius in enumerate(torch.linspace(0.05, 0.9, ROWS))])
    op = FunctionOperator(lambda v: (W @ v[:, :, None])[:, :, 0], symmetric=True)
    for kind in ("alike", "sizes", "zeros"):
        b = right_hand_side(kind)
        for start in (None, solution(op, b) * torch.linspace(0, 1, ROWS)[:, None]):
            found = METHODS[name](rtol=1e-9, max_steps=500).solve(op, b, start)
            assert found.stats.row_status.tolist() == [Status.converged] * ROWS
            close(found.value, solution(op, b), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cg", "minres", "bicgstab", "gmres", "normal cg", "dense"])
def test_independent_rows_of_any_sizes_are_solved_together(name, dtype):
    W = torch.stack([symmetric(DIM, seed) * radius for seed, radius in enumerate(torch.linspace(0.05, 0.9, ROWS))]).to(dtype)
    op = FunctionOperator(lambda v: (W @ v[:, :, None])[:, :, 0], symmetric=True)
    sizes = torch.logspace(-15 if dtype == torch.float32 else -140, 5, ROWS)[:, None].to(dtype)
    b = right_hand_side("alike").to(dtype)
    found = METHODS[name](rtol=1e-4, max_steps=500, relative_to="row").solve(op, sizes * b)
    assert found.stats.row_status.tolist() == [Status.converged] * ROWS
    close((found.value / sizes).double(), torch.linalg.solve(torch.eye(DIM) - W.double(), b.double()), rtol=1e-2, atol=1e-2)


class CoupledRows(LinearOperator):
    """An operator that says that its rows can be solved apart; whether they can depends on the matrix."""

    def __init__(self, matrix: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        self.matrix, self.rows = matrix, rows

    def _matvec(self, v: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix if self.rows is None else self.matrix[self.rows][:, self.rows]
        return matrix @ v

    @property
    def divisible(self) -> bool:
        return True

    def select(self, index: torch.Tensor) -> LinearOperator:
        found = CoupledRows(self.matrix, index if self.rows is None else self.rows[index])
        found.whole = self
        return found


@pytest.mark.parametrize("name", ["neumann", "linear anderson"])
def test_rows_that_were_dropped_are_measured_once_at_the_end(name):
    b = torch.zeros(ROWS, 1)
    b[-2:] = 1.0
    found = METHODS[name](rtol=1e-8, max_steps=300).solve(CoupledRows(PATH), b)
    assert found.stats.status.failed and Status.coupled_rows in found.stats.row_status.tolist()
    apart = CoupledRows(torch.diag(torch.linspace(0.0, 0.9, ROWS)))
    found = METHODS[name](rtol=1e-8, max_steps=300).solve(apart, torch.ones(ROWS, 1))
    assert found.stats.row_status.tolist() == [Status.converged] * ROWS and found.stats.vjps == apart.matvecs
    close(found.value, 1 / (1 - torch.linspace(0.0, 0.9, ROWS))[:, None], rtol=1e-6)


@pytest.mark.parametrize("first", ["cg", "normal cg", "gmres", "linear anderson"])
def test_a_chain_measures_a_value_that_is_put_together(first):
    """The second solver is given 0 for the rows that the first has solved, which is right only if rows are independent."""
    for strength, kind in ((0.02, "alike"), (0.3, "alike"), (0.3, "sizes"), (0.3, "zeros")):
        op, b = graph(2, strength), right_hand_side(kind)
        chain = (METHODS[first](rtol=1e-8, max_steps=6), GMRES(1e-8, max_steps=300), NormalCG(1e-8, max_steps=300))
        right_or_told(solve_chain(chain, op, b, None, "test"), GMRES().sizes(b), op, b, 1e-8)


def test_a_chain_that_puts_rows_together_tells_of_coupled_ones():
    """Negative curvature ends the first row of CG; what GMRES finds for it moves the second, which CG had solved."""
    m = torch.tensor([[2.0, 0.0], [1.0, 0.5]])  # rows: the second sees the first
    b = torch.ones(2, 1)
    op = FunctionOperator(lambda v, m=m: m @ v)
    found = solve_chain((CG(1e-8), GMRES(1e-8)), op, b, None, "test")
    assert found.stats.status.failed or torch.allclose(found.value, solution(op, b))
    m = torch.diag(torch.tensor([2.0, 0.5]))
    op = FunctionOperator(lambda v: m @ v, symmetric=True)
    found = solve_chain((CG(1e-8), GMRES(1e-8)), op, b, None, "test")
    assert found.stats.row_status.tolist() == [Status.converged] * 2 and found.stats.vjps == op.matvecs
    close(found.value, torch.tensor([[-1.0], [2.0]]))


@pytest.mark.parametrize("form", ["graph", "attention"])
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_of_coupled_rows_is_right_or_refused(name, form):
    g = torch.Generator().manual_seed(5)
    u = torch.randn(ROWS, DIM, generator=g).requires_grad_()
    W, P, c = 0.6 * symmetric(DIM, 1), symmetric(ROWS, 2), torch.randn(ROWS, DIM, generator=g)
    c *= torch.logspace(-3, 0, ROWS)[:, None]

    def phi(w: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(w @ w.T, dim=1) @ w if form == "attention" else P @ w
        return torch.tanh(torch.linspace(0.1, 1, ROWS)[:, None] * (w @ W) + 0.3 * mixed + u)

    def gradient(rows: str, linear: Any) -> torch.Tensor:
        sol = fixed_point(
            phi, torch.zeros(ROWS, DIM), rows=rows, solver=Picard(1e-12, max_steps=3000), adjoint=Implicit(linear, policy="raise")
        )
        return torch.autograd.grad((c * sol.value).sum(), u)[0]

    want = gradient("joint", Dense(1e-12))
    try:
        got = gradient("auto", METHODS[name](rtol=1e-6, max_steps=300))
    except SolveError:
        return
    assert float((got - want).norm() / want.norm()) < 1e-4


def test_a_measurement_costs_no_product_where_rows_are_settled_together_or_held():
    """The product that ends a cycle measures all rows, the settled ones among them."""
    for rows in (1, ROWS):
        calls = []
        W = 0.8 * symmetric(DIM, 0)

        def matvec(v, calls=calls, W=W):
            calls.append(v)
            return v @ W

        b = right_hand_side("alike")[:rows]
        for solver in (GMRES(1e-8), CG(1e-8), MINRES(1e-8), Dense(1e-8), LinearAnderson(1e-8), Neumann(1e-8, max_steps=300)):
            calls.clear()
            found = solver.solve(matvec, b)
            assert found.stats.status == Status.converged and found.stats.vjps == len(calls)
            if isinstance(solver, GMRES | CG | MINRES):
                assert len(calls) <= DIM + 1
            if isinstance(solver, Dense):
                assert len(calls) == DIM + 1


@pytest.mark.parametrize("solver", [Picard(1e-8, max_steps=500), Anderson(1e-8)])
def test_the_forward_solve_of_coupled_rows_is_still_told(solver):
    b = torch.zeros(ROWS, 1)
    b[-1] = 1.0
    sol = fixed_point(lambda w: PATH @ w + b, torch.zeros(ROWS, 1), rows="batch", solver=solver, policy="ignore")
    want = torch.linalg.solve(torch.eye(ROWS) - PATH, b)
    assert sol.status == Status.coupled_rows or torch.allclose(sol.value, want, rtol=1e-6)
