"""Settings refuse what cannot work; optimizers and schedules are torch's; the check checks, measures and clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizers import KINDS, adam, optimizer, scheduler, sgd
from toy_task import OPTIMIZERS

from hyperopt.app.nonfinite import HypergradientCheck
from hyperopt.bilevel.outer import OuterOptimizer, PowerLR, Schedule, as_outer_optimizer, with_values
from hyperopt.tasks.base import HypergradientError
from hyperopt.tasks.trainer import TrainerSettings


def parameters() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    return {"a": [make(3)], "b": [make(2), make(1)], "empty": []}


def objective(groups: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    lam = torch.cat([*groups["a"], *groups["b"]])
    return (lam.cosh() * torch.arange(1.0, 7.0, dtype=torch.float64)).sum()


REFERENCE: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({"lr": 0.01, "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)),
    "momentum": (
        {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.7, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        {"lr": 0.03, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    ),
    "adamw": (
        {"lr": 0.03, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    ),
    "lbfgs": (
        {"lr": 0.5, "max_iter": 3, "max_eval": 4, "history_size": 2, "tolerance_grad": 1e-4, "tolerance_change": 1e-5},
        lambda p: torch.optim.LBFGS(p, 0.5, 3, 4, 1e-4, 1e-5, 2),
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_setting_reaches_torch(kind: str) -> None:
    values, make = REFERENCE[kind]
    settings = OuterOptimizer(with_values(KINDS[kind][0], values))
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
    assert [group["name"] for group in adam().build(parameters()).param_groups] == ["a", "b"]
    assert [group["name"] for group in optimizer("lbfgs").build(parameters()).param_groups] == ["all"]
    with pytest.raises(ValueError, match="no hyperparameters"):
        sgd().build({"a": []})


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ({"kind": "none"}, lambda k: 1.0),
        ({"kind": "step", "step_size": 3}, lambda k: 0.1 ** (k // 3)),
        ({"kind": "exponential", "gamma": 0.9}, lambda k: 0.9**k),
        ({"kind": "power", "decay": 0.5, "horizon": 2.0}, lambda k: (1 + k / 2) ** -0.5),
        ({"kind": "cosine", "T_max": 10}, lambda k: (1 + math.cos(math.pi * k / 10)) / 2),
        ({"kind": "cosine", "T_max": 20, "eta_min": 0.5}, lambda k: 0.5 + 0.25 * (1 + math.cos(math.pi * k / 20))),
        ({"kind": "plateau", "factor": 0.5, "patience": 1}, lambda k: 0.5 ** max(0, (k - 1) // 2)),
    ],
)
def test_learning_rate_over_the_steps(schedule: dict[str, Any], want: Any) -> None:
    optimizer = sgd(lr=1.0).build(parameters())
    made = Schedule(scheduler(**schedule), optimizer)
    for k in range(10):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(want(k), rel=1e-12), k
        optimizer.step()
        made.after_step()
        made.after_evaluation(5.0)


def test_plateau_goes_by_its_mode() -> None:
    for mode, dropped in (("min", True), ("max", False)):
        optimizer = sgd(lr=1.0).build(parameters())
        schedule = Schedule(scheduler("plateau", patience=0, mode=mode), optimizer)
        for value in (1.0, 2.0, 3.0):
            schedule.after_evaluation(value)
        assert (optimizer.param_groups[0]["lr"] < 1) is dropped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_values(torch.optim.SGD, {"lr": 0.0}), "SGD: lr=0.0 is not in"),
        (lambda: with_values(torch.optim.SGD, {"lr": -1.0}), "lr=-1.0"),
        (lambda: with_values(torch.optim.SGD, {"lr": math.nan}), "lr=nan"),
        (lambda: with_values(torch.optim.SGD, {"lr": math.inf}), "lr=inf"),
        (lambda: with_values(torch.optim.SGD, {"weight_decay": -0.1}), "weight_decay=-0.1 is refused"),
        (lambda: sgd(clip_norm=0.0), "clip_norm=0.0"),
        (lambda: with_values(torch.optim.SGD, {"momentum": -0.1}), "momentum=-0.1"),
        (lambda: with_values(torch.optim.SGD, {"momentum": 0.0, "nesterov": True}), "Nesterov momentum requires a momentum"),
        (lambda: with_values(torch.optim.Adam, {"betas": [0.9, 1.0]}), r"betas=\(0.9, 1.0\)"),
        (lambda: with_values(torch.optim.Adam, {"betas": [0.9]}), r"betas=\(0.9,\)"),
        (lambda: with_values(torch.optim.Adam, {"eps": -1.0}), "eps=-1.0"),
        (lambda: with_values(torch.optim.AdamW, {"weight_decay": "much"}), "weight_decay='much' is not a float"),
        (lambda: with_values(torch.optim.lr_scheduler.StepLR, {"step_size": 0}), "StepLR: step_size=0"),
        (lambda: with_values(torch.optim.lr_scheduler.StepLR, {}), "step_size"),
        (lambda: with_values(PowerLR, {"decay": 1.5}), "PowerLR: decay=1.5 is not in"),
        (lambda: with_values(PowerLR, {"decay": 0.5, "horizon": 0.0}), "PowerLR: horizon=0.0 is not in"),
        (lambda: with_values(torch.optim.lr_scheduler.ReduceLROnPlateau, {"factor": 1.0}), "factor=1.0"),
        (lambda: with_values(torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 0}), "T_max=0"),
        (lambda: TrainerSettings(max_steps=0), "max_steps=0"),
        (lambda: TrainerSettings(eval_every=-1), "eval_every=-1"),
        (lambda: TrainerSettings(checkpoint_every=0), "checkpoint_every=0"),
        (lambda: TrainerSettings(patience=0), "patience=0"),
        (lambda: TrainerSettings(figures_every=0), "figures_every=0"),
        (lambda: TrainerSettings(max_seconds=0.0), "max_seconds=0.0"),
        (lambda: TrainerSettings(mode="best"), "mode='best' is not one of min, max"),
        (lambda: TrainerSettings(monitor=""), "monitor=''"),
        (lambda: TrainerSettings(on_failure="hope"), "on_failure='hope'"),
    ],
)
def test_bad_settings_name_key_and_value(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_function_that_makes_an_optimizer_will_do() -> None:
    made = as_outer_optimizer(lambda params: torch.optim.RMSprop(params, lr=0.2), "values").build(parameters())
    assert isinstance(made, torch.optim.RMSprop) and [group["name"] for group in made.param_groups] == ["a", "b"]
    assert as_outer_optimizer(kept := sgd(), "values") is kept


def test_check_measures_and_clips_in_place() -> None:
    gradients = {"a": [torch.tensor([3.0, 0.0])], "b": [torch.tensor([[4.0]]), torch.tensor(0.0)], "none": []}
    check = HypergradientCheck(clip_norm=1.0)
    check(gradients)
    assert check.norms.pop("hypergrad/norm/none") == 0.0
    assert check.norms == {"hypergrad/norm": 5.0, "hypergrad/norm/a": 3.0, "hypergrad/norm/b": 4.0}
    assert torch.allclose(gradients["a"][0], torch.tensor([0.6, 0.0]))
    assert torch.allclose(gradients["b"][0], torch.tensor([[0.8]]))
    check({"a": [torch.tensor([100.0])]})
    assert check.norms["hypergrad/norm"] == 5.0  # that of the step's first evaluation
    check.begin(1)
    small = torch.tensor([0.5])
    check({"a": [small]})
    assert small.item() == 0.5 and check.norms["hypergrad/norm"] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_names_step_and_groups(value: float) -> None:
    check = HypergradientCheck()
    check.begin(17)
    gradients = {"a": [torch.ones(2)], "b": [torch.ones(1), torch.tensor([1.0, value, value])], "c": [torch.tensor(value)]}
    with pytest.raises(HypergradientError, match=r"step 17: .* of group b \(2 entries\), c \(1 entries\) is not finite"):
        check(gradients)


def test_a_large_finite_float32_hypergradient_is_no_overflow() -> None:
    gradient = torch.full((4,), 1e30)
    check = HypergradientCheck(clip_norm=1.0)
    check({"a": [gradient]})
    assert check.norms["hypergrad/norm"] == pytest.approx(2e30) and gradient.norm().item() == pytest.approx(1.0)
