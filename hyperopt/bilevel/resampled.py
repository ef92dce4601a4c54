"""Minibatches that differ for each product: every product draws a batch of its own, so that no batch's noise enters twice.

A graph is built for each product, since each is another function: one gradient more than with a graph that is kept.

Reference: Ji, Yang & Liang, ICML 2021, arXiv 2010.07962 (stocBiO), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hyperopt.bilevel.curvature import Curvature


class Resampled(Curvature):
    """Another curvature, made anew on the next batch for each product."""

    def __init__(self, make: Callable[[], Curvature]) -> None:
        """Take the gradient on the first batch; ``make`` draws one and builds the curvature of the problem on it."""
        self._make = make
        first = make()
        super().__init__(first.w, first.lam)
        self.gradient, self.missing, self.gradients = first.gradient, first.missing, first.gradients

    def _matvec(self, v: Tensor) -> Tensor:
        """``H v`` on the next batch."""
        now = self._make()
        image = now.matvec(v)
        self.gradients += now.gradients
        return image

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """The mixed product on the next batch."""
        now = self._make()
        self.mixed_products += 1
        found = now.mixed(v)
        self.gradients += now.gradients
        return found
