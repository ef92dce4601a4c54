"""Two coupled states of different shapes: ``(x*, y*) = f(x*, y*)``, each with its own size, solved as one fixed point.

    x = tanh(x M_xx + y M_yx + u_x)      x: (rows, n)
    y = tanh(x M_xy + y M_yy + u_y)      y: (rows, p, q)

The four blocks are parts of one matrix M of norm below 1, so that the pair contracts jointly: either half alone need not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt.nn.contractive import ContractiveMatrix
from hyperopt.primitive import fixed_point
from hyperopt.status import Solution

State = tuple[Tensor, Tensor]


def coupled_map(state: State, u_x: Tensor, u_y: Tensor, M: Tensor) -> State:
    """Return ``f(x, y)``; shapes: x, u_x (rows, n); y, u_y (rows, p, q); M (n + p q, n + p q)."""
    x, y = state
    n, flat = x.shape[1], y.flatten(1)
    new_x = torch.tanh(x @ M[:n, :n] + flat @ M[n:, :n] + u_x)
    new_y = torch.tanh((x @ M[:n, n:] + flat @ M[n:, n:]).view_as(y) + u_y)
    return new_x, new_y


class CoupledModel(nn.Module):
    """Inputs to the two equilibrium states.

    Args:
        features: entries of one input.
        x_size: n, entries of one x.
        y_shape: (p, q), shape of one y.
        matrix: M, of size ``n + p q``.
        solver, adjoint, policy, fallback: see ``hyperopt.fixed_point``.
        generator: draws the input weights (None: torch's global one).

    Attributes:
        solution: the latest solve, its value detached.

    Raises:
        ValueError: a size below 1, or a matrix of another size.
    """

    def __init__(
        self,
        features: int,
        x_size: int,
        y_shape: Sequence[int],
        matrix: ContractiveMatrix,
        solver: Any = None,
        adjoint: Any = None,
        policy: str = "warn",
        fallback: Sequence[Any] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Check the sizes and draw the input weights."""
        super().__init__()
        p, q = y_shape
        if min(features, x_size, p, q) < 1:
            raise ValueError(f"features={features}, x_size={x_size} and y_shape={tuple(y_shape)} must be at least 1; change them")
        size = x_size + p * q
        if matrix.n != size:
            raise ValueError(f"matrix is {matrix.n} x {matrix.n}, but x and y have {size} entries; change its size")
        self.x_size, self.y_shape = x_size, (p, q)
        self.recurrent = matrix
        drawn = torch.randn(size, features, generator=generator, dtype=torch.float64) / features**0.5
        self.B = nn.Parameter(drawn.to(torch.get_default_dtype()))
        self.solver, self.adjoint, self.policy, self.fallback = solver, adjoint, policy, tuple(fallback)
        self.solution: Solution | None = None

    def forward(self, inputs: Tensor, trace: bool = False) -> State:
        """Return ``(x*, y*)``; shape of inputs: (rows, features). ``trace`` keeps the residual of every iteration."""
        u = inputs @ self.B.T
        u_x, u_y = u[:, : self.x_size], u[:, self.x_size :].unflatten(1, self.y_shape)
        solution = fixed_point(
            coupled_map,
            (torch.zeros_like(u_x), torch.zeros_like(u_y)),
            args=(u_x, u_y, self.recurrent.matrix()),
            row_args=(0, 1),
            solver=self.solver,
            adjoint=self.adjoint,
            policy=self.policy,
            fallback=self.fallback,
            trace=trace,
        )
        x, y = solution.value
        self.solution = dataclasses.replace(solution, value=(x.detach(), y.detach()))
        return x, y

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups M and B."""
        return {"M": list(self.recurrent.parameters()), "B": [self.B]}
