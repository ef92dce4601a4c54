"""What a solve promises beyond its numbers: honest counts, rows that stop one by one, invariances, refusals of bad input."""

import copy
from typing import Any

import pytest
import torch
from core_reference import Counted, close, square

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
from hyperopt.core.policy import SolveError

pytestmark = pytest.mark.usefixtures("float64")

EXACT = Implicit(Neumann(1e-13, max_steps=3000), policy="raise")


def problem(rows=4, n=3, q=0.6):
    m = torch.randn(n, n)
    return (m * (q / torch.linalg.matrix_norm(m, 2))).requires_grad_(), torch.randn(rows, n).requires_grad_()


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("terms", [1, 2, 6])
def test_fixed_steps_and_terms_are_counted_and_equal_a_hand_written_loop(steps, terms):
    m, b = problem()
    phi = Counted(lambda w: torch.tanh(w @ m + b))
    sol = fixed_point(phi, torch.zeros(4, 3), solver=Picard(0, 0, steps), adjoint=Implicit(Neumann(0, 0, terms)))
    assert phi.calls == sol.forward.evaluations == steps and sol.status == Status.fixed_steps
    got = torch.autograd.grad(sol.value.sum(), [m, b])
    assert phi.calls == steps and sol.adjoint is not None and sol.adjoint.vjps == terms + 1
    w = torch.zeros(4, 3)
    for _ in range(steps):
        at = w.detach().requires_grad_()
        w = torch.tanh(at @ m + b)
    close(sol.value, w)
    v = g = torch.ones(4, 3)
    for _ in range(terms):
        v = torch.autograd.grad(w, at, v, retain_graph=True)[0] + g
    for x, y in zip(got, torch.autograd.grad(w, [m, b], v), strict=True):
        close(x, y)


def test_unrolled_fixed_steps_equal_autograd_through_the_loop():
    m, b = problem()
    phi = Counted(lambda w: torch.tanh(w @ m + b))
    sol = fixed_point(phi, torch.zeros(4, 3), solver=Picard(0, 0, 5), adjoint=Unrolled())
    w = torch.zeros(4, 3)
    for _ in range(5):
        w = torch.tanh(w @ m + b)
    assert phi.calls == sol.forward.evaluations == 5
    close(sol.value, w)
    close(torch.autograd.grad(square(sol.value), m)[0], torch.autograd.grad(square(w), m)[0])


@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled(last=60), EXACT])
def test_a_start_that_is_already_solved_has_the_whole_or_one_step_gradient_but_never_none(adjoint):
    b = torch.tensor([[2.0], [1.0]], requires_grad=True)
    start = 2 * b.detach()
    (got,) = torch.autograd.grad(fixed_point(lambda w: 0.5 * w + b, start, adjoint=adjoint).value.sum(), b)
    close(got, torch.full_like(b, 1.0 if adjoint == Unrolled() else 2.0))


def test_evaluations_are_the_calls_made():
    m, b = problem()
    plain = (Picard(1e-8), Anderson(1e-8), Picard(1e-8, damping=0.5), RRE(1e-8), Broyden(1e-8))
    for solver in (*plain, Broyden(1e-8, line_search=True), Newton(1e-8), Newton(0, 0, 3), Chord(1e-8), NewtonKrylov(1e-8)):
        for adjoint in (EXACT, Unrolled(), Unrolled(last=3), Unrolled(last=2)):
            if adjoint.last is None if isinstance(adjoint, Unrolled) and not solver.differentiable else False:
                continue
            phi = Counted(lambda w: torch.tanh(w @ m + b))
            assert fixed_point(phi, torch.zeros(4, 3), solver=solver, adjoint=adjoint).forward.evaluations == phi.calls


ROWS = [
    Picard(1e-8, max_steps=2000),
    Anderson(1e-8, max_steps=200),
    RRE(1e-8, max_steps=200),
    Broyden(1e-8),
    Broyden(1e-8, memory=3, line_search=True),
    Newton(1e-8),
    Newton(1e-8, line_search=True),
    Chord(1e-8),
    NewtonKrylov(1e-8),
]


@pytest.mark.parametrize("solver", ROWS)
def test_09_rows_stop_one_by_one_and_cost_nothing_more(solver):
    q = torch.tensor([0.1, 0.5, 0.9, 0.98]).reshape(4, 1).requires_grad_()
    phi = Counted(lambda w, q: q * torch.sin(w) + 1)
    sol = fixed_point(phi, torch.zeros(4, 2), (q,), row_args=(0,), solver=solver, adjoint=EXACT, policy="raise")
    steps = sol.forward.iterations
    assert int(steps[0]) < int(steps[2]) and sol.status == Status.converged
    assert min(phi.rows) < 4 and phi.rows[-1] == 4 and phi.rows[0] == 4
    for i in range(4):
        alone = fixed_point(lambda w, i=i: q[i] * torch.sin(w) + 1, torch.zeros(1, 2), solver=solver, adjoint=EXACT)
        close(sol.value[i], alone.value[0], rtol=1e-5)
        assert abs(int(steps[i]) - int(alone.forward.iterations)) <= 1
        got, want = (torch.autograd.grad(x.sum(), q, retain_graph=True)[0][i] for x in (sol.value, alone.value))
        close(got, want, rtol=1e-4)


