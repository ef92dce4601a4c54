"""The equilibrium model, fitted by implicit hypergradients on one split, selected on another and tested on a third.

    min over (A, B, c, classifier)   mean_i cross_entropy(classifier(w_i), y_i) + sum_g l2_g / 2 |g|^2
    subject to                       w_i = tanh(w_i A + B x_i + c)      for every fitted row i

Reference: R. Grazzi, L. Franceschi, M. Pontil and S. Salzo, On the iteration complexity of hypergradient computation, ICML 2020,
arXiv 2006.16218, section 5.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.adjoints.base import Adjoint
from hyperopt.certificate import certify
from hyperopt.data.batches import Batches
from hyperopt.data.digits import Digits
from hyperopt.data.splits import Rows
from hyperopt.nn.cells import ProjectedCell
from hyperopt.nn.constants import mean_cross_entropy_constants
from hyperopt.nn.equilibrium import EquilibriumModel, linear_classifier
from hyperopt.solvers.base import FixedPointSolver
from hyperopt.status import Solution
from hyperopt.tasks.base import Environment, Guard, StepRecord, Task
from hyperopt.tasks.equilibrium_report import gradient_norm, residual_figure, solve_metrics, spectrum_figure
from hyperopt.tasks.settings import EquilibriumSettings
from hyperopt.tasks.warm import WarmStart, WarmStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

EVALUATION_ROWS = 10_000  # at a time: bounds the memory of an evaluation, and changes no number


class EquilibriumTask(EquilibriumSettings, Task):
    """One outer step is one hypergradient on a batch of the fitted rows, by default all of them, and one update.

    Attributes:
        model: the model, after ``setup``.
        rows: ``{"outer": fitted, "val": selected on, "test": held out}``, after ``setup``; those selected on may be none.
        batches: the order in which the fitted rows are taken, after ``setup``.
        warm: what is kept of the fitted rows under ``warm_start``, after ``setup``; else None.
    """

    name = "equilibrium"

    model: EquilibriumModel
    rows: dict[str, Rows]
    batches: Batches
    warm: WarmStore | None

    def setup(self, env: Environment) -> None:
        """Load the rows and build the model; initial values come from ``env.generator`` alone, the order from ``env.seed``.

        Raises:
            ValueError: a nonzero ``l2`` of a group that the model does not have, no rows to fit, or fewer than ``batch_size``.
        """
        self._splits = (self.dataset or Digits(seed=env.seed)).load(env.dtype, env.device)
        fitted, selected = self._splits.train, self._splits.val
        if self.fitted == "val":
            fitted, selected = selected, fitted
        if not self._splits.num_classes:
            raise ValueError(
                f"task.dataset={self._splits.name} has numbers to predict, and this model classifies; change dataset"
            )
        if not len(fitted):
            raise ValueError(f"task.fitted={self.fitted}, but dataset.{self.fitted}=0: no rows to fit; change one of them")
        self.rows = {"outer": fitted, "val": selected, "test": self._splits.test}
        features = fitted.x.shape[1]
        cell = (self.cell or ProjectedCell()).build(features, self.state_size, env.generator)
        classifier = linear_classifier(self.state_size, self._splits.num_classes, self.classifier_scale, env.generator)
        self.model = EquilibriumModel(cell, classifier, self.solver, self.adjoint, self.policy, self.fallback)
        self.model.to(env.device, env.dtype)
        if env.compile:
            cell.compile_map()
        self._steps = 0  # outer steps done
        self.batches = Batches(len(fitted), self.batch_size, env.seed, self.last_batch, env.device)
        self.warm = None
        if self.warm_start:
            kept = None if self.warm_dtype is None else getattr(torch, self.warm_dtype)
            self.warm = WarmStore(len(fitted), self.state_size, env.dtype, kept, env.device)
            size = self.warm.nbytes / 1e6
            log.info("warm starts of %d rows are kept: %.1f MB, in memory and in every checkpoint", len(fitted), size)
        unknown = [group for group, strength in self.l2.items() if strength and group not in self.model.groups()]
        if unknown:
            raise ValueError(f"task.l2.{unknown[0]}: the model's groups are {', '.join(self.model.groups())}; change task.l2")

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups of the cell (A, B, c) and ``classifier``."""
        return {name: list(group) for name, group in self.model.groups().items()}

    def step(self, optimizer: torch.optim.Optimizer, guard: Guard) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        records: list[StepRecord] = []
        batch = self.batches.take()  # the same rows and start for every call of the closure: a line search must see one function
        fitted = self.rows["outer"].take(batch.index)
        start = WarmStart() if self.warm is None else self.warm.start(batch.index, self._steps)

        def closure() -> float:
            optimizer.zero_grad()
            loss = self._loss(fitted, start) + self._penalty()
            loss.backward()
            certificate = {} if records else self._certificate(fitted)  # before the guard clips
            guard(self.gradients())
            metrics, statuses = solve_metrics(self.model)
            if not records:
                metrics |= {**certificate, **start.metrics}
            records.append(StepRecord(loss.item(), metrics, statuses))
            return records[-1].loss

        optimizer.step(closure)
        self.model.cell.project_()
        if self.warm is not None and self.model.solution is not None:
            self.warm.keep(batch.index, self._steps, self.model.solution.value, self.model.solution.v)
        first = records[0]
        for cost in ("cost/evaluations", "cost/vjps", "cost/jvps"):
            first.metrics[cost] = sum(record.metrics[cost] for record in records)
        if batch.index is not None:
            first.metrics["batch/rows"] = float(batch.rows)
            first.metrics["batch/epoch"] = batch.epoch + batch.number / self.batches.per_epoch
        self._steps += 1
        return first

    def _certificate(self, fitted: Rows) -> dict[str, float]:
        """Return the certificate of the hypergradient of the latest backward, every ``certificate_every`` steps.

        It makes no evaluation and no vjp: it costs some norms of (rows, state) matrices and a few products of A with itself.
        """
        solution = self.model.solution
        if self._steps % self.certificate_every or solution is None or solution.adjoint is None:
            return {}
        norm = gradient_norm(self.gradients())
        found = certify(solution, norm, mean_cross_entropy_constants(self.model, fitted.x))
        return {"hypergrad/error_estimate": found.error, "hypergrad/is_bound": float(found.is_bound)}

    def _loss(self, rows: Rows, start: WarmStart | None = None, trace: bool = False) -> Tensor:
        """Return the mean cross-entropy on ``rows``."""
        start = start or WarmStart()
        return functional.cross_entropy(self.model(rows.x, start.state, start.adjoint, trace), rows.y)

    def _penalty(self) -> Tensor | float:
        """Return the sum over groups of ``l2 / 2 |group|^2``."""
        groups = self.model.groups()
        terms = [s / 2 * tensor.square().sum() for name, s in self.l2.items() if s for tensor in groups[name]]
        return sum(terms[1:], start=terms[0]) if terms else 0.0

    def _evaluated(self) -> dict[str, Rows]:
        """Return the rows that each metric is measured on; rows selected on, if there are none, have no metric."""
        fitted = self.rows["outer"]
        shown = {**self.rows, "outer": fitted if self.eval_rows is None else fitted.take(slice(self.eval_rows))}
        return {name: rows for name, rows in shown.items() if len(rows)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the three sets of rows; every solve starts from zero."""
        metrics = {}
        for name, rows in self._evaluated().items():
            logits = torch.cat([self.model(part) for part in rows.x.split(EVALUATION_ROWS)])
            metrics[f"{name}/loss"] = functional.cross_entropy(logits, rows.y).item()
            metrics[f"{name}/accuracy"] = (logits.argmax(1) == rows.y).double().mean().item()
        return metrics

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the loss of a step on the fitted rows that are evaluated; see ``Task.objective``."""
        model, rows = copy.copy(self.model), self._evaluated()["outer"]  # the copy shares the parameters
        model.solver, model.adjoint, model.policy = solver, adjoint, "ignore"
        loss = functional.cross_entropy(model(rows.x), rows.y) + self._penalty()
        assert model.solution is not None
        return loss, model.solution

    def figures(self) -> dict[str, Figure]:
        """Return ``residual`` (of one traced solve each way) and, for a cell with a matrix A, ``spectrum``."""
        loss = self._loss(self._evaluated()["outer"], trace=True)
        torch.autograd.grad(loss, [tensor for group in self.groups().values() for tensor in group])
        figures = {}
        if self.model.solution is not None:
            figures["residual"] = residual_figure(self.model.solution)
        recurrent = getattr(self.model.cell, "recurrent", None)
        if recurrent is not None:
            figures["spectrum"] = spectrum_figure(recurrent)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return the model's tensors, where the data order stands, and what the next solves start from (None: from zero)."""
        return {
            "model": dict(self.model.state_dict()),
            "batches": self.batches.state_dict(),
            "warm": None if self.warm is None else self.warm.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, in place."""
        self.model.load_state_dict(state["model"])
        self.batches.load_state_dict(state["batches"])
        if self.warm is not None:
            self.warm.load_state_dict(state["warm"])
        self._steps = state["steps"]

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, and the rows behind each metric."""
        splits, selected = self._splits, "val" if self.fitted == "train" else "train"
        names, evaluated = {"outer": self.fitted, "val": selected, "test": "test"}, self._evaluated()
        return {
            "name": self.name,
            "state_size": self.state_size,
            "features": self.rows["outer"].x.shape[1],
            "classes": splits.num_classes,
            "hyperparameters": {name: sum(tensor.numel() for tensor in group) for name, group in self.groups().items()},
            "dataset": splits.name,
            "checksums": splits.checksums,
            "rows": {
                name: {"split": names[name], "count": len(rows), "evaluated": len(evaluated.get(name, ()))}
                for name, rows in self.rows.items()
            },
            "batch_size": self.batches.size or self.batches.rows,
            "batches_per_epoch": self.batches.per_epoch,
            "warm_bytes": 0 if self.warm is None else self.warm.nbytes,
        }
