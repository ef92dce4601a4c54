"""Products of reflections: the closed form, orthogonality in both dtypes, gradients, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from hyperopt.nn.householder import HouseholderProduct

SIZES = [(1, 1), (2, 1), (5, 3), (6, 6), (40, 7)]


def product(n: int, reflections: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> HouseholderProduct:
    vectors = torch.randn(reflections, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return HouseholderProduct(n, reflections, vectors)


def one_by_one(vectors: torch.Tensor) -> torch.Tensor:
    """Return H_1 H_2 ... H_r by the definition, in float64."""
    p = torch.eye(vectors.shape[1], dtype=torch.float64)
    for v in vectors.double():
        if v.any():
            p = p @ (torch.eye(len(v), dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    return p


def defect(p: torch.Tensor) -> float:
    p = p.detach().double()
    return torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p), dtype=torch.float64), 2).item()


@pytest.mark.parametrize(("n", "reflections"), SIZES)
def test_the_product_is_that_of_the_definition(n: int, reflections: int) -> None:
    module = product(n, reflections)
    expected = one_by_one(module.vectors.detach())
    torch.testing.assert_close(module.form(), expected, rtol=0, atol=1e-13)
    w = torch.randn(3, 4, n, dtype=torch.float64)
    torch.testing.assert_close(module.rotate(w), w @ expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(w), module.rotate(w), rtol=0, atol=0)
    torch.testing.assert_close(module.rotate(w, transpose=True), w @ expected.T, rtol=0, atol=1e-12)


def test_a_reflection_by_hand() -> None:
    module = HouseholderProduct(2, 1, torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    expected = torch.tensor([[7.0, -24.0], [-24.0, -7.0]], dtype=torch.float64) / 25
    torch.testing.assert_close(module.form(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("n", "reflections"), [(5, 5), (64, 3), (200, 3), (300, 300)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_formed_matrix_is_orthogonal(n: int, reflections: int, dtype: torch.dtype, tolerance: float) -> None:
    module = product(n, reflections, dtype=dtype)
    assert module.form().dtype == dtype
    assert defect(module.form()) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_nearly_parallel_vectors_stay_orthogonal(dtype: torch.dtype, tolerance: float) -> None:
    # T has its largest entries here; without the polish the float64 defect is 1e-12.
    vectors = 1 + 1e-3 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert defect(HouseholderProduct(200, 200, vectors).form()) <= tolerance


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), data=st.data(), exponent=st.integers(-30, 30), seed=st.integers(0, 2**16))
def test_only_directions_count(n: int, data: st.DataObject, exponent: int, seed: int) -> None:
    reflections = data.draw(st.integers(1, n))
    module = product(n, reflections, seed, torch.float32)
    with torch.no_grad():
        expected = module.form(torch.float64)
        module.vectors.mul_(2.0**exponent * 10)  # 1e-8 to 1e10: their squares leave float32's range
        found = module.form(torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert defect(found) <= 1e-14


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_tiny_and_huge_vectors(scale: float) -> None:
    vectors = torch.tensor([[scale, 0.5 * scale, -scale]], dtype=torch.float32)
    torch.testing.assert_close(HouseholderProduct(3, 1, vectors).form(torch.float64), one_by_one(vectors), rtol=0, atol=1e-12)


def test_gradients() -> None:
    module = product(6, 3)
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def rotate(vectors: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional_call(module, {"vectors": vectors}, (w,))

    assert torch.autograd.gradcheck(rotate, (module.vectors, w))
    assert torch.autograd.gradgradcheck(rotate, (module.vectors, w))


@pytest.mark.parametrize("reflections", [2, 5])
def test_forming_has_the_gradients_of_rotating(reflections: int) -> None:
    # The polish in form() must not enter the derivative.
    module = product(5, reflections)
    weights = torch.randn(5, 5, dtype=torch.float64)
    formed = torch.autograd.grad((weights * module.form()).sum(), module.vectors)[0]
    rotated = torch.autograd.grad((weights * module.rotate(torch.eye(5, dtype=torch.float64))).sum(), module.vectors)[0]
    torch.testing.assert_close(formed, rotated, rtol=0, atol=1e-13)


def test_a_vector_that_becomes_zero_is_no_reflection() -> None:
    module = product(4, 3)
    with torch.no_grad():
        module.vectors[1] = 0
    torch.testing.assert_close(module.form(), one_by_one(module.vectors.detach()), rtol=0, atol=1e-14)
    (module.form() * torch.randn(4, 4, dtype=torch.float64)).sum().backward()
    gradient = module.vectors.grad
    assert gradient is not None and gradient.isfinite().all()
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_one_seed_gives_one_matrix_in_every_precision() -> None:
    first = HouseholderProduct(5, 2, generator=torch.Generator().manual_seed(3))
    torch.set_default_dtype(torch.float64)
    try:
        second = HouseholderProduct(5, 2, generator=torch.Generator().manual_seed(3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (first.vectors.dtype, second.vectors.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(first.vectors.double(), second.vectors, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("n", "reflections", "vectors", "message"),
    [
        (0, 1, None, "n=0 must be at least 1"),
        (-2, 1, None, "n=-2"),
        (3, 0, None, "reflections=0 must be from 1 to n=3"),
        (3, 4, None, "reflections=4 must be from 1 to n=3; change reflections"),
        (3, 2, torch.ones(3, 2), r"shape \(3, 2\), expected \(reflections, n\) = \(2, 3\)"),
        (2, 2, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "row 1 is zero"),
        (2, 1, torch.tensor([[1.0, float("nan")]]), "not finite"),
    ],
)
def test_bad_input(n: int, reflections: int, vectors: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HouseholderProduct(n, reflections, vectors)


def test_rows_of_another_size() -> None:
    with pytest.raises(ValueError, match="rows of size 4 meet a matrix of n=3"):
        product(3, 1).rotate(torch.ones(2, 4))
