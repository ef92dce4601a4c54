"""The tanh fixed-point layer ``z = tanh(W z + x)`` of the implicit-layers tutorial, with its Jacobian in closed form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.nn.contractive import normalise
from hyperopt.nn.deq import DEQ
from hyperopt.nn.equilibrium import Cell, TanhAffine, draw


class TanhCell(Cell):
    """``phi(z_i) = tanh(W z_i + x_i)``; only a norm keeps W a contraction.

    Args:
        width: number of entries of z and of x.
        init_scale: standard deviation of the normal initial entries of W (None: uniform, as in ``torch.nn.Linear``).
        norm: normalisation of W: None, ``"weight"``, or ``"spectral"``, which makes the spectral norm of W 1.

    Attributes:
        weight: W, a parameter, or made from one by the norm. shape: (width, width)

    Raises:
        ValueError: the width is below 1, or the norm unknown.
    """

    def __init__(self, width: int, init_scale: float | None = None, norm: str | None = None) -> None:
        """Draw W."""
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1; change width")
        self.state_size = width
        self.phi = TanhAffine()
        self.weight = nn.Parameter(draw((width, width), width, init_scale))
        normalise(self, norm)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and ``W^T``; a norm is computed here, once for each solve.

        Raises:
            ValueError: the rows of x have another size.
        """
        if x.dim() != 2 or x.shape[1] != self.state_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the layer takes (rows, width={self.state_size}); change width or the "
                f"layer before"
            )
        return x, self.weight.T


class TanhFixedPoint(DEQ):
    """A layer that maps x to the solution of ``z = tanh(W z + x)``.

    Args:
        width: number of entries of z and of x.
        solver: how it is found (None: Picard); ``Newton()`` gets the Jacobian without products.
        adjoint: how it is differentiated (None: implicit, by the Neumann series).
        init_scale: standard deviation of the normal initial entries of W (None: uniform, as in ``torch.nn.Linear``).
        norm: normalisation of W: None, ``"weight"`` or ``"spectral"``.
        others: keywords of ``DEQ``.

    Attributes:
        weight: the weight W of ``cell``. shape: (width, width)

    Raises:
        TypeError, ValueError: an argument is of another kind, or a number is out of range.

    Reference: Kolter, Duvenaud & Johnson, Deep Implicit Layers, NeurIPS 2020 tutorial, chapter 1.

    Example:
        >>> import torch, hyperopt
        >>> layer, x = hyperopt.nn.TanhFixedPoint(3, init_scale=0.1), torch.ones(1, 3)
        >>> z = layer(x)
        >>> torch.allclose(z, torch.tanh(z @ layer.weight.T + x), atol=1e-4)
        True
    """

    def __init__(
        self,
        width: int,
        solver: FixedPointSolver | None = None,
        adjoint: Adjoint | None = None,
        *,
        init_scale: float | None = None,
        norm: str | None = None,
        **others: Any,
    ) -> None:
        """Build the cell."""
        super().__init__(TanhCell(width, init_scale, norm), solver, adjoint, **others)

    @property
    def weight(self) -> Tensor:
        """The weight W."""
        return self.cell.weight  # pyright: ignore[reportReturnType]
