"""Derivatives of higher order and under ``torch.func``, against autograd through plain loops and dense Newton steps."""

from types import SimpleNamespace

import pytest
import torch
from core_reference import Counted, close, newton, square, unrolled
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from hyperopt import (
    CG,
    GMRES,
    RRE,
    BiCGStab,
    Broyden,
    Chord,
    ClosureError,
    Dense,
    Implicit,
    InexactError,
    LinearAnderson,
    Neumann,
    Newton,
    NewtonKrylov,
    NormalCG,
    OneStep,
    Phantom,
    Picard,
    Shine,
    Unrolled,
    fixed_point,
)
from hyperopt.core.adjoints.base import Adjoint

# torch's own first use of forward mode scripts its decompositions, and its compiler looks at .grad of a non-leaf.
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:The .grad attribute:UserWarning"),
]

SOLVER = Picard(1e-14, max_steps=500)
ADJOINT = Implicit(Neumann(1e-14, max_steps=500), policy="raise")
# Relative error of a derivative of a quantity solved to 1e-14 at contraction below .6, once for each order.
RTOL = 1e-9


def solve(phi, w0, *args, adjoint=ADJOINT, **more):
    return fixed_point(phi, w0, args, solver=SOLVER, adjoint=adjoint, policy="raise", **more).value


def cell(w, m, b):
    return torch.tanh(0.5 * w @ m + b)


def weights(rows=3, n=2):
    m = torch.randn(n, n)
    return (m / torch.linalg.matrix_norm(m, 2)).requires_grad_(), torch.randn(rows, n).requires_grad_()


def pair(w, m, b):
    x, y = w["x"], w["y"]
    return {"x": torch.tanh(0.3 * x @ m + b + 0.2 * y), "y": 0.4 * torch.sin(x.sum(1, keepdim=True)) + 0.2 * torch.cos(y)}


def both(m, b):
    value = solve(pair, {"x": torch.zeros(3, 2), "y": torch.zeros(3, 1)}, m, b)
    return value["x"], value["y"]


def closed(m, b):
    twice = 0.2 * m @ m  # one closed-over tensor is computed from another
    return solve(lambda w: torch.tanh(0.3 * w @ m + w @ twice + b), torch.zeros(3, 2))


CASES = {"batched": lambda m, b: solve(cell, torch.zeros(3, 2), m, b), "multi-tensor": both, "closure": closed}


LINEAR_SOLVERS = {
    "neumann": Neumann(1e-14, max_steps=500),
    "anderson": LinearAnderson(1e-14),
    "gmres": GMRES(1e-14),
    "bicgstab": BiCGStab(1e-14),
    "cg": CG(1e-14),
    "normal_cg": NormalCG(1e-14),
    "dense": Dense(1e-14),
}


def descent(w, m, b):
    """A gradient step on a convex function of each row: its Jacobian is symmetric, as CG wants it."""
    return w - 0.5 * (w @ (torch.eye(2) + 0.2 * (m + m.t())) + 0.1 * w**3 - b)


@pytest.mark.cases(quick=1, among={"name": ["cg", "gmres"]})
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_every_derivative_with_every_linear_solver(name):
    adjoint = Implicit(LINEAR_SOLVERS[name], policy="raise")
    phi = descent if name == "cg" else cell

    def f(m, b):
        return solve(phi, torch.zeros(2, 2), m, b, adjoint=adjoint)

    m, b = weights(2)
    assert gradcheck(f, (m, b))
    assert gradgradcheck(f, (m, b))
    m, b = m.detach(), b.detach()
    tangents = (m.cos(), b.sin())

    def plain(m, b):
        return unrolled(lambda w: phi(w, m, b), torch.zeros(2, 2))

    torch.testing.assert_close(jvp(f, (m, b), tangents), jvp(plain, (m, b), tangents), rtol=RTOL, atol=1e-11)
    got, want = (jacfwd(lambda m, h=h: square(h(m, b)))(m) for h in (f, plain))
    close(got, want, rtol=RTOL)
    got, want = (jvp(grad(lambda m, h=h: square(h(m, b))), (m,), (m.cos(),))[1] for h in (f, plain))
    close(got, want, rtol=RTOL)


def test_normal_cg_never_calls_the_map():
    m, b = weights()
    phi = Counted(lambda w: cell(w, m, b))
    sol = fixed_point(phi, torch.zeros(3, 2), solver=SOLVER, adjoint=Implicit(NormalCG(1e-13), policy="raise"))
    calls = phi.calls
    square(sol.value).backward()
    assert phi.calls == calls and sol.adjoint is not None
    # One vjp to build the transpose, one at the end to measure, the closing one; one jvp for the first A^T r.
    steps = int(sol.adjoint.iterations.max())
    assert (sol.adjoint.vjps, sol.adjoint.jvps) == (steps + 3, steps)


