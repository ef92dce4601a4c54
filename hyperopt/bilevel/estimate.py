"""``Estimate``: a hypergradient with its certificate and its cost; ``State``: what a method keeps between outer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.refusals import named
from hyperopt.core.certificate import Certificate
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.text import described
from hyperopt.core.tree import tree_norm


@dataclass
class Cost:
    """The cost of one outer step, as counts of operations on a whole batch.

    Attributes:
        inner_gradients: gradients of the inner loss; each is an evaluation of the map.
        outer_gradients: gradients of the outer loss.
        hessian_products: products with the Hessian of the inner loss, or with the matrix used instead.
        mixed_products: products with the mixed second derivative of the inner loss.
        transposed_products: the Hessian products that a linear solver requested as products with the transpose, which is the
            same matrix here.
    """

    inner_gradients: int = 0
    outer_gradients: int = 0
    hessian_products: int = 0
    mixed_products: int = 0
    transposed_products: int = 0

    @property
    def evaluations(self) -> int:
        """Evaluations of the gradient-step map."""
        return self.inner_gradients

    @property
    def vjps(self) -> int:
        """Vector-Jacobian products of the map."""
        return self.hessian_products + self.mixed_products - self.transposed_products

    @property
    def jvps(self) -> int:
        """Jacobian-vector products of the map."""
        return self.transposed_products


@dataclass
class State:
    """What a method keeps from one outer step to the next; it is changed in place.

    Attributes:
        w: the inner variables, a tree; inner solvers write into its tensors.
        memory: what each method remembers, by name: plain containers, numbers and tensors.
    """

    w: Any
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What ``adjoint="auto"`` chose; ``str(choice)`` is a sentence.

    Attributes:
        name: one of ``NAMES``; its index there is the metric ``adjoint/choice``.
        why: the reason for the choice.
        adjoint: the adjoint that was used. With ``step``, ``curvature`` and ``resample``, and without a warm start, it gives
            the same hypergradient again, up to random draws.
        step: step of the gradient-step map (None: the method does not depend on it).
        curvature: the matrix of the system, see ``ProductSettings``.
        resample: whether each product used a draw of its own.

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> choice = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()), adjoint="auto").choice
        >>> print(choice)
        CG: it met its tolerance and no negative curvature
    """

    NAMES: ClassVar[tuple[str, ...]] = ("CG", "MINRES", "Neumann", "Neumann, Gauss-Newton")

    name: str
    why: str
    adjoint: Any = field(repr=False)
    step: float | None = None
    curvature: str = "hessian"
    resample: bool = False

    def __str__(self) -> str:
        """Return the name and the reason."""
        return f"{self.name}: {self.why}"


