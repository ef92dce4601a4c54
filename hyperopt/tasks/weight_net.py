r"""Meta-Weight-Net: a small network that maps the loss of a training example to its weight, tuned on clean validation rows.

    gradient of L in w = mean_i V(l_i; lam) grad_w l_i + decay w         l_i = cross_entropy(f(w, x_i), y_i)
    E = cross_entropy(f(w, x'), y')                                      V = sigmoid(b + v . tanh(a l + c)), lam = (a, b, c, v)

As in the paper, the weight multiplies the gradient and is not differentiated in ``w``. The loss with that gradient is

    L = mean_i G(l_i; lam) + decay |w|^2 / 2,     G(l) = \int_0^l V(s) ds,

and this loss is trained here, with the integral by Gauss-Legendre quadrature. It is an ordinary loss, so every adjoint is right
after any number of inner steps. (With a weight that is only detached, a part of the derivative would be missing.)

The classes may have different numbers of rows: class ``c`` of ``C`` keeps a fraction ``imbalance ** (-c / (C - 1))`` of its
rows.

Reference: J. Shu et al., NeurIPS 2019, arXiv 1902.07379.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.bilevel.functional import Functional
from hyperopt.core.checks import check_count, check_number
from hyperopt.data.splits import Rows
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup, starting_at
from hyperopt.tasks.cleaning import CorruptedTask
from hyperopt.tasks.network import initialise
from hyperopt.tasks.scores import ROWS
from hyperopt.tasks.tuned import TunedTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = 16  # number of quadrature nodes


class WeightNet(nn.Module):
    """A network from a loss to a weight, with one tanh layer and a sigmoid output.

    Args:
        width: number of units of the hidden layer.
    """

    def __init__(self, width: int) -> None:
        """Build the layers; ``initialise`` draws their weights."""
        super().__init__()
        self.first = nn.Linear(1, width)
        self.second = nn.Linear(width, 1)

    def forward(self, losses: Tensor) -> Tensor:
        """Return weights in (0, 1), in the shape of the losses."""
        return torch.sigmoid(self.second(torch.tanh(self.first(losses[..., None]))))[..., 0]


@dataclass(eq=False)
class WeightNetTask(CorruptedTask):
    """A classifier whose training examples are weighted by a learned function of their loss.

    Attributes:
        width: number of hidden units of the weight network.
        imbalance: number of rows of the first class for each row of the last, at least 1.
        weight_net: the weight network, after ``setup``.
    """

    name = "weight_net"
    MEASURES: ClassVar[tuple[str, ...]] = (*TunedTask.MEASURES, "weight/right_labels", "weight/replaced_labels")
    spaces = ()

    hidden: tuple[int, ...] = (100,)
    corrupted: float = 0.4
    width: int = 100
    imbalance: float = 1.0

    weight_net: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "width")
        check_number(self, "imbalance", 1.0)

    def build(self, env: Environment) -> BilevelSetup:
        """Drop rows, replace labels, and build both networks."""
        self.splits = replace(self.splits, train=long_tailed(self.splits.train, self.splits.num_classes, self.imbalance))
        train = self.replace_labels(env)
        self.network(env)
        weight_net = WeightNet(self.width)
        initialise(weight_net, env.generator)
        self.weight_net = Functional(weight_net.to(env.device, env.dtype))
        nodes, shares = (torch.from_numpy(each).to(env.device, env.dtype) for each in np.polynomial.legendre.leggauss(NODES))
        nodes, shares = (1 + nodes) / 2, shares / 2  # on (0, 1)

        def inner(w: dict[str, Tensor], lam: dict[str, Any], batch: tuple[Tensor, ...]) -> Tensor:
            x, y, _ = batch
            losses = functional.cross_entropy(self.model(w, x), y, reduction="none")
            weights = self.weight_net(lam["weight_net"], losses[:, None] * nodes)
            return (losses * (weights @ shares)).mean() + self.penalty(w)

        return BilevelSetup(self.problem(inner, env, train), self.model.w, {}, self.rows())

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """Return the initial weights of the weight network."""
        return starting_at({"weight_net": self.weight_net.w})

    @torch.no_grad()
    def training_losses(self, w: dict[str, Tensor]) -> Tensor:
        """Return the loss of each training row. shape: (n,)."""
        train = self.splits.train
        parts = [
            functional.cross_entropy(self.model(w, x), y, reduction="none")
            for x, y in zip(train.x.split(ROWS), train.y.split(ROWS), strict=True)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def weights(self, losses: Tensor) -> Tensor:
        """Return the learned weights of losses, in their shape."""
        return self.weight_net(self.hyper.read()["weight_net"], losses)

    def measure(self, w: Any) -> dict[str, float]:
        """Return the metrics of every trained problem, and the mean weights of training rows with right and replaced labels."""
        weights = self.weights(self.training_losses(w))
        kinds = {"right": weights[~self.corrupt], "replaced": weights[self.corrupt]}
        return {**super().measure(w), **{f"weight/{kind}_labels": float(of.mean()) for kind, of in kinds.items() if len(of)}}

    def figures(self) -> dict[str, Figure]:
        """Return ``weights``: the learned function, and histograms of the losses of rows with right and replaced labels."""
        from matplotlib.figure import Figure  # imported here because it takes half a second

        losses = self.training_losses(self.bilevel.w)
        reach = max(1.0, math.ceil(float(losses.quantile(0.99))))
        grid = torch.linspace(0, reach, 200).to(losses)
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        bars = axes.twinx()
        for label, of in (("right label", losses[~self.corrupt]), ("replaced label", losses[self.corrupt])):
            if len(of):
                bars.hist(of.clamp(max=reach).cpu().numpy(), bins=40, range=(0, reach), alpha=0.35, label=label)
        bars.set(ylabel="training rows")
        bars.legend(fontsize=7)
        axes.plot(grid.cpu(), self.weights(grid).cpu(), "k-")
        axes.set(xlabel="loss of a training row", ylabel="its weight", ylim=(0, 1))
        axes.set_zorder(1)  # above the bars
        axes.patch.set_visible(False)
        return {"weights": figure}


def long_tailed(rows: Rows, classes: int, imbalance: float) -> Rows:
    """Return the first rows of each class: a fraction ``imbalance ** (-c / (classes - 1))`` of class ``c``, at least one row."""
    if imbalance == 1:
        return rows
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.y.device)
    for c in range(classes):
        (places,) = torch.where(rows.y == c)
        kept[places[: max(1, round(len(places) * imbalance ** (-c / (classes - 1))))]] = True
    return rows.take(torch.where(kept)[0])
