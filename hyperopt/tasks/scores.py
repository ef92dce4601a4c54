"""The scores of a model on sets of rows: the loss that fits the targets, and the accuracy if there are classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.core import distributed
from hyperopt.data.splits import Rows

ROWS = 10_000  # number of rows of one call, which bounds the memory of an evaluation


@torch.no_grad()
def scores(rows: Mapping[str, Rows], outputs: Callable[[Tensor], Tensor], at_a_time: int = ROWS) -> dict[str, float]:
    """Return ``<name>/loss``, and ``<name>/accuracy`` if the targets are classes, on each set of rows.

    ``outputs`` maps ``at_a_time`` flattened rows, or all rows if they are sparse, to logits or numbers, shape (n, outputs).
    """
    found = {}
    for name, whole in rows.items():
        shared = distributed.ranks() > 1 and whole.x.layout == torch.strided
        each = whole.take(distributed.share_of(len(whole))) if shared else whole
        parts = each.x.split(at_a_time) if each.x.layout == torch.strided else [each.x]
        out = torch.cat([outputs(x) for x in parts])
        found[f"{name}/loss"] = distributed.average(loss_of(out, each.y), len(each)).item()
        if not each.y.is_floating_point():
            found[f"{name}/accuracy"] = distributed.average((classes(out) == each.y).double().mean(), len(each)).item()
    return found


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss that fits the targets.

    It is half the squared error for numbers, the logistic loss for two classes with one output, else the cross-entropy.

    Args:
        outputs: numbers or logits. shape: (n, outputs)
        y: numbers or class labels. shape: (n,)
    """
    if y.is_floating_point():
        return (outputs[:, 0] - y).square().mean() / 2
    if outputs.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))
    return functional.cross_entropy(outputs, y)


def classes(outputs: Tensor) -> Tensor:
    """Return the predicted class of each row. shape: (n,)."""
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
