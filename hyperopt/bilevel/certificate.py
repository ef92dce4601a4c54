"""The certificate of a trained problem's hypergradient: that of ``hyperopt.core.certificate``, on the gradient-step map.

    eps   = |grad L(w)| / mu                                               distance of w from the minimum
    delta = (|b - H u| + eps (hessian_lipschitz |u| + outer_lipschitz)) / mu        distance of u from the exact one
    error <= direct_lipschitz eps + mixed_lipschitz eps |u| + mixed_norm delta

for a strongly convex inner loss whose constants are declared; the residuals were measured at ``w``. Elsewhere an estimate, with
``|b| / |u|``, a curvature that the adjoint has met, for the least, and the largest ``|H v| / |v|`` of the products made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperopt.bilevel.problem import InnerConstants
from hyperopt.bilevel.step_map import StepMap
from hyperopt.core.certificate import Certificate, Constants, certify
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
    """The certificate.

    Args:
        operator: the map, after the adjoint solve.
        adjoint: its statistics.
        trained: those of the training.
        u: ``H^{-1} b``, as found. shape: (1, dim)
        b: ``d_w E``. shape: (1, dim)
        norm: of the hypergradient.
        constants: of the losses, where they are known.
        iterates: whether the adjoint iterated the map, so that its step says something about it.
    """
    size, scale = float(torch.linalg.vector_norm(u)), float(torch.linalg.vector_norm(b))
    largest = float(operator.largest)
    step = operator.step
    if constants is not None:
        step, factor = 1 / constants.smoothness, 1 - constants.strong_convexity / constants.smoothness
    else:
        if not iterates and not largest > 0:
            return Certificate(math.nan, False, math.nan)  # no step, and no product that would say how long one could be
        if not iterates:
            step = 1 / largest
        factor = 1 - step * scale / size if size > 0 and not math.isnan(largest) else math.nan
    forward = at_point(operator, step, factor, trained)
    box = AdjointBox(adjoint, u / step)
    solution = Solution(None, forward, operator.curvature.layout, box)
    return certify(solution, norm, None if constants is None else _constants(constants, step))


def _constants(known: InnerConstants, step: float) -> Constants:
    """Those of the map with this step."""
    return Constants(
        contraction=1 - step * known.strong_convexity,
        jacobian_lipschitz=step * known.hessian_lipschitz,
        input_norm=step * known.mixed_norm,
        input_lipschitz=step * known.mixed_lipschitz,
        outer_lipschitz=known.outer_lipschitz,
        direct_lipschitz=known.direct_lipschitz,
    )


def at_point(operator: StepMap, step: float, contraction: float, trained: SolveStats | None) -> SolveStats:
    """How far ``w`` is from a fixed point of the map, as the statistics of a solve: the residual is that at ``w`` itself."""
    curvature = operator.curvature
    w = curvature.matrix([leaf.detach() for leaf in curvature.w.flat])
    difference = step * torch.linalg.vector_norm(curvature.gradient, dim=1)
    scale = torch.linalg.vector_norm(w - step * curvature.gradient, dim=1)
    # A fixed number of steps is no statement about w, but the residual here is measured, whatever was asked for.
    ended = Status.converged if trained is None or trained.status == Status.fixed_steps else trained.status
    residual = relative(difference, scale)
    code = torch.full_like(residual, int(ended), dtype=torch.long)
    return SolveStats(code, torch.ones_like(code), residual, scale, contraction=contraction, method="gradient step")
