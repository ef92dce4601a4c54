"""Two coupled equilibrium states of different shapes, trained by implicit hypergradients to match those of a hidden model.

    min over (M, B)   mean_i (|x_i - x'_i|^2 + |y_i - y'_i|^2) / 2      x', y': targets, from a model with hidden M and B
    subject to        (x_i, y_i) = f(x_i, y_i; M, B u_i)                 x in R^n, y in R^(p x q)

This is a worked example of a fixed point in several variables. ``hyperopt.fixed_point`` takes the tuple of states directly; the
solvers, the adjoints, the certificate and ``mode=check`` work as they do for one variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperopt.core import distributed
from hyperopt.core.checks import check_count, check_number, check_open_unit, plain
from hyperopt.data.splits import scaled_by
from hyperopt.nn.contractive import ProjectedMatrix
from hyperopt.nn.coupled import CoupledCell, State
from hyperopt.nn.deq import DEQ
from hyperopt.tasks.base import Environment, GradientCheck, StepRecord
from hyperopt.tasks.exports import LearnedModel
from hyperopt.tasks.solving import SolvingTask

SPLITS = {"outer": "fitted", "val": "selected on", "test": "held out"}


@dataclass(eq=False)
class CoupledTask(SolvingTask):
    """The task of two coupled states; an outer step takes one hypergradient on all fitted rows.

    Attributes:
        x_size: number of entries of x, at least 1.
        y_shape: shape (p, q) of y.
        features: number of entries of an input, at least 1.
        rows: number of examples in each split: fitted, for selection, held out.
        max_norm: largest spectral norm of the coupling matrix M, in (0, 1); the hidden model has 0.9 of it.
        noise: standard deviation of the noise in the targets, at least 0.
        certificate_every: number of outer steps between two certificates (``hypergrad/error_estimate``).
        model: the layer, after ``setup``.
        inputs, targets: the inputs and targets of each split, after ``setup``.
    """

    name = "coupled"
    MEASURES: ClassVar[tuple[str, ...]] = tuple(f"{split}/{kind}" for split in SPLITS for kind in ("loss", "error_x", "error_y"))

    x_size: int = 5
    y_shape: tuple[int, int] = (3, 4)
    features: int = 8
    rows: int = 100
    max_norm: float = 0.8
    noise: float = 0.0
    certificate_every: int = 10

    model: DEQ = field(init=False, repr=False)
    inputs: dict[str, Tensor] = field(init=False, repr=False)
    targets: dict[str, State] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges; a list given as ``y_shape`` becomes a tuple."""
        super().__post_init__()
        for name in ("x_size", "features", "rows", "certificate_every"):
            check_count(self, name)
        sizes = tuple(map(plain, self.y_shape))
        if len(sizes) != 2 or not all(isinstance(n, int) and n >= 1 for n in sizes):
            raise ValueError(f"{type(self).__name__}: y_shape={sizes!r} must be two whole numbers >= 1; change y_shape")
        object.__setattr__(self, "y_shape", sizes)
        check_open_unit(self, "max_norm")
        check_number(self, "noise", 0.0)

    def setup(self, env: Environment) -> None:
        """Draw the hidden model, the rows and the model from ``env.generator`` in float64, then move them to device and dtype."""
        generator = env.generator

        # With this scale M lies on the boundary of the ball.
        hidden = self._build(self.features, 0.9 * self.max_norm, 1.0, generator).to(env.device, env.dtype)
        self.model = self._build(self.features, self.max_norm, 0.01, generator).to(env.device, env.dtype)
        self.layers, self.inputs, self.targets = {"": self.model}, {}, {}
        for split in SPLITS:
            drawn = torch.randn(self.rows, self.features, generator=generator, dtype=torch.float64)
            self.inputs[split] = drawn.to(env.device, env.dtype)
            with torch.no_grad():
                states = hidden(self.inputs[split])
            noise = [torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s) for s in states]
            x, y = (s + self.noise * n for s, n in zip(states, noise, strict=True))
            self.targets[split] = (x, y)
        self.steps = 0

    def _build(self, features: int, radius: float, scale: float, generator: torch.Generator | None) -> DEQ:
        size = self.x_size + self.y_shape[0] * self.y_shape[1]
        matrix = ProjectedMatrix(size, radius, scale, generator=generator)
        cell = CoupledCell(features, self.x_size, self.y_shape, matrix, generator=generator)
        return DEQ(cell, self.solver, self.adjoint, policy=self.policy, fallback=self.fallback)

    def learned(self) -> LearnedModel:
        """Return the layer, which maps inputs to both states."""
        return LearnedModel(self.model.state_dict(), {}, (self.features,), 0, scaled_by())

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> DEQ:
        """Build the layer."""
        return self._build(shape[0], self.max_norm, 0.01, None)

    @property
    def _cell(self) -> CoupledCell:
        assert isinstance(self.model.cell, CoupledCell)
        return self.model.cell

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups M and B."""
        return {name: list(group) for name, group in self._cell.groups().items()}

    def project_(self) -> None:
        """Project M."""
        self._cell.recurrent.project_()

    def loss(self, split: str, rows: slice = slice(None)) -> Tensor:
        """Return the mean over rows of half the squared distance from the targets."""
        found = self.model(self.inputs[split][rows])
        distances = [(s - t[rows]).square().flatten(1).sum(1) for s, t in zip(found, self.targets[split], strict=True)]
        return (distances[0] + distances[1]).mean() / 2

    def outer_loss(self) -> Tensor:
        """Return the loss of a step."""
        return self.loss("outer")

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        mine = distributed.share_of(self.rows)
        record = self.update(
            optimizer,
            check,
            lambda: self.loss("outer", mine),
            lambda: self.certificate(self.certificate_every),
            mine.stop - mine.start,
        )
        return record.over_ranks()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return ``loss``, and ``error_x`` and ``error_y``, the relative distances of the states from their targets."""
        metrics = {}
        for split in SPLITS:
            metrics[f"{split}/loss"] = self.loss(split).item()
            assert self.model.solution is not None
            for name, state, target in zip("xy", self.model.solution.value, self.targets[split], strict=True):
                metrics[f"{split}/error_{name}"] = float((state - target).norm() / target.norm())
        return metrics

    def describe(self) -> dict[str, Any]:
        """Return the sizes, and the number of rows of each metric."""
        return {
            "name": self.name,
            "x_size": self.x_size,
            "y_shape": list(self.y_shape),
            "features": self.features,
            "hyperparameters": self.sizes(),
            "rows": {name: {"split": split, "count": self.rows, "evaluated": self.rows} for name, split in SPLITS.items()},
        }