@pytest.mark.parametrize("solver", [Picard(1e-8, max_steps=4000), *ROWS[1:]])
def test_09_coupled_rows_are_found(solver):
    n = 12
    g = torch.diag(torch.full((n - 1,), 0.95), 1)  # a path: row i waits for row i + 1
    b = torch.zeros(n, 1)
    b[-1] = 1.0
    want = torch.linalg.solve(torch.eye(n) - g, b)
    sol = fixed_point(lambda w: g @ w + b, torch.zeros(n, 1), rows="batch", solver=solver, policy="ignore")
    # Picard's steps do not mind. A Jacobian taken row by row is wrong here, and the steps by it lead away: their residual tells.
    expected = {Picard: Status.converged, Newton: Status.diverged, Chord: Status.diverged}
    assert sol.status == expected.get(type(solver), Status.coupled_rows)
    if sol.status == Status.converged:
        close(sol.value, want, rtol=1e-5)
    joint = fixed_point(lambda w: g @ w + b, torch.zeros(n, 1), rows="joint", solver=solver, policy="raise")
    close(joint.value, want, rtol=1e-5)


@pytest.mark.parametrize("linear_solver", [Neumann(1e-10, max_steps=500), LinearAnderson(1e-10)])
def test_a_warm_start_of_the_adjoint_saves_vjps_and_gives_the_same_gradient(linear_solver):
    m, b = problem(q=0.9)

    def solve(shift, v0=None) -> Any:
        phi = lambda w: {"x": torch.tanh(w["x"] @ m + b + shift)}  # noqa: E731
        adjoint = Implicit(linear_solver, policy="raise")
        sol = fixed_point(phi, {"x": torch.zeros(4, 3)}, solver=Picard(1e-12, max_steps=999), adjoint=adjoint, v0=v0)
        assert sol.v is None
        (grad,) = torch.autograd.grad(sol.value["x"].sum(), m)
        assert sol.adjoint is not None
        return sol.v, grad, sol.adjoint.vjps

    v, cold, many = solve(0.0)
    assert v["x"].shape == (4, 3) and not v["x"].requires_grad
    _, warm, few = solve(0.0, v)
    assert few <= 3 < many
    close(warm, cold, rtol=1e-8)
    close(solve(1e-3, v)[1], solve(1e-3)[1], rtol=1e-8)
    with pytest.raises(ValueError, match="structure"):
        solve(0.0, v["x"])


def test_invariances_of_rows_structure_and_splitting():
    m, b = problem(5)
    order = torch.randperm(5)

    def run(b, start):
        w = fixed_point(lambda w: torch.tanh(w @ m + b), start, solver=Picard(1e-14, max_steps=500), adjoint=EXACT).value
        return w, torch.autograd.grad(square(w), m)[0]

    w, grad = run(b, torch.zeros(5, 3))
    shuffled, shuffled_grad = run(b[order], torch.zeros(5, 3))
    close(shuffled, w[order])
    close(shuffled_grad, grad)
    single = [run(b[i : i + 1], torch.zeros(1, 3)) for i in range(5)]
    close(torch.cat([x for x, _ in single]), w)
    close(sum(g for _, g in single), grad)
    trees = {"tuple": lambda x, y: (x, y), "list": lambda x, y: [x, y], "dict": lambda x, y: {"b": x, "a": y}}
    for make in trees.values():

        def phi(tree, make=make):
            x, y = tree.values() if isinstance(tree, dict) else tree
            x, y = (tree["b"], tree["a"]) if isinstance(tree, dict) else (x, y)
            new = torch.tanh(torch.cat([x, y], 1) @ m + b)
            return make(new[:, :1], new[:, 1:])

        sol = fixed_point(phi, make(torch.zeros(5, 1), torch.zeros(5, 2)), solver=Picard(1e-14, max_steps=500), adjoint=EXACT)
        close(torch.autograd.grad(square(sol.value), m)[0], grad)


def test_float32_agrees_with_float64_to_its_precision():
    m, b = problem()
    grads = []
    for dtype in (torch.float32, torch.float64):
        p, c = m.detach().to(dtype).requires_grad_(), b.detach().to(dtype)
        w = fixed_point(lambda w, p=p, c=c: torch.tanh(w @ p + c), torch.zeros(4, 3, dtype=dtype)).value
        assert w.dtype == dtype
        grads.append(torch.autograd.grad(w.sum(), p)[0].double())
    close(grads[0], grads[1], rtol=1e-3)


