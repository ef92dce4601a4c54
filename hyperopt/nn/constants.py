"""Constants of the tanh-affine model with a linear classifier and the mean cross-entropy, for a certificate that is a bound.

For one of N rows, ``z = w A + B x + c``, ``s = 1 - tanh(z)^2``, ``q = |A|_2``, ``R = (|w*|^2 + |x|^2 + 1)^(1/2)``, logits
``W w + b``, with ``|tanh''| <= t = 4 / (3 sqrt 3)`` and ``|diag(p) - p p^T|_2 <= 1/2`` for softmax probabilities p:

    |d_w phi| <= q                                          |d_w phi (w) - d_w phi (w')| <= t q^2 |w - w'|
    |d_(A, B, c) phi| <= R                                  |d_(A, B, c) phi (w) - ... (w')| <= (1 + t q R) |w - w'|
    |d_w E (w) - d_w E (w')| <= |W|^2 / (2 N) |w - w'|
    |d_(W, b) E (w) - ... (w')| <= (sqrt 2 + |W| (R + 1) / 2) / N |w - w'|
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperopt.core.certificate import Constants, state_error
from hyperopt.nn.contractive import ProjectedMatrix, spectral_norm_bound
from hyperopt.nn.equilibrium import EquilibriumCell, EquilibriumModel, TanhAffine

CURVATURE = 4 / (3 * math.sqrt(3))  # the largest |tanh''|


@torch.no_grad()
def mean_cross_entropy_constants(model: EquilibriumModel, x: Tensor) -> Constants | None:
    """Return the constants at the model's latest solve for the mean cross-entropy on ``x``, shape (rows, features).

    They are None for another cell, and for an A that is a nonlinear function of its parameters.
    """
    cell, solution = model.cell, model.solution
    if solution is None or not isinstance(cell, EquilibriumCell) or not isinstance(cell.phi, TanhAffine):
        return None
    if not isinstance(cell.recurrent, ProjectedMatrix):
        return None
    q = float(cell.recurrent.norm_bound())
    if not q < 1:
        return None
    rows = max(1, x.shape[0])
    top = float(spectral_norm_bound(model.classifier.weight))
    eps = state_error(solution.forward, q).double()
    size, features = (torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in (solution.value, x))
    size = size + eps
    reach = (size.square() + features.square() + 1).sqrt()
    return Constants(
        contraction=q,
        jacobian_lipschitz=CURVATURE * q * q,
        input_norm=reach,
        input_lipschitz=1 + CURVATURE * q * reach,
        outer_lipschitz=top * top / (2 * rows),
        direct_lipschitz=(math.sqrt(2) + top * (reach + 1) / 2) / rows,
    )
