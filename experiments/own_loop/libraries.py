"""The same step beside the same loop by four libraries: ours, betty, hypertorch and torchopt; see compare.py.

Each function makes, from a network, hyperparameters and two loaders, one round: a step of training on a batch, a hypergradient
on this batch and one of val by a Neumann series or conjugate gradients with ``products`` products, and a step of Adam on the
hyperparameters. ``step`` is the size of a step of the series, which the other libraries ask of the user. The body of each
function is the code that is counted; ``plain`` is the loop alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from problem import Batch, Loss, train_loss, val_loss
from torch import Tensor, nn

import hyperopt

Round = Callable[[], Any]


@dataclass
class Setting:
    """What a user has before a library comes in.

    Attributes:
        model: the network.
        hyper: the hyperparameters.
        train, val: batches without end.
        train_loss, val_loss: the losses.
        lr: of SGD on the weights.
        hyper_lr: of Adam on the hyperparameters.
        momentum: of SGD.
        method: ``neumann``, ``cg``, ``differences`` of gradients (ours and betty), or ``auto`` (ours alone).
        products: with the Hessian.
        step: of the Neumann series.
    """

    model: nn.Module
    hyper: hyperopt.Hyperparameters
    train: Iterator[Batch]
    val: Iterator[Batch]
    train_loss: Loss = train_loss
    val_loss: Loss = val_loss
    lr: float = 0.02
    hyper_lr: float = 0.1
    momentum: float = 0.9
    method: str = "neumann"
    products: int = 10
    step: float = 0.1


def plain(s: Setting) -> Round:
    """Training alone."""
    model, hyper = s.model, s.hyper
    optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=s.momentum)

    def go() -> None:
        optimizer.zero_grad()
        s.train_loss(model, next(s.train), hyper.read()).backward()
        optimizer.step()

    return go


def ours(s: Setting) -> Round:
    """``Tuner``; it finds the step of a Neumann series itself."""
    model, hyper = s.model, s.hyper
    optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=s.momentum)
    adjoint: Any = {
        "auto": "auto",
        "neumann": hyperopt.Implicit(hyperopt.Neumann(rtol=0, max_steps=s.products), policy="ignore"),
        "cg": hyperopt.Implicit(hyperopt.CG(rtol=0, max_steps=s.products), policy="ignore"),
        "differences": hyperopt.FiniteDifference(),
    }[s.method]
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=s.hyper_lr)
    tuner = hyperopt.Tuner(model, hyper, train_loss=s.train_loss, val_loss=s.val_loss, optimizer=hyper_optimizer, adjoint=adjoint)

    def go() -> Any:
        batch = next(s.train)
        optimizer.zero_grad()
        tuner.loss(batch).backward()
        optimizer.step()
        return tuner.step(batch, next(s.val))

    return go


def betty(s: Setting) -> Round:
    """Two problems and an engine, which owns the loop."""
    from betty.configs import Config, EngineConfig  # pyright: ignore[reportMissingImports]
    from betty.engine import Engine  # pyright: ignore[reportMissingImports]
    from betty.problems import ImplicitProblem  # pyright: ignore[reportMissingImports]

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return s.val_loss(self.inner.module, batch, {})  # pyright: ignore

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return s.train_loss(self.module, batch, self.outer())  # pyright: ignore

    method = {
        "neumann": {"type": "neumann", "neumann_iterations": s.products, "neumann_alpha": s.step},
        "cg": {"type": "cg", "cg_iterations": s.products},
        "differences": {"type": "darts"},
    }[s.method]
    optimizer = torch.optim.SGD(s.model.parameters(), lr=s.lr, momentum=s.momentum)
    hyper_optimizer = torch.optim.Adam(s.hyper.parameters(), lr=s.hyper_lr)
    outer = Outer("outer", Config(), s.hyper, hyper_optimizer, train_data_loader=s.val, device="cpu")
    config = Config(unroll_steps=1, **method)
    inner = Inner("inner", config, s.model, optimizer, train_data_loader=s.train, device="cpu")
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = Engine([outer, inner], EngineConfig(train_iters=1, valid_step=10**9), dependencies)
    return engine.run


def hypertorch(s: Setting) -> Round:
    """``hypergrad.fixed_point`` or ``hypergrad.CG`` of functional losses."""
    import hypergrad  # pyright: ignore[reportMissingImports]

    class WithLoss(nn.Module):
        def __init__(self, loss: Any) -> None:
            super().__init__()
            self.model, self.loss = s.model, loss

        def forward(self, batch: Any, lam: Any) -> Tensor:
            return self.loss(self.model, batch, lam)

    model, hyper = s.model, s.hyper
    optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=s.momentum)
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=s.hyper_lr)
    training, validation = WithLoss(s.train_loss), WithLoss(s.val_loss)
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    method = {"neumann": hypergrad.fixed_point, "cg": hypergrad.CG}[s.method]
    products = s.products + (s.method == "neumann")  # its first makes the right-hand side from zero

    def go() -> None:
        batch, val_batch = next(s.train), next(s.val)
        optimizer.zero_grad()
        s.train_loss(model, batch, hyper.read()).backward()
        optimizer.step()

        def stepped(w: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
            loss = torch.func.functional_call(training, dict(zip(names, w, strict=True)), (batch, hyper.values()))
            slopes = torch.autograd.grad(loss, w, create_graph=True)
            return [leaf - s.step * slope for leaf, slope in zip(w, slopes, strict=True)]

        def outer_loss(w: list[Tensor], hparams: list[Tensor]) -> Tensor:
            return torch.func.functional_call(validation, dict(zip(names, w, strict=True)), (val_batch, {}))

        hyper_optimizer.zero_grad()
        method(list(model.parameters()), list(hyper.parameters()), products, stepped, outer_loss)
        hyper_optimizer.step()

    return go


def torchopt(s: Setting) -> Round:
    """``ImplicitMetaGradientModule`` around a copy of the network, for one hypergradient."""
    import torchopt  # pyright: ignore[reportMissingImports]

    model, hyper = s.model, s.hyper
    optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=s.momentum)
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=s.hyper_lr)
    method = {
        "neumann": torchopt.linear_solve.solve_inv(ns=True, maxiter=s.products, alpha=s.step),  # pyright: ignore
        "cg": torchopt.linear_solve.solve_cg(maxiter=s.products, rtol=0.0, atol=0.0),  # pyright: ignore
    }[s.method]

    class Trained(torchopt.nn.ImplicitMetaGradientModule, linear_solve=method):  # pyright: ignore
        def __init__(self, hyper: nn.Module) -> None:
            super().__init__()
            self.hyper, self.model = hyper, copy.deepcopy(model)

        def objective(self, batch: Any) -> Tensor:
            return s.train_loss(self.model, batch, self.hyper())

        def solve(self, batch: Any) -> Any:
            return self

    def go() -> None:
        batch = next(s.train)
        optimizer.zero_grad()
        s.train_loss(model, batch, hyper.read()).backward()
        optimizer.step()
        trained = Trained(hyper)
        trained.solve(batch)
        hyper_optimizer.zero_grad()
        s.val_loss(trained.model, next(s.val), {}).backward()
        hyper_optimizer.step()

    return go


LIBRARIES: dict[str, Callable[[Setting], Round]] = {"ours": ours, "betty": betty, "hypertorch": hypertorch, "torchopt": torchopt}
