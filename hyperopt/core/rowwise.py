"""Products of vectors, row by row, in one kernel each: the building blocks of accelerated and Krylov methods.

They keep the precision of their dtype. Autocast and TensorFloat-32 are meant for the map's own products and do not lower
these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**18  # this many numbers stay in the cache


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast, which is meant for the map, does not lower the products of a method."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def rounds(a: Tensor) -> bool:
    """Whether products of matrices like ``a`` are rounded below their dtype (by TensorFloat-32)."""
    return a.is_cuda and a.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def length(a: Tensor) -> Tensor:
    """Return the norm of each row, shape (rows, 1)."""
    return torch.linalg.vector_norm(a, dim=1, keepdim=True)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return ``||a - b||`` of each row, shape (rows,). Large states on the CPU are taken in chunks that stay in the cache."""
    if a.numel() <= CHUNK or a.device.type != "cpu":
        return torch.linalg.vector_norm(a - b, dim=1)
    rows = max(1, CHUNK // a.shape[1])
    return torch.cat([torch.linalg.vector_norm(x - y, dim=1) for x, y in zip(a.split(rows), b.split(rows), strict=True)])


def dots(vectors: Tensor, x: Tensor, start: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return ``beta start + <vectors_i, x>``, written to ``out`` if that is given.

    Shapes: ``vectors`` (rows, m, dim), ``x`` (rows, dim), the result (rows, m, 1), and ``start`` likewise or ().
    """
    if rounds(x):
        found = torch.sum(vectors * x[:, None], dim=2, keepdim=True, out=out if start is None else None)
        return found if start is None else torch.add(found, start, alpha=beta, out=out)
    row, place = x[:, None], None if out is None else out.mT  # on the CPU several times as fast as columns on the right
    if start is None:
        return torch.bmm(row, vectors.mT, out=place).mT
    return torch.baddbmm(start.mT if start.dim() else start, row, vectors.mT, beta=beta, out=place).mT


def dot(a: Tensor, b: Tensor, start: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """Return ``beta start +`` the inner product of each row of ``a`` and ``b``, shape (rows, 1)."""
    if a.shape[0] == 1 and not rounds(b):
        return a @ b.mT if start is None else torch.addmm(start, a, b.mT, beta=beta)
    return dots(a[:, None], b, start if start is None or not start.dim() else start[:, :, None], beta)[:, :, 0]


def combine(start: Tensor, weights: Tensor, vectors: Tensor, alpha: float = 1.0, *, here: bool = False) -> Tensor:
    """Return ``start + alpha sum_i weights_i vectors_i``; with ``here`` the result overwrites ``start``.

    Shapes: ``start`` (rows, dim), ``weights`` (rows, m, 1), ``vectors`` (rows, m, dim).
    """
    if vectors.shape[1] == 1:
        return torch.addcmul(start, weights[:, 0], vectors[:, 0], value=alpha, out=start if here else None)
    if rounds(start):
        return torch.add(start, (vectors * weights).sum(dim=1), alpha=alpha, out=start if here else None)
    wide = start[:, None]
    return torch.baddbmm(wide, weights.mT, vectors, alpha=alpha, out=wide if here else None)[:, 0]


def orthogonalise(vectors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x - sum_i h_i vectors_i`` and ``h``, by two passes of Gram-Schmidt over orthonormal vectors.

    A large state on the CPU is taken in chunks of rows, so that the second pass finds the vectors in the cache.

    Shapes: ``vectors`` (rows, m, dim), ``x`` (rows, dim), ``h`` (rows, m, 1).
    """
    rows = max(1, 2 * CHUNK // (vectors.shape[1] * vectors.shape[2]))
    if rows < len(x) and vectors.device.type == "cpu":
        parts = [orthogonalise(V, part) for V, part in zip(vectors.split(rows), x.split(rows), strict=True)]
        rest, h = zip(*parts, strict=True)
        return torch.cat(rest), torch.cat(h)
    h = dots(vectors, x)
    x = combine(x, h, vectors, -1.0)
    again = dots(vectors, x)
    return combine(x, again, vectors, -1.0, here=True), h + again
