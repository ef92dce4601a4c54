"""What a task shows of its solves: the numbers of a step, the figure of the residuals, and that of its matrix."""

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
    """Return the metrics and statuses of the latest forward and backward solves, under the names of ``StepRecord``.

    Of several equilibria the slowest row, the worst residual and the worst status count, and the sum of the costs.
    """
    if not solutions:
        raise RuntimeError("there is no solve to report: call the model first")
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
    """Return the largest value, NaN if any is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def residual_figure(solutions: Mapping[str, Solution]) -> Figure:
    """Return the worst relative residual against iteration, forward and adjoint, on a semilog axis.

    Args:
        solutions: traced solves by the name of their equilibrium, which may be empty.
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
    """Return a figure of its own, outside pyplot's global list, and its axes."""
    from matplotlib.figure import Figure  # here: half a second to import, and only a drawing needs it

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def spectrum_figure(matrix: ContractiveMatrix) -> Figure:
    """Return the eigenvalues of A in the complex plane, the unit circle and the circle of the norm's bound."""
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
