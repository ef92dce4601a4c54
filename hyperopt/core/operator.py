"""``LinearOperator``: products with one matrix for each row, such as the Jacobian of a map at a point.

    matvec(v) = M v        rmatvec(v) = M^T v        matmat(V) = M V        all on (rows, dim) matrices, row by row

Newton's method, every adjoint, the diagnosis and the certificate take such an operator. It may be implemented by autograd on a
graph that is built once, by closed forms that a cell declares, or by Hessian, Gauss-Newton and finite-difference products of a
trained inner problem. The class of an operator says what it can do, and every product is counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.text import described


class LinearOperator(ABC):
    """A linear map of (rows, dim) matrices that acts on each row separately.

    A subclass defines ``_matvec`` and overrides the other underscored methods for which it has a cheaper way.

    Attributes:
        matvecs: products with ``M`` so far, over whole batches.
        rmatvecs: products with ``M^T`` so far.
        evaluations: calls of the user's function that the operator made after its construction.
        transposable: whether ``rmatvec`` is available.
        symmetric: whether ``M`` is known to be symmetric.
        whole: the operator on all rows if this one has only some of them; it counts the products of this one too.
        rounding: the eps of the numbers that the products are made of, if that may be larger than the eps of the matrices.

    Example:
        >>> import torch, hyperopt
        >>> class Scale(hyperopt.LinearOperator):
        ...     symmetric = True
        ...     def _matvec(self, v):
        ...         return 0.5 * v
        >>> operator = Scale()
        >>> operator.rmatvec(torch.ones(1, 2)), operator
        (tensor([[0.5000, 0.5000]]), Scale(transposable=True, symmetric=True, matvecs=0, rmatvecs=1))
    """

    matvecs = 0
    rmatvecs = 0
    evaluations = 0
    transposable = True
    symmetric = False
    whole: LinearOperator | None = None

    def __repr__(self) -> str:
        """Return what the operator can do and how many products it has made."""
        can = {"transposable": self.transposable, "symmetric": self.symmetric}
        return described(self, **can, matvecs=self.matvecs, rmatvecs=self.rmatvecs)

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
        """Return ``M v``, shape (rows, dim). ``v`` is not changed."""
        self._count(matvecs=1)
        return self._matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``M^T v``, shape (rows, dim)."""
        self._count(rmatvecs=1)
        return self._rmatvec(v)

    def matvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """Return ``M v + b``, in one pass if the operator can."""
        self._count(matvecs=1)
        return self._matvec_add(v, b)

    def rmatvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """Return ``M^T v + b``, in one pass if the operator can."""
        self._count(rmatvecs=1)
        return self._rmatvec_add(v, b)

    def complement(self, v: Tensor) -> Tensor:
        """Return ``(I - M) v``, without the subtraction if the operator can."""
        self._count(matvecs=1)
        return self._complement(v)

    def matmat(self, V: Tensor) -> Tensor:
        """Return ``M V``. Shapes: (rows, dim, columns)."""
        return torch.stack([self.matvec(v) for v in V.unbind(dim=2)], dim=2)

    def closed_form(self) -> Tensor | None:
        """Return ``M`` if it is known without products, else None. Shape: (rows, dim, dim)."""
        return None

    def dense(self, rows: int, dim: int, like: Tensor) -> Tensor:
        """Return ``M``, in closed form or by ``dim`` products. Shape: (rows, dim, dim)."""
        known = self.closed_form()
        if known is not None:
            return known
        return self.matmat(torch.eye(dim, dtype=like.dtype, device=like.device).expand(rows, dim, dim))

    @property
    def divisible(self) -> bool:
        """Whether ``select`` may return an operator."""
        return False

    def select(self, index: Tensor) -> LinearOperator | None:
        """Return the operator on the rows in ``index``, shape (k,), or None if the rows cannot be separated."""
        return None

    @property
    def T(self) -> LinearOperator:
        """``M^T`` as an operator; its products are counted by this one."""
        return _Transposed(self)


class Wrapped(LinearOperator):
    """An operator that is made from another one, ``of``. Both count the products."""

    def __init__(self, of: LinearOperator) -> None:
        self.of, self.transposable, self.symmetric = of, of.transposable, of.symmetric

    @property
    def rounding(self) -> float:
        """The eps of the other operator."""
        return self.of.rounding


