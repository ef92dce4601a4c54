"""L-BFGS to a tolerance on the gradient, for smooth problems on all their data: tens of gradients to a minimum, at any scale.

Reference: Liu & Nocedal, Math. Programming 45, 1989; the line search is that of ``torch.optim.LBFGS`` (strong Wolfe).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.inner.base import InnerSolver, Watch, curvature_at, gradient
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.core.checks import check_count
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm

SCALE = 1e12  # of the first gradient as the optimizer sees it, where the dtype has room for it


@dataclass(frozen=True)
class InnerLBFGS(InnerSolver):
    """L-BFGS with a strong Wolfe line search. Its statistics count every gradient, those of the line search among them.

    Args:
        history: pairs of differences that are kept, at least 1.
    """

    rtol: float = 1e-6
    history: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "history")

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """Not used: the line search takes gradients of its own."""
        raise NotImplementedError

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place, on one batch.

        Raises:
            SolveError: the loss or its gradient is not finite.
        """
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        watch = Watch(self, state.memory.setdefault("inner", {}), w)
        batch = problem.inner_batches.draw()
        here = curvature_at(problem, w, lam, batch)
        inner = Evaluation(problem, batch)  # a line search must see one function
        run = _Run(inner, w, lam, self.history)
        ended, best = None, math.inf
        for k in range(self.max_steps):
            watch.steps = k + 1
            watch.see(k, tree_norm(run.gradient()), here)
            if run.searched_out and not watch.norm < best:
                ended = Status.stagnated  # not even a full step lowers the gradient: rounding has the last word
                run.restore()
                watch.see(k, tree_norm(run.gradient()), here)
                break
            if watch.lost:
                raise SolveError(self.diverged(problem, w, lam, batch, watch.growth))
            if watch.met:
                break
            best = watch.norm
            run.step()
        inner.commit()
        if problem.refresh is not None:
            problem.refresh(state.w, lam, batch)
        stats = watch.stats(ended)
        stats.evaluations = run.spent + watch.gradients
        return stats

    def remedy(self, lam: Any) -> str:
        """What to change."""
        return "the inner loss is unbounded below or not finite: add a penalty, or use GradientDescent"


class _Run:
    """One minimisation by ``torch.optim.LBFGS``, a step at a time.

    Two things that it does not do by itself. It drops pairs with ``<y, s> <= 1e-10``, whatever the loss is measured in: the loss
    is scaled. And where the loss is flat to rounding its line search finds nothing more, long before the gradient is at its own
    rounding floor: full steps without a search go on from there.

    Attributes:
        spent: gradients taken.
        searched_out: whether the line search has found nothing more.
    """

    def __init__(self, inner: Evaluation, w: Leaves, lam: Any, history: int) -> None:
        self.inner, self.w, self.lam = inner, w, lam
        self.spent, self.searched_out = 0, False
        self._latest: tuple[list[Tensor], Tensor, list[Tensor]] | None = None
        self._before = self._copy()
        size = tree_norm(self.gradient())
        # A power of two: no rounding. The line search squares products of two gradients: the fourth power must not overflow.
        scale = min(SCALE, torch.finfo(w.flat[0].dtype).max ** 0.2)
        self._scale = 2.0 ** round(math.log2(scale / size)) if 0 < size < math.inf else 1.0
        self._optimizer = torch.optim.LBFGS(
            w.flat, max_iter=1, max_eval=25, history_size=history, tolerance_grad=0, tolerance_change=0
        )
        self._optimizer.param_groups[0]["line_search_fn"] = "strong_wolfe"

    def gradient(self) -> list[Tensor]:
        """The gradient at ``w``; not taken again where the last line search took it."""
        return self._evaluate()[2]

    def _evaluate(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        if self._latest is None or not same(self.w.flat, self._latest[0]):
            self._latest = self._copy(), *gradient(self.inner, self.w, self.lam)
            self.spent += 1
        return self._latest

    def _closure(self) -> Tensor:
        _, loss, grads = self._evaluate()
        for x, g in zip(self.w.flat, grads, strict=True):
            x.grad = self._scale * g
        return self._scale * loss

    def step(self) -> None:
        """One step."""
        self._before = self._copy()
        self._optimizer.step(self._closure)
        lost = not all(bool(x.isfinite().all()) for x in self.w.flat)  # between two points that rounding makes one
        if lost:
            self.restore()
        if not self.searched_out and (lost or same(self.w.flat, self._before)):
            self.searched_out = True
            self._optimizer.param_groups[0]["line_search_fn"] = None
            self._optimizer.step(self._closure)

    def restore(self) -> None:
        """Undo the last step."""
        with torch.no_grad():
            for x, old in zip(self.w.flat, self._before, strict=True):
                x.copy_(old)

    def _copy(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.w.flat]


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
