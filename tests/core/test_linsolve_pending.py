"""Krylov methods test nothing in a step: what a step that breaks down leaves behind, and what the looks cost in products."""

import pytest
import torch
from core_reference import close
from test_linsolve import KRYLOV, Operator, orthogonal, symmetric, true_residual

from hyperopt import CG, GMRES, MINRES, BiCGStab, Status
from hyperopt.core.linear import pending
from hyperopt.core.linear.krylov import Recurrence
from hyperopt.core.memory import peak_memory
from hyperopt.core.operator import LinearOperator
from hyperopt.core.rowwise import CHUNK, combine, distance, dots, orthogonalise

pytestmark = pytest.mark.usefixtures("float64")

SHORT = {"cg": CG, "minres": MINRES, "bicgstab": BiCGStab}


def of_values(*values):
    """``M = I - A`` with ``A`` symmetric, of the given eigenvalues in each row."""
    return torch.stack([torch.eye(len(v)) - (q := orthogonal(len(v))) @ torch.diag(torch.tensor(v)) @ q.T for v in values])


@pytest.mark.parametrize("settings", [{"rtol": 1e-9}, {"rtol": 0, "atol": 0, "max_steps": 7}, {"rtol": 1e-9, "max_steps": 20}])
@pytest.mark.parametrize("room", [1, 2, 5, 64])
@pytest.mark.parametrize("name", SHORT)
def test_the_value_does_not_depend_on_how_many_steps_are_kept(name, room, settings, monkeypatch):
    op, b = Operator(torch.stack([symmetric(12, -0.5, high) for high in (0.2, 0.9, 0.97)])), torch.randn(3, 12)
    usual = SHORT[name](**settings).solve(op, b)
    monkeypatch.setattr(pending, "ROOM", room)
    found = SHORT[name](**settings).solve(op, b)
    assert torch.equal(found.stats.row_status, usual.stats.row_status)
    close(found.value, usual.value, rtol=1e-7, atol=1e-8)


def test_a_large_state_keeps_one_step():
    assert pending.Pending(torch.empty(1, pending.LARGE)).room == 1
    assert pending.Pending(torch.empty(1, 10)).room == pending.ROOM


@pytest.mark.parametrize("room", [1, 16])
@pytest.mark.parametrize("before", [1, 2, 3, 6])
def test_steps_before_negative_curvature_are_kept_and_none_after(before, room, monkeypatch):
    """The iterate is that of textbook conjugate gradients, at any place between two looks."""
    monkeypatch.setattr(pending, "ROOM", room)
    n = before + 2
    a = torch.eye(n) - of_values([-0.05, *torch.linspace(0.5, 2.0, n - 1).tolist()])[0]
    b = torch.randn(1, n)
    r = p = b[0]
    x, steps = torch.zeros(n), 0
    while float(p @ a @ p) > 0:
        alpha = (r @ r) / (p @ a @ p)
        x, after = x + alpha * p, r - alpha * a @ p
        r, p, steps = after, after + (after @ after) / (r @ r) * p, steps + 1
    found = CG(1e-12).solve(Operator(torch.eye(n) - a), b)
    assert found.stats.status == Status.negative_curvature and 0 < steps <= n
    if float(r.norm()) < float(b.norm()):  # a value worse than 0 is not given back
        close(found.value[0], x, rtol=1e-7)


