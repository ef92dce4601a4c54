"""Self-tuning tasks under the loop: ridge against its closed forms, resume, checkpoints, options, and the quadratic study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from optimizers import adam, scheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyperopt import stn
from hyperopt.app import checkpoint
from hyperopt.app.building import build
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.experiment import flatten
from hyperopt.app.run import run
from hyperopt.core import distributed
from hyperopt.stn import HyperSpace, Positive
from hyperopt.stn.row_dropout import RowDropout
from hyperopt.tasks.base import Environment
from hyperopt.tasks.stn import SelfTuningOptions, check_layers, schedule_of
from hyperopt.tasks.stn_ridge import Ridge, StnRidgeTask

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64


def ridge(mode: str, scale: float, updates: int, seed: int = 0) -> dict[str, float]:
    """Train at a fixed strength and measure."""
    options = SelfTuningOptions(
        mode=mode, warmup=updates, train_steps=1, weights=adam(lr=0.03, scheduler=scheduler("cosine", T_max=updates))
    )
    task = StnRidgeTask(stn=options, decay=Positive(0.3, scale=scale), features=8, rows=40, noise=2.0)
    generator = torch.Generator().manual_seed(seed)
    torch.set_default_dtype(DOUBLE)
    try:
        task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, generator))
        for _ in range(updates):
            task.tuning.round(task.built.train.draw, task.built.valid.draw, torch.optim.SGD([task.model.space.u], 1.0))
        return task.evaluate()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.cases(among={"mode": ["delta"]})
@pytest.mark.parametrize("mode", ["centred", "delta", "delta_linear"])
def test_ridge_response_and_hypergradient_are_those_of_the_closed_form(mode: str) -> None:
    found = ridge(mode, 0.05, 600)
    assert found["ridge/weights_error"] < 1e-2
    assert found["ridge/jacobian_error"] < 1e-2  # measured: 1e-3
    assert found["ridge/hypergradient_ratio"] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.slow
def test_ridge_classic_does_not_find_the_response_in_the_same_time() -> None:
    assert ridge("classic", 0.05, 600)["ridge/jacobian_error"] > 0.2


@pytest.mark.slow
def test_ridge_at_a_wide_perturbation_only_delta_leaves_the_weights_unbiased() -> None:
    assert ridge("delta", 0.5, 400)["ridge/weights_error"] < 1e-6
    assert 5e-3 < ridge("centred", 0.5, 400)["ridge/weights_error"] < 5e-2


def test_the_closed_forms_of_ridge() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, x_val, y_val = (torch.randn(*shape, generator=draw, dtype=DOUBLE) for shape in ((9, 4), (9,), (7, 4), (7,)))
    ridge = Ridge(x, y, x_val, y_val)
    lam = torch.tensor(-0.7, dtype=DOUBLE, requires_grad=True)
    w = ridge.weights(lam.exp())
    inner = (x @ w.detach().requires_grad_(False) - y).square().sum()
    assert inner > 0
    free = w.detach().clone().requires_grad_()
    loss = (x @ free - y).square().mean() / 2 + lam.detach().exp() * free.square().sum() / 2
    assert torch.autograd.grad(loss, free)[0].abs().max() < 1e-14  # the minimum
    (want,) = torch.autograd.grad(ridge.loss(w), lam, retain_graph=True)
    torch.testing.assert_close(ridge.jacobian(lam.detach().exp()) @ ridge.slope(w.detach()), want, rtol=1e-12, atol=0)
    best = ridge.best()
    losses = [float(ridge.loss(ridge.weights(best * factor))) for factor in (0.99, 1.0, 1.01)]
    assert 1e-3 < best < 1e3 and losses[1] < min(losses[0], losses[2])  # a minimum, and not an end of the range


EVERYTHING = [
    "experiment=stn_ridge",
    "stn.mode=delta",
    "stn.warmup=5",
    "stn.train_steps=2",
    "+optimizer@stn.response=adam",
    "stn.weights.scheduler.T_max=9",
    "optimizer.scheduler.T_max=9",
    "trainer.eval_every=2",
    "trainer.checkpoint_every=2",
]


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ridge", "quadratic"])
def test_a_run_that_goes_on_is_one_never_stopped(tmp_path: Path, task: str) -> None:
    lengths = ["optimizer.scheduler.T_max=9", "stn.weights.scheduler.T_max=9", "stn.response.scheduler.T_max=9"]
    quadratic = [
        "experiment=stn_quadratic",
        "stn.warmup=3",
        "stn.train_steps=2",
        "stn.check_every=3",
        "trainer.checkpoint_every=2",
        *lengths,
    ]
    base = EVERYTHING if task == "ridge" else [*quadratic, "stn.update=sequential", "stn.valid_steps=2"]
    run(composed(*base, "trainer.max_steps=9"), tmp_path / "whole")
    run(composed(*base, "trainer.max_steps=4"), tmp_path / "parts")
    run(composed(*base, "trainer.max_steps=9", "resume=auto"), tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    states = [checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["task"] for name in ("whole", "parts")]
    assert states[0]["tuning"]["history"] == states[1]["tuning"]["history"]
    found = rows(tmp_path / "whole")
    warm = 3 if task == "ridge" else 2  # rounds of two updates
    assert [row["stn/warming"] for row in found] == [1.0] * warm + [0.0] * (9 - warm)
    assert [row["hypergrad/norm"] > 0 for row in found] == [row["stn/warming"] == 0 for row in found]


def test_the_best_checkpoint_has_the_hyperparameters_of_its_moment(tmp_path: Path) -> None:
    run(composed(*EVERYTHING, "trainer.max_steps=12", "optimizer.lr=0.5"), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = rows(tmp_path)
    evaluated = [row for row in found if "val/loss" in row]
    best = min(evaluated, key=lambda row: row["val/loss"])
    kept = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert kept["state"]["step"] == best["step"] + 1 and summary["best"]["step"] == best["step"]
    assert summary["best"]["metrics"]["hyper/decay"] == best["hyper/decay"]
    u = kept["task"]["tuning"]["model"]["space.u"]
    assert float(u[0].exp()) == pytest.approx(best["hyper/decay"], rel=1e-12)
    schedule = schedule_of(tmp_path / "checkpoints" / "last.pt", HyperSpace({"decay": Positive(0.1)}, dtype=DOUBLE))
    assert schedule.steps == (2, 2, 1, *[2] * 9)
    # The hyperparameters of a round's updates are those that the round before has left.
    assert [value for (value,) in schedule.values[1:]] == pytest.approx([row["hyper/decay"] for row in found[:-1]], rel=1e-12)


def test_the_optimizers_of_the_group_are_swapped_by_one_override() -> None:
    built = build(composed("experiment=stn_ridge", "optimizer@stn.weights=sgd", "+optimizer@stn.response=adam"))
    task: Any = built.task
    kinds = [each.make.func for each in (task.stn.weights, task.stn.response, task.stn.scales)]
    assert kinds == [torch.optim.SGD, torch.optim.Adam, torch.optim.Adam]
    assert build(composed("experiment=stn_ridge")).task.stn.response is None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stn.mode=centered", "stn.mode='centered' is not one of classic, centred, delta, delta_linear; change stn.mode"),
        ("stn.train_steps=0", "stn.train_steps=0 must be a whole number >= 1; change stn.train_steps"),
        ("stn.valid_steps=0", "stn.valid_steps=0 must be a whole number >= 1; change stn.valid_steps"),
        ("task.x_range.init=10.0", r"task.x_range.init=10.0 is not inside \(0.01, 10\).*change task.x_range.init"),
        ("task.x_range.scale=0", "task.x_range.scale=0 is not in"),
        ("task.x_range.low=11", "task.x_range.low=11 is not below high=10.0"),
        ("stn.scales.lr=-1", "stn.scales.lr=-1 is not in"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(composed("experiment=stn_quadratic", override))


def test_a_run_of_another_length_is_another_experiment_where_a_schedule_depends_on_it(tmp_path: Path) -> None:
    base = ["experiment=stn_quadratic", "stn.warmup=2", "stn.train_steps=1", "optimizer/scheduler@stn.scales.scheduler=cosine"]
    lengths = [flatten(composed(*base, f"trainer.max_steps={n}"))["stn.scales.scheduler.T_max"] for n in (3, 5)]
    assert lengths == [3, 5]
    run(composed(*base, "trainer.max_steps=3"), tmp_path)
    with pytest.raises(CheckpointError, match=r"stn\.scales\.scheduler\.T_max is 3 there and 5 here"):
        run(composed(*base, "trainer.max_steps=5", "resume=auto"), tmp_path)


def test_a_run_leaves_its_trajectory(tmp_path: Path) -> None:
    run(
        composed("experiment=stn_quadratic", "stn.warmup=2", "stn.train_steps=1", "task.frame_every=1", "trainer.max_steps=4"),
        tmp_path,
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"trajectory.png", "fit.gif"}
    gif = (tmp_path / "figures" / "fit.gif").read_bytes()
    assert gif.startswith(b"GIF89a") and gif.count(b"\x21\xf9\x04") == 4  # a control block for each frame
    found = EventAccumulator(str(tmp_path / "tb"), {"images": 0})
    found.Reload()
    assert found.Images("figures/fit")[0].encoded_image_string == gif
    last = rows(tmp_path)[-1]
    assert last["hyper/x_range/low"] < last["hyper/x_range"] < last["hyper/x_range/high"]
    assert {"stn/scale/x_range", "stn/entropy", "stn/train_loss", "stn/valid_loss", "stn/response_norm"} <= set(last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "rounds"),
    [
        (0.5, 60),
        *(pytest.param(start, 500, marks=pytest.mark.manual) for start in (0.1, 5.0, 9.0)),
    ],
)
def test_the_quadratic_is_learned_from_the_range_that_is_found(tmp_path: Path, start: float, rounds: int) -> None:
    length = [f"trainer.max_steps={rounds}", "task.frame_every=500"]
    run(composed("experiment=stn_quadratic_scheduled", "seed=100", f"task.x_range.init={start}", *length), tmp_path)
    close = [row for row in rows(tmp_path) if row["stn/warming"] == 0 and row["val/distance"] < 0.05]
    assert close and 1.7 < close[0]["hyper/x_range"] < 3.2


@pytest.mark.manual
@pytest.mark.parametrize(
    ("start", "rates"),
    [
        (9.0, []),
        (0.5, ["optimizer.lr=0.2"]),
        (5.0, ["optimizer.lr=0.8"]),
        (2.0, ["stn.weights.lr=0.016"]),
        (9.0, ["stn.weights.lr=0.004"]),
    ],
)
def test_the_quadratic_stays_learned_by_measured_rates(tmp_path: Path, start: float, rates: list[str]) -> None:
    run(composed("experiment=stn_quadratic", "seed=101", f"task.x_range.init={start}", "task.frame_every=500", *rates), tmp_path)
    found = rows(tmp_path)
    assert len(found) == 500 and max(row["val/distance"] for row in found[450:]) < 0.05
    assert [row["step"] for row in found if "stn/response_error" in row] == [99, 199, 299, 399, 499]


@pytest.mark.manual
def test_the_quadratic_is_not_learned_from_a_range_that_stands_still(tmp_path: Path) -> None:
    run(composed("experiment=stn_quadratic", "seed=100", "stn.warmup=100000"), tmp_path)
    found = rows(tmp_path)
    assert found[-1]["hyper/x_range"] == pytest.approx(0.5, rel=1e-12)
    assert min(row["val/distance"] for row in found) > 0.5


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.BatchNorm1d(3), "statistics of its own rows"),
        (stn.Dropout("rate"), "by position in the batch"),
        (torch.nn.Dropout(), "by position in the batch"),
    ],
)
def test_layers_that_would_differ_on_several_ranks_are_refused(
    layer: torch.nn.Module, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), layer, RowDropout("rate", 0))
    check_layers(network)
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=rf"has 1 = .*{message}"):
        check_layers(network)
