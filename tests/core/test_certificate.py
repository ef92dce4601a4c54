"""The certificate against exact hypergradients: where it is a bound it holds, else it is within a factor of 100, both ways."""

import math

import pytest
import torch
from torch.nn import functional

from hyperopt import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Dense,
    Implicit,
    LinearAnderson,
    Neumann,
    Newton,
    NewtonKrylov,
    NormalCG,
    Picard,
    Solution,
    fixed_point,
)
from hyperopt.core.certificate import Constants, certify
from hyperopt.nn.constants import mean_cross_entropy_constants
from hyperopt.nn.contractive import HouseholderContraction, ProjectedMatrix
from hyperopt.nn.equilibrium import EquilibriumCell, EquilibriumModel, linear_classifier

pytestmark = pytest.mark.usefixtures("float64")

PAIRS = [
    pytest.param(Picard(0, 0, 5), Neumann(0, 0, 5), id="T5-K5"),
    pytest.param(Picard(0, 0, 20), Neumann(0, 0, 3), id="T20-K3"),
    pytest.param(Picard(0, 0, 3), Neumann(0, 0, 20), id="T3-K20"),
    pytest.param(Picard(1e-3), Neumann(1e-3), id="tolerance"),
    pytest.param(Anderson(1e-3), LinearAnderson(1e-2), id="anderson"),
    pytest.param(Picard(1e-9, max_steps=1000), Neumann(1e-2, max_steps=1000), id="rough-adjoint"),
]


class Model:
    """A small equilibrium model in float64, and its exact hypergradient."""

    def __init__(self, scale: float, recurrent: str = "projected") -> None:
        torch.manual_seed(0)
        matrix = ProjectedMatrix(20, 0.95, scale) if recurrent == "projected" else HouseholderContraction(20, 3, 0.3)
        self.model = EquilibriumModel(EquilibriumCell(12, 20, matrix), linear_classifier(20, 5, 0.5)).double()
        self.x, self.y = torch.randn(30, 12).double(), torch.randint(5, (30,))
        self.exact = self.gradient(Picard(1e-14, max_steps=3000), Neumann(1e-14, max_steps=3000))

    @property
    def solution(self) -> Solution:
        assert self.model.solution is not None
        return self.model.solution

    def gradient(self, solver, linear):
        self.model.solver, self.model.adjoint = solver, Implicit(linear, policy="ignore")
        self.model.zero_grad()
        functional.cross_entropy(self.model(self.x), self.y).backward()
        return torch.cat([torch.as_tensor(p.grad).flatten() for group in self.model.groups().values() for p in group])


@pytest.mark.parametrize("scale", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(("solver", "linear"), PAIRS)
def test_the_bound_holds_and_the_estimate_is_near(scale, solver, linear):
    case = Model(scale)
    gradient = case.gradient(solver, linear)
    error = float((gradient - case.exact).norm())
    bound = certify(case.solution, float(gradient.norm()), mean_cross_entropy_constants(case.model, case.x))
    assert bound.error >= error
    assert bound.is_bound == (not (solver.fixed and isinstance(solver, Anderson)))
    estimate = certify(case.solution, float(gradient.norm()))
    assert not estimate.is_bound
    assert error / 100 <= estimate.error <= 100 * error


def symmetric(*values):
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


MAPS = {
    "radius .9": lambda: symmetric(0.9, -0.5, 0.2),
    "radius .999": lambda: symmetric(0.999, -0.5, 0.2),
    "non-normal": lambda: torch.tensor([[0.5, 20.0, 0.0], [0.0, 0.4, 20.0], [0.0, 0.0, 0.3]], dtype=torch.float64),
}
METHODS = [  # what accelerates does not show in its residuals how fast the map contracts: the adjoint's growth must
    pytest.param(Picard(1e-6, max_steps=20_000), NormalCG(1e-4), id="picard-normal_cg"),
    pytest.param(Anderson(1e-4), GMRES(1e-4), id="anderson-gmres"),
    pytest.param(Broyden(1e-4), BiCGStab(1e-6), id="broyden-bicgstab"),
    pytest.param(Newton(1e-4), Neumann(1e-4, max_steps=20_000), id="newton-neumann"),
    pytest.param(NewtonKrylov(1e-4), LinearAnderson(1e-4), id="newton_krylov-anderson"),
]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("solver", "linear"), METHODS)
def test_the_estimate_of_every_method_is_near(name, solver, linear):
    torch.manual_seed(3)
    m = MAPS[name]().requires_grad_()
    b, g = torch.randn(3), torch.randn(3)

    def solve(solver, linear):
        sol = fixed_point(lambda w: m @ w + b, torch.zeros(3), solver=solver, adjoint=Implicit(linear, policy="ignore"))
        return sol, torch.autograd.grad(sol.value, m, g)[0]

    sol, got = solve(solver, linear)
    exact = solve(Newton(4e-15), Dense())[1]
    error, found = float((got - exact).norm()), certify(sol, float(got.norm()))
    assert not found.is_bound
    assert error / 100 <= found.error <= 100 * error + 1e-11 * float(exact.norm())


def test_an_anderson_iterate_after_its_last_residual_has_no_bound():
    case = Model(0.2)
    gradient = case.gradient(Anderson(0, 0, 4), Neumann(0, 0, 20))
    assert not certify(case.solution, float(gradient.norm()), mean_cross_entropy_constants(case.model, case.x)).is_bound


def test_a_cell_without_constants_gets_an_estimate():
    case = Model(0.2, "householder")
    assert mean_cross_entropy_constants(case.model, case.x) is None
    gradient = case.gradient(Picard(0, 0, 6), Neumann(0, 0, 6))
    found, error = certify(case.solution, float(gradient.norm())), float((gradient - case.exact).norm())
    assert not found.is_bound
    assert error / 100 <= found.error <= 100 * error


def test_a_map_that_does_not_contract_has_no_estimate():
    a = torch.tensor(1.5, requires_grad=True)
    adjoint = Implicit(Neumann(0, 0, 6), policy="ignore")
    sol = fixed_point(lambda w: a * w + 1, torch.zeros(()), solver=Picard(0, 0, 6), adjoint=adjoint, policy="ignore")
    sol.value.backward()
    found = certify(sol, float(torch.as_tensor(a.grad).abs()))
    assert math.isnan(found.error)
    assert found.contraction == pytest.approx(1.5)


def test_the_bound_in_closed_form_for_a_linear_map():
    """w = q w + lam, E = w: exact hypergradient 1 / (1 - q); K terms from v = 1 miss q^(K+1) / (1 - q) of it."""
    q, terms = 0.5, 4
    lam = torch.tensor(1.0, requires_grad=True)
    sol = fixed_point(lambda w: q * w + lam, torch.tensor(2.0), solver=Picard(), adjoint=Implicit(Neumann(0, 0, terms)))
    sol.value.backward()
    error = 1 / (1 - q) - float(torch.as_tensor(lam.grad))
    assert error == pytest.approx(q ** (terms + 1) / (1 - q), rel=1e-12)
    found = certify(sol, float(torch.as_tensor(lam.grad)), Constants(q, 0.0, 1.0, 0.0))
    assert found.is_bound
    assert error <= found.error <= error / q * 1.0001  # the residual of the term before the last: one factor q too much


def test_before_a_backward_there_is_nothing_to_certify():
    sol = fixed_point(lambda w: 0.5 * w + 1, torch.zeros(()))
    with pytest.raises(ValueError, match="call backward first"):
        certify(sol, 1.0)
