"""Two coupled states of different shapes: ``(x*, y*) = f(x*, y*)``, each with its own size, solved as one fixed point.

    x = tanh(x M_xx + y M_yx + u_x)      x: (rows, n)
    y = tanh(x M_xy + y M_yy + u_y)      y: (rows, p, q)

The four blocks are parts of one matrix M of norm below 1, so that the pair contracts jointly even if a half alone does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperopt.nn.contractive import ContractiveMatrix
from hyperopt.nn.equilibrium import draw
from hyperopt.nn.state import zero_state

State = tuple[Tensor, Tensor]


def coupled_map(state: State, u_x: Tensor, u_y: Tensor, M: Tensor) -> State:
    """Return ``f(x, y)``; shapes: x, u_x (rows, n); y, u_y (rows, p, q); M (n + p q, n + p q)."""
    x, y = state
    n, flat = x.shape[1], y.flatten(1)
    new_x = torch.tanh(x @ M[:n, :n] + flat @ M[n:, :n] + u_x)
    new_y = torch.tanh((x @ M[:n, n:] + flat @ M[n:, n:]).view_as(y) + u_y)
    return new_x, new_y


class CoupledCell(nn.Module):
    """The cell of the two states; ``DEQ(CoupledCell(...))`` is the layer that solves for them.

    Args:
        features: number of entries of one input.
        x_size: n, number of entries of one x.
        y_shape: (p, q), shape of one y.
        matrix: M, of size ``n + p q``.
        generator: generator of the input weights (None: torch's global one).

    Raises:
        ValueError: a size is below 1, or the matrix has another size.
    """

    phi = staticmethod(coupled_map)
    row_args = (0, 1)

    def __init__(
        self,
        features: int,
        x_size: int,
        y_shape: Sequence[int],
        matrix: ContractiveMatrix,
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
        self.B = nn.Parameter(draw((size, features), features, features**-0.5, generator))

    def initial(self, inputs: Tensor) -> State:
        """Return zeros. shapes: (rows, features) to (rows, n) and (rows, p, q)."""
        rows = inputs.shape[0]
        return zero_state(inputs, rows, self.x_size), zero_state(inputs, rows, *self.y_shape)

    def terms(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``u_x``, ``u_y`` and M, which are computed once a solve."""
        u = inputs @ self.B.T
        return u[:, : self.x_size], u[:, self.x_size :].unflatten(1, self.y_shape), self.recurrent.matrix()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups M and B."""
        return {"M": list(self.recurrent.parameters()), "B": [self.B]}
