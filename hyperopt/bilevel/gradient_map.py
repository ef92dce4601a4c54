"""``GradientMap``: a step of training as a map, for ``hyperopt.fixed_point``: ``phi(state, lam)``, differentiable in both.

    gradient descent    phi(w) = w - step * grad_w L(w, lam)                       whose fixed point is the trained model
    heavy ball          phi(w, m) = (w - step m', m'),   m' = momentum m + grad_w L
    Adam                phi(w, m, v, t), which has no fixed point of its own: it is for unrolling alone

Rates may be hyperparameters, one for all weights or one for each: they are taken from ``lam`` and stay in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.curvature import differentiate
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.captured import functorch_level


class GradientMap:
    """One step of a differentiable inner solver.

    Args:
        problem: the losses.
        inner: whose step.
        batches: the batch of each step in turn, in which case the state carries the number of the step (None: the problem's next
            batch, which should then always be the same).

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(lambda w, lam, batch: ((w - lam) ** 2).sum(), lambda w, lam, batch: (w**2).sum())
        >>> phi = hyperopt.GradientMap(problem, hyperopt.GradientDescent(step_size=0.1))
        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> w = hyperopt.fixed_point(phi, phi.start(torch.zeros(1)), args=(lam,), rows="joint").value
        >>> torch.autograd.grad(w.sum(), lam)[0].round(decimals=4)
        tensor(1.)
    """

    def __init__(self, problem: BilevelProblem, inner: DifferentiableSolver, batches: Sequence[Any] | None = None) -> None:
        """Keep the parts."""
        self.problem, self.inner, self.batches = problem, inner, batches
        self._evaluations: dict[int, Evaluation] = {}

    def start(self, w: Any) -> Any:
        """The state at the start: ``w`` itself where the solver keeps nothing else."""
        buffers = self.inner.buffers(optree.tree_leaves(w))
        if not buffers and self.batches is None:
            return w
        state: dict[str, Any] = {"w": w, "buffers": buffers}
        if self.batches is not None:
            state["count"] = torch.zeros_like(optree.tree_leaves(w)[0].reshape(-1)[0])
        return state

    def weights(self, state: Any) -> Any:
        """The ``w`` of a state."""
        return state["w"] if self._whole else state

    @property
    def _whole(self) -> bool:
        """Whether a state is more than ``w``."""
        return self.batches is not None or self.inner.keeps_buffers

    def __call__(self, state: Any, lam: Any) -> Any:
        """The next state."""
        if self.batches is None:
            return self.step(state, lam, self._evaluation(0, None))
        count = state["count"].detach()
        return {**self.step(state, lam, self._evaluation(int(count), self.batches)), "count": count + 1}

    def _evaluation(self, k: int, batches: Sequence[Any] | None) -> Evaluation:
        """The loss of step ``k``: the map is the same function whenever it is called there."""
        if k not in self._evaluations:
            batch = self.problem.inner_batches.draw() if batches is None else batches[k]
            self._evaluations[k] = Evaluation(self.problem, batch)
        return self._evaluations[k]

    def step(self, state: Any, lam: Any, evaluation: Evaluation) -> Any:
        """The state after a step on this evaluation of the inner loss."""
        wanted = torch.is_grad_enabled()
        weights = self.weights(state)
        self.inner.check_rates(weights, lam)
        leaves, spec = optree.tree_flatten(weights)

        def loss(*at: Tensor) -> Tensor:
            return evaluation(optree.tree_unflatten(spec, at), lam)

        if functorch_level():  # which lets no leaves be made
            grads = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
        else:
            with torch.enable_grad():
                at = [x if wanted and x.requires_grad else x.detach().requires_grad_() for x in leaves]
                found = differentiate(loss(*at), at, create_graph=wanted)
            grads = [torch.zeros_like(x) if g is None else g for x, g in zip(at, found, strict=True)]
        old: list[Tensor] = list(state["buffers"]) if self._whole else []
        moved, buffers = self.inner.advance(leaves, grads, old, lam)
        w = optree.tree_unflatten(spec, list(moved))
        return {"w": w, "buffers": list(buffers)} if self._whole else w
