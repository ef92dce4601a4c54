"""What the tasks with an equilibrium show of its solves: the numbers of a step, and two figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from hyperopt.nn.contractive import ContractiveMatrix
from hyperopt.status import Solution, SolveStats, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Solved(Protocol):
    """A model that keeps its latest solve."""

    solution: Solution | None


def solve_metrics(model: Solved) -> tuple[dict[str, float], dict[str, Status]]:
    """Return the metrics and statuses of the latest forward and backward solve, under the names of ``StepRecord``."""
    solution = model.solution
    if solution is None:
        raise RuntimeError("there is no solve to report: call the model first")
    parts = {"inner": solution.forward}
    if solution.adjoint is not None:
        parts["adjoint"] = solution.adjoint
    metrics = {"cost/evaluations": 0.0, "cost/vjps": 0.0, "cost/jvps": 0.0}
    for name, stats in parts.items():
        metrics[f"{name}/iterations"] = _largest(stats.iterations)
        metrics[f"{name}/iterations_mean"] = float(stats.iterations.double().mean()) if stats.iterations.numel() else 0.0
        metrics[f"{name}/residual"] = stats.worst_residual()
        metrics["cost/evaluations"] += stats.evaluations
        metrics["cost/vjps"] += stats.vjps
        metrics["cost/jvps"] += stats.jvps
    metrics["inner/contraction"] = float(solution.forward.contraction)
    return metrics, {name: stats.status for name, stats in parts.items()}


def gradient_norm(gradients: Mapping[str, Sequence[torch.Tensor]]) -> float:
    """Return the Euclidean norm over all groups."""
    norms = [torch.linalg.vector_norm(g.detach()) for group in gradients.values() for g in group]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _largest(values: torch.Tensor) -> float:
    """Return the largest entry, 0 for no rows."""
    return float(values.max()) if values.numel() else 0.0


def residual_figure(solution: Solution) -> Figure:
    """Return the worst relative residual against iteration, forward and adjoint, on a semilog axis."""
    figure, axes = _axes("iteration", "largest relative residual over the rows")
    solves: list[tuple[str, SolveStats | None]] = [("inner", solution.forward), ("adjoint", solution.adjoint)]
    for name, stats in solves:
        if stats is not None and stats.trace.numel():
            trace = stats.trace.detach().double().cpu()
            axes.semilogy(range(1, len(trace) + 1), trace.numpy(), marker=".", label=f"{name} ({stats.method})")
    if axes.lines:
        axes.legend()
    return figure


def spectrum_figure(matrix: ContractiveMatrix) -> Figure:
    """Return the eigenvalues of A in the complex plane, the unit circle and the circle of the norm's bound."""
    figure, axes = _axes("real part", "imaginary part")
    values = torch.linalg.eigvals(matrix.matrix().detach().double().cpu()).numpy()
    bound = float(matrix.norm_bound())
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    for radius, style, label in ((1.0, "-", "unit circle"), (bound, "--", f"norm bound {bound:.3g}")):
        axes.plot(radius * angle.cos().numpy(), radius * angle.sin().numpy(), style, color="gray", linewidth=1, label=label)
    axes.plot(values.real, values.imag, ".", label="eigenvalues of A")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    return figure


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure of its own, outside pyplot's global list, and its axes."""
    from matplotlib.figure import Figure  # here: half a second to import, and only a drawing needs it

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes
