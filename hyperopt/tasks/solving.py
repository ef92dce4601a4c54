"""``SolvingTask``: the settings, the outer step and its record, for tasks whose outer loss contains equilibria."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.certificate import Constants, certify
from hyperopt.core.checks import POLICIES, check_choice
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Solution, Status
from hyperopt.core.tree import tree_norm
from hyperopt.tasks.base import FixedSettings, GradientCheck, StepRecord, Task
from hyperopt.tasks.figures import residual_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class SolvingTask(FixedSettings, Task):
    """A task whose hyperparameters are the parameters of a model with one or more equilibria in it.

    Attributes:
        solver: the solver of the states (None: Picard).
        adjoint: the adjoint (None: implicit, by the Neumann series).
        policy: what to do when the solver fails: ``raise``, ``warn`` (1st, 10th, 100th, ... time), ``fallback`` or ``ignore``.
        fallback: solvers that ``policy=fallback`` tries in turn (none: Anderson, Broyden, Newton-Krylov).
        prefix: what the names of the parameters begin with in ``predictor``.
        model: the model, after ``setup``.
        layers: the modules of the model that solve, by name, after ``setup``.
        steps: number of outer steps so far; ``setup`` sets it to 0.
    """

    solver: FixedPointSolver | None = None
    adjoint: Adjoint | None = None
    policy: str = "warn"
    fallback: tuple[FixedPointSolver, ...] = ()

    prefix: ClassVar[str] = ""

    model: Any = field(init=False, repr=False)
    layers: dict[str, Any] = field(init=False, repr=False)
    steps: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the policy, and whether the adjoint fits the solver."""
        check_choice(self, "policy", POLICIES)
        if self.adjoint is not None and (why := self.adjoint.unfit(self.solver or Picard())) is not None:
            raise ValueError(f"{type(self).__name__}: adjoint={type(self.adjoint).__name__} {why}; change adjoint")

    @abstractmethod
    def outer_loss(self) -> Tensor:
        """Return the outer loss on the fitted rows that are evaluated, for ``mode=check`` and the figure of the residuals."""

    def project_(self) -> None:
        """Move the hyperparameters to where the maps contract; called after every update."""

    def parts(self) -> dict[str, Any]:
        """Return the objects whose states a resume needs, by name; None for one that is not used."""
        return {"model": self.model}

    def values(self) -> dict[str, Tensor]:
        """Return the model's parameters by name."""
        return {f"{self.prefix}{name}": parameter.detach() for name, parameter in self.model.named_parameters()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters, and project them as after a step; see ``Task.set_values``."""
        super().set_values(values)
        self.project_()

    def solutions(self) -> Sequence[Solution]:
        """Return the latest solution of every equilibrium in the model."""
        return [layer.solution for layer in self.layers.values() if layer.solution is not None]

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        check: GradientCheck,
        loss: Callable[[], Tensor],
        measure: Callable[[], dict[str, float]] = dict,
        rows: int = 1,
    ) -> StepRecord:
        """Let the optimizer make one step, and project; the arguments are those of ``Task.descend``.

        ``measure`` returns further metrics; it is called after the first ``backward`` and before ``check``, which may clip.
        """
        measures = iter([measure])  # only for the first call

        def record(value: float) -> StepRecord:
            metrics, statuses = solve_metrics(self.solutions())
            return StepRecord(value, {**metrics, **next(measures, dict)()}, statuses, rows)

        found = self.descend(optimizer, check, loss, record, rows)
        self.project_()
        self.steps += 1
        return found

    def certificate(self, every: int, constants: Callable[[], Constants | None] = lambda: None) -> dict[str, float]:
        """Return the certificate of the latest hypergradient through the first equilibrium, if one is due; else nothing.

        It takes no evaluation and no vjp, only some norms of (rows, state) matrices and the cost of ``constants``.

        Args:
            every: number of outer steps between two certificates.
            constants: returns the constants of the cell and the outer loss, or None; not used on several ranks, since each has
                only a part of the rows.
        """
        solutions = self.solutions()
        if self.steps % every or not solutions or solutions[0].adjoint is None:
            return {}
        known = constants() if distributed.ranks() == 1 else None
        found = certify(solutions[0], tree_norm(self.gradients()), known)
        return {"hypergrad/error_estimate": found.error, "hypergrad/is_bound": float(found.is_bound)}

    @contextlib.contextmanager
    def solved_by(self, solver: FixedPointSolver, adjoint: Adjoint) -> Iterator[None]:
        """Give every layer another solver and adjoint in this block."""
        names = ("solver", "adjoint", "policy")
        before = [(layer, name, getattr(layer, name)) for layer in self.layers.values() for name in names]
        try:
            for layer in self.layers.values():
                layer.solver, layer.adjoint, layer.policy = solver, adjoint, "ignore"
            yield
        finally:
            for layer, name, value in before:
                setattr(layer, name, value)

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the outer loss and the first layer's solution; see ``Task.objective``."""
        with self.solved_by(solver, adjoint):
            return self.outer_loss(), self.solutions()[0]

    def figures(self) -> dict[str, Figure]:
        """Return ``residual``, of one traced forward and one traced backward solve."""
        hooks = [layer.register_forward_pre_hook(_traced, with_kwargs=True) for layer in self.layers.values()]
        try:
            loss = self.outer_loss()
        finally:
            for hook in hooks:
                hook.remove()
        torch.autograd.grad(loss, [tensor for group in self.groups().values() for tensor in group], allow_unused=True)
        named = {name if len(self.layers) > 1 else "": layer.solution for name, layer in self.layers.items()}
        return {"residual": residual_figure({name: found for name, found in named.items() if found is not None})}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of ``parts``, and the number of steps."""
        states = {name: None if part is None else dict(part.state_dict()) for name, part in self.parts().items()}
        return {**states, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place."""
        for name, part in self.parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        self.steps = state["steps"]


def _traced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a layer keep its residuals; a forward hook."""
    return args, {**kwargs, "trace": True}


def solve_metrics(solutions: Sequence[Solution]) -> tuple[dict[str, float], dict[str, Status]]:
    """Return the metrics and statuses of the latest forward and backward solves, by the names of ``StepRecord``.

    For several equilibria these are the slowest row, the worst residual, the worst status and the sums of the costs.
    """
    if not solutions:
        raise RuntimeError("no model has been solved yet; call the model first")
    metrics = {"cost/evaluations": 0.0, "cost/vjps": 0.0, "cost/jvps": 0.0}
    statuses = {}
    backward = [solution.adjoint for solution in solutions if solution.adjoint is not None]
    for name, solves in (("inner", [solution.forward for solution in solutions]), ("adjoint", backward)):
        if not solves:
            continue
        iterations = torch.cat([stats.iterations.double() for stats in solves])
        metrics[f"{name}/iterations"] = float(iterations.max()) if iterations.numel() else 0.0
        metrics[f"{name}/iterations_mean"] = float(iterations.mean()) if iterations.numel() else 0.0
        metrics[f"{name}/residual"] = _worst([stats.worst_residual() for stats in solves])
        metrics["cost/evaluations"] += sum(stats.evaluations for stats in solves)
        metrics["cost/vjps"] += sum(stats.vjps for stats in solves)
        metrics["cost/jvps"] += sum(stats.jvps for stats in solves)
        metrics[f"{name}/fallbacks"] = float(sum(bool(stats.fallbacks) for stats in solves))
        statuses[name] = max(stats.status for stats in solves)
    metrics["inner/contraction"] = _worst([float(solution.forward.contraction) for solution in solutions])
    return metrics, statuses


def _worst(values: Sequence[float]) -> float:
    """Return the largest value, or NaN if one is NaN."""
    return float(torch.tensor(values, dtype=torch.float64).max())
