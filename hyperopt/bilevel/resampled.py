"""Products with a new minibatch each, so that the noise of a batch enters only one product.

Each product builds a graph of its own, which costs one more gradient than a product with a graph that is kept.

Reference: Ji, Yang & Liang, ICML 2021, arXiv 2010.07962 (stocBiO), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hyperopt.bilevel.curvature import Curvature


class Resampled(Curvature):
    """A curvature that is built on the next batch for each product."""

    def __init__(self, make: Callable[[], Curvature]) -> None:
        """Compute the gradient on the first batch; ``make`` draws a batch and builds the curvature on it."""
        self._make = make
        first = make()
        super().__init__(first.w, first.lam)
        self.gradient, self.missing, self.gradients = first.gradient, first.missing, first.gradients

    def _matvec(self, v: Tensor) -> Tensor:
        """Return ``H v`` on the next batch."""
        now = self._make()
        image = now.matvec(v)
        self.gradients += now.gradients
        return image

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """Return the mixed product on the next batch."""
        now = self._make()
        self.mixed_products += 1
        found = now.mixed(v)
        self.gradients += now.gradients
        return found
