"""Settings refuse what cannot work; optimizers and schedules are torch's; the guard checks, measures and clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy_task import OPTIMIZERS, SCHEDULERS

from hyperopt.app.nonfinite import HypergradientGuard
from hyperopt.bilevel.outer import LBFGS, SGD, Adam, AdamW, Momentum, Schedule
from hyperopt.bilevel.outer_settings import OptimizerSettings, SchedulerSettings, TrainerSettings
from hyperopt.tasks.base import HypergradientError


def parameters() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    return {"a": [make(3)], "b": [make(2), make(1)], "empty": []}


def objective(groups: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    lam = torch.cat([*groups["a"], *groups["b"]])
    return (lam.cosh() * torch.arange(1.0, 7.0, dtype=torch.float64)).sum()


REFERENCE: dict[str, tuple[OptimizerSettings, Any]] = {
    "sgd": (SGD(lr=0.01, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)),
    "momentum": (
        Momentum(lr=0.02, momentum=0.7, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.7, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        Adam(lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    ),
    "adamw": (
        AdamW(lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    ),
    "lbfgs": (
        LBFGS(lr=0.5, max_iter=3, max_eval=4, history_size=2, tolerance_grad=1e-4, tolerance_change=1e-5, line_search_fn=None),
        lambda p: torch.optim.LBFGS(p, 0.5, 3, 4, 1e-4, 1e-5, 2),
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_setting_reaches_torch(kind: str) -> None:
    settings, make = REFERENCE[kind]
    results = []
    for build in (lambda groups: settings.build(groups), lambda groups: make([*groups["a"], *groups["b"]])):  # type: ignore
        groups = parameters()
        optimizer = build(groups)

        def closure(groups: Any = groups, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            loss = objective(groups)
            loss.backward()
            return loss.item()

        for _ in range(4):
            optimizer.step(closure)
        results.append(torch.cat([*groups["a"], *groups["b"]]).detach())
    assert torch.equal(*results)


def test_groups_carry_their_names() -> None:
    assert [group["name"] for group in Adam().build(parameters()).param_groups] == ["a", "b"]
    assert [group["name"] for group in LBFGS().build(parameters()).param_groups] == ["all"]
    with pytest.raises(ValueError, match="no hyperparameters"):
        SGD().build({"a": []})


@pytest.mark.parametrize(
    ("scheduler", "want"),
    [
        ({"kind": "none"}, lambda k: 1.0),
        ({"kind": "step", "step_size": 3}, lambda k: 0.1 ** (k // 3)),
        ({"kind": "exponential", "gamma": 0.9}, lambda k: 0.9**k),
        ({"kind": "power", "decay": 0.5, "horizon": 2.0}, lambda k: (1 + k / 2) ** -0.5),
        ({"kind": "cosine"}, lambda k: (1 + math.cos(math.pi * k / 10)) / 2),
        ({"kind": "cosine", "t_max": 20, "eta_min": 0.5}, lambda k: 0.5 + 0.25 * (1 + math.cos(math.pi * k / 20))),
        ({"kind": "plateau", "factor": 0.5, "patience": 1}, lambda k: 0.5 ** max(0, (k - 1) // 2)),
    ],
)
def test_learning_rate_over_the_steps(scheduler: dict[str, Any], want: Any) -> None:
    optimizer = SGD(lr=1.0).build(parameters())
    schedule = Schedule(SchedulerSettings(**scheduler), optimizer, TrainerSettings(max_steps=10))
    for k in range(10):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(want(k), rel=1e-12), k
        optimizer.step()
        schedule.after_step()
        schedule.after_evaluation(5.0)


def test_plateau_goes_by_the_trainers_mode() -> None:
    for mode, dropped in (("min", True), ("max", False)):
        optimizer = SGD(lr=1.0).build(parameters())
        schedule = Schedule(SchedulerSettings(kind="plateau", patience=0), optimizer, TrainerSettings(mode=mode))
        for value in (1.0, 2.0, 3.0):
            schedule.after_evaluation(value)
        assert (optimizer.param_groups[0]["lr"] < 1) is dropped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=0.0), "lr=0.0"),
        (lambda: SGD(lr=-1.0), "lr=-1.0"),
        (lambda: SGD(lr=math.nan), "lr=nan"),
        (lambda: SGD(weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda: SGD(clip_norm=0.0), "clip_norm=0.0"),
        (lambda: Momentum(momentum=1.0), r"momentum=1.0 is not in \[0, 1\)"),
        (lambda: Momentum(momentum=-0.1), "momentum=-0.1"),
        (lambda: Momentum(momentum=0.0, nesterov=True), "nesterov=True needs momentum"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: Adam(betas=(0.9,)), "not a pair"),  # pyright: ignore[reportArgumentType]
        (lambda: Adam(eps=0.0), "eps=0.0"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: LBFGS(max_iter=0), "max_iter=0"),
        (lambda: LBFGS(history_size=0), "history_size=0"),
        (lambda: LBFGS(line_search_fn="armijo"), "line_search_fn='armijo' is none of strong_wolfe"),
        (lambda: SchedulerSettings(kind="linear"), "kind='linear' is none of none, step, cosine"),
        (lambda: SchedulerSettings(kind="step"), "kind='step' needs step_size"),
        (lambda: SchedulerSettings(kind="exponential"), "needs gamma"),
        (lambda: SchedulerSettings(kind="power", horizon=3.0), "needs decay"),
        (lambda: SchedulerSettings(kind="power", decay=1.5), "decay=1.5"),
        (lambda: SchedulerSettings(kind="cosine", gamma=0.5), "kind='cosine' uses t_max, eta_min, but gamma=0.5"),
        (lambda: SchedulerSettings(kind="step", step_size=0), "step_size=0"),
        (lambda: SchedulerSettings(kind="exponential", gamma=1.5), "gamma=1.5"),
        (lambda: SchedulerSettings(kind="plateau", factor=1.0), "factor=1.0"),
        (lambda: SchedulerSettings(step_size=3), "kind='none' uses no numbers, but step_size=3"),
        (lambda: TrainerSettings(max_steps=0), "max_steps=0"),
        (lambda: TrainerSettings(eval_every=-1), "eval_every=-1"),
        (lambda: TrainerSettings(checkpoint_every=0), "checkpoint_every=0"),
        (lambda: TrainerSettings(patience=0), "patience=0"),
        (lambda: TrainerSettings(figures_every=0), "figures_every=0"),
        (lambda: TrainerSettings(max_seconds=0.0), "max_seconds=0.0"),
        (lambda: TrainerSettings(mode="best"), "mode='best' is none of min, max"),
        (lambda: TrainerSettings(monitor=""), "monitor=''"),
        (lambda: TrainerSettings(on_failure="hope"), "on_failure='hope'"),
    ],
)
def test_bad_settings_name_key_and_value(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_field_of_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        SGD(momentum=0.9)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="warmup"):
        SGD(scheduler={"kind": "none", "warmup": 3})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scheduler", SCHEDULERS.values())
def test_composed_mappings_become_settings(scheduler: dict[str, Any]) -> None:
    settings = Adam(betas=[0.5, 0.6], scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    assert settings.betas == (0.5, 0.6) and settings.scheduler == SchedulerSettings(**scheduler)


def test_guard_measures_and_clips_in_place() -> None:
    gradients = {"a": [torch.tensor([3.0, 0.0])], "b": [torch.tensor([[4.0]]), torch.tensor(0.0)], "none": []}
    guard = HypergradientGuard(clip_norm=1.0)
    guard(gradients)
    assert guard.norms.pop("hypergrad/norm/none") == 0.0
    assert guard.norms == {"hypergrad/norm": 5.0, "hypergrad/norm/a": 3.0, "hypergrad/norm/b": 4.0}
    assert torch.allclose(gradients["a"][0], torch.tensor([0.6, 0.0]))
    assert torch.allclose(gradients["b"][0], torch.tensor([[0.8]]))
    guard({"a": [torch.tensor([100.0])]})
    assert guard.norms["hypergrad/norm"] == 5.0  # that of the step's first evaluation
    guard.begin(1)
    small = torch.tensor([0.5])
    guard({"a": [small]})
    assert small.item() == 0.5 and guard.norms["hypergrad/norm"] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_guard_names_step_and_groups(value: float) -> None:
    guard = HypergradientGuard()
    guard.begin(17)
    gradients = {"a": [torch.ones(2)], "b": [torch.ones(1), torch.tensor([1.0, value, value])], "c": [torch.tensor(value)]}
    with pytest.raises(HypergradientError, match=r"step 17: .* of group b \(2 entries\), c \(1 entries\) is not finite"):
        guard(gradients)


def test_a_large_finite_float32_hypergradient_is_no_overflow() -> None:
    gradient = torch.full((4,), 1e30)
    guard = HypergradientGuard(clip_norm=1.0)
    guard({"a": [gradient]})
    assert guard.norms["hypergrad/norm"] == pytest.approx(2e30) and gradient.norm().item() == pytest.approx(1.0)
