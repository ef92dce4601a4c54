"""F2SA: the hypergradient from first derivatives alone, by a penalty that grows without bound.

There are two copies of the weights: ``z`` minimises ``L`` (it is ``state.w``) and ``y`` minimises ``E + lambda L``. T times,

    z <- z - step grad_w L(z),        y <- y - step (grad_w E(y) / lambda + grad_w L(y))

and then    dE/dlam ~ d_lam E(y) + lambda (d_lam L(y) - d_lam L(z)),        lambda <- lambda + delta

The bias is ``O(1 / lambda)``. Three details differ from the paper. Its step for ``y`` is ``alpha``, with ``alpha lambda`` of
the size of the step for ``z``; here both steps are equal in that sense. It draws independent batches for ``y`` and ``z``; here
both copies see the same batches, whose noise cancels in the difference that ``lambda`` multiplies. Its outer step falls as
``1 / lambda``; here that is left to the outer optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import commit
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.stochastic import (
    Growth,
    Stochastic,
    first_order,
    later_norm,
    moved,
    penalised_gradient,
    second_copy,
)
from hyperopt.core.certificate import UNKNOWN
from hyperopt.core.checks import check_count, check_number
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class F2SA(Stochastic):
    """F2SA: two copies of the weights, and a penalty that grows by the same amount in every outer step.

    Args:
        step_size: step size of the gradient steps in ``w``, above 0.
        steps: gradient steps of each copy per outer step (T), at least 1.
        multiplier: the first penalty, ``lambda_0``, above 0; the bias of the hypergradient is ``O(1 / lambda)``.
        growth: increase of the penalty in every outer step, ``delta``, above 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Kwon, Kwon, Wright & Nowak, ICML 2023, arXiv 2301.10945, algorithm 1.

    Example:
        >>> import torch, hyperopt
        >>> method = hyperopt.F2SA(step_size=0.4, multiplier=1000.0)
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
    multiplier: float = 1.0
    growth: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps")
        check_number(self, "multiplier", 0.0, open_low=True)
        check_number(self, "growth", float("-inf"))
        if not self.growth > 0:
            raise ValueError(
                f"F2SA: growth={self.growth!r}: the penalty does not grow, and the bias of the hypergradient, O(1 / penalty), "
                "does not vanish; set growth above 0"
            )

    def penalty(self, t: int) -> float:
        """Return the penalty in outer step ``t``."""
        return self.multiplier + self.growth * t

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Move both copies and return the hypergradient where they end; see ``Estimator``.

        Raises:
            SolveError: a copy diverges; the message names the step size to lower. The state is unchanged.
        """
        memory = state.memory.setdefault("F2SA", {"steps": 0})
        growth, penalty = Growth("F2SA", memory), self.penalty(memory["steps"])
        hyper, z = Leaves.of(lam, "lam"), Leaves.of(state.w, "w")
        y, remedy = second_copy(z, memory), f"step_size={self.step_size:g}"

        def training(w: Leaves, inner: Evaluation) -> list[torch.Tensor]:
            return first_order(inner, w, hyper)[0]

        def penalised(w: Leaves, inner: Evaluation, validation: Any) -> list[torch.Tensor]:
            outer, _ = first_order(problem.outer_on(validation), w, hyper)
            return [g + e / penalty for g, e in zip(training(w, inner), outer, strict=True)]

        for _ in range(self.steps):
            at, on = Evaluation(problem, problem.inner_batches.draw()), problem.outer_batches.draw()
            down, both = training(z, at), penalised(y, at, on)
            next_z, next_y = moved(z, down, self.step_size), moved(y, both, self.step_size)
            trained = growth.check("inner", tree_norm(down), remedy, later_norm(training, next_z, at), steps=self.steps)
            solved = growth.check("penalised", tree_norm(both), remedy, later_norm(penalised, next_y, at, on), steps=self.steps)
            at.commit()
            z, y = next_z, next_y

        batch, validation = problem.inner_batches.draw(), problem.outer_batches.draw()
        _, direct = first_order(problem.outer_on(validation), y, hyper)
        inner = Evaluation(problem, batch)
        (_, above), (_, below) = (first_order(inner, w, hyper) for w in (y, z))
        grad, unused = penalised_gradient(hyper, direct, above, below, penalty)
        with torch.no_grad():
            loss = float(problem.outer(z.tree, hyper.tree, validation))
        commit(problem, state, z.tree, lam, batch)
        memory.update(penalised=[leaf.detach() for leaf in y.flat], steps=memory["steps"] + 1)
        cost = Cost(2 * self.steps + 2, self.steps + 1)
        return Estimate(grad, UNKNOWN, loss, state.w, trained, solved, cost, unused)
