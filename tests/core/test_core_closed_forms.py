"""Values and hypergradients against closed forms and a dense Newton reference, for every solver and adjoint."""

import math

import pytest
import torch
from core_reference import close, newton, square
from hydra.utils import get_class
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperopt import (
    CG,
    Anderson,
    Broyden,
    Checkpointed,
    Implicit,
    LinearAnderson,
    Newton,
    Picard,
    Shine,
    SolveError,
    Status,
    Unrolled,
    fixed_point,
)
from hyperopt.app.options import IMPLICIT, targets

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 4000
TIGHT = 1e-14
FORWARD = {name: get_class(own)(TIGHT, max_steps=STEPS) for name, (own, *_) in targets("solver").items()}  # of every option
SOLVERS = FORWARD | {
    "damped": Picard(TIGHT, max_steps=STEPS, damping=0.7),
    "anderson_restarted": Anderson(TIGHT, max_steps=STEPS, restart=True),
    "broyden_memory": Broyden(TIGHT, max_steps=STEPS, memory=6),
    "broyden_search": Broyden(TIGHT, max_steps=STEPS, line_search=True),
    "newton_search": Newton(TIGHT, line_search=True),
}
SYMMETRIC = ("cg", "minres", "nystrom")  # for maps with a symmetric Jacobian
# Relative tolerance of the hypergradient, with its reason.
ADJOINTS = {
    name: (Implicit(get_class(inside[0])(TIGHT, max_steps=STEPS), policy="raise"), 1e-10)
    for name, (own, *inside) in targets("adjoint").items()
    if own == IMPLICIT and name not in SYMMETRIC and len(inside) == 1
} | {
    "unrolled": (Unrolled(), 1e-9),  # T q^T at the T where the state has met 1e-14: a factor T more than the state's own error
    "checkpointed": (Checkpointed(), 1e-9),
    "unrolled_last": (Unrolled(last=150), 1e-9),  # the terms that are left out are below .82^150 = 1e-13
}
# SHINE is as exact as its refinement; its start, and the fallback of a row, must not show.
SHINE = (Shine(LinearAnderson(TIGHT, max_steps=STEPS), policy="raise"), 1e-10)
GRID = [
    pytest.param(s, a, t, id=f"{n}-{m}")
    for n, s in SOLVERS.items()
    for m, (a, t) in {**ADJOINTS, "shine": SHINE}.items()
    if (s.differentiable or m not in ("unrolled", "checkpointed")) and (m != "shine" or s.keeps_inverse)
]


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).requires_grad_()


def contraction(n, radius):
    m = torch.randn(n, n)
    return (m * (radius / torch.linalg.matrix_norm(m, 2))).requires_grad_()


def scalar():
    a = torch.tensor(0.7, requires_grad=True)
    return lambda w: torch.cos(a * w), torch.zeros(()), [a], "auto"


def vector():
    m, b = contraction(4, 0.8), leaf(4)
    return lambda w: torch.tanh(m @ w + b), torch.zeros(4), [m, b], "auto"


def batch():
    m, b = contraction(3, 0.8), leaf(5, 3)
    return lambda w: torch.tanh(w @ m + b), torch.zeros(5, 3), [m, b], "batch"


def image():
    k, b = leaf(2, 2, 3, 3, scale=0.05), leaf(2, 2, 3, 3)
    return lambda w: torch.tanh(torch.conv2d(w, k, padding=1) + b), torch.zeros(2, 2, 3, 3), [k, b], "auto"


def coupled():
    """``x`` of 3 and ``y`` of 2 columns, each in the other's map."""
    a, b, c = contraction(3, 0.4), leaf(2, 3, scale=0.15), leaf(3, 2, scale=0.15)
    return (
        lambda w: (torch.tanh(w[0] @ a + w[1] @ b + 0.3), torch.cos(w[0] @ c)),
        (torch.zeros(4, 3), torch.zeros(4, 2)),
        [a, b, c],
        "auto",
    )


def nested():
    """A dict of a scalar, a tuple and a list, one row: leading dimensions differ."""
    a, b = torch.tensor(0.4, requires_grad=True), leaf(3)

    def phi(w):
        s, (u,), [m] = w["s"], w["t"], w["l"]
        return {"l": [0.3 * torch.sin(m + a)], "s": torch.cos(a * s) * 0.5 + 0.1 * u.sum(), "t": (0.3 * torch.tanh(u + b * s),)}

    return phi, {"s": torch.zeros(()), "t": (torch.zeros(3),), "l": [torch.zeros(2, 2)]}, [a, b], "auto"


