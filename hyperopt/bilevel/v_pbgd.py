"""V-PBGD: gradient descent on the outer loss and a growing penalty for the gap between the inner loss and its least value.

    F(lam, y) = E(y, lam) + gamma (L(y, lam) - min_w L(w, lam))

``w`` (``state.w``) follows the minimum of ``L`` by T steps of gradient descent; ``y`` is a second copy, which descends on ``F``
with the hyperparameters, both from the same point:

    dE/dlam ~ d_lam E(y) + gamma (d_lam L(y) - d_lam L(w))
    y <- y - step min(1 / gamma, 1) (grad_w E(y) + gamma grad_w L(y))

First derivatives alone. The bias is ``O(1 / gamma)``. ``gamma`` grows linearly and then stays, and the step of ``y`` falls
with it, as in the authors' program for data cleaning; the same factor for ``lam`` is left to the outer optimizer.

The paper takes all rows for every gradient. Where there are batches, ``y`` moves on the last batch on which ``w`` moves, and the
difference that ``gamma`` multiplies is taken on it before either does: noise that both copies have cancels there. On a batch of
its own ``y`` would drift from ``w``, for good where batches go through the rows in epochs, since the one copy then sees the rows
that the other has not seen; so would it with T above one, which is refused there.

Reference: Shen & Chen, ICML 2023, arXiv 2302.05185, algorithm 1 (V-PBGD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.stochastic import NONE, Growth, Stochastic, commit, first_order, later, moved, second_copy
from hyperopt.core.checks import check_count, check_number, check_optional
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class VPBGD(Stochastic):
    """Two copies of the weights, and a penalty that grows linearly from ``start`` to ``end`` and stays there.

    Args:
        steps: of the copy of ``w`` that solves the inner problem, per outer step (T), at least 1; more than 1 only on one batch.
        inner_step: of those steps, above 0 (None: ``step_size``, which is that of the penalised copy).
        start: the first penalty, ``gamma``, at least 0.
        end: the last, above ``start``; the bias of the hypergradient is ``O(1 / end)``.
        ramp: outer steps from one to the other, at least 1.
    """

    steps: int = 1
    inner_step: float | None = None
    start: float = 1.0
    end: float = 10.0
    ramp: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges, and that the penalty grows."""
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
        """The penalty in outer step ``t``."""
        return self.start + (self.end - self.start) * min(t / self.ramp, 1.0)

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Move ``w``, return the hypergradient before its last move, and move ``y``; see ``Estimator``.

        Raises:
            ValueError: more than one step of ``w`` in batches of epochs.
            SolveError: a copy diverges; names the step to lower. The state is that of the step before.
        """
        pieces = len(getattr(problem.inner_batches, "shares", [1.0]))
        if self.steps > 1 and pieces > 1:
            raise ValueError(
                f"VPBGD: steps={self.steps} in epochs of {pieces} batches: one copy of the weights sees batches that the other "
                "does not, and the penalty multiplies what that leaves in the hypergradient; set steps=1, or give all rows "
                "in one batch"
            )
        memory = state.memory.setdefault("VPBGD", {"steps": 0})
        growth, gamma = Growth("VPBGD", memory), self.penalty(memory["steps"])
        hyper, w = Leaves.of(lam, "lam"), Leaves.of(state.w, "w")
        y = second_copy(w, memory)
        step = self.step_size if self.inner_step is None else self.inner_step
        remedy = f"{'step_size' if self.inner_step is None else 'inner_step'}={step:g}"
        scale = 1 / max(gamma, 1.0)

        def descend(w: Leaves, inner: Evaluation) -> list[torch.Tensor]:
            return first_order(inner, w, hyper)[0]

        def penalised(y: Leaves) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
            outer, direct = first_order(problem.outer_on(validation), y, hyper)
            pulled, above = first_order(inner, y, hyper)
            return [scale * (e + gamma * g) for e, g in zip(outer, pulled, strict=True)], direct, above

        for _ in range(self.steps):
            batch = problem.inner_batches.draw()
            inner = Evaluation(problem, batch)
            slopes, below = first_order(inner, w, hyper)
            following = moved(w, slopes, step)
            trained = growth.see("inner", tree_norm(slopes), remedy, later(descend, following, inner), steps=self.steps)
            inner.commit()
            w = following

        validation = problem.outer_batches.draw()
        both, direct, above = penalised(y)
        grad = [e + gamma * (a - b) for e, a, b in zip(direct, above, below, strict=True)]
        pulled_down = moved(y, both, self.step_size)
        solved = growth.see(
            "penalised", tree_norm(both), f"step_size={self.step_size:g}", later(lambda: penalised(pulled_down)[0])
        )
        with torch.no_grad():
            loss = float(problem.outer(w.tree, hyper.tree, validation))
        commit(problem, state, w, lam, batch)
        memory.update(penalised=[leaf.detach() for leaf in pulled_down.flat], steps=memory["steps"] + 1)
        return Estimate(hyper.like(grad), NONE, loss, state.w, trained, solved, Cost(self.steps + 1, 1))
