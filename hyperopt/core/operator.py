"""``LinearOperator``: products with one matrix for each row, such as the Jacobian of a map at a point.

    matvec(v) = M v        rmatvec(v) = M^T v        matmat(V) = M V        all on (rows, dim) matrices, row by row

Newton's method, every adjoint, the diagnosis and the certificate take one, whatever is behind it: products by autograd on a graph
that is built once, closed forms that a cell declares, Hessian, Gauss-Newton and finite-difference products of a trained inner
problem. What an operator can do is in its type, and what it has done is counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

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
        whole: the operator of which this one has some of the rows; what is counted here is counted there too.
        rounding: the eps of the numbers that products are made of, where that may be larger than the matrices' own.
    """

    matvecs = 0
    rmatvecs = 0
    evaluations = 0
    transposable = True
    symmetric = False
    whole: LinearOperator | None = None

    @property
    def rounding(self) -> float:
        """See the attributes."""
        return 0.0

    def _count(self, matvecs: int = 0, rmatvecs: int = 0, evaluations: int = 0) -> None:
        self.matvecs += matvecs
        self.rmatvecs += rmatvecs
        self.evaluations += evaluations
        if self.whole is not None:
            self.whole._count(matvecs, rmatvecs, evaluations)

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """``M v``."""

    def _rmatvec(self, v: Tensor) -> Tensor:
        """``M^T v``."""
        if self.symmetric:
            return self._matvec(v)
        raise NotImplementedError(f"{type(self).__name__} has no products with its transpose")

    def _matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        return self._matvec(v) + b  # not in place: the product may be v itself

    def _rmatvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        return self._rmatvec(v) + b

    def _complement(self, v: Tensor) -> Tensor:
        return v - self._matvec(v)

    def matvec(self, v: Tensor) -> Tensor:
        """``M v``, shape (rows, dim); never ``v`` changed in place."""
        self._count(matvecs=1)
        return self._matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        """``M^T v``, shape (rows, dim)."""
        self._count(rmatvecs=1)
        return self._rmatvec(v)

    def matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """``M v + b``, in one pass where the operator can."""
        self._count(matvecs=1)
        return self._matvec_add(v, b)

    def rmatvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """``M^T v + b``, in one pass where the operator can."""
        self._count(rmatvecs=1)
        return self._rmatvec_add(v, b)

    def complement(self, v: Tensor) -> Tensor:
        """``(I - M) v``, without the subtraction where the operator can."""
        self._count(matvecs=1)
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

    @property
    def divisible(self) -> bool:
        """Whether ``select`` may give an operator."""
        return False

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

    @property
    def rounding(self) -> float:
        return self.of.rounding

    def _matvec(self, v: Tensor) -> Tensor:
        return self.of.rmatvec(v)

    def _matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        return self.of.rmatvec_add(v, b)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.of.matvec(v)

    def _rmatvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        return self.of.matvec_add(v, b)

    def closed_form(self) -> Tensor | None:
        known = self.of.closed_form()
        return None if known is None else known.mT

    @property
    def divisible(self) -> bool:
        return self.of.divisible

    def select(self, index: Tensor) -> LinearOperator | None:
        found = self.of.select(index)
        return None if found is None else found.T

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


class Reshaped(LinearOperator):
    """An operator on (rows, dim) matrices, from one on tensors of another shape (..., dim), which counts its products too.

    Args:
        of: the operator.
        shape: what it takes.
    """

    def __init__(self, of: LinearOperator, shape: torch.Size) -> None:
        """Keep both."""
        self.of, self.shape, self.transposable, self.symmetric = of, shape, of.transposable, of.symmetric

    @property
    def rounding(self) -> float:
        """That of the other."""
        return self.of.rounding

    def _matvec(self, v: Tensor) -> Tensor:
        return self.of.matvec(v.view(self.shape)).reshape(v.shape)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.of.rmatvec(v.view(self.shape)).reshape(v.shape)


class Complement(LinearOperator):
    """``M = I - scale A``, so that a solver of ``(I - M) v = b`` solves ``scale A v = b``.

    Args:
        of: A.
        scale: a number that is not 0. It matters only to methods that iterate ``v <- M v + b``.
    """

    def __init__(self, of: LinearOperator, scale: float = 1.0) -> None:
        """Keep both."""
        self.of, self.scale, self.transposable, self.symmetric = of, scale, of.transposable, of.symmetric

    @property
    def rounding(self) -> float:
        """That of A."""
        return self.of.rounding

    def _matvec(self, v: Tensor) -> Tensor:
        return torch.add(v, self.of.matvec(v), alpha=-self.scale)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return torch.add(v, self.of.rmatvec(v), alpha=-self.scale)

    def _complement(self, v: Tensor) -> Tensor:
        """Without the cancellation of ``v - M v`` where A is small."""
        return self.scale * self.of.matvec(v)


class Linearization(LinearOperator):
    """The Jacobian ``J = d_z m`` of a map ``m(z, *x)`` at a point, with the products for x that close an adjoint.

    Attributes:
        part: ``part(index)``: the same for some rows, or None; None where rows cannot be taken apart.
    """

    part: Callable[[Tensor], LinearOperator | None] | None = None

    @abstractmethod
    def _rmatvec(self, v: Tensor) -> Tensor:
        """``J^T v``."""

    @abstractmethod
    def arguments(self, v: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """``(d_x m)^T v`` for each x; None is enough where ``needs`` is false."""

    @property
    def divisible(self) -> bool:
        """Whether some rows may be had without the others."""
        return self.part is not None

    def select(self, index: Tensor) -> LinearOperator | None:
        """The Jacobian of the rows in ``index``; what it costs is counted here too."""
        found = None if self.part is None else self.part(index)
        if found is None:
            self.part = None
            return None
        self._count(evaluations=found.evaluations)
        found.whole = self
        return found


class ClosedForm(Linearization):
    """A linearization by the map's own formulas: what ``phi.pullback(w, phi(w), *args)`` returns.

    A subclass defines ``_rmatvec(v) = J^T v`` and ``arguments``, and overrides ``_matvec``, ``_rmatvec_add`` and ``closed_form``
    where there are formulas. See ``hyperopt.nn.equilibrium.TanhAffine``.

    Attributes:
        differentiable: whether its products are torch operations on ``w``, ``phi(w)`` and the arguments, none in place, so that
            unrolled Newton steps may be differentiated through them.
    """

    differentiable = False

    def _matvec(self, v: Tensor) -> Tensor:
        return torch.func.vjp(self._rmatvec, torch.zeros_like(v))[1](v)[0]  # linear: its vjp is the same at every point


class MatrixOperator(LinearOperator):
    """One matrix for all rows, from an object that multiplies flat vectors, such as the operators of ``curvlinops``.

    ``M v`` of each row is ``matrix @ v``, and ``M^T v`` is ``matrix.adjoint() @ v``.

    Args:
        matrix: ``matrix @ X`` is the product with the columns of ``X``, shape (dim, columns).
        symmetric: whether the matrix is known to be symmetric, so that no adjoint is needed.
    """

    def __init__(self, matrix: Any, *, symmetric: bool = False) -> None:
        """Keep the matrix.

        Raises:
            TypeError: the object has no ``@``.
        """
        if not hasattr(type(matrix), "__matmul__"):
            raise TypeError(f"MatrixOperator: matrix is a {type(matrix).__name__}, which has no matrix @ v; change matrix")
        self.matrix, self.symmetric = matrix, symmetric

    def _matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.mT).mT

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._matvec(v) if self.symmetric else (self.matrix.adjoint() @ v.mT).mT


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
