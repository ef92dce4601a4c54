"""The equilibrium model: fitted by implicit hypergradients on one split, selected on another and tested on a third.

    min over (A, B, c, classifier)   mean_i cross_entropy(classifier(w_i), y_i) + sum_g l2_g / 2 |g|^2
    subject to                       w_i = tanh(w_i A + B x_i + c)      for every fitted row i

Reference: R. Grazzi, L. Franceschi, M. Pontil and S. Salzo, On the iteration complexity of hypergradient computation, ICML
2020, arXiv 2006.16218, section 5.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.core import distributed
from hyperopt.core.checks import check_choice, check_count, check_flag, check_optional
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.tree import tree_norm
from hyperopt.data.splits import Rows
from hyperopt.nn.cells import CellFactory, OwnCell, ProjectedCell
from hyperopt.nn.constants import mean_cross_entropy_constants
from hyperopt.nn.equilibrium import EquilibriumModel, linear_classifier
from hyperopt.tasks.base import SPLIT_MEASURES, Environment, GradientCheck, StepRecord
from hyperopt.tasks.figures import spectrum_figure
from hyperopt.tasks.supervised import SupervisedTask
from hyperopt.tasks.tolerance import GradientTolerance
from hyperopt.tasks.warm import WarmStart, WarmStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TOLERANCES = ("fixed", "gradient")
WARM_DTYPES = (None, "float32", "bfloat16")


@dataclass(eq=False)
class EquilibriumTask(SupervisedTask):
    """The equilibrium model; an outer step takes one hypergradient on a batch of the fitted rows (by default all of them).

    Attributes:
        state_size: number of entries of a state ``w_i``, unless the cell is a module with its own ``state_size``.
        cell: the inner map (None: a projected matrix A without structure); see ``hyperopt.nn.cells.CellFactory``. It may be an
            ordinary module with ``forward(z, x)``; see ``hyperopt.nn.cells.OwnCell``.
        classifier_scale: standard deviation of the classifier's normal initial weights, with zero bias (None: both as
            ``torch.nn.Linear`` initialises them).
        warm_start: whether the solves of a fitted row start from the row's last state and adjoint variable, which takes the
            memory of two states for every fitted row.
        warm_dtype: floating-point dtype of these (None: that of the run); ``bfloat16`` takes half the memory of float32.
        tolerance: ``fixed``: every step uses ``solver.rtol``. ``gradient``: the tolerance is proportional to the norm of the
            hypergradient and at most ``solver.rtol``; see ``hyperopt.tasks.tolerance``.
        certificate_every: number of outer steps between two certificates (``hypergrad/error_estimate``).
        l2: ``{group: strength}``; ``strength / 2 * |group|^2`` is added to the outer loss of a step, not to ``outer/loss``.
        model: the model, after ``setup``.
        warm: the store of warm starts, after ``setup`` (None: ``warm_start`` is off).
        forcing: the rule of the tolerance, after ``setup`` (None: ``tolerance="fixed"``).
    """

    name = "equilibrium"
    MEASURES: ClassVar[tuple[str, ...]] = SPLIT_MEASURES

    state_size: int = 100
    cell: CellFactory | None = None
    classifier_scale: float | None = None
    warm_start: bool = False
    warm_dtype: str | None = None
    tolerance: str = "fixed"
    certificate_every: int = 10
    l2: dict[str, float] = field(default_factory=dict)

    model: EquilibriumModel = field(init=False, repr=False)
    warm: WarmStore | None = field(init=False, repr=False)
    forcing: GradientTolerance | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "state_size")
        if self.cell is not None and not isinstance(self.cell, CellFactory):
            try:
                object.__setattr__(self, "cell", OwnCell(self.cell))
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: cell: {error}; change cell") from error
        check_optional(self, "classifier_scale", 0.0)
        check_flag(self, "warm_start")
        check_choice(self, "warm_dtype", WARM_DTYPES)
        check_choice(self, "tolerance", TOLERANCES)
        check_count(self, "certificate_every")
        name = type(self).__name__
        if not isinstance(self.l2, Mapping):
            raise ValueError(f"{name}: l2={self.l2!r} must map groups to strengths, as {{B: 1e-4}}; change l2")
        for group, strength in self.l2.items():
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
                raise ValueError(f"{name}: l2.{group}={strength!r} is not in [0, inf); change l2")

    def setup(self, env: Environment) -> None:
        """Load the rows and build the model, with initial values from ``env.generator`` and the order of rows from ``env.seed``.

        Raises:
            ValueError: ``l2`` names a group that the model does not have, or there are no fitted rows, or fewer than
                ``batch_size``.
        """
        self.load(env)
        fitted = self.rows["outer"]
        self.model = self._build(fitted.x.shape[1], self.splits.num_classes, env.generator).to(env.device, env.dtype)
        self.layers = {"": self.model}
        if env.compile:
            self.model.cell.compile_map()
        self.forcing = None if self.tolerance == "fixed" else GradientTolerance()
        if self.forcing is not None and self.model.solver is not None and self.model.solver.rtol == 0:
            raise ValueError("task.tolerance=gradient lowers solver.rtol, which is 0; set solver.rtol above 0")
        self.warm = None
        if self.warm_start:
            kept = None if self.warm_dtype is None else getattr(torch, self.warm_dtype)
            self.warm = WarmStore(len(fitted), self.model.cell.state_size, env.dtype, kept, env.device)
            size = self.warm.nbytes / 1e6
            log.info("the warm starts of %d rows take %.1f MB in memory and in every checkpoint", len(fitted), size)
        unknown = [group for group, strength in self.l2.items() if strength and group not in self.model.groups()]
        if unknown:
            known = ", ".join(self.model.groups())
            raise ValueError(f"task.l2.{unknown[0]}: the model has no such group; its groups are {known}; change task.l2")

    def _build(self, features: int, classes: int, generator: torch.Generator | None) -> EquilibriumModel:
        cell = (self.cell or ProjectedCell()).build(features, self.state_size, generator)
        classifier = linear_classifier(cell.state_size, classes, self.classifier_scale, generator)
        return EquilibriumModel(cell, classifier, self.solver, self.adjoint, self.policy, self.fallback)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> EquilibriumModel:
        """Build the model."""
        return self._build(math.prod(shape), classes, None)

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups of the cell (A, B, c) and ``classifier``."""
        return {name: list(group) for name, group in self.model.groups().items()}

    def project_(self) -> None:
        """Project the cell."""
        self.model.cell.project_()

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, from a solve that starts at zero."""
        return self.model(x)

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        batch, step = self.batches.take(), self.steps
        places = distributed.own(batch.index, len(self.rows["outer"]))
        fitted = self.rows["outer"].take(places)
        start = WarmStart() if self.warm is None else self.warm.start(places, step, batch.rows)
        if self.forcing is not None:
            self.model.solver = self.forcing.apply(self.solver or Picard(), fitted.x.dtype)
        record = self.update(
            optimizer,
            check,
            lambda: self._loss(fitted, start),
            lambda: self._measured(fitted),
            len(fitted),
        )
        self.model.solver = self.solver
        if self.warm is not None and self.model.solution is not None:
            self.warm.keep(places, step, self.model.solution.value, self.model.solution.v, batch.rows)
        record.metrics |= {**start.metrics, **self.place(batch)}
        return record.over_ranks()

    def _measured(self, fitted: Rows) -> dict[str, float]:
        found = self.certificate(self.certificate_every, lambda: mean_cross_entropy_constants(self.model, fitted.x))
        if self.forcing is not None and self.model.solver is not None:
            found["inner/rtol"] = self.model.solver.rtol
            self.forcing.note(tree_norm(self.gradients()))
        return found

    def _loss(self, rows: Rows, start: WarmStart) -> Tensor:
        """Return the mean cross-entropy on ``rows``, plus ``sum_g l2_g / 2 |g|^2``."""
        groups = self.model.groups()
        terms = [s / 2 * tensor.square().sum() for name, s in self.l2.items() if s for tensor in groups[name]]
        penalty = sum(terms[1:], start=terms[0]) if terms else 0.0
        return functional.cross_entropy(self.model(rows.x, start.state, start.adjoint), rows.y) + penalty

    def outer_loss(self) -> Tensor:
        """Return the loss of a step, on the evaluated fitted rows."""
        return self._loss(self.evaluated()["outer"], WarmStart())

    def figures(self) -> dict[str, Figure]:
        """Return ``residual`` (of one traced forward and backward solve) and, for a cell with a matrix A, ``spectrum``."""
        recurrent = getattr(self.model.cell, "recurrent", None)
        return {**super().figures(), **({} if recurrent is None else {"spectrum": spectrum_figure(recurrent)})}

    def parts(self) -> dict[str, Any]:
        """Return the model, the position in the data, the warm starts and the state of the tolerance."""
        return {**super().parts(), "warm": self.warm, "tolerance": self.forcing}

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, and the number of rows of each metric."""
        return {
            **super().describe(),
            "state_size": self.model.cell.state_size,
            "warm_bytes": 0 if self.warm is None else self.warm.nbytes,
        }