@pytest.mark.parametrize("name", KRYLOV)
def test_a_row_that_is_solved_at_once_stays_solved_while_others_go_on(name):
    """Its residual is exactly 0 in the middle of a cycle: the next direction must not lead away from the solution."""
    m = torch.stack([0.5 * torch.eye(15), symmetric(15, -0.9, 0.97), torch.zeros(15, 15)])
    op, b = Operator(m), torch.randn(3, 15)
    b[0] = torch.tensor([1.0, *[0.0] * 14])
    found = KRYLOV[name](1e-9, max_steps=300).solve(op, b)
    assert found.stats.row_status.tolist() == [Status.converged] * 3
    assert found.stats.iterations[0] <= 1 and found.stats.iterations[2] <= 1
    close(found.value, op.solution(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", ["nan", "inf", "singular", "zero", "huge"])
@pytest.mark.parametrize("name", KRYLOV)
def test_a_row_that_breaks_down_leaves_the_others_alone(name, bad):
    n = 10
    last = {
        "nan": torch.full((n, n), torch.nan),
        "inf": torch.full((n, n), torch.inf),
        "singular": of_values([0.0, *torch.linspace(0.3, 1.2, n - 1).tolist()])[0],
        "zero": torch.eye(n),
        "huge": 1e200 * symmetric(n),
    }[bad]
    good = torch.stack([symmetric(n, -0.3, high) for high in (0.5, 0.9)])
    b = torch.randn(3, n)
    found = KRYLOV[name](1e-9, max_steps=200).solve(Operator(torch.cat([good, last[None]])), b)
    assert found.stats.row_status[:2].tolist() == [Status.converged] * 2
    close(found.value[:2], Operator(good).solution(b[:2]), rtol=1e-6, atol=1e-7)
    assert bool(torch.isfinite(found.value).all())
    if bad != "huge":
        assert int(found.stats.row_status[2]) > Status.fixed_steps
    if bad in ("nan", "inf"):
        assert found.stats.row_status[2] == Status.nonfinite and torch.equal(found.value[2], b[2])


@pytest.mark.parametrize("settings", [{}, {"rtol": 1e-12}, {"rtol": 0, "atol": 0, "max_steps": 3}])
@pytest.mark.parametrize("name", KRYLOV)
def test_without_a_right_hand_side_the_solution_is_0_whatever_the_products_are(name, settings):
    m = torch.full((2, 4, 4), torch.nan)
    found = KRYLOV[name](**settings).solve(Operator(m), torch.zeros(2, 4))
    assert torch.equal(found.value, torch.zeros(2, 4)) and not found.stats.status.failed
    assert int(found.stats.iterations.max()) <= settings.get("max_steps", 0)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_a_row_that_can_do_no_more_is_told_soon(name):
    """``A = 0`` or exhausted spaces are found at the looks, not at the end of the budget."""
    m = torch.stack([symmetric(12, -0.5, 0.9), torch.eye(12)])
    found = SHORT[name](1e-8, max_steps=1000).solve(Operator(m), torch.randn(2, 12))
    assert found.stats.row_status.tolist() == [Status.converged, Status.breakdown] and found.stats.vjps <= 20
    singular = of_values([0.0, 0.0, 0.5, 0.7, 0.9, 1.1])
    found = SHORT[name](1e-8, max_steps=1000).solve(Operator(singular), torch.randn(1, 6))
    assert found.stats.status.failed and found.stats.vjps <= 40


@pytest.mark.parametrize("condition", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", KRYLOV)
def test_hardly_a_product_more_than_looking_at_every_iteration(name, rows, condition, monkeypatch):
    op, b = Operator(symmetric(30, 1 - 1.0, 1 - 1 / condition)), torch.randn(rows, 30)
    found = KRYLOV[name](1e-6, max_steps=300).solve(op, b)
    monkeypatch.setattr(Recurrence, "attentive", True)
    monkeypatch.setattr(Recurrence, "first_check", property(lambda self: 0, lambda self, value: None), raising=False)
    least = KRYLOV[name](1e-6, max_steps=300).solve(op, b)
    assert found.stats.status == least.stats.status == Status.converged
    a_step = 2 if name == "bicgstab" else 1
    assert found.stats.vjps <= least.stats.vjps + a_step * max(1, 0.05 * int(least.stats.iterations.max())) + 1
    assert bool((true_residual(op, found.value, b) <= 1e-6).all())


@pytest.mark.parametrize("asymmetry", [1e-5, 1e-3, 0.1])
def test_conjugate_gradients_tell_that_a_map_is_not_symmetric(asymmetry):
    skew = torch.randn(40, 40)
    m = symmetric(40, -0.5, 0.95) + asymmetry * (skew - skew.T) / 20
    found = CG(1e-10, max_steps=300).solve(Operator(m), torch.randn(3, 40))
    assert found.stats.row_status.tolist() == [Status.breakdown] * 3 and found.stats.vjps <= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e2, 1e4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
def test_rounding_is_no_asymmetry(condition, scale, dtype):
    a = torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), 25)) * scale
    q = orthogonal(25)
    op = Operator((torch.eye(25) - q @ a @ q.T).to(dtype))
    found = CG(1e-3, max_steps=500).solve(op, torch.randn(4, 25, dtype=dtype))
    assert found.stats.row_status.tolist() != [Status.breakdown] * 4


