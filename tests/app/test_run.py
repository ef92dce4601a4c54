"""The outer loop: its numbers, its stops and its failures."""

from __future__ import annotations

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_task import (
    SMALL,
    Toy,
    config,
    data,
    go,
    poison_at,
    rows,
    signal_at,
    summary,
    uninterrupted,
)

from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.lock import RunDirectoryError
from hyperopt.app.loop_state import MonitorError
from hyperopt.app.summary import table
from hyperopt.core.status import Status
from hyperopt.tasks.base import HypergradientError


def test_numbers_are_those_of_a_hand_written_loop(tmp_path: Path) -> None:
    go(config("momentum"), tmp_path)
    got = rows(tmp_path)

    # The same outer loop without the framework: seeds, batches, momentum, noise.
    import random

    import numpy as np

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    batches = torch.Generator().manual_seed(3)
    x, y = data()
    lam = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    warm = torch.zeros((), dtype=torch.float64)
    velocity = torch.zeros(5, dtype=torch.float64)

    def objective(chosen: Any) -> torch.Tensor:
        return ((x[chosen] @ lam + torch.tanh(warm) - y[chosen]) ** 2).mean() + (lam**4).sum() / 100

    assert [row["step"] for row in got] == list(range(12))
    for k, row in enumerate(got):
        chosen = torch.randperm(10, generator=batches)[:6]
        noise = 1e-3 * (random.random() + float(np.random.rand()) + torch.rand((), dtype=torch.float64).item())
        loss = objective(chosen) + noise * lam[:3].sum()
        (grad,) = torch.autograd.grad(loss, lam)
        velocity = 0.9 * velocity + grad
        with torch.no_grad():
            lam -= SMALL["momentum"] * velocity
            warm = 0.9 * warm + 0.1 * lam[4]
        assert row["outer/step_loss"] == pytest.approx(loss.item(), rel=1e-13)
        assert row["hypergrad/norm"] == pytest.approx(grad.norm().item(), rel=1e-12)
        assert row["hypergrad/norm/a"] == pytest.approx(grad[:3].norm().item(), rel=1e-12)
        assert row["hypergrad/norm/b"] == pytest.approx(grad[3:].norm().item(), rel=1e-12)
        assert row["cost/evaluations"] == 4 * (k + 1)
        assert row["cost/vjps"] == 2 * (k + 1)
        assert row["optimizer/lr"] == SMALL["momentum"]
        evaluated = k % 2 == 0 or k == 11
        assert ("val/loss" in row) == evaluated
        if evaluated:  # step k is logged after k + 1 updates
            for name, part in (("outer", slice(0, 10)), ("val", slice(10, 15)), ("test", slice(15, 20))):
                assert row[f"{name}/loss"] == pytest.approx(objective(part).item(), rel=1e-12)


def test_returns_best_and_keeps_it(tmp_path: Path) -> None:
    value = go(config("sgd", trainer={"max_steps": 25}), tmp_path)
    losses = {row["step"]: row["val/loss"] for row in rows(tmp_path) if "val/loss" in row}
    step = min(losses, key=lambda k: losses[k])
    assert value == losses[step] and value < losses[max(losses)]  # the last is not the best here
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert best["state"]["step"] == step + 1
    assert summary(tmp_path)["best"]["step"] == step
    task = Toy()
    cfg = config("sgd", trainer={"max_steps": 25}, mode="evaluate", ckpt_path=str(tmp_path / "checkpoints" / "best.pt"))
    assert go(cfg, tmp_path / "evaluated", task) == value
    assert summary(tmp_path / "evaluated")["status"] == "evaluated"
    assert not (tmp_path / "evaluated" / "metrics.jsonl").exists()


def test_mode_max_takes_the_largest(tmp_path: Path) -> None:
    value = go(config(trainer={"mode": "max"}), tmp_path)
    assert value == max(row["val/loss"] for row in rows(tmp_path) if "val/loss" in row)


def test_early_stopping(tmp_path: Path) -> None:
    cfg = config("sgd", trainer={"max_steps": 400, "patience": 2})
    go(cfg, tmp_path)
    losses = [row["val/loss"] for row in rows(tmp_path) if "val/loss" in row]
    assert summary(tmp_path)["reason"] == "trainer.patience" and len(losses) < 100
    assert min(losses[:-2]) <= min(losses[-2:]) and min(losses) == losses[-3]


