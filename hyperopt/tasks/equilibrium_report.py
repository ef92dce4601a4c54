"""The figure of the equilibrium task's own matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hyperopt.nn.contractive import ContractiveMatrix
from hyperopt.tasks.solve_figures import axes_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
