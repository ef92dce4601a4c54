"""``LinearOperator``: products and counts of every kind against a dense matrix; operators of the real ``curvlinops`` adapted."""

import pytest
import torch
from core_reference import close

import hyperopt
from hyperopt import CG, GMRES
from hyperopt.core.jacobian import Jacobian, evaluate
from hyperopt.core.operator import Complement, FunctionOperator, MatrixOperator, Reshaped, as_operator

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),  # of what curvlinops imports
]


def rows_times(m):
    return FunctionOperator(lambda v: v @ m.T, lambda v: v @ m)


def jacobian(m):
    """Of a linear map: ``J = M`` in every row."""
    return evaluate(lambda w: w @ m.T, torch.randn(3, 4))[1]


KINDS = {
    "functions": rows_times,
    "autograd": jacobian,
    "transposed twice": lambda m: rows_times(m).T.T,
    "transpose": lambda m: rows_times(m.T).T,
    "complement": lambda m: Complement(rows_times(torch.eye(4) - m)),
    "complement, scaled": lambda m: Complement(rows_times((torch.eye(4) - m) / 0.3), 0.3),
    "reshaped": lambda m: Reshaped(rows_times(m), torch.Size((1, 3, 4))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_counts(kind):
    m, v, b = torch.randn(4, 4), torch.randn(3, 4), torch.randn(3, 4)
    M = KINDS[kind](m)
    close(M.matvec(v), v @ m.T)
    close(M.matvec_add(v, b), v @ m.T + b)
    close(M.complement(v), v - v @ m.T)
    close(M.T.matvec(v), v @ m)
    close(M.T.matvec_add(v, b), v @ m + b)
    close(M.T.complement(v), v - v @ m)
    # Products by autograd with J itself need one with its transpose, made once.
    counts = {"autograd": (3, 4), "transpose": (3, 0)}
    assert (M.matvecs, M.rmatvecs) == counts.get(kind, (3, 3))
    close(M.dense(3, 4, v), m.expand(3, 4, 4))
    close(M.T.dense(3, 4, v), m.mT.expand(3, 4, 4))
    close(M.matmat(torch.stack([v, b], dim=2)), torch.stack([v @ m.T, b @ m.T], dim=2))


def test_what_some_rows_cost_is_counted_by_the_whole():
    m = torch.randn(4, 4)
    w = torch.randn(3, 4).requires_grad_()
    J = Jacobian(torch.tanh(w @ m.T), w)

    def part(index):
        J.part = None  # once
        some = w.detach()[index].requires_grad_()
        found = Jacobian(torch.tanh(some @ m.T), some)
        found.evaluations = 1
        return found

    J.part = part
    index, v = torch.tensor([0, 2]), torch.randn(3, 4)
    some = J.T.select(index)
    assert some is not None
    close(some.matvec(v[index]), J.T.matvec(v)[index])
    assert (J.rmatvecs, J.evaluations) == (2, 1) and some.matvecs == 1
    assert J.select(index) is None


def test_what_is_no_operator_is_refused():
    assert not as_operator(lambda v: v).transposable
    with pytest.raises(TypeError, match="neither a LinearOperator nor a function"):
        as_operator(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="no matrix @ v"):
        MatrixOperator(3)
    with pytest.raises(NotImplementedError, match="transpose"):
        as_operator(lambda v: v).rmatvec(torch.ones(1, 1))


class Half(torch.nn.Module):
    def forward(self, w, u):
        return 0.5 * w + u

    def pullback(self, w, fw, u):
        return lambda v: 0.5 * v


def test_a_pullback_of_another_type_is_refused():
    u = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"pullback.*returned a function; return a subclass of"):
        hyperopt.fixed_point(Half(), torch.zeros(2, 2), (u,))


@pytest.fixture
def ridge():
    """A linear model with its data, an l2 penalty and the Hessian of the penalised loss."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    x, y, lam = torch.randn(20, 5), torch.randn(20, 1), torch.tensor(0.3, requires_grad=True)
    net = torch.nn.Linear(5, 1, bias=False).double()
    H = curvlinops.HessianLinearOperator(net, torch.nn.MSELoss(), [net.weight], [(x, y)], check_deterministic=False)
    return H, net, x, y, lam


def test_products_with_the_hessian_of_curvlinops_are_ours(ridge):
    H, net, x, y, _ = ridge
    v = torch.randn(2, 5)
    (grad,) = torch.autograd.grad((net(x) - y).square().mean(), net.weight, create_graph=True)
    ours = Jacobian(grad, net.weight)
    theirs = MatrixOperator(H, symmetric=True)
    for row in v:
        close(theirs.matvec(row[None]), ours.rmatvec(row[None]))
    close(theirs.matvec(v), v @ (2 * x.T @ x / 20))
    close(theirs.T.matvec(v), MatrixOperator(H).rmatvec(v))  # by its own adjoint
    close(theirs.matmat(v[:, :, None])[:, :, 0], theirs.matvec(v))
    assert (theirs.matvecs, theirs.rmatvecs) == (5, 1)


@pytest.mark.parametrize("solver", [CG(rtol=1e-13), GMRES(rtol=1e-13)])
def test_a_hypergradient_whose_curvature_is_an_operator_of_curvlinops(ridge, solver):
    H, net, x, y, lam = ridge
    penalised = FunctionOperator(lambda v: MatrixOperator(H, symmetric=True).matvec(v) + 2 * lam.detach() * v, symmetric=True)

    def inner(w, lam, batch):
        return (x @ w.T - y).square().mean() + lam * w.square().sum()

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: (w - 1).square().sum())
    w = torch.linalg.solve(x.T @ x / 20 + lam.detach() * torch.eye(5), x.T @ y / 20).T
    found = hyperopt.hypergradient(problem, w, lam, adjoint=hyperopt.Implicit(CG(rtol=1e-13)))
    with torch.no_grad():
        net.weight.copy_(w)
    u = solver.solve(Complement(penalised), 2 * (w - 1)).value  # H u = d_w E
    (mixed,) = torch.autograd.grad((2 * lam * w * u).sum(), lam)  # the part of grad_w L that depends on lam
    close(-mixed, found.grad, rtol=1e-9)