class _Transposed(Wrapped):
    """The transpose of another operator."""

    def __init__(self, of: LinearOperator) -> None:
        super().__init__(of)
        self.transposable = True

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
        rmatvec: ``v -> M^T v`` (None: products with the transpose are not available).
        symmetric: whether ``M`` is symmetric, so that ``matvec`` serves as ``rmatvec`` too.

    Example:
        >>> import torch, hyperopt
        >>> M = torch.tensor([[0.5, 0.2], [0.0, 0.1]])
        >>> operator = hyperopt.FunctionOperator(lambda v: v @ M.T, lambda v: v @ M)
        >>> torch.equal(operator.rmatvec(torch.ones(1, 2)), torch.ones(1, 2) @ M), operator.rmatvecs
        (True, 1)
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        self._forward, self._backward, self.symmetric = matvec, rmatvec, symmetric
        self.transposable = symmetric or rmatvec is not None

    def _matvec(self, v: Tensor) -> Tensor:
        return self._forward(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return super()._rmatvec(v) if self._backward is None else self._backward(v)


class Reshaped(Wrapped):
    """An operator on (rows, dim) matrices, made from one on tensors of another shape (..., dim).

    Args:
        of: the operator.
        shape: shape of the tensors that ``of`` takes.
    """

    def __init__(self, of: LinearOperator, shape: torch.Size) -> None:
        super().__init__(of)
        self.shape = shape

    def _matvec(self, v: Tensor) -> Tensor:
        return self.of.matvec(v.view(self.shape)).reshape(v.shape)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.of.rmatvec(v.view(self.shape)).reshape(v.shape)


class Complement(Wrapped):
    """``M = I - scale A``, so that a solver of ``(I - M) v = b`` solves ``scale A v = b``.

    Args:
        of: the operator A.
        scale: a number other than 0. It matters only to methods that iterate ``v <- M v + b``.
    """

    def __init__(self, of: LinearOperator, scale: float = 1.0) -> None:
        super().__init__(of)
        self.scale = scale

    def _matvec(self, v: Tensor) -> Tensor:
        return torch.add(v, self.of.matvec(v), alpha=-self.scale)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return torch.add(v, self.of.rmatvec(v), alpha=-self.scale)

    def _complement(self, v: Tensor) -> Tensor:
        """Return ``scale A v``, which avoids the cancellation of ``v - M v`` where A is small."""
        return self.scale * self.of.matvec(v)


class Linearization(LinearOperator):
    """The Jacobian ``J = d_z m`` of a map ``m(z, *x)`` at a point, with the products for ``x`` that complete an adjoint.

    Attributes:
        part: a function that returns the linearization of the rows in ``index``, or None; None if rows cannot be separated.
    """

    part: Callable[[Tensor], LinearOperator | None] | None = None

    @abstractmethod
    def _rmatvec(self, v: Tensor) -> Tensor:
        """``J^T v``."""

    @abstractmethod
    def arguments(self, v: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return ``(d_x m)^T v`` for each x; an entry may be None where ``needs`` is false."""

    @property
    def divisible(self) -> bool:
        """Whether some rows can be had without the others."""
        return self.part is not None

    def select(self, index: Tensor) -> LinearOperator | None:
        """Return the Jacobian of the rows in ``index``; this operator counts its cost too."""
        found = None if self.part is None else self.part(index)
        if found is None:
            self.part = None
            return None
        self._count(evaluations=found.evaluations)
        found.whole = self
        return found


class ClosedForm(Linearization):
    """A linearization by the map's own formulas, which ``phi.pullback(w, phi(w), *args)`` returns.

    A subclass defines ``_rmatvec(v) = J^T v`` and ``arguments``. If it has formulas for them, it also overrides ``_matvec``,
    ``_rmatvec_add`` and ``closed_form``. See ``hyperopt.nn.equilibrium.TanhAffine``.

    Attributes:
        differentiable: whether its products are torch operations on ``w``, ``phi(w)`` and the arguments, none of them in
            place, so that unrolled Newton steps can be differentiated through them.

    Example:
        >>> import torch, hyperopt
        >>> class Scaled(hyperopt.ClosedForm):
        ...     def __init__(self, w, a):
        ...         self.w, self.a = w, a
        ...     def _rmatvec(self, v):
        ...         return self.a * v
        ...     def arguments(self, v, needs):
        ...         return [(v * self.w).sum()]
        >>> class Map:
        ...     def __call__(self, w, a):
        ...         return a * w + 1
        ...     def pullback(self, w, value, a):
        ...         return Scaled(w, a)
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> hyperopt.fixed_point(Map(), torch.zeros(1, 1), (a,)).value.sum().backward()
        >>> round(float(a.grad), 3)  # 1 / (1 - a)^2
        4.0
    """

    differentiable = False

    def _matvec(self, v: Tensor) -> Tensor:
        return torch.func.vjp(self._rmatvec, torch.zeros_like(v))[1](v)[0]  # _rmatvec is linear: its vjp is the same everywhere


class MatrixOperator(LinearOperator):
    """One matrix for all rows, from an object that multiplies flat vectors, such as the operators of ``curvlinops``.

    ``M v`` of each row is ``matrix @ v``, and ``M^T v`` is ``matrix.adjoint() @ v``.

    Args:
        matrix: an object for which ``matrix @ X`` is the product with the columns of ``X``, shape (dim, columns).
        symmetric: whether the matrix is known to be symmetric, so that ``matrix.adjoint()`` is not needed.

    Raises:
        TypeError: the object has no ``@``.

    Example:
        >>> import torch, hyperopt
        >>> operator = hyperopt.MatrixOperator(torch.tensor([[0.5, 0.2], [0.2, 0.1]]), symmetric=True)
        >>> [round(float(x), 2) for x in operator.matvec(torch.ones(1, 2))[0]]
        [0.7, 0.3]
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
    """Return ``given`` as an operator. A function ``v -> M v`` becomes an operator without a transpose.

    Raises:
        TypeError: ``given`` is neither an operator nor a function.
    """
    if isinstance(given, LinearOperator):
        return given
    if callable(given):
        return FunctionOperator(given)
    raise TypeError(f"{given!r} is neither a LinearOperator nor a function v -> M v; give one of them")
