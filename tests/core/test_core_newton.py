"""Newton, chord, Newton-Krylov and Broyden beyond the grids: orders of convergence, costs, closed forms, breakdowns, refusals."""

import dataclasses
import math

import pytest
import torch
from core_reference import Counted, close

from hyperopt import (
    RRE,
    Anderson,
    Broyden,
    Chord,
    Implicit,
    LinearAnderson,
    Neumann,
    Newton,
    NewtonKrylov,
    Picard,
    Shine,
    Status,
    Unrolled,
    fixed_point,
)
from hyperopt.core.adjoints.base import Problem
from hyperopt.core.forward import default_fallback
from hyperopt.core.operator import ClosedForm
from hyperopt.core.solvers.iterate import iterate
from hyperopt.core.solvers.point import ClosedMap, Cost, Point
from hyperopt.core.tree import layout_of
from hyperopt.nn.equilibrium import TanhAffine, TanhAffinePullback

pytestmark = pytest.mark.usefixtures("float64")

EXACT = Implicit(LinearAnderson(1e-13, max_steps=500, window=20))


def tanh_map(n=6, rows=3, q=0.95):
    m = q * torch.linalg.qr(torch.randn(n, n))[0]
    b = torch.randn(rows, n)
    return m, b


class Products(torch.autograd.Function):
    """``tanh(w m + b)`` whose vjps, and whose vjps of vjps, are counted where they happen."""

    @staticmethod
    def forward(ctx, w, m, b, seen):
        seen["evaluations"] += 1
        out = torch.tanh(w @ m + b)
        ctx.save_for_backward(out, m)
        ctx.seen = seen
        return out

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, m = ctx.saved_tensors
        return Pulled.apply(g, 1 - out.detach() ** 2, m, ctx.seen), None, None, None


class Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, slope, m, seen):
        seen["vjps"] += 1
        ctx.save_for_backward(slope, m)
        ctx.seen = seen
        return (v * slope) @ m.T

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, m = ctx.saved_tensors
        ctx.seen["jvps"] += 1
        return (g @ m) * slope, None, None, None


COUNTED = [
    Newton(1e-10),
    Newton(1e-10, line_search=True),
    Newton(0, 0, 3),
    Chord(1e-10),
    Chord(1e-10, refresh=0.01),
    Chord(0, 0, 5),
    NewtonKrylov(1e-10),
    NewtonKrylov(1e-10, line_search=False),
    NewtonKrylov(0, 0, 2),
    Broyden(1e-10),
    Broyden(1e-10, line_search=True),
    Broyden(0, 0, 7),
    RRE(1e-10),
    RRE(0, 0, 7),
]


@pytest.mark.parametrize("solver", COUNTED, ids=repr)
@pytest.mark.parametrize("closing", [False, True])
def test_evaluations_vjps_and_jvps_are_those_made(solver, closing):
    m, b = tanh_map()
    seen = {"evaluations": 0, "vjps": 0, "jvps": 0}

    def phi(w):
        return Products.apply(w, m, b, seen)

    with torch.no_grad():
        stats = iterate(solver, phi, torch.zeros(3, 6), last=phi if closing else None).stats
    assert seen == {name: getattr(stats, name) for name in seen}
    assert not stats.status.failed
    if type(solver) in (Newton, Chord):
        assert seen["vjps"] > 0 and seen["vjps"] % 6 == 0


def test_fixed_steps_are_steps_and_a_method_that_linearises_evaluates_its_value():
    m, b = tanh_map()
    phi = lambda w: torch.tanh(w @ m + b)  # noqa: E731
    for solver in (Newton(0, 0, 3), NewtonKrylov(0, 0, 3, line_search=False)):
        sol = fixed_point(phi, torch.zeros(3, 6), solver=solver)
        assert sol.forward.evaluations == 4 and sol.status == Status.fixed_steps and int(sol.forward.iterations.max()) == 3
        size = torch.linalg.vector_norm(phi(sol.value), dim=1)
        close(sol.forward.residual, torch.linalg.vector_norm(phi(sol.value) - sol.value, dim=1) / size)


