"""``SparseRows``: a sparse feature matrix that a model multiplies its weights with, at the price of its entries, both ways.

    forward   X w              backward   X^T g              and so on, to any order

PyTorch's own backward of a sparse product turns the matrix round at every call, which takes several times as long as the product;
here the transpose is made once. (5,600 x 100,000 with 450,000 entries times 100,000 x 20, one thread: forward 14 ms; backward
90 ms by PyTorch, 19 ms here.)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


class _Product(torch.autograd.Function):
    """``X w``; its derivative is the same Function with the matrices exchanged."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transpose: Tensor, w: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.matrix, ctx.transpose = matrix, transpose
        return matrix @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, _Product.apply(ctx.transpose, ctx.matrix, g)


class SparseRows:
    """Rows of sparse features; ``rows @ w`` is differentiable in ``w`` to any order.

    Args:
        matrix: a sparse matrix of SciPy, or a sparse tensor of any layout. shape: (rows, features)
        dtype: of the entries (None: what they have).
        device: where they live.

    Attributes:
        shape: (rows, features).

    Example:
        >>> import torch, hyperopt
        >>> x = hyperopt.SparseRows(torch.eye(3).to_sparse())
        >>> (x @ torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, matrix: Any, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """Keep the matrix and its transpose."""
        coo = matrix if isinstance(matrix, Tensor) else _from_scipy(matrix)
        coo = coo.to_sparse_coo().to(device=device, dtype=dtype or coo.dtype).coalesce()
        self.shape = coo.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            self._matrix, self._transpose = coo.to_sparse_csr(), coo.t().coalesce().to_sparse_csr()

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __matmul__(self, w: Tensor) -> Tensor:
        """``X w``, for ``w`` of shape (features,) or (features, outputs)."""
        product = _Product.apply(self._matrix, self._transpose, w if w.dim() == 2 else w[:, None])
        assert isinstance(product, Tensor)
        return product if w.dim() == 2 else product[:, 0]

    def take(self, index: Tensor) -> SparseRows:
        """The rows at these places."""
        return SparseRows(self._matrix.to_sparse_coo().index_select(0, index.to(self._matrix.device)))


def _from_scipy(matrix: Any) -> Tensor:
    coo = matrix.tocoo()
    places = torch.stack([torch.tensor(coo.row), torch.tensor(coo.col)]).long()
    return torch.sparse_coo_tensor(places, torch.tensor(coo.data), coo.shape, check_invariants=True)
