"""MAML and implicit MAML on sine curves: tasks solved together are each solved as alone, and differentiated right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from composing import composed
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt import CG, SOBA, Checkpointed, Dense, GradientDescent, Implicit, OneStep, Unrolled
from hyperopt.app.building import build
from hyperopt.app.config import ConfigError
from hyperopt.app.repro import seed_everything
from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.bilevel.inner.lbfgs import InnerLBFGS
from hyperopt.core.policy import SolveError
from hyperopt.tasks.base import Environment
from hyperopt.tasks.meta import Episodes
from hyperopt.tasks.sinusoid import SinusoidTask

DOUBLE = torch.float64
SMALL: dict[str, Any] = {"tasks": 3, "shots": 4, "queries": 5, "hidden": (6,), "val_tasks": 2, "test_tasks": 3}


class LinearTask(SinusoidTask):
    """Sine curves for a linear model, whose inner problem has a closed form."""

    def network(self, env: Environment) -> nn.Module:
        return nn.Linear(1, 1)


def made(kind: type[SinusoidTask] = SinusoidTask, seed: int = 0, **settings: Any) -> SinusoidTask:
    task = kind(**{**SMALL, "inner": GradientDescent(step_size=0.02, max_steps=3), **settings})
    task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, seed_everything(seed)))
    return task


def gradients(task: SinusoidTask) -> dict[str, list[Tensor]]:
    """The hypergradients of the next outer step."""
    found: dict[str, list[Tensor]] = {}

    def keep(grads: Mapping[str, Any]) -> None:
        found.update({name: [g.clone() for g in group] for name, group in grads.items()})

    stays = torch.optim.SGD([tensor for group in task.groups().values() for tensor in group], lr=1e-300)
    task.step(stays, keep)
    return found


def one(episodes: Episodes, task: int) -> Episodes:
    return Episodes(*(getattr(episodes, name)[task] for name in ("x", "y", "query_x", "query_y")))


def by_a_loop(task: SinusoidTask, steps: int, rate: Any = 0.02) -> tuple[float, dict[str, Tensor], Any]:
    """MAML by a loop over the tasks of the latest step and plain autograd: the outer loss and its gradients."""
    module = task.model.module
    theta = {name: leaf.clone().requires_grad_() for name, leaf in task.hyper.read()["initial"].items()}
    rates = rate if isinstance(rate, dict) else dict.fromkeys(theta, torch.tensor(rate, dtype=DOUBLE))
    rates = {name: leaf.clone().requires_grad_() for name, leaf in rates.items()}
    total = torch.zeros((), dtype=DOUBLE)
    for t in range(task.tasks):
        at, w = one(task.episodes, t), theta
        for _ in range(steps):
            loss = (functional_call(module, w, at.x) - at.y).square().mean()
            loss = loss + task.proximal / 2 * sum((w[name] - theta[name]).square().sum() for name in w)
            slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {name: leaf - rates[name] * g for (name, leaf), g in zip(w.items(), slopes, strict=True)}
        total = total + (functional_call(module, w, at.query_x) - at.query_y).square().mean() / task.tasks
    found = torch.autograd.grad(total, [*theta.values(), *rates.values()])
    of_rates = dict(zip(rates, found[len(theta) :], strict=True))
    return total.item(), dict(zip(theta, found[: len(theta)], strict=True)), of_rates


def assert_close(found: list[Tensor], names: list[str], wanted: dict[str, Tensor], rtol: float = 1e-9) -> None:
    for name, g in zip(names, found, strict=True):
        torch.testing.assert_close(g, wanted[name], rtol=rtol, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(segment=2)], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_maml_is_a_loop_over_tasks(adjoint: Any, steps: int, proximal: float) -> None:
    task = made(adjoint=adjoint, inner=GradientDescent(step_size=0.02, max_steps=steps), proximal=proximal)
    found = gradients(task)["initial"]
    _, wanted, _ = by_a_loop(task, steps)
    assert_close(found, sorted(wanted), wanted)


@pytest.mark.parametrize("steps", [1, 4])
def test_meta_sgd_is_a_loop_over_tasks(steps: int) -> None:
    task = made(meta_sgd=True, inner=GradientDescent(step_size=0.03, max_steps=steps))
    draw = torch.Generator().manual_seed(0)
    for leaf in task.groups()["rate"]:
        assert leaf.eq(0.03).all()
        leaf.data += 0.01 * torch.randn(leaf.shape, generator=draw, dtype=DOUBLE)  # unlike from weight to weight
    found, rates = gradients(task), task.hyper.read()["rate"]
    _, wanted, of_rates = by_a_loop(task, steps, rates)
    assert_close(found["initial"], sorted(wanted), wanted)
    assert_close(found["rate"], sorted(of_rates), of_rates)


def test_implicit_maml_is_the_closed_form_of_a_linear_model() -> None:
    """``w_t = (X^T X 2 / n + p)^-1 (X^T y 2 / n + p theta)``, through which plain autograd goes."""
    inner = InnerLBFGS(rtol=1e-12, max_steps=200)
    task = made(LinearTask, proximal=0.4, inner=inner, adjoint=Implicit(CG(rtol=1e-12)))
    found = gradients(task)["initial"]
    start = task.hyper.read()["initial"]
    theta = torch.cat([start["weight"].flatten(), start["bias"]]).requires_grad_()

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x)], -1)

    at = task.episodes
    x, n = rows(at.x), at.x.shape[1]
    matrix = 2 / n * x.mT @ x + 0.4 * torch.eye(2, dtype=DOUBLE)
    w = torch.linalg.solve(matrix, 2 / n * x.mT @ at.y + 0.4 * theta[:, None])
    (wanted,) = torch.autograd.grad((rows(at.query_x) @ w - at.query_y).square().mean(), theta)
    assert_close(found, ["bias", "weight"], {"bias": wanted[1:], "weight": wanted[:1, None]}, 1e-8)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_implicit_maml_is_the_limit_of_unrolled_training(seed: int) -> None:
    shared: dict[str, Any] = {"proximal": 10.0, "seed": seed}
    trained = GradientDescent(step_size=0.02, max_steps=150)
    one = gradients(made(**shared, inner=trained, adjoint=Implicit(Dense())))["initial"]
    other = gradients(made(**shared, inner=trained, adjoint=Unrolled()))["initial"]
    for g, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-6, atol=1e-9)


def test_gauss_newton_products_of_a_linear_model_are_exact() -> None:
    inner, adjoint = InnerLBFGS(rtol=1e-12, max_steps=200), Implicit(CG(rtol=1e-12))
    exact, near = (
        gradients(made(LinearTask, proximal=0.4, inner=inner, adjoint=adjoint, products=ProductSettings(curvature=kind)))
        for kind in ("hessian", "gauss_newton")
    )
    for g, wanted in zip(near["initial"], exact["initial"], strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-8, atol=1e-12)


def test_one_step_is_first_order_maml() -> None:
    """It is the mean of the outer gradients at the adapted weights, times the step and the strength of the pull."""
    task = made(proximal=0.5, adjoint=OneStep())
    found = gradients(task)["initial"]
    w = {name: leaf.clone().requires_grad_() for name, leaf in task.bilevel.w.items()}
    loss = task.built.problem.outer_loss(w, task.hyper.read(), None)
    wanted = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    assert_close(found, sorted(w), {name: 0.5 * 0.02 * g.sum(0) for name, g in wanted.items()})


def test_a_task_is_solved_as_it_would_be_alone() -> None:
    task = made(proximal=0.3)
    at = task.drawn("val", 0, 4)
    together = task.adapted(at, 5)
    for t in range(4):
        alone = task.adapted(Episodes(*(leaf[t : t + 1] for leaf in (at.x, at.y, at.query_x, at.query_y))), 5)
        for name, leaf in alone.items():
            torch.testing.assert_close(leaf[0], together[name][t], rtol=1e-12, atol=1e-14)


def test_the_measures_are_those_of_a_loop_over_tasks() -> None:
    task = made(eval_shots=(2, 4), eval_steps=(0, 2))
    found = task.evaluate()
    assert {name for name in found if name.startswith("test/loss_")} == {
        f"test/loss_{shots}_shots_{steps}_steps" for shots in (2, 4) for steps in (0, 2)
    }
    for split, count in (("outer", 3), ("val", 2), ("test", 3)):
        other = made(tasks=count)
        other.episodes = task.drawn(split, 0, count)
        assert found[f"{split}/loss"] == pytest.approx(by_a_loop(other, 3)[0], rel=1e-10)
    assert found["test/loss_4_shots_0_steps"] == found["test/loss_2_shots_0_steps"]  # nothing is learned from any shot
    assert found["test/loss_4_shots_2_steps"] != found["test/loss_2_shots_2_steps"]


def test_an_evaluation_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(val_tasks=5)
    whole = task.evaluate()
    monkeypatch.setattr("hyperopt.tasks.meta.AT_A_TIME", 2)
    assert task.evaluate() == pytest.approx(whole, rel=1e-12)
    assert set(whole) == set(task.MEASURES)


def test_more_steps_than_were_learned_for_may_diverge() -> None:
    """The further measure is NaN then, and the run goes on; after the inner solver's own steps it is an error."""
    task = made(inner=GradientDescent(step_size=0.5, max_steps=1), eval_steps=(0, 1, 200))
    found = task.evaluate()
    assert math.isfinite(found["test/loss"]) and found["test/loss_4_shots_1_steps"] == found["test/loss"]
    assert math.isnan(found["test/loss_4_shots_200_steps"]) and set(task.figures()) == {"curves"}
    with pytest.raises(SolveError, match="diverged"):
        made(inner=GradientDescent(step_size=0.5, max_steps=200)).evaluate()


