"""The diagnosis of a map against known spectra and dense linear algebra."""

import math

import pytest
import torch
from core_reference import Counted, close

from hyperopt import Picard, diagnose, fixed_point

pytestmark = pytest.mark.usefixtures("float64")


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n))[0]


def rotation(radius, angle=1.0):
    return radius * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def known(m):
    """Radius, norm and condition by dense linear algebra."""
    singular = torch.linalg.svdvals(torch.eye(len(m)) - m)
    return torch.linalg.eigvals(m).abs().max(), torch.linalg.matrix_norm(m, 2), singular[0] / singular[-1]


SMALL = {
    "rotation": lambda: rotation(0.9),
    "non-normal": lambda: torch.tensor([[0.5, 20.0, 0.0], [0.0, 0.4, 20.0], [0.0, 0.0, 0.3]]),
    "jordan": lambda: torch.tensor([[0.9, 1.0], [0.0, 0.9]]),
    "expanding": lambda: torch.diag(torch.tensor([3.0, 0.2, -0.1])),
    "radius .999": lambda: torch.diag(torch.tensor([0.999, 0.5, -0.7])),
    "zero": lambda: torch.zeros(3, 3),
    "repeated": lambda: 0.5 * torch.eye(4),
    "random": lambda: torch.randn(20, 20) / 5,
    "nilpotent": lambda: torch.diag(torch.ones(4), 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_whole_spaces_are_exact(name):
    m = SMALL[name]()
    found = diagnose(lambda w: w @ m.t() + 1.0, torch.zeros(1, len(m)))
    radius, norm, condition = known(m)
    # An eigenvalue in a Jordan block of size k is known to eps^(1/k).
    close(torch.tensor(found.radius), radius, rtol=1e-7, atol=1e-3 if name == "nilpotent" else 1e-7)
    close(torch.tensor(found.norm), norm, atol=1e-12)
    close(torch.tensor(found.condition), condition, rtol=1e-8)
    assert found.exact


def test_the_rotation_has_radius_0_9():
    assert diagnose(lambda w: w @ rotation(0.9), torch.zeros(1, 2)).radius == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("name", ["radius .999", "random", "shear"])
def test_estimates_of_large_maps(name):
    n, q = 120, orthogonal(120)
    spectrum = torch.cat([torch.linspace(-0.5, 0.9, n - 1), torch.tensor([0.999])])
    m = {
        "radius .999": lambda: q @ torch.diag(spectrum) @ q.t(),
        "random": lambda: torch.randn(n, n) * (0.9 / math.sqrt(n)),
        "shear": lambda: q @ (0.5 * torch.eye(n) + torch.diag(torch.full((n - 1,), 0.4), 1)) @ q.t(),
    }[name]()
    found = diagnose(lambda w: w @ m.t(), torch.zeros(1, n))
    radius, norm, condition = known(m)
    assert not found.exact
    assert found.norm <= norm * (1 + 1e-10) and found.norm == pytest.approx(float(norm), rel=0.01)
    assert found.condition == pytest.approx(float(condition), rel=0.05)
    if name == "shear":  # the spectrum is {0.5}, but it moves to a disc of radius 0.9 for the least perturbation
        assert 0.5 <= found.radius <= 0.9 + 1e-6
    else:
        assert found.radius == pytest.approx(float(radius), rel=1e-6 if name == "radius .999" else 0.05)


def test_singular_systems_have_an_infinite_condition():
    assert diagnose(lambda w: w + 1.0, torch.zeros(2, 3)).condition == math.inf
    q = orthogonal(60)
    m = q @ torch.diag(torch.linspace(-0.5, 1, 60)) @ q.t()
    assert diagnose(lambda w: w @ m, torch.zeros(1, 60), steps=10).condition > 1e6


def test_rows_costs_and_a_solution():
    scale = torch.tensor([[0.1], [0.9], [1.5]])
    phi = Counted(lambda w, s: s * torch.sin(w))
    found = diagnose(phi, torch.zeros(3, 2), (scale,))
    assert phi.calls == 1
    close(found.row_radius, scale[:, 0], rtol=1e-9)
    close(found.row_norm, scale[:, 0], rtol=1e-9)
    close(found.row_condition, torch.ones(3), rtol=1e-9)
    assert (found.vjps, found.jvps) == (1 + 2 * 1 + 1, 2 * 2)  # Arnoldi, two bidiagonalizations, one vjp to build the jvp
    assert "do not converge" in str(found) and "3 rows" in str(found)
    a = torch.tensor(0.5, requires_grad=True)
    sol = fixed_point(lambda w: {"x": a * torch.cos(w["x"])}, {"x": torch.zeros(4)}, solver=Picard(1e-12))
    here = diagnose(lambda w: {"x": a * torch.cos(w["x"])}, sol)
    close(torch.tensor(here.radius), 0.5 * torch.sin(sol.value["x"].detach()).max(), rtol=1e-9)
    assert "Picard and Neumann are right" in str(here)


def test_bad_rows_are_nan_and_alone():
    b = torch.zeros(3, 2)
    b[1] = math.nan
    found = diagnose(lambda w: 0.5 * w * torch.cos(b), torch.zeros(3, 2))
    for values in (found.row_radius, found.row_norm, found.row_condition):
        assert torch.isnan(values).tolist() == [False, True, False]
    assert not found.radius < 1 and "do not converge" in str(found)


def test_nothing_of_the_caller_changes():
    state = torch.random.get_rng_state()
    w = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        found = diagnose(lambda w: 0.5 * torch.sin(w), w)
    assert torch.equal(state, torch.random.get_rng_state()) and w.grad is None and found.radius == pytest.approx(0.5)
    assert diagnose(lambda w: w, torch.zeros(0, 3)).radius == 0.0
    assert diagnose(lambda w: torch.ones_like(w), torch.zeros(1, 3)).norm == 0.0  # a map without a graph
    with pytest.raises(ValueError, match="steps=0"):
        diagnose(lambda w: w, w, steps=0)
