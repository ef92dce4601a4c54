"""Heavy ball: ``m <- momentum m + grad L(w)``, ``w <- w - step_size m``, with ``m = 0`` at the start of every training.

On a quadratic with condition number kappa the error falls by the factor ``1 - 2 / sqrt(kappa)`` a step at the best rates, that
of gradient descent by ``1 - 2 / kappa``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.rates import check_rate, move, plain_rates, rate_text, rates


@dataclass(frozen=True)
class HeavyBall(DifferentiableSolver):
    """Gradient descent with momentum.

    Args:
        rtol, atol: training stops at ``|grad L| <= atol + rtol * scale``, see ``hyperopt.bilevel.inner.base.InnerSolver``; both
            at least 0, and both 0 for exactly ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        step_size: a number above 0, or the name of the hyperparameter that holds it; see ``GradientDescent``.
        momentum: a number in [0, 1), or the name of the hyperparameter that holds it, likewise.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Polyak, USSR Comput. Math. Math. Phys. 4, 1964.

    Example:
        >>> import torch, hyperopt
        >>> inner = hyperopt.HeavyBall(step_size=0.1, momentum=0.5)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(()), inner=inner)
        >>> round(float(estimate.w), 3), round(float(estimate.grad), 3)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        (0.5, -0.25)
    """

    step_size: Any = 0.1
    momentum: Any = 0.9

    keeps_buffers = True
    rate_names = ("step_size", "momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self, "step_size", 0.0, open_low=True)
        check_rate(self, "momentum", 0.0, 1.0)
        if self.momentum == 1:
            raise ValueError("HeavyBall: momentum=1 is not in [0, 1); change momentum")

    def buffers(self, w: Sequence[Tensor]) -> list[Tensor]:
        """Return zeros as the momentum of each tensor."""
        return [torch.zeros_like(x, requires_grad=False) for x in w]

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: list[Tensor]) -> None:
        """Make one step in place."""
        steps = plain_rates(self.step_size, lam, "HeavyBall: step_size", w)
        momenta = plain_rates(self.momentum, lam, "HeavyBall: momentum", w)
        for x, m, g, step, momentum in zip(w, work, grads, steps, momenta, strict=True):
            m.mul_(momentum).add_(g)
            move(x, m, step)

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Make one step in the graph; see ``DifferentiableSolver.advance``."""
        steps = rates(self.step_size, lam, "HeavyBall: step_size", w)
        momenta = rates(self.momentum, lam, "HeavyBall: momentum", w)
        moving = [momentum * m + g for m, g, momentum in zip(buffers, grads, momenta, strict=True)]
        return [x - step * m for x, m, step in zip(w, moving, steps, strict=True)], moving

    def remedy(self, lam: Any) -> str:
        """Return the advice to lower the step size, and how far."""
        momentum = rate_text(self.momentum, lam, "HeavyBall: momentum")
        return f"{super().remedy(lam)} (stable below 2 (1 + momentum) / L, momentum={momentum})"