def test_13_the_jacobian_of_the_adjoint_is_that_of_the_value_returned():
    """One Newton step from far away: a Jacobian from before it gives another hypergradient altogether."""
    m, b = (x.requires_grad_() for x in tanh_map())
    start = 2 * torch.ones(3, 6)
    w = fixed_point(lambda w: torch.tanh(w @ m + b), start, solver=Newton(0, 0, 1), adjoint=EXACT).value
    got = torch.autograd.grad(w.sum(), b)[0]
    at = w.detach().requires_grad_()
    out = torch.tanh(at @ m + b)
    slope = 1 - out.detach() ** 2
    v = torch.stack([torch.linalg.solve(torch.eye(6) - m.detach() * s, torch.ones(6)) for s in slope])
    close(got, v * slope, rtol=1e-9)


@pytest.mark.parametrize("make", [lambda n: 0.9 * torch.linalg.qr(torch.randn(n, n))[0], lambda n: 5 * torch.randn(n, n)])
@pytest.mark.parametrize("solver", [Newton(1e-10), Chord(1e-10), NewtonKrylov(1e-10)])
def test_a_linear_map_takes_one_step(make, solver):
    m, b = make(6), torch.randn(3, 6)
    sol = fixed_point(lambda w: w @ m + b, torch.randn(3, 6), solver=solver, policy="raise")
    close(sol.value, torch.linalg.solve(torch.eye(6) - m.T, b.T).T, rtol=1e-8, atol=1e-9)
    if not isinstance(solver, NewtonKrylov):
        assert int(sol.forward.iterations.max()) == 2  # the second evaluation finds that the first step was enough


