"""The figures of a self-tuning run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperopt.stn.step import SelfTuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 20  # largest number of hyperparameters in a figure
FRAMES = 60  # largest number of frames of an animation


def trajectory_figure(tuning: SelfTuning) -> Figure:
    """Return plots of each hyperparameter plus and minus one scale, in its own units, of all scales, and of both losses."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    space = tuning.space
    history = tuning.history
    rounds = range(len(history))
    u, sigma = (torch.tensor([getattr(past, name) for past in history], dtype=torch.float64) for name in ("u", "sigma"))
    names = space.names[:MOST]
    columns = min(len(names) + 2, 4)
    lines = -(-(len(names) + 2) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for i, name in enumerate(names):
        value = space.declared[name].value
        middle, low, high = (value(u[:, i] + k * sigma[:, i]).tolist() for k in (0, -1, 1))
        axes[i].fill_between(rounds, low, high, alpha=0.25, linewidth=0)
        axes[i].plot(rounds, middle)
        axes[i].set_title(name, fontsize=9)
    scales, losses = axes[len(names)], axes[len(names) + 1]
    for i, name in enumerate(names):
        scales.plot(rounds, sigma[:, i].tolist(), label=name)
    scales.set_title("scale, in R", fontsize=9)
    if len(names) <= 8:
        scales.legend(fontsize=7)
    for kind in ("train_loss", "valid_loss"):
        losses.plot(rounds, [getattr(past, kind) for past in history], label=f"{kind}, perturbed", linewidth=0.8)
    if all(past.train_loss > 0 and past.valid_loss > 0 for past in history):
        losses.set_yscale("log")
    losses.set_title("losses", fontsize=9)
    losses.legend(fontsize=7)
    for unused in axes[len(names) + 2 :]:
        unused.set_axis_off()
    for each in axes[: len(names) + 2]:
        each.set_xlabel("round", fontsize=8)
        each.tick_params(labelsize=7)
    return figure


def fit_animation(x: Tensor, frames: Sequence[Sequence[float]]) -> bytes:
    """Return a GIF of the function that a network learns, and of ``x^2``.

    Args:
        x: points. shape: (n,)
        frames: for each frame the round, the tuned range, and the n values of the function.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    frames = frames[:: -(-len(frames) // FRAMES)]
    figure = Figure(figsize=(3.6, 2.9), layout="constrained")
    axes = figure.subplots()
    square = x.square().tolist()
    axes.plot(x, square, "k--", linewidth=1, label="$x^2$")
    (line,) = axes.plot(x, square, label="learned")
    band = axes.axvspan(0, 0, alpha=0.15)
    axes.set_xlim(float(x[0]) * 1.05, float(x[-1]) * 1.05)
    axes.set_ylim(-0.25 * max(square), 1.25 * max(square))
    axes.legend(fontsize=8, loc="upper center")
    writer = PillowWriter(fps=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.gif"
        with writer.saving(figure, str(path), dpi=80):
            for count, width, *learned in frames:
                line.set_ydata(learned)
                band.set_bounds(-width, 0, 2 * width, 1)
                axes.set_title(f"round {int(count)}, range {width:.2f}", fontsize=9)
                writer.grab_frame()
        return path.read_bytes()
