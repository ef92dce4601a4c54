"""Products of vectors row by row, one kernel each: what accelerated and Krylov methods are made of.

They keep the precision of their dtype: autocast and TensorFloat-32, which are for the map's own products, do not lower them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast, which is for the map, does not lower the products of a method."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def rounds(a: Tensor) -> bool:
    """Whether products of matrices are rounded to less than the dtype here."""
    return a.is_cuda and a.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def length(a: Tensor) -> Tensor:
    """Norm of each row, shape (rows, 1)."""
    return torch.linalg.vector_norm(a, dim=1, keepdim=True)


def dots(vectors: Tensor, x: Tensor, start: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Inner products ``<vectors_i, x>``, to which ``beta start`` is added, written to ``out`` if that is given.

    Shapes: ``vectors`` (rows, m, dim), ``x`` (rows, dim), ``start`` and the result (rows, m, 1).
    """
    if rounds(x):
        found = torch.sum(vectors * x[:, None], dim=2, keepdim=True, out=out if start is None else None)
        return found if start is None else torch.add(found, start, alpha=beta, out=out)
    column = x[:, :, None]
    return torch.bmm(vectors, column, out=out) if start is None else torch.baddbmm(start, vectors, column, beta=beta, out=out)


def dot(a: Tensor, b: Tensor, start: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """Inner product of each row, to which ``beta start`` is added, shape (rows, 1)."""
    return dots(a[:, None], b, start if start is None or not start.dim() else start[:, :, None], beta)[:, :, 0]


def combine(start: Tensor, weights: Tensor, vectors: Tensor, alpha: float = 1.0) -> Tensor:
    """``start + alpha sum_i weights_i vectors_i``.

    Shapes: ``start`` (rows, dim), ``weights`` (rows, m, 1), ``vectors`` (rows, m, dim).
    """
    if rounds(start):
        return torch.add(start, (vectors * weights).sum(dim=1), alpha=alpha)
    return torch.baddbmm(start[:, None], weights.mT, vectors, alpha=alpha)[:, 0]
