"""The figure of misclassified images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperopt.data.splits import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 25  # number of images, in five lines of five


@torch.no_grad()
def misclassified_figure(logits: Callable[[Tensor], Tensor], rows: Rows, shape: tuple[int, ...], batch: int) -> Figure:
    """Return a figure of the first misclassified images, each with its predicted and its true class.

    Args:
        logits: a function from flattened rows to logits, shape (rows, classes).
        rows: the flattened images.
        shape: shape of one image, (channels, height, width) with 1 or 3 channels.
        batch: number of rows of one forward pass.
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
