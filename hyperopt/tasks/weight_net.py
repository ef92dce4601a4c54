r"""Meta-Weight-Net: a small network that maps the loss of a training example to its weight; clean validation rows tune it.

    gradient of L in w = mean_i V(l_i; lam) grad_w l_i + decay w         l_i = cross_entropy(f(w, x_i), y_i)
    E = cross_entropy(f(w, x'), y')                                      V = sigmoid(b + v . tanh(a l + c)), lam = (a, b, c, v)

The weight multiplies the gradient and is not differentiated in ``w``, as in the paper. The loss with that gradient is

    L = mean_i G(l_i; lam) + decay |w|^2 / 2,     G(l) = \int_0^l V(s) ds,

and that is what is trained here, the integral by Gauss and Legendre's rule: a loss like any other, so that every adjoint is
right, after any number of inner steps. (A weight that is merely detached would have a part of its derivative missing.)

Rows may be unevenly many in each class: class ``c`` of ``C`` keeps ``imbalance ** (-c / (C - 1))`` of its rows.

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
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import check_count, check_number
from hyperopt.data.splits import Rows
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.tasks.base import SPLIT_MEASURES, Environment
from hyperopt.tasks.bilevel import Parts, starting_at
from hyperopt.tasks.cleaning import CorruptedTask
from hyperopt.tasks.network import initialise
from hyperopt.tasks.scores import ROWS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = 16  # of the rule for the integral


class WeightNet(nn.Module):
    """``loss -> weight``, one hidden layer of tanh, a sigmoid at the end.

    Args:
        width: of the hidden layer.
    """

    def __init__(self, width: int) -> None:
        """Draw nothing yet: see ``initialise``."""
        super().__init__()
        self.first = nn.Linear(1, width)
        self.second = nn.Linear(width, 1)

    def forward(self, losses: Tensor) -> Tensor:
        """Weights in (0, 1), in the shape of the losses."""
        return torch.sigmoid(self.second(torch.tanh(self.first(losses[..., None]))))[..., 0]


@dataclass(eq=False)
class WeightNetTask(CorruptedTask):
    """A network that weighs training examples by their loss.

    Attributes:
        width: hidden units of the network that is learned.
        imbalance: rows of the first class for one of the last, at least 1.
        weight_net: the network that is learned, after ``setup``.
    """

    name = "weight_net"
    MEASURES: ClassVar[tuple[str, ...]] = (
        *SPLIT_MEASURES,
        *("train/loss", "train/accuracy", "weight/right_labels", "weight/replaced_labels"),
    )
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

    def build(self, env: Environment) -> Parts:
        """Drop rows, replace labels, and build both networks."""
        self.splits = replace(self.splits, train=long_tailed(self.splits.train, self.splits.num_classes, self.imbalance))
        batches = self.training_batches(env)
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

        problem = BilevelProblem(inner, self.outer, inner_batches=batches, outer_batches=self.validation_batches(env))
        return Parts(problem, self.model.w, {}, self.rows())

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """The weights of the network that is learned, where its initialisation has put them."""
        return starting_at({"weight_net": self.weight_net.w})

    @torch.no_grad()
    def training_losses(self, w: dict[str, Tensor]) -> Tensor:
        """The loss of each training row. shape: (n,)."""
        train = self.splits.train
        parts = [
            functional.cross_entropy(self.model(w, x), y, reduction="none")
            for x, y in zip(train.x.split(ROWS), train.y.split(ROWS), strict=True)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def weights(self, losses: Tensor) -> Tensor:
        """What the network that is learned gives to losses, in their shape."""
        return self.weight_net(self.hyper.read()["weight_net"], losses)

    def measure(self, w: Any) -> dict[str, float]:
        """As every trained problem, with the mean weights of training rows whose labels are right, and of the others."""
        weights = self.weights(self.training_losses(w))
        kinds = {"right": weights[~self.corrupt], "replaced": weights[self.corrupt]}
        return {**super().measure(w), **{f"weight/{kind}_labels": float(of.mean()) for kind, of in kinds.items() if len(of)}}

    def figures(self) -> dict[str, Figure]:
        """Return ``weights``: the learned curve, over the losses of training rows whose labels are right, and of the others."""
        from matplotlib.figure import Figure  # here: half a second to import, and only a drawing needs it

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
    """The first rows of each class: of class ``c`` a share ``imbalance ** (-c / (classes - 1))``, at least one row."""
    if imbalance == 1:
        return rows
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.y.device)
    for c in range(classes):
        (places,) = torch.where(rows.y == c)
        kept[places[: max(1, round(len(places) * imbalance ** (-c / (classes - 1))))]] = True
    return rows.take(torch.where(kept)[0])
