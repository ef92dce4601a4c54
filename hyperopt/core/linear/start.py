"""Where a linear solve starts, given the solution of a system near by.

    alpha_i = argmin |b_i - alpha (I - M) v_i|,      x0_i = alpha_i M v_i + b_i

Between two outer steps the right-hand side of an example may shrink to nothing (it is fitted now), and the old solution is then
off by orders of magnitude where the plain start b is not. Its multiple ``alpha v`` is the best start along the old direction,
zero among them, so its residual never exceeds ``|b|``; the step that follows costs no further product with M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.linear.base import Products
from hyperopt.core.operator import as_operator


def fitted_start(matvec: Products, b: Tensor, v: Tensor) -> Tensor:
    """Return the start ``x0`` above for ``(I - M) x = b``, row by row, at the cost of one product with ``M``.

    A row of zeros, or one that is not finite, starts at ``b``, as if it had no old solution.

    Args:
        matvec: products with M.
        b: right-hand side. shape: (rows, dim)
        v: solution of a system near by. shape: (rows, dim)
    """
    moved = as_operator(matvec).matvec(v)
    image = v - moved
    alpha = torch.linalg.vecdot(image, b) / torch.linalg.vector_norm(image, dim=1).square()
    usable = torch.isfinite(alpha)  # it is not where moved is not
    start = torch.addcmul(b, alpha[:, None], moved)
    return start if bool(usable.all()) else torch.where(usable[:, None], start, b)
