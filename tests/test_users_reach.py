"""What users ask of the trained problems beyond one loss with one penalty, against closed forms and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import hyperopt as ho

D: dict[str, Any] = {"dtype": torch.float64}
THROUGH = [ho.Unrolled(), ho.Checkpointed(), ho.Checkpointed(segment=1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **D)


def slope(run: Callable[[Any], ho.Estimate], lam: Any, h: float = 2e-4) -> tuple[float, float]:
    """The hypergradient along a random direction, and the difference of the whole training along it."""
    leaves, spec = optree.tree_flatten(lam)
    ways = [drawn(*x.shape, seed=100 + i) for i, x in enumerate(leaves)]

    def at(step: float) -> ho.Estimate:
        return run(optree.tree_unflatten(spec, [x + step * d for x, d in zip(leaves, ways, strict=True)]))

    found = sum(float((g * d).sum()) for g, d in zip(optree.tree_leaves(at(0.0).grad), ways, strict=True))
    one, two = ((at(s).loss - at(-s).loss) / (2 * s) for s in (h, h / 2))
    return found, (4 * two - one) / 3


def sine() -> tuple[Any, Callable[[Any, Any, Any], Tensor], Callable[[Any, Any, Any], Tensor]]:
    """A two-layer network's regression of a sine: its weights and both losses."""
    x, xv = 2 * drawn(12, 1, seed=1), 2 * drawn(12, 1, seed=2)
    w = {"a": drawn(1, 8, seed=3), "b": drawn(8, seed=4), "c": drawn(8, 1, seed=5) / 4, "d": torch.zeros((), **D)}

    def mean(w: Any, x: Tensor) -> Tensor:
        return (torch.tanh(x @ w["a"] + w["b"]) @ w["c"] + w["d"] - torch.sin(x + 0.3)).square().mean()

    return w, lambda w, lam, batch: mean(w, x), lambda w, lam, batch: mean(w, xv)


# ---- the start of training as a hyperparameter


@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_the_gradient_in_the_start_of_gradient_descent_is_its_closed_form(adjoint: Any) -> None:
    """``w_T - c = (1 - s)^T (w_0 - c)`` for the loss ``|w - c|^2 / 2``."""
    c, w0 = drawn(3), drawn(3, seed=1)
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (w - c).square().sum() / 2, lambda w, lam, batch: w.square().sum() / 2, initial=lambda lam: lam
    )
    found = ho.hypergradient(
        problem, torch.full((3,), 9.0, **D), w0, inner=ho.GradientDescent(step_size=0.1, max_steps=5), adjoint=adjoint
    )
    end = c + 0.9**5 * (w0 - c)
    assert torch.allclose(found.w, end, atol=1e-14)
    assert torch.allclose(found.grad, 0.9**5 * end, atol=1e-14)


@pytest.mark.parametrize(
    "inner",
    [
        ho.GradientDescent(step_size=0.1, max_steps=7),
        ho.HeavyBall(step_size=0.05, max_steps=7),
        ho.InnerAdam(lr=0.05, max_steps=7),
    ],
    ids=lambda inner: inner.name,
)
@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_the_gradient_in_the_start_of_a_network_is_that_of_its_whole_training(inner: Any, adjoint: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(inner_loss, outer_loss, initial=lambda lam: lam)
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint), w)
    assert found == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("adjoint", THROUGH, ids=repr)
def test_a_start_that_is_computed_from_hyperparameters_which_the_losses_use_too(adjoint: Any) -> None:
    w, inner_loss, outer_loss = sine()
    problem = ho.BilevelProblem(
        lambda w, lam, batch: inner_loss(w, lam, batch) + lam["l2"] * w["a"].square().sum(),
        outer_loss,
        initial=lambda lam: {**w, "a": lam["scale"] * w["a"], "c": w["c"] + lam["l2"]},
    )
    lam = {"scale": torch.tensor(0.7, **D), "l2": torch.tensor(0.1, **D), "lr": torch.tensor(0.05, **D)}
    inner = ho.HeavyBall(step_size="lr", max_steps=6)
    found, wanted = slope(lambda lam: ho.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint), lam)
    assert found == pytest.approx(wanted, rel=1e-7)