@pytest.mark.parametrize("solver", [Newton(1e-10), Chord(1e-10), NewtonKrylov(1e-10), Broyden(1e-10), RRE(1e-10)])
@pytest.mark.parametrize("factor", [3.0, -2.0, 1.5])
def test_12_maps_that_do_not_contract(solver, factor):
    sol = fixed_point(lambda z: factor * z + 1, torch.ones(2, 1), solver=solver, policy="raise")
    close(sol.value, torch.full((2, 1), 1 / (1 - factor)))
    angle = torch.tensor(1.0)
    turn = factor * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    sol = fixed_point(lambda z: z @ turn + 1, torch.ones(2, 2), solver=solver, policy="raise")
    close(sol.value, torch.linalg.solve(torch.eye(2) - turn.T, torch.ones(2)).expand(2, 2), rtol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scale", [0.9, 3.0])
def test_broyden_solves_n_linear_equations_within_2n_steps(n, scale):
    m, b = scale * torch.linalg.qr(torch.randn(n, n))[0], torch.randn(4, n)
    sol = fixed_point(lambda w: w @ m + b, torch.zeros(4, n), rows="batch", solver=Broyden(1e-7, memory=2 * n), policy="raise")
    assert int(sol.forward.iterations.max()) <= 2 * n + 1  # steps, and the evaluation that finds it solved


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scale", [0.9, 3.0])
def test_one_cycle_of_extrapolation_solves_n_linear_equations_in_n_plus_1_evaluations(n, scale):
    m, b = scale * torch.linalg.qr(torch.randn(n, n))[0], torch.randn(4, n)
    exact = torch.linalg.solve(torch.eye(n) - m.T, b.T).T
    for window in (n, n + 3):
        phi = Counted(lambda w: w @ m + b)
        sol = fixed_point(phi, torch.zeros(4, n), rows="batch", solver=RRE(0, 0, n + 1, window=window))
        close(sol.value, exact, rtol=1e-12 * scale**n, atol=1e-13 * scale**n)
        assert phi.calls == sol.forward.evaluations == n + 1


def test_extrapolation_agrees_with_plain_iteration_in_a_third_of_the_steps():
    q = torch.linalg.qr(torch.randn(40, 40))[0]
    m, b = q @ torch.diag(torch.linspace(-0.5, 0.97, 40)) @ q.T, torch.randn(10, 40)
    plain, found = (
        fixed_point(lambda w: w @ m + 0.02 * torch.sin(w) + b, torch.zeros(10, 40), rows="batch", solver=solver, policy="raise")
        for solver in (Picard(1e-12, max_steps=5000), RRE(1e-12, max_steps=500))
    )
    close(found.value, plain.value, rtol=1e-8, atol=1e-9)
    assert 3 * found.forward.evaluations < plain.forward.evaluations


def order(trace):
    """Slope of the log residual against the one before, over the last steps that rounding leaves alone."""
    logs = [math.log(x) for x in trace.tolist() if x > 1e-13]
    return (logs[-1] - logs[-2]) / (logs[-2] - logs[-3])


def test_newton_converges_quadratically_and_the_chord_does_not():
    def solve(solver):
        return fixed_point(lambda w: 0.5 * torch.cos(2 * w) + 0.3 * w**3, torch.full((1, 1), 0.9), solver=solver, trace=True)

    newton, chord = solve(Newton(4e-15)), solve(Chord(4e-15, max_steps=200, refresh=1.0))
    assert order(newton.forward.trace) > 1.8 and order(chord.forward.trace) < 1.2
    assert int(newton.forward.iterations) <= 7
    close(newton.value, chord.value, rtol=1e-12)


@pytest.mark.parametrize("solver", [Newton(1e-10), Chord(1e-10), NewtonKrylov(1e-10), Broyden(1e-10), RRE(1e-10)])
def test_07_the_same_steps_at_every_scale(solver):
    m, b = tanh_map(8, 1, 0.95)
    counts = set()
    for scale in (1e-3, 1.0, 1e3):
        sol = fixed_point(lambda w, s=scale: s * torch.tanh(w / s @ m + b), torch.zeros(1, 8), solver=solver, policy="raise")
        counts.add(int(sol.forward.iterations))
    assert len(counts) == 1


class Notebook(torch.nn.Module):
    """``z = tanh(W z + x)``, the layer that the implicit-layers tutorials solve by Newton with a closed-form Jacobian."""

    def forward(self, z, x, W):
        return torch.tanh(z @ W.T + x)

    def pullback(self, z, fz, x, W):
        return Turned(z, fz, W.T)


class Turned(TanhAffinePullback):
    def arguments(self, v, needs):
        of_x, of_a = super().arguments(v, needs)
        return of_x, None if of_a is None else of_a.T


@pytest.mark.parametrize("solver", [Newton(1e-12), Chord(1e-12), NewtonKrylov(1e-12)])
def test_a_closed_form_gives_the_same_at_no_vjp(solver):
    W, x = tanh_map()
    W, x = W.requires_grad_(), x.requires_grad_()
    results = []
    for phi in (Notebook(), lambda z, x, W: torch.tanh(z @ W.T + x)):
        sol = fixed_point(phi, torch.zeros(3, 6), (x, W), row_args=(0,), solver=solver, adjoint=EXACT, policy="raise")
        results.append((sol, torch.autograd.grad((sol.value**2).sum(), [x, W])))
    (closed, grads), (by_autograd, want) = results
    assert closed.forward.vjps == 0 < by_autograd.forward.vjps
    assert closed.forward.evaluations <= by_autograd.forward.evaluations
    close(closed.value, by_autograd.value, rtol=1e-11)
    for g, w in zip(grads, want, strict=True):
        close(g, w, rtol=1e-9)


def test_a_point_gives_right_products_in_every_way():
    m, b = tanh_map()
    w, v = torch.randn(3, 6), torch.randn(3, 6)
    slope = 1 - torch.tanh(w @ m + b) ** 2
    J = slope[:, :, None] * m.T
    args = (b, m)
    start = torch.zeros(3, 6)
    problem = Problem(TanhAffine(), args, (0,), layout_of(start, "batch"), start, Picard())

    class Least(ClosedForm):  # without J v and J
        def _rmatvec(self, v):
            return (v * slope) @ m.T

        def arguments(self, v, needs):
            return ()

    plain = lambda w: torch.tanh(w @ m + b)  # noqa: E731
    half = ClosedMap(plain, lambda w, fw: Least())
    for phi, grads in ((problem.bind(args), False), (half, False), (plain, False), (plain, True)):
        with torch.set_grad_enabled(grads):
            at = Point(phi, w, Cost())
            close(at.fw, torch.tanh(w @ m + b))
            close(at.jacobian(), J)
            close(at.vjp(v), torch.einsum("rjk,rj->rk", J, v))
            close(at.jvp(v), torch.einsum("rjk,rk->rj", J, v))
            assert at.jacobian().requires_grad == grads
    constant = Point(lambda w: torch.ones_like(w), w, Cost())
    assert not constant.jvp(v).any() and not constant.vjp(v).any() and not constant.jacobian().any()


SINGULAR = [
    (Newton(1e-8), Status.breakdown),
    (Newton(0, 0, 4), Status.breakdown),
    (Chord(1e-8), Status.breakdown),
    (NewtonKrylov(1e-8), Status.breakdown),
    (NewtonKrylov(0, 0, 4), Status.breakdown),
]


@pytest.mark.parametrize(("solver", "status"), SINGULAR, ids=repr)
@pytest.mark.parametrize("adjoint", [EXACT, Unrolled()])
def test_a_singular_row_breaks_down_and_leaves_the_others_as_they_are(solver, status, adjoint):
    if isinstance(adjoint, Unrolled) and not solver.differentiable:
        pytest.skip("refused")
    m, b = tanh_map(4, 3, 0.8)
    keep = torch.tensor([1.0, 0.0, 1.0])[:, None]

    def solve(rows):
        c = b[rows].clone().requires_grad_()
        part = keep[rows]
        sol = fixed_point(
            lambda w, c, part: torch.where(part > 0, torch.tanh(w @ m + c), w + 1.0),  # no fixed point where part is 0
            torch.zeros(len(rows), 4),
            (c, part),
            solver=solver,
            adjoint=adjoint,
            policy="ignore",
        )
        return sol, torch.autograd.grad((sol.value[part[:, 0] > 0] ** 2).sum(), c)[0][part[:, 0] > 0]

    (sol, grad), (alone, want) = solve([0, 1, 2]), solve([0, 2])
    # A solve to a tolerance may take one step more with another row beside it.
    close(sol.value[[0, 2]], alone.value, rtol=1e-6)
    close(grad, want, rtol=1e-6)
    assert sol.forward.row_status[1] == status and not bool((sol.forward.row_status[[0, 2]] > Status.fixed_steps).any())
    assert bool(torch.isfinite(sol.value).all()) and "singular" in status.message


def test_broyden_on_a_map_without_a_fixed_point_runs_away_and_says_so():
    sol = fixed_point(lambda w: w + 1.0, torch.zeros(2, 3), solver=Broyden(1e-8), policy="ignore")
    assert sol.status == Status.diverged and sol.forward.evaluations == 100


EVERY = [Picard(), Anderson(), Broyden(), RRE(), Newton(), Newton(line_search=True), Chord(), NewtonKrylov()]


@pytest.mark.cases(quick=2, slow=8, among={"part": [0.5]})
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_where_there_is_no_fixed_point_nothing_is_called_solved(solver, part):
    """``w + 1 + part sin(w)`` grows without end; Newton and chord wander where the residual is least, which is ``max_steps``."""
    starts = torch.tensor([[0.0, 0.1], [1.0, 1.1], [-3.0, -2.9], [5.0, 5.1]])
    # With part = 0.9 Anderson wanders for up to 600 steps, depending on rounding, before it leaves.
    for max_steps in (20, solver.max_steps, 300 if part < 0.9 else 1000):
        fewer = dataclasses.replace(solver, max_steps=max_steps)
        sol = fixed_point(lambda w: w + 1.0 + part * torch.sin(w), starts, rows="batch", solver=fewer, policy="ignore")
        assert bool((sol.forward.row_status > Status.fixed_steps).all()), sol.forward.row_status
        near = sol.value.abs().amax(dim=1) < 1e6  # farther away phi(w) = w to rounding
        found = sol.forward.residual * sol.forward.scale
        close(found[near], (1 + part * torch.sin(sol.value)).norm(dim=1)[near], rtol=1e-6)
    if isinstance(solver, (Picard, Anderson, Broyden)):
        assert sol.forward.row_status.tolist() == [Status.diverged] * 4


@pytest.mark.parametrize("solver", [Newton(1e-10, line_search=True), NewtonKrylov(1e-10)])
def test_a_line_search_saves_newton_where_full_steps_run_away(solver):
    def phi(w):
        return w - torch.atan(w)  # Newton's own iteration for atan runs away from |w| > 1.39

    start = torch.tensor([[3.0], [0.5], [-20.0]])
    full = dataclasses.replace(solver, line_search=False)
    assert fixed_point(phi, start, solver=full, policy="ignore").status.failed
    sol = fixed_point(phi, start, solver=solver, policy="ignore")
    # Relative to a state of 0 no residual is small: what counts is that each row came home.
    assert bool((sol.value.abs() < 1e-8).all())


def test_a_full_step_that_a_line_search_accepts_is_not_evaluated_again():
    m, b = tanh_map(6, 1)
    for solver in (Newton(1e-10), NewtonKrylov(1e-10, line_search=False), Broyden(1e-10)):
        counts = []
        for search in (False, True):
            phi = Counted(lambda w: torch.tanh(w @ m + b))
            sol = fixed_point(phi, torch.zeros(1, 6), solver=dataclasses.replace(solver, line_search=search), policy="raise")
            assert phi.calls == sol.forward.evaluations
            counts.append((phi.calls, sol.value))
        # The last iterate is evaluated with the graph of the adjoint; a search has then evaluated it before.
        assert counts[1][0] <= counts[0][0] + 1
        close(counts[0][1], counts[1][1], rtol=1e-9)


def test_a_state_too_large_for_dense_is_refused_with_its_size():
    for solver in (Newton(), Chord()):
        with pytest.raises(ValueError, match=rf"{type(solver).__name__}: .*2 rows of 50000 entries.*37.3 GiB.*NewtonKrylov"):
            fixed_point(lambda w: 0.5 * w, torch.zeros(2, 50000), solver=solver)
    with pytest.raises(ValueError, match="raise max_gib"):
        fixed_point(lambda w: 0.5 * w, torch.zeros(2, 50), solver=Newton(max_gib=1e-6))


def test_newton_krylov_cannot_be_unrolled_but_its_last_steps_can():
    m, b = (x.requires_grad_() for x in tanh_map(q=0.5))
    with pytest.raises(ValueError, match=r"NewtonKrylov cannot be differentiated.*last=k.*Newton"):
        fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(3, 6), solver=NewtonKrylov(), adjoint=Unrolled())
    sol = fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(3, 6), solver=NewtonKrylov(1e-12), adjoint=Unrolled(last=60))
    exact = fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(3, 6), solver=NewtonKrylov(1e-12), adjoint=EXACT)
    got, want = (torch.autograd.grad(s.value.sum(), m)[0] for s in (sol, exact))
    close(got, want, rtol=1e-9)
    assert sol.forward.jvps > 0


