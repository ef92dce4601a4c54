"""Every linear solver of the adjoint system on its own: closed forms, honest counts and residuals, and honest failures."""

import math

import pytest
import torch
from core_reference import close

from hyperopt import CG, GMRES, MINRES, BiCGStab, Dense, LinearAnderson, Neumann, NormalCG, Nystrom, Status
from hyperopt.core.linear.fallback import solve_chain
from hyperopt.core.operator import LinearOperator

pytestmark = pytest.mark.usefixtures("float64")

KRYLOV = {"gmres": GMRES, "bicgstab": BiCGStab, "cg": CG, "minres": MINRES, "normal_cg": NormalCG}
CYCLIC = {**KRYLOV, "dense": Dense}


class Operator(LinearOperator):
    """``v -> v M^T`` on rows, or one matrix a row."""

    def __init__(self, m, transpose=True):
        self.m, self.transposable = m, transpose

    def __call__(self, v):
        return (self.m @ v[:, :, None])[:, :, 0]

    _matvec = __call__

    def _rmatvec(self, v):
        return (self.m.mT @ v[:, :, None])[:, :, 0]

    def solution(self, b):
        n = b.shape[1]
        return torch.linalg.solve((torch.eye(n, dtype=b.dtype) - self.m).expand(len(b), n, n), b[:, :, None])[:, :, 0]


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n))[0]


def symmetric(n, low=-0.5, high=0.9):
    q = orthogonal(n)
    return q @ torch.diag(torch.linspace(low, high, n)) @ q.T


def true_residual(op, x, b):
    residual = torch.linalg.vector_norm(b - x + op(x), dim=1)
    return torch.where(residual == 0, 0.0, residual / torch.linalg.vector_norm(b, dim=1))


