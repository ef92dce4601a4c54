"""``torch.compile`` of a function that contains ``fixed_point``: one graph for fixed trip counts, the eager path for the rest."""

from typing import Any

import pytest
import torch
from core_reference import close, square

from hyperopt import Implicit, Neumann, Picard, Status, Unrolled, fixed_point
from hyperopt.nn.contractive import ProjectedMatrix
from hyperopt.nn.equilibrium import EquilibriumCell, EquilibriumModel, linear_classifier

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # of the compiler's own, when it looks for gradients of non-leaves, and compiles an autograd.Function
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FIXED = {"solver": Picard(0.0, max_steps=6), "adjoint": Implicit(Neumann(0.0, max_steps=5))}
# Compiled graphs reorder sums.
RTOL = 1e-12


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def tanh(w, u, a):
    return torch.tanh(w @ a + u)


def inputs(rows=3, n=4):
    return torch.randn(rows, n, requires_grad=True), (0.3 * torch.randn(n, n)).requires_grad_()


def gradients(loss, *given):
    return torch.autograd.grad(loss(*given), given)


def same(loss, *given, backend="eager", fullgraph=True):
    compiled: Any = torch.compile(loss, fullgraph=fullgraph, backend=backend)
    for got, want in zip(gradients(compiled, *given), gradients(loss, *given), strict=True):
        close(got, want, rtol=RTOL)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize(  # every two values once
    ("backend", "rows", "damping"),
    [("eager", "batch", 1.0), ("eager", "joint", 0.7), ("aot_eager", "batch", 0.7), ("aot_eager", "joint", 1.0)],
)
def test_fixed_trips_are_one_graph_with_the_numbers_of_the_eager_path(backend, rows, damping):
    def loss(u, a):
        solver = Picard(0.0, max_steps=6, damping=damping)
        found = fixed_point(tanh, torch.zeros_like(u), (u, a), rows=rows, solver=solver, adjoint=FIXED["adjoint"])
        return square(found.value)

    same(loss, *inputs(), backend=backend)


@pytest.mark.slow
def test_by_inductor():
    same(lambda u, a: square(fixed_point(tanh, torch.zeros_like(u), (u, a), **FIXED).value), *inputs(), backend="inductor")


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize(("trips", "terms"), [(1, 1), (1, 4), (7, 1)])
def test_any_number_of_trips(trips, terms):
    methods: Any = {"solver": Picard(0.0, max_steps=trips), "adjoint": Implicit(Neumann(0.0, max_steps=terms))}
    same(lambda u, a: square(fixed_point(tanh, torch.zeros_like(u), (u, a), **methods).value), *inputs())


@pytest.mark.slow
def test_several_variables_and_arguments_that_are_no_tensors():
    def phi(s, u, a, scale, names):
        assert names == ("x", "y")
        x, y = s["x"], s["y"]
        return {"x": torch.tanh(scale * y @ a + u), "y": 0.5 * torch.sin(x @ a.T)}

    def loss(u, a):
        w0 = {"x": torch.zeros_like(u), "y": u.new_zeros(u.shape[0], a.shape[0])}
        value = fixed_point(phi, w0, (u, a, 0.3, ("x", "y")), **FIXED).value
        return square(value["x"]) + value["y"].sum()

    same(loss, torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True))


def test_the_statistics_come_out_of_the_graph():
    u, a = inputs()

    def solve(u, a):
        return fixed_point(tanh, torch.zeros_like(u), (u, a), **FIXED)

    compiled: Any = torch.compile(solve, fullgraph=True, backend="eager")
    got, want = compiled(u, a), solve(u, a)
    close(got.value, want.value, rtol=RTOL)
    close(got.forward.residual, want.forward.residual, rtol=RTOL)
    assert got.status is Status.fixed_steps and got.forward.evaluations == want.forward.evaluations
    got.value.sum().backward()
    assert got.adjoint is None  # a compiled backward leaves nothing behind, and nothing is made up
    assert compiled(u * torch.nan, a).status is Status.nonfinite


def test_the_equilibrium_model_is_one_graph():
    cell = EquilibriumCell(5, 4, ProjectedMatrix(4, 0.9, 0.3))
    model: Any = EquilibriumModel(cell, linear_classifier(4, 3), **FIXED)
    x, compiled = torch.randn(6, 5), torch.compile(model, fullgraph=True, backend="eager")
    want = torch.autograd.grad(square(model(x)), list(model.parameters()))
    for g, w in zip(torch.autograd.grad(square(compiled(x)), list(model.parameters())), want, strict=True):
        close(g, w, rtol=RTOL)


def test_a_map_in_place_cannot_spoil_the_graph():
    def phi(w, u, a):
        return w.mul_(0.5).add_(torch.tanh(u @ a))

    def solve(u, a):
        return fixed_point(phi, torch.zeros_like(u), (u, a), **FIXED).value.sum()

    def by_hand(u, a):
        w = torch.zeros_like(u)
        for _ in range(6):
            w = 0.5 * w + torch.tanh(u @ a)
        return w.sum()

    u, a = inputs()
    compiled: Any = torch.compile(solve, fullgraph=True, backend="eager")
    close(compiled(u, a), by_hand(u, a), rtol=RTOL)
    with pytest.raises(ValueError, match="in place"):
        solve(u, a)


REFUSED = {
    "a tolerance": lambda u, a: fixed_point(tanh, torch.zeros_like(u), (u, a)),
    "a closure": lambda u, a: fixed_point(lambda w: torch.tanh(w @ a + u), torch.zeros_like(u), **FIXED),
    "one closed over": lambda u, a: fixed_point(lambda w, u: torch.tanh(w @ a + u), torch.zeros_like(u), (u,), **FIXED),
    "a tree": lambda u, a: fixed_point(lambda w, p: torch.tanh(w @ p[1] + p[0]), torch.zeros_like(u), ((u, a),), **FIXED),
    "unrolling": lambda u, a: fixed_point(tanh, torch.zeros_like(u), (u, a), solver=FIXED["solver"], adjoint=Unrolled()),
}


@pytest.mark.cases(slow=2)
@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_graph_runs_beside_it_and_loses_no_gradient(what):
    def loss(u, a):
        return square(REFUSED[what](2 * u, a).value)

    u, a = inputs()
    same(loss, u, a, fullgraph=False)
    torch._dynamo.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="compiles as one graph with Picard"):
        compiled(u, a)
