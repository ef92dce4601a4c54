"""L-BFGS to a tolerance on the gradient, for smooth problems on all their data; it takes tens of gradients at any scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.inner.training import Training, gradient
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import check_count
from hyperopt.core.status import SolveStats
from hyperopt.core.tree import total_norm, tree_norm

HALVINGS = 3  # of a full step that does not lower the gradient
SCALE = 1e12  # norm to which the first gradient is scaled, if the range of the dtype allows


@dataclass(frozen=True)
class InnerLBFGS(InnerSolver):
    """L-BFGS with a strong Wolfe line search. Its statistics count every gradient, including those of the line search.

    Args:
        rtol, atol: training stops at ``|grad L| <= atol + rtol * scale``, see ``hyperopt.bilevel.inner.base.InnerSolver``; both
            at least 0, and both 0 for exactly ``max_steps`` steps.
        max_steps: largest number of steps, at least 1; each takes one or a few gradients.
        history: number of pairs of differences that are kept, at least 1.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Liu & Nocedal, Math. Programming 45, 1989; the line search is that of ``torch.optim.LBFGS`` (strong Wolfe).

    Example:
        >>> import torch, hyperopt
        >>> inner = hyperopt.InnerLBFGS(rtol=1e-6)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(()), inner=inner)
        >>> round(float(estimate.w), 3), round(float(estimate.grad), 3)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        (0.5, -0.25)
    """

    rtol: float = 1e-6
    history: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "history")

    def training(self, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> Training:
        """Return a training on the next batch."""
        return _LBFGSTraining(self, problem, w, lam, memory)

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: _Steps) -> None:
        """Make one step, whose line search takes further gradients."""
        work.step()

    def remedy(self, lam: Any) -> str:
        """Return what to change if training diverges."""
        return "the inner loss is unbounded below or not finite: add a penalty, or use GradientDescent"


class _LBFGSTraining(Training):
    """A training by L-BFGS, on one batch.

    If the line search makes no more progress, and a full step without it does not lower the gradient either, nor one of its
    halves, the gradient is at its rounding floor: the step is undone, and no other is made.
    """

    attentive = True  # a step costs several evaluations, much more than a check

    def __init__(self, solver: InnerLBFGS, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> None:
        super().__init__(solver, problem, w, lam, memory)
        self.batch = problem.inner_batches.draw()
        self.inner = Evaluation(problem, self.batch)  # a line search needs one fixed function
        self.work = _Steps(self.inner, w, lam, solver.history)

    def run(self) -> SolveStats:
        stats = super().run()
        self.inner.commit()
        stats.evaluations = self.work.spent + self.watch.gradients
        return stats

    def take(self) -> list[Tensor]:
        """Return the gradient after the last step or, if that step is undone, before it."""
        grads = self.work.gradient()
        if not self.work.searched_out:
            return grads
        for _ in range(HALVINGS):
            if bool(total_norm(grads) < self.norm):
                return grads
            self.work.halve()
            grads = self.work.gradient()
        if not bool(total_norm(grads) < self.norm):
            self.stuck = True
            self.work.restore()
            grads = self.work.gradient()
        return grads


class _Steps:
    """One minimisation by ``torch.optim.LBFGS``, a step at a time, with two additions.

    The loss is scaled, since torch drops pairs with ``<y, s> <= 1e-10`` whatever the units of the loss. And after the line
    search has stopped making progress, because differences of the loss are below rounding, full steps without a line search
    continue until the gradient is at its own rounding floor.

    Attributes:
        spent: number of gradients computed.
        searched_out: whether the line search has stopped making progress.
    """

    def __init__(self, inner: Evaluation, w: Leaves, lam: Any, history: int) -> None:
        self.inner, self.w, self.lam = inner, w, lam
        self.spent, self.searched_out = 0, False
        self._latest: tuple[list[Tensor], Tensor, list[Tensor]] | None = None
        self._before = self._copy()
        size = tree_norm(self.gradient())
        # A power of two does not round. The line search squares products of two gradients, so the fourth power must not overflow.
        scale = min(SCALE, torch.finfo(w.flat[0].dtype).max ** 0.2)
        self._scale = 2.0 ** round(math.log2(scale / size)) if 0 < size < math.inf else 1.0
        self._optimizer = torch.optim.LBFGS(
            w.flat, max_iter=1, max_eval=25, history_size=history, tolerance_grad=0, tolerance_change=0
        )
        self._optimizer.param_groups[0]["line_search_fn"] = "strong_wolfe"

    def gradient(self) -> list[Tensor]:
        """Return the gradient at ``w``, which is not computed again if the last line search computed it."""
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
        """Make one step."""
        self._before = self._copy()
        self._optimizer.step(self._closure)
        lost = not all(
            bool(x.isfinite().all()) for x in self.w.flat
        )  # the line search divided by the distance of two equal points
        if lost:
            self.restore()
        if not self.searched_out and (lost or same(self.w.flat, self._before)):
            self.searched_out = True
            self._optimizer.param_groups[0]["line_search_fn"] = None
            self._optimizer.step(self._closure)

    def halve(self) -> None:
        """Go back half of the last step."""
        with torch.no_grad():
            for x, old in zip(self.w.flat, self._before, strict=True):
                x.lerp_(old, 0.5)
        self._optimizer.state[self.w.flat[0]]["t"] *= 0.5  # the length from which torch computes the next pair of differences

    def restore(self) -> None:
        """Undo the last step."""
        with torch.no_grad():
            for x, old in zip(self.w.flat, self._before, strict=True):
                x.copy_(old)

    def _copy(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.w.flat]


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