@pytest.mark.parametrize("name", ["neumann", "gmres", "normal_cg"])
def test_a_tangent_counts_jvps(name):
    m, b = (x.detach() for x in weights())
    seen = []

    def f(m):
        sol = fixed_point(cell, torch.zeros(3, 2), (m, b), solver=SOLVER, adjoint=Implicit(LINEAR_SOLVERS[name]))
        seen.append(sol)
        return sol.value

    jvp(f, (m,), (m.cos(),))
    stats = seen[0].adjoint
    assert stats.jvps > stats.vjps and (name == "normal_cg") == (stats.vjps > 1)


INEXACT = {"one-step": OneStep(), "phantom": Phantom(3)}


@pytest.mark.parametrize("name", INEXACT)
def test_an_inexact_adjoint_refuses_every_second_derivative(name):
    m, b = weights()
    adjoint = INEXACT[name]
    w = solve(cell, torch.zeros(3, 2), m, b, adjoint=adjoint)
    with pytest.raises(InexactError, match="use an exact adjoint"):
        torch.autograd.grad(square(w), m, create_graph=True)

    def f(m):  # linear in the state: the second derivative would not pass through the gradient of the loss
        return solve(cell, torch.zeros(3, 2), m, b.detach(), adjoint=adjoint).sum()

    first = grad(f)(m.detach())
    close(first, torch.autograd.grad(w.sum(), m)[0])
    close(jacfwd(f)(m.detach()), first)
    for second in (jacrev(grad(f)), jacfwd(grad(f)), jacfwd(jacfwd(f)), hessian(f)):
        with pytest.raises(InexactError):
            second(m.detach())


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck(name):
    assert gradcheck(CASES[name], weights())
    assert gradgradcheck(CASES[name], weights())


NEWTONS = {"newton": Newton(1e-14), "chord": Chord(1e-14), "newton_krylov": NewtonKrylov(1e-14), "broyden": Broyden(1e-14)}


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("name", NEWTONS)
def test_gradcheck_and_gradgradcheck_of_every_solver_with_an_implicit_adjoint(name):
    def value(m, b):
        return fixed_point(cell, torch.zeros(2, 2), (m, b), solver=NEWTONS[name], adjoint=ADJOINT, policy="raise").value

    assert gradcheck(value, weights(2))
    assert gradgradcheck(value, weights(2))


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize(
    "solver", [Newton(0, 0, 2), Newton(0, 0, 2, line_search=True), Chord(0, 0, 3), Broyden(0, 0, 4), RRE(0, 0, 8)]
)
def test_gradcheck_and_gradgradcheck_of_unrolled_steps(solver):
    """Far from the solution, so that only a derivative through the steps themselves can pass."""

    def value(m, b):
        return fixed_point(cell, torch.ones(2, 2), (m, b), solver=solver, adjoint=Unrolled()).value

    assert gradcheck(value, weights(2))
    assert gradgradcheck(value, weights(2))


def test_newton_unrolled_has_the_second_derivative_after_two_steps_at_the_solution():
    m, b = weights()
    with torch.no_grad():
        start = unrolled(lambda w: cell(w, m, b), torch.zeros(3, 2))
    got = fixed_point(cell, start, (m, b), solver=Newton(0, 0, 2), adjoint=Unrolled()).value
    want = solve(cell, torch.zeros(3, 2), m, b)
    for _ in range(2):
        (got,), (want,) = (torch.autograd.grad(square(x), m, create_graph=True) for x in (got, want))
        close(got, want, rtol=RTOL)


@pytest.mark.parametrize("solver", [Newton(1e-12), Broyden(1e-12), RRE(1e-12)])
def test_newton_and_broyden_under_torch_func_with_an_unrolled_adjoint(solver):
    m, b = (x.detach() for x in weights())

    def loss(m, adjoint):
        return square(fixed_point(cell, torch.zeros(3, 2), (m, b), solver=solver, adjoint=adjoint, policy="raise").value)

    close(grad(lambda m: loss(m, Unrolled()))(m), grad(lambda m: loss(m, ADJOINT))(m), rtol=1e-9)


@pytest.mark.parametrize("linear_solver", [None, Neumann(1e-12, max_steps=500)])
def test_shine_refuses_a_second_derivative(linear_solver):
    m, b = weights()
    value = fixed_point(cell, torch.zeros(3, 2), (m, b), solver=Broyden(1e-12), adjoint=Shine(linear_solver)).value
    assert torch.autograd.grad(value.sum(), m, retain_graph=True)[0].shape == (2, 2)
    with pytest.raises(InexactError, match="SHINE is never exact"):
        torch.autograd.grad(value.sum(), m, create_graph=True)