def test_tasks_are_drawn_by_the_seed_and_their_number_alone() -> None:
    task, other = made(), made(seed=1)
    first, again = task.drawn("outer", 0, 5), task.drawn("outer", 3, 2)
    assert torch.equal(first.x[3:], again.x) and torch.equal(first.query_y[3:], again.query_y)
    assert not torch.equal(first.x, task.drawn("val", 0, 5).x) and not torch.equal(first.x, other.drawn("outer", 0, 5).x)
    for at in (first, task.drawn("test", 0, 500)):
        assert float(at.x.abs().max()) <= 5 and float(at.y.abs().max()) <= 5
        assert len({tuple(row.flatten().tolist()) for row in at.x}) == len(at.x)
    many = task.drawn("test", 0, 2000, 30)
    assert 2.3 < float(many.y.abs().amax((1, 2)).mean()) < 2.7  # amplitudes are 2.55 in the mean


def test_each_outer_step_has_new_tasks_and_a_continued_run_has_the_same() -> None:
    task, other = made(), made()
    seen = []
    optimizer = torch.optim.Adam(task.groups()["initial"], lr=1e-2)
    for _ in range(2):
        task.step(optimizer, lambda grads: None)
        seen.append(task.episodes.x)
    assert not torch.equal(*seen)
    other.load_state_dict(task.state_dict())
    assert torch.equal(
        torch.cat([g.flatten() for g in gradients(task)["initial"]]),
        torch.cat([g.flatten() for g in gradients(other)["initial"]]),
    )
    assert torch.equal(task.episodes.x, other.episodes.x) and not torch.equal(task.episodes.x, seen[-1])


