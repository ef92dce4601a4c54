"""The nonfinite check and the clipping that every hypergradient passes through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyperopt.tasks.base import HypergradientError


class HypergradientCheck:
    """Refuses a hypergradient that is not finite, measures its norm for each group, and clips it.

    The norm is ``sqrt(sum_groups |g|^2)`` in float64, so that a finite float32 hypergradient cannot overflow it. With
    ``clip_norm=c`` every gradient is scaled in place by ``min(1, c / norm)``.

    Args:
        clip_norm: largest norm that is not scaled down (None: no clipping).

    Attributes:
        step: index of the present outer step; the loop sets it.
        norms: ``hypergrad/norm`` and ``hypergrad/norm/<group>`` of the step's first evaluation, before clipping.
    """

    def __init__(self, clip_norm: float | None = None) -> None:
        """Start before step 0."""
        self.clip_norm = clip_norm
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start an outer step."""
        self.step = step
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Check, measure and clip ``{group: [gradient, ...]}`` in place.

        Raises:
            HypergradientError: an entry is NaN or infinite; the message names the step and the groups.
        """
        # One norm for each tensor, all read in one transfer: the only synchronisation with a GPU here.
        tensors = [tensor for group in gradients.values() for tensor in group]
        found = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).tolist() if tensors else []
        each = iter(found)
        norms = {name: math.hypot(*(next(each) for _ in group)) for name, group in gradients.items()}
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if bad:
            counts = ", ".join(f"{name} ({sum(int((~t.isfinite()).sum()) for t in gradients[name])} entries)" for name in bad)
            raise HypergradientError(
                f"step {self.step}: the hypergradient of group {counts} is not finite; lower optimizer.lr, check the "
                f"data, or use precision=float64"
            )
        total = math.hypot(*norms.values())
        if not self.norms:
            self.norms = {"hypergrad/norm": total, **{f"hypergrad/norm/{name}": norm for name, norm in norms.items()}}
        if self.clip_norm is not None and total > self.clip_norm:
            for tensor in tensors:
                tensor.mul_(self.clip_norm / total)
