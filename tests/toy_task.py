"""A small nonlinear least-squares task, with every kind of state that a checkpoint must carry, and faults on demand."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from optimizers import KINDS, optimizer, scheduler

from hyperopt.app.building import Built
from hyperopt.app.run import run
from hyperopt.core.status import Status
from hyperopt.tasks.base import Environment, GradientCheck, StepRecord, Task
from hyperopt.tasks.trainer import TrainerSettings

OPTIMIZERS = tuple(KINDS)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "step": {"kind": "step", "step_size": 3, "gamma": 0.5},
    "cosine": {"kind": "cosine", "T_max": 12},
    "exponential": {"kind": "exponential", "gamma": 0.9},
    "power": {"kind": "power", "decay": 0.5},
    "plateau": {"kind": "plateau", "factor": 0.5, "patience": 0},
}
SMALL = {"sgd": 0.1, "momentum": 0.05, "adam": 0.1, "adamw": 0.1, "lbfgs": 0.3}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of shape (20, 5) and targets of shape (20,)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(20, 5, generator=generator, dtype=torch.float64), torch.randn(20, generator=generator, dtype=torch.float64)


class Toy(Task):
    """``mean((x . lam + tanh(w) - y)^2)`` over a random batch, with a warm-started ``w`` and noise from every generator.

    ``hook(step, task)`` is called in each closure after backward, to inject faults; ``killed_at`` is a step that never ends.
    """

    name = "toy"

    def __init__(
        self,
        hook: Callable[[int, Toy], None] | None = None,
        statuses: Mapping[int, Status] | None = None,
        killed_at: int | None = None,
    ) -> None:
        self.hook, self.statuses, self.killed_at = hook, statuses or {}, killed_at
        self.calls: list[int] = []  # closure evaluations of each step

    def setup(self, env: Environment) -> None:
        self.env = env
        self.x, self.y = (tensor.to(env.dtype) for tensor in data())
        self.a = torch.zeros(3, dtype=env.dtype).requires_grad_()
        self.b = [torch.ones(1, dtype=env.dtype).requires_grad_(), torch.ones((), dtype=env.dtype).requires_grad_()]
        self.warm = torch.zeros((), dtype=env.dtype)
        self.steps = 0

    def groups(self) -> dict[str, list[torch.Tensor]]:
        return {"a": [self.a], "b": list(self.b)}

    def loss(self, rows: slice | torch.Tensor) -> torch.Tensor:
        lam = torch.cat([self.a, self.b[0], self.b[1][None]])
        return ((self.x[rows] @ lam + torch.tanh(self.warm) - self.y[rows]) ** 2).mean() + (lam**4).sum() / 100

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        rows = torch.randperm(10, generator=self.env.generator)[:6]
        noise = 1e-3 * (random.random() + float(np.random.rand()) + torch.rand(()).item())
        losses: list[float] = []

        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.loss(rows) + noise * self.a.sum()
            loss.backward()
            if self.hook is not None:
                self.hook(self.steps, self)
            if self.steps == self.killed_at:
                raise Killed
            check(self.gradients())
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        self.warm = 0.9 * self.warm + 0.1 * self.b[1].detach()
        self.calls.append(len(losses))
        status = self.statuses.get(self.steps, Status.converged)
        self.steps += 1
        metrics = {"inner/iterations": 3.0, "inner/residual": 1e-7, "inner/contraction": float("nan")}
        costs = {"cost/evaluations": 4, "cost/vjps": 2 * len(losses)}
        return StepRecord(losses[0], {**metrics, **costs}, {"inner": status})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        splits = {"outer": slice(0, 10), "val": slice(10, 15), "test": slice(15, 20)}
        return {f"{name}/loss": self.loss(rows).item() for name, rows in splits.items()}

    def figures(self) -> dict[str, Figure]:
        figure = Figure(figsize=(2, 2))
        figure.add_subplot().semilogy([1.0, 0.1, 0.01])
        return {"residual": figure}

    def state_dict(self) -> dict[str, Any]:
        return {"a": self.a.detach(), "b": [b.detach() for b in self.b], "warm": self.warm, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.a.copy_(state["a"])
            for own, saved in zip(self.b, state["b"], strict=True):
                own.copy_(saved)
        self.warm, self.steps = state["warm"].clone(), state["steps"]

    def describe(self) -> dict[str, Any]:
        return {"dataset": "toy", "rows": {"outer": 10, "val": 5, "test": 5}}


def config(
    kind: str = "momentum",
    schedule: str = "none",
    trainer: Mapping[str, Any] | None = None,
    over: Mapping[str, Any] | None = None,
    **top: Any,
) -> DictConfig:
    """Return a config like that of ``configs/train.yaml``, for ``built``; keys of ``over`` may have dots and reach inside."""
    cfg = OmegaConf.create(
        {
            "name": "test",
            "seed": 3,
            "device": "cpu",
            "precision": "float64",
            "compile": False,
            "mode": "train",
            "ckpt_path": None,
            "resume": "never",
            "threads": 1,
            "solver": {"rtol": 1e-6},
            "task": {"kind": "toy", "solver": "${solver}"},
            "optimizer": {"kind": kind, "lr": SMALL[kind], "scheduler": SCHEDULERS[schedule]},
            "trainer": {"max_steps": 12, "eval_every": 2, "checkpoint_every": 4, "progress": False, **(trainer or {})},
            "paths": {"data": "somewhere"},
        }
    )
    for key, value in {**top, **(over or {})}.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def built(cfg: DictConfig, task: Task | None = None) -> Built:
    """Build by hand what ``hyperopt.app.building.build`` would."""
    values: dict[str, Any] = OmegaConf.to_container(cfg.optimizer)  # pyright: ignore[reportAssignmentType]
    made = optimizer(**{**values, "scheduler": scheduler(**values["scheduler"])})
    return Built(task=task or Toy(), optimizer=made, trainer=TrainerSettings(**cfg.trainer))


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` without what may differ from run to run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def summary(out: Path) -> dict[str, Any]:
    """Return ``summary.json``."""
    return json.loads((out / "summary.json").read_text())


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing catches it, nothing is written any more."""


def go(cfg: DictConfig, out: Path, task: Task | None = None) -> float:
    """Run a config on a toy task."""
    with mock.patch("hyperopt.app.run.build", lambda composed: built(composed, task)):
        return run(cfg, out)


def raise_at(step: int, error: BaseException) -> Toy:
    """Return a task whose step ``step`` raises."""

    def hook(k: int, task: Toy) -> None:
        if k == step:
            raise error

    return Toy(hook)


def signal_at(step: int, number: int) -> Toy:
    """Return a task that sends this process one signal in step ``step``; a second one would end it at once."""
    sent: list[int] = []

    def hook(k: int, task: Toy) -> None:
        if k == step and not sent:
            sent.append(k)
            os.kill(os.getpid(), number)

    return Toy(hook)


def poison_at(step: int, group: str, value: float = math.nan) -> Toy:
    """Return a task whose hypergradient of ``group`` is not finite in step ``step``."""

    def hook(k: int, task: Toy) -> None:
        if k == step:
            grad = task.groups()[group][-1].grad
            assert grad is not None
            grad.fill_(value)

    return Toy(hook)


def uninterrupted(out: Path, cfg: DictConfig) -> list[dict[str, Any]]:
    """Return the rows of a run that nothing stops."""
    go(cfg, out)
    return rows(out)