def test_an_evaluation_changes_nothing() -> None:
    task, other = made(), made()
    task.evaluate()
    task.figures()
    for g, wanted in zip(gradients(task)["initial"], gradients(other)["initial"], strict=True):
        assert torch.equal(g, wanted)


def test_the_inner_solver_of_implicit_maml_is_stable_where_the_curvature_has_grown() -> None:
    """The experiment's own solver comes near the minimum there, where steps of 0.01 of gradient descent move away from it."""
    given = composed("experiment=imaml_sinusoid")
    inner = instantiate(given.inner)

    def lowered(inner: Any) -> Tensor:
        """The inner loss of each task where ``inner`` ends, as a share of that at initial weights of large curvature."""
        task = made(hidden=(40, 40), proximal=given.task.proximal, adjoint=Implicit(CG()), inner=inner)
        with torch.no_grad():
            for leaf in task.groups()["initial"]:
                leaf.mul_(3.0)
        at, start = task.drawn("val", 0, 5), task.hyper.read()["initial"]
        w = task.adapted(at)
        pull = sum((w[name] - start[name]).square().flatten(1).sum(1) for name in w)
        first = task.losses(task.outputs(task.rows_of(start, 5), at.x), at.y)
        return (task.losses(task.outputs(w, at.x), at.y) + task.proximal / 2 * pull) / first

    assert lowered(inner).max() < 0.15
    assert lowered(GradientDescent(step_size=0.01, max_steps=inner.max_steps)).max() > 2


