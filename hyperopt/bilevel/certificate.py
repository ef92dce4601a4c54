"""The certificate of a trained problem's hypergradient: ``hyperopt.core.certificate`` applied to the gradient-step map.

    eps   = |grad L(w)| / mu                                               distance of w from the minimum
    delta = (|b - H u| + eps (hessian_lipschitz |u| + outer_lipschitz)) / mu        distance of u from the exact one
    error <= direct_lipschitz eps + mixed_lipschitz eps |u| + mixed_norm delta

This is a bound if the inner loss is strongly convex and its constants are declared; the residuals were measured at ``w``.
Otherwise the result is an estimate: ``|b| / |u|``, a curvature that the adjoint solve has met, stands in for the smallest
eigenvalue, and the largest ``|H v| / |v|`` of all products for the largest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperopt.bilevel.problem import InnerConstants
from hyperopt.bilevel.step_map import StepMap
from hyperopt.core.certificate import UNKNOWN, Certificate, Constants, certify
from hyperopt.core.loop import relative
from hyperopt.core.status import AdjointBox, Solution, SolveStats, Status


def certificate(
    operator: StepMap,
    adjoint: SolveStats,
    trained: SolveStats | None,
    u: Tensor,
    b: Tensor,
    norm: float,
    constants: InnerConstants | None,
    iterates: bool,
) -> Certificate:
    """Return the certificate of a hypergradient.

    Args:
        operator: the gradient-step map, after the adjoint solve.
        adjoint: statistics of the adjoint solve.
        trained: statistics of the training (None: there was none).
        u: the computed ``H^{-1} b``. shape: (1, dim)
        b: ``d_w E``. shape: (1, dim)
        norm: norm of the hypergradient.
        constants: constants of the losses (None: not declared).
        iterates: whether the adjoint solve iterated the map, so that its step matters.
    """
    size, scale = float(torch.linalg.vector_norm(u)), float(torch.linalg.vector_norm(b))
    largest = float(operator.largest)
    step = operator.step
    if constants is not None:
        step, factor = 1 / constants.smoothness, 1 - constants.strong_convexity / constants.smoothness
    else:
        if not iterates and not largest > 0:
            return UNKNOWN  # neither a step nor a product from which to choose one
        if not iterates:
            step = 1 / largest
        factor = 1 - step * scale / size if size > 0 and not math.isnan(largest) else math.nan
    forward = at_point(operator, step, factor, trained)
    box = AdjointBox(adjoint, u / step)
    solution = Solution(None, forward, operator.curvature.w.layout, box)
    return certify(solution, norm, None if constants is None else _constants(constants, step))


def _constants(known: InnerConstants, step: float) -> Constants:
    """Return the constants of the gradient-step map with this step."""
    return Constants(
        contraction=1 - step * known.strong_convexity,
        jacobian_lipschitz=step * known.hessian_lipschitz,
        input_norm=step * known.mixed_norm,
        input_lipschitz=step * known.mixed_lipschitz,
        outer_lipschitz=known.outer_lipschitz,
        direct_lipschitz=known.direct_lipschitz,
    )


def at_point(operator: StepMap, step: float, contraction: float, trained: SolveStats | None) -> SolveStats:
    """Return how far ``w`` is from a fixed point of the map, as statistics of a solve; the residual is measured at ``w``."""
    curvature = operator.curvature
    difference = step * torch.linalg.vector_norm(curvature.gradient, dim=1)
    scale = torch.linalg.vector_norm(curvature.w.point - step * curvature.gradient, dim=1)
    # After a fixed number of steps the status says nothing about w, but this residual is measured.
    ended = Status.converged if trained is None or trained.status == Status.fixed_steps else trained.status
    residual = relative(difference, scale)
    code = torch.full_like(residual, int(ended), dtype=torch.long)
    return SolveStats(code, torch.ones_like(code), residual, scale, contraction=contraction, method="gradient step")
