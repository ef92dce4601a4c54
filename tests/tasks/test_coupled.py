"""Two coupled states of different shapes: the primitive on their tuple, the model, and the task that trains them."""

import math
from typing import Any

import pytest
import torch
from core_reference import close
from torch.autograd import gradcheck, gradgradcheck

from hyperopt import GMRES, Anderson, Implicit, Picard, Unrolled, check_hypergradient, fixed_point
from hyperopt.nn.contractive import ProjectedMatrix
from hyperopt.nn.coupled import CoupledCell, coupled_map
from hyperopt.tasks.base import Environment
from hyperopt.tasks.coupled import CoupledTask

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:The .grad attribute:UserWarning"),
]

EXACT = Implicit(GMRES(1e-13, max_steps=200), policy="raise")
METHODS: dict[str, Any] = {"solver": Anderson(1e-13, max_steps=500), "adjoint": EXACT}


def inputs(rows=2, x_size=2, y_shape=(2, 3)):
    size = x_size + math.prod(y_shape)
    m = torch.randn(size, size)
    m = (0.7 * m / torch.linalg.matrix_norm(m, 2)).requires_grad_()
    return torch.randn(rows, x_size, requires_grad=True), torch.randn(rows, *y_shape, requires_grad=True), m


def solve(u_x, u_y, m):
    w0 = torch.zeros_like(u_x), torch.zeros_like(u_y)
    return fixed_point(coupled_map, w0, (u_x, u_y, m), policy="raise", **METHODS).value


def test_both_states_solve_their_equations():
    u_x, u_y, m = inputs()
    x, y = solve(u_x, u_y, m)
    for got, want in zip(coupled_map((x, y), u_x, u_y, m), (x, y), strict=True):
        close(got, want, rtol=1e-12)
    joined = torch.cat([x, y.flatten(1)], 1)  # the blocks are those of one matrix
    close(torch.tanh(joined @ m + torch.cat([u_x, u_y.flatten(1)], 1)), joined, rtol=1e-12)


@pytest.mark.slow
def test_first_and_second_derivatives():
    given = inputs(x_size=1, y_shape=(1, 2))
    assert gradcheck(solve, given, eps=1e-6, atol=1e-8)
    assert gradgradcheck(solve, given, eps=1e-6, atol=1e-7)


def made(seed=0, **settings) -> CoupledTask:
    task = CoupledTask(x_size=3, y_shape=(2, 2), features=4, rows=60, max_norm=0.8, **{**METHODS, **settings})
    task.setup(Environment(torch.device("cpu"), torch.float64, seed, False, torch.Generator().manual_seed(seed)))
    return task


def test_the_hypergradient_of_the_task_passes_every_check():
    task = made()
    report = check_hypergradient(task.objective, task.groups(), **METHODS, tolerance=1e-6)
    assert report.passed, str(report)


@pytest.mark.manual
def test_training_matches_rows_that_were_never_fitted():
    task = made()
    optimizer = torch.optim.Adam([p for group in task.groups().values() for p in group], 0.05)
    before = task.evaluate()
    assert min(before["test/error_x"], before["test/error_y"]) > 0.3
    for _ in range(250):
        task.step(optimizer, lambda gradients: None)
    after = task.evaluate()
    assert max(after["test/error_x"], after["test/error_y"]) < 0.12
    assert float(torch.linalg.matrix_norm(task._cell.recurrent.matrix().detach(), 2)) <= 0.8 * (1 + 1e-9)


def test_without_an_adjoint_solve_there_is_no_certificate():
    task = made(solver=Picard(max_steps=500), adjoint=Unrolled())
    record = task.step(torch.optim.SGD([p for group in task.groups().values() for p in group], 0.01), lambda gradients: None)
    assert "hypergrad/error_estimate" not in record.metrics
    record = made().step(torch.optim.SGD([torch.zeros(1)], 0.01), lambda gradients: None)
    assert record.metrics["hypergrad/error_estimate"] >= 0


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    one, same, other = made(), made(), made(seed=1)
    assert torch.equal(one.inputs["val"], same.inputs["val"]) and torch.equal(one.targets["val"][1], same.targets["val"][1])
    assert not torch.equal(one.inputs["val"], other.inputs["val"]) and not torch.equal(one.inputs["val"], one.inputs["test"])


def test_bad_input_is_named():
    bad: dict[str, Any]
    for bad in ({"y_shape": (3,)}, {"y_shape": (3, 0)}, {"x_size": 0}, {"max_norm": 1.0}, {"noise": -1.0}, {"rows": 0}):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=f"CoupledTask: {name}="):
            CoupledTask(**bad)
    with pytest.raises(ValueError, match="matrix is 4 x 4, but x and y have 8 entries"):
        CoupledCell(3, 2, (2, 3), ProjectedMatrix(4, 0.9, 0.1))
