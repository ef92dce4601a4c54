"""The maps that the cases solve, of ``+ - * @`` alone, so that one text is right for every array package."""

from __future__ import annotations

from collections.abc import Callable

import problems as p
from protocol import Library, Wish


def linear(w, m, b):
    """``w M + b``."""
    return w @ m + b


def cubic(library: Library, scale: float = 1.0) -> Callable:
    """``s psi(w / s)`` with ``psi(w) = w - c (w + w^3 - t^2 - t^6) K``, whose fixed point is ``s t^2``."""
    k = library.array(p.K)

    def phi(w, t):
        a = t * t
        return w - p.C * ((w + w * w * w * (1 / scale**2) - scale * (a + a * a * a)) @ k)

    return phi


def cubic_loss(library: Library, wish: Wish) -> Callable:
    """``t -> sum(w(t)^3) / 3``."""
    phi, w0 = cubic(library), library.array(p.ones(2, 3))

    def loss(t):
        w = library.solve(phi, w0, (t,), wish).value
        return (w * w * w).sum() / 3

    return loss


def scalar(w, x):
    """The cubic map of one number; its fixed point is ``x^2``."""
    a = x * x
    return w - p.C * (w + w * w * w - a - a * a * a)
