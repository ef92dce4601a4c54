"""Hypergradients through training itself: by backpropagation through all or the last inner steps, or with recomputed steps.

    w_{t+1} = phi(w_t, lam),      dE/dlam = d_lam E + sum_t (d_lam phi_t)^T (d_w phi_{t+1})^T ... (d_w phi_T)^T d_w E

They are exact for the model as it was trained, even far from a minimum, and the only way to differentiate learning rates and
momentum. ``phi`` is the step of the inner solver, taken exactly ``max_steps`` times. Each step draws its own random numbers and
updates running statistics once; if ``Checkpointed`` repeats a step, it is an exact replay.

References: Maclaurin, Duvenaud & Adams, ICML 2015, arXiv 1502.03492; Franceschi et al., ICML 2017, arXiv 1703.01785; Shaban et
al., AISTATS 2019, arXiv 1810.10667 (truncation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import Estimator, commit
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.gradient_map import GradientMap
from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.training import Watch, curvature_at, gradient
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.reverse import reverse, unroll
from hyperopt.core.adjoints.checkpointed import Checkpointed
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.certificate import UNKNOWN
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class UnrolledEstimator(Estimator):
    """Backpropagation through the inner solver.

    Attributes:
        adjoint: says which steps keep their graph.
        inner: the inner solver, which takes exactly ``max_steps`` steps.
    """

    adjoint: Unrolled | Checkpointed
    inner: DifferentiableSolver

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train, and backpropagate through the steps; see ``Estimator``.

        Raises:
            SolveError: training diverged.
            ValueError: the outer loss depends on ``lam`` neither directly nor through ``w``.
        """
        hyper, steps = Leaves.of(lam, "lam"), self.inner.max_steps
        batches = [problem.inner_batches.draw() for _ in range(steps)]
        evaluations = [Evaluation(problem, b) for b in batches]
        phi = GradientMap(problem, self.inner)
        batch = problem.outer_batches.draw()
        with torch.enable_grad():
            start = phi.start(problem.start(state.w, hyper.tree))
        self._refuse_truncated(start)
        looks = trained = None

        def outer(final: Any) -> Tensor:
            nonlocal looks, trained
            w = phi.weights(final)
            trained, looks = self._watch(problem, hyper, state, w, batches)
            loss = problem.outer(w, hyper.tree, batch)
            if not loss.requires_grad:
                self._refuse(hyper)
            return loss

        def step(k: int, now: Any, lam: Any) -> Any:
            if k and not isinstance(self.adjoint, Checkpointed):  # which evaluates every step twice
                evaluations[k].once_after(evaluations[0])
            following = phi.step(now, lam, evaluations[k])
            evaluations[k].commit()  # does nothing when the step is repeated
            return following

        if isinstance(self.adjoint, Checkpointed):
            found = reverse(step, start, hyper, steps, self.adjoint.segment, outer)
            spent = 2 * steps
        else:
            found = unroll(step, start, hyper, steps, self.adjoint.last, outer)
            spent = steps
        assert trained is not None and looks is not None
        if all(g is None for g in found.grads):
            self._refuse(hyper)
        commit(problem, state, phi.weights(found.final), lam, batches[-1])
        kept = min(steps, getattr(self.adjoint, "last", None) or steps)
        unused = tuple(name for name, g in zip(hyper.names, found.grads, strict=True) if g is None)
        cost = Cost(spent + looks, 1, kept, kept)
        return Estimate(hyper.like(found.grads), UNKNOWN, float(found.loss), state.w, trained, None, cost, unused)

    def _watch(self, problem: BilevelProblem, lam: Leaves, state: State, w: Any, batches: list[Any]) -> tuple[SolveStats, int]:
        """Measure the gradient after training, and also before the first training; refuse a training that diverged.

        Returns:
            The statistics, and the number of gradients that were computed.
        """
        at = optree.tree_map(torch.Tensor.detach, lam.tree)
        begin, end = Leaves.of(state.w, "w"), Leaves.of(w, "w")
        watch = Watch(replace(self.inner, rtol=0.0, atol=0.0), state.memory.setdefault("inner", {}), begin)
        steps, looks = self.inner.max_steps, 0

        def look(k: int, w: Leaves, batch: Any) -> None:
            nonlocal looks
            # This is a measurement and not a training step, so it leaves no trace.
            grads = gradient(Evaluation(problem, batch), w, at)[1]
            watch.check(k, tree_norm(grads), curvature_at(problem, w, at, batch))
            looks += 1

        watch.steps = steps
        if "scale" not in watch.memory:
            look(0, begin, batches[0])
        look(steps, end, batches[-1])
        if watch.lost and looks == 1:  # the hyperparameters may have moved far since the last training
            look(0, begin, batches[0])
            look(steps, end, batches[-1])
        if watch.lost:
            raise SolveError(self.inner.diverged(problem, begin, at, batches[0], watch))
        return watch.stats(), looks + watch.gradients

    def _refuse_truncated(self, start: Any) -> None:
        last = getattr(self.adjoint, "last", None) or self.inner.max_steps
        if last < self.inner.max_steps and any(x.requires_grad for x in optree.tree_leaves(start)):
            raise ValueError(
                f"Unrolled(last={last}) differentiates the last {last} of {self.inner.max_steps} steps, and never reaches "
                "initial(lam), the start of training; use Unrolled() or Checkpointed()"
            )

    def _refuse(self, lam: Leaves) -> NoReturn:
        raise ValueError(
            f"the outer loss does not depend on {', '.join(lam.names)}, neither directly nor through w: the inner loss must be "
            "computed from the lam, and the outer loss from the w, that it is given"
        )
