"""Hypergradients through training itself: backpropagation through every inner step, through the last few, or recomputed.

    w_{t+1} = phi(w_t, lam),      dE/dlam = d_lam E + sum_t (d_lam phi_t)^T (d_w phi_{t+1})^T ... (d_w phi_T)^T d_w E

exact for the model as it was trained, be it far from a minimum, and the only way to learning rates and momentum. It is
``hyperopt.fixed_point`` with ``Unrolled`` or ``Checkpointed`` on the map of the inner solver, taken exactly ``max_steps`` times.

References: Maclaurin, Duvenaud & Adams, ICML 2015, arXiv 1502.03492; Franceschi et al., ICML 2017, arXiv 1703.01785; Shaban et
al., AISTATS 2019, arXiv 1810.10667 (truncation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch

from hyperopt.adjoints.checkpointed import Checkpointed
from hyperopt.adjoints.unrolled import Unrolled
from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.gradient_map import GradientMap
from hyperopt.bilevel.inner.base import DifferentiableSolver, Watch, gradient
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.certificate import Certificate
from hyperopt.policy import SolveError
from hyperopt.primitive import fixed_point
from hyperopt.solvers.picard import Picard


@dataclass(frozen=True)
class UnrolledEstimator(Estimator):
    """Backpropagation through the inner solver.

    Attributes:
        adjoint: which steps keep their graph.
        inner: takes exactly ``max_steps`` steps.
    """

    adjoint: Unrolled | Checkpointed
    inner: DifferentiableSolver

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train with a graph, and go back; see ``Estimator``.

        Raises:
            SolveError: training diverged.
            ValueError: the outer loss does not depend on ``lam``, not through ``w`` either.
        """
        hyper, steps = Leaves.of(lam, "lam"), self.inner.max_steps
        batches = [problem.inner_batches.draw() for _ in range(steps)]
        phi = GradientMap(problem, self.inner, None if all(b is batches[0] for b in batches) else batches)
        solver = Picard(rtol=0.0, atol=0.0, max_steps=steps)
        with torch.enable_grad():
            start = phi.start(state.w)
            found = fixed_point(phi, start, (hyper.tree,), rows="joint", solver=solver, adjoint=self.adjoint, policy="ignore")
            w = phi.weights(found.value)
            ended = self._watch(problem, hyper, state, w, batches)
            batch = problem.outer_batches.draw()
            loss = problem.outer(w, hyper.tree, batch)
            if not loss.requires_grad:
                raise ValueError(
                    f"the outer loss depends on none of {', '.join(hyper.names)}, neither itself nor through w: the inner loss "
                    "must be computed from the lam, and the outer loss from the w, that it is given"
                )
            grads = torch.autograd.grad(loss, hyper.flat, allow_unused=True)
        with torch.no_grad():
            for old, new in zip(optree.tree_leaves(state.w), optree.tree_leaves(w), strict=True):
                old.copy_(new)
        if problem.refresh is not None:
            problem.refresh(state.w, lam, batches[-1])
        kept = min(steps, getattr(self.adjoint, "last", None) or steps)
        again = steps if isinstance(self.adjoint, Checkpointed) else 0
        cost = Cost(steps + again + 1, 1, kept, kept)
        unused = tuple(name for name, g in zip(hyper.names, grads, strict=True) if g is None)
        grad = hyper.like(list(grads))
        none = Certificate(math.nan, False, math.nan)
        return Estimate(grad, none, float(loss.detach()), state.w, ended.stats(), None, cost, unused)

    def _watch(self, problem: BilevelProblem, lam: Leaves, state: State, w: Any, batches: list[Any]) -> Watch:
        """Measure the gradient after the training, and before the very first one; refuse a training that diverged."""
        at = optree.tree_map(torch.Tensor.detach, lam.tree)
        watch = Watch(replace(self.inner, rtol=0.0, atol=0.0), state.memory.setdefault("inner", {}))
        start = Leaves.of(state.w, "w")
        if "scale" not in watch.memory:
            watch.see(0, gradient(problem, start, at, batches[0])[1])
        watch.wants(self.inner.max_steps - 1)
        watch.see(self.inner.max_steps, gradient(problem, Leaves.of(w, "w"), at, batches[-1])[1])
        if watch.lost:
            raise SolveError(self.inner.diverged(problem, start, at, batches[0], watch.growth))
        return watch