@pytest.mark.parametrize("radius", [0.1, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("name", CYCLIC)
def test_symmetric_maps(name, radius):
    op, b = Operator(symmetric(8, -radius, radius)), torch.randn(3, 8)
    found = CYCLIC[name](rtol=1e-14).solve(op, b)
    assert found.stats.status == Status.converged
    # The residual's floor is 16 eps |x|; the inverse magnifies it by 1 / (1 - radius).
    close(found.value, op.solution(b), rtol=1e-10, atol=1e-10 * float(found.value.norm()))


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
@pytest.mark.parametrize("name", CYCLIC)
def test_relative_agreement_up_to_a_condition_of_1e4(name, condition):
    n = 10
    left, right = orthogonal(n), orthogonal(n)
    values = torch.logspace(0, -math.log10(condition), n)
    a = right @ torch.diag(values) @ right.T if name in ("cg", "minres") else left @ torch.diag(values) @ right.T
    op, b = Operator(torch.eye(n) - a), torch.randn(4, n)
    found = CYCLIC[name](rtol=1e-14, max_steps=3000).solve(op, b)
    assert found.stats.status == Status.converged
    error = torch.linalg.vector_norm(found.value - op.solution(b)) / torch.linalg.vector_norm(op.solution(b))
    assert float(error) < 1e-9


def test_finite_termination():
    n = 12
    b = torch.randn(3, n)
    for solver, matrix in ((GMRES(1e-12), 0.9 * orthogonal(n)), (CG(1e-12), symmetric(n)), (GMRES(1e-12), symmetric(n, -3, 0.5))):
        op = Operator(matrix)
        found = solver.solve(op, b)
        assert found.stats.status == Status.converged and bool((found.stats.iterations <= n).all())
        assert op.matvecs <= n + 1
    # Two distinct eigenvalues: two steps, whatever the size.
    two = Operator(torch.diag(torch.tensor([0.5] * 6 + [-0.7] * 6)))
    for solver in (GMRES(1e-12), CG(1e-12), MINRES(1e-12), BiCGStab(1e-12), NormalCG(1e-12)):
        assert bool((solver.solve(two, b).stats.iterations == 2).all())


@pytest.mark.parametrize("name", CYCLIC)
def test_counts_are_the_products_made_and_the_residual_is_the_true_one(name):
    op, b = Operator(symmetric(9)), torch.randn(4, 9)
    for rtol in (1e-2, 1e-6, 1e-12):
        op.matvecs = op.rmatvecs = 0
        found = CYCLIC[name](rtol=rtol).solve(op, b, trace=True)
        assert (found.stats.vjps, found.stats.jvps) == (op.matvecs, op.rmatvecs)
        close(found.stats.residual, true_residual(op, found.value, b), rtol=1e-6, atol=1e-15)
        assert bool((found.stats.residual <= rtol).all())
        if name != "dense":
            assert len(found.stats.trace) == int(found.stats.iterations.max())


PRODUCTS = {"gmres": (1, 0), "bicgstab": (2, 0), "cg": (1, 0), "minres": (1, 0), "normal_cg": (1, 1)}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", KRYLOV)
def test_a_fixed_number_of_steps(name, steps):
    op, b = Operator(symmetric(9)), torch.randn(4, 9)
    found = KRYLOV[name](0, 0, steps).solve(op, b)
    assert found.stats.status == Status.fixed_steps and bool((found.stats.iterations == steps).all())
    vjps, jvps = PRODUCTS[name]
    assert (found.stats.vjps, found.stats.jvps) == (vjps * steps + 1, jvps * steps)
    # The same as a run to a tolerance that is stopped there, where the last value is the best.
    if name in ("gmres", "minres", "normal_cg"):
        close(found.value, KRYLOV[name](1e-15, max_steps=steps).solve(op, b).value)


def test_gmres_takes_the_least_residual_of_the_krylov_space():
    op, b = Operator(0.9 * orthogonal(7)), torch.randn(2, 7)
    a = torch.eye(7) - op.m
    for steps in (1, 3, 5):
        found = GMRES(0, 0, steps).solve(op, b)
        for i in range(2):
            space = torch.stack([torch.linalg.matrix_power(a, k) @ b[i] for k in range(steps)], dim=1)
            best = torch.linalg.lstsq(a @ space, b[i][:, None]).solution
            close(found.value[i], (space @ best)[:, 0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_minres_takes_the_least_residual_of_the_krylov_space_of_an_indefinite_map(steps):
    m = torch.stack([symmetric(7, -1.5, 3.1) for _ in range(3)])
    op, b = Operator(m), torch.randn(3, 7)
    a = torch.eye(7) - m
    found = MINRES(0, 0, steps).solve(op, b)
    for i in range(3):
        space = torch.stack([torch.linalg.matrix_power(a[i], k) @ b[i] for k in range(steps)], dim=1)
        best = torch.linalg.lstsq(a[i] @ space, b[i][:, None]).solution
        close(found.value[i], (space @ best)[:, 0], rtol=1e-8, atol=1e-10)


def test_minres_solves_where_conjugate_gradients_meet_negative_curvature():
    op, b = Operator(torch.stack([symmetric(30, -2, high) for high in (1.7, 3.1, 50.0)])), torch.randn(3, 30)
    assert CG(1e-10).solve(op, b).stats.status == Status.negative_curvature
    found = MINRES(1e-10, max_steps=200).solve(op, b)
    assert found.stats.status == Status.converged
    close(found.value, op.solution(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CYCLIC)
def test_a_warm_start(name):
    op, b = Operator(symmetric(9)), torch.randn(3, 9)
    exact = op.solution(b)
    solver = CYCLIC[name](rtol=1e-9)
    op.matvecs = 0
    done = solver.solve(op, b, exact)
    assert op.matvecs == 1 and torch.equal(done.value, exact) and int(done.stats.iterations.max()) == 0
    close(solver.solve(op, b, exact + 1e-3 * torch.randn(3, 9)).value, exact, rtol=1e-7, atol=1e-7)
    cold = solver.solve(op, b)
    useless = torch.stack([exact[0], torch.full((9,), math.nan), torch.full((9,), 1e30)])
    found = solver.solve(op, b, useless)  # the second and third row start at 0
    assert int(found.stats.iterations[0]) == 0
    assert torch.equal(found.value[1:], cold.value[1:])


@pytest.mark.parametrize("name", CYCLIC)
def test_rows_are_on_their_own(name):
    matrices = torch.stack([symmetric(6, -0.5, high) for high in (0.1, 0.9, 0.99, 0.5)])
    b = torch.randn(4, 6)
    b[3] = 0
    solver = CYCLIC[name](rtol=1e-10)
    together = solver.solve(Operator(matrices), b)
    assert torch.equal(together.value[3], torch.zeros(6)) and int(together.stats.iterations[3]) == 0
    for i in range(4):
        alone = solver.solve(Operator(matrices[i : i + 1]), b[i : i + 1])
        close(together.value[i], alone.value[0], rtol=1e-8, atol=1e-9)  # a row moves on until it is looked at
        assert int(together.stats.iterations[i]) == int(alone.stats.iterations[0])


@pytest.mark.parametrize("where", ["b", "matrix"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CYCLIC)
def test_a_bad_row_leaves_the_others_as_they_are(name, bad, where):
    matrices, b = torch.stack([symmetric(5) for _ in range(3)]), torch.randn(3, 5)
    solver = CYCLIC[name](rtol=1e-10)
    want = solver.solve(Operator(matrices), b)
    spoilt, other = matrices.clone(), b.clone()
    (spoilt if where == "matrix" else other)[1, 2] = bad
    for start in (None, torch.randn(3, 5)):
        found = solver.solve(Operator(spoilt), other, start)
        assert found.stats.row_status.tolist() == [Status.converged, Status.nonfinite, Status.converged]
        close(found.value[[0, 2]], want.value[[0, 2]], rtol=1e-8, atol=1e-10)
        assert math.isnan(float(found.stats.residual[1]))


@pytest.mark.parametrize("name", [*CYCLIC, "neumann", "anderson"])
def test_relative_to_the_batch_bounds_the_residual_of_all_rows_and_spares_the_small_ones(name):
    kind = {**CYCLIC, "neumann": Neumann, "anderson": LinearAnderson}[name]
    scales = torch.tensor([1.0, 1.0, 1e-3, 1e-9])
    op, b = Operator(symmetric(8, -0.5, 0.9)), torch.randn(4, 8) * scales[:, None]
    rtol = 1e-4
    by_row, by_batch = (kind(rtol=rtol, relative_to=to).solve(op, b) for to in ("row", "batch"))
    norm, mean = torch.linalg.vector_norm(b, dim=1), b.square().sum(1).mean().sqrt()
    residual = torch.linalg.vector_norm(b - by_batch.value + op(by_batch.value), dim=1)
    assert by_batch.stats.status == by_row.stats.status == Status.converged
    close(by_batch.stats.scale, torch.maximum(norm, mean))
    assert float(residual.norm()) <= math.sqrt(2) * rtol * float(b.norm())
    assert float(residual[:2].max()) <= rtol * float(torch.maximum(norm, mean).max())
    close(residual, by_batch.stats.residual * by_batch.stats.scale, atol=1e-14)
    if name != "dense":
        assert by_batch.stats.iterations[3] < by_row.stats.iterations[3]
        large = norm > mean  # their tolerance is the same, and 1 / |A| is at most 10
        close(by_batch.value[large], by_row.value[large], rtol=0, atol=20 * rtol * float(norm.max()))


def test_a_batch_of_zeros_and_a_fixed_number_of_steps_have_no_batch_scale():
    op = Operator(symmetric(4))
    assert torch.equal(GMRES(relative_to="batch").solve(op, torch.zeros(2, 4)).value, torch.zeros(2, 4))
    b = torch.randn(3, 4) * torch.tensor([[1.0], [1e-6], [1e-12]])
    fixed = [Neumann(0, 0, 7, relative_to=to).solve(op, b) for to in ("row", "batch")]
    assert torch.equal(fixed[0].value, fixed[1].value) and torch.equal(fixed[0].stats.residual, fixed[1].stats.residual)
    with pytest.raises(ValueError, match="relative_to='rows' is not one of row, batch"):
        GMRES(relative_to="rows")


@pytest.mark.parametrize("name", CYCLIC)
def test_autocast_lowers_the_products_and_not_the_method(name):
    m, b = symmetric(9).float(), torch.randn(3, 9).float()
    seen = []

    class Rounded(Operator):
        def __call__(self, v):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(v.double()).to(v.dtype)  # of which autocast lowers nothing

        _matvec = __call__

        def _rmatvec(self, v):
            return super()._rmatvec(v.double()).to(v.dtype)

    with torch.autocast("cpu", torch.bfloat16):
        found = CYCLIC[name](rtol=1e-5).solve(Rounded(m.double()), b)
    assert all(seen) and found.stats.status == Status.converged
    want = CYCLIC[name](rtol=1e-5).solve(Operator(m), b)
    assert int(found.stats.iterations.max()) <= int(want.stats.iterations.max()) + 1


@pytest.mark.parametrize("name", CYCLIC)
def test_no_rows(name):
    found = CYCLIC[name]().solve(Operator(symmetric(3)), torch.zeros(0, 3))
    assert found.value.shape == (0, 3) and found.stats.status == Status.converged


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e20])
@pytest.mark.parametrize("name", CYCLIC)
def test_scale_of_the_right_hand_side(name, factor):
    op, b = Operator(symmetric(7)), torch.randn(3, 7)
    one, other = (CYCLIC[name](rtol=1e-8).solve(op, x) for x in (b, factor * b))
    assert torch.equal(one.stats.iterations, other.stats.iterations)
    close(other.value / factor, one.value, rtol=1e-9)


@pytest.mark.parametrize("name", CYCLIC)
def test_float32_stops_at_its_floor(name):
    op, b = Operator(symmetric(7).float()), torch.randn(3, 7).float()
    found = CYCLIC[name](rtol=1e-12).solve(op, b)
    assert found.value.dtype == torch.float32
    assert found.stats.status == Status.converged and int(found.stats.iterations.max()) <= 12
    torch.testing.assert_close(found.value.double(), Operator(op.m.double()).solution(b.double()), rtol=1e-4, atol=1e-5)


def skew():
    """``I - M`` is skew: no direction has any curvature."""
    return torch.eye(2) - torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


def cyclic(n):
    """``I - M`` moves every entry by one place: GMRES gains nothing before its last step."""
    return torch.eye(n) - torch.roll(torch.eye(n), 1, 0)


def diagonal(*values):
    return torch.diag(torch.tensor(values))


ONES, FIRST = (lambda n: torch.ones(1, n)), (lambda n: torch.eye(n)[:1])
FAILURES = {
    **{f"{name}, I - M = 0": (CYCLIC[name](), lambda: torch.eye(3), ONES, Status.breakdown) for name in CYCLIC},
    "gmres, singular": (GMRES(), lambda: diagonal(1.0, 0.5, 0.2), ONES, Status.breakdown),
    "minres, singular": (MINRES(), lambda: diagonal(1.0, 0.5, 0.2), ONES, Status.breakdown),
    "minres, asymmetric": (MINRES(), lambda: 0.5 * torch.eye(6) + 0.2 * cyclic(6), FIRST, Status.max_steps),
    "normal_cg, singular": (NormalCG(), lambda: diagonal(1.0, 0.5, 0.2), ONES, Status.breakdown),
    "dense, singular": (Dense(), lambda: diagonal(1.0, 0.5, 0.2), ONES, Status.breakdown),
    "cg, negative curvature": (CG(), lambda: diagonal(3.0, 0.5, 0.2), ONES, Status.negative_curvature),
    "cg, asymmetric": (CG(), lambda: 0.5 * torch.eye(3) + 0.2 * cyclic(3), FIRST, Status.breakdown),
    "cg, skew": (CG(), skew, ONES, Status.breakdown),
    "bicgstab, skew": (BiCGStab(), skew, ONES, Status.breakdown),
    "gmres, too short a window": (GMRES(window=3), lambda: cyclic(6), FIRST, Status.stagnated),
    "gmres, too few steps": (GMRES(max_steps=3, window=2), lambda: diagonal(0.9, 0.5, 0.1, -0.5), ONES, Status.max_steps),
    "bicgstab, too few steps": (BiCGStab(max_steps=2), lambda: diagonal(0.9, 0.5, 0.1, -0.5), ONES, Status.max_steps),
    "cg, too few steps": (CG(max_steps=3), lambda: diagonal(0.99, 0.5, 0.1, -0.5), ONES, Status.max_steps),
    "normal_cg, too few steps": (NormalCG(max_steps=3), lambda: diagonal(0.99, 0.5, 0.1, -0.5), ONES, Status.max_steps),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_its_status_and_never_a_worse_value_than_zero(name):
    solver, make, side, status = FAILURES[name]
    matrix = make()
    op, b = Operator(matrix), side(matrix.shape[0])
    found = solver.solve(op, b)
    assert found.stats.status == status and status.failed
    assert bool(torch.isfinite(found.value).all())
    residual = true_residual(op, found.value, b)
    close(found.stats.residual, residual)
    assert solver.rtol < float(residual) <= 1


@pytest.mark.parametrize("name", CYCLIC)
def test_a_nearly_singular_system_is_never_called_solved_when_it_is_not(name):
    op, b = Operator(symmetric(5, -1, 1)), torch.randn(6, 5)  # singular to rounding, in exact arithmetic by chance at most
    found = CYCLIC[name](rtol=1e-10).solve(op, b)
    residual = true_residual(op, found.value, b)
    assert bool((residual > 1e-6).all()) and bool((found.stats.row_status > Status.fixed_steps).all())


@pytest.mark.parametrize("name", [*CYCLIC, "neumann", "anderson", "nystrom"])
def test_a_singular_system_without_a_solution_is_never_called_solved(name):
    q = orthogonal(6)
    a = q @ torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])) @ q.T
    op, b = Operator(torch.eye(6) - a), torch.randn(4, 6)
    b[3] = 3 * q[:, 5] + 1e-3 * q[:, 0]  # nearly all of it outside of the range
    kind = {**CYCLIC, "neumann": Neumann, "anderson": LinearAnderson, "nystrom": Nystrom}[name]
    for settings in ({"rtol": 1e-6}, {"rtol": 1e-6, "max_steps": 1000}):
        found = kind(**settings).solve(op, b)
        assert bool(torch.isfinite(found.value).all()) and bool((found.stats.row_status > Status.fixed_steps).all())
        rounding = 1e-15 * float((found.value.norm(dim=1) / b.norm(dim=1)).max())
        close(found.stats.residual, true_residual(op, found.value, b), rtol=1e-6, atol=rounding)
        least = (b @ q[:, 5]).abs() / b.norm(dim=1)  # of all vectors
        assert bool((found.stats.residual >= (1 - 1e-9) * least - rounding).all())


def test_conjugate_gradients_return_the_iterate_before_negative_curvature():
    """With a positive direction first: the step along it is kept, the next is not taken; the other rows are solved."""
    q = orthogonal(5)
    a = torch.stack([q @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.7, low])) @ q.T for low in (-0.5, 0.3)])
    op = Operator(torch.eye(5) - a)
    b = (q @ torch.tensor([1.0, 1.0, 1.0, 1.0, 0.3])).expand(2, 5)
    found = CG(1e-12).solve(op, b)
    assert found.stats.row_status.tolist() == [Status.negative_curvature, Status.converged]
    r = p = b[0]
    x = torch.zeros(5)
    while float(p @ a[0] @ p) > 0:
        alpha = (r @ r) / (p @ a[0] @ p)
        x, after = x + alpha * p, r - alpha * a[0] @ p
        r, p = after, after + (after @ after) / (r @ r) * p
    assert 0 < float(r.norm()) < float(b[0].norm())
    close(found.value[0], x, rtol=1e-8)
    close(found.value[1], torch.linalg.solve(a[1], b[1]), rtol=1e-8)
    assert Status.indefinite is Status.negative_curvature and "MINRES" in Status.negative_curvature.message


