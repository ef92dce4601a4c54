"""Is the hypergradient of one outer step right? Held against differences of the outer loss, the inner problem solved anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import pytest
import torch
from composing import composed
from torch import Tensor

from hyperopt.app.building import Built, build
from hyperopt.app.repro import configure, preserved_global_state, seed_everything
from hyperopt.bilevel.estimate import Estimate
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.stn.draw import Draw
from hyperopt.stn.space import HyperSpace
from hyperopt.tasks.base import Environment, Task
from hyperopt.tasks.bilevel import BilevelTask
from hyperopt.tasks.stn import SelfTuningTask

STEP = 1e-5  # of the differences, along directions of length 1
TIGHT = 1e-11


@contextlib.contextmanager
def made(*overrides: str) -> Iterator[tuple[Task, Built]]:
    """The task and the optimizer of a command line, in float64, as ``run`` makes them."""
    cfg = composed("device=cpu", "precision=float64", *overrides)
    with preserved_global_state():
        configure(torch.device("cpu"), torch.float64, None)
        generator = seed_everything(cfg.seed)
        built = build(cfg)
        built.task.setup(Environment(torch.device("cpu"), torch.float64, cfg.seed, False, generator, built.trainer))
        yield built.task, built


@dataclass
class Slope:
    """One directional derivative of the outer loss.

    Attributes:
        group: of the hyperparameters.
        predicted: by the hypergradient.
        measured: by a central difference.
        size: of the true derivative in this group, as far as it is known: along the hypergradient.
    """

    group: str
    predicted: float
    measured: float
    size: float

    @property
    def error(self) -> float:
        """Relative to the size."""
        return abs(self.predicted - self.measured) / max(abs(self.size), 1e-12)


def slopes(groups: dict[str, list[Tensor]], loss: Callable[[], float], grads: dict[str, list[Tensor]]) -> list[Slope]:
    """Each group's derivative along its hypergradient and along a random direction, and what the loss says."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for name, group in groups.items():
        before = [tensor.detach().clone() for tensor in group]
        size = 0.0
        for along in (True, False):
            way = [g.clone() if along else torch.randn(g.shape, generator=draw, dtype=g.dtype) for g in grads[name]]
            length = float(torch.cat([part.flatten() for part in way]).norm())
            assert length > 0, f"the hypergradient of {name} is zero"
            values = []
            for shift in (STEP, -STEP):
                with torch.no_grad():
                    for tensor, at, part in zip(group, before, way, strict=True):
                        tensor.copy_(at + shift / length * part)
                values.append(loss())
            with torch.no_grad():
                for tensor, at in zip(group, before, strict=True):
                    tensor.copy_(at)
            measured = (values[0] - values[1]) / (2 * STEP)
            size = measured if along else size
            predicted = sum(float((part * g).sum()) for part, g in zip(way, grads[name], strict=True)) / length
            found.append(Slope(name, predicted, measured, size))
    return found


class Probe(torch.optim.Optimizer):
    """An optimizer that stays where it is, and looks around: its closure is one function, whose gradients it compares.

    Args:
        groups: the hyperparameters.
        loss: the outer loss at other hyperparameters (None: what the closure returns there).
        around: is entered while it looks around.
    """

    def __init__(
        self,
        groups: dict[str, list[Tensor]],
        loss: Callable[[], float] | None = None,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        super().__init__([tensor for group in groups.values() for tensor in group], {})
        self.groups, self.loss, self.around = groups, loss, around
        self.found: list[Slope] = []

    def step(self, closure: Any = None) -> Any:
        value = closure()
        grads = {name: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in g] for name, g in self.groups.items()}
        with self.around():
            self.found = slopes(self.groups, self.loss or (lambda: float(closure())), grads)
        return value


def measured(task: Task) -> list[Slope]:
    """The hypergradient of the next outer step beside differences of that step's own loss."""
    if isinstance(task, SelfTuningTask):
        return tuned(task)
    probe = Probe(task.groups())
    task.step(probe, lambda gradients: None)
    return probe.found


def settled(task: Task, steps: int) -> list[Slope]:
    """That of a method that trains the weights itself, after outer steps that leave the hyperparameters where they are."""
    assert isinstance(task, BilevelTask)
    stays = torch.optim.SGD([tensor for group in task.groups().values() for tensor in group], lr=1e-300)
    for _ in range(steps):
        task.step(stays, lambda gradients: None)

    def loss() -> float:
        with torch.no_grad():
            return float(task.objective(Anderson(rtol=TIGHT, max_steps=1000), Implicit())[0])

    probe = Probe(task.groups(), loss)
    task.step(probe, lambda gradients: None)
    return probe.found


def tuned(task: SelfTuningTask, updates: int = 30) -> list[Slope]:
    """That of a self-tuning network: differences of the validation loss through the response to the hyperparameters.

    The weights respond to how far the hyperparameters are from where they were, so that this place is held while they are moved.
    """
    tuning = task.tuning
    for _ in range(updates):
        tuning.weight_step(task.built.train.draw())
    centre = task.model.space.u.detach().clone()

    def held(space: HyperSpace, eps: Tensor) -> Draw:
        m = space.u + space.sigma * eps
        return Draw(space, m, m - centre if space.centred else m, space.sigma)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HyperSpace, "at", held)
            yield

    probe = Probe(task.groups(), around=around)
    tuning.hyper_step(task.built.valid.draw(), probe)
    return probe.found


def assert_right(found: list[Slope], tolerance: float) -> None:
    """Every group's derivative has the right sign and size.

    The tolerance is at most a half, so that neither the negative nor the double of a right one passes.
    """
    assert found and tolerance < 0.5
    wrong = [slope for slope in found if not slope.error <= tolerance]
    assert not wrong, "\n".join(f"{slope}: error {slope.error:.2e}" for slope in wrong)


@dataclass
class Mutation:
    """A fault put into the program: hypergradients, or the part of them behind a solve, times a factor.

    Attributes:
        factor: -1 or 2.
    """

    factor: float
    patch: pytest.MonkeyPatch = field(repr=False)

    def outer(self) -> None:
        """Everything that reaches the hyperparameters: backward of an outer loss, of an estimate, of a draw."""
        factor, backward, estimated, at = self.factor, Tensor.backward, Estimate.backward, HyperSpace.at

        def scaled(estimate: Estimate, lam: Any) -> None:
            estimated(replace(estimate, grad=optree.tree_map(lambda g: factor * g, estimate.grad)), lam)

        def turned(space: HyperSpace, eps: Tensor) -> Draw:
            found = at(space, eps)
            return replace(found, delta=factor * found.delta + (1 - factor) * found.delta.detach())

        self.patch.setattr(Tensor, "backward", lambda loss, *a, **k: backward(factor * loss, *a, **k))
        self.patch.setattr(Estimate, "backward", scaled)
        self.patch.setattr(HyperSpace, "at", turned)