BAD_STATES = {
    "integer": (lambda: torch.zeros(2, 3, dtype=torch.long), lambda w: w, TypeError, "floating-point"),
    "shape": (lambda: torch.zeros(2, 3), lambda w: w[:, :2], ValueError, "changed the shape"),
    "structure": (lambda: torch.zeros(2, 3), lambda w: (w, w), ValueError, "structure"),
    "type": (lambda: (torch.zeros(2, 3),), lambda w: (1.0,), TypeError, "must be a tensor"),
    "integer map": (lambda: torch.zeros(2, 3), lambda w: w.long(), TypeError, "floating-point"),
    "dtype": (lambda: torch.zeros(2).float(), lambda w: w.double(), TypeError, "changed the dtype of leaf 0.*float64.*float32"),
    "in place": (lambda: torch.zeros(2, 3), lambda w: w.mul_(0.5).add_(1), (ValueError, RuntimeError), "in.place"),
    "in place, a leaf": (lambda: [torch.zeros(2, 3)], lambda w: [w[0].add_(1)], (ValueError, RuntimeError), "in.place"),
    "requires grad": (lambda: torch.zeros(2, 3).requires_grad_(), lambda w: w, ValueError, r"use w0.detach\(\)"),
    "devices": (lambda: (torch.zeros(2), torch.zeros(2, device="meta")), lambda w: w, ValueError, "mixes devices cpu and meta"),
    "device": (lambda: torch.zeros(2), lambda w: w.to("meta"), ValueError, "moved leaf 0 of the state to meta, w0 is on cpu"),
    "nothing": (lambda: (), lambda w: w, ValueError, "no tensors"),
}


@pytest.mark.parametrize("name", BAD_STATES)
@pytest.mark.parametrize("adjoint", [EXACT, Unrolled()])
def test_15_bad_states_are_refused(name, adjoint):
    w0, phi, error, match = BAD_STATES[name]
    if name == "requires grad" and adjoint.reaches_start(Picard()):
        pytest.skip("an unrolled iterate is differentiable in where it starts")
    with pytest.raises(error, match=match):
        fixed_point(phi, w0(), adjoint=adjoint)


def test_15_a_map_without_parameters():
    assert not fixed_point(lambda w: 0.5 * w + 1, torch.zeros(2, 3)).value.requires_grad
    unused = torch.ones((), requires_grad=True)
    w = fixed_point(lambda w, u: 0.5 * w + 1, torch.zeros(2, 3), (unused,)).value
    assert not w.requires_grad or torch.autograd.grad(w.sum(), unused, allow_unused=True)[0] in (None, 0)


@pytest.mark.parametrize("adjoint", [EXACT, Unrolled()])
def test_15_nan_in_all_rows_raises(adjoint):
    with pytest.raises(SolveError, match="NaN"):
        fixed_point(lambda w: w * float("nan"), torch.ones(2, 3), adjoint=adjoint, policy="raise")


