r"""Losses with weights of classes or of entries, in a form that has derivatives in these weights, which PyTorch's kernels lack.

With the log-probabilities z, the targets y and the weights a of the classes:

$$\ell_i = -a_{y_i} z_{i, y_i}, \qquad \text{mean: } \frac{\sum_i \ell_i}{\sum_i a_{y_i}}$$

and with label smoothing epsilon over C classes $(1 - \epsilon) \ell_i - \frac{\epsilon}{C} \sum_c a_c z_{ic}$ in place of the
first. Each function here is that of ``torch.nn.functional`` with the same name, called as PyTorch hands a call to a mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    """As ``torch.nn.functional.nll_loss``. shapes: (N, C, ...), (N, ...) and (C,)."""
    if weight is None or _legacy(named):
        return F.nll_loss(input, target, weight=weight, **named)
    return _over_classes(input, target, weight, 0.0, **_modern(named))


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    """As ``torch.nn.functional.cross_entropy``, whose kernel is right for probabilities as targets. shapes: as ``nll_loss``."""
    if weight is None or target.is_floating_point() or _legacy(named):
        return F.cross_entropy(input, target, weight=weight, **named)
    named = _modern(named)
    return _over_classes(input.log_softmax(_class_dim(input)), target, weight, named.pop("label_smoothing", 0.0), **named)


def binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    """As ``torch.nn.functional.binary_cross_entropy``; the weights have a shape that is broadcast to that of the target."""
    if weight is None or _legacy(named):
        return F.binary_cross_entropy(input, target, weight=weight, **named)
    return _reduced(F.binary_cross_entropy(input, target, reduction="none") * weight, **_modern(named))


def binary_cross_entropy_with_logits(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    """As ``torch.nn.functional.binary_cross_entropy_with_logits``, with the weights of entries and those of positive ones."""
    positive = named.get("pos_weight")
    if (weight is None and positive is None) or _legacy(named):
        return F.binary_cross_entropy_with_logits(input, target, weight=weight, **named)
    named = _modern(named)
    named.pop("pos_weight", None)
    each = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    if positive is not None:
        each = each - (positive - 1) * target * F.logsigmoid(input)
    return _reduced(each if weight is None else each * weight, **named)


FORMS: dict[Any, Callable[..., Tensor]] = {
    F.nll_loss: nll_loss,
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy: binary_cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
}


def _over_classes(
    log_p: Tensor, target: Tensor, weight: Tensor, smoothing: float, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The formula of the module's docstring, without the rows whose target is ``ignore_index``."""
    dim = _class_dim(log_p)
    if weight.shape != log_p.shape[dim : dim + 1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but there are {log_p.shape[dim]} classes; give one weight for each"
        )
    each = F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")  # which checks the shapes and the targets
    kept = target != ignore_index
    share = weight[torch.where(kept, target, 0)]
    each = share * each
    if smoothing:
        along = weight.reshape(-1, *[1] * (log_p.dim() - dim - 1))
        each = (1 - smoothing) * each - smoothing / len(weight) * (along * log_p).sum(dim)
    each = torch.where(kept, each, 0.0)
    if reduction == "mean":
        return each.sum() / torch.where(kept, share, 0.0).sum()
    return _reduced(each, reduction)


def _class_dim(input: Tensor) -> int:
    return min(input.dim() - 1, 1)


def _reduced(each: Tensor, reduction: str = "mean") -> Tensor:
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda whole: whole}[reduction](each)


def _legacy(named: dict[str, Any]) -> bool:
    """Whether there is an argument that PyTorch has deprecated, or a reduction that it refuses."""
    deprecated = any(named.get(name) is not None for name in ("size_average", "reduce"))
    return deprecated or named.get("reduction", "mean") not in ("mean", "sum", "none")


def _modern(named: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in ("size_average", "reduce")}
