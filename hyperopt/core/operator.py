"""``LinearOperator``: products with one matrix for each row, such as the Jacobian of a map at a point.

    matvec(v) = M v        rmatvec(v) = M^T v        matmat(V) = M V        all on (rows, dim) matrices, row by row

Newton's method, every adjoint, the diagnosis and the certificate take one, whatever is behind it: products by autograd on a graph
that is built once, closed forms that a cell declares, Hessian, Gauss-Newton and finite-difference products of a trained inner
problem. What an operator can do is in its type, and what it has done is counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A linear map of (rows, dim) matrices that mixes no rows.

    A subclass defines ``_matvec``, and overrides the other methods with an underscore where there is a cheaper way.

    Attributes:
        matvecs: products with ``M`` so far, over whole batches.
        rmatvecs: products with ``M^T`` so far.
        evaluations: calls of the user's function that the operator made beside those of its construction.
        transposable: whether ``rmatvec`` can be had.
        symmetric: whether ``M`` is known to be symmetric.
    """

    matvecs = 0
    rmatvecs = 0
    evaluations = 0
    transposable = True
    symmetric = False

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """``M v``."""

    def _rmatvec(self, v: Tensor) -> Tensor:
        """``M^T v``."""
        if self.symmetric:
            return self._matvec(v)
        raise NotImplementedError(f"{type(self).__name__} has no products with its transpose")

    def _matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        return self._matvec(v) + b

    def _complement(self, v: Tensor) -> Tensor:
        return v - self._matvec(v)

    def matvec(self, v: Tensor) -> Tensor:
        """``M v``, shape (rows, dim); never ``v`` changed in place."""
        self.matvecs += 1
        return self._matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        """``M^T v``, shape (rows, dim)."""
        self.rmatvecs += 1
        return self._rmatvec(v)

    def matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """``M v + b``, in one pass where the operator can."""
        self.matvecs += 1
        return self._matvec_add(v, b)

    def complement(self, v: Tensor) -> Tensor:
        """``(I - M) v``, without the subtraction where the operator can."""
        self.matvecs += 1
        return self._complement(v)

    def matmat(self, V: Tensor) -> Tensor:
        """``M V``. Shapes: (rows, dim, columns)."""
        return torch.stack([self.matvec(v) for v in V.unbind(dim=2)], dim=2)

    def closed_form(self) -> Tensor | None:
        """``M`` itself where it is known without products, else None. Shape: (rows, dim, dim)."""
        return None

    def dense(self, rows: int, dim: int, like: Tensor) -> Tensor:
        """``M`` itself: in closed form, or by ``dim`` products. Shape: (rows, dim, dim)."""
        known = self.closed_form()
        if known is not None:
            return known
        return self.matmat(torch.eye(dim, dtype=like.dtype, device=like.device).expand(rows, dim, dim))

    def select(self, index: Tensor) -> LinearOperator | None:
        """The operator of the rows in ``index``, shape (k,); None where rows cannot be taken apart."""
        return None

    @property
    def T(self) -> LinearOperator:
        """``M^T`` as an operator, which counts its products here."""
        return _Transposed(self)


class _Transposed(LinearOperator):
    """The transpose of another operator."""

    def __init__(self, of: LinearOperator) -> None:
        self.of, self.transposable, self.symmetric = of, True, of.symmetric

    def _matvec(self, v: Tensor) -> Tensor:
        return self.of.rmatvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.of.matvec(v)

    def closed_form(self) -> Tensor | None:
        known = self.of.closed_form()
        return None if known is None else known.mT

    @property
    def T(self) -> LinearOperator:
        return self.of


class FunctionOperator(LinearOperator):
    """An operator from functions.

    Args:
        matvec: ``v -> M v``.
        rmatvec: ``v -> M^T v`` (None: the transpose cannot be had).
        symmetric: whether ``M`` is symmetric, so that ``matvec`` serves as ``rmatvec`` too.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        """Keep the functions."""
        self._forward, self._backward, self.symmetric = matvec, rmatvec, symmetric
        self.transposable = symmetric or rmatvec is not None

    def _matvec(self, v: Tensor) -> Tensor:
        return self._forward(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return super()._rmatvec(v) if self._backward is None else self._backward(v)


def as_operator(given: LinearOperator | Callable[[Tensor], Tensor]) -> LinearOperator:
    """``given`` as an operator; a function ``v -> M v`` becomes one without a transpose.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(given, LinearOperator):
        return given
    if callable(given):
        return FunctionOperator(given)
    raise TypeError(f"{given!r} is no LinearOperator and no function v -> M v; give one of them")