def test_every_fallback_is_tried_and_logged(caplog):
    turns = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) * a for a in (2.0, 2.5, 3.0)]
    turn = torch.block_diag(*turns)
    phi = Counted(lambda w: w @ turn + 1)
    chain = [type(s).__name__ for s in default_fallback(Picard(1e-9))]
    assert chain == ["Anderson", "Broyden", "NewtonKrylov"]
    assert [type(s).__name__ for s in default_fallback(Broyden())] == ["Anderson", "NewtonKrylov"]
    assert all(s.rtol == 1e-9 for s in default_fallback(Picard(1e-9)))
    assert not any(s.fixed for s in default_fallback(Picard(0, 0)))
    tries = (Anderson(1e-9, window=2, max_steps=30), Broyden(1e-9, max_steps=3), NewtonKrylov(1e-9))
    with caplog.at_level("WARNING", "hyperopt"):
        sol = fixed_point(phi, torch.zeros(1, 6), solver=Picard(1e-9), policy="fallback", fallback=tries)
    assert sol.forward.method == "NewtonKrylov" and sol.forward.fallbacks == ("Picard", "Anderson", "Broyden")
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["Anderson", "Broyden", "NewtonKrylov"]
    assert sol.forward.evaluations == phi.calls and sol.forward.jvps > 0
    close(sol.value, torch.linalg.solve(torch.eye(6) - turn.T, torch.ones(6)).expand(1, 6), rtol=1e-8)