@dataclass(repr=False)
class Estimate:
    """One hypergradient.

    Attributes:
        grad: ``dE/dlam``, in the structure of ``lam``; NaN if the adjoint solve broke down or diverged (but the result of a
            fixed number of steps under ``policy="ignore"`` is kept).
        certificate: how far ``grad`` may be from the exact hypergradient.
        loss: the outer loss ``E(w, lam)``.
        w: the inner variables at which the hypergradient was taken.
        inner: statistics of the inner solve (None: there was none).
        adjoint: statistics of the adjoint solve (None: there was none).
        cost: counts of gradients and products.
        unused: the hyperparameters on which the outer loss does not depend, in this way of differentiating it: their
            hypergradient is exactly zero.
        note: what to change, if the adjoint solve diverged.
        choice: which adjoint ``adjoint="auto"`` chose and why (None: an adjoint was given).

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()))
        >>> round(float(estimate.grad), 3), estimate.status.name, estimate.cost.hessian_products > 0
        (-0.25, 'converged', True)
    """

    grad: Any
    certificate: Certificate
    loss: float
    w: Any
    inner: SolveStats | None
    adjoint: SolveStats | None
    cost: Cost
    unused: tuple[str, ...] = ()
    note: str = ""
    choice: Choice | None = None

    def __repr__(self) -> str:
        """Return the shape of the hypergradient, its norm and estimated error, and how the solves ended."""
        numbers = described(self, grad=self.grad, norm=self.norm, loss=self.loss, error=self.certificate.error)
        ends = [f"{name}={stats.method}: {stats.status}" for name, stats in self._solves()]
        return ", ".join([numbers[:-1], *ends, *([f"choice={self.choice}"] if self.choice else [])]) + ")"

    def _solves(self) -> list[tuple[str, SolveStats]]:
        return [(name, stats) for name, stats in (("inner", self.inner), ("adjoint", self.adjoint)) if stats is not None]

    def statuses(self) -> dict[str, Status]:
        """Return how the solves ended, by the names ``inner`` and ``adjoint``."""
        return {name: stats.status for name, stats in self._solves()}

    @property
    def status(self) -> Status:
        """The worst status of the solves."""
        return max(self.statuses().values(), default=Status.converged)

    @property
    def norm(self) -> float:
        """Euclidean norm of the hypergradient."""
        return tree_norm(self.grad)

    def metrics(self) -> dict[str, float]:
        """Return the numbers of an outer step, under the names that every task logs."""
        found: dict[str, float] = {}
        for name, stats in self._solves():
            found[f"{name}/iterations"] = float(stats.iterations.max())
            found[f"{name}/residual"] = stats.worst_residual()
        if self.choice is not None:
            found["adjoint/choice"] = float(Choice.NAMES.index(self.choice.name))
        found["hypergrad/error_estimate"] = self.certificate.error
        found["hypergrad/is_bound"] = float(self.certificate.is_bound)
        for name in ("evaluations", "vjps", "jvps", *vars(self.cost)):
            found[f"cost/{name}"] = float(getattr(self.cost, name))
        return found

    def backward(self, lam: Any) -> None:
        """Add the hypergradient to the ``.grad`` of the leaves ``lam``, or of the leaves from which a space computed ``lam``.

        The graph from these leaves to ``lam`` is kept, so that several problems can each add their hypergradient.

        Args:
            lam: the tree at which the estimate was taken; entries that do not require grad are left out.

        Raises:
            ValueError: ``lam`` has another structure, or no tensor that requires grad.
            SolveError: the hypergradient is not finite; the message names the hyperparameters and the cause. No ``.grad`` was
                changed.
        """
        pairs = list(self._pairs(lam))
        if not pairs:
            raise ValueError(
                "backward(lam): no tensor in lam requires grad, so the hypergradient would reach nothing; give the lam that "
                "Hyperparameters.values() returns (read() has no graph), or tensors with requires_grad=True"
            )
        bad = [name for name, _, g in pairs if not bool(g.isfinite().all())]
        if bad:
            raise SolveError(f"the hypergradient of {', '.join(bad)} is not finite; {self._cause()}; no .grad was changed")
        torch.autograd.backward([x for _, x, _ in pairs], [g for _, _, g in pairs], retain_graph=True)

    def _pairs(self, lam: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, leaf and hypergradient of each leaf of ``lam`` that requires grad.

        Raises:
            ValueError: ``lam`` does not have the structure and shapes of the hypergradient.
        """
        spec, (found, expected) = optree.tree_structure(lam), optree.tree_flatten(self.grad)
        if spec != expected:
            raise ValueError(f"backward(lam): lam is {spec}, but the hypergradient was taken at {expected}; give that lam")
        for (name, leaf), g in zip(named(lam, "lam"), found, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != g.shape:
                what = f"has shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"is a {type(leaf).__name__}"
                raise ValueError(
                    f"backward(lam): {name} {what}, but its hypergradient has shape {tuple(g.shape)}; give the lam that the "
                    "estimate was taken at"
                )
            if leaf.requires_grad:
                yield name, leaf, g

    def _cause(self) -> str:
        """Return the earliest known reason why the hypergradient is not finite."""
        if self.inner is not None and self.inner.status >= Status.breakdown:
            return f"the inner solve ended as {self.inner.status}: {self.inner.status.message}"
        bad = [name for name, leaf in named(self.w, "w") if not bool(leaf.isfinite().all())]
        if bad:
            return f"the weights {', '.join(bad)} are not finite: lower the step size of the training"
        if not math.isfinite(self.loss):
            return f"the outer loss is {self.loss}: check the data, the hyperparameters, and the training"
        if self.adjoint is not None and self.adjoint.status >= Status.breakdown:
            return f"the adjoint solve ended as {self.adjoint.status}: {self.note or self.adjoint.status.message}"
        return (
            f"the outer loss is {self.loss:.6g} and the solves succeeded, so a derivative of the inner or of the outer loss is "
            "not finite at this point (such as that of a square root or a norm at 0)"
        )
