"""The figures of tasks that solve equilibria: residuals, the spectrum of a matrix, and misclassified images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperopt.core.status import Solution, SolveStats
from hyperopt.data.splits import Rows
from hyperopt.nn.contractive import ContractiveMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 25  # number of misclassified images, in five lines of five


def residual_figure(solutions: Mapping[str, Solution]) -> Figure:
    """Return a semilog plot of the worst relative residual over the iterations of traced solutions, forward and adjoint.

    The solutions have the names of their equilibria, which may be empty.
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


@torch.no_grad()
def misclassified_figure(logits: Callable[[Tensor], Tensor], rows: Rows, shape: tuple[int, ...], batch: int) -> Figure:
    """Return a figure of the first misclassified images, each with its predicted and its true class.

    ``logits`` maps ``batch`` flattened rows at a time to logits. The ``shape`` of an image has 1 or 3 channels first.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    places, taken = [], []
    for first in range(0, len(rows), batch):
        part = rows.take(slice(first, first + batch))
        predicted = logits(part.x).argmax(1)
        wrong = (predicted != part.y).nonzero().squeeze(1)
        places += (wrong + first).tolist()
        taken += predicted[wrong].tolist()
        if len(places) >= SHOWN:
            break
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    grid = figure.subplots(SHOWN // 5, 5)
    for axes in grid.flat:
        axes.axis("off")
    for axes, place, label in zip(grid.flat, places, taken, strict=False):
        image = rows.x[place].reshape(shape).float().cpu()
        low, high = image.amin(), image.amax()
        shown = ((image - low) / torch.where(high > low, high - low, torch.ones_like(high))).permute(1, 2, 0)
        axes.imshow(shown[..., 0].numpy() if shape[0] != 3 else shown.numpy(), cmap="gray")
        axes.set_title(f"{label}, is {int(rows.y[place])}", fontsize=8)
    return figure