def test_the_default_fallbacks_solve_a_map_that_picard_does_not():
    sol = fixed_point(lambda z: 3 * z + 1, torch.ones(2, 1), solver=Picard(1e-10), policy="fallback")
    close(sol.value, torch.full((2, 1), -0.5))
    assert sol.forward.method == "Anderson" and sol.forward.fallbacks == ("Picard",)


def problem(q=0.6):
    m, b = tanh_map(5, 4, q)
    return m.requires_grad_(), b


def hypergradient(m, b, adjoint, solver):
    sol = fixed_point(
        lambda w, b: torch.tanh(w @ m + b), torch.zeros(4, 5), (b,), row_args=(0,), solver=solver, adjoint=adjoint, policy="raise"
    )
    return sol, torch.autograd.grad((sol.value**3).sum(), m)[0]


def distance(x, want):
    return float((x - want).norm() / want.norm())


def test_shine_with_the_inverse_itself_is_exact():
    """A chord solver from the solution has the very factors of ``I - J``: then SHINE is the dense solve."""
    m, b = problem()
    exact, want = hypergradient(m, b, EXACT, Newton(1e-14))
    w0 = exact.value.detach()
    sol = fixed_point(lambda w: torch.tanh(w @ m + b), w0 + 1e-9, rows="batch", solver=Chord(1e-14), adjoint=Shine())
    close(torch.autograd.grad((sol.value**3).sum(), m)[0], want, rtol=1e-6)
    assert sol.adjoint is not None and sol.adjoint.vjps == 2 and sol.adjoint.worst_residual() < 1e-6


