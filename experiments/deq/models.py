"""What the measurements of this folder share: the DEQ of ``experiment=deq_cifar10``, images, the residual of an adjoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt import Anderson, Implicit, LinearAnderson
from hyperopt.data.cifar import CIFAR10
from hyperopt.data.files import default_root
from hyperopt.data.splits import Rows
from hyperopt.nn.networks import ImageNetwork, resnet_network

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE, STEPS, WINDOW = 1e-2, 25, 5
SOLVER = Anderson(TOLERANCE, max_steps=STEPS, window=WINDOW)
ADJOINT = Implicit(LinearAnderson(TOLERANCE, max_steps=STEPS, window=WINDOW), policy="ignore")


def images(count: int, seed: int = 0) -> Rows:
    """The first ``count`` of the training images that ``seed`` draws, flattened."""
    root = os.environ.get("HYPEROPT_DATA", str(REPOSITORY / default_root()))
    return CIFAR10(train=max(count, 1), val=0, seed=seed, root=root).load().train


def network(seed: int = 0) -> ImageNetwork:
    """The network, its initial values by ``seed``."""
    torch.manual_seed(seed)
    return resnet_network(solver=SOLVER, adjoint=ADJOINT, policy="ignore")


def train(model: nn.Module, rows: Rows, steps: int, batch: int, lr: float = 1e-3) -> float:
    """Take ``steps`` steps of Adam on consecutive batches and return the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    loss = torch.zeros(())
    for k in range(steps):
        part = rows.take(slice(k * batch % len(rows), k * batch % len(rows) + batch))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(part.x.view(-1, 3, 32, 32)), part.y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def adjoint_residual(model: ImageNetwork, x: Tensor, y: Tensor, z: Tensor, v: Tensor) -> float:
    """``|v - J^T v - g| / |g|`` over the batch, at the state ``z`` that a solve returned, recomputed from nothing else.

    Args:
        model: its cell gives J, its head g.
        x: images.
        y: labels.
        z: state. shape: (rows, channels, height, width)
        v: adjoint variable, of the same shape.
    """
    layer = model.get_submodule("deq")
    with torch.no_grad():
        injected = model.get_submodule("norm_in")(model.get_submodule("inject")(x))
    z = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(functional.cross_entropy(model.head(z), y), z)
    (image,) = torch.autograd.grad(layer.cell(z, injected), z, v)  # pyright: ignore[reportCallIssue]
    return float((v - image - g).norm() / g.norm())
