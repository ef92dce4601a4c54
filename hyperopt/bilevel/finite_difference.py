"""Second derivatives by central differences of gradients, in the memory of one training step, as in DARTS.

    H v ~ (grad_w L(w + h v) - grad_w L(w - h v)) / 2h,       and likewise the mixed product, from grad_lam L

A product takes two gradients and no graph of a gradient. ``h = eps^(1/3) max(1, |w|) / |v|`` balances truncation and rounding
errors; DARTS (differentiable architecture search) uses ``0.01 / |v|``. All gradients use the random numbers and the running
statistics of the first one. The one-step hypergradient takes three gradients:

    dE/dlam ~ d_lam E - step (grad_lam L(w + h g, lam) - grad_lam L(w - h g, lam)) / 2h,     g = d_w E

Reference: Liu, Simonyan & Yang, ICLR 2019, arXiv 1806.09055, equations 7 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Curvature, unaffected
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.t1t2 import TRAINED
from hyperopt.core.adjoints.onestep import OneStep
from hyperopt.core.checks import check_optional
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.tree import tree_norm


class FiniteDifferences(Curvature):
    """Products by differences of gradients on one batch."""

    def __init__(self, inner: Evaluation, w: Leaves, lam: Leaves, length: float | None = None) -> None:
        """Compute the gradient.

        Args:
            inner: the inner loss on a batch.
            w: the weights.
            lam: the hyperparameters.
            length: norm of the step, ``h |v|`` (None: balances truncation and rounding errors).
        """
        super().__init__(w, lam)
        self._inner = inner
        self._length = length or torch.finfo(self.w.layout.dtype).eps ** (1 / 3) * max(1.0, tree_norm(w.flat))
        grads = self._gradients(None, 0.0, w=True)
        self.gradient = self.w.matrix(grads)
        self.missing = [i for i, g in enumerate(grads) if g is None]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.w.matrix(self._difference(v, w=True))

    def rough(self, v: Tensor) -> Tensor:
        """Return ``(grad_w L(w + h v) - grad_w L(w)) / h``, with one gradient, since that at ``w`` is known."""
        size = float(torch.linalg.vector_norm(v))
        if not size > 0:
            return torch.full_like(v, size)
        self._count(matvecs=1)
        h = self._length / size
        return (self.w.matrix(self._gradients(v, h, w=True)) - self.gradient) / h

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """Return ``(d_lam grad_w L)^T v = d/dh grad_lam L(w + h v)``."""
        self.mixed_products += 1
        return self._difference(v, w=False)

    def _difference(self, v: Tensor, *, w: bool) -> list[Tensor | None]:
        size = float(torch.linalg.vector_norm(v))
        if not size > 0:  # zero or NaN: no step can be chosen
            return [torch.full_like(leaf, size) for leaf in (self.w.flat if w else self.lam.flat)]
        h = self._length / size
        above, below = self._gradients(v, h, w=w), self._gradients(v, -h, w=w)
        return [None if a is None or b is None else (a - b) / (2 * h) for a, b in zip(above, below, strict=True)]

    def _gradients(self, v: Tensor | None, h: float, *, w: bool) -> list[Tensor | None]:
        """Return the gradient at ``w + h v``, in ``w`` or in ``lam``."""
        self.gradients += 1
        at = self.w
        if v is not None:
            moved = [leaf.detach() + h * part for leaf, part in zip(self.w.flat, self.w.parts(v), strict=True)]
            at = Leaves.of(self.w.like(moved), "w")
        with torch.enable_grad():
            loss = self._inner(at.tree, self.lam.tree)
            if not loss.requires_grad:
                unaffected()
            found = torch.autograd.grad(loss, at.flat if w else self.lam.flat, allow_unused=True)
        if w and all(g is None for g in found):
            unaffected()
        return list(found)


@dataclass(frozen=True)
class FiniteDifference(OneStep):
    """One-step differentiation with the products of ``FiniteDifferences``.

    Args:
        length: norm of the step ``h g`` in ``w``, above 0 (None: balances truncation and rounding errors; DARTS uses 0.01).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Liu, Simonyan & Yang, ICLR 2019, arXiv 1806.09055, equations 7 and 8.

    Example:
        >>> import torch, hyperopt
        >>> adjoint = hyperopt.FiniteDifference()
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()), adjoint=adjoint)
        >>> round(float(estimate.grad), 3)  # one step of size 1 / 4 is exact here, where the curvature is 4
        -0.25
    """

    length: float | None = None

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Return why this cannot be the adjoint of a general map, which has no gradients to difference."""
        return f"{TRAINED}; use OneStep()"

    def __post_init__(self) -> None:
        check_optional(self, "length", 0.0, open_low=True)
