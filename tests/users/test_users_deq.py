"""Cells as users write them in a DEQ: states of any size and structure, lazy modules, graphs, copies; and vmap over solves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt as ho
from hyperopt.nn import DEQ

D: dict[str, Any] = {"dtype": torch.float64}
TIGHT = ho.Picard(rtol=1e-12, max_steps=1000)
EXACT = ho.Implicit(ho.GMRES(rtol=1e-11, max_steps=200))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **D)


class Cell(nn.Module):
    """``tanh(W z + U x)`` with a state of ``size`` entries."""

    def __init__(self, size: int = 6, features: int = 9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.u = nn.Linear(size, size, **D), nn.Linear(features, size, **D)
        self.w.weight.data *= 0.5

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) + self.u(x))


class Owns(Cell):
    """The same, which says itself where a solve starts."""

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 6)


class Two(nn.Module):
    """A state of two tensors of different sizes, in a tuple or a dict."""

    def __init__(self, kind: type = tuple) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.u, self.c = (nn.Linear(m, n, **D) for m, n in ((3, 3), (5, 5), (9, 3), (3, 5)))

    def forward(self, z: Any, x: Tensor) -> Any:
        a, b = z if self.kind is tuple else (z["a"], z["b"])
        new = torch.tanh(0.4 * self.a(a) + self.u(x)), torch.tanh(0.4 * self.b(b) + 0.5 * self.c(a))
        return new if self.kind is tuple else {"a": new[0], "b": new[1]}

    def start(self, x: Tensor) -> Any:
        zeros = x.new_zeros(len(x), 3), x.new_zeros(len(x), 5)
        return zeros if self.kind is tuple else {"a": zeros[0], "b": zeros[1]}


def total(out: Any) -> Tensor:
    leaves = out if isinstance(out, tuple) else out.values() if isinstance(out, dict) else (out,)
    return sum((leaf * drawn(*leaf.shape, seed=7)).sum() for leaf in leaves)  # pyright: ignore[reportReturnType]


def check_gradient(layer: DEQ, x: Any, parameter: Any, rel: float = 1e-6) -> None:
    """The gradient of ``total`` in a parameter along a direction, against a difference of solves that are one joint row."""
    total(layer(x)).backward()
    way, h = drawn(*parameter.shape, seed=8), 1e-5
    joint = DEQ(layer.cell, TIGHT, rows="joint", initial=layer.initial)
    values = []
    with torch.no_grad():
        for step in (h, -2 * h):
            parameter += step * way
            values.append(float(total(joint(x))))
        parameter += h * way
    assert parameter.grad is not None
    assert float((parameter.grad * way).sum()) == pytest.approx((values[0] - values[1]) / (2 * h), rel=rel)


# ---- states of another size or structure


@pytest.mark.parametrize("given", ["initial", "the cell's own"])
def test_a_state_of_another_size_than_the_input(given: str) -> None:
    cell = Cell() if given == "initial" else Owns()
    layer = DEQ(cell, TIGHT, EXACT, initial=(lambda x: x.new_zeros(len(x), 6)) if given == "initial" else None)
    assert layer(drawn(4, 9)).shape == (4, 6)
    check_gradient(layer, drawn(4, 9), cell.w.weight)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_state_of_several_tensors(kind: type) -> None:
    cell = Two(kind)
    check_gradient(DEQ(cell, TIGHT, EXACT, initial=cell.start), drawn(4, 9), cell.c.weight)


class Reshaped(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.u(x)) + 0 * z.sum()


class Pair(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Any:
        return z, self.u(x)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Cell(), r"cannot be multiplied \(4x9 and 6x6\).*like its input, of shape \(4, 9\).*initial"),
        (Two(), r"too many values to unpack.*of shape \(4, 9\).*initial"),
        (Two(dict), r"new\(\): invalid data type.*of shape \(4, 9\).*initial"),
        (Reshaped(), r"got \(4, 6\), expected \(4, 9\).*initial"),
        (Pair(), r"changed the structure of the state.*initial"),
    ],
)
def test_a_missing_initial_state_is_named_with_the_shapes(cell: nn.Module, words: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
        DEQ(cell)(drawn(4, 9))


def test_another_failure_is_not_taken_for_a_missing_initial_state() -> None:
    class InPlace(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z.mul_(0.5).add(x)

    with pytest.raises((ValueError, RuntimeError), match="in place") as error:
        DEQ(InPlace())(drawn(4, 9))
    assert "initial" not in str(error.value)
    with pytest.raises(ho.SolveError):
        DEQ(Cell(9), ho.Picard(max_steps=2), policy="raise")(drawn(4, 9))


# ---- lazy modules


class Lazy(nn.Module):
    """The size of the input, of the state, or of both, is not said."""

    def __init__(self, state: bool, norm: bool = False) -> None:
        super().__init__()
        self.w = nn.LazyLinear(6, **D) if state else nn.Linear(6, 6, **D)
        self.u = nn.LazyLinear(6, **D)
        self.norm = nn.LazyBatchNorm1d(affine=False, **D) if norm else nn.Identity()
        self.drop = nn.Dropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.w(z) + self.drop(self.norm(self.u(x))))


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("rows", ["auto", "joint"])
def test_lazy_modules_get_their_sizes_at_the_first_call(state: bool, rows: str) -> None:
    torch.manual_seed(0)
    cell = Lazy(state).eval()
    layer = DEQ(cell, TIGHT, EXACT, rows=rows, initial=lambda x: x.new_zeros(len(x), 6))
    assert layer(drawn(4, 9)).shape == (4, 6)
    assert cell.u.weight.shape == (6, 9) and cell.w.weight.shape == (6, 6)
    check_gradient(layer, drawn(4, 9), cell.w.weight)


def test_a_lazy_cell_alone_finds_its_state() -> None:
    """Neither size is said: zeros like the input are tried out in a copy, and do not stay."""
    cell = Lazy(True)
    cell.eval()
    assert DEQ(cell)(drawn(4, 9)).shape == (4, 6)
    assert cell.w.weight.shape == (6, 6)


def test_lazy_modules_leave_modes_and_statistics_as_one_forward_would() -> None:
    torch.manual_seed(0)
    cell, x = Lazy(True, norm=True), drawn(8, 9)
    layer = DEQ(cell, initial=lambda x: x.new_zeros(len(x), 6))
    layer(x)
    assert all(module.training for module in layer.modules())
    assert int(cell.norm.num_batches_tracked) == 1  # pyright: ignore[reportArgumentType]
    assert torch.allclose(cell.norm.running_mean, 0.1 * cell.u(x).mean(0))  # pyright: ignore[reportArgumentType]


def test_lazy_modules_elsewhere_are_named() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias of Sequential have no size yet: call the module once"):
        ho.Functional(net)
    with pytest.raises(ho.ImpureMapError, match=r"LazyLinear.*no size yet: call it once"):
        ho.fixed_point(lambda w: 0.1 * net(w), torch.zeros(2, 3))
    problem = ho.BilevelProblem(lambda w, lam, batch: lam, lambda w, lam, batch: lam)
    with pytest.raises(ValueError, match=r"w\['0\.bias'\] belongs to a lazy module"):
        ho.hypergradient(problem, dict(net.named_parameters()), torch.ones(()))
    net(torch.zeros(1, 4))
    assert ho.Functional(net).w["0.weight"].shape == (3, 4)


# ---- copies


@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy", "state_dict"])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_layer_gives_the_same_numbers(how: str, used: bool) -> None:
    layer, x = nn.Sequential(nn.Linear(9, 9, **D), DEQ(Cell(9, 9), ho.Anderson(), EXACT), nn.Linear(9, 2, **D)), drawn(4, 9)
    if used:
        layer(x).sum().backward()
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif how == "state_dict":
        other = nn.Sequential(nn.Linear(9, 9, **D), DEQ(Cell(9, 9), ho.Anderson(), EXACT), nn.Linear(9, 2, **D))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    else:
        other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    one, two = (torch.autograd.grad(net(x).sum(), list(net.parameters())) for net in (layer, other))
    assert all(map(torch.equal, one, two))


# ---- rows that depend on each other


NODES = 11
ADJACENCY = (drawn(NODES, NODES, seed=3) > 0.7).double() + torch.eye(NODES, **D)
ADJACENCY = ADJACENCY / ADJACENCY.sum(1, keepdim=True)
TARGET, SOURCE = ADJACENCY.nonzero().T
WEIGHT = ADJACENCY[TARGET, SOURCE]

PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda h: ADJACENCY @ h,
    "sparse": lambda h: torch.sparse.mm(ADJACENCY.to_sparse(), h),
    "compressed": lambda h: ADJACENCY.to_sparse_csr() @ h,
    "index_add": lambda h: torch.zeros_like(h).index_add(0, TARGET, WEIGHT[:, None] * h[SOURCE]),
    "index_add_": lambda h: torch.zeros_like(h).index_add_(0, TARGET, WEIGHT[:, None] * h[SOURCE]),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(0, TARGET[:, None].expand(-1, 3), WEIGHT[:, None] * h[SOURCE]),
    "attention": lambda h: torch.softmax(h @ h.T, dim=1) @ h,
    "mean": lambda h: h.mean(0, keepdim=True).expand_as(h),
    "one edge": lambda h: torch.cat([h[:-1], 0.5 * h[3:4]]),
}


class Graph(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.w = kind, nn.Linear(3, 3, bias=False, **D)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(PASSING[self.kind](0.9 * self.w(z)) + x)


METHODS = [
    (TIGHT, ho.Implicit(ho.Neumann(rtol=1e-11, max_steps=1000))),
    (TIGHT, ho.Implicit(ho.GMRES(rtol=1e-11, max_steps=200))),
    (TIGHT, ho.Implicit(ho.Dense())),
    (ho.Anderson(rtol=1e-11, max_steps=300), EXACT),
    (ho.Newton(rtol=1e-12), EXACT),
    (TIGHT, ho.Unrolled()),
]


@pytest.mark.cases(quick=2, slow=8)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("rows", ["joint", "auto"])
def test_the_gradient_of_a_graph_network(kind: str, rows: str) -> None:
    for solver, adjoint in METHODS:
        cell = Graph(kind)
        layer = DEQ(cell, solver, adjoint, rows=rows)
        check_gradient(layer, drawn(NODES, 3), cell.w.weight, rel=1e-5)
        assert layer.solution is not None and not layer.solution.forward.status.failed


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", PASSING)
def test_rows_that_are_said_to_be_independent_and_are_not_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"rows='batch', but rows of the cell's output depend on other rows.*rows='joint'"):
        DEQ(Graph(kind), rows="batch")(drawn(NODES, 3))


@pytest.mark.parametrize("rows", ["auto", "batch"])
@pytest.mark.parametrize("cell", [Cell(9), Two(), nn.Bilinear(9, 9, 9, **D)], ids=lambda cell: type(cell).__name__)
def test_independent_rows_stay_rows_of_their_own(rows: str, cell: nn.Module) -> None:
    layer = DEQ(cell, rows=rows, initial=cell.start if isinstance(cell, Two) else None, policy="ignore")
    layer(0.1 * drawn(5, 9))
    assert layer.solution is not None and layer.solution.forward.iterations.shape == (5,)


def test_a_graph_that_comes_with_the_input() -> None:
    class Given(Graph):
        def forward(self, z: Tensor, x: Any) -> Tensor:
            return torch.tanh(x["adjacency"] @ (0.9 * self.w(z)) + x["features"])

    cell, x = Given("dense"), {"adjacency": ADJACENCY.clone().requires_grad_(), "features": drawn(NODES, 3)}
    layer = DEQ(cell, TIGHT, EXACT, initial=lambda x: torch.zeros_like(x["features"]))
    check_gradient(layer, x, cell.w.weight)
    assert x["adjacency"].grad is not None and float(x["adjacency"].grad.norm()) > 0
    with pytest.raises(TypeError, match="x is a dict, which does not tell the shape of a state; set initial"):
        DEQ(cell)(x)


# ---- vmap, empty batches, no dimensions


def test_vmap_over_gradients_of_solves() -> None:
    def loss(a: Tensor) -> Tensor:
        sol = ho.fixed_point(lambda w, a: torch.cos(a * w), torch.zeros(3, **D), args=(a,), solver=TIGHT, adjoint=EXACT)
        return sol.value.square().sum()

    a = 0.5 + drawn(5).abs().clamp(max=0.5)
    assert torch.allclose(
        torch.func.vmap(torch.func.grad(loss))(a), torch.stack([torch.func.grad(loss)(x) for x in a]), rtol=1e-9
    )
    eager = a.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(torch.stack([loss(x) for x in eager]).sum(), eager)
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(a), wanted, rtol=1e-9)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("inner", [ho.GradientDescent(step_size=0.2), ho.HeavyBall(step_size=0.2, momentum=0.3)])
@pytest.mark.parametrize("adjoint", [EXACT, ho.Unrolled()], ids=["implicit", "unrolled"])
def test_vmap_over_hypergradients_of_trained_problems(inner: Any, adjoint: Any) -> None:
    """Ridge regression for many penalties at once, against its closed form."""
    x, y = drawn(12, 4), drawn(12, seed=1)
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (x @ w - y).square().mean() + lam.exp() * w.square().sum(),
        lambda w, lam, batch: (x.flip(0) @ w - y).square().mean(),
    )
    phi = ho.GradientMap(problem, inner)

    def objective(lam: Tensor) -> Tensor:
        solver = ho.Picard(rtol=1e-13, max_steps=2000)
        start = phi.start(torch.zeros(4, **D))
        state = ho.fixed_point(phi, start, (lam,), rows="joint", solver=solver, adjoint=adjoint, policy="ignore").value
        return problem.outer(phi.weights(state), lam, None)

    def closed(lam: Tensor) -> Tensor:
        w = torch.linalg.solve(x.T @ x / 12 + lam.exp() * torch.eye(4, **D), x.T @ y / 12)
        return (x.flip(0) @ w - y).square().mean()

    lams = drawn(3, seed=2) - 1
    wanted = torch.func.vmap(torch.func.grad(closed))(lams)
    assert torch.allclose(torch.func.vmap(torch.func.grad(objective))(lams), wanted, rtol=1e-7)
    assert torch.allclose(torch.stack([torch.func.grad(objective)(lam) for lam in lams]), wanted, rtol=1e-7)


def test_a_hypergradient_inside_a_transform_is_refused_with_the_way_to_do_it() -> None:
    problem = ho.BilevelProblem(lambda w, lam, batch: (w - lam).square().sum(), lambda w, lam, batch: w.square().sum())
    for inner in (None, ho.GradientDescent(max_steps=3)):
        with pytest.raises(RuntimeError, match=r"fixed_point\(GradientMap\(problem, inner\)"):
            torch.func.vmap(lambda lam, inner=inner: ho.hypergradient(problem, torch.zeros(2), lam, inner=inner).grad)(
                torch.ones(3, 2)
            )


@pytest.mark.parametrize("cell", [Cell(9), Owns()], ids=["like the input", "another size"])
def test_an_empty_batch(cell: Cell) -> None:
    out = DEQ(cell)(drawn(4, 9)[:0])
    assert out.shape == (0, cell.w.out_features)
    out.sum().backward()
    assert cell.w.weight.grad is not None and not cell.w.weight.grad.any()


@pytest.mark.parametrize("rows", ["auto", "joint"])
def test_what_follows_may_change_the_output_in_place(rows: str) -> None:
    x = drawn(4, 9, seed=2)

    def gradient(inplace: bool) -> list[Tensor]:
        layer = DEQ(Cell(9), TIGHT, EXACT, rows=rows)
        found = layer(x)
        if inplace:
            found += x
        else:
            found = found + x
        out = nn.ReLU(inplace=inplace)(found)
        assert layer.solution is not None and bool((layer.solution.value < 0).any())  # still the solution
        return list(torch.autograd.grad(out.pow(3).sum(), list(layer.parameters())))

    for one, two in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        layer = DEQ(Cell(9), TIGHT)
        layer(x).zero_()
    assert layer.solution is not None and bool(layer.solution.value.any())


@pytest.mark.parametrize("adjoint", [EXACT, ho.OneStep(), ho.Unrolled(), ho.Checkpointed()], ids=lambda a: type(a).__name__)
def test_each_leaf_of_a_solution_may_be_changed_in_place(adjoint: Any) -> None:
    def gradient(change: Callable[[Tensor], Tensor]) -> Tensor:
        a = torch.tensor(0.3, **D, requires_grad=True)
        start = {"u": torch.zeros(4, 3, **D), "v": torch.zeros(4, 2, **D)}
        found = ho.fixed_point(
            lambda w, a: {"u": torch.cos(a * w["u"] - 1), "v": a * w["v"].sin() - w["u"][:, :2]},
            start, args=(a,), solver=TIGHT, adjoint=adjoint,
        ).value  # fmt: skip
        return torch.autograd.grad(change(found["v"]).sum() + found["u"].square().sum(), a)[0]

    assert torch.equal(gradient(lambda v: v.sub_(0.1).mul_(2)), gradient(lambda v: v.sub(0.1).mul(2)))


def attending(w: Tensor, a: Tensor) -> Tensor:
    return 0.3 * nn.functional.scaled_dot_product_attention(w @ a, w, w) + drawn(2, 3, 4)


def attention_by(solver: Any, adjoint: Any = EXACT) -> Any:
    def value(a: Tensor) -> Tensor:
        found = ho.fixed_point(lambda w: attending(w, a), torch.zeros(2, 3, 4, **D), solver=solver, adjoint=adjoint)
        return found.value.square().sum()

    return value


@pytest.mark.parametrize("solver", [ho.Picard(1e-13), ho.Newton(1e-12), ho.NewtonKrylov(1e-12), ho.Chord(1e-12)], ids=str)
def test_a_map_with_attention_outside_of_a_layer(solver: Any) -> None:
    """The fused kernel has neither a second derivative nor one in forward mode."""
    value, a, d = attention_by(solver), 0.2 * drawn(4, 4, seed=1), drawn(4, 4, seed=2)
    want = (value(a + 1e-6 * d) - value(a - 1e-6 * d)) / 2e-6
    assert float((torch.autograd.grad(value(a.requires_grad_()), a)[0] * d).sum()) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("adjoint", [EXACT, ho.Unrolled()], ids=["implicit", "unrolled"])
def test_a_map_with_attention_in_forward_mode(adjoint: Any) -> None:
    value, a, d = attention_by(ho.Picard(1e-13), adjoint), 0.2 * drawn(4, 4, seed=1), drawn(4, 4, seed=2)
    want = (value(a + 1e-6 * d) - value(a - 1e-6 * d)) / 2e-6
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, d)
        tangent = torch.autograd.forward_ad.unpack_dual(value(dual)).tangent
    assert tangent is not None
    assert float(tangent.detach()) == pytest.approx(float(want), rel=1e-6)


def test_attention_is_diagnosed() -> None:
    a = 0.2 * drawn(4, 4, seed=1)
    assert "the map contracts" in str(ho.diagnose(lambda w: attending(w, a), torch.zeros(2, 3, 4, **D)))


def test_the_second_derivative_of_a_map_with_weight_normalisation() -> None:
    torch.manual_seed(0)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)).double()
    direction: Tensor = linear.get_parameter("parametrizations.weight.original1")
    x, d = drawn(3, 5), drawn(5, 5, seed=1)

    def gradient() -> Tensor:
        phi = lambda w: 0.5 * torch.tanh(linear(w) + x)  # noqa: E731
        value = ho.fixed_point(phi, torch.zeros_like(x), solver=ho.Newton(1e-12), adjoint=EXACT).value
        return torch.autograd.grad(value.square().sum(), direction, create_graph=True)[0]

    (found,) = torch.autograd.grad((gradient() * d).sum(), direction)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            direction += step * d
        ends.append(gradient().detach())
        with torch.no_grad():
            direction -= step * d
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
