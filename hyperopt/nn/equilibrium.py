"""The equilibrium model ``w_i = phi(w_i, x_i)`` with a linear classifier on ``w_i``, and its tanh-affine cell.

Everything that does not depend on the state (``B x_i + c``, the matrix A) is computed once for each call, in ``Cell.terms``,
outside of the loop.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.fixed_point import fixed_point
from hyperopt.core.operator import ClosedForm
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution
from hyperopt.nn.contractive import ContractiveMatrix
from hyperopt.nn.state import zero_state


class TanhAffine(nn.Module):
    """``phi(w, u, A) = tanh(w A + u)``, with its pullback in closed form."""

    def forward(self, w: Tensor, u: Tensor, A: Tensor) -> Tensor:
        """Return ``tanh(w A + u)``. shapes: w (rows, n), u (rows, n), A (n, n)."""
        return torch.addmm(u, w, A).tanh_()

    def pullback(self, w: Tensor, fw: Tensor, u: Tensor, A: Tensor) -> TanhAffinePullback:
        """Return the vector-Jacobian products of phi at ``w``, given ``fw = phi(w, u, A)``."""
        return TanhAffinePullback(w, fw, A)


class TanhAffinePullback(ClosedForm):
    """``v -> (v s) A^T`` for the state, ``v -> v s`` for u, ``v -> w^T (v s)`` for A, with ``s = 1 - tanh^2``.

    Args:
        w: the state. shape: (rows, n)
        fw: ``phi(w)``. shape: (rows, n)
        A: shape: (n, n)
    """

    differentiable = True

    def __init__(self, w: Tensor, fw: Tensor, A: Tensor) -> None:
        """Compute s once."""
        self.w, self.A = w, A
        self.slope = torch.addcmul(fw.new_ones(()), fw, fw, value=-1)

    def _rmatvec(self, v: Tensor) -> Tensor:
        """Return ``J^T v``, by one elementwise pass and one matrix product."""
        return (v * self.slope) @ self.A.T

    def _rmatvec_add(self, v: Tensor, b: Tensor) -> Tensor:
        """Return ``J^T v + b``, by the same matrix product."""
        return torch.addmm(b, v * self.slope, self.A.T)

    def _matvec(self, v: Tensor) -> Tensor:
        return (v @ self.A) * self.slope

    def closed_form(self) -> Tensor:
        """Return J of each row, ``J[i, j, k] = s[i, j] A[k, j]``. shape: (rows, n, n)."""
        return (self.slope[:, None, :] * self.A).mT  # column-major, for LAPACK

    def arguments(self, v: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return the products for ``(u, A)``, None where ``needs`` is false."""
        pulled = v * self.slope
        return pulled if needs[0] else None, self.w.T @ pulled if needs[1] else None


