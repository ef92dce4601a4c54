"""``GradientMap``: one training step as a map ``phi(state, lam)`` for ``hyperopt.fixed_point``, differentiable in both arguments.

    gradient descent    phi(w) = w - step * grad_w L(w, lam)                       its fixed point is the trained model
    heavy ball          phi(w, m) = (w - step m', m'),   m' = momentum m + grad_w L
    Adam                phi(w, m, v, t), which has no fixed point: use it for unrolling only

Learning rates may be hyperparameters, one for all weights or one for each weight. They are read from ``lam`` and stay in the
graph.
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
from hyperopt.core.text import described


class GradientMap:
    """One step of a differentiable inner solver.

    Args:
        problem: the losses.
        inner: the inner solver whose step the map takes.
        batches: the batch of each step in turn; the state then includes the number of the step (None: the problem's next
            batch, drawn once, serves every step).

    Raises:
        ValueError: a rate of the inner solver is out of its range.

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
        self.problem, self.inner, self.batches = problem, inner, batches
        self._evaluations: dict[int, Evaluation] = {}

    def __repr__(self) -> str:
        return described(self, inner=self.inner, problem=self.problem)

    def start(self, w: Any) -> Any:
        """Return the initial state: ``w`` itself if the solver keeps nothing else."""
        buffers = self.inner.buffers(optree.tree_leaves(w))
        if not buffers and self.batches is None:
            return w
        state: dict[str, Any] = {"w": w, "buffers": buffers}
        if self.batches is not None:
            state["count"] = torch.zeros_like(optree.tree_leaves(w)[0].reshape(-1)[0])
        return state

    def weights(self, state: Any) -> Any:
        """Return the ``w`` of a state."""
        return state["w"] if self._state_is_dict else state

    @property
    def _state_is_dict(self) -> bool:
        """Whether a state holds more than ``w``."""
        return self.batches is not None or self.inner.keeps_buffers

    def __call__(self, state: Any, lam: Any) -> Any:
        """Return the next state."""
        if self.batches is None:
            return self.step(state, lam, self._evaluation(0, None))
        count = state["count"].detach()
        return {**self.step(state, lam, self._evaluation(int(count), self.batches)), "count": count + 1}

    def _evaluation(self, k: int, batches: Sequence[Any] | None) -> Evaluation:
        """Return the loss of step ``k``, the same evaluation in each call, so that the map is one function."""
        if k not in self._evaluations:
            batch = self.problem.inner_batches.draw() if batches is None else batches[k]
            self._evaluations[k] = Evaluation(self.problem, batch)
        return self._evaluations[k]

    def step(self, state: Any, lam: Any, evaluation: Evaluation) -> Any:
        """Return the state after one step on this evaluation of the inner loss."""
        wanted = torch.is_grad_enabled()
        weights = self.weights(state)
        self.inner.check_rates(weights, lam)
        leaves, spec = optree.tree_flatten(weights)

        others, hyper = optree.tree_flatten(lam)

        def loss(at: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
            return evaluation(optree.tree_unflatten(spec, list(at)), optree.tree_unflatten(hyper, list(others)))

        if functorch_level():  # inside a torch.func transform new leaves cannot be made
            grads = torch.func.grad(loss)(leaves, others)
        else:
            at = [x if wanted and x.requires_grad else x.detach().requires_grad_() for x in leaves]
            _, found = differentiate(loss, at, others, create_graph=wanted)
            grads = [torch.zeros_like(x) if g is None else g for x, g in zip(at, found, strict=True)]
        old: list[Tensor] = list(state["buffers"]) if self._state_is_dict else []
        moved, buffers = self.inner.advance(leaves, grads, old, lam)
        w = optree.tree_unflatten(spec, list(moved))
        return {"w": w, "buffers": list(buffers)} if self._state_is_dict else w
