"""Two finite sums of random quadratics whose value function has a closed form: the simulated problem of benchopt's bilevel suite.

    L(w, lam) = mean_i [ (x_i w)^2 + (g_i lam)^2 ] / 2 + (a_i lam) (b_i w) + c_i w + d_i lam

E has the same form with rows of its own. The rows ``x_i`` are normal; the eigenvalues of their covariance go from ``least`` to
``largest``, evenly spaced in their logarithm. The rows ``g_i`` are alike, but one eigenvalue is 0. ``a_i = U D z_i`` and
``b_i = V z_i`` with standard normal ``z_i``, orthogonal U and V, and singular values D from ``least`` to ``cross``. ``c_i`` and
``d_i`` are standard normal. If the Hessian of ``h(lam) = E(w(lam), lam)`` is not positive, the rows are drawn again. The
numbers and distributions are those of the suite; the draws are not.

Reference: M. Dagreou, P. Ablin, S. Vaiter and T. Moreau, NeurIPS 2022, arXiv 2201.13409; the suite is
benchopt/benchmark_bilevel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import check_count, check_number, check_optional_count
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup, BilevelTask

DRAWS = 20  # number of attempts to draw a value function with a minimum
DOUBLE = torch.float64


class Terms(NamedTuple):
    """The rows of one sum; see the formula. shape of x, b, c: (n, dim); of g, a, d: (n, hyper_dim)."""

    x: Tensor
    g: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def mean(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the mean Hessians in ``w`` and ``lam``, the cross term, shape (hyper_dim, dim), and the linear terms."""
        n = len(self.x)
        return self.x.T @ self.x / n, self.g.T @ self.g / n, self.a.T @ self.b / n, self.c.mean(0), self.d.mean(0)


