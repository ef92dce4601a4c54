"""The metrics of a task's solves, and the figures of their residuals and of the recurrent matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from hyperopt.core.status import Solution, SolveStats, Status
from hyperopt.nn.contractive import ContractiveMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def residual_figure(solutions: Mapping[str, Solution]) -> Figure:
    """Return a semilog plot of the worst relative residual over the iterations, forward and adjoint.

    Args:
        solutions: traced solutions by the name of their equilibrium; a name may be empty.
    """
    figure, axes = axes_of("iteration", "largest relative residual over the rows")
    for layer, solution in solutions.items():
        solves: list[tuple[str, SolveStats | None]] = [("inner", solution.forward), ("adjoint", solution.adjoint)]
        for name, stats in solves:
            if stats is not None and stats.trace.numel():
                trace = stats.trace.detach().double().cpu()
                label = " ".join(word for word in (layer, name, f"({stats.method})") if word)
                axes.semilogy(range(1, len(trace) + 1), trace.numpy(), marker=".", label=label)
    if axes.lines:
        axes.legend()
    return figure


def axes_of(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure outside pyplot's global list, and its axes."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def spectrum_figure(matrix: ContractiveMatrix) -> Figure:
    """Return a plot of the eigenvalues of A, the unit circle and the circle of the bound on the norm."""
    figure, axes = axes_of("real part", "imaginary part")
    values = torch.linalg.eigvals(matrix.matrix().detach().double().cpu()).numpy()
    bound = float(matrix.norm_bound())
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    for radius, style, label in ((1.0, "-", "unit circle"), (bound, "--", f"norm bound {bound:.3g}")):
        axes.plot(radius * angle.cos().numpy(), radius * angle.sin().numpy(), style, color="gray", linewidth=1, label=label)
    axes.plot(values.real, values.imag, ".", label="eigenvalues of A")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    return figure
