"""V-PBGD: gradient descent on the outer loss plus a growing penalty on the gap between the inner loss and its minimum.

    F(lam, y) = E(y, lam) + gamma (L(y, lam) - min_w L(w, lam))

``w`` (``state.w``) approximates the minimum of ``L`` by T gradient steps. ``y`` is a second copy of the weights; it descends on
``F``, as the hyperparameters do, both from the same point:

    dE/dlam ~ d_lam E(y) + gamma (d_lam L(y) - d_lam L(w))
    y <- y - step min(1 / gamma, 1) (grad_w E(y) + gamma grad_w L(y))

Only first derivatives are needed, and the bias is ``O(1 / gamma)``. ``gamma`` grows linearly and then stays constant, and the
step of ``y`` falls with it, as in the authors' program for data cleaning; the same factor for ``lam`` is left to the outer
optimizer.

The paper uses all rows for every gradient. With minibatches, ``y`` moves on the last batch on which ``w`` moves, and the
difference that ``gamma`` multiplies is taken on that batch before either moves, so that noise in both copies cancels. With a
batch of its own, ``y`` would drift away from ``w``, permanently if the batches go through the rows in epochs, because one copy
then sees rows that the other has not seen. More than one step (T > 1) would have the same effect, so it is refused there.
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
from hyperopt.core.checks import check_count, check_number, check_optional
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class VPBGD(Stochastic):
    """V-PBGD: two copies of the weights, and a penalty that grows linearly from ``start`` to ``end`` and then stays.

    Args:
        step_size: step size of ``y``, the second copy of the weights, above 0.
        steps: gradient steps of ``w`` per outer step (T), at least 1; more than 1 is allowed only without minibatches.
        inner_step: step size of ``w``, above 0 (None: ``step_size``, the step size of ``y``).
        start: the first penalty ``gamma``, at least 0.
        end: the last penalty, above ``start``; the bias of the hypergradient is ``O(1 / end)``.
        ramp: number of outer steps from ``start`` to ``end``, at least 1.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Shen & Chen, ICML 2023, arXiv 2302.05185, algorithm 1 (V-PBGD).

    Example:
        >>> import torch, hyperopt
        >>> method = hyperopt.VPBGD(step_size=0.4, start=1000.0, end=1001.0)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: (w - lam).square().sum(),
        ...     outer_loss=lambda w, lam, batch: (w - 3).square().sum(),
        ... )
        >>> bilevel = hyperopt.Bilevel(problem, torch.zeros(1), adjoint=method)
        >>> for _ in range(15):
        ...     estimate = bilevel.step(torch.zeros(1))
        >>> round(float(estimate.grad), 1)  # w = lam, so the exact hypergradient at lam = 0 is 2 (0 - 3)
        -6.0
    """

    steps: int = 1
    inner_step: float | None = None
    start: float = 1.0
    end: float = 10.0
    ramp: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps")
        check_optional(self, "inner_step", 0.0, open_low=True)
        check_number(self, "start", 0.0)
        check_number(self, "end", 0.0)
        check_count(self, "ramp")
        if not self.end > self.start:
            raise ValueError(
                f"VPBGD: end={self.end!r}: the penalty does not grow, from start={self.start!r}; set end above start"
            )

    def penalty(self, t: int) -> float:
        """Return the penalty in outer step ``t``."""
        return self.start + (self.end - self.start) * min(t / self.ramp, 1.0)

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Move ``w``, return the hypergradient before its last move, and move ``y``; see ``Estimator``.

        Raises:
            ValueError: there are minibatches, and ``steps`` is above 1.
            SolveError: a copy diverges; the message names the step size to lower. The state is unchanged.
        """
        pieces = len(getattr(problem.inner_batches, "shares", [1.0]))
        if self.steps > 1 and pieces > 1:
            raise ValueError(
                f"VPBGD: steps={self.steps} with {pieces} batches an epoch: one copy of the weights sees batches that the other "
                "does not, and the penalty multiplies the resulting error of the hypergradient; set steps=1, or give all rows "
                "in one batch"
            )
        memory = state.memory.setdefault("VPBGD", {"steps": 0})
        growth, gamma = Growth("VPBGD", memory), self.penalty(memory["steps"])
        hyper, w = Leaves.of(lam, "lam"), Leaves.of(state.w, "w")
        y = second_copy(w, memory)
        step, remedy = self.step_of("inner_step")
        scale = 1 / max(gamma, 1.0)

        def descend(w: Leaves, inner: Evaluation) -> list[torch.Tensor]:
            return first_order(inner, w, hyper)[0]

        def penalised(y: Leaves) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
            outer, direct = first_order(problem.outer_on(validation), y, hyper)
            pulled, above = first_order(inner, y, hyper)
            return [scale * (e + gamma * g) for e, g in zip(outer, pulled, strict=True)], direct, above

        for _ in range(self.steps):
            batch = problem.inner_batches.draw()
            inner = Evaluation(problem, batch)
            slopes, below = first_order(inner, w, hyper)
            following = moved(w, slopes, step)
            trained = growth.check("inner", tree_norm(slopes), remedy, later_norm(descend, following, inner), steps=self.steps)
            inner.commit()
            w = following

        validation = problem.outer_batches.draw()
        both, direct, above = penalised(y)
        grad, unused = penalised_gradient(hyper, direct, above, below, gamma)
        pulled_down = moved(y, both, self.step_size)
        solved = growth.check(
            "penalised", tree_norm(both), f"step_size={self.step_size:g}", later_norm(lambda: penalised(pulled_down)[0])
        )
        with torch.no_grad():
            loss = float(problem.outer(w.tree, hyper.tree, validation))
        commit(problem, state, w.tree, lam, batch)
        memory.update(penalised=[leaf.detach() for leaf in pulled_down.flat], steps=memory["steps"] + 1)
        return Estimate(grad, UNKNOWN, loss, state.w, trained, solved, Cost(self.steps + 1, 1), unused)
