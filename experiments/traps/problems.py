"""Problems with closed forms, in plain Python numbers, so that every library is held to the same truth.

- Linear: ``phi(w, M, b) = w M + b`` with ``M = q blockdiag(rotations)``: ``w = b (I - M)^{-1}``, and for ``E = sum(g w)`` the
  gradient in ``b`` is ``g (I - M)^{-T}``.
- Cubic: ``phi(w, t) = w - c (w + w^3 - t^2 - t^6) K``, any regular K: the only fixed point is ``w = t^2``. ``J`` depends on
  ``w`` and is not symmetric, and neither the map nor its fixed point is linear in ``t``: with ``E = sum(w^3) / 3`` the gradient
  in ``t`` is ``2 t^5``, its derivative along ``u`` is ``10 t^4 u``.
"""

from __future__ import annotations

import math

Matrix = list[list[float]]


def rotations(q: float, planes: int = 6, first: float = 0.1) -> Matrix:
    """``q`` times plane rotations by ``first``, ``first + 0.5``, ... as diagonal blocks; norm and spectral radius are ``q``."""
    n = 2 * planes
    out = [[0.0] * n for _ in range(n)]
    for k in range(planes):
        c, s = q * math.cos(first + 0.5 * k), q * math.sin(first + 0.5 * k)
        i = 2 * k
        out[i][i], out[i][i + 1], out[i + 1][i], out[i + 1][i + 1] = c, -s, s, c
    return out


def rows(count: int, n: int, shift: float = 0.0) -> Matrix:
    """Some numbers in [-1, 1] that look like none in particular."""
    return [[math.sin(1.0 + 3.0 * i + 1.7 * j + shift) for j in range(n)] for i in range(count)]


def ones(count: int, n: int) -> Matrix:
    """A matrix of ones."""
    return [[1.0] * n for _ in range(count)]


def zeros(count: int, n: int) -> Matrix:
    """A matrix of zeros."""
    return [[0.0] * n for _ in range(count)]


def transposed(m: Matrix) -> Matrix:
    """The transposed matrix."""
    return [list(column) for column in zip(*m, strict=True)]


def identity_minus(m: Matrix) -> Matrix:
    """``I - M``."""
    return [[float(i == j) - x for j, x in enumerate(row)] for i, row in enumerate(m)]


def solve_rows(right: Matrix, a: Matrix) -> Matrix:
    """The matrix X with ``X A = right``, by elimination with pivots."""
    n = len(a)
    table = [[*row, *column] for row, column in zip(transposed(a), transposed(right), strict=True)]
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(table[i][k]))
        table[k], table[pivot] = table[pivot], table[k]
        table[k] = [x / table[k][k] for x in table[k]]
        for i in range(n):
            if i != k:
                factor = table[i][k]
                table[i] = [x - factor * y for x, y in zip(table[i], table[k], strict=True)]
    return transposed([row[n:] for row in table])


def linear_state(m: Matrix, b: Matrix) -> Matrix:
    """Fixed point of ``w M + b``."""
    return solve_rows(b, identity_minus(m))


def linear_gradient(m: Matrix, g: Matrix) -> Matrix:
    """Gradient in ``b`` for ``d_w E = g``."""
    return solve_rows(g, transposed(identity_minus(m)))


C = 0.2
K: Matrix = [[1.0, 0.2, 0.0], [0.0, 1.0, -0.3], [0.1, 0.0, 1.0]]
T: Matrix = [[0.7, 1.0, 1.1], [1.05, 0.85, 0.95]]
U: Matrix = [[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]]


def elementwise(f, *matrices: Matrix) -> Matrix:
    """``f`` of the entries."""
    return [[f(*xs) for xs in zip(*found, strict=True)] for found in zip(*matrices, strict=True)]


CUBIC_STATE = elementwise(lambda t: t**2, T)
CUBIC_GRADIENT = elementwise(lambda t: 2 * t**5, T)
CUBIC_SECOND = elementwise(lambda t, u: 10 * t**4 * u, T, U)


def flat(tree) -> list[float]:
    """All numbers of nested lists, or of an array."""
    tree = tree.tolist() if hasattr(tree, "tolist") else tree
    return [x for part in tree for x in flat(part)] if isinstance(tree, list | tuple) else [float(tree)]


def error(got, want) -> float:
    """``||got - want|| / ||want||`` over all entries, absolute where ``want`` is 0; infinite for a NaN or another count."""
    a, b = flat(got), flat(want)
    if len(a) != len(b):
        return math.inf
    size = math.sqrt(sum(x * x for x in b))
    distance = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    found = distance / size if size > 0 else distance
    return math.inf if math.isnan(found) else found
