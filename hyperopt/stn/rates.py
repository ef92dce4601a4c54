r"""Rates that need no tuning: every step is measured in what the training itself shows of its scales.

$$\Delta p = -\eta_t \, s \, \frac{g}{\sqrt{\max(v, g^2) + c^2}}, \qquad \eta_t = \tfrac12 \eta \, (1 + \cos(\pi t / T))$$

with the gradient g and the running mean v of its square. For the hyperparameters s is the scale sigma of their perturbation, c
the running mean of the slope ``dL_valid / d sigma``, and eta 0.4. For the weights s = 1, for the response s = 1 / sigma, since it
moves the weights of a row by sigma times itself; both have c = 0 and eta 0.008, and are Adam. T is the length of the run in
rounds; without it the rates do not fall.

Adam's v goes back about 100 updates (beta 0.99, where 0.999 is usual): a network that learns has gradients thousands of times
smaller than its first ones, and a v that remembers those keeps the steps short for the rest of a run.

The slope measures the curvature: ``dL/d sigma = sigma L''`` for a normal perturbation (Stein's identity). So where L bends over
the width of the perturbation, the step is the Newton step ``-eta g / |L''|``. Where it is straight, the step is eta sigma at
most, since the response is learned only as far as sigma. There is no momentum: gradients from before would carry a
hyperparameter out of the region in which they mean something. v remembers (beta 0.999) how large the gradients were while the
network knew little, so a hyperparameter stands still when its gradients are small against these, and mostly noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from hyperopt.bilevel.outer import Make, OuterOptimizer, as_outer_optimizer

BETA = 0.999
"""Of the running means of a hyperparameter's gradients."""
BETAS = (0.9, 0.99)
"""Of Adam for the weights and their response."""
KIND: dict[str, Make] = {"weights": partial(Adam, betas=BETAS), "scales": Adam, "values": SGD}
ETA = {"weights": 0.008, "scales": 0.003, "values": 0.4}


def optimizer_of(name: str, given: OuterOptimizer | Make | None, rounds: int | None, sigma: Tensor) -> OuterOptimizer:
    """Return the optimizer that a user gives, or the default one of the weights with their response, the scales, or the values.

    Args:
        name: ``weights``, ``scales`` or ``values``, as the user's argument is called; one that is given may be ``response``.
        given: the user's optimizer (None: the default one).
        rounds: the length of the run (None: not known, and the rate is constant).
        sigma: the initial scales, whose geometric mean counts for the response. shape: (H,)
    """
    if given is not None:
        return as_outer_optimizer(given, name)

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        mean = float(sigma.log().mean().exp())
        return KIND[name]([{**group, "lr": ETA[name] / (mean if group["name"] == "response" else 1.0)} for group in groups])

    falling = None if rounds is None or name == "scales" else partial(CosineAnnealingLR, T_max=rounds)
    return OuterOptimizer(make, falling)


class MeasuredGradient:
    """Turns the gradient of the hyperparameters into ``sigma g / sqrt(max(v, g^2) + c^2)``, for an optimizer such as SGD.

    Args:
        like: a tensor of the hyperparameters' shape, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        """Start before the first gradient."""
        self.count = 0
        self.square, self.slope = torch.zeros_like(like), torch.zeros_like(like)

    @torch.no_grad()
    def __call__(self, gradient: Tensor, slope: Tensor, sigma: Tensor) -> Tensor:
        """Return the scaled gradient.

        Args:
            gradient: ``dL / du``. shape: (H,)
            slope: ``dL / d sigma``, without the entropy. shape: (H,)
            sigma: the scales. shape: (H,)
        """
        self.count += 1
        self.square.lerp_(gradient.square(), 1 - BETA)
        self.slope.lerp_(slope, 1 - BETA)
        known = 1 - BETA**self.count
        square = torch.maximum(self.square / known, gradient.square())
        size = (square + (self.slope / known).square()).sqrt()
        return torch.where(size > 0, sigma * gradient / size, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"count": self.count, "square": self.square.clone(), "slope": self.slope.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.count = state["count"]
        self.square.copy_(state["square"])
        self.slope.copy_(state["slope"])
