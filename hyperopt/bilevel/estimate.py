"""``Estimate``: one hypergradient with its certificate and what it cost; ``State``: what a method keeps between outer steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import optree
import torch

from hyperopt.core.certificate import Certificate
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm


@dataclass
class Cost:
    """What one outer step has spent, each over a whole batch.

    Attributes:
        inner_gradients: of the inner loss; each is an evaluation of the map.
        outer_gradients: of the outer loss.
        hessian_products: with the Hessian of the inner loss, or what stands in its place.
        mixed_products: with its mixed second derivative.
        transposed_products: those of the Hessian products that a linear solver asked for as ones with the transpose, which is
            the same matrix here.
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
    """What a run of outer steps carries along, changed in place.

    Attributes:
        w: the inner variables, a tree; inner solvers write into its tensors.
        memory: what the methods keep, by name: plain containers, numbers and tensors.
    """

    w: Any
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What ``adjoint="auto"`` chose; ``str(choice)`` is a sentence.

    Attributes:
        name: one of ``NAMES``, whose place there is the metric ``adjoint/choice``.
        why: what it met that made it choose so.
        adjoint: the adjoint that was used; with ``step`` and ``curvature``, and without a warm start, it gives the same again.
        step: of the gradient-step map, where that was iterated (None: it makes no difference).
        curvature: of whose products the system was made.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("CG", "MINRES", "Neumann", "Neumann, Gauss-Newton")

    name: str
    why: str
    adjoint: Any
    step: float | None = None
    curvature: str = "hessian"

    def __str__(self) -> str:
        """Name and reason."""
        return f"{self.name}: {self.why}"


@dataclass
class Estimate:
    """One hypergradient.

    Attributes:
        grad: ``dE/dlam``, in the structure of ``lam``; NaN where the adjoint solve broke down or diverged (a fixed number of
            steps under ``policy="ignore"`` is used all the same).
        certificate: how far it may be from the exact one.
        loss: the outer loss ``E(w, lam)`` that it was taken of.
        w: the inner variables at which it was taken.
        inner: statistics of the inner solve (None: there was none).
        adjoint: statistics of the adjoint solve (None: there was none).
        cost: what was spent.
        unused: the hyperparameters on which the outer loss does not depend, in this way of differentiating it: their
            hypergradient is exactly zero.
        note: what to change, where the adjoint iteration diverged.
        choice: which adjoint was chosen and why, under ``adjoint="auto"`` (None: it was given).
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

    def statuses(self) -> dict[str, Status]:
        """How the solves ended, under ``inner`` and ``adjoint``."""
        parts = {"inner": self.inner, "adjoint": self.adjoint}
        return {name: stats.status for name, stats in parts.items() if stats is not None}

    @property
    def status(self) -> Status:
        """The worst status of the solves."""
        return max(self.statuses().values(), default=Status.converged)

    @property
    def norm(self) -> float:
        """Euclidean norm of the hypergradient."""
        return tree_norm(self.grad)

    def metrics(self) -> dict[str, float]:
        """The numbers of an outer step, under the names that every task logs."""
        found: dict[str, float] = {}
        for name, stats in (("inner", self.inner), ("adjoint", self.adjoint)):
            if stats is not None:
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
        """Add the hypergradient to the ``.grad`` of the leaves that ``lam`` is, or was computed from (a space's map).

        Args:
            lam: the tree that the estimate was taken at.
        """
        pairs = [(x, g) for x, g in zip(optree.tree_leaves(lam), optree.tree_leaves(self.grad), strict=True) if x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
