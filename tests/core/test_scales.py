"""Variables of very different sizes: ``scales`` makes norms, tolerances and accelerations those of ``w / scales``."""

import pytest
import torch
from core_reference import close

from hyperopt import (
    GMRES,
    Anderson,
    Implicit,
    LinearAnderson,
    Neumann,
    Newton,
    Picard,
    Status,
    Unrolled,
    certify,
    fixed_point,
)
from hyperopt.core.certificate import Constants

pytestmark = pytest.mark.usefixtures("float64")
SIZES = {"large": 1e4, "small": 1e-4}


def problem():
    """Two linear variables of two entries that do not touch, of sizes 1e4 and 1e-4: the small one contracts slowly."""
    a, b = torch.tensor(0.5, requires_grad=True), torch.tensor(0.95, requires_grad=True)

    def phi(w):
        return {"large": a * w["large"] + 1e4, "small": b * w["small"] + 1e-4}

    w0 = {"large": torch.zeros(3, 2), "small": torch.zeros(3, 2)}
    return phi, w0, (a, b)


def relative(found, a, b):
    exact = {"large": 1e4 / (1 - a), "small": 1e-4 / (1 - b)}
    return {name: float((x.detach() / exact[name].detach() - 1).abs().max()) for name, x in found.items()}


@pytest.mark.parametrize("solver", [Picard(1e-6, max_steps=500), Anderson(1e-6)])
def test_the_small_variable_is_solved_as_well_as_the_large_one(solver):
    phi, w0, (a, b) = problem()
    one_norm = fixed_point(phi, w0, solver=solver)
    assert one_norm.status is Status.converged and relative(one_norm.value, a, b)["small"] > 1e-3
    each = fixed_point(phi, w0, solver=solver, scales=SIZES)
    assert each.status is Status.converged and max(relative(each.value, a, b).values()) < 1e-4


ADJOINTS = [Implicit(Neumann(1e-12, max_steps=2000)), Implicit(GMRES(1e-12)), Implicit(LinearAnderson(1e-12)), Unrolled()]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", [Picard(1e-13, max_steps=2000), Newton(1e-13)])
def test_derivatives_are_those_in_the_variables_own_units(adjoint, solver):
    phi, w0, (a, b) = problem()
    sol = fixed_point(phi, w0, solver=solver, adjoint=adjoint, scales=SIZES)
    gradients = torch.autograd.grad(sol.value["large"].sum() + 1e8 * sol.value["small"].sum(), [a, b])
    close(gradients[0], 6 * 1e4 / (1 - a.detach()) ** 2, rtol=1e-9)
    close(gradients[1], 6e8 * 1e-4 / (1 - b.detach()) ** 2, rtol=1e-9)
    if isinstance(adjoint, Implicit):  # v = (I - J)^-T g, whatever the units
        close(sol.v["large"], torch.full((3, 2), 1 / (1 - 0.5)), rtol=1e-9)
        close(sol.v["small"], torch.full((3, 2), 1e8 / (1 - 0.95)), rtol=1e-9)
        again = fixed_point(phi, w0, solver=solver, adjoint=adjoint, scales=SIZES, v0=sol.v)
        (again.value["large"].sum() + 1e8 * again.value["small"].sum()).backward()
        assert again.adjoint is not None and again.adjoint.vjps <= 4


def test_scales_of_one_change_nothing():
    phi, w0, _ = problem()
    plain, ones = fixed_point(phi, w0), fixed_point(phi, w0, scales={"large": 1.0, "small": 1.0})
    assert torch.equal(plain.value["small"], ones.value["small"]) and plain.forward.evaluations == ones.forward.evaluations


def test_one_tensor_and_joint_rows():
    b = torch.tensor(0.3, requires_grad=True)
    sol = fixed_point(lambda w: torch.cos(b * w), torch.zeros(()), scales=10.0)
    plain = fixed_point(lambda w: torch.cos(b * w), torch.zeros(()))
    close(sol.value, plain.value)
    close(torch.autograd.grad(sol.value, b)[0], torch.autograd.grad(plain.value, b)[0], rtol=1e-5)


def test_constants_of_the_euclidean_norm_are_no_bound_in_another():
    phi, w0, (a, _) = problem()
    sol = fixed_point(phi, w0, solver=Picard(max_steps=500), scales=SIZES)
    sol.value["large"].sum().backward()
    assert a.grad is not None and not certify(sol, float(a.grad.abs()), Constants(0.95, 0.0, 1.0, 0.0)).is_bound


@pytest.mark.parametrize(
    ("scales", "what"),
    [
        ({"large": 1.0}, "scales has the structure"),
        (1.0, "scales has the structure"),
        ({"large": 1.0, "small": 0.0}, "must be positive numbers"),
        ({"large": 1.0, "small": float("nan")}, "must be positive numbers"),
        ({"large": 1.0, "small": True}, "must be positive numbers"),
    ],
)
def test_bad_scales_are_named(scales, what):
    phi, w0, _ = problem()
    with pytest.raises(ValueError, match=what):
        fixed_point(phi, w0, scales=scales)
