"""stocBiO: some steps of stochastic gradient descent, then a Neumann series that uses a new batch for every product.

    u = eta sum_{q=0}^{Q} prod_{j=1}^{q} (I - eta H(B_j)) d_w E,        dE/dlam ~ d_lam E - (d_lam grad_w L)^T u

Training continues from the present weights, and the series starts at zero. A hypergradient takes D batches for training, one of
the outer loss, Q for the series and one for the mixed product. Its error is ``(1 - eta mu)^Q`` plus noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hyperopt.bilevel.curvature import Hessian, Resampled, unused_of
from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import commit
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.implicit import subtract
from hyperopt.bilevel.inner.training import gradient
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem, outer_gradient
from hyperopt.bilevel.stochastic import Growth, Stochastic, later_norm, moved
from hyperopt.core.certificate import UNKNOWN
from hyperopt.core.checks import check_count, check_optional
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class StocBiO(Stochastic):
    """stocBiO: some steps of training, then a Neumann series with a batch for each of its terms.

    Args:
        step_size: step size of the gradient steps in ``w``, above 0.
        steps: training steps per outer step (D), at least 1.
        terms: number of Hessian products (Q), at least 1.
        adjoint_step: step size of the series, ``eta``, above 0 (None: ``step_size``).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Ji, Yang & Liang, ICML 2021, arXiv 2010.07962, algorithms 1 and 2.

    Example:
        >>> import torch, hyperopt
        >>> method = hyperopt.StocBiO(step_size=0.4)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: (w - lam).square().sum(),
        ...     outer_loss=lambda w, lam, batch: (w - 3).square().sum(),
        ... )
        >>> bilevel = hyperopt.Bilevel(problem, torch.zeros(1), adjoint=method)
        >>> estimate = bilevel.step(torch.zeros(1))
        >>> round(float(estimate.grad), 1)  # w = lam, so the exact hypergradient at lam = 0 is 2 (0 - 3)
        -6.0
    """

    steps: int = 10
    terms: int = 10
    adjoint_step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps")
        check_count(self, "terms")
        check_optional(self, "adjoint_step", 0.0, open_low=True)

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train from the present weights and sum the series where training ends; see ``Estimator``.

        Raises:
            SolveError: training or the series diverges; the message names the step size to lower. The state is unchanged.
        """
        growth = Growth("StocBiO", state.memory.setdefault("StocBiO", {}))
        hyper, w, batch = Leaves.of(lam, "lam"), Leaves.of(state.w, "w"), None
        fixed, remedy = hyper.like([leaf.detach() for leaf in hyper.flat]), f"step_size={self.step_size:g}"

        def descend(w: Leaves, inner: Evaluation) -> list[torch.Tensor]:
            return gradient(inner, w, fixed)[1]

        for _ in range(self.steps):
            batch = problem.inner_batches.draw()
            inner = Evaluation(problem, batch)
            slopes = descend(w, inner)
            following = moved(w, slopes, self.step_size)
            trained = growth.check("inner", tree_norm(slopes), remedy, later_norm(descend, following, inner), steps=self.steps)
            inner.commit()
            w = following

        loss, in_w, in_lam = outer_gradient(problem, w, hyper, problem.outer_batches.draw())
        curvature = Resampled(lambda: Hessian(Evaluation(problem, problem.inner_batches.draw()), w, hyper))
        eta, remedy = self.step_of("adjoint_step")
        b = w.matrix(in_w)
        term = total = b
        for _ in range(self.terms):
            term = term - eta * curvature.matvec(term)
            total = total + term
        # Each series starts at zero, so its last term is compared with this right-hand side and not with earlier outer steps.
        solved = Growth("StocBiO", {}).check(
            "adjoint", float(term.norm()), remedy, lambda: math.inf, scale=float(b.norm()), steps=self.terms
        )
        mixed = curvature.mixed(eta * total)
        unused = unused_of(hyper.names, in_lam, mixed)
        grad = [subtract(g, m) for g, m in zip(in_lam, mixed, strict=True)]
        commit(problem, state, w.tree, lam, batch)
        cost = Cost(self.steps + curvature.gradients, 1, curvature.matvecs, curvature.mixed_products)
        return Estimate(hyper.like(grad), UNKNOWN, float(loss), state.w, trained, solved, cost, unused)