@dataclass(eq=False)
class QuadraticTask(BilevelTask):
    """Two finite sums of random quadratics.

    Attributes:
        lam: space of the hyperparameters.
        rows: number of terms of the inner loss.
        val_rows: number of terms of the outer loss.
        dim: number of inner variables.
        hyper_dim: number of hyperparameters.
        least: smallest eigenvalue of the mean Hessians and smallest singular value of the mean cross terms, above 0.
        largest: largest eigenvalue of the mean Hessians, at least ``least``.
        cross: largest singular value of the mean cross terms, above 0.
        batch_size: number of terms of an inner gradient (None: all).
        val_batch_size: number of terms of an outer gradient (None: all).
        curvature: the Hessian of ``h``, after ``setup``. shape: (hyper_dim, hyper_dim)
        best: the minimiser of ``h``, after ``setup``. shape: (hyper_dim,)
        least_value: the minimum of ``h``, after ``setup``.
    """

    name = "quadratic"
    MEASURES: ClassVar[tuple[str, ...]] = ("outer/loss", "outer/suboptimality", "val/loss")
    spaces = ("lam",)

    lam: Space | None = None
    rows: int = 32768
    val_rows: int = 1024
    dim: int = 100
    hyper_dim: int = 10
    least: float = 0.1
    largest: float = 1.0
    cross: float = 0.1
    batch_size: int | None = 64
    val_batch_size: int | None = 64

    curvature: Tensor = field(init=False, repr=False)
    best: Tensor = field(init=False, repr=False)
    least_value: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("rows", "val_rows", "dim", "hyper_dim"):
            check_count(self, name)
        for name in ("least", "largest", "cross"):
            check_number(self, name, 0.0, open_low=True)
        for name in ("batch_size", "val_batch_size"):
            check_optional_count(self, name)
        if self.least > self.largest:
            raise ValueError(f"{type(self).__name__}: least={self.least!r} is above largest={self.largest!r}; lower least")

    def load(self, env: Environment) -> None:
        """Draw the rows.

        Raises:
            ValueError: the value function has no minimum in any of 20 draws.
        """
        draw = torch.Generator().manual_seed(env.seed)
        for _ in range(DRAWS):
            self.sums = self._terms(self.rows, draw), self._terms(self.val_rows, draw)
            if self._solve():
                break
        else:
            raise ValueError(
                f"task=quadratic: the value function had no minimum in {DRAWS} draws of cross={self.cross:g}; lower task.cross"
            )

    def build(self, env: Environment) -> BilevelSetup:
        """Build the problem, with zero initial variables."""

        def loss(w: Tensor, lam: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
            x, g, a, b, c, d = batch
            u = lam["lam"]
            squares = ((x @ w).square() + (g @ u).square()) / 2
            return (squares + (a @ u) * (b @ w) + c @ w + d @ u).mean()

        data = [tuple(part.to(env.device, env.dtype) for part in terms) for terms in self.sums]
        inner = Minibatches(data[0], self.batch_size, env.seed, key="task.batch_size")
        outer = Minibatches(data[1], self.val_batch_size, env.seed + 1, key="task.val_batch_size")
        w = torch.zeros(self.dim, dtype=env.dtype, device=env.device)
        return BilevelSetup(BilevelProblem(loss, loss, inner, outer), w, {"lam": (self.hyper_dim,)}, {})

    def evaluate(self) -> dict[str, float]:
        """Return the value function at the present hyperparameters, in closed form, and its distance from the minimum."""
        away = self.hyper.read()["lam"].to("cpu", DOUBLE) - self.best
        gap = float(away @ self.curvature @ away) / 2
        value = self.least_value + gap
        return {"outer/loss": value, "val/loss": value, "outer/suboptimality": gap}

    def describe_data(self) -> dict[str, Any]:
        """Return the number of terms of each sum."""
        return {"dataset": "drawn", "rows": {"train": self.rows, "outer": self.val_rows}}

    def _solve(self) -> bool:
        """Compute ``h``, and return whether it has a minimum."""
        (hessian, _, cross, linear, _), (hessian_v, hyper_v, cross_v, linear_v, direct_v) = (each.mean() for each in self.sums)
        slope, at_zero = -torch.linalg.solve(hessian, cross.T), -torch.linalg.solve(hessian, linear)
        mixed = cross_v @ slope
        self.curvature = slope.T @ hessian_v @ slope + hyper_v + mixed + mixed.T
        if float(torch.linalg.eigvalsh(self.curvature)[0]) <= 1e-12:
            return False
        gradient = slope.T @ (hessian_v @ at_zero + linear_v) + cross_v @ at_zero + direct_v  # of h at lam = 0
        self.best = -torch.linalg.solve(self.curvature, gradient)
        at_best = float(at_zero @ hessian_v @ at_zero / 2 + linear_v @ at_zero)
        self.least_value = at_best + float(gradient @ self.best) / 2
        return True

    def _terms(self, n: int, draw: torch.Generator) -> Terms:
        """Draw the rows of one sum."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=DOUBLE)

        def rotation(dim: int) -> Tensor:
            return torch.linalg.qr(normal(dim, dim))[0]

        def root(dim: int, zero: bool) -> Tensor:
            share = torch.linspace(0, 1, dim - zero, dtype=DOUBLE)
            values = self.least ** ((1 - share) / 2) * self.largest ** (share / 2)
            turned = rotation(dim)
            return turned @ torch.diag(torch.cat([torch.zeros(int(zero), dtype=DOUBLE), values])) @ turned.T

        shared = min(self.dim, self.hyper_dim)
        share = torch.linspace(0, 1, shared, dtype=DOUBLE)
        singular = torch.zeros(self.hyper_dim, self.dim, dtype=DOUBLE)
        singular[:shared, :shared] = torch.diag(self.least ** (1 - share) * self.cross**share)
        z = normal(n, self.dim)
        return Terms(
            x=normal(n, self.dim) @ root(self.dim, False),
            g=normal(n, self.hyper_dim) @ root(self.hyper_dim, self.hyper_dim > 1),
            a=z @ (rotation(self.hyper_dim) @ singular).T,
            b=z @ rotation(self.dim),
            c=normal(n, self.dim),
            d=normal(n, self.hyper_dim),
        )
