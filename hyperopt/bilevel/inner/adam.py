"""Adam whose step stays in the graph, so that its learning rate has a hypergradient by unrolling.

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Every training starts at ``m = v = 0``; with ``inner=torch_optimizer`` the moments continue from one training to the next, but
it cannot be differentiated. The numbers are those of ``torch.optim.Adam``: nothing is added under the square root to make it
smooth, and its derivative is taken as 0 where ``v`` is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.rates import check_rate, rates
from hyperopt.core.checks import check_betas, check_number


@dataclass(frozen=True)
class InnerAdam(DifferentiableSolver):
    """Adam as a differentiable inner solver.

    Args:
        rtol, atol: training stops at ``|grad L| <= atol + rtol * scale``, see ``hyperopt.bilevel.inner.base.InnerSolver``; both
            at least 0, and both 0 for exactly ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        lr: learning rate, a number above 0, or the name of the hyperparameter that holds it; see ``GradientDescent``.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the square root of the second average, at least 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Kingma & Ba, ICLR 2015, arXiv 1412.6980, algorithm 1.

    Example:
        >>> import torch, hyperopt
        >>> inner = hyperopt.InnerAdam(lr=0.1, max_steps=100)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(()), inner=inner)
        >>> round(float(estimate.w), 2), round(float(estimate.grad), 2)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        (0.5, -0.25)
    """

    lr: Any = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    keeps_buffers = True
    rate_names = ("lr",)

    def __post_init__(self) -> None:
        """Check the ranges; a list given as ``betas`` becomes a tuple."""
        super().__post_init__()
        check_rate(self, "lr", 0.0, open_low=True)
        check_betas(self)
        check_number(self, "eps", 0.0)

    def buffers(self, w: Sequence[Tensor]) -> list[Tensor]:
        """Return both moments of each tensor, and the number of steps, as a tensor because a state is made of tensors."""
        moments = [torch.zeros_like(x, requires_grad=False) for _ in range(2) for x in w]
        return [*moments, torch.zeros((), dtype=w[0].dtype, device=w[0].device)]

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Make one step in the graph; see ``DifferentiableSolver.advance``."""
        lrs, (b1, b2), count = rates(self.lr, lam, "InnerAdam: lr", w), self.betas, buffers[-1].detach() + 1
        means, squares = buffers[: len(w)], buffers[len(w) : -1]
        means = [b1 * m + (1 - b1) * g for m, g in zip(means, grads, strict=True)]
        squares = [b2 * v + (1 - b2) * g.square() for v, g in zip(squares, grads, strict=True)]
        first, second = 1 - b1**count, (1 - b2**count).sqrt()
        moved = [x - lr / first * m / (root(v) / second + self.eps) for x, m, v, lr in zip(w, means, squares, lrs, strict=True)]
        return moved, [*means, *squares, count]


def root(v: Tensor) -> Tensor:
    """Return the square root, with derivative 0 instead of infinity at 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)
