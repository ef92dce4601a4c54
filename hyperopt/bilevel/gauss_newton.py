"""Gauss-Newton products: products with a positive semidefinite matrix instead of the Hessian.

    L(w) = c(z(w), w):      G = (d_w z)^T (d_z d_z c) (d_w z) + d_w d_w c

for a model ``z(w, lam, batch)`` and a criterion ``c(z, w, lam, batch)`` that is convex in the model's output, as every usual
loss is. The Hessian has one more term, the curvature of the model, which may be negative; so conjugate gradients can meet
negative curvature in the Hessian, but never in G. The two matrices are equal for a model that is linear in ``w``.

References: Schraudolph, Neural Computation 14, 2002; Martens, ICML 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Curvature, Hessian
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import Composite
from hyperopt.core.jacobian import pull


class GaussNewton(Curvature):
    """Products with G; the gradient and the mixed product are exact."""

    def __init__(self, inner: Evaluation, w: Leaves, lam: Leaves) -> None:
        """Build the graphs of the gradient, of the model and of the criterion, which serve all products.

        Raises:
            TypeError: the inner loss is not a ``Composite``.
        """
        composite, batch = inner.problem.inner_loss, inner.batch
        if not isinstance(composite, Composite):
            raise TypeError("Gauss-Newton products need inner_loss=Composite(model, criterion), which says where the model ends")
        super().__init__(w, lam)
        self._loss, self._batch = composite, batch
        self._exact = Hessian(inner, w, lam)
        self.gradient, self.missing, self.gradients = self._exact.gradient, self._exact.missing, 1

        def evaluate(w: Any, lam: Any) -> tuple[Tensor, Tensor, Tensor]:
            z = composite.model(w, lam, batch)
            out = z.detach().requires_grad_()
            return z, out, composite.criterion(out, w, lam, batch)

        with torch.enable_grad():
            self._z, self._out, loss = inner.of(evaluate, w.tree, lam.tree)
            self._slope = torch.autograd.grad(loss, self._out, create_graph=True, retain_graph=True)[0]
            self._penalty = torch.autograd.grad(loss, w.flat, create_graph=True, allow_unused=True)
            self._cotangent = torch.zeros_like(self._out).requires_grad_()
            self._pulled = self._model_pull(self._cotangent, create_graph=True)

    def _matvec(self, v: Tensor) -> Tensor:
        """Return ``G v`` by a product each with the model's Jacobian, the criterion's Hessian and the transposed Jacobian."""
        parts = self.w.parts(v)
        used = [(pulled, part) for pulled, part in zip(self._pulled, parts, strict=True) if pulled is not None]
        (pushed,) = pull([p for p, _ in used], [self._cotangent], [part for _, part in used])
        bent = pull([self._slope], [self._out], [pushed])[0] if self._slope.requires_grad else None
        product = self.w.matrix(self._model_pull(torch.zeros_like(pushed) if bent is None else bent, create_graph=False))
        kept = [(g, part) for g, part in zip(self._penalty, parts, strict=True) if g is not None and g.requires_grad]
        if kept:
            slopes, given = zip(*kept, strict=True)
            product = product + self.w.matrix(pull(slopes, self.w.flat, given))
        return self._loss.whole(product, self._batch)

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """Return the exact mixed product."""
        self.mixed_products += 1
        return self._exact.mixed(v)

    def _model_pull(self, cotangent: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        return pull([self._z], self.w.flat, [cotangent], create_graph=create_graph)