def non_contiguous():
    m, b = contraction(3, 0.8), leaf(5, 3)
    return lambda w: torch.tanh(m.t() @ w + b.t()), torch.zeros(6, 5)[::2], [m, b], "joint"


PROBLEMS = [scalar, vector, batch, image, coupled, nested, non_contiguous]


def thinned():
    """Every problem with every pair of methods: all pairs on a batch, and every tenth on each other problem, the rest slow."""
    for number, problem in enumerate(PROBLEMS):
        for place, case in enumerate(GRID):
            quick = problem is batch or (place + number) % 10 == 0
            marks = () if quick else pytest.mark.slow
            yield pytest.param(problem, *case.values, marks=marks, id=f"{problem.__name__}-{case.id}")


@pytest.mark.cases(quick=24, slow=40)
@pytest.mark.parametrize(("problem", "solver", "adjoint", "rtol"), list(thinned()))
def test_value_and_hypergradient(problem, solver, adjoint, rtol):
    phi, w0, params, rows = problem()
    solution = fixed_point(phi, w0, rows=rows, solver=solver, adjoint=adjoint, policy="raise")
    want = newton(phi, w0)
    torch.testing.assert_close(solution.value, want, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(square(solution.value), params)
    for g, w in zip(got, torch.autograd.grad(square(want), params), strict=True):
        close(g, w, rtol=rtol, atol=rtol)
    assert solution.status in (Status.converged, Status.fixed_steps)


def test_scalar_cosine():
    a = torch.tensor(0.9, requires_grad=True)
    w = fixed_point(lambda w: torch.cos(a * w), torch.zeros(()), solver=SOLVERS["picard"], adjoint=ADJOINTS["neumann"][0]).value
    root = 0.0
    for _ in range(60):
        root -= (root - math.cos(0.9 * root)) / (1 + 0.9 * math.sin(0.9 * root))
    sine = math.sin(0.9 * root)
    close(w.detach(), torch.tensor(root), atol=1e-13)
    close(torch.autograd.grad(w, a)[0], torch.tensor(-root * sine / (1 + 0.9 * sine)))


def rotation(radius):
    return radius * torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]])


LINEAR = {
    "radius-.1": lambda: torch.diag(torch.tensor([0.1, -0.05, 0.02])),
    "radius-.9": lambda: torch.diag(torch.tensor([0.9, -0.5, 0.2])),
    "radius-.99": lambda: torch.diag(torch.tensor([0.99, -0.5, 0.2])),
    "radius-.999": lambda: torch.diag(torch.tensor([0.999, -0.5, 0.2])),
    "non-normal": lambda: torch.tensor([[0.5, 20.0, 0.0], [0.0, 0.4, 20.0], [0.0, 0.0, 0.3]]),
    "rotation": lambda: rotation(0.9),
}


LINEAR_ADJOINTS = {n: a for n, (a, _) in ADJOINTS.items() if isinstance(a, Implicit)}
LINEAR_ADJOINTS["cg"] = Implicit(CG(TIGHT, max_steps=STEPS), policy="raise")


# Picard and Neumann would need tens of thousands of steps for .999; the others' hypergradient does not depend on the solver.
LINEAR_GRID = [
    (name, solver, adjoint)
    for name in LINEAR
    for adjoint in LINEAR_ADJOINTS
    for solver in (FORWARD if adjoint in ("neumann", "anderson") else ("anderson",))
    if name != "radius-.999" or (adjoint != "neumann" and solver != "picard")
]


