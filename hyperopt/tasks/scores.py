"""How good a model's outputs are: the loss that the targets ask for, and the accuracy where there are classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.core import distributed
from hyperopt.data.splits import Rows

ROWS = 10_000  # at a time: bounds the memory of an evaluation, and changes no number


@torch.no_grad()
def scores(rows: Mapping[str, Rows], outputs: Callable[[Tensor], Tensor], at_a_time: int = ROWS) -> dict[str, float]:
    """Return ``<name>/loss``, and ``<name>/accuracy`` where the targets are classes, on each set of rows.

    Args:
        rows: the sets of rows by name.
        outputs: of flattened rows: logits, or numbers. shape: (n, outputs).
        at_a_time: rows of one call; sparse rows are taken all at once.
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
    """The mean loss that the targets ask for.

    Numbers: half the squared error; two classes with one output: logistic; else cross-entropy of the logits.

    Args:
        outputs: shape: (n, outputs).
        y: numbers or class labels. shape: (n,).
    """
    if y.is_floating_point():
        return (outputs[:, 0] - y).square().mean() / 2
    if outputs.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))
    return functional.cross_entropy(outputs, y)


def classes(outputs: Tensor) -> Tensor:
    """The class of each row. shape: (n,)."""
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
