"""Six small networks with the hyperparameters that networks have: a decay for each parameter, and a weight for each row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hyperopt

DOUBLE = torch.float64
ROWS = 60
NAMES = ("tanh", "relu", "convolutional", "batch norm", "dropout", "over-parameterised")


@dataclass
class Case:
    """A problem, the network as a function, and the hyperparameters at their start."""

    problem: hyperopt.BilevelProblem
    model: hyperopt.Functional
    lam: dict[str, Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def network(name: str) -> nn.Module:
    """The network of a case; weights from the process's generator."""
    if name == "convolutional":
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    width = {"tanh": 12, "relu": 16, "batch norm": 10, "dropout": 16, "over-parameterised": 40}[name]
    bend = nn.Tanh() if name in ("tanh", "dropout") else nn.ReLU()
    middle = [nn.BatchNorm1d(width)] if name == "batch norm" else []
    return nn.Sequential(nn.Linear(5, width), *middle, bend, nn.Linear(width, 3))


def case(name: str, seed: int) -> Case:
    """60 training rows in 3 classes, a fifth of them mislabelled, and 60 clean validation rows; float64.

    Dropout draws its mask in training anew at every step, and is off in validation. The draws of a training depend on the seed of
    the process alone, so an exact derivative of training exists.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    if name == "convolutional":
        x, xv = normal(generator, ROWS, 1, 6, 6), normal(generator, ROWS, 1, 6, 6)
        kernel = normal(generator, 1, 1, 3, 3)
        scores = [functional.conv2d(part, kernel).relu().mean((1, 2, 3)) for part in (x, xv)]
        edges = torch.cat(scores).quantile(torch.tensor([1 / 3, 2 / 3], dtype=DOUBLE))
        y, yv = (torch.bucketize(score, edges) for score in scores)
    else:
        x, xv = normal(generator, ROWS, 5), normal(generator, ROWS, 5)
        first, second = normal(generator, 5, 4), normal(generator, 4, 3)
        y, yv = ((torch.tanh(part @ first) @ second + 0.3 * normal(generator, ROWS, 3)).argmax(1) for part in (x, xv))
    y = torch.where(torch.rand(ROWS, generator=generator) < 0.2, (y + 1) % 3, y)
    torch.manual_seed(seed)
    model = hyperopt.Functional(network(name).double())
    names = list(model.w)

    def outputs(w: Any, lam: Any, batch: Any) -> Tensor:
        if name != "dropout":
            return model(w, x)
        hidden = functional.dropout(torch.tanh(functional.linear(x, w[names[0]], w[names[1]])), 0.2)
        return functional.linear(hidden, w[names[2]], w[names[3]])

    def criterion(z: Tensor, w: Any, lam: Any, batch: Any) -> Tensor:
        decay = torch.stack([lam["decay"][i].exp() * w[key].square().sum() for i, key in enumerate(names)]).sum() / 2
        return (lam["weights"] * functional.cross_entropy(z, y, reduction="none")).mean() + decay

    problem = hyperopt.BilevelProblem(
        hyperopt.Composite(outputs, criterion), lambda w, lam, batch: functional.cross_entropy(model(w, xv), yv)
    )
    decay = math.log(1e-5 if name == "over-parameterised" else 1e-3)
    lam = {"decay": torch.full((len(names),), decay, dtype=DOUBLE), "weights": torch.ones(ROWS, dtype=DOUBLE)}
    return Case(problem, model, lam)