def test_shine_is_better_than_one_step_and_every_refinement_better_than_it():
    m, b = problem(0.8)
    _, want = hypergradient(m, b, EXACT, Newton(1e-14))
    one = distance(hypergradient(m, b, Shine(ratio=1e-9), Broyden(1e-10))[1], want)
    shine = distance(hypergradient(m, b, Shine(), Broyden(1e-10))[1], want)
    refined = [distance(hypergradient(m, b, Shine(Neumann(0, 0, k)), Broyden(1e-10))[1], want) for k in (5, 20, 80)]
    assert shine < 0.8 * one and refined[0] < shine and refined[1] < 0.2 * refined[0] and refined[2] < 1e-6
    sol, solved = hypergradient(m, b, Shine(LinearAnderson(1e-12)), Broyden(1e-12))
    assert distance(solved, want) < 1e-9 and sol.adjoint is not None and sol.adjoint.status == Status.converged


def test_shine_falls_back_row_by_row_to_the_one_step_direction():
    m, b = problem(0.8)
    sol, _ = hypergradient(m, b, Shine(ratio=100.0), Broyden(1e-10))
    assert sol.adjoint is not None and sol.adjoint.iterations.tolist() == [1] * 4
    g = 3 * sol.value.detach() ** 2
    ratios = torch.linalg.vector_norm(sol.v, dim=1) / torch.linalg.vector_norm(g, dim=1)
    middle = float(ratios.sort().values[1:3].mean())
    mixed, _ = hypergradient(m, b, Shine(ratio=middle), Broyden(1e-10))
    fell = ratios > middle
    assert mixed.adjoint is not None and mixed.adjoint.iterations.tolist() == (~fell).long().tolist() and int(fell.sum()) == 2
    close(mixed.v, torch.where(fell[:, None], g, sol.v), rtol=1e-10)


def test_shine_measures_its_true_residual():
    m, b = problem(0.8)
    sol, _ = hypergradient(m, b, Shine(), Broyden(1e-10))
    w, v = sol.value.detach(), sol.v
    slope = 1 - torch.tanh(w @ m.detach() + b) ** 2
    g = 3 * w**2
    residual = torch.linalg.vector_norm(v - (v * slope) @ m.detach().T - g, dim=1) / torch.linalg.vector_norm(g, dim=1)
    assert sol.adjoint is not None
    close(sol.adjoint.residual, residual, rtol=1e-6)


def test_shine_needs_a_solver_that_keeps_an_inverse():
    for solver in (Picard(), Anderson(), Newton(), NewtonKrylov()):
        name = type(solver).__name__
        with pytest.raises(ValueError, match=rf"Shine\(\) needs a solver .*{name} keeps none.*Broyden.*Chord.*Implicit\(\)"):
            fixed_point(lambda w: 0.5 * w, torch.zeros(2, 3), solver=solver, adjoint=Shine())
    with pytest.raises(TypeError, match="linear_solver"):
        Shine(linear_solver=Picard())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="linear_solver"):
        NewtonKrylov(linear_solver=Picard())  # pyright: ignore[reportArgumentType]