def test_shine_under_torch_func():
    m, b = (x.detach() for x in weights())
    adjoint = Shine(Neumann(1e-12, max_steps=500))

    def loss(m, b=b, adjoint: Adjoint = adjoint):
        return square(fixed_point(cell, torch.zeros_like(b), (m, b), solver=Broyden(1e-12), adjoint=adjoint).value)

    close(grad(loss)(m), grad(lambda m: loss(m, adjoint=ADJOINT))(m), rtol=1e-8)
    several = torch.stack([b, 2 * b])
    got = grad(lambda m: vmap(lambda b: loss(m, b))(several).sum())(m)
    close(got, sum(grad(lambda m, b=b: loss(m, b))(m) for b in several), rtol=1e-8)
    close(jvp(loss, (m,), (m.cos(),))[1], jvp(lambda m: loss(m, adjoint=ADJOINT), (m,), (m.cos(),))[1], rtol=1e-8)
    with pytest.raises(InexactError, match="no inverse estimate"):
        vmap(grad(lambda b: loss(m, b)))(several)


def test_forward_mode_gradcheck():
    assert gradcheck(CASES["batched"], weights(), check_forward_ad=True, check_backward_ad=False)


def test_third_derivative_of_the_scalar_problem():
    a = torch.tensor(0.7, requires_grad=True)
    got = solve(lambda w: torch.cos(a * w), torch.zeros(()))
    want = newton(lambda w: torch.cos(a * w), torch.zeros(()), graph_steps=2)
    for _ in range(3):
        (got,), (want,) = (torch.autograd.grad(x, a, create_graph=True) for x in (got, want))
        close(got, want, rtol=RTOL)


def test_hessian_vector_product_matches_newton():
    m, b = weights()
    direction = torch.randn(2, 2)
    results = []
    for value in (solve(cell, torch.zeros(3, 2), m, b), newton(lambda w: cell(w, m, b), torch.zeros(3, 2), graph_steps=2)):
        (g,) = torch.autograd.grad(square(value), m, create_graph=True)
        results.append(torch.autograd.grad((g * direction).sum(), [m, b]))
    for got, want in zip(*results, strict=True):
        close(got, want, rtol=RTOL)


def outer(m, b):
    return square(solve(cell, torch.zeros(3, 2), m, b))


def plain(m, b):
    return square(unrolled(lambda w: cell(w, m, b), torch.zeros(3, 2)))


TRANSFORMS = {
    "grad": lambda f: lambda m, b: grad(f, (0, 1))(m, b),
    "jacrev": lambda f: lambda m, b: jacrev(f, 1)(m, b),
    "jacfwd": lambda f: lambda m, b: jacfwd(f, 1)(m, b),
    "hessian": lambda f: lambda m, b: hessian(f)(m, b),
    "reverse over reverse": lambda f: lambda m, b: jacrev(grad(f))(m, b),
    "forward over forward": lambda f: lambda m, b: jacfwd(jacfwd(f))(m, b),
    "jvp": lambda f: lambda m, b: jvp(f, (m, b), (m, b.cos())),
    "nested jvp": lambda f: lambda m, b: jvp(lambda x: jvp(lambda y: f(y, b), (x,), (x.sin(),))[1], (m,), (m.cos(),)),
    "vmap": lambda f: lambda m, b: vmap(f, (None, 0))(m, torch.stack([b, 2 * b, -b])),
    "vmap both": lambda f: lambda m, b: vmap(f)(torch.stack([m, 0.5 * m]), torch.stack([b, 2 * b])),
    "vmap of grad": lambda f: lambda m, b: vmap(grad(f), (None, 0))(m, torch.stack([b, 2 * b])),
    "grad of vmap": lambda f: lambda m, b: grad(lambda m: vmap(f, (None, 0))(m, torch.stack([b, 2 * b])).sum())(m),
}


@pytest.mark.cases(quick=2, slow=12)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("closure", [False, True], ids=["args", "closure"])
def test_transforms(name, closure):
    m, b = (x.detach() for x in weights())

    def through_closure(m, b):
        return square(solve(lambda w: cell(w, m, b), torch.zeros(3, 2)))

    got = TRANSFORMS[name](through_closure if closure else outer)(m, b)
    torch.testing.assert_close(got, TRANSFORMS[name](plain)(m, b), rtol=RTOL, atol=1e-11)


@pytest.mark.parametrize("vectorize", [False, True])
def test_functional_jacobian(vectorize):
    m, b = weights()
    got = jacobian(lambda m: solve(cell, torch.zeros(3, 2), m, b), m, vectorize=vectorize)
    close(got, jacobian(lambda m: unrolled(lambda w: cell(w, m, b), torch.zeros(3, 2)), m), rtol=RTOL)


