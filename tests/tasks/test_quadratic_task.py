"""The simulated quadratic of benchopt's bilevel suite: its value function is right, and every method descends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperopt import CG, F2SA, SABA, SOBA, VPBGD, GradientDescent, Implicit, Real, StocBiO, Unrolled
from hyperopt.app.repro import seed_everything
from hyperopt.tasks.base import Environment
from hyperopt.tasks.quadratic import QuadraticTask

DOUBLE = torch.float64


def made(seed: int = 0, **settings: Any) -> QuadraticTask:
    small: dict[str, Any] = {"rows": 400, "val_rows": 300, "dim": 12, "hyper_dim": 4, "lam": Real(init=-2.0, per="element")}
    task = QuadraticTask(**{**small, **settings})
    task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, seed_everything(seed)))
    return task


def exact(task: QuadraticTask, lam: torch.Tensor) -> torch.Tensor:
    """``h(lam)`` by solving the inner problem on all of its rows."""
    (inner, outer), (hessian, _, cross, linear, _) = task.sums, task.sums[0].mean()
    w = -torch.linalg.solve(hessian, cross.T @ lam + linear)
    assert len(inner.x) == task.rows
    return task.built.problem.outer_loss(w, {"lam": lam}, tuple(outer))


def test_the_value_function_is_that_of_the_losses() -> None:
    task = made()
    lam = torch.randn(4, dtype=DOUBLE)
    with torch.no_grad():
        task.groups()["lam"][0].copy_(lam)
    found = task.evaluate()
    assert found["outer/loss"] == pytest.approx(float(exact(task, lam)), rel=1e-10)
    assert found["outer/suboptimality"] == pytest.approx(float(exact(task, lam) - exact(task, task.best)), rel=1e-8)
    best = task.best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact(task, best), best)
    torch.testing.assert_close(slope, torch.zeros(4, dtype=DOUBLE), rtol=0, atol=1e-10)


def test_there_is_no_model_to_export() -> None:
    with pytest.raises(NotImplementedError, match=r"task=quadratic .* cannot be exported"):
        made().learned()


def test_the_spectra_are_those_that_were_asked_for() -> None:
    hessian, hyper, cross, _, _ = made(rows=100_000, cross=0.5).sums[0].mean()
    values = torch.linalg.eigvalsh(hessian)
    assert 0.09 < float(values[0]) < 0.11 and 0.95 < float(values[-1]) < 1.05
    assert abs(float(torch.linalg.eigvalsh(hyper)[0])) < 1e-10  # one direction has no curvature of its own
    singular = torch.linalg.svdvals(cross)
    assert 0.08 < float(singular[-1]) < 0.12 and 0.47 < float(singular[0]) < 0.53


METHODS = {
    "saba": SABA(step_size=0.1),
    "soba": SOBA(step_size=0.1),
    "stocbio": StocBiO(step_size=0.1),
    "f2sa": F2SA(step_size=0.1),
    "v_pbgd": VPBGD(step_size=0.1),
    "cg": Implicit(CG()),
    "unrolled": Unrolled(),
}


@pytest.mark.cases(quick=1, slow=3, among={"name": ["cg", "soba"]})
@pytest.mark.parametrize("name", METHODS)
def test_every_method_descends(name: str) -> None:
    deterministic = {"batch_size": None, "val_batch_size": None, "inner": GradientDescent(step_size=0.5, max_steps=30)}
    task = made(adjoint=METHODS[name], **(deterministic if name in ("cg", "unrolled") else {}))
    start = task.evaluate()["outer/suboptimality"]
    optimizer = torch.optim.SGD(task.groups()["lam"], lr=0.1)
    for _ in range(100):
        task.step(optimizer, lambda gradients: None)
    assert task.evaluate()["outer/suboptimality"] < 0.3 * start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least": 2.0}, "least=2.0 is above largest=1.0"),
        ({"rows": 0}, "rows=0"),
        ({"batch_size": 401}, "a batch cannot have 401 rows of a data set of 400"),
        ({"cross": 1e3}, "no minimum in 20 draws of cross=1000"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**settings)
