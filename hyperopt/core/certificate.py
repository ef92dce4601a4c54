"""The certificate of a hypergradient: how far it may be from the exact one.

If the cell and the outer loss declare their constants, ``error_bound`` bounds ``||hypergradient - exact||_2`` in exact
arithmetic, as in Grazzi et al. (ICML 2020, arXiv 2006.16218, theorem 2.2) but from the measured residuals. For each row, with
``q >= ||d_w phi||``, the residual ``r`` of the state and the residual ``s`` of the adjoint system:

    eps   = r / (1 - q)                                                   distance of the state from its fixed point
    delta = (s + eps (jacobian_lipschitz |v| + outer_lipschitz)) / (1 - q) distance of v from the exact adjoint
    error <= sum over rows of  direct_lipschitz eps + input_lipschitz eps |v| + input_norm delta

Otherwise ``error_estimate`` uses the contraction factor seen in the decay of the residuals instead of ``q``, and the size of
the hypergradient instead of the constants. It is an estimate and not a bound, and NaN if that factor is not below 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.status import AdjointBox, Solution, SolveStats, Status
from hyperopt.core.text import described

# For these methods the residual is valid even after a fixed number of steps: it was measured at the value or one step before.
MEASURED = ("Picard", "Neumann", "GMRES", "BiCGStab", "CG", "NormalCG", "Dense", "Nystrom")


@dataclass(frozen=True, repr=False)
class Constants:
    """Constants that a cell and an outer loss declare: numbers, or one number for each row, shape (rows,).

    Attributes:
        contraction: ``q < 1`` with ``||d_w phi|| <= q`` everywhere, in the Euclidean norm.
        jacobian_lipschitz: Lipschitz constant of ``w -> d_w phi``.
        input_norm: norm of ``d_lam phi`` in a ball of radius eps around the state, for all hyperparameters together.
        input_lipschitz: Lipschitz constant of ``w -> d_lam phi``.
        outer_lipschitz: Lipschitz constant of ``w -> d_w E``, the part of one row.
        direct_lipschitz: Lipschitz constant of ``w -> d_lam E``, the part of one row.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218, theorem 2.2.

    Example:
        >>> import hyperopt
        >>> hyperopt.Constants(contraction=0.5, jacobian_lipschitz=0.0, input_norm=1.0, input_lipschitz=0.0)
        Constants(contraction=0.5, jacobian_lipschitz=0, input_norm=1, input_lipschitz=0, outer_lipschitz=0, direct_lipschitz=0)
    """

    contraction: float
    jacobian_lipschitz: float
    input_norm: Tensor | float
    input_lipschitz: Tensor | float
    outer_lipschitz: Tensor | float = 0.0
    direct_lipschitz: Tensor | float = 0.0

    def __repr__(self) -> str:
        return described(self, **vars(self))


@dataclass(frozen=True, repr=False)
class Certificate:
    """The error of one hypergradient.

    Attributes:
        error: bound or estimate of ``||hypergradient - exact||_2``; NaN if it cannot be estimated.
        is_bound: whether ``error`` is a bound.
        contraction: the contraction factor that was used, declared or else estimated.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218, theorem 2.2.

    Example:
        >>> import torch, hyperopt
        >>> certificate = hyperopt.Certificate(error=1e-3, is_bound=False, contraction=0.9)
        >>> certificate.is_bound  # an estimate, so the exact error may be larger
        False
    """

    error: float
    is_bound: bool
    contraction: float

    def __repr__(self) -> str:
        return described(self, **vars(self))


UNKNOWN = Certificate(math.nan, False, math.nan)
"""The certificate where nothing is solved to a tolerance, so that the error is unknown."""


def state_error(stats: SolveStats, contraction: float) -> Tensor:
    """Return a bound on the distance of each row from its fixed point, ``r / (1 - q)``, shape (rows,)."""
    return stats.residual * stats.scale / (1 - contraction)


def certify(solution: Solution, hypergradient_norm: float, constants: Constants | None = None) -> Certificate:
    """Return the certificate of the hypergradient of the latest backward pass through ``solution``.

    Args:
        solution: a solution through which backward has run with the implicit adjoint.
        hypergradient_norm: Euclidean norm of the hypergradient over all hyperparameters.
        constants: constants of the cell and the outer loss, if they are known.

    Returns:
        A bound if the constants are given and apply, else an estimate.

    Raises:
        ValueError: no implicit backward has been made through ``solution``.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218, theorem 2.2.

    Example:
        >>> import torch, hyperopt
        >>> b = torch.ones(1, 1, requires_grad=True)
        >>> solution = hyperopt.fixed_point(lambda w: 0.5 * w + b, torch.zeros(1, 1), solver=hyperopt.Picard(rtol=1e-2))
        >>> solution.value.square().sum().backward()  # dE/db = 8 b
        >>> known = hyperopt.Constants(0.5, jacobian_lipschitz=0.0, input_norm=1.0, input_lipschitz=0.0, outer_lipschitz=2.0)
        >>> certificate = hyperopt.certify(solution, float(b.grad.norm()), known)
        >>> certificate.is_bound, abs(float(b.grad) - 8) <= certificate.error
        (True, True)
    """
    forward, box = solution.forward, solution.box
    if box.stats is None or box.v is None:
        raise ValueError("no implicit backward was made through this solution; call backward first")
    adjoint, size = box.stats, torch.linalg.vector_norm(box.v, dim=1)
    usable = all(stats.status < Status.coupled_rows for stats in (forward, adjoint))
    plain = not solution.layout.scales  # the constants are for Euclidean norms
    if constants is not None and plain and usable and _measured(forward) and _measured(adjoint):
        eps = state_error(forward, constants.contraction)
        residual = adjoint.residual * adjoint.scale
        delta = (residual + eps * (constants.jacobian_lipschitz * size + constants.outer_lipschitz)) / (1 - constants.contraction)
        rows = eps * (constants.direct_lipschitz + constants.input_lipschitz * size) + constants.input_norm * delta
        return Certificate(float(rows.sum()), True, constants.contraction)
    return _estimate(forward, box, size, hypergradient_norm)


def _measured(stats: SolveStats) -> bool:
    """Whether the residual bounds that of the value, because it was measured there or one contracting step before."""
    return stats.status != Status.fixed_steps or stats.method in MEASURED


def _estimate(forward: SolveStats, box: AdjointBox, size: Tensor, norm: float) -> Certificate:
    """Estimate the error of the hypergradient from the relative errors of the state and of the adjoint."""
    adjoint = box.stats
    assert adjoint is not None
    factors = [float(stats.contraction) for stats in (forward, adjoint)]
    known = [factor for factor in factors if not math.isnan(factor)]
    factor = max(known, default=math.nan)
    if factor >= 1 or not math.isfinite(norm):
        return Certificate(math.nan, False, factor)
    # An error is (I - J)^-1 times a residual. Two things tell how much larger it may be. The decay of the residuals is one, but
    # it is too optimistic for an accelerated method. |v| / |g| is the other, since v = (I - J^T)^-1 g, but it is for the
    # direction of g, and a map that is not normal may amplify others more. Their geometric mean lies between the two.
    decay = 1.0 if math.isnan(factor) else 1 / (1 - factor)
    grown = torch.where(adjoint.scale > 0, size / adjoint.scale, 0.0)  # |v| / |g|
    growth = (decay * grown.clamp(min=1.0)).sqrt()
    state = _ratio(forward.residual * forward.scale * growth, forward.scale)
    # |v| has already grown with |g|. Relative to |v|, an error in g or of the solve grows by the rest of the factor.
    left = growth / grown.clamp(min=1.0)
    error = _ratio(adjoint.residual * adjoint.scale * growth, size) + state * (1 + float(left.max()))
    return Certificate(error * norm, False, factor)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Return ``|part| / |whole|`` over all rows, 0 where both are 0."""
    top, bottom = float(torch.linalg.vector_norm(part)), float(torch.linalg.vector_norm(whole))
    return 0.0 if top == 0 else top / bottom if bottom > 0 else math.inf