def test_products_that_a_gpu_would_round_are_sums(monkeypatch):
    vectors, x, weights = torch.randn(3, 4, 5), torch.randn(3, 5), torch.randn(3, 4, 1)
    start = torch.randn(3, 4, 1)
    want = dots(vectors, x), dots(vectors, x, start, 0.5), combine(x, weights, vectors, -2.0)
    monkeypatch.setattr("hyperopt.core.rowwise.rounds", lambda a: True)
    for one, other in zip(
        want, (dots(vectors, x), dots(vectors, x, start, 0.5), combine(x, weights, vectors, -2.0)), strict=True
    ):
        close(one, other, rtol=1e-13)
    for kind in (CG, MINRES, BiCGStab, GMRES):
        op, b = Operator(symmetric(9)), torch.randn(2, 9)
        close(kind(1e-10).solve(op, b).value, op.solution(b), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(7, 3, 5), (300, 3, 900), (3, 3, CHUNK)])  # at once, in parts, and one row a part
def test_two_passes_of_gram_schmidt_leave_what_is_orthogonal(shape):
    vectors = torch.linalg.qr(torch.randn(shape).mT)[0].mT
    x = torch.randn(shape[0], shape[2])
    rest, h = orthogonalise(vectors, x)
    close(h, vectors @ x[:, :, None])
    close(rest, x - (h.mT @ vectors)[:, 0])
    close(vectors @ rest[:, :, None], torch.zeros_like(h), atol=1e-12)


@pytest.mark.parametrize("shape", [(CHUNK, 9), (3, CHUNK), (1, CHUNK + 1)])
def test_the_distance_of_large_states_is_taken_in_parts(shape):
    a, b = torch.randn(shape), torch.randn(shape).requires_grad_()
    assert torch.equal(distance(a, b), torch.linalg.vector_norm(a - b, dim=1))
    (g,) = torch.autograd.grad(distance(a, b).sum(), b)
    close(g, (b.detach() - a) / torch.linalg.vector_norm(a - b.detach(), dim=1, keepdim=True))
    with torch.no_grad(), peak_memory("cpu") as memory:
        distance(a, b)
    if shape[0] > 3:
        assert memory.peak < a.numel() * a.element_size() / 2


@pytest.mark.parametrize(
    ("name", "states"), [("cg", 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("minres", 12), ("bicgstab", 13)))]
)
def test_memory_of_a_large_solve(name, states):
    b, d = torch.randn(2, 1_000_000), torch.linspace(-0.5, 0.9, 1_000_000)
    with torch.no_grad(), peak_memory("cpu") as memory:
        found = SHORT[name](1e-4).solve(Diagonal(d), b)
    assert found.stats.status == Status.converged
    assert memory.peak <= states * b.numel() * b.element_size(), memory.peak / (b.numel() * b.element_size())


class Diagonal(LinearOperator):
    """``v -> d v``."""

    def __init__(self, d):
        self.d = d

    def _matvec(self, v):
        return v * self.d
