"""Contractive matrices: their formulas, rigorous norm bounds, the nearest point of the ball, and bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperopt.nn.contractive import HouseholderContraction, ProjectedMatrix, spectral_norm_bound

F64 = torch.float64


def norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).item()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


MATRICES: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": lambda n: random(n, n),
    "rank one": lambda n: random(n, 1) @ random(1, n, seed=1),
    "orthogonal": lambda n: torch.linalg.qr(random(n, n))[0],
    "identity": lambda n: 0.99 * torch.eye(n, dtype=F64),
    "shift": lambda n: torch.diag(torch.ones(n, dtype=F64), 1)[:n, :n],  # nilpotent: every eigenvalue is 0
    "tiny": lambda n: 1e-140 * random(n, n),
    "huge": lambda n: 1e140 * random(n, n),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("n", [2, 7, 60])
def test_the_bound_is_above_the_norm_and_close(name: str, n: int) -> None:
    matrix = MATRICES[name](n)
    true, bound = torch.linalg.svdvals(matrix)[0].item(), spectral_norm_bound(matrix).item()
    assert true * (1 - 1e-14) <= bound <= true * (n ** (1 / 4096) + 1e-9)


def test_the_bound_of_zero_and_of_nan() -> None:
    assert spectral_norm_bound(torch.zeros(3, 3)).item() == 0
    assert not spectral_norm_bound(torch.full((2, 2), float("nan"))).item() < 1


def test_pdp_by_its_definition() -> None:
    matrix = HouseholderContraction(7, 3, margin=0.8).double()
    with torch.no_grad():
        matrix.d.copy_(random(7))
    p = matrix.product.form()
    expected = p @ torch.diag(0.2 * torch.sigmoid(matrix.d)) @ p
    torch.testing.assert_close(matrix.matrix(), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix(), expected, rtol=0, atol=1e-15)
    assert norm(matrix.matrix()) == pytest.approx(0.2 * torch.sigmoid(matrix.d).max().item(), rel=1e-12)
    assert {name for name, _ in matrix.named_parameters()} == {"product.vectors", "d"}


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    data=st.data(),
    margin=st.floats(0.01, 0.99),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pdp_never_leaves_its_ball(n: int, data: st.DataObject, margin: float, scale: float, dtype: torch.dtype) -> None:
    matrix = HouseholderContraction(n, data.draw(st.integers(1, n)), margin).to(dtype)
    with torch.no_grad():
        matrix.d.copy_(scale * random(n, seed=n))
        matrix.product.vectors.copy_(scale * random(*matrix.product.vectors.shape, seed=n))
    assert norm(matrix.matrix()) <= matrix.norm_bound().item()
    assert matrix.norm_bound().item() <= (1 - margin) * (1 + 5 * n * torch.finfo(dtype).eps)
    before = [parameter.clone() for parameter in matrix.parameters()]
    matrix.project_()
    assert all(torch.equal(a, b) for a, b in zip(before, matrix.parameters(), strict=True))


def test_the_gradient_of_pdp() -> None:
    matrix = HouseholderContraction(5, 3).double()

    def of(vectors: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(matrix, {"product.vectors": vectors, "d": d}, ())

    assert torch.autograd.gradcheck(of, (matrix.product.vectors, matrix.d))


def projected(value: torch.Tensor, max_norm: float = 0.99) -> ProjectedMatrix:
    matrix = ProjectedMatrix(len(value), max_norm).to(value.dtype)
    with torch.no_grad():
        matrix.A.copy_(value)
    return matrix


@pytest.mark.parametrize("scale", [0.3, 0.4, 1.0, 10.0])  # norms of 1.8 and 2.4: both decompositions are met
@pytest.mark.parametrize("max_norm", [0.2, 0.99])
def test_the_projection_clips_the_singular_values(scale: float, max_norm: float) -> None:
    value = scale * random(12, 12)
    matrix = projected(value, max_norm)
    matrix.project_()
    u, s, vh = torch.linalg.svd(value)
    torch.testing.assert_close(matrix.A.detach(), (u * s.clamp(max=max_norm)) @ vh, rtol=0, atol=1e-13)


def test_the_projection_is_the_nearest_point_of_the_ball() -> None:
    value = random(6, 6)
    matrix = projected(value, 0.5)
    matrix.project_()
    found = torch.linalg.matrix_norm(matrix.A.detach() - value).item()
    for seed in range(200):
        other = matrix.A.detach() + 0.1 * random(6, 6, seed=seed + 1)
        other = other * min(1.0, 0.5 / norm(other))
        assert torch.linalg.matrix_norm(other - value).item() > found


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    scale=st.sampled_from([1e-3, 0.05, 0.2, 1.0, 1e3, 1e30]),
    max_norm=st.floats(0.01, 0.999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_after_the_projection_the_norm_is_inside(n: int, scale: float, max_norm: float, dtype: torch.dtype) -> None:
    value = (scale * random(n, n, seed=n)).to(dtype)
    matrix = projected(value, max_norm)
    matrix.project_()
    assert norm(matrix.A) <= max_norm * (1 + 1e-14)
    assert norm(matrix.A) <= matrix.norm_bound().item()
    once = matrix.A.detach().clone()
    matrix.project_()
    assert torch.equal(matrix.A.detach(), once)
    if norm(value) <= max_norm:
        assert torch.equal(once, value)  # not a bit is changed inside


def test_no_decomposition_inside_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a decomposition was done")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    projected(0.9 * MATRICES["orthogonal"](20)).project_()  # Frobenius norm 4: only the third bound shows it


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_what_the_last_projection_found_changes_no_bit_of_the_next(scale: float) -> None:
    value = (scale * random(40, 40)).float()  # norms of 0.6, 4 and 12
    fresh, used = projected(value), projected(5 * value)
    used.project_()  # from outside
    with torch.no_grad():
        used.A.copy_(value)
    fresh.project_()
    used.project_()
    assert torch.equal(fresh.A, used.A)


def test_the_projection_leaves_nan_for_the_checks_that_name_it() -> None:
    matrix = projected(torch.tensor([[float("nan"), 0.0], [0.0, 5.0]], dtype=F64))
    matrix.project_()
    assert matrix.A.isnan().any() and matrix.A[1, 1] == 5


def test_the_projection_keeps_the_parameter_and_its_gradient() -> None:
    matrix = projected(5 * random(4, 4))
    parameter = matrix.A
    matrix.matrix().square().sum().backward()
    matrix.project_()
    assert matrix.A is parameter and parameter.requires_grad and parameter.grad is not None and parameter.is_leaf


def test_it_starts_inside_the_ball() -> None:
    assert norm(ProjectedMatrix(50, 0.9, init_scale=1.0).A) <= 0.9
    deviation = ProjectedMatrix(100, 0.9, generator=torch.Generator().manual_seed(0)).A.std().item()
    assert deviation == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_margin_out_of_range(margin: float) -> None:
    with pytest.raises(ValueError, match=r"margin=.* is not in \(0, 1\); change margin"):
        HouseholderContraction(3, 1, margin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": 3, "max_norm": 1.0}, r"max_norm=1.0 is not in \(0, 1\); change max_norm"),
        ({"n": 3, "max_norm": 0.0}, "max_norm=0.0"),
        ({"n": 3, "max_norm": float("nan")}, "max_norm=nan"),
        ({"n": 3, "init_scale": -1.0}, "init_scale=-1.0"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectedMatrix(**arguments)  # pyright: ignore[reportArgumentType]