class Cell(nn.Module, ABC):
    """An inner map and its hyperparameters; derive from it for a cell of your own.

    Attributes:
        state_size: number of entries of one state.
        phi: the map, called ``phi(w, *terms)``; it may have a ``pullback``, as ``TanhAffine`` does.
        row_args: positions of the terms that have one row for each example.
    """

    state_size: int
    phi: Callable[..., Tensor]
    row_args: tuple[int, ...] = (0,)

    @abstractmethod
    def terms(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what phi needs beside the state, computed once a solve. shape of x: (rows, features)."""

    def initial(self, x: Tensor) -> Tensor:
        """Return the state where a solve starts: zeros. shape: (rows, state_size)."""
        return zero_state(x, x.shape[0], self.state_size)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups of hyperparameters by name."""
        parameters = list(self.parameters())
        return {"cell": parameters} if parameters else {}

    def project_(self) -> None:
        """Move the hyperparameters to where phi contracts; called after every update."""

    def compile_map(self) -> None:
        """Compile phi with ``torch.compile``, in place if it is a module, so that its pullback stays."""
        if isinstance(self.phi, nn.Module):
            self.phi.compile()
        else:
            self.phi = torch.compile(self.phi)


class ModuleCell(Cell):
    """An ordinary module whose ``forward(z, x)`` is the map; its parameters are the hyperparameters.

    Args:
        module: maps states, shape (rows, state_size), and inputs, shape (rows, features), to states.
        state_size: number of entries of one state.
    """

    def __init__(self, module: nn.Module, state_size: int) -> None:
        """Keep the module."""
        super().__init__()
        self.phi, self.state_size = module, state_size

    def terms(self, x: Tensor) -> tuple[Tensor]:
        """Return the input itself."""
        return (x,)


class EquilibriumCell(Cell):
    """``phi(w_i) = tanh(w_i A + B x_i + c)``, a contraction if ``|A| < 1``.

    Args:
        features: number of entries of one x_i.
        state_size: number of entries of one state w_i.
        recurrent: A, with ``state_size`` rows.
        bias: whether there is a ``c``, which starts at zero.
        input_scale: standard deviation of the normal initial entries of B (None: uniform, as in ``torch.nn.Linear``).
        generator: generator of B (None: torch's global one).

    Attributes:
        B: parameter. shape: (state_size, features)
        c: parameter, or None. shape: (state_size,)

    Raises:
        ValueError: a size is below 1, or the matrix has another size.
    """

    def __init__(
        self,
        features: int,
        state_size: int,
        recurrent: ContractiveMatrix,
        bias: bool = True,
        *,
        input_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Check the sizes and draw B."""
        super().__init__()
        for name, size in (("features", features), ("state_size", state_size)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1; change {name}")
        if recurrent.n != state_size:
            raise ValueError(f"recurrent is {recurrent.n} x {recurrent.n}, but state_size={state_size}; change one of them")
        self.features, self.state_size = features, state_size
        self.phi = TanhAffine()
        self.recurrent = recurrent
        self.B = nn.Parameter(draw((state_size, features), features, input_scale, generator))
        self.c = nn.Parameter(torch.zeros(state_size)) if bias else None

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``u = x B^T + c`` and A.

        Raises:
            ValueError: the rows of x have another size.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the cell takes (rows, features={self.features}); change features"
            )
        return functional.linear(x, self.B, self.c), self.recurrent.matrix()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups A, B and, with a bias, c."""
        groups = {"A": list(self.recurrent.parameters()), "B": [self.B]}
        return groups if self.c is None else {**groups, "c": [self.c]}

    def project_(self) -> None:
        """Project A."""
        self.recurrent.project_()


class EquilibriumModel(nn.Module):
    """``logits_i = classifier(w_i)`` at the fixed point ``w_i = phi(w_i, x_i)``.

    Args:
        cell: the inner map.
        classifier: maps states to logits.
        solver: how the fixed point is found (None: the default of ``hyperopt.fixed_point``).
        adjoint: how it is differentiated (None: the default of ``hyperopt.fixed_point``).
        policy: what to do if a solve fails; see ``hyperopt.fixed_point``.
        fallback: solvers tried in turn under ``policy="fallback"``.

    Attributes:
        solution: the latest solve, with a detached value; ``solution.adjoint`` is set by backward.
    """

    def __init__(
        self,
        cell: Cell,
        classifier: nn.Linear,
        solver: FixedPointSolver | None = None,
        adjoint: Adjoint | None = None,
        policy: str = "warn",
        fallback: Sequence[FixedPointSolver] = (),
    ) -> None:
        """Check that the sizes agree.

        Raises:
            ValueError: the classifier takes states of another size.
        """
        super().__init__()
        if classifier.in_features != cell.state_size:
            raise ValueError(
                f"the classifier takes {classifier.in_features} features, but the cell has state_size={cell.state_size}; "
                f"change one of them"
            )
        self.cell, self.classifier = cell, classifier
        self.solver, self.adjoint, self.policy, self.fallback = solver, adjoint, policy, tuple(fallback)
        self.solution: Solution | None = None

    def forward(self, x: Tensor, w0: Tensor | None = None, v0: Tensor | None = None, trace: bool = False) -> Tensor:
        """Return the logits. shape: (rows, classes).

        Args:
            x: inputs. shape: (rows, features)
            w0: where the solve starts (None: zero). shape: (rows, state_size)
            v0: where the adjoint solve starts, up to a factor for each row (None: at the gradient of the loss).
                shape: (rows, state_size)
            trace: whether to keep the residual after every iteration.
        """
        terms = self.cell.terms(x)
        if w0 is None:
            w0 = self.cell.initial(x)
        solution = fixed_point(
            self.cell.phi,
            w0,
            args=terms,
            rows="batch",
            row_args=self.cell.row_args,
            solver=self.solver,
            adjoint=self.adjoint,
            policy=self.policy,
            fallback=self.fallback,
            v0=v0,
            trace=trace,
        )
        self.solution = dataclasses.replace(solution, value=solution.value.detach())  # only the caller gets the graph
        return self.classifier(solution.value)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the cell's groups and ``classifier``."""
        return {**self.cell.groups(), "classifier": list(self.classifier.parameters())}


def draw(shape: tuple[int, ...], fan_in: int, scale: float | None, generator: torch.Generator | None = None) -> Tensor:
    """Return normal initial entries of deviation ``scale`` or, for None, uniform ones in ``+-1 / sqrt(fan_in)``.

    They are drawn in float64 and rounded to the default dtype, so that one seed gives the same model in every precision.
    """
    if scale is None:
        drawn = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(fan_in)
    else:
        drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(torch.get_default_dtype())


def linear_classifier(
    state_size: int, classes: int, scale: float | None = None, generator: torch.Generator | None = None
) -> nn.Linear:
    """Return a linear classifier with normal initial weights of deviation ``scale`` and zero bias.

    Without a ``scale``, both are uniform as in ``torch.nn.Linear``. They come from ``generator`` (None: torch's global one).
    """
    classifier = nn.Linear(state_size, classes)
    with torch.no_grad():
        classifier.weight.copy_(draw((classes, state_size), state_size, scale, generator))
        classifier.bias.copy_(draw((classes,), state_size, 0.0 if scale is not None else None, generator))
    return classifier