REFUSED = [
    (lambda: Picard(rtol=-1.0), "Picard: rtol=-1.0"),
    (lambda: Picard(damping=0.0), "Picard: damping=0.0"),
    (lambda: Picard(max_steps=0), "Picard: max_steps=0"),
    (lambda: Picard(max_steps=2.5), "Picard: max_steps=2.5"),  # pyright: ignore[reportArgumentType]
    (lambda: Anderson(window=0), "Anderson: window=0"),
    (lambda: Anderson(ridge=float("nan")), "Anderson: ridge=nan"),
    (lambda: LinearAnderson(atol=float("inf")), "LinearAnderson: atol=inf"),
    (lambda: Neumann(max_steps=True), "Neumann: max_steps=True"),
    (lambda: Implicit(policy="wran"), "Implicit: policy='wran'"),
    (lambda: Unrolled(last=0), "Unrolled: last=0"),
    (lambda: Anderson(ridge=-1e-3), "Anderson: ridge=-0.001"),
    (lambda: Anderson(restart=1), "Anderson: restart=1"),  # pyright: ignore[reportArgumentType]
    (lambda: RRE(window=0), "RRE: window=0"),
    (lambda: Broyden(memory=0), "Broyden: memory=0"),
    (lambda: Broyden(line_search="yes"), "Broyden: line_search='yes'"),  # pyright: ignore[reportArgumentType]
    (lambda: Newton(max_gib=0.0), "Newton: max_gib=0.0"),
    (lambda: Newton(line_search=None), "Newton: line_search=None"),  # pyright: ignore[reportArgumentType]
    (lambda: Chord(refresh=0.0), "Chord: refresh=0.0"),
    (lambda: Chord(refresh=1.5), "Chord: refresh=1.5"),
    (lambda: NewtonKrylov(forcing=2.0), "NewtonKrylov: forcing=2.0"),
    (lambda: NewtonKrylov(line_search=1), "NewtonKrylov: line_search=1"),  # pyright: ignore[reportArgumentType]
    (lambda: Shine(ratio=0.0), "Shine: ratio=0.0"),
    (lambda: Shine(policy="fallback"), "Shine: policy='fallback' is not one of raise, warn, ignore"),
    (lambda: Implicit(allow_inexact="no"), "Implicit: allow_inexact='no' must be true or false"),  # pyright: ignore[reportArgumentType]
    (lambda: fixed_point(torch.cos, torch.zeros(1), policy="wran"), "policy='wran'"),
    (lambda: fixed_point(torch.cos, torch.zeros(1), rows="bach"), "rows='bach'"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_16_bad_settings_name_the_field_and_the_value(make, match):
    with pytest.raises(ValueError, match=match):
        make()


PARTS: list[tuple[Any, str]] = [
    (lambda: Implicit(Picard()), r"Implicit: linear_solver=Picard\(.*\) is not a LinearSolver; change linear_solver"),  # type: ignore
    (lambda: Implicit(None), "Implicit: linear_solver=None is not a LinearSolver"),  # pyright: ignore[reportArgumentType]
    (lambda: Implicit(Neumann), "is not a LinearSolver"),  # pyright: ignore[reportArgumentType]
    (lambda: Implicit(policy="fallback", fallback=Neumann()), r"Implicit: fallback=Neumann\(.*\) is not a list of LinearSolver"),  # type: ignore
    (
        lambda: Implicit(policy="fallback", fallback=[Neumann(), Picard()]),  # type: ignore
        r"fallback=\[.*Picard.*\] is not a list of LinearSolver",
    ),
    (lambda: Implicit(policy="fallback", fallback="Neumann"), "fallback='Neumann' is not a list of LinearSolver"),  # type: ignore
    (lambda: Shine(linear_solver=Anderson()), r"Shine: linear_solver=Anderson\(.*\) is not a LinearSolver"),  # type: ignore
    (lambda: NewtonKrylov(linear_solver=None), "NewtonKrylov: linear_solver=None is not a LinearSolver"),  # type: ignore
]


@pytest.mark.parametrize(("make", "match"), PARTS, ids=[match for _, match in PARTS])
def test_16_a_part_of_another_kind_is_refused(make, match):
    with pytest.raises(TypeError, match=match):
        make()


def test_16_a_list_of_fallbacks_is_kept_as_a_tuple():
    listed, kept = (Implicit(policy="fallback", fallback=kind([Neumann(), LinearAnderson()])) for kind in (list, tuple))
    assert listed == kept and hash(listed) == hash(kept)


def test_16_unknown_keywords_are_refused_and_nothing_of_the_caller_changes():
    solvers = (Picard, Anderson, RRE, Broyden, Newton, Chord, NewtonKrylov)
    for make in (*solvers, Neumann, LinearAnderson, Implicit, Unrolled, Shine):
        with pytest.raises(TypeError, match="max_iter"):
            make(max_iter=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="tol"):
        fixed_point(torch.cos, torch.zeros(1), tol=1e-3)  # pyright: ignore[reportCallIssue]
    w0, b = {"x": torch.zeros(2, 3), "y": [torch.ones(2, 1)]}, torch.randn(2, 3, requires_grad=True)
    solver, before = Anderson(1e-8), copy.deepcopy((w0, b.detach()))
    value = fixed_point(lambda w, b: {"x": 0.5 * w["x"] + b, "y": [0.5 * w["y"][0].cos()]}, w0, (b,), solver=solver).value
    square(value).backward()
    torch.testing.assert_close((w0, b.detach()), before, rtol=0, atol=0)
    assert solver == Anderson(1e-8)


@pytest.mark.parametrize("atol", [0.0, 1e-3])
def test_the_trace_is_of_relative_residuals_whatever_the_tolerance(atol):
    m, b = problem()
    sol = fixed_point(lambda w: 100 * torch.tanh(w @ m / 100 + b), torch.zeros(4, 3), solver=Picard(1e-8, atol))
    w, want = torch.zeros(4, 3), []
    for _ in range(sol.forward.evaluations):
        fw = (100 * torch.tanh(w @ m / 100 + b)).detach()
        want.append(float((torch.linalg.vector_norm(fw - w, dim=1) / torch.linalg.vector_norm(fw, dim=1)).max()))
        w = fw
    assert sol.status == Status.converged
    close(sol.forward.trace[-1], torch.tensor(want[-1]), rtol=1e-6)
    close(sol.forward.trace, torch.tensor(want), rtol=1e-9 if atol else 0.1)  # else by the scale at the next look
