"""The certificate of a hypergradient: how far it may be from the exact one.

Where the cell and the outer loss declare their constants, ``error_bound`` is a bound on ``||hypergradient - exact||_2`` in exact
arithmetic, row by row, in the manner of Grazzi et al. (ICML 2020, arXiv 2006.16218, theorem 2.2) but a posteriori, from the
residuals that were measured. With ``q >= ||d_w phi||``, residual ``r`` of the state and ``s`` of the adjoint system of a row:

    eps   = r / (1 - q)                                                   distance of the state from its fixed point
    delta = (s + eps (jacobian_lipschitz |v| + outer_lipschitz)) / (1 - q) distance of v from the exact adjoint
    error <= sum over rows of  direct_lipschitz eps + input_lipschitz eps |v| + input_norm delta

Elsewhere ``error_estimate`` puts the contraction factor seen in the decay of the residuals in the place of q, and the size of the
hypergradient in the place of the constants: an estimate, not a bound, and NaN where that factor is not below 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.status import AdjointBox, Solution, SolveStats, Status

# Methods whose residual is one even after a fixed number of steps: a contracting step before the value, or at the value itself.
MEASURED = ("Picard", "Neumann", "GMRES", "BiCGStab", "CG", "NormalCG", "Dense", "Nystrom")


@dataclass(frozen=True)
class Constants:
    """What a cell and an outer loss declare about themselves; a number, or one for each row, shape (rows,).

    Attributes:
        contraction: ``q < 1`` with ``||d_w phi|| <= q`` everywhere, in the Euclidean norm.
        jacobian_lipschitz: of ``w -> d_w phi``.
        input_norm: of ``d_lam phi`` in a ball of radius eps around the state, all hyperparameters together.
        input_lipschitz: of ``w -> d_lam phi``.
        outer_lipschitz: of ``w -> d_w E``, one row's share.
        direct_lipschitz: of ``w -> d_lam E``, one row's share.
    """

    contraction: float
    jacobian_lipschitz: float
    input_norm: Tensor | float
    input_lipschitz: Tensor | float
    outer_lipschitz: Tensor | float = 0.0
    direct_lipschitz: Tensor | float = 0.0


@dataclass(frozen=True)
class Certificate:
    """Error of one hypergradient.

    Attributes:
        error: bound or estimate of ``||hypergradient - exact||_2``; NaN where nothing can be said.
        is_bound: whether it is a bound.
        contraction: the factor that it rests on: declared, else estimated.
    """

    error: float
    is_bound: bool
    contraction: float


def state_error(stats: SolveStats, contraction: float) -> Tensor:
    """Distance of each row from its fixed point, shape (rows,): ``r / (1 - q)``."""
    return stats.residual * stats.scale / (1 - contraction)


def certify(solution: Solution, hypergradient_norm: float, constants: Constants | None = None) -> Certificate:
    """The certificate of the hypergradient of the latest backward through ``solution``.

    Args:
        solution: after a backward with the implicit adjoint.
        hypergradient_norm: Euclidean norm of the hypergradient over all hyperparameters.
        constants: of the cell and the outer loss, where they are known.

    Raises:
        ValueError: no implicit backward has been made through ``solution``.
    """
    forward, box = solution.forward, solution.box
    if box.stats is None or box.v is None:
        raise ValueError("no implicit backward was made through this solution; call backward first")
    adjoint, size = box.stats, torch.linalg.vector_norm(box.v, dim=1)
    usable = all(stats.status < Status.coupled_rows for stats in (forward, adjoint))
    plain = not solution.layout.scales  # constants are those of Euclidean norms
    if constants is not None and plain and usable and _measured(forward) and _measured(adjoint):
        eps = state_error(forward, constants.contraction)
        residual = adjoint.residual * adjoint.scale
        delta = (residual + eps * (constants.jacobian_lipschitz * size + constants.outer_lipschitz)) / (1 - constants.contraction)
        rows = eps * (constants.direct_lipschitz + constants.input_lipschitz * size) + constants.input_norm * delta
        return Certificate(float(rows.sum()), True, constants.contraction)
    return _estimate(forward, box, size, hypergradient_norm)


def _measured(stats: SolveStats) -> bool:
    """Whether the residual bounds that of the value: it was measured there, or one contracting step before."""
    return stats.status != Status.fixed_steps or stats.method in MEASURED


def _estimate(forward: SolveStats, box: AdjointBox, size: Tensor, norm: float) -> Certificate:
    """Relative errors of state and adjoint, carried over to the hypergradient."""
    adjoint = box.stats
    assert adjoint is not None
    factors = [float(stats.contraction) for stats in (forward, adjoint)]
    known = [factor for factor in factors if not math.isnan(factor)]
    factor = max(known, default=math.nan)
    if factor >= 1 or not math.isfinite(norm):
        return Certificate(math.nan, False, factor)
    # An error is (I - J)^-1 times a residual. How much larger that may be, two things tell: the decay of the residuals, though
    # that of an accelerated method says too little, and v = (I - J^T)^-1 g itself, though g is another direction, in which a
    # map that is not normal may do much more. Between the two lies their geometric mean.
    decay = 1.0 if math.isnan(factor) else 1 / (1 - factor)
    grown = torch.where(adjoint.scale > 0, size / adjoint.scale, 0.0)  # |v| / |g|
    growth = (decay * grown.clamp(min=1.0)).sqrt()
    state = _ratio(forward.residual * forward.scale * growth, forward.scale)
    # Relative to |v|, which has grown with |g| already, an error in g or of the solve grows by what is left.
    left = growth / grown.clamp(min=1.0)
    error = _ratio(adjoint.residual * adjoint.scale * growth, size) + state * (1 + float(left.max()))
    return Certificate(error * norm, False, factor)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """``|part| / |whole|`` over all rows, 0 where both are 0."""
    top, bottom = float(torch.linalg.vector_norm(part)), float(torch.linalg.vector_norm(whole))
    return 0.0 if top == 0 else top / bottom if bottom > 0 else math.inf