def test_functional_call():
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, 0.2)
    x = torch.randn(3, 2)
    new = {name: (0.5 * p.detach()).requires_grad_() for name, p in layer.named_parameters()}

    def phi(w):
        return torch.tanh(functional_call(layer, new, (w,)) + x)

    got = torch.autograd.grad(square(solve(phi, torch.zeros(3, 2))), list(new.values()))
    want = torch.autograd.grad(square(unrolled(phi, torch.zeros(3, 2))), list(new.values()))
    for g, w in zip(got, want, strict=True):
        close(g, w, rtol=RTOL)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(run):
        return lambda p: square(run(lambda w: torch.tanh(functional_call(layer, p, (w,)) + x), torch.zeros(3, 2)))

    torch.testing.assert_close(grad(loss(solve))(params), grad(loss(unrolled))(params), rtol=RTOL, atol=1e-11)


@pytest.mark.slow
def test_a_compiled_map():
    m, b = weights()
    compiled = torch.compile(cell, backend="eager")
    got = torch.autograd.grad(square(solve(compiled, torch.zeros(3, 2), m, b)), [m, b])
    for g, w in zip(got, torch.autograd.grad(plain(m, b), [m, b]), strict=True):
        close(g, w, rtol=RTOL)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_custom_function_of_what_a_function_closes_over_is_right_twice():
    a = torch.tensor(0.3, requires_grad=True)
    twice = 1.0 * a
    w = solve(lambda w: torch.cos(Double.apply(twice) * w), torch.zeros(()))
    want = newton(lambda w: torch.cos(2 * a * w), torch.zeros(()), graph_steps=2)
    for _ in range(2):
        (w,), (want,) = (torch.autograd.grad(x, a, create_graph=True) for x in (w, want))
        close(w, want, rtol=RTOL)


def test_a_custom_function_of_a_hidden_parameter_is_right_once_and_refuses_twice():
    a = torch.tensor(0.3, requires_grad=True)
    hidden = SimpleNamespace(a=a)
    w = solve(lambda w: torch.cos(Double.apply(hidden.a) * w), torch.zeros(()))
    want = newton(lambda w: torch.cos(2 * a * w), torch.zeros(()))
    close(torch.autograd.grad(w, a, retain_graph=True)[0], torch.autograd.grad(want, a)[0])
    with pytest.raises(ClosureError, match="args="):
        torch.autograd.grad(w, a, create_graph=True)


def test_a_custom_function_of_a_hidden_computed_tensor_is_refused():
    a = torch.tensor(0.3, requires_grad=True)
    hidden = SimpleNamespace(twice=2 * a)
    with pytest.raises(ClosureError, match="custom autograd"):
        solve(lambda w: torch.cos(Double.apply(hidden.twice) * w), torch.zeros(()))


def test_a_loop_variable_is_right_once_and_never_wrong_twice():
    scales = [torch.tensor(s, requires_grad=True) for s in (0.3, 0.6)]
    values = []
    for s in scales:
        values.append(solve(lambda w: torch.cos(s * w), torch.zeros(())))  # noqa: B023 the trap itself
    for s, value in zip(scales, values, strict=True):
        want = newton(lambda w, s=s: torch.cos(s * w), torch.zeros(()))
        close(torch.autograd.grad(value, s, retain_graph=True)[0], torch.autograd.grad(want, s)[0])
    with pytest.raises(ClosureError, match="args="):
        torch.autograd.grad(values[0], scales[0], create_graph=True)


def test_a_solve_inside_the_map():
    a = torch.tensor(0.5, requires_grad=True)

    def run(inner):
        return lambda w: 0.5 * torch.cos(a * w) + 0.3 * inner(lambda u: 0.4 * torch.sin(a * u + w), torch.zeros(()))

    got = solve(run(solve), torch.zeros(()))
    want = unrolled(run(lambda f, u: unrolled(f, u, 40)), torch.zeros(()), 40)
    close(torch.autograd.grad(got, a, retain_graph=True)[0], torch.autograd.grad(want, a, retain_graph=True)[0], rtol=RTOL)
    second = torch.autograd.grad(torch.autograd.grad(got, a, create_graph=True)[0], a)[0]
    close(second, torch.autograd.grad(torch.autograd.grad(want, a, create_graph=True)[0], a)[0], rtol=RTOL)


def test_a_first_order_backward_never_calls_the_map():
    m, b = weights()
    phi = Counted(lambda w: cell(w, m, b))
    value = solve(phi, torch.zeros(3, 2))
    calls = phi.calls
    square(value).backward()
    assert phi.calls == calls