def test_bicgstab_starts_anew_after_a_breakdown():
    m = torch.eye(3) - torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.3], [0.0, 0.5, 1.0]])
    b = torch.tensor([[1.0, 1e-9, 0.0]])
    found = BiCGStab(1e-10).solve(Operator(m), b)
    assert found.stats.status == Status.converged
    close(found.value, Operator(m).solution(b), rtol=1e-8, atol=1e-8)


def test_dense_refuses_what_is_too_large():
    with pytest.raises(ValueError, match=r"Dense: 5 rows of 20 unknowns .* 2000 numbers.*max_entries=1999; use GMRES"):
        Dense(max_entries=1999).solve(Operator(symmetric(20)), torch.ones(5, 20))
    assert Dense(max_entries=2000).solve(Operator(symmetric(20)), torch.ones(5, 20)).stats.status == Status.converged


def test_normal_cg_names_the_transpose_that_it_misses():
    with pytest.raises(TypeError, match="NormalCG needs products with the transpose"):
        NormalCG().solve(Operator(symmetric(3), transpose=False), torch.ones(1, 3))


def test_nystrom():
    """Its formula, exact with all columns, and honest where it is far off; the rows are apart."""
    a = torch.stack([orthogonal(6) for _ in range(3)])
    a = a @ torch.diag(torch.tensor([5.0, 3.0, 0.1, 0.1, 0.05, 0.05])) @ a.mT
    op, b = Operator(torch.eye(6) - a), torch.randn(3, 6)
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(4))[:3]
    sketch = a[:, :, drawn] @ torch.linalg.inv(a[:, drawn][:, :, drawn]) @ a[:, drawn]
    found = Nystrom(rank=3, rho=0.1, seed=4).solve(op, b)
    assert found.stats.vjps == op.matvecs == 3 + 1
    close(found.value, torch.linalg.solve(sketch + 0.1 * torch.eye(6), b[:, :, None])[:, :, 0], rtol=1e-7)
    close(found.stats.residual, true_residual(op, found.value, b))
    assert torch.equal(found.stats.row_status == Status.diverged, found.stats.residual > 1)
    whole = Nystrom(rank=50, rho=1e-4, rtol=1e-12, max_steps=30).solve(op, b)
    assert whole.stats.status == Status.converged and int(whole.stats.iterations.max()) <= 6
    close(whole.value, op.solution(b), rtol=1e-8)
    assert Nystrom(rank=1, rho=1e-6).solve(op, b).stats.status == Status.diverged  # the other large eigenvalue is left out


