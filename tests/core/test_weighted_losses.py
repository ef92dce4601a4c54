"""Losses with weights as hyperparameters: against PyTorch's kernels, by differences, and in a user's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperopt as ho
from hyperopt.core.graph_modes import TwiceDifferentiable

D: dict[str, Any] = {"dtype": torch.float64}
Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **D)


ROWS, IMAGES, ONE = torch.tensor([2, 0, 1, 1, -100, 2]), torch.tensor([[[1, 0], [2, -1]], [[0, 1], [2, 2]]]), torch.tensor(1)
SHARES = drawn(6, 3, seed=1).sigmoid()

CASES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    **{
        f"cross entropy, {reduction}, smoothing {smoothing}": (
            lambda x, a, how=(reduction, smoothing): F.cross_entropy(x, ROWS, weight=a, reduction=how[0], label_smoothing=how[1]),
            (6, 3),
            (3,),
        )
        for reduction in ("mean", "sum", "none")
        for smoothing in (0.0, 0.2)
    },
    "cross entropy of images": (
        lambda x, a: F.cross_entropy(x, IMAGES, a, ignore_index=-1, label_smoothing=0.1),
        (2, 3, 2, 2),
        (3,),
    ),
    "cross entropy of one row": (lambda x, a: F.cross_entropy(x, ONE, weight=a), (3,), (3,)),
    "cross entropy of shares": (lambda x, a: F.cross_entropy(x, SHARES, weight=a), (6, 3), (3,)),
    "cross entropy without weights": (lambda x, a: F.cross_entropy(x, ROWS) * a.sum(), (6, 3), (3,)),
    "nll": (lambda x, a: F.nll_loss(x.log_softmax(1), ROWS, weight=a, reduction="sum"), (6, 3), (3,)),
    "binary": (lambda x, a: F.binary_cross_entropy(x.sigmoid(), SHARES, weight=a), (6, 3), (6, 3)),
    "binary, logits": (lambda x, a: F.binary_cross_entropy_with_logits(x, SHARES, weight=a, reduction="sum"), (6, 3), (6, 1)),
    "binary, positive": (lambda x, a: F.binary_cross_entropy_with_logits(9 * x, SHARES, pos_weight=a), (6, 3), (3,)),
    "binary, both": (
        lambda x, a: F.binary_cross_entropy_with_logits(x, SHARES, weight=a[:, None], pos_weight=a[:3], reduction="none"),
        (6, 3),
        (6,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_kernel_and_has_derivatives_in_the_weights(name: str) -> None:
    loss, shape, weights = CASES[name]
    x, a = drawn(*shape, seed=2).requires_grad_(), drawn(*weights, seed=3).exp()
    kernel = loss(x, a)
    (of_kernel,) = torch.autograd.grad(kernel.sum(), x)

    def formed(x: Tensor, a: Tensor) -> Tensor:
        with TwiceDifferentiable():
            return loss(x, a)

    torch.testing.assert_close(formed(x, a), kernel, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(formed(x, a).sum(), x)[0], of_kernel, rtol=1e-12, atol=1e-13)
    torch.autograd.gradcheck(formed, (x, a.requires_grad_()))
    torch.autograd.gradgradcheck(formed, (x, a))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a: F.cross_entropy(SHARES, ROWS, weight=a[:2]),
        lambda a: F.cross_entropy(SHARES, ROWS, weight=a),
        lambda a: F.cross_entropy(SHARES, ROWS[:5], weight=a[:3]),
        lambda a: F.cross_entropy(SHARES, ROWS + 1, weight=a[:3]),
        lambda a: F.nll_loss(SHARES, ROWS, weight=a[:1]),
        lambda a: F.binary_cross_entropy(SHARES[:, :1], SHARES[:, 0], weight=a[:1]),
        lambda a: F.binary_cross_entropy_with_logits(SHARES[:, :1], SHARES[:, 0], weight=a[:1]),
        lambda a: F.binary_cross_entropy_with_logits(SHARES[:, 0], SHARES[:, :1], pos_weight=a[:1]),
        lambda a: F.cross_entropy(SHARES, ROWS, weight=a[:3], reduction="men"),
    ],
)
def test_what_the_kernel_refuses_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    weight = torch.ones(4, **D)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        loss(weight)
    with pytest.raises((RuntimeError, ValueError, IndexError)), TwiceDifferentiable():
        loss(weight.requires_grad_())


@pytest.mark.parametrize("how", [{}, {"adjoint": ho.Unrolled()}], ids=str)
def test_class_weights_have_the_hypergradient_of_a_difference_of_trainings(how: dict[str, Any]) -> None:
    x, y = drawn(40, 4, seed=4), torch.arange(40) % 3
    f = ho.Functional(nn.Linear(4, 3, **D))

    def inner(w: Any, lam: Tensor, batch: Any) -> Tensor:
        return nn.CrossEntropyLoss(weight=lam)(f(w, x), y) + 0.05 * sum(p.square().sum() for p in w.values())

    problem = ho.BilevelProblem(inner, lambda w, lam, batch: F.cross_entropy(f(w, x[:20]), (y[:20] + 1) % 3))
    train = ho.GradientDescent(step_size=0.5, max_steps=300, rtol=0.0)
    start, lam = {name: torch.zeros_like(p) for name, p in f.w.items()}, torch.tensor([1.0, 2.0, 0.5], **D)
    found = ho.hypergradient(problem, start, lam, inner=train, **how).grad

    def outer(lam: Tensor) -> Tensor:
        w = {name: torch.zeros_like(p).requires_grad_() for name, p in f.w.items()}
        for _ in range(300):
            each = F.cross_entropy(f(w, x), y, reduction="none") * lam[y]
            loss = each.sum() / lam[y].sum() + 0.05 * sum(p.square().sum() for p in w.values())
            slopes = torch.autograd.grad(loss, [*w.values()])
            w = {name: (p - 0.5 * g).detach().requires_grad_() for (name, p), g in zip(w.items(), slopes, strict=True)}
        return F.cross_entropy(f(w, x[:20]), (y[:20] + 1) % 3).detach()

    steps = 1e-5 * torch.eye(3, **D)
    wanted = torch.stack([(outer(lam + step) - outer(lam - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)


def test_class_weights_in_a_loop_of_ones_own() -> None:
    x, y = drawn(40, 4, seed=4), torch.arange(40) % 3

    def by_hand(z: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(z, y, reduction="none") * weight[y]).sum() / weight[y].sum()

    def found(weighted: Loss) -> Tensor:
        torch.manual_seed(0)
        model, hyper = nn.Linear(4, 3, **D), ho.Hyperparameters({"weight": ho.Positive([1.0, 2.0, 0.5], per="element")}, **D)
        tuner = ho.Tuner(
            model,
            hyper,
            train_loss=lambda m, b, lam: weighted(m(b[0]), lam["weight"]) + 0.05 * m.weight.square().sum(),
            val_loss=lambda m, b, lam: F.cross_entropy(m(b[0]), b[1]),
            optimizer=torch.optim.SGD(hyper.parameters(), lr=0.1),
        )
        training = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(50):
            training.zero_grad()
            tuner.loss((x, y)).backward()
            training.step()
        return tuner.step((x, y), (x, (y + 1) % 3)).grad["weight"]

    wanted = found(by_hand)
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(found(lambda z, weight: nn.CrossEntropyLoss(weight=weight)(z, y)), wanted, rtol=1e-6, atol=0)
