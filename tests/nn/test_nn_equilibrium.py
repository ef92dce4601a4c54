"""The tanh-affine map, its closed-form pullback, and the model's gradients against autograd and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Status
from hyperopt.nn.cells import HouseholderCell, ProjectedCell
from hyperopt.nn.contractive import ContractiveMatrix, HouseholderContraction, ProjectedMatrix
from hyperopt.nn.equilibrium import Cell, EquilibriumCell, EquilibriumModel, TanhAffine, linear_classifier

F64 = torch.float64
FEATURES, STATE, CLASSES, ROWS = 5, 4, 3, 6
MATRICES: dict[str, Callable[[], ContractiveMatrix]] = {
    "projected": lambda: ProjectedMatrix(STATE, 0.8, init_scale=0.5),
    "householder": lambda: HouseholderContraction(STATE, 2, margin=0.3),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def exact() -> dict[str, object]:
    """Return a solver and an adjoint that go to the limit."""
    return {
        "solver": Picard(rtol=1e-14, max_steps=500),
        "adjoint": Implicit(linear_solver=Neumann(rtol=1e-14, max_steps=500)),
    }


def model(kind: str = "projected", **how: object) -> EquilibriumModel:
    torch.manual_seed(0)
    cell = EquilibriumCell(FEATURES, STATE, MATRICES[kind]())
    return EquilibriumModel(cell, nn.Linear(STATE, CLASSES), **(how or exact())).to(F64)  # pyright: ignore[reportArgumentType]


def data() -> tuple[Tensor, Tensor]:
    return random(ROWS, FEATURES), torch.arange(ROWS) % CLASSES


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_map_by_hand() -> None:
    w, u, a = (torch.tensor(value, dtype=F64) for value in ([[0.5, -1.0]], [[0.1, 0.2]], [[1.0, 2.0], [3.0, 4.0]]))
    expected = [[math.tanh(0.5 - 3 + 0.1), math.tanh(1 - 4 + 0.2)]]
    torch.testing.assert_close(TanhAffine()(w, u, a), torch.tensor(expected, dtype=F64), rtol=1e-14, atol=0)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 6), n=st.integers(1, 7), seed=st.integers(0, 2**16), wanted=st.tuples(st.booleans(), st.booleans()))
def test_the_pullback_is_autograds(rows: int, n: int, seed: int, wanted: tuple[bool, bool]) -> None:
    w, u, v = (random(rows, n, seed=seed + k) for k in range(3))
    a = random(n, n, seed=seed + 3)
    leaves = [tensor.clone().requires_grad_() for tensor in (w, u, a)]
    phi = TanhAffine()
    expected = torch.autograd.grad(phi(*leaves), leaves, v)
    pullback = phi.pullback(w, phi(w, u, a), u, a)
    torch.testing.assert_close(pullback.rmatvec(v), expected[0], rtol=1e-12, atol=1e-13)
    for asked, found, right in zip(wanted, pullback.arguments(v, wanted), expected[1:], strict=True):
        assert (found is not None) == asked
        if found is not None:
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # torch's own forward-mode rules still use it
def test_the_map_twice_differentiable_and_forward() -> None:
    leaves = [tensor.requires_grad_() for tensor in (random(3, 2), random(3, 2, seed=1), random(2, 2, seed=2))]
    assert torch.autograd.gradcheck(TanhAffine(), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(TanhAffine(), leaves)


@pytest.mark.parametrize("kind", MATRICES)
def test_the_state_is_the_fixed_point(kind: str) -> None:
    net, (x, _) = model(kind), data()
    logits = net(x)
    assert net.solution is not None and net.solution.forward.status == Status.converged
    w, cell = net.solution.value, net.cell
    assert isinstance(cell, EquilibriumCell) and cell.c is not None
    expected = torch.tanh(w @ cell.recurrent.matrix() + x @ cell.B.T + cell.c)
    torch.testing.assert_close(w, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(logits, net.classifier(w), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", MATRICES)
def test_the_gradient_is_that_of_the_unrolled_loop(kind: str) -> None:
    net, (x, y) = model(kind), data()
    implicit = gradients(functional.cross_entropy(net(x), y), net)
    u, a = net.cell.terms(x)
    w = torch.zeros(ROWS, STATE, dtype=F64)
    for _ in range(300):
        w = torch.tanh(w @ a + u)
    unrolled = gradients(functional.cross_entropy(net.classifier(w), y), net)
    assert implicit.keys() == unrolled.keys()
    for name in implicit:
        torch.testing.assert_close(implicit[name], unrolled[name], rtol=0, atol=1e-12, msg=name)
        assert implicit[name].abs().max() > 1e-4, name


@pytest.mark.parametrize("kind", MATRICES)
def test_the_gradient_against_finite_differences(kind: str) -> None:
    net, (x, _) = model(kind), data()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def logits(*values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(logits, parameters, atol=1e-6)


def test_a_state_of_one_number_in_closed_form() -> None:
    # w = tanh(a w + u): dw/du = s / (1 - a s), dw/da = w s / (1 - a s), s = 1 - w^2
    cell = EquilibriumCell(1, 1, ProjectedMatrix(1, 0.9)).to(F64)
    net = EquilibriumModel(cell, nn.Linear(1, 1), **exact()).to(F64)  # pyright: ignore[reportArgumentType]
    assert isinstance(cell.recurrent, ProjectedMatrix) and cell.c is not None
    with torch.no_grad():
        for parameter, value in ((cell.recurrent.A, 0.7), (cell.B, 1.0), (net.classifier.weight, 1.0)):
            parameter.fill_(value)
    net(torch.tensor([[0.3]], dtype=F64)).sum().backward()
    assert net.solution is not None
    w = net.solution.value.item()
    slope = 1 - w * w
    assert w == pytest.approx(math.tanh(0.7 * w + 0.3), rel=1e-13)
    assert cell.c.grad is not None and cell.c.grad.item() == pytest.approx(slope / (1 - 0.7 * slope), rel=1e-11)
    assert cell.recurrent.A.grad is not None
    assert cell.recurrent.A.grad.item() == pytest.approx(w * slope / (1 - 0.7 * slope), rel=1e-11)


def test_terms_are_computed_once_a_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = model("householder"), data()
    calls = []
    form = HouseholderContraction.matrix
    monkeypatch.setattr(HouseholderContraction, "matrix", lambda self: calls.append(1) or form(self))
    functional.cross_entropy(net(x), y).backward()
    assert len(calls) == 1 and net.solution is not None and net.solution.forward.evaluations > 5


def test_the_solution_holds_no_graph() -> None:
    net, (x, y) = model(), data()
    loss = functional.cross_entropy(net(x), y)
    assert net.solution is not None and not net.solution.value.requires_grad and net.solution.adjoint is None
    loss.backward()
    assert net.solution.adjoint is not None and net.solution.adjoint.status == Status.converged


def test_a_start_at_the_solution_is_the_solution() -> None:
    net, (x, _) = model(), data()
    first = net(x)
    assert net.solution is not None
    cold = net.solution.forward.evaluations
    second = net(x, net.solution.value)
    assert net.solution.forward.evaluations < cold / 4
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_rows_do_not_meet() -> None:
    net, (x, _) = model(), data()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x)[order], net(x[order]), rtol=0, atol=1e-12)
    assert net(x[:0]).shape == (0, CLASSES)


def test_groups_and_names() -> None:
    net = model("householder")
    assert list(net.groups()) == ["A", "B", "c", "classifier"]
    assert [len(group) for group in net.groups().values()] == [2, 1, 1, 2]
    assert "cell.B" in net.state_dict() and "cell.recurrent.product.vectors" in net.state_dict()
    assert list(EquilibriumCell(2, 3, ProjectedMatrix(3), bias=False).groups()) == ["A", "B"]


def test_the_cell_projects_its_matrix() -> None:
    net = model()
    cell = net.cell
    assert isinstance(cell, EquilibriumCell) and isinstance(cell.recurrent, ProjectedMatrix)
    with torch.no_grad():
        cell.recurrent.A.mul_(100)
    cell.project_()
    assert torch.linalg.matrix_norm(cell.recurrent.A, 2).item() == pytest.approx(0.8, rel=1e-12)


def test_a_cell_of_your_own_needs_terms_and_a_map() -> None:
    class Cosine(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.state_size, self.phi = 2, lambda w, u: 0.5 * torch.cos(w) + u
            self.B = nn.Parameter(random(2, FEATURES))

        def terms(self, x: Tensor) -> tuple[Tensor]:
            return (x @ self.B.T,)

    net = EquilibriumModel(Cosine(), nn.Linear(2, CLASSES), **exact()).to(F64)  # pyright: ignore[reportArgumentType]
    net(data()[0]).sum().backward()
    assert list(net.groups()) == ["cell", "classifier"]
    assert net.solution is not None and net.solution.status == Status.converged
    u = data()[0] @ net.groups()["cell"][0].T
    torch.testing.assert_close(net.solution.value, (0.5 * torch.cos(net.solution.value) + u).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factory", [ProjectedCell(), HouseholderCell(), ProjectedCell(input_scale=0.5, bias=False)])
def test_one_seed_gives_one_cell_in_every_precision(factory: ProjectedCell | HouseholderCell) -> None:
    first = factory.build(FEATURES, STATE, torch.Generator().manual_seed(1))
    torch.set_default_dtype(F64)
    try:
        second = factory.build(FEATURES, STATE, torch.Generator().manual_seed(1))
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, F64)
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0, msg=name)


def test_initial_values() -> None:
    generator = torch.Generator().manual_seed(0)
    cell = ProjectedCell(input_scale=None).build(400, 100, generator)
    assert cell.B.abs().max().item() <= 1 / 20 and cell.B.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert cell.c is not None and (cell.c == 0).all()
    assert ProjectedCell(input_scale=0.01).build(400, 100, generator).B.std().item() == pytest.approx(0.01, rel=0.02)
    small = linear_classifier(400, 10, 0.01, generator)
    assert small.weight.std().item() == pytest.approx(0.01, rel=0.05) and (small.bias == 0).all()
    usual = linear_classifier(400, 10, None, generator)
    assert usual.weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert 0 < usual.bias.abs().max().item() <= 1 / 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EquilibriumCell(0, STATE, ProjectedMatrix(STATE)), "features=0 must be at least 1; change features"),
        (lambda: EquilibriumCell(2, -1, ProjectedMatrix(STATE)), "state_size=-1 must be at least 1"),
        (lambda: EquilibriumCell(2, 3, ProjectedMatrix(4)), "recurrent is 4 x 4, but state_size=3"),
        (
            lambda: EquilibriumModel(EquilibriumCell(2, 3, ProjectedMatrix(3)), nn.Linear(4, 2)),
            "the classifier takes 4 features, but the cell has state_size=3",
        ),
        (lambda: HouseholderCell(reflections=9).build(2, 3), "reflections=9 must be from 1 to n=3"),
        (lambda: ProjectedCell(max_norm=1.0), r"max_norm=1.0 is not in \(0, 1\); change max_norm"),
        (lambda: ProjectedCell(init_scale=-0.1), "init_scale=-0.1"),
        (lambda: HouseholderCell(margin=0.0), r"margin=0.0 is not in \(0, 1\); change margin"),
        (lambda: HouseholderCell(reflections=0), "reflections=0 must be a whole number >= 1"),
        (lambda: ProjectedCell(input_scale=-1.0), "input_scale=-1.0"),
        (lambda: ProjectedCell(bias="yes"), "bias='yes' must be true or false"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_features_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(6, 4\), but the cell takes \(rows, features=5\); change features"):
        model()(torch.ones(6, 4, dtype=F64))