@pytest.mark.parametrize("solver", [Neumann(0, 0, 20), LinearAnderson(0, 0, 1)])
def test_a_fixed_number_of_terms_that_grow_is_never_silent(solver):
    found = solver.solve(Operator(torch.diag(torch.tensor([1.1, -0.2]))), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.stats.row_status.tolist() == [Status.diverged, Status.fixed_steps]


def test_a_fallback_takes_over_the_failed_rows_alone_and_makes_none_worse(caplog):
    matrices = torch.stack([0.1 * orthogonal(4), 0.99 * orthogonal(4), 3 * orthogonal(4), 0.2 * orthogonal(4)])
    b = torch.randn(4, 4)
    op = Operator(matrices)
    chain = (Neumann(1e-10, max_steps=30), GMRES(1e-10))
    first = chain[0].solve(op, b)
    assert first.stats.row_status.tolist() == [Status.converged, Status.max_steps, Status.diverged, Status.converged]
    op.matvecs = 0
    found = solve_chain(chain, op, b, None, "adjoint")
    assert found.stats.status == Status.converged and (found.stats.method, found.stats.fallbacks) == ("GMRES", ("Neumann",))
    assert torch.equal(found.value[[0, 3]], first.value[[0, 3]]) and found.stats.vjps == op.matvecs
    assert torch.equal(found.stats.iterations[[0, 3]], first.stats.iterations[[0, 3]])
    close(found.value, op.solution(b), rtol=1e-8)
    close(found.stats.scale, torch.linalg.vector_norm(b, dim=1))
    assert [record.message for record in caplog.records] and "falling back to GMRES" in caplog.records[0].message
    # A fallback that does worse changes nothing but the cost.
    worse = solve_chain((GMRES(1e-10, max_steps=3), CG(1e-10, max_steps=1)), op, b, None, "adjoint")
    alone = GMRES(1e-10, max_steps=3).solve(op, b)
    assert bool((worse.stats.residual <= alone.stats.residual).all())


def test_a_fallback_reaches_normal_cg():
    n = 8
    op, b = Operator(cyclic(n)), torch.eye(n)[:1]
    found = solve_chain((Neumann(1e-10), GMRES(1e-10, window=3), NormalCG(1e-10)), op, b, None, "adjoint")
    assert (found.stats.method, found.stats.fallbacks) == ("NormalCG", ("Neumann", "GMRES"))
    close(found.value, op.solution(b))