def test_time_limit(tmp_path: Path) -> None:
    go(config(trainer={"max_steps": 10**6, "max_seconds": 0.3}), tmp_path)
    assert summary(tmp_path)["reason"] == "trainer.max_seconds"
    assert 1 < summary(tmp_path)["steps"] < 10**6


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("group", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hypergradient_not_finite(tmp_path: Path, group: str, value: float) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    other = {"a": "b", "b": "a"}[group]
    with pytest.raises(HypergradientError, match=f"step 6: the hypergradient of group {group} ") as error:
        go(config(), out, poison_at(6, group, value))
    assert f"{other} (" not in str(error.value)
    assert "HypergradientError: step 6" in (out / "FAILED").read_text()
    assert summary(out)["status"] == "failed" and summary(out)["steps"] == 6
    assert checkpoint.load(out / "checkpoints" / "last.pt")["state"]["step"] == 4
    assert rows(out) == want[:6]


def test_loss_not_finite(tmp_path: Path) -> None:
    class Broken(Toy):
        def step(self, optimizer: Any, check: Any) -> Any:
            record = super().step(optimizer, check)
            record.loss = math.inf if self.steps == 4 else record.loss
            return record

    with pytest.raises(HypergradientError, match="step 3: the outer loss is inf"):
        go(config(), tmp_path, Broken())


def test_evaluated_outer_loss_not_finite(tmp_path: Path) -> None:
    class Broken(Toy):
        def evaluate(self) -> dict[str, float]:
            return {**super().evaluate(), "outer/loss": math.nan if self.steps > 4 else 1.0}

    with pytest.raises(HypergradientError, match="step 4: outer/loss is nan"):
        go(config(), tmp_path, Broken())


def test_monitor_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    class Broken(Toy):
        def evaluate(self) -> dict[str, float]:
            return {**super().evaluate(), "val/loss": math.nan if self.steps != 5 else 7.0}

    assert go(config(), tmp_path, Broken()) == 7.0
    assert summary(tmp_path)["best"]["step"] == 4


@pytest.mark.parametrize("status", [Status.diverged, Status.nonfinite])
def test_failed_solves_stop_the_run(tmp_path: Path, status: Status) -> None:
    with pytest.raises(HypergradientError, match=f"step 3: the inner solve ended as {status.name}"):
        go(config(), tmp_path / "raise", Toy(statuses={3: status}))
    go(config(trainer={"on_failure": "warn"}), tmp_path / "warn", Toy(statuses={3: status}))
    assert rows(tmp_path / "warn")[3]["inner/status"] == status


def test_mild_failures_warn_once_a_run_and_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    statuses = {1: Status.max_steps, 3: Status.max_steps, 5: Status.stagnated, 7: Status.fixed_steps}
    with caplog.at_level(logging.WARNING):
        go(config(), tmp_path, Toy(statuses=statuses))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 1", "step 5"]


def test_monitor_unknown(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match=r"trainer.monitor='val/acc' is not one of .*val/loss"):
        go(config(trainer={"monitor": "val/acc"}), tmp_path)


def test_unchecked_task_is_refused(tmp_path: Path) -> None:
    class Unchecked(Toy):
        def step(self, optimizer: Any, check: Any) -> Any:
            return super().step(optimizer, lambda gradients: None)

    with pytest.raises(RuntimeError, match="did not call its check"):
        go(config(), tmp_path, Unchecked())


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    task = Toy()
    go(config("sgd", trainer={"max_steps": 1}, over={"optimizer.clip_norm": 0.01}), tmp_path, task)
    start = torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64)
    moved = torch.cat([task.a, task.b[0], task.b[1][None]]).detach() - start
    assert moved.norm().item() == pytest.approx(SMALL["sgd"] * 0.01, rel=1e-12)
    assert rows(tmp_path)[0]["hypergrad/norm"] > 0.01  # measured before clipping


def test_lbfgs_logs_the_first_of_its_evaluations(tmp_path: Path) -> None:
    task = Toy()
    go(config("lbfgs"), tmp_path, task)
    assert max(task.calls) > 1
    total = 0
    for row, calls in zip(rows(tmp_path), task.calls, strict=True):
        total += 2 * calls
        assert row["cost/vjps"] == total


@pytest.mark.slow
def test_used_directory_is_refused_untouched(tmp_path: Path) -> None:
    go(config(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"holds a run .*resume=auto"):
        go(config(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    go(config(), tmp_path / "run")
    last = str(tmp_path / "run" / "checkpoints" / "last.pt")
    with pytest.raises(CheckpointError, match=r"another experiment: optimizer.lr is 0.05 there and 0.2 here; seed is 3"):
        go(config(seed=4, ckpt_path=last, over={"optimizer.lr": 0.2}), tmp_path / "other")
    with pytest.raises(CheckpointError, match="seed is 3 there and 4 here"):  # another seed is another split
        go(config(seed=4, mode="evaluate", ckpt_path=last), tmp_path / "evaluate")
    # Another solver may evaluate.
    go(config(mode="evaluate", ckpt_path=last, over={"solver.rtol": 1e-9}), tmp_path / "tighter")


def test_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda'.*device=cpu"):
        go(config(device="cuda"), tmp_path)
    assert "device='cuda'" in (tmp_path / "FAILED").read_text()


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored

    def hook(k: int, task: Toy) -> None:
        if k == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            go(config(), tmp_path, Toy(hook))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


def test_handlers_and_global_state_are_restored(tmp_path: Path) -> None:
    def present() -> list[Any]:
        return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_default_dtype()]

    before, random = present(), torch.get_rng_state()
    go(config(), tmp_path)
    assert present() == before and torch.equal(torch.get_rng_state(), random)


def test_ends_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(config(), tmp_path)
    printed = capsys.readouterr().out
    words = ("last (step 11)", "best (step", "test/loss", "outer/loss", "inner/iterations", "worst residual", "1.0e-07")
    for word in words:
        assert word in printed
    assert f"hyperopt tensorboard {tmp_path}" in printed
    assert "residual" not in table({"val/loss": 1.0}, 0, {}, None, 0.1)  # of an evaluation, which measures none


def test_run_facts(tmp_path: Path) -> None:
    import json

    with pytest.raises(SystemExit):
        go(config(), tmp_path, signal_at(5, signal.SIGTERM))
    go(config(resume="auto"), tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["task"]["dataset"] == "toy" and facts["device"]["name"] == "cpu" and facts["versions"]["torch"]
    assert [session["after_steps"] for session in facts["resumed"]] == [6]
