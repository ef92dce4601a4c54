"""Checkpointed unrolling: the numbers of plain unrolling, in the memory of a few steps."""

import weakref

import pytest
import torch
from core_reference import Counted, close, square
from torch.autograd import gradcheck, gradgradcheck

from hyperopt import RRE, Anderson, Broyden, Checkpointed, Picard, Status, Unrolled, fixed_point

pytestmark = pytest.mark.usefixtures("float64")


def problem(rows=4, n=3, q=0.8):
    m = torch.randn(n, n)
    return (m * (q / torch.linalg.matrix_norm(m, 2))).requires_grad_(), torch.randn(rows, n).requires_grad_()


SOLVERS = {
    "picard": Picard(1e-10, max_steps=300),
    "picard, fixed": Picard(0, 0, 23),
    "damped": Picard(1e-8, max_steps=300, damping=0.5),
    "anderson": Anderson(1e-10, max_steps=60),
    "anderson, fixed": Anderson(0, 0, 12),
    "rre": RRE(1e-9, max_steps=60),
    "broyden": Broyden(1e-9, max_steps=40),
    "one step": Picard(0, 0, 1),
}


@pytest.mark.parametrize("segment", [None, 1, 4, 1000])
@pytest.mark.parametrize("name", SOLVERS)
def test_equal_to_unrolled(name, segment):
    m, b = problem()
    found = []
    for adjoint in (Unrolled(), Checkpointed(segment)):
        phi = Counted(lambda w: {"x": torch.tanh(w["x"] @ m + b)})
        sol = fixed_point(phi, {"x": torch.zeros(4, 3)}, solver=SOLVERS[name], adjoint=adjoint)
        assert sol.forward.evaluations == phi.calls
        forward = phi.calls
        found.append((sol, torch.autograd.grad(square(sol.value), [m, b])))
        if isinstance(adjoint, Checkpointed):
            assert phi.calls <= 2 * forward
    (plain, want), (sol, got) = found
    assert torch.equal(sol.value["x"], plain.value["x"])
    assert torch.equal(sol.forward.row_status, plain.forward.row_status)
    assert torch.equal(sol.forward.iterations, plain.forward.iterations)
    for x, y in zip(got, want, strict=True):
        close(x, y, rtol=1e-12, atol=1e-12)


def test_memory_grows_with_the_root_of_the_steps():
    m, b = problem()

    def alive(adjoint, steps):
        refs = []

        def phi(w):
            out = torch.tanh(w @ m + b)
            refs.append(weakref.ref(out))
            return out

        sol = fixed_point(phi, torch.zeros(4, 3), solver=Picard(0, 0, steps), adjoint=adjoint)
        kept = sum(ref() is not None for ref in refs)
        square(sol.value).backward()
        return kept

    assert alive(Unrolled(), 100) == 100 and alive(Unrolled(), 400) == 400
    assert alive(Checkpointed(), 100) <= 11 and alive(Checkpointed(), 400) <= 21


def test_both_derivatives():
    m, b = problem(2, 2)

    def solve(m, b):
        return fixed_point(
            lambda w: torch.tanh(w @ m + b), torch.zeros(2, 2), solver=Picard(0, 0, 9), adjoint=Checkpointed()
        ).value

    assert gradcheck(solve, (m, b))
    assert gradgradcheck(solve, (m, b))


def test_a_failed_row_is_told_and_no_graph_is_made_without_gradients():
    m, b = problem()
    bad = b.detach().clone()
    bad[1, 0] = float("nan")
    sol = fixed_point(
        lambda w: torch.tanh(w @ m + bad), torch.zeros(4, 3), solver=SOLVERS["picard"], adjoint=Checkpointed(), policy="ignore"
    )
    assert sol.forward.row_status[1] == Status.nonfinite and int((sol.forward.row_status == Status.converged).sum()) == 3
    with torch.no_grad():
        assert not fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3), adjoint=Checkpointed()).value.requires_grad


def test_under_torch_func_it_is_unrolled():
    m, b = (x.detach() for x in problem())

    def f(m, adjoint):
        return square(fixed_point(lambda w: torch.tanh(w @ m + b), torch.zeros(4, 3), adjoint=adjoint).value)

    got, want = (torch.func.grad(lambda m, a=a: f(m, a))(m) for a in (Checkpointed(), Unrolled()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