def test_meta_learned_start_over_tasks_lowers_the_loss_after_training() -> None:
    """MAML: one outer step is the sum of the tasks' gradients, and every training starts anew."""
    tasks = []
    for phase in (0.0, 0.5, 1.0):
        x = drawn(10, 1, seed=int(10 * phase))
        y = torch.sin(x + phase)

        def loss(w: Any, lam: Any, batch: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (torch.tanh(x @ w["a"]) @ w["b"] - y).square().mean()

        tasks.append(ho.BilevelProblem(loss, loss, initial=lambda lam: lam))
    lam = {"a": drawn(1, 6, seed=7).requires_grad_(), "b": drawn(6, 1, seed=8).requires_grad_()}
    with pytest.raises(ValueError, match=r"lam\['a'\] lies in the memory of w"):
        ho.Bilevel(tasks[0], lam, inner=ho.GradientDescent(), adjoint=ho.Unrolled()).step(lam)
    w = {name: torch.zeros_like(x) for name, x in lam.items()}
    runs = [ho.Bilevel(p, w, inner=ho.GradientDescent(step_size=0.1, max_steps=3), adjoint=ho.Unrolled()) for p in tasks]
    optimizer, losses = torch.optim.Adam(lam.values(), lr=0.1), []
    start = {name: x.detach().clone() for name, x in lam.items()}
    first = [run.step(lam).loss for run in runs]
    assert [run.step(lam).loss for run in runs] == first  # training starts anew, not where it ended
    assert all(torch.equal(lam[name], start[name]) for name in lam)  # and leaves the hyperparameters alone
    for _ in range(30):
        optimizer.zero_grad()
        found = [run.step(lam) for run in runs]
        for estimate in found:
            estimate.backward(lam)
        losses.append(sum(estimate.loss for estimate in found))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_an_implicit_gradient_in_the_start_is_zero_and_named() -> None:
    problem = ho.BilevelProblem(
        lambda w, lam, batch: (w - lam["c"]).square().sum() / 2,
        lambda w, lam, batch: w.square().sum() / 2,
        initial=lambda lam: lam["w0"],
    )
    lam = {"c": drawn(3), "w0": drawn(3, seed=1)}
    found = ho.hypergradient(problem, torch.zeros(3, **D), lam, inner=ho.GradientDescent(step_size=0.5, max_steps=60))
    assert found.unused == ("lam['w0']",)
    assert torch.equal(found.grad["w0"], torch.zeros(3, **D))
    assert torch.allclose(found.grad["c"], lam["c"], atol=1e-12)


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        (lambda lam: lam["w0"][:2], r"initial\(lam\) has shape \(2,\), but in w it has \(3,\)"),
        (lambda lam: {"w": lam["w0"]}, "has the structure"),
        (lambda lam: lam["w0"].float(), "has dtype torch.float32"),
        (lambda lam: 0.0, "is a float"),
    ],
)
def test_a_start_that_is_not_like_w_is_refused(initial: Any, words: str) -> None:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return (w - lam["c"]).square().sum()

    problem, lam = ho.BilevelProblem(loss, loss, initial=initial), {"c": drawn(3), "w0": drawn(3)}
    with pytest.raises((TypeError, ValueError), match=words):
        ho.hypergradient(problem, torch.zeros(3, **D), lam, inner=ho.GradientDescent(), adjoint=ho.Unrolled())


def test_a_start_that_cannot_be_reached_is_refused() -> None:
    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return w.square().sum()

    problem, w = ho.BilevelProblem(loss, loss, initial=lambda lam: lam), drawn(3)
    with pytest.raises(ValueError, match=r"never reaches initial\(lam\)"):
        ho.hypergradient(problem, w, w, inner=ho.GradientDescent(max_steps=5), adjoint=ho.Unrolled(last=2))
    with pytest.raises(ValueError, match="nothing trains"):
        ho.hypergradient(problem, w, w)
    with pytest.raises(ValueError, match="nothing trains"):
        ho.Bilevel(problem, w, adjoint=ho.SOBA(step_size=0.1))


@pytest.mark.parametrize("adjoint", [ho.Unrolled(), ho.Checkpointed(), ho.Unrolled(last=4)], ids=repr)
def test_the_primitive_differentiates_an_iterate_in_its_start(adjoint: Any) -> None:
    w0, a = drawn(2, 3).requires_grad_(), torch.tensor(0.5, **D, requires_grad=True)
    solver = ho.Picard(rtol=0.0, atol=0.0, max_steps=4)
    value = ho.fixed_point(lambda w, a: a * torch.sin(w), w0, args=(a,), solver=solver, adjoint=adjoint).value
    want = w0
    for _ in range(4):
        want = a * torch.sin(want)
    for one, two in zip(torch.autograd.grad(value.sum(), (w0, a)), torch.autograd.grad(want.sum(), (w0, a)), strict=True):
        assert torch.allclose(one, two, atol=1e-14)
    for other in (ho.Implicit(), ho.Unrolled(last=2)):
        with pytest.raises(ValueError, match="w0 requires grad"):
            ho.fixed_point(lambda w, a: a * torch.sin(w), w0, args=(a,), solver=solver, adjoint=other)
