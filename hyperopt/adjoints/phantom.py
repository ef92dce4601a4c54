"""Phantom gradient: a few damped steps of the adjoint iteration.

    v_1 = damping g,     v_{t+1} = (1 - damping) v_t + damping (J^T v_t + g),     t = 1 .. steps - 1

This is the Neumann form, whose memory does not grow with ``steps``; at a fixed point it equals unrolling that many damped steps
of the map. The damping makes the series converge where the plain one does not (a real spectrum below -1). Costs ``steps`` vjps,
the closing one included.

Reference: Geng et al., NeurIPS 2021, arXiv 2111.05177, section 3 (unrolling-based and Neumann-series-based phantom gradients).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.adjoints.implicit import ImplicitAdjoint
from hyperopt.adjoints.onestep import truncated
from hyperopt.linsolve.base import MatVec
from hyperopt.settings import PhantomSettings
from hyperopt.solvers.iterate import Iterate
from hyperopt.status import AdjointBox


@dataclass(frozen=True)
class Phantom(PhantomSettings, ImplicitAdjoint):
    """The phantom gradient; settings in ``PhantomSettings``."""

    exact = False
    remedy = "Phantom never is; use an exact adjoint (adjoint=neumann, adjoint=gmres)"

    def solve(
        self,
        matvec: MatVec,
        b: Tensor,
        start: Tensor | None,
        what: str,
        box: AdjointBox,
        *,
        forward: Iterate | None = None,
        trace: bool = False,
    ) -> Tensor:
        """The damped steps."""
        with torch.no_grad():
            v, residual = self.damping * b, b
            for _ in range(self.steps - 1):
                image = matvec(v) + b
                residual, v = image - v, torch.lerp(v, image, self.damping)
        norm = torch.linalg.vector_norm(residual, dim=1)
        box.stats, box.v = truncated(b, norm, self.steps - 1, "Phantom"), v.detach()
        return v
