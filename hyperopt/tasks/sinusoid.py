"""Few-shot regression of sine curves, the first experiment of MAML.

    y = a sin(x - phase),      a in (0.1, 5), phase in (0, pi), x in (-5, 5), all uniform

A task is to learn one curve from a few of its points. The loss is the mean squared error.

References: C. Finn, P. Abbeel and S. Levine, ICML 2017, arXiv 1703.03400, section 5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperopt.core.checks import check_counts
from hyperopt.core.policy import SolveError
from hyperopt.core.random import Keys
from hyperopt.data.splits import Dataset
from hyperopt.tasks.base import Environment
from hyperopt.tasks.meta import Episodes, MetaTask
from hyperopt.tasks.network import perceptron

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AMPLITUDE, PHASE, SHOTS, QUERIES = range(4)  # streams of random numbers
REACH = 5.0  # largest |x|
LOWEST, HIGHEST = 0.1, 5.0  # range of the amplitudes
SHOWN = 4  # number of curves in the figure


@dataclass(eq=False)
class SinusoidTask(MetaTask):
    """Sine curves of different amplitudes and phases.

    Attributes:
        hidden: sizes of the hidden layers.
        dataset: not a setting here, since the curves are drawn.
    """

    name = "sinusoid"

    hidden: tuple[int, ...] = (40, 40)
    dataset: Dataset | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        check_counts(self, "hidden")

    def network(self, env: Environment) -> nn.Module:
        """Build a perceptron from one number to one number."""
        return perceptron((1, *self.hidden, 1), env.generator)

    def draw(self, keys: Keys, split: str, shots: int) -> Episodes:
        """Return a curve for each key. shape of ``x``: (tasks, shots, 1)."""
        dtype = self.env.dtype
        amplitude = LOWEST + (HIGHEST - LOWEST) * keys.uniform(AMPLITUDE, (1, 1), dtype)
        phase = math.pi * keys.uniform(PHASE, (1, 1), dtype)
        x, query_x = (
            REACH * (2 * keys.uniform(stream, (count, 1), dtype) - 1)
            for stream, count in ((SHOTS, shots), (QUERIES, self.queries))
        )
        return Episodes(x, amplitude * torch.sin(x - phase), query_x, amplitude * torch.sin(query_x - phase))

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared error of each curve."""
        return (outputs - y).square().mean((1, 2))

    def figures(self) -> dict[str, Figure]:
        """Return ``curves``: the shots of test curves, and the network before and after ``eval_steps`` inner steps."""
        from matplotlib.figure import Figure  # imported here because it takes half a second

        shown = self.drawn("test", 0, min(SHOWN, self.test_tasks))
        grid = torch.linspace(-REACH, REACH, 200).to(shown.x)[:, None]
        figure = Figure(figsize=(3.2 * len(shown.x), 2.8), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, len(shown.x), squeeze=False).flat):
            axes.plot(shown.x[i, :, 0].cpu(), shown.y[i, :, 0].cpu(), "k^", label="shots")
            axes.set(xlabel="x", ylabel="y")
            axes.grid(alpha=0.3)
        for steps in (0, *(n for n in self.eval_steps if n)):
            try:
                w = self.adapted(shown, steps)
            except SolveError:  # the weights were not learned for so many steps
                continue
            with torch.no_grad():
                outputs = self.outputs(w, grid.expand(len(shown.x), *grid.shape))[..., 0].cpu()
            for axes, line in zip(figure.axes, outputs, strict=True):
                axes.plot(grid[:, 0].cpu(), line, "--" if not steps else "-", label=f"{steps} steps")
        figure.axes[-1].legend(fontsize=7)
        return {"curves": figure}