@pytest.mark.cases(quick=12, slow=60)
@pytest.mark.parametrize(("name", "solver", "adjoint"), LINEAR_GRID)
def test_linear_maps_of_known_spectrum(name, solver, adjoint):
    m = LINEAR[name]().requires_grad_()
    n = m.shape[0]
    b, g = leaf(n), torch.randn(n)
    w = fixed_point(
        lambda w: m @ w + b, torch.zeros(n), solver=SOLVERS[solver], adjoint=LINEAR_ADJOINTS[adjoint], policy="raise"
    ).value
    if adjoint == "cg" and not torch.equal(m, m.t()):
        with pytest.raises(SolveError, match=r"CG .*(broke down|negative curvature)"):
            torch.autograd.grad(w, [m, b], g)
        return
    inverse = torch.linalg.inv(torch.eye(n) - m.detach())
    # The non-normal inverse has norm 2e3: rounding alone is 2e3 eps of the state, and twice that of the product v w^T.
    close(w.detach(), inverse @ b.detach(), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(w, [m, b], g)
    v = inverse.t() @ g
    scale = float(v.norm())
    close(grads[1], v, rtol=1e-10, atol=1e-10 * scale)
    close(grads[0], torch.outer(v, inverse @ b.detach()), rtol=1e-10, atol=1e-10 * scale * float(w.detach().norm()))


@pytest.mark.cases(quick=13)
@pytest.mark.parametrize(("solver", "adjoint", "rtol"), GRID)
def test_ridge_regression_as_a_gradient_step(solver, adjoint, rtol):
    x, y = torch.randn(12, 3), torch.randn(12)
    lam = torch.tensor(0.5, requires_grad=True)
    step = 1 / float(torch.linalg.eigvalsh(x.t() @ x)[-1] + 0.5)
    w = fixed_point(
        lambda w: w - step * (x.t() @ (x @ w - y) + lam * w), torch.zeros(3), rows="joint", solver=solver, adjoint=adjoint
    ).value
    inverse = torch.linalg.inv(x.t() @ x + 0.5 * torch.eye(3))
    exact = inverse @ x.t() @ y
    close(w.detach(), exact)
    close(torch.autograd.grad(w.sum(), lam)[0], -(inverse @ exact).sum(), rtol=rtol)


@pytest.mark.parametrize("adjoint", ["neumann", "anderson", "unrolled"])
def test_mixed_dtypes_are_promoted_inside_and_restored(adjoint):
    a, seen = torch.tensor(0.4, requires_grad=True), []

    def phi(w):
        seen.append((w["x"].dtype, w["y"].dtype))
        return {
            "x": 0.5 * torch.cos(a.float() * w["x"]),
            "y": torch.sin(a * w["y"]) * 0.5 + w["x"].double().sum(1, keepdim=True) * 0.1,
        }

    start = {"x": torch.zeros(3, 2, dtype=torch.float32), "y": torch.zeros(3, 1)}
    solution = fixed_point(phi, start, solver=Picard(1e-7, max_steps=200), adjoint=ADJOINTS[adjoint][0])
    assert set(seen) == {(torch.float32, torch.float64)}
    assert solution.value["x"].dtype == torch.float32 and solution.value["y"].dtype == torch.float64
    (got,) = torch.autograd.grad(solution.value["y"].sum(), a)

    def exact(w):
        return {"x": 0.5 * torch.cos(a * w["x"]), "y": torch.sin(a * w["y"]) * 0.5 + w["x"].sum(1, keepdim=True) * 0.1}

    want = newton(exact, {key: value.double() for key, value in start.items()})
    close(got, torch.autograd.grad(want["y"].sum(), a)[0], rtol=1e-5)  # one leaf is float32


@pytest.mark.cases(quick=34)
@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_rows(name, solver):
    if name in ("unrolled", "checkpointed") and not solver.differentiable:
        pytest.skip("refused, see test_core_newton")
    m = contraction(3, 0.5)
    solution = fixed_point(lambda w: torch.tanh(w @ m), torch.zeros(0, 3), solver=solver, adjoint=ADJOINTS[name][0])
    assert solution.value.shape == (0, 3) and solution.rows == 0 and solution.status == Status.converged
    close(torch.autograd.grad(solution.value.sum(), m, allow_unused=True, materialize_grads=True)[0], torch.zeros(3, 3))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), rows=st.integers(1, 4), radius=st.floats(0.0, 0.95), seed=st.integers(0, 10**6))
def test_random_contractions(n, rows, radius, seed):
    torch.manual_seed(seed)
    m, b, g = contraction(n, radius), leaf(rows, n), torch.randn(rows, n)
    w = fixed_point(lambda w: w @ m + b, torch.randn(rows, n), solver=SOLVERS["picard"], adjoint=ADJOINTS["neumann"][0]).value
    want = torch.linalg.solve(torch.eye(n) - m.t(), b.t()).t()
    close(w, want, rtol=1e-10, atol=1e-10)
    for got, exact in zip(torch.autograd.grad(w, [m, b], g), torch.autograd.grad(want, [m, b], g), strict=True):
        close(got, exact, rtol=1e-9, atol=1e-9)
