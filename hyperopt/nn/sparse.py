"""Products with a fixed sparse matrix, differentiable as often as one likes and sparse every time.

torch's own backward of a sparse product transposes the matrix anew, and its layouts differ in what they can do twice. Here the
matrix and its transpose are kept, both as compressed rows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def compressed_rows() -> Iterator[None]:
    """Make compressed rows in this block: torch calls them a beta, once a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        yield


class SparseRows:
    """``w -> x w`` for a sparse ``x`` of shape (n, features), ``w`` of shape (features, outputs)."""

    def __init__(self, x: Tensor) -> None:
        """Keep ``x`` and its transpose."""
        coo = x.detach().to_sparse_coo().coalesce()
        with compressed_rows():
            self.x, self.transposed = coo.to_sparse_csr(), coo.t().coalesce().to_sparse_csr()

    def __call__(self, w: Tensor) -> Tensor:
        """``x w``."""
        return _Product.apply(self.x, self.transposed, w)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """``x w``; its derivative is a product with the transpose, by the same function."""

    @staticmethod
    def forward(x: Tensor, transposed: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.pair = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, transposed = ctx.pair
        return None, None, _Product.apply(transposed, x, grads[0])
