"""Single-loop methods: the weights, the adjoint variable and the hyperparameters each move by one step at a time.

    w   <- w   - step  D_w,      D_w = grad_w L
    u   <- u   - step' D_u,      D_u = H u - d_w E
    lam <- lam - ...   D_lam,    D_lam = d_lam E - (d_lam grad_w L)^T u

All three directions are taken at the same ``(w, u, lam)``. They are sums over examples, so minibatches estimate each of them
without bias. ``D_lam`` is returned as the hypergradient, and the outer optimizer takes the step in ``lam``. The paper's adjoint
variable is ``v = -u``.

Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, algorithm 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.curvature import Hessian, unused_of
from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import commit
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem, outer_gradient
from hyperopt.bilevel.stochastic import Growth, Stochastic, moved, same_hyperparameters
from hyperopt.core.certificate import UNKNOWN
from hyperopt.core.checks import check_number, check_optional


@dataclass(frozen=True)
class Terms:
    """The terms of the three directions.

    Attributes:
        inner: ``grad_w L``. shape: (1, size of w)
        product: ``H u``. shape: (1, size of w)
        mixed: ``(d_lam grad_w L)^T u``. shape: (1, size of lam)
        outer: ``d_w E``. shape: (1, size of w)
        direct: ``d_lam E``. shape: (1, size of lam)
        loss: ``E`` on the batch of ``outer``.
    """

    inner: Tensor
    product: Tensor
    mixed: Tensor
    outer: Tensor
    direct: Tensor
    loss: float


class LoopPoint:
    """The point ``(w, u, lam)`` at which the terms are computed.

    Args:
        problem: the losses.
        w: the weights.
        lam: the hyperparameters.
        u: the adjoint variable, shape (1, size of w); None: zero.

    Attributes:
        parts: every term in ``lam`` so far, as one tensor for each hyperparameter; None if the term does not depend on it.
    """

    def __init__(self, problem: BilevelProblem, w: Leaves, lam: Leaves, u: Tensor | None) -> None:
        self.problem, self.w, self.lam = problem, w, lam
        self.u = w.matrix([None] * len(w.flat)) if u is None else u
        self.cost = Cost()
        self.curvature: Hessian | None = None  # of the inner loss, on the batch of the last call of ``inner``
        self.evaluation: Evaluation | None = None
        self.parts: list[list[Tensor | None]] = []

    def inner(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``inner``, ``product`` and ``mixed`` on a batch of the inner loss, from one graph."""
        self.evaluation = Evaluation(self.problem, batch)
        self.curvature = curvature = Hessian(self.evaluation, self.w, self.lam)
        product, mixed = curvature.matvec(self.u), curvature.mixed(self.u)
        self.cost.inner_gradients += curvature.gradients
        self.cost.hessian_products += curvature.matvecs
        self.cost.mixed_products += curvature.mixed_products
        self.parts.append(mixed)
        return curvature.gradient, product, self.lam.matrix(mixed)

    def after(self, residual: Tensor, step: float) -> Callable[[], float]:
        """Return a function that gives ``|(I - step H) residual|``, the norm of ``D_w`` or ``D_u`` after a step."""

        def norm() -> float:
            assert self.curvature is not None
            self.cost.hessian_products += 1
            return float((residual - step * self.curvature.matvec(residual)).norm())

        return norm

    def outer(self, batch: Any) -> tuple[float, Tensor, Tensor]:
        """Return ``loss``, ``outer`` and ``direct`` on a batch of the outer loss."""
        loss, in_w, in_lam = outer_gradient(self.problem, self.w, self.lam, batch)
        self.cost.outer_gradients += 1
        self.parts.append(in_lam)
        return float(loss), self.w.matrix(in_w), self.lam.matrix(in_lam)


@dataclass(frozen=True)
class SingleLoop(Stochastic):
    """The base of single-loop methods; a subclass says how it computes the terms.

    Args:
        adjoint_step: step size in ``u``, above 0 (None: ``step_size``).
        decay: both step sizes are multiplied by ``(1 + t / horizon)^-decay`` in outer step ``t``; in [0, 1], 0 for constant
            steps.
        horizon: see ``decay``; in outer steps, above 0.
    """

    adjoint_step: float | None = None
    decay: float = 0.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "adjoint_step", 0.0, open_low=True)
        check_number(self, "decay", 0.0, 1.0)
        check_number(self, "horizon", 0.0, open_low=True)

    def factor(self, t: int) -> float:
        """Return the factor of both step sizes in outer step ``t``."""
        return (1 + t / self.horizon) ** -self.decay

    @abstractmethod
    def terms(self, at: LoopPoint, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """Return the terms, a function that writes into ``memory`` what must be remembered, and the batch of the inner loss."""

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Return the hypergradient at the present ``w`` and ``u``, which then move by one step; see ``Estimator``.

        Raises:
            SolveError: the method diverges; the message names the step size to lower. The state is unchanged.
        """
        name = type(self).__name__
        memory = state.memory.setdefault(name, {"steps": 0})
        w, hyper = Leaves.of(state.w, "w"), Leaves.of(lam, "lam")
        same_hyperparameters(hyper, memory, name)
        at = LoopPoint(problem, w, hyper, memory.get("u"))
        terms, write, batch = self.terms(at, memory)
        unused = unused_of(hyper.names, *at.parts)
        grad, slope = terms.direct - terms.mixed, terms.product - terms.outer
        growth, factor = Growth(name, memory), self.factor(memory["steps"])
        step, remedy = self.step_of("adjoint_step")
        trained = growth.check(
            "inner", float(terms.inner.norm()), f"step_size={self.step_size:g}", at.after(terms.inner, factor * self.step_size)
        )
        solved = growth.check(
            "adjoint", float(slope.norm()), remedy, at.after(slope, factor * step), scale=float(terms.outer.norm())
        )
        if at.evaluation is not None:
            at.evaluation.commit()
        commit(problem, state, moved(w, w.parts(terms.inner), factor * self.step_size).tree, lam, batch)
        write()
        memory.update(u=at.u - factor * step * slope, steps=memory["steps"] + 1)
        return Estimate(hyper.layout.tree(grad), UNKNOWN, terms.loss, state.w, trained, solved, at.cost, unused)
