"""The equilibrium model, fitted by implicit hypergradients on one split, selected on another and tested on a third.

    min over (A, B, c, classifier)   mean_i cross_entropy(classifier(w_i), y_i) + sum_g l2_g / 2 |g|^2
    subject to                       w_i = tanh(w_i A + B x_i + c)      for every fitted row i

Reference: R. Grazzi, L. Franceschi, M. Pontil and S. Salzo, On the iteration complexity of hypergradient computation, ICML 2020,
arXiv 2006.16218, section 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.certificate import certify
from hyperopt.data.digits import Digits
from hyperopt.data.splits import Rows
from hyperopt.nn.cells import ProjectedCell
from hyperopt.nn.constants import mean_cross_entropy_constants
from hyperopt.nn.equilibrium import EquilibriumModel, linear_classifier
from hyperopt.tasks.base import Environment, Guard, StepRecord, Task
from hyperopt.tasks.equilibrium_report import gradient_norm, residual_figure, solve_metrics, spectrum_figure
from hyperopt.tasks.settings import EquilibriumSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATION_ROWS = 10_000  # at a time: bounds the memory of an evaluation, and changes no number


class EquilibriumTask(EquilibriumSettings, Task):
    """One outer step is one full-batch hypergradient on the fitted rows and one update.

    Attributes:
        model: the model, after ``setup``.
        rows: ``{"outer": fitted, "val": selected on, "test": held out}``, after ``setup``.
    """

    name = "equilibrium"

    model: EquilibriumModel
    rows: dict[str, Rows]

    def setup(self, env: Environment) -> None:
        """Load the rows and build the model; initial values come from ``env.generator`` alone.

        Raises:
            ValueError: a nonzero ``l2`` of a group that the model does not have.
        """
        self._splits = (self.dataset or Digits(seed=env.seed)).load(env.dtype, env.device)
        fitted, selected = self._splits.train, self._splits.val
        if self.fitted == "val":
            fitted, selected = selected, fitted
        self.rows = {"outer": fitted, "val": selected, "test": self._splits.test}
        features = fitted.x.shape[1]
        cell = (self.cell or ProjectedCell()).build(features, self.state_size, env.generator)
        classifier = linear_classifier(self.state_size, self._splits.num_classes, self.classifier_scale, env.generator)
        self.model = EquilibriumModel(cell, classifier, self.solver, self.adjoint, self.policy, self.fallback)
        self.model.to(env.device, env.dtype)
        if env.compile:
            cell.compile_map()
        self._steps = 0
        # Under warm_start: the fitted rows' states and adjoint variables at the last update.
        self._start: tuple[Tensor | None, Tensor | None] = (None, None)
        unknown = [group for group, strength in self.l2.items() if strength and group not in self.model.groups()]
        if unknown:
            raise ValueError(f"task.l2.{unknown[0]}: the model's groups are {', '.join(self.model.groups())}; change task.l2")

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups of the cell (A, B, c) and ``classifier``."""
        return {name: list(group) for name, group in self.model.groups().items()}

    def step(self, optimizer: torch.optim.Optimizer, guard: Guard) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        records: list[StepRecord] = []
        start = self._start  # the same for every call of the closure: a line search must see one function

        def closure() -> float:
            optimizer.zero_grad()
            loss = self._loss(start) + self._penalty()
            loss.backward()
            norm = gradient_norm(self.gradients())  # before the guard clips
            guard(self.gradients())
            metrics, statuses = solve_metrics(self.model)
            records.append(StepRecord(loss.item(), {**metrics, **self._certificate(norm)}, statuses))
            return records[-1].loss

        optimizer.step(closure)
        self.model.cell.project_()
        if self.warm_start and self.model.solution is not None:
            self._start = (self.model.solution.value, self.model.solution.v)
        first = records[0]
        for cost in ("cost/evaluations", "cost/vjps", "cost/jvps"):
            first.metrics[cost] = sum(record.metrics[cost] for record in records)
        return first

    def _certificate(self, norm: float) -> dict[str, float]:
        """Return the certificate of the hypergradient of the latest backward, every ``certificate_every`` steps.

        It makes no evaluation and no vjp: it costs some norms of (rows, state) matrices and a few products of A with itself.
        """
        self._steps += 1
        solution = self.model.solution
        if self._steps % self.certificate_every != 1 % self.certificate_every or solution is None or solution.adjoint is None:
            return {}
        found = certify(solution, norm, mean_cross_entropy_constants(self.model, self.rows["outer"].x))
        return {"hypergrad/error_estimate": found.error, "hypergrad/is_bound": float(found.is_bound)}

    def _loss(self, start: tuple[Tensor | None, Tensor | None] = (None, None), trace: bool = False) -> Tensor:
        """Return the mean cross-entropy on the fitted rows."""
        fitted = self.rows["outer"]
        return functional.cross_entropy(self.model(fitted.x, *start, trace=trace), fitted.y)

    def _penalty(self) -> Tensor | float:
        """Return the sum over groups of ``l2 / 2 |group|^2``."""
        groups = self.model.groups()
        terms = [s / 2 * tensor.square().sum() for name, s in self.l2.items() if s for tensor in groups[name]]
        return sum(terms[1:], start=terms[0]) if terms else 0.0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the three sets of rows; every solve starts from zero."""
        metrics = {}
        for name, rows in self.rows.items():
            logits = torch.cat([self.model(part) for part in rows.x.split(EVALUATION_ROWS)])
            metrics[f"{name}/loss"] = functional.cross_entropy(logits, rows.y).item()
            metrics[f"{name}/accuracy"] = (logits.argmax(1) == rows.y).double().mean().item()
        return metrics

    def figures(self) -> dict[str, Figure]:
        """Return ``residual`` (of one traced solve each way) and, for a cell with a matrix A, ``spectrum``."""
        loss = self._loss(trace=True)
        torch.autograd.grad(loss, [tensor for group in self.groups().values() for tensor in group])
        figures = {}
        if self.model.solution is not None:
            figures["residual"] = residual_figure(self.model.solution)
        recurrent = getattr(self.model.cell, "recurrent", None)
        if recurrent is not None:
            figures["spectrum"] = spectrum_figure(recurrent)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return the model's tensors and, under ``warm_start``, the states and adjoints that the next step starts from."""
        return {"model": dict(self.model.state_dict()), "start": list(self._start), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, in place."""
        self.model.load_state_dict(state["model"])
        self._steps = state["steps"]
        like = self.rows["outer"].x
        state_start, adjoint_start = (x if x is None else x.to(like.device, like.dtype, copy=True) for x in state["start"])
        self._start = (state_start, adjoint_start)

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, and the rows behind each metric."""
        splits, selected = self._splits, "val" if self.fitted == "train" else "train"
        names = {"outer": self.fitted, "val": selected, "test": "test"}
        return {
            "name": self.name,
            "state_size": self.state_size,
            "features": self.rows["outer"].x.shape[1],
            "classes": splits.num_classes,
            "hyperparameters": {name: sum(tensor.numel() for tensor in group) for name, group in self.groups().items()},
            "dataset": splits.name,
            "checksums": splits.checksums,
            "rows": {name: {"split": names[name], "count": len(rows)} for name, rows in self.rows.items()},
        }
