"""What the tests of ``Tuner`` compare with: the exact implicit gradient by dense matrices, and small models and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import hyperopt

DOUBLE = torch.float64
EXACT = hyperopt.Implicit(hyperopt.GMRES(rtol=1e-13, max_steps=300, window=300))


def data(rows: int = 24, seed: int = 0, features: int = 4) -> tuple[Tensor, Tensor]:
    """Rows and numbers to predict."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=draw, dtype=DOUBLE)
    return x, torch.tanh(x.sum(1, keepdim=True)) + 0.2 * torch.randn(rows, 1, generator=draw, dtype=DOUBLE)


def mlp(seed: int = 0, between: Sequence[nn.Module] = ()) -> nn.Sequential:
    """A small network in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 1)).double()


def fit(model: Any, batch: Any, lam: Any) -> Tensor:
    """The mean square error."""
    x, y = batch
    return (model(x) - y).square().mean()


def regularised(model: Any, batch: Any, lam: Any) -> Tensor:
    """The error and a penalty of a strength for each layer's weights; ``lam`` has ``decay`` and ``bias``."""
    penalty = lam["decay"] * sum(p.square().sum() for p in model.parameters() if p.dim() > 1)
    return fit(model, batch, lam) + penalty + lam["bias"] * sum(p.square().sum() for p in model.parameters() if p.dim() == 1)


def hyperparameters(decay: float = 0.3, bias: float = 0.2) -> hyperopt.Hyperparameters:
    """Two positive numbers in float64."""
    return hyperopt.Hyperparameters({"decay": hyperopt.Positive(decay), "bias": hyperopt.Positive(bias)}, dtype=DOUBLE)


def exact(
    model: nn.Module,
    lam: dict[str, Tensor],
    train: Callable[[Any, dict[str, Tensor]], Tensor],
    val: Callable[[Any, dict[str, Tensor]], Tensor],
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """``d_lam E - (d_lam grad_w L)^T H^{-1} d_w E`` with the dense Hessian, by ``torch.func`` alone.

    Args:
        model: at whose parameters; ``train`` and ``val`` are functions of ``(call, lam)``, where ``call`` stands for the model.
        lam: the hyperparameters.
        train: the inner loss.
        val: the outer loss.
        names: of the parameters that are weights (None: those that require grad).
    """
    own = dict(model.named_parameters())
    names = [name for name, p in own.items() if p.requires_grad] if names is None else list(names)
    sizes = [own[name].numel() for name in names]
    keys = list(lam)

    def of(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def flat(w: Tensor, h: Tensor) -> Tensor:
            parts = {n: part.view(own[n].shape) for n, part in zip(names, w.split(sizes), strict=True)}
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            values = {k: p.view(lam[k].shape) for k, p in zip(keys, h.split([lam[k].numel() for k in keys]), strict=True)}

            class Call:
                def __call__(self, *args: Any) -> Any:
                    return functional_call(model, {**parts, **buffers}, args)

                def parameters(self) -> Any:
                    return [parts.get(n, p) for n, p in own.items()]

                def named_parameters(self) -> Any:
                    return [(n, parts.get(n, p)) for n, p in own.items()]

            return loss(Call(), values)

        return flat

    w = torch.cat([own[name].detach().reshape(-1) for name in names])
    h = torch.cat([lam[key].detach().reshape(-1) for key in keys])
    inner, outer = of(train), of(val)
    hessian = torch.autograd.functional.hessian(lambda w: inner(w, h), w)
    at = h.clone().requires_grad_(), w.clone().requires_grad_()
    g_h, g_w = torch.autograd.grad(outer(at[1], at[0]), at, allow_unused=True)
    u = torch.linalg.solve(hessian, g_w)
    (slope,) = torch.autograd.grad(inner(at[1], at[0]), at[1], create_graph=True)
    (mixed,) = torch.autograd.grad(slope, at[0], u)
    found = -mixed if g_h is None else g_h - mixed
    return {k: p.view(lam[k].shape) for k, p in zip(keys, found.split([lam[k].numel() for k in keys]), strict=True)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    """Each hyperparameter's entry has this relative accuracy, and none is zero."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-6, name
        torch.testing.assert_close(found[name].to(value), value, rtol=tolerance, atol=0, msg=lambda text, n=name: f"{n}: {text}")