@pytest.mark.slow
def test_it_learns_to_learn() -> None:
    """After 60 outer steps one inner step lowers the loss of new curves; at first it does next to nothing."""
    task = made(
        tasks=10, shots=10, hidden=(20,), val_tasks=50, inner=GradientDescent(step_size=0.02, max_steps=1), eval_steps=(0, 1)
    )
    optimizer = torch.optim.Adam(task.groups()["initial"], lr=2e-2)
    before = task.evaluate()["val/loss"]
    for _ in range(60):
        task.step(optimizer, lambda grads: None)
    after = task.evaluate()
    assert after["val/loss"] < 0.85 * before
    assert after["test/loss_10_shots_1_steps"] < after["test/loss_10_shots_0_steps"]


REFUSED = {
    "tasks=0": r"^SinusoidTask: tasks=0 must be .*; change tasks$",
    "shots=0": r"^SinusoidTask: shots=0 must be .*; change shots$",
    "queries": r"^SinusoidTask: queries=-1 must be .*; change queries$",
    "proximal": r"^SinusoidTask: proximal=-1 is not in .*; change proximal$",
    "eval_steps": r"^SinusoidTask: eval_steps=\[-1\] must list .*; change eval_steps$",
    "implicit without a pull": r"adjoint=Implicit differentiates the minimum.*proximal=0.*; change adjoint to unrolled",
    "chosen by itself": r"adjoint=auto differentiates the minimum.*; change adjoint to unrolled",
    "implicit with rates": r"adjoint=Implicit differentiates the minimum.*a rate; change adjoint to unrolled",
    "single loop": r"adjoint=SOBA continues training from one outer step to the next.*; change adjoint$",
    "no way back": r"adjoint=Unrolled cannot differentiate inner=InnerLBFGS; change inner$",
    "truncated": r"adjoint\.last=1 never reaches.*; change it to null$",
    "a rate by name": r"inner\.step_size='rate' names a hyperparameter that does not exist here; change inner\.step_size",
}
GIVEN: dict[str, dict[str, Any]] = {
    "tasks=0": {"tasks": 0},
    "shots=0": {"shots": 0},
    "queries": {"queries": -1},
    "proximal": {"proximal": -1},
    "eval_steps": {"eval_steps": [-1]},
    "implicit without a pull": {"adjoint": Implicit(CG())},
    "chosen by itself": {"adjoint": None},
    "implicit with rates": {"adjoint": Implicit(CG()), "proximal": 1.0, "meta_sgd": True},
    "single loop": {"adjoint": SOBA()},
    "no way back": {"inner": InnerLBFGS()},
    "truncated": {"adjoint": Unrolled(last=1)},
    "a rate by name": {"inner": GradientDescent(step_size="rate")},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_when_it_is_made(case: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[case]) as told:
        SinusoidTask(**GIVEN[case])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=maml_sinusoid", "task.shots=0"], r"task\.shots=0"),
        (["experiment=maml_sinusoid", "task.tasks=0"], r"task\.tasks=0"),
        (["experiment=maml_sinusoid", "adjoint=cg"], r"^adjoint=.*proximal=0"),
        (["experiment=imaml_sinusoid", "task.proximal=0"], r"proximal=0.*; change adjoint to unrolled"),
        (["task=sinusoid", "inner=lbfgs"], r"inner=InnerLBFGS"),
        (["task=sinusoid", "task.hidden=[0]"], r"task\.hidden=\[0\]"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_any_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        build(composed(*overrides))
    assert "\n" not in str(told.value)
